"""Words that pretraining never saw: ``python benchmarks/novel_words.py --out docs/results/novel-words``.

Choices of two that hinge on one word, at ``standard``, test split: a relation or a fill that pretraining shows but
never names, taught from 256 examples of that word alone; and those that it names, as a measure of what can be expected.
Some forty minutes of one core; lessons stay in ``--work``, and what is there is not taught again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dsd.contracts import Example
from dsd.evaluate import evaluate, installed_versions, write_text
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.metrics import bootstrap_interval
from dsd.prompts import PromptConfig
from dsd.report import table
from dsd.scores import ScoreConfig
from dsd.study.grid import CAPTIONS, FEW, ONE
from dsd.study.measure import outcomes_of
from dsd.tasks import world_task
from dsd.tiny import world

LEVEL = "standard"
COUNT = 200
SHOTS = 256
_NOVEL = {"relation": world.NOVEL_RELATION, "fill": world.NOVEL_FILL}
_MODES = ("text-choice", "image-choice")
MANY = tuple(range(10, 1000, 20))
_SHORT = FitConfig(steps=160, learning_rate=2e-3, check_every=20)
"""For a few hundred examples of one word are soon learned by heart."""
LESSONS = {
    "prompt, from the bare model": replace(_SHORT, learning_rate=5e-3, negatives=1, image_negatives=1, swaps=1),
    "prompt": replace(_SHORT, negatives=1, image_negatives=1, swaps=1),
    "prompt and the word": replace(_SHORT, method="prompt+words", negatives=0, image_negatives=0),
}
"""What was best on validation examples: further negatives help prompts, and hinder them once the word is learned."""


def novel(word: str, split: str, count: int) -> list[Example]:
    """Choices that hinge on a word that pretraining never saw."""
    drawn = world_task("comvg", split, LEVEL, 2 * count, 0, novel=True)
    return [e for e in drawn if e.tags[0] == f"novel-{word}"]


def named(word: str, count: int) -> list[Example]:
    """Choices that hinge on words of the same kind that it saw: of fills those between two captions, which tell."""

    def hinges(example: Example) -> bool:
        if word == "relation":
            return example.tags[0] == "predicate"
        said = [set(re.findall(r"\w+", text)) for text in example.texts]
        return len(said) == 2 and example.tags[0] != "predicate" and not (said[0] ^ said[1]).isdisjoint(world.FILLS)

    found = [e for e in world_task("comvg", "test", LEVEL, 20 * count, 0) if hinges(e)]
    return found[:count]


def zero_shot(timesteps: Sequence[int]) -> Matcher:
    return Matcher.from_pretrained("tiny", score=ScoreConfig("denoising", tuple(timesteps)), device="cpu")


def taught(word: str, name: str, work: Path) -> Matcher:
    """Learns one of :data:`LESSONS` with all examples held out by turns; or what was learned so before."""
    folder = work / f"{word}-{SHOTS} {name}"
    config, bare = LESSONS[name], "bare" in name
    words = (_NOVEL[word],) if "words" in config.pieces else ()
    if not folder.exists():
        learner = Matcher.from_pretrained("tiny", score=ScoreConfig("attention", FEW if bare else ONE), device="cpu")
        learner.fit(
            novel(word, "few-shot", SHOTS),
            config=config,
            prompt=PromptConfig(words=words) if words else None,
            start=None if bare else CAPTIONS,
            checkpoint=Path(f"{folder}.checkpoint"),
            resume=True,
            progress=True,
        )
        learner.save_pretrained(folder)
    return Matcher.from_pretrained("tiny", adapter=folder, device="cpu")


def won(matcher: Matcher, examples: Sequence[Example]) -> dict[str, Any]:
    """Accuracy, and that of choices between captions and between pictures."""
    outcomes = outcomes_of("comvg", examples, evaluate(matcher, examples).scores)
    value, low, high = bootstrap_interval(outcomes)
    modes = {mode: [bool(w) for e, w in zip(examples, outcomes, strict=True) if mode in e.tags] for mode in _MODES}
    parts = {mode: sum(part) / len(part) for mode, part in modes.items() if part}
    return {"value": value, "low": low, "high": high, "examples": len(examples), **parts}


def page(rows: Sequence[dict[str, Any]], command: str) -> str:
    shown = [
        {
            "words": row["words"],
            **{
                name: f"{of['value']:.3f} [{of['low']:.2f}, {of['high']:.2f}]"
                for name, of in row.items()
                if isinstance(of, dict)
            },
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    return f"""# Words that pretraining never saw

Choices of two that hinge on one word, level `{LEVEL}`, {COUNT} test examples each, one draw; chance is 0.5; 95 %
intervals. `named` are words that pretraining saw, which nothing was taught here; of fills, choices between captions
alone. `novel` are "{world.NOVEL_RELATION}" and "{world.NOVEL_FILL}", each taught from {SHOTS} examples of its own,
attention alone: `prompt` learns on from `{CAPTIONS}`, with captions and pictures of others and swapped captions as
further negatives, and `prompt and the word` (`--method prompt+words`) what the word means besides, without these, which
hinder it. Made by `{command}`;
choices between captions and between pictures apart are in the JSON file beside this page.

{table(shown, columns)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--work", type=Path, default=Path("runs/novel"), help="folder of the lessons")
    o = parser.parse_args()
    torch.set_num_threads(1)
    o.work.mkdir(parents=True, exist_ok=True)
    captions = Matcher.from_pretrained("tiny", adapter=CAPTIONS, device="cpu")
    rows: list[dict[str, Any]] = []
    for word in ("relation", "fill"):
        for kind, examples in (("named", named(word, COUNT)), ("novel", novel(word, "test", COUNT))):
            row: dict[str, Any] = {"words": f"{kind} {word}"}
            row["denoising, 5 passes"] = won(zero_shot(FEW), examples)
            row["denoising, 50 passes"] = won(zero_shot(MANY), examples)
            row["captions, 1 pass"] = won(captions, examples)
            if kind == "novel":
                for name in LESSONS:
                    passes = "5 passes" if "bare" in name else "1 pass"
                    row[f"{name}, {passes}"] = won(taught(word, name, o.work), examples)
            rows.append(row)
    record = {"versions": installed_versions(), "lessons": {n: asdict(c) for n, c in LESSONS.items()}, "rows": rows}
    write_text(o.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(o.out.with_suffix(".md"), page(rows, f"python benchmarks/novel_words.py --out {o.out}"))


if __name__ == "__main__":
    main()
