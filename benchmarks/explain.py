"""Do maps find the things that words name? ``python benchmarks/explain.py --out docs/results/explain``.

The procedural world knows where each thing is. Scenes with a caption each; every noun phrase in it that is true of
exactly one thing, of which eight pixels or more can be seen, is looked for: by the map of the phrase and by that of its
noun. *Pointing* is whether the map's highest pixel lies on the thing, *IoU* the overlap of the thing with the pixels
above a share of the map's highest value. That share, for each method and kind of words, and the method are chosen on
the split ``val``; figures are of ``test``. Zero-shot, and after few-shot learning of the attention score.

Writes a JSON file, which a run of the same settings goes on from, and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsd.evaluate import installed_versions, write_text
from dsd.explain import word_maps
from dsd.explanation import METHODS, ExplainConfig, find_phrase
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.metrics import bootstrap_interval
from dsd.report import format_interval, table
from dsd.tasks import world_task
from dsd.tiny import captions, world

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
LEAST = 8
"""Pixels of a thing that must be seen, of 32 x 32."""
KINDS = ("phrase", "noun")
BLIND = ("chance", "centre")
TAUGHT = ("joint", "attention", "raw-attention")
"""Methods that look at what learning changes: attention."""
GOALS = {"pointing": 0.85, "IoU": 0.4}


@dataclass(frozen=True)
class Case:
    """A scene, a caption, and where the things are that its phrases name."""

    scene: world.Scene
    text: str
    phrases: tuple[str, ...]
    regions: tuple[np.ndarray, ...]
    sizes: tuple[str, ...]


def cases(split: Any, level: Any, count: int, size: int, seed: int) -> list[Case]:
    rng = random.Random(f"explain/{split}/{level}/{seed}")
    found: list[Case] = []
    while len(found) < count:
        scene = world.sample_scene(rng, split, level)
        claim = captions.sample_claim(rng, scene)
        text = captions.say(rng, claim)
        regions = world.regions(scene, size)
        named = []
        for phrase in (claim.subject, claim.object):
            if phrase is None or phrase.count != 1:
                continue
            things = [i for i, thing in enumerate(scene.things) if phrase.matches(thing)]
            words = phrase.words("")
            if len(things) == 1 and regions[things[0]].sum() >= LEAST and text.count(words) == 1:
                named.append((words, regions[things[0]], scene.things[things[0]].size))
        if named:
            found.append(Case(scene, text, *zip(*named, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--levels", nargs="+", default=["easy", "standard"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--val", type=int, default=40, help="scenes to choose on")
    parser.add_argument("--test", type=int, default=100, help="scenes to measure on")
    parser.add_argument("--shots", type=int, default=128, help="examples to learn from")
    parser.add_argument("--draws", type=int, default=ExplainConfig().draws)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    setup = {k: str(v) if isinstance(v, Path) else v for k, v in vars(o).items() if k not in ("levels", "methods")}
    path = o.out.with_suffix(".json")
    cells: dict[str, dict[str, Any]] = {}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] == setup:
            cells = kept["cells"]

    def keep(key: str, cell: dict[str, Any]) -> None:
        cells[key] = cell
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        record = {"settings": setup, "machine": machine, "versions": installed_versions(), "cells": cells}
        write_text(path, json.dumps(record, indent=1) + "\n")
        write_text(o.out.with_suffix(".md"), page(o, cells))
        print(key, {k: format_interval(cell["test"][k]["pointing"]) for k in KINDS}, flush=True)

    for level in o.levels:
        for taught in (False, True):
            methods = [m for m in o.methods if m in TAUGHT] if taught else [*BLIND, *o.methods]
            missing = [m for m in methods if _key(level, taught, m) not in cells]
            if not missing:
                continue
            matcher = Matcher.from_pretrained("tiny", seed=o.seed)
            lesson: dict[str, Any] = {}
            if taught:
                matcher = Matcher.from_pretrained("tiny", score="attention", seed=o.seed)
                examples = world_task("comvg", "few-shot", level, o.shots, o.seed)
                config = FitConfig(steps=150, validation=0.25, seed=o.seed)
                matcher.fit(examples, config=config)
                assert matcher.adapter is not None
                lesson = {"kept": matcher.adapter.training["kept"]}
            size = matcher.config["size"]
            val, test = (cases(part, level, n, size, o.seed) for part, n in (("val", o.val), ("test", o.test)))
            for method in missing:
                chosen = measured(matcher, method, val, o.draws)
                share = {k: SHARES[int(np.argmax(chosen[k]["IoU"].mean(0)))] for k in KINDS}
                found = measured(matcher, method, test, o.draws)
                keep(
                    _key(level, taught, method),
                    {
                        "level": level,
                        "taught": taught,
                        "method": method,
                        "share": share,
                        **lesson,
                        "val": {k: summary(chosen[k], share[k]) for k in KINDS},
                        "test": {k: summary(found[k], share[k]) for k in KINDS},
                    },
                )


def measured(matcher: Matcher, method: str, sample: list[Case], draws: int) -> dict[str, dict[str, np.ndarray]]:
    """Of each scene, averaged over its phrases: pointing, IoU at each share, and pointing by the thing's size."""
    rows: dict[str, dict[str, list[Any]]] = {k: {"pointing": [], "IoU": [], "small": [], "large": []} for k in KINDS}
    for case in sample:
        drawn = maps(matcher, method, case, draws)
        for kind in KINDS:
            hits, overlaps = [], []
            for heat, region, size in zip(drawn[kind], case.regions, case.sizes, strict=True):
                if method == "chance":  # a pixel at random, and the whole picture
                    hits.append(region.mean())
                    overlaps.append([region.mean()] * len(SHARES))
                else:
                    # of several highest pixels, each counts as its share
                    hits.append(region[heat == heat.max()].mean())
                    above = [heat >= max(share * heat.max(), 1e-12) for share in SHARES]
                    overlaps.append([(a & region).sum() / (a | region).sum() for a in above])
                rows[kind][size].append(hits[-1])
            rows[kind]["pointing"].append(np.mean(hits))
            rows[kind]["IoU"].append(np.mean(overlaps, 0))
    return {kind: {name: np.array(values) for name, values in of.items()} for kind, of in rows.items()}


def maps(matcher: Matcher, method: str, case: Case, draws: int) -> dict[str, np.ndarray]:
    size = matcher.config["size"]
    if method in BLIND:
        rows, columns = np.indices((size, size)) - (size - 1) / 2
        centre = 1 / (1 + (rows**2 + columns**2) / size)
        return {kind: np.stack([centre] * len(case.phrases)) for kind in KINDS}
    scorer = matcher._scorer
    (states,) = scorer.texts([case.text])
    spans = [find_phrase(states.words[0].spelling, phrase) for phrase in case.phrases]
    spans += [(stop - 1, stop) for _, stop in spans]
    config = ExplainConfig(method, draws=draws)  # type: ignore[arg-type]
    drawn = word_maps(scorer, world.render(case.scene), case.text, spans, config=config)
    return {"phrase": drawn[: len(case.phrases)], "noun": drawn[len(case.phrases) :]}


def summary(found: dict[str, np.ndarray], share: float) -> dict[str, Any]:
    values = {"pointing": found["pointing"], "IoU": found["IoU"][:, SHARES.index(share)]}
    values |= {size: found[size] for size in ("small", "large")}
    of: dict[str, Any] = {}
    for name, rows in values.items():
        value, low, high = bootstrap_interval(rows)
        of[name] = {"value": value, "low": low, "high": high, "n": len(rows)}
    return of


def _key(level: str, taught: bool, method: str) -> str:
    return f"{level}, {'taught' if taught else 'zero-shot'}: {method}"


def page(o: argparse.Namespace, cells: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Do maps find what words name?",
        "",
        "On the embedded model, 32 x 32 pixels, 8 x 8 latents. *Pointing*: the map's highest pixel lies on the thing. "
        "*IoU*: overlap of the thing with the map's pixels above a share of its highest value, the share chosen on "
        f"`val` ({o.val} scenes). Figures are of `test` ({o.test} scenes a level), means over scenes with 95 % "
        f'bootstrap intervals; {o.draws} draws of noise. A phrase is such as "small red circle", a noun its last word. '
        "*Small* and *large* are pointing by phrases at things 6 to 8 pixels across, and larger ones. *Chance* is a "
        "pixel at random, or the whole picture.",
        "",
    ]
    for level in o.levels:
        for taught in (False, True):
            group = [c for c in cells.values() if c["level"] == level and c["taught"] == taught]
            if not group:
                continue
            title = f"after learning the attention score from {o.shots} examples" if taught else "zero-shot"
            rows = [
                {
                    "method": c["method"],
                    "phrase: pointing [95 %]": c["test"]["phrase"]["pointing"],
                    "IoU [95 %]": c["test"]["phrase"]["IoU"],
                    "noun: pointing [95 %]": c["test"]["noun"]["pointing"],
                    "IoU [95 %] ": c["test"]["noun"]["IoU"],
                    "small": c["test"]["phrase"]["small"]["value"],
                    "large": c["test"]["phrase"]["large"]["value"],
                    "val: pointing": c["val"]["phrase"]["pointing"]["value"],
                    "IoU": c["val"]["phrase"]["IoU"]["value"],
                }
                for c in group
            ]
            lines += [f"## `{level}`, {title}", ""]
            if taught:
                lines += [
                    f"Learning was {'kept' if group[0]['kept'] else 'not kept, so this is the zero-shot model'}.",
                    "",
                ]
            lines += [table(rows, tuple(rows[0])), ""]
    if cells:
        best = chosen(cells)
        lines += [
            f"Best on `val` by the sum of all figures, zero-shot, where every method was measured: `{best}`.",
            "",
        ]
        for level in o.levels:
            cell = cells.get(_key(level, False, best))
            for kind in KINDS if cell else ():
                for name, goal in GOALS.items():
                    of = cell["test"][kind][name]
                    verdict = "met" if of["value"] >= goal else "missed"
                    lines.append(f"- `{level}`, {kind}, {name}: {format_interval(of)}, goal {goal}: {verdict}")
        lines.append("")
    command = f"python benchmarks/explain.py --out {o.out}"
    for name, default in (("val", 40), ("test", 100), ("shots", 128), ("draws", ExplainConfig().draws), ("seed", 0)):
        if getattr(o, name) != default:
            command += f" --{name} {getattr(o, name)}"
    return "\n".join([*lines, f"`{command}`", ""])


def chosen(cells: dict[str, dict[str, Any]]) -> str:
    """The method that is best on the split to choose on, over the levels on which every method was measured."""
    totals: dict[str, dict[str, float]] = {}
    for cell in cells.values():
        if not cell["taught"]:
            of = [cell["val"][kind][name]["value"] for kind in KINDS for name in GOALS]
            totals.setdefault(cell["method"], {})[cell["level"]] = sum(of)
    shared = set.intersection(*(set(levels) for levels in totals.values()))
    return max(totals, key=lambda method: sum(totals[method][level] for level in shared))


if __name__ == "__main__":
    main()
