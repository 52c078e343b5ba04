"""What learning adds on the embedded model: ``python benchmarks/few_shot.py --out docs/results/few_shot``.

A grid of tasks, levels, numbers of examples, seeds and lessons (a score, and the method that teaches it). Each cell is
measured on the same held-out examples as the zero-shot scores, with the paired difference to two of them: its own score
before it was taught, and ``denoising`` with 50 timesteps. Writes a JSON file, which a run of the same settings goes on
from, and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsd.contracts import Example
from dsd.evaluate import Result, evaluate, installed_versions, write_text
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.metrics import bootstrap_interval, outcomes, paired_difference
from dsd.report import format_interval, table
from dsd.scores import even_timesteps
from dsd.tasks import world_task

LESSONS = ("denoising/weights", "attention/prompt", "attention/tokens", "attention/heads", "attention/prompt+weights")
MANY = 50


def won(task: str, examples: list[Example], result: Result) -> np.ndarray:
    """Each example's outcome in the task's metric: whole groups for winoground, the share of choices won for others."""
    if task != "winoground":
        return outcomes(examples, result.scores)
    # the right text beats the other for both images, and the right image for both texts
    return np.array([min(s[0, 0], s[1, 1]) > max(s[0, 1], s[1, 0]) for s in map(np.asarray, result.scores)], float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--tasks", nargs="+", default=["comvg", "winoground"])
    parser.add_argument("--levels", nargs="+", default=["easy"])
    parser.add_argument("--lessons", nargs="+", default=["attention/prompt"], help=f"some of {', '.join(LESSONS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, nargs="+", default=[128])
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--novel", action="store_true", help="ask about the words that pretraining never saw")
    parser.add_argument("--hold-out", type=float, help="share of the few-shot examples to stop by, instead of folds")
    parser.add_argument("--without-many", action="store_true", help=f"leave out denoising with {MANY} timesteps")
    o = parser.parse_args()
    setup = {k: str(v) if isinstance(v, Path) else v for k, v in vars(o).items()}
    path = o.out.with_suffix(".json")
    cells: dict[str, dict[str, Any]] = {}
    if path.exists():
        cells = json.loads(path.read_text())["cells"]

    def kept(cell: dict[str, Any], key: str) -> None:
        cells[key] = cell
        write_text(path, json.dumps(_record(setup, cells), indent=1) + "\n")
        write_text(o.out.with_suffix(".md"), _page(o, cells))
        print(key, format_interval(cell["value"]), flush=True)

    for task in o.tasks:
        for level in o.levels:
            place = f"{task}{' novel' if o.novel else ''}, {level}"
            test = world_task(task, "test", level, o.held_out, 0, o.novel)
            scores = list(dict.fromkeys(["denoising", *(lesson.split("/")[0] for lesson in o.lessons)]))
            for score in scores:
                for many in (False, True) if score == "denoising" and not o.without_many else (False,):
                    key = f"{place}: {score}{f' {MANY}' if many else ''}"
                    if key not in cells:
                        matcher = Matcher.from_pretrained("tiny", score=score)
                        if many:
                            matcher = Matcher(
                                matcher.backbone, replace(matcher.score_config, timesteps=even_timesteps(MANY))
                            )
                        kept(_cell(place, won(task, test, evaluate(matcher, test, progress=True)), lesson=score), key)
            for shots in o.shots:
                for lesson in o.lessons:
                    for seed in o.seeds:
                        key = f"{place}: {lesson}, {shots} examples, seed {seed}"
                        if key in cells:
                            continue
                        score, method = lesson.split("/")
                        matcher = Matcher.from_pretrained("tiny", score=score)
                        few = world_task(task, "few-shot", level, shots, seed, o.novel)
                        start = time.perf_counter()
                        config = FitConfig(method=method, validation=o.hold_out, seed=seed)  # type: ignore[arg-type]
                        matcher.fit(few, config=config, progress=True)
                        seconds = time.perf_counter() - start
                        after = won(task, test, evaluate(matcher, test, progress=True))
                        assert matcher.adapter is not None
                        training = matcher.adapter.training
                        cell = _cell(place, after, lesson=lesson, shots=shots, seed=seed, seconds=round(seconds))
                        cell["kept"] = training["kept"]
                        cell["calibration error"] = training["calibration"]["error"]
                        for name, other in (("gain", score), ("over", f"denoising {MANY}")):
                            if f"{place}: {other}" in cells:
                                cell[name] = paired_difference(after, cells[f"{place}: {other}"]["outcomes"])
                        kept(cell, key)


def _cell(place: str, outcome: np.ndarray, **what: Any) -> dict[str, Any]:
    value, low, high = bootstrap_interval(outcome)
    interval = {"value": value, "low": low, "high": high, "n": len(outcome)}
    return {"place": place, **what, "value": interval, "outcomes": outcome.tolist()}


def _record(setup: dict[str, Any], cells: dict[str, Any]) -> dict[str, Any]:
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"settings": setup, "machine": machine, "versions": installed_versions(), "cells": cells}


def _page(o: argparse.Namespace, cells: dict[str, dict[str, Any]]) -> str:
    sections = []
    for place in dict.fromkeys(cell["place"] for cell in cells.values()):
        here = {key: cell for key, cell in cells.items() if cell["place"] == place}
        rows = [
            {
                "lesson": f"zero-shot {cell['lesson']}{f', {MANY} timesteps' if key.endswith(f' {MANY}') else ''}"
                if "shots" not in cell
                else cell["lesson"],
                "examples": cell.get("shots", ""),
                "seed": cell.get("seed", ""),
                "value": format_interval(cell["value"]),
                "gain": _difference(cell.get("gain")),
                f"over denoising {MANY}": _difference(cell.get("over")),
                "fit seconds": cell.get("seconds", ""),
            }
            for key, cell in here.items()
        ]
        metric = "group score" if place.startswith("winoground") else "accuracy"
        columns = ["lesson", "examples", "seed", "value", "gain", "fit seconds"]
        if any("over" in cell for cell in here.values()):
            columns.insert(5, f"over denoising {MANY}")
        sections.append(f"## {place}: {metric}\n\n{table(rows, columns)}\n")
    return (
        f"# Few-shot learning on the embedded model\n\n{o.held_out} held-out examples; 95 % intervals in brackets; "
        f"gain: over the same score before it was taught, paired. Made by `python benchmarks/few_shot.py --out {o.out}`"
        " with the settings in the JSON file beside this one.\n\n" + "\n".join(sections)
    )


def _difference(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['value']:+.3f} [{found['low']:+.2f}, {found['high']:+.2f}]"


if __name__ == "__main__":
    main()
