"""One measurement of a study: a sweep of zero-shot scores, a lesson, or where a method fails.

Zero-shot scores of the diffusion model, and what choices of timesteps, layers, pooling and norm are worth, are read
from one sweep of passes a task (:mod:`dsd.sweep`). Each lesson of a few-shot method is measured by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from dsd.backbone import Backbone, load_backbone
from dsd.baselines import baseline
from dsd.contracts import Example
from dsd.evaluate import dataset_checksum, evaluate, write_bytes
from dsd.explanation import ExplainConfig
from dsd.matcher import Matcher
from dsd.metrics import outcomes
from dsd.pages import failure_groups
from dsd.scores import ScoreConfig
from dsd.study.found import START, Cell
from dsd.study.grid import BLIND, CAPTIONS, FEW, LESSONS, MODEL, NOVEL, ONE, RIVALS, Item, StudyConfig, first_of
from dsd.study.store import Store
from dsd.sweep import ERRORS, groups_of, sweep
from dsd.tasks import world_task

SHOWN = 2
"""How many of the worst and of the closest examples are shown of a method on a task."""


def do(store: Store, item: Item) -> None:
    """Makes one measurement, and keeps it."""
    torch.set_num_threads(1)
    start = time.process_time()
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "sweep": _sweep,
        "blind": _blind,
        "captions": _captions,
        "lesson": _learn,
        "failures": _fail,
    }
    values = makers[item[0]](store, *item[1:])
    store.put(item, {**values, "took": time.process_time() - start})
    if item[0] != "lesson":
        return
    task, level, method, shots, seed = item[1:]
    if (first := first_of(method)) is not None:
        store.taught(("lesson", task, level, first, shots, seed)).unlink(missing_ok=True)
    checkpoint = store.checkpoint(item)
    if checkpoint.exists() and any(first_of(other) == method for other in store.config.methods):
        checkpoint.replace(store.taught(item))
    checkpoint.unlink(missing_ok=True)


def outcomes_of(task: str, examples: Sequence[Example], scores: Sequence[np.ndarray]) -> np.ndarray:
    """Each example's outcome in the task's own metric: whole groups for winoground, choices won for others."""
    if task != "winoground":
        return outcomes(examples, scores)
    # the right text beats the other for both images, and the right image for both texts
    return np.array([min(s[0, 0], s[1, 1]) > max(s[0, 1], s[1, 0]) for s in map(np.asarray, scores)], float)


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


def _sweep(store: Store, task: str, level: str) -> dict[str, Any]:
    """Zero-shot scores of the diffusion model on a task at a level, and ablations."""
    examples = held_out(store.config, task, level)
    pairs = [pair for e in examples for pair in e.pairs]
    distance = 1000 // store.config.passes
    made = sweep(_backbone(), pairs, range(distance // 2, distance * store.config.passes, distance))

    def won(scores: np.ndarray) -> list[float]:
        return [float(v) for v in outcomes_of(task, examples, _tables(examples, scores))]

    every = tuple(range(store.config.passes))
    layers = groups_of(_backbone())
    five, paper = made.near(FEW), made.near((189, 389, 589, 789))
    scores = {
        f"Diffusion Classifier, L2, {store.config.passes} passes": (made.error(every), every),
        f"Diffusion Classifier, L1, {store.config.passes} passes": (made.error(every, "l1"), every),
        f"DiffusionITM, {store.config.passes} passes": (made.error(every, empty=True), every),
        f"denoising, {store.config.passes} passes": (made.denoising(every), every),
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
    again = tuple(map(float, _untaught(store, task, level, "denoising")))
    zero.append(Cell(START, task, level, 0, 0, again, len(FEW)))
    counts = [n for n in (1, 2, 5, 10, 25, 50) if n <= store.config.passes]
    ablations = {
        "denoising by number of timesteps": {str(n): won(made.denoising(made.steps(n))) for n in counts},
        "denoising by timestep": {
            str(made.timesteps[k]): won(made.denoising((k,))) for k in made.steps(min(10, store.config.passes))
        },
        "attention by timestep": {
            str(made.timesteps[k]): won(made.attention((k,))) for k in made.steps(min(10, store.config.passes))
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
        "chance": chance_of(task, examples),
        "dataset": dataset_checksum(examples),
        "zero": [asdict(cell) for cell in zero],
        "ablations": ablations,
    }


def _blind(store: Store, task: str, level: str) -> dict[str, Any]:
    """Methods that use no diffusion model, and learn nothing."""
    examples = held_out(store.config, task, level)
    pairs = [pair for e in examples for pair in e.pairs]
    zero = []
    for name, kind in BLIND.items():
        tables = _tables(examples, baseline(kind).predict(pairs))
        zero.append(Cell(name, task, level, 0, 0, tuple(map(float, outcomes_of(task, examples, tables))), 0))
    return {"zero": [asdict(cell) for cell in zero]}


def _captions(store: Store, task: str, level: str) -> dict[str, Any]:
    """What was learned from captions alone, before any example of a task."""
    made = tuple(map(float, _untaught(store, task, level, "captions")))
    return {"zero": [asdict(Cell("captions, 1 pass", task, level, 0, 0, made, len(ONE)))]}


def chance_of(task: str, examples: Sequence[Example]) -> float:
    """What a guess without looking wins on average."""
    if task == "winoground":  # of four scores in random order, the two right ones come first
        return 1 / 6
    return float(np.mean([1 / max(len(e.images), len(e.texts)) for e in examples]))


def _learn(store: Store, task: str, level: str, method: str, shots: int, seed: int) -> dict[str, Any]:
    """Teaches one method, and measures what it learned."""
    few = task_of(task, "few-shot", level, shots, seed)
    examples = held_out(store.config, task, level)
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
    if store.config.max_steps is not None:
        fitting = replace(fitting, steps=store.config.max_steps)
    checkpoint = store.checkpoint(("lesson", task, level, method, shots, seed))
    anew, before = not checkpoint.exists(), 0.0
    if anew and (first := first_of(method)) is not None:
        item = ("lesson", task, level, first, shots, seed)
        done = store.get(item)
        if done is not None and done["cell"]["seconds"] is not None and store.taught(item).exists():
            write_bytes(checkpoint, store.taught(item).read_bytes())
            before = done["cell"]["seconds"]
    try:
        where = {"prompt": lesson.prompt} if lesson.start is None else {"start": lesson.start}
        matcher.fit(few, config=fitting, **where, checkpoint=checkpoint, resume=True)
        taken = before + time.process_time() - start if anew else None
        assert matcher.adapter is not None
        passes = matcher.score_config.passes
        if matcher.adapter.training["kept"] or matcher.score_config.bare is not None:
            made = outcomes_of(task, examples, evaluate(matcher, examples).scores)
        elif lesson.start is not None:
            made = _untaught(store, task, level, "captions")
        else:  # passes for which nothing was learned are the zero-shot score's
            made, passes = _untaught(store, task, level, matcher.score_config.kind), len(FEW)
        if seed == 0:  # pages show what it sees
            matcher.adapter.save(store.adapter(task, level, method, shots))
        training = matcher.adapter.training
    finally:
        matcher.forget()
    error = training["calibration"]["error"]
    cell = Cell(method, task, level, shots, seed, tuple(map(float, made)), passes, taken, bool(training["kept"]), error)
    return {"cell": asdict(cell)}


def _untaught(store: Store, task: str, level: str, kind: str) -> np.ndarray:
    """Outcomes of a zero-shot score at :data:`FEW` timesteps, or of what captions alone taught, measured once."""
    item = ("untaught", task, level, kind)
    kept = store.get(item)
    if kept is None:
        examples = held_out(store.config, task, level)
        matcher = Matcher(_backbone(), None if kind == "captions" else ScoreConfig(kind, FEW))
        if kind == "captions":
            matcher.load_adapter(CAPTIONS)
        scores = evaluate(matcher, examples).scores
        matcher.forget()
        made = [float(v) for v in outcomes_of(task, examples, scores)]
        kept = {"outcomes": made}
        store.put(item, kept)
    return np.array(kept["outcomes"])


def _fail(store: Store, task: str, level: str, method: str, shots: int) -> dict[str, Any]:
    """Where a method fails: zero-shot denoising, or one of ours."""
    examples = held_out(store.config, task, level)
    lesson = LESSONS.get(method)
    matcher = Matcher(_backbone(), ScoreConfig("denoising", FEW))
    if lesson is not None:
        kept = store.adapter(task, level, method, shots)
        if not kept.is_dir():  # measurements were copied without adapters
            do(store, ("lesson", task, level, method, shots, 0))
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
