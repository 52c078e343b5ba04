"""The main job on the embedded model, start to end: score, teach, measure again, and see why."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsd.contracts import Example, OptionError
from dsd.evaluate import Result, evaluate, write_text
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.pages import save
from dsd.report import (
    Comparison,
    HeldOut,
    Ranking,
    Training,
    WordMaps,
    demo_report,
    format_interval,
    table,
)
from dsd.scores import ScoreConfig
from dsd.tasks import world_task
from dsd.tiny import captions, world

TASKS = ("comvg", "winoground")
LEVEL = "easy"


def run(out: str, *, shots: int = 128, held_out: int = 200, seed: int = 0) -> None:
    """Runs the demo and writes ``report.html``, ``words.png``, ``results.json`` and the adapter into ``out``.

    Args:
        out: Folder.
        shots: Labelled examples to learn from, of both tasks together.
        held_out: Examples of each task to measure on; no scene of theirs is among the shots.
        seed: Decides scenes, noise and learning.
    """
    if shots < 8 or held_out < 8:
        raise OptionError(f"got {shots} shots and {held_out} held-out examples, expected 8 or more of each")
    start = time.perf_counter()
    folder = Path(out)
    matcher = Matcher.from_pretrained("tiny", score="denoising", seed=seed)
    timesteps = matcher.score_config.timesteps

    _say("1. Rank captions for a scene (denoising score, zero-shot)")
    scene, texts = _scene(seed)
    picture = world.render(scene)
    ranked = matcher.rank(picture, texts)
    rows = [{"score": f"{r.score:.3f}", "caption": r.candidate, "true": "yes" if r.index == 0 else ""} for r in ranked]
    print(table(rows, ("score", "caption", "true")))

    _say("2. Measure the zero-shot scores on held-out examples")
    test = {task: world_task(task, "test", LEVEL, held_out, seed) for task in TASKS}
    before: dict[str, dict[str, Result]] = {task: {} for task in TASKS}
    for kind in ("denoising", "attention"):
        judge = Matcher(matcher.backbone, ScoreConfig(kind, timesteps, seed=seed))
        for task in TASKS:
            before[task][kind] = evaluate(judge, test[task], progress=True)

    _say(f"3. Teach the attention score from {shots} examples")
    examples = [e for i, task in enumerate(TASKS) for e in _few(task, (shots + 1 - i) // len(TASKS), seed)]
    judge = Matcher(matcher.backbone, ScoreConfig("attention", timesteps, seed=seed))
    judge.fit(examples, config=FitConfig(steps=150, validation=0.25, seed=seed), progress=True)
    judge.save_pretrained(folder / "adapter")

    _say("4. Measure again on the same held-out examples")
    after = {task: {"attention": evaluate(judge, test[task], progress=True)} for task in TASKS}

    rows = []
    for task in TASKS:
        name = "group" if task == "winoground" else "accuracy"
        for kind, result in before[task].items():
            taught = after[task].get(kind)
            rows.append(
                {
                    "task": f"{task} ({name})",
                    "score": kind,
                    "zero-shot": format_interval(result.metrics[name]),
                    "taught": "" if taught is None else format_interval(taught.metrics[name]),
                }
            )
    print(table(rows, ("task", "score", "zero-shot", "taught")))

    _say("5. See where each word is found")
    found = judge.explain(picture, texts[0])
    shown = [(w, m) for w, m in zip(found.words, found.maps, strict=True) if w not in ("a", "an", "of", "to", "the")]
    save(found, folder / "words.png")

    assert judge.adapter is not None
    training = judge.adapter.training
    settings: Mapping[str, Any] = {
        "model": "tiny",
        "level": LEVEL,
        "timesteps": ", ".join(map(str, timesteps)),
        "few-shot examples": shots,
        "held-out examples a task": held_out,
        "seed": seed,
        "command": f"dsd demo --shots {shots} --held-out {held_out} --seed {seed}",
        "seconds": round(time.perf_counter() - start),
    }
    demo_report(
        folder / "report.html",
        ranking=Ranking(picture, ranked, frozenset({0})),
        comparisons=[
            Comparison(
                f"{task} {name}",
                {k: r.metrics[name] for k, r in before[task].items()},
                {k: r.metrics[name] for k, r in after[task].items()},
                chance,
            )
            # of the 24 orders that four scores can have, four win the whole group
            for task, name, chance in (("comvg", "accuracy", 0.5), ("winoground", "group", 1 / 6))
        ],
        held_out=[
            HeldOut(e, before[task]["attention"].scores[i], after[task]["attention"].scores[i])
            for task in TASKS
            for i, e in enumerate(test[task][:4])
        ],
        word_maps=WordMaps(picture, texts[0], dict(shown)),
        training=Training(
            facts={
                "examples": training["examples"],
                "validation examples": training["validation_examples"],
                "steps": training["curve"][-1]["step"],
            },
            curves={"validation accuracy": [(p["step"], p["accuracy"]) for p in training["curve"]]},
        ),
        settings=settings,
    )
    summary = {
        "settings": settings,
        "before": {t: {k: r.to_dict()["metrics"] for k, r in rs.items()} for t, rs in before.items()},
        "after": {t: {k: r.to_dict()["metrics"] for k, r in rs.items()} for t, rs in after.items()},
    }
    write_text(folder / "results.json", _json(summary))
    print(f"\n{folder / 'report.html'}  (in {settings['seconds']} s)")


def _few(task: str, count: int, seed: int) -> list[Example]:
    return world_task(task, "few-shot", LEVEL, count, seed)


def _scene(seed: int) -> tuple[world.Scene, list[str]]:
    """A held-out scene of two things, and captions for it: the true one first."""
    rng = random.Random(f"demo/{seed}")
    while True:
        scene = world.sample_scene(rng, "test", "easy", things=2)
        b, a = scene.things
        relation = next((r for r in ("left of", "right of", "above", "below") if world.related(a, r, b)), None)
        if relation is not None and a.colour != b.colour and a.shape != b.shape and a.size == b.size == "large":
            break
    first, second = captions.Phrase(a.colour, a.shape), captions.Phrase(b.colour, b.shape)
    other = next(c for c in world.COLOURS if c not in (a.colour, b.colour))
    claims = [
        captions.Claim(first, relation, second),
        captions.Claim(second, relation, first),
        captions.Claim(captions.Phrase(b.colour, a.shape), relation, captions.Phrase(a.colour, b.shape)),
        captions.Claim(captions.Phrase(other, a.shape), relation, second),
        captions.Claim(first, relation, captions.Phrase(other, b.shape)),
    ]
    return scene, [captions.say(random.Random(0), claim) for claim in claims]


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"\n{text}", flush=True)


def _json(values: Mapping[str, Any]) -> str:
    import json

    return json.dumps(values, indent=1) + "\n"
