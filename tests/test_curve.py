"""The learning curve: nested draws, rows that are made once, a bare model afterwards, requests that cannot be met."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsd import curve, prompts
from dsd.adapters import Adapter
from dsd.backbone import Backbone, load_backbone
from dsd.cli import learning, main
from dsd.contracts import Example, ManifestError, OptionError
from dsd.curve import FILE, PICTURE, Curve, learning_curve, world_sets
from dsd.evaluate import evaluate
from dsd.learn import FitConfig, Learner
from dsd.matcher import Matcher
from dsd.metrics import bootstrap_interval, paired_difference
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig
from models import picture, save_adapter

Pipe = Callable[..., str]
SCORE = ScoreConfig("attention", (300,))
QUICK = FitConfig(validation=0.25, steps=3, batch=2, check_every=1, learning_rate=0.1, jitter=10)
SMALL: dict[str, Any] = {"shots": (0, 3, 5), "seeds": 2, "config": QUICK, "prompt": PromptConfig(rank=1)}


def choices(count: int, first: int) -> list[Example]:
    """Text choices, each about a picture of its own."""
    texts = ("a red square", "a blue circle")
    return [Example(f"{k}", (picture(k),), texts, ((0, k % 2),)) for k in range(first, first + count)]


POOL, HELD_OUT = choices(8, 0), choices(6, 100)


@cache
def backbone(model: str) -> Backbone:
    return load_backbone(model)


def is_bare(backbone: Backbone) -> bool:
    return not prompts.parameters(backbone.denoiser) and not hasattr(backbone.denoiser, "peft_config")


@pytest.fixture
def matcher(pipe: Pipe) -> Matcher:
    found = backbone(pipe())
    prompts.detach(found.denoiser)
    return Matcher(found, SCORE)


class Fits:
    """Stands in for learning: notes what it is asked for, and attaches prompts that change the scores."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[tuple[int, list[str]]] = []
        self.stop_at = stop_at

    def __call__(self, scorer: Any, examples: Sequence[Example], *_: Any, **options: Any) -> Adapter:
        assert is_bare(scorer.backbone)
        config, prompt = options["config"], options["prompt"]
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((config.seed, [e.id for e in examples]))
        prompts.attach(scorer.backbone.denoiser, prompt, config.seed)
        found = prompts.parameters(scorer.backbone.denoiser)
        generator = torch.Generator().manual_seed(10 * config.seed + len(examples))
        state = {name: torch.randn(p.shape, generator=generator) for name, p in found.items()}
        prompts.load_state(scorer.backbone.denoiser, state)
        other = replace(scorer.score.config, timesteps=(600,))  # learning may end with another score
        scorer.use(other)
        return Adapter(None, other, prompt, state, scorer.size, {"kept": len(examples) > 3})


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    made = Fits()
    monkeypatch.setattr("dsd.matcher.fit", made)
    return made


# Draws


def test_draws_are_nested_and_differ_between_seeds(matcher: Matcher, fits: Fits) -> None:
    learning_curve(matcher, POOL, HELD_OUT, **SMALL | {"shots": (8, 5, 3, 0, 5)})
    assert [(seed, len(ids)) for seed, ids in fits.asked] == [(0, 3), (0, 5), (0, 8), (1, 3), (1, 5), (1, 8)]
    known = {e.id for e in POOL}
    for _, ids in fits.asked:
        assert len(set(ids)) == len(ids)
        assert set(ids) <= known
    drawn = [ids for _, ids in fits.asked]
    for few, some, most in (drawn[:3], drawn[3:]):
        assert few == some[:3] == most[:3]
        assert some == most[:5]
    assert drawn[0] != drawn[3]


def test_draws_depend_on_the_seed_alone(matcher: Matcher, fits: Fits) -> None:
    learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    learning_curve(matcher, POOL, HELD_OUT, **SMALL | {"shots": (0, 4), "seeds": 1, "config": replace(QUICK, seed=1)})
    assert fits.asked[4][0] == 1
    assert fits.asked[4][1] == fits.asked[3][1][:4]


def test_the_pool_of_the_world_is_disjoint_from_what_is_measured_on() -> None:
    pool, held_out = world_sets("comvg", "easy", 3, shots=(0, 2, 5), seeds=2, seed=4)
    assert len(pool) == 10
    assert [e.id for e in held_out] == [f"comvg-test-easy-4-{i}" for i in range(3)]
    assert all(e.id.startswith("comvg-few-shot-easy-4-") for e in pool)
    novel, _ = world_sets("comvg", "easy", 1, shots=(2,), seeds=1, novel=True)
    assert {tag for e in novel for tag in e.tags} >= {"novel-fill", "novel-relation"}


# Rows and points


def test_rows_and_points(matcher: Matcher, fits: Fits) -> None:
    zero = evaluate(matcher, HELD_OUT)
    made = learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    assert [(r.shots, r.seed) for r in made.rows] == [(0, None), (3, 0), (5, 0), (3, 1), (5, 1)]
    first = made.rows[0]
    assert first.metrics == zero.metrics
    assert (first.gain, first.kept, first.seconds) == (None, False, 0)
    assert made.chance == 0.5
    for row in made.rows[1:]:
        assert row.metrics["accuracy"]["value"] == pytest.approx(np.mean(row.outcomes))
        assert row.gain == paired_difference(row.outcomes, first.outcomes)
        assert row.kept == (row.shots > 3)
    assert len({row.outcomes for row in made.rows}) > 1
    points = made.points
    assert [(p.shots, p.fits, p.kept) for p in points] == [(0, 0, 0), (3, 2, 0), (5, 2, 2)]
    assert points[0].gain is None
    for point in points[1:]:
        rows = [r for r in made.rows if r.shots == point.shots]
        mean = np.mean([r.metrics["accuracy"]["value"] for r in rows])
        assert point.accuracy["value"] == pytest.approx(mean)
        assert point.accuracy["low"] <= mean <= point.accuracy["high"]
        assert point.gain is not None
        assert point.gain["value"] == pytest.approx(mean - first.metrics["accuracy"]["value"])
    _, low, high = bootstrap_interval(first.outcomes)
    assert (points[0].accuracy["low"], points[0].accuracy["high"]) == pytest.approx((low, high), abs=0.1)


def test_zero_shot_is_measured_even_if_not_asked_for(matcher: Matcher, fits: Fits) -> None:
    made = learning_curve(matcher, POOL, HELD_OUT, **SMALL | {"shots": (3,), "seeds": 1})
    assert [p.shots for p in made.points] == [0, 3]


def test_examples_without_a_choice_are_left_out_of_the_rows(matcher: Matcher, fits: Fits) -> None:
    idle = Example("idle", (picture(500),), ("a dog",), ((0, 0),))
    made = learning_curve(matcher, POOL, [idle, *HELD_OUT], **SMALL)
    assert {len(row.outcomes) for row in made.rows} == {len(HELD_OUT)}
    assert made.points[1].accuracy["n"] == len(HELD_OUT)


def test_chance_is_that_of_the_held_out_examples(matcher: Matcher, fits: Fits) -> None:
    texts = ("a dog", "a cat", "a red square", "a blue circle")
    four = [Example(f"{k}", (picture(k),), texts, ((0, k % 4),)) for k in range(200, 203)]
    assert learning_curve(matcher, POOL, four, **SMALL).chance == 0.25


def test_a_point_is_what_fitting_by_hand_gives(matcher: Matcher) -> None:
    held = choices(6, 300)
    options = {"shots": (0, 4), "seeds": 1, "config": replace(QUICK, seed=3), "prompt": PromptConfig(rank=1)}
    made = learning_curve(matcher, POOL, HELD_OUT, validation=held, **options)
    assert is_bare(matcher.backbone)
    matcher.fit(curve._draw(POOL, 3)[:4], held, config=replace(QUICK, seed=3), prompt=PromptConfig(rank=1))
    assert matcher.adapter is not None
    assert made.rows[1].kept == matcher.adapter.training["kept"]
    assert made.rows[1].metrics == evaluate(matcher, HELD_OUT).metrics
    matcher.forget()


def test_a_curve_from_an_adapter_starts_with_that(matcher: Matcher, tmp_path: Path) -> None:
    """Its own score before any example, and the same after so few that nothing can be shown."""
    start = Adapter.load(save_adapter(tmp_path / "start", matcher.backbone.name))
    few: dict[str, Any] = {"shots": (0, 5), "config": QUICK, "start": start}
    curve = learning_curve(matcher, POOL, HELD_OUT, tmp_path / "curve", **few)
    assert is_bare(matcher.backbone)
    expected = evaluate(Matcher(matcher.backbone, adapter=start), HELD_OUT)
    assert curve.rows[0].metrics == expected.metrics
    prompts.detach(matcher.backbone.denoiser)
    assert [row.kept for row in curve.rows] == [False] * len(curve.rows)
    assert curve.config["start"] == start.digest()
    other = replace(start, state={name: 2 * v for name, v in start.state.items()})
    with pytest.raises(OptionError, match="another request"):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path / "curve", **few | {"start": other})


def test_the_matcher_is_as_it_was(matcher: Matcher, fits: Fits) -> None:
    before = matcher.predict(HELD_OUT[0].pairs)
    learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    assert is_bare(matcher.backbone)
    assert matcher.adapter is None
    assert matcher.score_config == SCORE
    np.testing.assert_array_equal(matcher.predict(HELD_OUT[0].pairs), before)


def test_the_matcher_is_bare_after_a_fault(
    matcher: Matcher, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(found: Matcher, *_: Any, **__: Any) -> Any:
        if found.adapter is not None:
            raise ZeroDivisionError
        return evaluate(found, HELD_OUT)

    monkeypatch.setattr(curve, "evaluate", fail)
    with pytest.raises(ZeroDivisionError):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL)
    assert is_bare(matcher.backbone)
    assert len(Curve.load(tmp_path / FILE).rows) == 1


# On disk


def timeless(made: Curve) -> Curve:
    return replace(made, rows=tuple(replace(row, seconds=0) for row in made.rows))


def test_saved_and_read_again(matcher: Matcher, fits: Fits, tmp_path: Path) -> None:
    made = learning_curve(matcher, POOL, HELD_OUT, tmp_path / "new" / "out", name="toy", **SMALL)
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == {FILE, PICTURE}
    found = Curve.load(tmp_path / "new" / "out" / FILE)
    assert found == made
    data = json.loads((tmp_path / "new" / "out" / FILE).read_text())
    assert set(data) == {"config", "versions", "chance", "points", "rows"}
    assert data["config"]["shots"] == [0, 3, 5]
    assert data["config"]["fit"]["steps"] == QUICK.steps
    assert data["config"]["matcher"]["score"]["kind"] == "attention"
    assert {"python", "torch", "numpy"} <= set(data["versions"])
    with Image.open(tmp_path / "new" / "out" / PICTURE) as drawn:
        drawn.load()
        assert drawn.width > 1000


def test_a_stopped_curve_goes_on(matcher: Matcher, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    monkeypatch.setattr("dsd.matcher.fit", Fits(stop_at=2))
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path, announce=said.append, **SMALL)
    assert is_bare(matcher.backbone)
    assert len(Curve.load(tmp_path / FILE).rows) == 3
    rest = Fits()
    monkeypatch.setattr("dsd.matcher.fit", rest)
    made = learning_curve(matcher, POOL, HELD_OUT, tmp_path, announce=said.append, **SMALL)
    assert [(seed, len(ids)) for seed, ids in rest.asked] == [(1, 3), (1, 5)]
    assert timeless(made) == timeless(whole)
    again = learning_curve(matcher, POOL, HELD_OUT, tmp_path, announce=said.append, **SMALL)
    assert len(rest.asked) == 2
    assert again == made
    assert said == [
        "4 fits (3, 5 examples; 2 seeds), 5 measurements on 6 held-out examples to do",
        "2 fits (3, 5 examples; 2 seeds), 2 measurements on 6 held-out examples to do; 3 rows of it done before",
        "nothing to do; 5 rows of it done before",
    ]


def test_a_stopped_fit_goes_on(matcher: Matcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SMALL | {"shots": (0, 8), "seeds": 1, "config": replace(QUICK, validation=0.75)}
    whole = learning_curve(matcher, POOL, HELD_OUT, **options)
    step, taken = Learner.step, []

    def counted(learner: Learner) -> float:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(learner.done)
        return step(learner)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            learning_curve(matcher, POOL, HELD_OUT, tmp_path, **options)
    assert {p.name for p in tmp_path.iterdir()} == {FILE, "fit-8-0.checkpoint"}
    monkeypatch.setattr(Learner, "step", lambda learner: (taken.append(learner.done), step(learner))[1])
    made = learning_curve(matcher, POOL, HELD_OUT, tmp_path, **options)
    assert taken == [0, 1, 2]
    assert timeless(made) == timeless(whole)
    assert {p.name for p in tmp_path.iterdir()} == {FILE, PICTURE}


def test_a_fit_keeps_its_checkpoint_in_the_folder(
    matcher: Matcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fit(*_: Any, **options: Any) -> Adapter:
        asked.append((options["checkpoint"], options["resume"]))
        return Adapter(None, SCORE, None, {}, None, {"kept": False})

    monkeypatch.setattr("dsd.matcher.fit", fit)
    learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL | {"seeds": 1})
    assert asked == [(tmp_path / "fit-3-0.checkpoint", True), (tmp_path / "fit-5-0.checkpoint", True)]


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "shots": ({"shots": (0, 3)}, "shots"),
    "seeds": ({"seeds": 1}, "seeds"),
    "learning": ({"config": replace(QUICK, steps=4)}, "fit"),
    "prompts": ({"prompt": PromptConfig(rank=2)}, "prompt"),
    "pool": ({"pool": POOL[:7]}, "pool"),
    "held-out examples": ({"held_out": HELD_OUT[:5]}, "held_out"),
    "validation": ({"validation": choices(3, 700)}, "validation"),
    "name": ({"name": "other"}, "name"),
}


@pytest.mark.parametrize(("change", "told"), OTHER.values(), ids=OTHER.keys())
def test_a_curve_of_another_request(
    matcher: Matcher, fits: Fits, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    options = {"pool": POOL, "held_out": HELD_OUT, "out": tmp_path, **SMALL}
    learning_curve(matcher, **options)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(OptionError, match=rf"another request \(other: {told}\)"):
        learning_curve(matcher, **options | change)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_curve_of_another_model_score_noise_or_version(
    matcher: Matcher, pipe: Pipe, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL)
    noise = np.zeros((1, 4, 8, 8), np.float32)
    for other, told in (
        (Matcher(backbone(pipe(seed=1)), SCORE), "matcher, base"),
        (Matcher(matcher.backbone, replace(SCORE, kind="denoising")), "matcher"),
        (Matcher(matcher.backbone, SCORE, noise=noise), "matcher"),
    ):
        with pytest.raises(OptionError, match=rf"\(other: {told}\)"):
            learning_curve(other, POOL, HELD_OUT, tmp_path, **SMALL)
    monkeypatch.setattr(curve, "installed_versions", lambda: {"python": "2.7"})
    with pytest.raises(OptionError, match=r"\(other: versions\)"):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL)


def test_a_folder_where_nothing_was_finished_is_free(
    matcher: Matcher, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(curve, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL)
    assert (tmp_path / FILE).exists()
    learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL | {"seeds": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"rows": [{"shots": 1}]}'])
def test_a_broken_file(matcher: Matcher, fits: Fits, tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ManifestError, match=FILE):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path, **SMALL)
    assert not fits.asked


def test_a_curve_that_does_not_begin_with_zero_shot(matcher: Matcher, fits: Fits, tmp_path: Path) -> None:
    made = learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    replace(made, rows=made.rows[1:]).save(tmp_path / FILE)
    with pytest.raises(ManifestError, match="zero-shot"):
        Curve.load(tmp_path / FILE)
    with pytest.raises(ManifestError, match="no curve"):
        Curve.load(tmp_path / "none.json")


# Requests that cannot be met


NEW = {"config": replace(QUICK, method="words"), "prompt": PromptConfig(words=("grue",))}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no shots": ({"shots": ()}, "got shots none"),
    "zero-shot alone": ({"shots": (0,)}, "at least one of them more than 0"),
    "negative shots": ({"shots": (0, -4)}, "-4"),
    "no seeds": ({"seeds": 0}, "got 0 seeds"),
    "weights of another score": ({"config": FitConfig("weights")}, "attention with weights"),
    "more than the pool": ({"shots": (3, 9)}, "got 9 shots, expected at most 8"),
    "too few to hold some out": ({"shots": (1,)}, "got 1 shots"),
    "one picture": ({"pool": [replace(POOL[0], id=f"{i}") for i in range(8)]}, "pictures of"),
    "nothing competes": ({"pool": [*POOL, replace(POOL[0], id="idle", texts=("a",), positives=((0, 0),))]}, "idle"),
    "nothing competes in validation": ({"validation": [replace(POOL[0], texts=("a",), positives=((0, 0),))]}, "compe"),
    "words that few draws have": (
        {"pool": [replace(POOL[0], texts=("a grue", "a dog")), *POOL[1:]], **NEW},
        "got grue to learn",
    ),
    "words without a method for them": ({"prompt": PromptConfig(words=("red",))}, "'prompt' and red"),
    "measured on what is learned": ({"held_out": [*HELD_OUT, replace(POOL[2], id="leak")]}, "leak"),
    "measured on what stops": ({"validation": HELD_OUT[:1]}, "pictures of their own"),
}


@pytest.mark.parametrize(("change", "told"), BAD.values(), ids=BAD.keys())
def test_requests_that_cannot_be_met(
    matcher: Matcher, fits: Fits, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    options = {"pool": POOL, "held_out": HELD_OUT, "out": tmp_path / "out", **SMALL} | change
    with pytest.raises(OptionError, match=told) as caught:
        learning_curve(matcher, **options)
    assert "expected" in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not fits.asked


def test_weights_are_learned_from_the_denoising_score(matcher: Matcher, tmp_path: Path) -> None:
    judge = Matcher(matcher.backbone, ScoreConfig("denoising", (300,)))
    config = FitConfig("weights", draws=1, folds=2)
    with pytest.raises(OptionError, match="hold out by turns"):
        learning_curve(judge, POOL, HELD_OUT, shots=(1, 4), seeds=1, config=config)
    made = learning_curve(judge, POOL, HELD_OUT, tmp_path, shots=(2, 4), seeds=1, config=config)
    assert [row.shots for row in made.rows] == [0, 2, 4]
    assert judge.score_config.kind == "denoising"
    assert {p.name for p in tmp_path.iterdir()} == {FILE, PICTURE}


def test_held_out_examples_without_a_choice(matcher: Matcher, fits: Fits) -> None:
    idle = [Example("idle", (picture(500),), ("a dog",), ((0, 0),))]
    with pytest.raises(ManifestError, match="none with a choice"):
        learning_curve(matcher, POOL, idle, **SMALL)
    with pytest.raises(ManifestError, match="got 0 held-out examples"):
        learning_curve(matcher, POOL, [], **SMALL)


def test_a_matcher_that_was_taught(matcher: Matcher, fits: Fits) -> None:
    matcher.fit(POOL, config=QUICK, prompt=PromptConfig(rank=1))
    with pytest.raises(OptionError, match="bare"):
        learning_curve(matcher, POOL, HELD_OUT, **SMALL)
    matcher.forget()


def test_a_folder_that_cannot_be_written(matcher: Matcher, fits: Fits, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        learning_curve(matcher, POOL, HELD_OUT, tmp_path / "file", **SMALL)
    assert not fits.asked


# Command line


def manifest(folder: Path, name: str, examples: Sequence[Example]) -> Path:
    lines = []
    for e in examples:
        e.images[0].save(folder / f"{e.id}.png")  # type: ignore[union-attr]
        lines.append({"id": e.id, "images": [f"{e.id}.png"], "texts": e.texts, "positives": e.positives})
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsd(pipe: Pipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``dsd curve`` in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr("dsd.matcher.load_backbone", lambda model, **_: backbone(model))

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        options = ("--model", pipe(), "--score", "attention", "--timesteps", "300", "--max-steps", "2", "--rank", "1")
        status = main(["curve", *map(str, argv), *options])
        return status, *capsys.readouterr()

    return run


def test_command_on_manifests(dsd: Run, tmp_path: Path) -> None:
    pool, held_out = manifest(tmp_path, "train.jsonl", POOL), manifest(tmp_path, "test.jsonl", HELD_OUT)
    argv = (pool, "--held-out", held_out, "--out", tmp_path / "out", "--shots", "0,4", "--seeds", "2", "--seed", "5")
    status, out, err = dsd(*argv, "--format", "json")
    assert status == 0
    assert err == "dsd curve: 2 fits (4 examples; 2 seeds), 3 measurements on 6 held-out examples to do\n"
    found = json.loads(out)
    assert found["out"] == str(tmp_path / "out")
    assert [(r["shots"], r["seed"]) for r in found["rows"]] == [(0, None), (4, 5), (4, 6)]
    assert [p["shots"] for p in found["points"]] == [0, 4]
    assert found["config"]["name"] == "train.jsonl"
    assert (found["config"]["fit"]["steps"], found["config"]["prompt"]["rank"]) == (2, 1)
    assert "outcomes" not in found["rows"][0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {FILE, PICTURE}
    status, out, err = dsd(*argv)
    assert status == 0
    assert "nothing to do" in err
    assert "gain over zero-shot" in out
    assert out.splitlines()[-1] == str(tmp_path / "out" / PICTURE)
    assert f"{found['points'][1]['accuracy']['value']:.3f} [" in out
    status, out, err = dsd(*argv, "--learning-rate", "0.5")
    assert (status, out) == (2, "")
    assert "another request (other: fit)" in err
    assert err.count("\n") == 1


def test_command_on_the_world(dsd: Run, fits: Fits, tmp_path: Path) -> None:
    argv = ("comvg", "--level", "easy", "--count", "4", "--shots", "3", "--seeds", "1", "--out", tmp_path)
    status, out, _ = dsd(*argv, "--format", "json")
    assert status == 0
    found = json.loads(out)
    assert found["config"]["name"] == "comvg, easy"
    assert found["points"][0]["accuracy"]["n"] == 4
    assert fits.asked[0][1][0].startswith("comvg-few-shot-easy-0-")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("comvg --held-out x.jsonl", "--held-out"),
        ("none.jsonl", "none.jsonl"),
        ("comvg --level easy --shots 0", "expected numbers of examples"),
        ("comvg --level easy --seeds 0", "got 0 seeds"),
        ("comvg --level easy --shots 3 --count 0", "count"),
        ("comvg --level easy --shots 3 --count 1 --val none.jsonl", "none.jsonl"),
    ],
)
def test_command_refuses(dsd: Run, fits: Fits, tmp_path: Path, argv: str, told: str) -> None:
    status, out, err = dsd(*argv.split(), "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert err.startswith("dsd curve: error: ")
    assert told in err
    assert err.count("\n") == 1


def test_command_asks_for_held_out_examples(dsd: Run, tmp_path: Path) -> None:
    status, _, err = dsd(manifest(tmp_path, "train.jsonl", POOL), "--out", tmp_path / "out")
    assert status == 2
    assert "--held-out" in err


def test_defaults_are_the_librarys() -> None:
    assert learning.SHOTS == curve.SHOTS


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from dsd.cli import main\n"
        "try: main(['curve', '--help'])\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--held-out" in done.stdout
    assert not {"torch", "numpy", "PIL", "diffusers"} & set(done.stderr.split())
