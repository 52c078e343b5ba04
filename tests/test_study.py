"""The study: a sweep equals the scores it stands for, a grid goes on, and the report says what was measured."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsd.backbone import Backbone, load_backbone
from dsd.baselines import baseline
from dsd.cli import main
from dsd.contracts import OptionError
from dsd.evaluate import evaluate
from dsd.matcher import Matcher
from dsd.metrics import paired_difference
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig
from dsd.study import grid, measure, store
from dsd.study import run as running
from dsd.study.found import START, Cell, Failures, Place, Study
from dsd.study.grid import FULL, QUICK, Item, StudyConfig, work
from dsd.study.measure import chance_of, outcomes_of
from dsd.study.report import Findings, command, summary, write_report
from dsd.study.run import gather, run
from dsd.study.store import PACK, Store
from dsd.sweep import groups_of, sweep
from dsd.tasks import world_task
from models import picture

Pipe = Callable[..., str]
TIMES = (10, 260, 510, 760)
PAIRS = [(picture(i), text) for i in range(2) for text in ("a red circle", "the dog " * 13, "cat")]


# A sweep


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (1, 3), (2,)])
def test_a_sweep_has_the_scores_of_its_passes(backbone: Backbone, steps: tuple[int, ...]) -> None:
    found = sweep(backbone, PAIRS, TIMES)
    # a score draws its noise for its own timesteps
    noise = Scorer(backbone, ScoreConfig("denoising", TIMES)).noise.numpy()[list(steps)]

    def score(kind: str) -> np.ndarray:
        config = ScoreConfig(kind, tuple(TIMES[k] for k in steps))
        return Scorer(backbone, config, noise=noise).predict(PAIRS)

    layers = groups_of(backbone)["paper's"]
    assert np.allclose(found.denoising(steps), score("denoising"), atol=1e-5)
    assert np.allclose(found.attention(steps), score("attention"), atol=1e-5)
    assert np.allclose(found.attention(steps, pooling="mass"), score("attention-mass"), atol=1e-5)
    assert np.allclose(found.paper_attention(steps, layers), score("paper-attention"), atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "l1", "huber"])
def test_a_sweep_has_the_errors_of_the_baselines(backbone: Backbone, norm: str) -> None:
    found = sweep(backbone, PAIRS, (125, 375, 625, 875))
    options: dict[str, Any] = {"model": backbone, "samples": 4, "loss": norm}
    assert np.allclose(
        found.error(range(4), norm), baseline("diffusion-classifier", **options).predict(PAIRS), atol=1e-5
    )
    assert np.allclose(
        found.error(range(4), norm, True), baseline("diffusion-itm", **options).predict(PAIRS), atol=1e-5
    )


def test_places_of_timesteps(backbone: Backbone) -> None:
    found = sweep(backbone, PAIRS[:1], TIMES)
    assert found.near((0, 300, 999)) == (0, 1, 3)
    assert found.steps(2) == (1, 3)
    assert found.steps(4) == (0, 1, 2, 3)
    with pytest.raises(OptionError):
        sweep(backbone, PAIRS, ())


# The grid

SMALL = StudyConfig(
    tasks=("winoground",),
    levels=("standard",),
    methods=("dsd prompt", "dsd weights"),
    shots=(8,),
    held_out=3,
    passes=5,
    max_steps=2,
    thorough=True,
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Item]:
    """What is measured, as it is."""
    items: list[Item] = []
    do = measure.do

    def watch(store: Store, item: Item) -> None:
        items.append(item)
        do(store, item)

    monkeypatch.setattr(measure, "do", watch)
    monkeypatch.setattr(measure, "BLIND", {"chance": "chance"})
    return items


@pytest.mark.slow
def test_a_study_goes_on(tmp_path: Path, made: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, SMALL)
    assert [item[0] for item in made] == ["sweep", "blind", "captions", "lesson", "lesson", "failures"]
    assert [c.method for c in first.cells] == ["dsd prompt", "dsd weights"]
    assert first.missing == ()
    assert [(f.method, f.shots) for f in first.failures] == [("denoising", 0)]
    assert sum(len(group["cards"]) for group in first.failures[0].groups) == 3
    assert gather(tmp_path, SMALL) == first
    assert all(len(c.outcomes) == 3 for c in (*first.cells, *first.places[0].zero))
    made.clear()
    assert run(tmp_path, SMALL) == first
    assert not made
    # what is broken or was made by another lesson is made again, and nothing else
    broken = tmp_path / "cells" / "sweep-winoground-standard.json"
    broken.write_text("{")
    lacking = gather(tmp_path, replace(SMALL, shots=(8, 16), seeds=2))
    assert lacking.missing == (
        "zero-shot scores and ablations of winoground standard",
        "3 of 4 lessons of dsd prompt",
        "3 of 4 lessons of dsd weights",
    )
    assert gather(tmp_path, replace(SMALL, methods=("dsd prompt",))).cells == first.cells
    assert lacking.cells == first.cells
    assert lacking.places[0].tags == first.places[0].tags
    assert lacking.places[0].chance == first.places[0].chance
    assert not lacking.places[0].ablations
    assert "Not measured yet: zero-shot" in write_report(lacking, tmp_path / "report")[0].read_text()
    lesson = grid.LESSONS["dsd weights"]
    other = replace(lesson, config=replace(lesson.config, draws=1))
    monkeypatch.setitem(grid.LESSONS, "dsd weights", other)
    again = run(tmp_path, SMALL)
    assert [item[0:1] + item[3:4] for item in made] == [("sweep",), ("lesson", "dsd weights")]
    assert again.places[0].zero == first.places[0].zero
    # a smaller grid is part of what is there
    smaller = replace(SMALL, methods=("dsd prompt",))
    assert run(tmp_path, smaller) == replace(again, asked=smaller)
    with pytest.raises(OptionError, match="another request"):
        run(tmp_path, replace(SMALL, held_out=4))


def test_a_lesson_of_other_prompts_does_not_hold(tmp_path: Path) -> None:
    kept = Store(tmp_path, SMALL)
    item: Item = ("lesson", "comvg", "standard", "dsd prompt", 24, 0)
    kept.put(item, {"cell": 1})
    values = json.loads(kept.path(item).read_text())
    assert kept.get(item) == values
    values["made_by"]["prompt"]["rank"] += 1
    kept.path(item).write_text(json.dumps(values))
    assert kept.get(item) is None


@pytest.mark.slow
def test_weights_go_on_from_the_prompts_of_another_lesson(tmp_path: Path, made: list[Item]) -> None:
    both = replace(SMALL, tasks=("comvg",), methods=("dsd prompt", "dsd prompt + weights"), shots=(24,))
    first: Item = ("lesson", "comvg", "standard", "dsd prompt", 24, 0)
    item: Item = (*first[:3], "dsd prompt + weights", *first[4:])
    alone, after = (Store(tmp_path / name, both) for name in ("alone", "after"))
    measure.do(alone, item)
    measure.do(after, first)
    assert after.taught(first).exists()
    measure.do(after, item)
    assert not after.taught(first).exists()
    assert not list((tmp_path / "after" / "cells").glob("*.checkpoint"))
    whole, known, rest = alone.get(item), after.get(first), after.get(item)
    assert whole is not None
    assert known is not None
    assert rest is not None
    assert rest["cell"].pop("seconds") > known["cell"]["seconds"]
    whole["cell"].pop("seconds")
    assert rest["cell"] == whole["cell"]
    assert rest["took"] < whole["took"]


@pytest.mark.slow
def test_lessons_go_on_from_what_captions_taught(
    tmp_path: Path, made: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few examples change nothing of it; another adapter makes what goes on from it anew, and nothing else."""
    small = replace(SMALL, tasks=("comvg",), methods=("dsd prompt", "dsd captions, prompt"))
    first = run(tmp_path, small)
    captions = next(c for c in first.places[0].zero if c.method.startswith("captions"))
    (cell,) = (c for c in first.cells if c.method == "dsd captions, prompt")
    assert (cell.outcomes, cell.passes, cell.kept) == (captions.outcomes, 1, False)
    matcher = Matcher.from_pretrained("tiny", adapter="tiny-captions", device="cpu")
    assert matcher.score_config == ScoreConfig("attention", grid.ONE)
    examples = measure.held_out(small, "comvg", "standard")
    assert captions.outcomes == tuple(measure.outcomes_of("comvg", examples, evaluate(matcher, examples).scores))
    made.clear()
    digest = store._digest
    monkeypatch.setattr(store, "_digest", lambda folder: "0" if folder == "adapter" else digest(folder))
    run(tmp_path, small)
    assert [item[0:1] + item[3:4] for item in made] == [("captions",), ("lesson", "dsd captions, prompt")]


@pytest.mark.slow
def test_one_file_is_enough_to_go_on_from(tmp_path: Path, made: list[Item]) -> None:
    small = replace(SMALL, tasks=("comvg",), methods=("dsd weights",))
    first = run(tmp_path, small)
    data = Store(tmp_path, small).pack().read_bytes()
    assert Store(tmp_path, small).pack().read_bytes() == data
    shutil.rmtree(tmp_path / "cells")
    assert gather(tmp_path, small).cells == first.cells
    assert gather(tmp_path, small).places == first.places
    made.clear()
    larger = replace(small, seeds=2)
    second = run(tmp_path, larger)
    assert [item[0] for item in made] == ["lesson", "failures"]
    Store(tmp_path, larger).pack()
    shutil.rmtree(tmp_path / "cells")
    Store(tmp_path, small).pack()  # a smaller grid takes nothing away
    assert gather(tmp_path, larger).cells == second.cells
    (tmp_path / PACK).write_bytes(b"nothing of the kind")
    with pytest.raises(OptionError, match="cannot be read"):
        gather(tmp_path, small)


@pytest.mark.slow
def test_an_interrupt_does_not_wait_for_what_is_measured(tmp_path: Path) -> None:
    """Even one that the first process alone gets: what was being measured is not there in the end."""
    argv = ["study", "--quick", "--jobs", "2", "--out", str(tmp_path / "s")]
    script = tmp_path / "start.py"
    # tests that run in the background ignore interrupts, and so would what they start
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script.write_text(
        f"{heed}from dsd.cli import main\nif __name__ == '__main__':\n    raise SystemExit(main({argv!r}))\n"
    )
    started = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, start_new_session=True)
    assert started.stderr is not None
    try:
        assert b"are left" in started.stderr.readline()
        time.sleep(5)
        there = set(tmp_path.glob("s/cells/*.json"))
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=120)
    finally:
        started.kill()
        started.wait()
        started.stderr.close()
    assert started.returncode == 130
    assert b"dsd study: stopped" in err
    assert set(tmp_path.glob("s/cells/*.json")) == there


@pytest.mark.slow
def test_no_worker_outlives_the_study() -> None:
    """The output has an end once the child, which holds it open, is gone too."""
    child = "_leave_with(parent); time.sleep(600)"
    code = f"import os, time; from dsd.study.run import _leave_with; parent = os.getpid()\nif not os.fork(): {child}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"tasks": ("nonesuch",)},
        {"levels": ()},
        {"methods": ("prompt",)},
        {"shots": (2,)},
        {"seeds": 0},
        {"held_out": 0},
    ],
)
def test_refused_grids(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        StudyConfig(**wrong)


@pytest.mark.parametrize("argv", [["--tasks", "x"], ["--methods", "x"], ["--shots", "1"], ["--jobs", "0"]])
def test_refused_commands(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--out", str(tmp_path / "s"), *argv]) == 2
    assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_command_makes_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    grids: list[StudyConfig] = []

    def watch(out: str, config: StudyConfig, **options: Any) -> Study:
        grids.append(config)
        raise OptionError("enough")

    monkeypatch.setattr(running, "run", watch)
    for size in (StudyConfig(), FULL, QUICK, replace(SMALL, max_steps=None, passes=50, seeds=2)):
        words = shlex.split(command(size))
        assert words[0] == "dsd"
        assert main([*words[1:], "--out", str(tmp_path)]) == 2
        assert replace(grids[-1], thorough=size.thorough) == size
        assert grids[-1].thorough or not size.thorough


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "--out", str(tmp_path), "--report-only"]) == 2
    assert "make one first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_slow_lessons_are_few_unless_asked_for() -> None:
    small = StudyConfig(tasks=("comvg",), methods=("dsd prompt", "dsd weights"), shots=(16, 64), seeds=2)
    lessons = [item[2:] for item in work(small) if item[0] == "lesson"]
    assert [item for item in lessons if item[1] == "dsd prompt"] == [("standard", "dsd prompt", 64, 0)]
    assert sum(item[1] == "dsd weights" for item in lessons) == 8
    every = [item for item in work(replace(small, thorough=True)) if item[3:4] == ("dsd prompt",)]
    assert len(every) == 8


def test_the_best_that_was_kept_is_shown() -> None:
    def cell(method: str, mean: float, shots: int = 64, kept: bool | None = True, seed: int = 0) -> Cell:
        return Cell(method, "comvg", "standard", shots, seed, (mean,), 5, 1.0, kept)

    cells = [
        cell("dsd prompt", 0.6),
        cell("dsd weights", 0.7),
        cell("dsd heads", 0.8, kept=False),
        cell("dsd tokens", 0.8, shots=16),
        cell("dsd tokens", 0.8, seed=1),
        cell("CLIP LoRA", 0.9, kept=None),
    ]
    items = running._shown(StudyConfig(tasks=("comvg", "vqa")), cells)
    assert [item[1:] for item in items] == [
        ("comvg", "standard", "denoising", 0),
        ("comvg", "standard", "dsd weights", 64),
        ("vqa", "standard", "denoising", 0),
    ]


def test_winoground_counts_whole_groups() -> None:
    examples = world_task("winoground", "val", "easy", 3, 0)
    right, one_wrong, tied = np.array([[2, 1], [0, 3]]), np.array([[2, 1], [2.5, 3]]), np.array([[1, 1], [0, 2]])
    assert outcomes_of("winoground", examples, [right, one_wrong, tied]).tolist() == [1, 0, 0]


def test_random_scores_get_chance() -> None:
    rng = np.random.default_rng(0)
    for task in ("comvg", "winoground", "refcocog", "vqa"):
        examples = world_task(task, "val", "easy", 12, 0)
        won = [
            outcomes_of(task, examples, [rng.random((len(e.images), len(e.texts))) for e in examples]).mean()
            for _ in range(300)
        ]
        error = 3 * np.std(won) / np.sqrt(300)
        assert abs(np.mean(won) - chance_of(task, examples)) < error + 1e-9, task


# The report


def _study() -> Study:
    rng = np.random.default_rng(3)
    places, cells = [], []
    for task in ("comvg", "winoground"):
        tags = tuple((("predicate", "subject")[i % 2],) for i in range(40))

        def cell(name: str, share: float, task: str = task, **more: Any) -> Cell:
            values = tuple(float(v) for v in rng.random(40) < share)
            return Cell(name, task, "standard", more.pop("shots", 0), more.pop("seed", 0), values, **more)

        zero = (
            cell("Diffusion Classifier, L2, 50 passes", 0.6, passes=50),
            cell("DiffusionITM, 50 passes", 0.7, passes=50),
            cell("denoising, 50 passes", 0.99, passes=50),
            cell("denoising, 5 passes", 0.6, passes=5),
            cell(START, 0.6, passes=5),
        )
        curve = {str(n): tuple(map(float, rng.random(40) < 0.6)) for n in (1, 5, 50)}
        places.append(Place(task, "standard", tags, 0.5, zero, {"denoising by number of timesteps": curve}))
        for seed in range(2):
            for shots in (16, 64):
                for name, share in (("dsd prompt", 0.9), ("CLIP LoRA", 0.5), ("CLIP <CoOp>", 0.4)):
                    passes = 5 if name.startswith("dsd") else 0
                    cells.append(cell(name, share, shots=shots, seed=seed, passes=passes, seconds=2.0))
    config = StudyConfig(
        tasks=("comvg", "winoground"),
        levels=("standard",),
        methods=("dsd prompt", "CLIP LoRA"),
        shots=(16, 64),
        seeds=2,
    )
    return Study(config, tuple(places), tuple(cells), 60.0)


def test_findings_are_those_of_the_cells() -> None:
    made = _study()
    found = Findings(made)
    cells = [c for c in made.cells if (c.method, c.task, c.shots) == ("dsd prompt", "comvg", 64)]
    rows = np.array([c.outcomes for c in cells])
    assert rows.shape == (2, 40)
    metric = found.metric("dsd prompt", "comvg", "standard", 64)
    assert metric is not None
    assert metric["value"] == pytest.approx(rows.mean())
    rival = np.array(made.places[0].zero[0].outcomes)
    assert found.difference("dsd prompt", made.places[0].zero[0].method, "comvg", "standard", 64) == paired_difference(
        rows.mean(0), rival
    )
    # the compositional kinds count the same: predicates of comvg, all of winoground
    groups = np.array(
        [c.outcomes for c in made.cells if (c.method, c.task, c.shots) == ("dsd prompt", "winoground", 64)]
    )
    gap = found.compositional("dsd prompt", "Diffusion Classifier, L2, 50 passes", "standard", 64)
    assert gap is not None
    own = (rows[:, ::2].mean() + groups.mean()) / 2
    others = (rival[::2].mean() + np.mean(made.places[1].zero[0].outcomes)) / 2
    assert gap["value"] == pytest.approx(own - others)
    assert gap["low"] < gap["value"] < gap["high"]
    assert found.best(["CLIP LoRA", "dsd prompt"], "standard", 64) == "dsd prompt"
    assert found.metric("nonesuch", "comvg", "standard", 64) is None


def test_words_never_seen_have_a_table() -> None:
    made = _study()
    tags = tuple((("novel-fill", "novel-relation")[i % 2], "text-choice") for i in range(40))
    cells = tuple(replace(c, task="novel") if c.task == "comvg" else c for c in made.cells)
    zero = tuple(replace(c, task="novel") for c in made.places[0].zero)
    places = (replace(made.places[0], task="novel", tags=tags, zero=zero), made.places[1])
    novel = replace(made, config=replace(made.config, tasks=("novel", "winoground")), places=places, cells=cells)
    rows = {row["method"]: row for row in summary(novel)["tables"]["Words that pretraining never saw, standard"]}
    taught = np.array([c.outcomes for c in cells if (c.method, c.task, c.shots) == ("dsd prompt", "novel", 64)])
    assert rows["dsd prompt"]["fill"]["value"] == pytest.approx(taught[:, ::2].mean())
    assert rows["dsd prompt"]["relation"]["value"] == pytest.approx(taught[:, 1::2].mean())
    assert rows["DiffusionITM, 50 passes"]["shots"] == 0
    assert len(rows) == 5 + 3


def test_what_learning_adds_is_measured_against_the_same_passes_under_the_same_noise() -> None:
    made = _study()
    (row,) = summary(made)["tables"]["What learning adds to five passes, standard"]
    before = np.array([c.outcomes for p in made.places for c in p.zero if (p.task, c.method) == ("comvg", START)])
    after = np.array([c.outcomes for c in made.cells if (c.method, c.task, c.shots) == ("dsd prompt", "comvg", 64)])
    assert row["method"] == "dsd prompt"
    assert float(row["comvg"].split()[0]) == pytest.approx(100 * (after.mean() - before.mean()), abs=0.051)


def test_what_is_written(tmp_path: Path) -> None:
    card = {
        "id": "one <i>",
        "tags": ["subject"],
        "won": False,
        "margin": "0.1000",
        "panels": [],
        "rows": [{"picture": None, "text": "a <u>", "right": True, "chosen": False, "score": "0.1"}],
    }
    groups = ({"title": "The worst", "note": "1 of 40", "cards": [card]},)
    made = replace(
        _study(), missing=("3 of 4 lessons of x",), failures=(Failures("dsd prompt", "comvg", "standard", 64, groups),)
    )
    example = replace(world_task("comvg", "val", "easy", 1, 0)[0], texts=("a <b>bold</b> claim",), positives=((0, 0),))
    written = write_report(made, tmp_path, {"comvg": example})
    assert {p.suffix for p in written} == {".md", ".tex", ".csv", ".json", ".html", ".png"}
    assert all(p.stat().st_size > 100 for p in written)
    page = (tmp_path / "study.html").read_text()
    assert "<b>bold" not in page
    assert "CLIP &lt;CoOp&gt;" in page
    assert "one &lt;i&gt;" in page
    assert "a &lt;u&gt;" in page
    assert "3 of 4 lessons of x" in page
    assert not re.search(r"(src|href)=\"(?!data:|\")", page)
    text = (tmp_path / "study.md").read_text()
    assert "denoising, 50 passes has 0." in text or "denoising, 50 passes has 1." in text
    assert "carries no claim" in text
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.cells) + sum(len(p.zero) for p in made.places)
    assert (
        json.loads((tmp_path / "study.json").read_text())["tables"] == json.loads(json.dumps(summary(made)))["tables"]
    )
    assert (tmp_path / "study.tex").read_text().count("\\\\") == 1 + len(
        {c.method for c in made.cells} | {c.method for p in made.places for c in p.zero}
    )
