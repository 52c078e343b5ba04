"""The paper's study on the embedded model: every method on every task, resumable.

Zero-shot scores of the diffusion model, and what choices of timesteps, layers, pooling and norm are worth, are read
from one sweep of passes a task (:mod:`dsd.sweep`). Each lesson of a few-shot method is a cell of its own. Everything is
kept in files that appear whole; :mod:`dsd.study_report` turns them into tables, plots and a page.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsd.backbone import Backbone, load_backbone
from dsd.baselines import baseline
from dsd.contracts import Example, OptionError
from dsd.evaluate import claim, dataset_checksum, evaluate, write_bytes, write_text
from dsd.explanation import ExplainConfig
from dsd.learn import HEEDED_BY_WEIGHTS, FitConfig
from dsd.matcher import Matcher
from dsd.metrics import outcomes
from dsd.pages import failure_groups
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig
from dsd.study_report import START
from dsd.sweep import ERRORS, groups_of, sweep
from dsd.tasks import WORLD_TASKS, world_task

MODEL = "tiny"
NOVEL = "novel"
"""Choices as in ``comvg`` about the fill and the relation whose words pretraining never saw."""
TASKS = (*WORLD_TASKS, NOVEL)
MANY = 50
"""Passes a pair of the Diffusion Classifier; its evenly spaced timesteps are those of a sweep."""
FEW = (50, 150, 250, 350, 500)
"""Timesteps of attention that is taught: five passes a pair."""
RULES = 3
"""Of teaching and judging, beyond what configurations say: another number makes lessons anew."""
PACK = "measurements.jsonl.gz"
"""All measurements of a study in one file, which is enough to go on from."""
SHOWN = 2
"""How many of the worst and of the closest examples are shown of a method on a task."""


@dataclass(frozen=True)
class Lesson:
    """A few-shot method of ours.

    Attributes:
        score: Where it starts from; ``denoising`` is joined by attention that is taught.
        config: How.
        timesteps: Of the score.
        prompt: Where prompts go.
    """

    score: str
    config: FitConfig
    timesteps: tuple[int, ...] = FEW
    prompt: PromptConfig = field(default_factory=PromptConfig)


_RUN = FitConfig(validation=0.25)
"""One run that is stopped by a quarter of the examples."""

LESSONS: dict[str, Lesson] = {
    "dsd prompt and denoising": Lesson("denoising", _RUN, (150, 250, 350)),
    "dsd prompt": Lesson("attention", _RUN),
    "dsd tokens": Lesson("attention", replace(_RUN, method="tokens")),
    "dsd heads": Lesson("attention", replace(_RUN, method="heads")),
    "dsd weights": Lesson("denoising", replace(_RUN, method="weights", draws=2)),
    "dsd prompt + weights": Lesson("attention", replace(_RUN, method="prompt+weights", draws=2)),
}
"""Ours, by name."""

RIVALS = {"CLIP linear probe": "clip-linear-probe", "CLIP CoOp": "clip-coop", "CLIP LoRA": "clip-lora"}
"""Few-shot baselines by name."""

BLIND = {"chance": "chance", "caption length": "caption-length", "CLIP": "clip"}
"""Zero-shot methods without a diffusion model."""
ZERO = {"sweep": "zero-shot scores and ablations", "blind": "CLIP and blind baselines"}
"""What a measurement without learning is of."""


@dataclass(frozen=True)
class StudyConfig:
    """The grid.

    The default takes less than an hour on two cores; :data:`QUICK` takes minutes, :data:`FULL` a day.

    Attributes:
        tasks, levels: Of the embedded world.
        methods: Few-shot methods, of :data:`LESSONS` and :data:`RIVALS`.
        shots: Numbers of examples.
        seeds: Draws of each number.
        held_out: Examples a task and level to measure on.
        passes: Of a sweep.
        max_steps: Optimizer steps of a lesson at most; None leaves them as they are.
        thorough: Whether methods of ours that learn by gradient, which take minutes a lesson, are measured as often as
            the others; otherwise at the first level, with the most examples, once.
    """

    tasks: tuple[str, ...] = TASKS
    levels: tuple[str, ...] = ("standard", "hard")
    methods: tuple[str, ...] = ("dsd prompt and denoising", "dsd weights", *RIVALS)
    shots: tuple[int, ...] = (16, 256)
    seeds: int = 1
    held_out: int = 200
    passes: int = MANY
    max_steps: int | None = None
    thorough: bool = False

    @property
    def places(self) -> list[tuple[str, str]]:
        """Every task at every level."""
        return [(task, level) for level in self.levels for task in self.tasks]

    def __post_init__(self) -> None:
        for name, got, known in (
            ("tasks", self.tasks, TASKS),
            ("levels", self.levels, ("easy", "standard", "hard")),
            ("methods", self.methods, (*LESSONS, *RIVALS)),
        ):
            if not got or not set(got) <= set(known):
                raise OptionError(f"got {name} {', '.join(got) or 'none'}, expected some of {', '.join(known)}")
        if not self.shots or min(self.shots) < 4:
            raise OptionError(f"got shots {self.shots}, expected numbers of at least 4 examples")
        for name in ("seeds", "held_out", "passes"):
            if getattr(self, name) < 1:
                raise OptionError(f"got {name} {getattr(self, name)}, expected 1 or more")


QUICK = StudyConfig(
    tasks=WORLD_TASKS,
    levels=("standard",),
    methods=("dsd prompt and denoising", "dsd weights", "CLIP LoRA"),
    shots=(64,),
    held_out=60,
    passes=20,
    max_steps=60,
)
"""A look at the whole in minutes."""
FULL = StudyConfig(methods=(*LESSONS, *RIVALS), shots=(16, 64, 256), seeds=3, thorough=True)
"""Everything: a day on two cores."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        method: Its name.
        task, level: Of the held-out examples.
        shots, seed: Of what it learned from; zero shots for none.
        outcomes: (examples,) of winoground whether the whole group is right, of others the share of choices won.
        passes: Of the denoiser, a pair.
        seconds: Of learning, on one core; None where nothing is learned, or where it went on after a stop.
        kept: Whether what was learned was kept over the score that it started from.
        calibration: Expected calibration error on held-out examples, where it was measured.
    """

    method: str
    task: str
    level: str
    shots: int
    seed: int
    outcomes: tuple[float, ...]
    passes: int
    seconds: float | None = None
    kept: bool | None = None
    calibration: float | None = None


@dataclass(frozen=True)
class Place:
    """A task at a level.

    Attributes:
        tags: Of each held-out example.
        chance: What a blind guess wins.
        zero: Cells of methods that learned nothing.
        ablations: By what is varied: of each of its values the outcomes.
    """

    task: str
    level: str
    tags: tuple[tuple[str, ...], ...]
    chance: float
    zero: tuple[Cell, ...]
    ablations: Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True)
class Failures:
    """Where a method fails on a task, with maps of what it saw.

    Attributes:
        method: Its name.
        task, level: Of the held-out examples.
        shots: Of what it learned from; zero for none.
        groups: Of :func:`dsd.pages.failure_groups`.
    """

    method: str
    task: str
    level: str
    shots: int
    groups: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Study:
    """What was measured.

    Attributes:
        config: The grid; lessons that the folder has besides make it larger than what was asked for.
        places: Every task at every level.
        cells: Of few-shot methods.
        seconds: Of processor time, for all measurements.
        missing: What of the grid that was asked for is not there, in words.
        failures: Of methods on tasks the worst and the closest examples.
        asked: The grid that was asked for; None for the same.
    """

    config: StudyConfig
    places: tuple[Place, ...]
    cells: tuple[Cell, ...]
    seconds: float
    missing: tuple[str, ...] = ()
    failures: tuple[Failures, ...] = ()
    asked: StudyConfig | None = None


def outcomes_of(task: str, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Each example's outcome in the task's own metric: whole groups for winoground, choices won for others."""
    if task != "winoground":
        return outcomes(examples, scores)
    # the right text beats the other for both images, and the right image for both texts
    return np.array([min(s[0, 0], s[1, 1]) > max(s[0, 1], s[1, 0]) for s in map(np.asarray, scores)], float)


def run(
    out: str | os.PathLike[str],
    config: StudyConfig,
    *,
    jobs: int = 1,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Study:
    """Makes the study in a folder, or goes on with one that was stopped there.

    A grid that grew (more methods, shots, seeds, tasks or levels) goes on too; what is there is not made again. Lessons
    of earlier grids in the folder, on the same tasks and levels, are part of the study.

    Args:
        out: The folder; measurements are kept in ``cells/`` of it.
        jobs: Processes, with one thread each.
        announce: Told what is left to do, before it is done.
        progress: Whether to show a progress bar, on stderr.

    Raises:
        OptionError: If the folder holds a study of other held-out examples, passes or steps, or cannot be written.
    """
    folder = Path(out)
    _claim(folder, config)
    work = _work(config)
    left = [item for item in work if _kept(folder, config, item) is None]
    if left:
        announce(f"{len(work) - len(left)} of {len(work)} measurements are there, {len(left)} are left")
    with tqdm(total=len(work), initial=len(work) - len(left), desc="study", disable=not progress) as bar:
        _share(folder, config, left, jobs, bar)
        shown = _shown(config, gather(out, config).cells)
        left = [item for item in shown if _kept(folder, config, item) is None]
        bar.total += len(left)
        _share(folder, config, left, jobs, bar)
    return gather(out, config)


def gather(out: str | os.PathLike[str], config: StudyConfig) -> Study:
    """What of a study is there, without measuring anything.

    Raises:
        OptionError: If the folder holds no measurement of the grid, or a study of other held-out examples, passes or
            steps.
    """
    folder = Path(out)
    if not (folder / PACK).exists() and not any((folder / "cells").glob("*.json")):
        raise OptionError(f"got {str(out)!r} without measurements, expected the folder of a study; make one first")
    _claim(folder, config)
    asked, known = _work(config), _known(folder, config)
    there = [item for item in known if item[0] == "lesson" and _holds(folder, config, item)]
    order = (*LESSONS, *RIVALS)
    whole = replace(
        config,
        methods=tuple(m for m in order if m in (*config.methods, *(item[3] for item in there))),
        shots=tuple(sorted({*config.shots, *(item[4] for item in there)})),
        seeds=max([config.seeds, *(1 + item[5] for item in there)]),
    )
    found = {item: values for item in known if (values := _kept(folder, config, item)) is not None}
    cells = [_cell(values["cell"]) for item, values in found.items() if item[0] == "lesson"]
    cells.sort(key=lambda c: (order.index(c.method), c.shots, c.seed))
    shown = {item: values for item in _shown(config, cells) if (values := _kept(folder, config, item)) is not None}
    return Study(
        whole,
        tuple(
            _place(config, *place, found.get(("sweep", *place)), found.get(("blind", *place)))
            for place in config.places
        ),
        tuple(cells),
        sum(values["took"] for values in (*found.values(), *shown.values())),
        tuple(_counted(asked, found)),
        tuple(
            Failures(method, task, level, shots, tuple(values["groups"]))
            for (_, task, level, method, shots), values in shown.items()
        ),
        config,
    )


def pack(out: str | os.PathLike[str], config: StudyConfig) -> Path:
    """Puts all measurements of a study, but for failures, into one file; returns where.

    It can be read line by line (each has a name and the values), and a study goes on from it as from ``cells/``.
    """
    folder = Path(out)
    fresh = {_name(item): values for item in _known(folder, config) if (values := _kept(folder, config, item))}
    lines = {**_pack_of(folder), **fresh}  # those of other grids stay
    text = "".join(json.dumps({"name": name, **values}) + "\n" for name, values in sorted(lines.items()))
    write_bytes(folder / PACK, gzip.compress(text.encode(), mtime=0))
    return folder / PACK


@cache
def _packed(path: Path, _changed: float) -> dict[str, dict[str, Any]]:
    """Measurements in a :data:`PACK`, by name.

    Raises:
        OptionError: If it cannot be read.
    """
    try:
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        return {line.pop("name"): line for line in lines}
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise OptionError(f"{path}: got a file that cannot be read ({error}); delete it") from None


def _pack_of(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / PACK
    return _packed(path, path.stat().st_mtime) if path.exists() else {}


def _claim(folder: Path, config: StudyConfig) -> None:
    claim(folder, "study", {"study": {k: asdict(config)[k] for k in ("held_out", "passes", "max_steps")}})


def _work(config: StudyConfig) -> list[tuple[Any, ...]]:
    """Every measurement of the grid: what of, and then as the functions that make it take it."""
    work: list[tuple[Any, ...]] = [(what, *place) for what in ("sweep", "blind") for place in config.places]
    work += [
        ("lesson", *place, method, shots, seed)
        for seed in range(config.seeds)
        for shots in sorted(config.shots, reverse=True)
        for method in config.methods
        for place in config.places
        if config.thorough
        or method not in LESSONS
        or LESSONS[method].config.method == "weights"
        or (place[1], shots, seed) == (config.levels[0], max(config.shots), 0)
    ]
    return work


def _counted(work: Sequence[tuple[Any, ...]], found: Container[tuple[Any, ...]]) -> Iterator[str]:
    """What of the work was not found, in words: how many lessons of each method, and places without others."""
    for what, name in ZERO.items():
        places = [f"{item[1]} {item[2]}" for item in work if item[0] == what and item not in found]
        if places:
            yield f"{name} of {', '.join(places)}"
    for method in dict.fromkeys(item[3] for item in work if item[0] == "lesson"):
        lessons = [item in found for item in work if item[3:4] == (method,)]
        if not all(lessons):
            yield f"{lessons.count(False)} of {len(lessons)} lessons of {method}"


def _shown(config: StudyConfig, cells: Sequence[Cell]) -> list[tuple[Any, ...]]:
    """Whose failures are shown: at the first level, of each task, zero-shot and the best of ours that learned."""
    level = config.levels[0]
    items: list[tuple[Any, ...]] = []
    for task in config.tasks:
        items.append(("failures", task, level, "denoising", 0))
        ours = [c for c in cells if (c.task, c.level, c.seed) == (task, level, 0) and c.method in LESSONS and c.kept]
        best = max(ours, key=lambda c: (c.shots, np.mean(c.outcomes)), default=None)
        if best is not None:
            items.append(("failures", task, level, best.method, best.shots))
    return items


def _lessons(folder: Path) -> list[tuple[Any, ...]]:
    """Lessons in the folder, whether they still hold or not."""
    kept = [values for name, values in _pack_of(folder).items() if name.startswith("lesson-")]
    for path in sorted((folder / "cells").glob("lesson-*.json")):
        with suppress(ValueError):  # broken: made again when asked for
            kept.append(json.loads(path.read_text("utf-8")))
    found = []
    for values in kept:
        with suppress(KeyError, TypeError):
            cell = values["cell"]
            found.append(("lesson", cell["task"], cell["level"], cell["method"], cell["shots"], cell["seed"]))
    return list(dict.fromkeys(found))


def _known(folder: Path, config: StudyConfig) -> list[tuple[Any, ...]]:
    """The measurements of the grid, and lessons that the folder has besides at its places."""
    there = [i for i in _lessons(folder) if i[1:3] in config.places and _holds(folder, config, i)]
    return list(dict.fromkeys((*_work(config), *there)))


def _share(folder: Path, config: StudyConfig, left: Sequence[tuple[Any, ...]], jobs: int, bar: Any) -> None:
    """Does what is left, in this process or in several."""
    if jobs == 1:
        for item in left:
            _do(folder, config, item)
            bar.update()
        return
    # the threads of torch do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _leave_with, (os.getpid(),)) as pool:
        waiting = {pool.submit(_do, folder, config, item) for item in left}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, killed perhaps: what it works on would be nobody's."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _name(item: Sequence[Any]) -> str:
    return "-".join(str(part) for part in item).replace(" ", "_").replace(",", "").replace("+", "and")


def _path(folder: Path, item: Sequence[Any]) -> Path:
    """Where a measurement is kept as it is made."""
    return folder / "cells" / f"{_name(item)}.json"


def _checkpoint(folder: Path, item: Sequence[Any]) -> Path:
    """Where the state of a lesson is kept while it is being taught."""
    return _path(folder, item).with_suffix(".checkpoint")


def _taught(folder: Path, item: Sequence[Any]) -> Path:
    """Where the state of a lesson that was taught waits for another that goes on from it."""
    return _path(folder, item).with_suffix(".taught")


def _first(method: str) -> str | None:
    """The lesson that teaches what this one goes on from, if any: the same but for the weights that follow."""
    if method not in LESSONS:
        return None
    lesson = LESSONS[method]
    for name, other in LESSONS.items():
        config = replace(other.config, method=lesson.config.method, draws=lesson.config.draws)
        if other.config.pieces == lesson.config.pieces - {"weights"} and replace(other, config=config) == lesson:
            return name
    return None


def _adapter_path(folder: Path, task: str, level: str, method: str, shots: int) -> Path:
    """Where what a lesson of the first seed taught is kept."""
    return _path(folder, ("lesson", task, level, method, shots, 0)).with_suffix(".adapter")


def _made_by(config: StudyConfig, item: Sequence[Any]) -> dict[str, Any]:
    """What decides a measurement besides what the folder is of: other values make it anew."""
    if item[0] in ("sweep", "untaught") or item[3:4] == ("denoising",):
        return {"model": _digest("weights")}
    if item[0] == "blind":
        return {"model": _digest("clip_weights")}
    if item[3] in RIVALS:
        return {"model": _digest("clip_weights"), "rules": RULES}
    lesson = LESSONS[item[3]]
    made: dict[str, Any] = {"model": _digest("weights"), **asdict(lesson), "rules": RULES}
    if lesson.config.method == "weights":  # heeds no more than these
        del made["prompt"]
        made["config"] = {name: made["config"][name] for name in HEEDED_BY_WEIGHTS}
        return made
    made["config"] = asdict(lesson.config.resolved(item[4]))
    return {**made, "max_steps": config.max_steps}


@cache
def _digest(folder: str) -> str:
    """32 hex digits over the weights of a model of the package."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(str(files("dsd.tiny").joinpath(folder))).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _kept(folder: Path, config: StudyConfig, item: Sequence[Any]) -> dict[str, Any] | None:
    """A measurement that was kept and still holds."""
    try:
        values: dict[str, Any] = json.loads(_path(folder, item).read_text("utf-8"))
    except (OSError, ValueError):
        values = _pack_of(folder).get(_name(item), {})
    return values if values.get("made_by") == json.loads(json.dumps(_made_by(config, item))) else None


def _holds(folder: Path, config: StudyConfig, item: tuple[Any, ...]) -> bool:
    return item[3] in (*LESSONS, *RIVALS) and _kept(folder, config, item) is not None


def _do(folder: Path, config: StudyConfig, item: tuple[Any, ...]) -> None:
    """Makes one measurement, and keeps it."""
    torch.set_num_threads(1)
    start = time.process_time()
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "sweep": _sweep,
        "blind": _blind,
        "lesson": _learn,
        "failures": _fail,
    }
    values = {**makers[item[0]](folder, config, *item[1:]), "made_by": _made_by(config, item)}
    values["took"] = time.process_time() - start
    write_text(_path(folder, item), json.dumps(values) + "\n")
    if item[0] != "lesson":
        return
    task, level, method, shots, seed = item[1:]
    if (first := _first(method)) is not None:
        _taught(folder, ("lesson", task, level, first, shots, seed)).unlink(missing_ok=True)
    checkpoint = _checkpoint(folder, item)
    if checkpoint.exists() and any(_first(other) == method for other in config.methods):
        checkpoint.replace(_taught(folder, item))
    checkpoint.unlink(missing_ok=True)


@cache
def _backbone() -> Backbone:
    """The embedded model; lessons leave it bare."""
    return load_backbone(MODEL, device="cpu")


def task_of(task: str, split: str, level: str, count: int, seed: int) -> list[Example]:
    """Examples of a task of the study; see :func:`dsd.tasks.world_task`."""
    return world_task("comvg" if task == NOVEL else task, split, level, count, seed, task == NOVEL)


def held_out(config: StudyConfig, task: str, level: str) -> list[Example]:
    """The examples that every method is measured on."""
    return task_of(task, "test", level, config.held_out, 0)


def _tables(examples: Sequence[Example], scores: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum([len(e.pairs) for e in examples])[:-1]
    return [part.reshape(len(e.images), -1) for e, part in zip(examples, np.split(scores, ends), strict=True)]


def _sweep(folder: Path, config: StudyConfig, task: str, level: str) -> dict[str, Any]:
    """Zero-shot scores of the diffusion model on a task at a level, and ablations."""
    examples = held_out(config, task, level)
    pairs = [pair for e in examples for pair in e.pairs]
    distance = 1000 // config.passes
    made = sweep(_backbone(), pairs, range(distance // 2, distance * config.passes, distance))

    def won(scores: np.ndarray) -> list[float]:
        return [float(v) for v in outcomes_of(task, examples, _tables(examples, scores))]

    every = tuple(range(config.passes))
    layers = groups_of(_backbone())
    five, paper = made.near(FEW), made.near((189, 389, 589, 789))
    scores = {
        f"Diffusion Classifier, L2, {config.passes} passes": (made.error(every), every),
        f"Diffusion Classifier, L1, {config.passes} passes": (made.error(every, "l1"), every),
        f"DiffusionITM, {config.passes} passes": (made.error(every, empty=True), every),
        f"denoising, {config.passes} passes": (made.denoising(every), every),
        "denoising, 5 passes": (made.denoising(five), five),
        "attention, 5 passes": (made.attention(five), five),
        "attention-mass, 5 passes": (made.attention(five, pooling="mass"), five),
        "paper (He et al.), 4 passes": (
            made.paper_attention(paper, layers["paper's"]) + made.denoising(paper),
            paper,
        ),
        "paper-attention, 4 passes": (made.paper_attention(paper, layers["paper's"]), paper),
    }
    zero = [Cell(name, task, level, 0, 0, tuple(won(s)), len(steps)) for name, (s, steps) in scores.items()]
    # under the noise of a matcher: what is learned starts from this, and a gain over it is no luck of the draw
    start = evaluate(Matcher(_backbone(), ScoreConfig("denoising", FEW)), examples).scores
    again = tuple(map(float, outcomes_of(task, examples, start)))
    zero.append(Cell(START, task, level, 0, 0, again, len(FEW)))
    counts = [n for n in (1, 2, 5, 10, 25, 50) if n <= config.passes]
    ablations = {
        "denoising by number of timesteps": {str(n): won(made.denoising(made.steps(n))) for n in counts},
        "denoising by timestep": {
            str(made.timesteps[k]): won(made.denoising((k,))) for k in made.steps(min(10, config.passes))
        },
        "attention by timestep": {
            str(made.timesteps[k]): won(made.attention((k,))) for k in made.steps(min(10, config.passes))
        },
        "attention by layers": {name: won(made.attention(every, chosen)) for name, chosen in layers.items()},
        "attention by pooling": {
            name: won(made.attention(every, pooling=pooling))
            for name, pooling in (
                ("own tokens", "own"),
                ("all tokens", "all"),
                ("share of own tokens", "mass"),
            )
        },
        "error by norm": {
            f"{norm}{', less that without a caption' if empty else ''}": won(made.error(every, norm, empty))
            for norm in ERRORS
            for empty in (False, True)
        },
    }
    return {
        "task": task,
        "level": level,
        "tags": [e.tags for e in examples],
        "chance": _chance(task, examples),
        "dataset": dataset_checksum(examples),
        "zero": [asdict(cell) for cell in zero],
        "ablations": ablations,
    }


def _blind(folder: Path, config: StudyConfig, task: str, level: str) -> dict[str, Any]:
    """Methods that use no diffusion model, and learn nothing."""
    examples = held_out(config, task, level)
    pairs = [pair for e in examples for pair in e.pairs]
    zero = []
    for name, kind in BLIND.items():
        tables = _tables(examples, baseline(kind).predict(pairs))
        zero.append(Cell(name, task, level, 0, 0, tuple(map(float, outcomes_of(task, examples, tables))), 0))
    return {"zero": [asdict(cell) for cell in zero]}


def _chance(task: str, examples: Sequence[Example]) -> float:
    """What a guess without looking wins on average."""
    if task == "winoground":  # of four scores in random order, the two right ones come first
        return 1 / 6
    return float(np.mean([1 / max(len(e.images), len(e.texts)) for e in examples]))


def _learn(
    folder: Path, config: StudyConfig, task: str, level: str, method: str, shots: int, seed: int
) -> dict[str, Any]:
    """Teaches one method, and measures what it learned."""
    few = task_of(task, "few-shot", level, shots, seed)
    examples = held_out(config, task, level)
    start = time.process_time()
    if method in RIVALS:
        rival = baseline(RIVALS[method])
        rival.fit(few, seed=seed)
        seconds = time.process_time() - start
        result = evaluate(rival, examples)
        made = outcomes_of(task, examples, result.scores)
        kept = bool(rival.config["training"]["kept"])
        return {"cell": asdict(Cell(method, task, level, shots, seed, tuple(map(float, made)), 0, seconds, kept))}
    lesson = LESSONS[method]
    matcher = Matcher(_backbone(), ScoreConfig(lesson.score, lesson.timesteps))
    fitting = replace(lesson.config, seed=seed)
    if config.max_steps is not None:
        fitting = replace(fitting, steps=config.max_steps)
    checkpoint = _checkpoint(folder, ("lesson", task, level, method, shots, seed))
    anew, before = not checkpoint.exists(), 0.0
    if anew and (first := _first(method)) is not None:
        item = ("lesson", task, level, first, shots, seed)
        done = _kept(folder, config, item)
        if done is not None and done["cell"]["seconds"] is not None and _taught(folder, item).exists():
            shutil.copyfile(_taught(folder, item), checkpoint)
            before = done["cell"]["seconds"]
    try:
        matcher.fit(few, config=fitting, prompt=lesson.prompt, checkpoint=checkpoint, resume=True)
        taken = before + time.process_time() - start if anew else None
        assert matcher.adapter is not None
        if matcher.adapter.training["kept"]:
            made = outcomes_of(task, examples, evaluate(matcher, examples).scores)
            passes = matcher.score_config.passes
        else:  # passes for which nothing was learned are the zero-shot score's
            made = _untaught(folder, config, task, level, matcher.score_config.kind)
            passes = len(FEW)
        if seed == 0:  # pages show what it sees
            matcher.adapter.save(_adapter_path(folder, task, level, method, shots))
        training = matcher.adapter.training
    finally:
        matcher.forget()
    error = training["calibration"]["error"]
    cell = Cell(method, task, level, shots, seed, tuple(map(float, made)), passes, taken, bool(training["kept"]), error)
    return {"cell": asdict(cell)}


def _untaught(folder: Path, config: StudyConfig, task: str, level: str, kind: str) -> np.ndarray:
    """Outcomes of a zero-shot score at :data:`FEW` timesteps, measured once."""
    item = ("untaught", task, level, kind)
    kept = _kept(folder, config, item)
    if kept is None:
        examples = held_out(config, task, level)
        scores = evaluate(Matcher(_backbone(), ScoreConfig(kind, FEW)), examples).scores
        made = [float(v) for v in outcomes_of(task, examples, scores)]
        kept = {"outcomes": made, "made_by": _made_by(config, item)}
        write_text(_path(folder, item), json.dumps(kept) + "\n")
    return np.array(kept["outcomes"])


def _fail(folder: Path, config: StudyConfig, task: str, level: str, method: str, shots: int) -> dict[str, Any]:
    """Where a method fails: zero-shot denoising, or one of ours."""
    examples = held_out(config, task, level)
    lesson = LESSONS.get(method)
    matcher = Matcher(_backbone(), ScoreConfig("denoising", FEW))
    if lesson is not None:
        kept = _adapter_path(folder, task, level, method, shots)
        if not kept.is_dir():  # it was learned before adapters were kept
            _do(folder, config, ("lesson", task, level, method, shots, 0))
        matcher.load_adapter(kept)
    explaining = ExplainConfig(draws=2, words=False)
    try:
        groups = failure_groups(
            evaluate(matcher, examples),
            examples,
            lambda image, text: matcher.explain(image, text, config=explaining),
            count=SHOWN,
        )
    finally:
        matcher.forget()
    return {"groups": groups}


def _cell(values: Mapping[str, Any]) -> Cell:
    return Cell(**{**values, "outcomes": tuple(values["outcomes"])})


def _place(
    config: StudyConfig, task: str, level: str, swept: Mapping[str, Any] | None, blind: Mapping[str, Any] | None
) -> Place:
    """A place as far as it was measured."""
    if swept is None:
        examples = held_out(config, task, level)
        swept = {"tags": [e.tags for e in examples], "chance": _chance(task, examples), "zero": [], "ablations": {}}
    return Place(
        task,
        level,
        tuple(tuple(tags) for tags in swept["tags"]),
        swept["chance"],
        tuple(_cell(cell) for cell in (*swept["zero"], *(blind or {"zero": []})["zero"])),
        {name: {k: tuple(v) for k, v in found.items()} for name, found in swept["ablations"].items()},
    )
