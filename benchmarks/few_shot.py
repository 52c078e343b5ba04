"""What learning adds on the embedded model: ``python benchmarks/few_shot.py --out docs/results/few_shot``.

For each task and seed: the zero-shot score on held-out examples, a fit on few-shot examples, the same held-out examples
again, and the paired difference with its 95 % interval. Writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsd.learn import FitConfig
from dsd.contracts import Example
from dsd.evaluate import Result, evaluate, write_text
from dsd.matcher import Matcher
from dsd.metrics import outcomes, paired_difference
from dsd.report import format_interval, table
from dsd.tasks import world_task


def measured(task: str, examples: list[Example], result: Result) -> tuple[str, np.ndarray]:
    """The task's metric, and each example's outcome in it: whole groups for winoground, choices won for the others."""
    if task == "winoground":
        won = [
            float(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0] and s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
            for s in result.scores
        ]
        return "group", np.array(won)
    return "accuracy", outcomes(examples, result.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--tasks", nargs="+", default=["comvg", "winoground"])
    parser.add_argument("--scores", nargs="+", default=["attention", "denoising"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=300)
    parser.add_argument("--level", default="easy")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        test = world_task(task, "test", options.level, options.held_out, 0)
        for score in options.scores:
            before = evaluate(Matcher.from_pretrained("tiny", score=score), test, progress=True)
            for seed in options.seeds:
                matcher = Matcher.from_pretrained("tiny", score=score)
                start = time.perf_counter()
                few = world_task(task, "few-shot", options.level, options.shots, seed)
                matcher.fit(few, config=FitConfig(seed=seed), progress=True)
                seconds = time.perf_counter() - start
                after = evaluate(matcher, test, progress=True)
                name, old = measured(task, test, before)
                gain = paired_difference(measured(task, test, after)[1], old)
                assert matcher.adapter is not None
                rows.append(
                    {
                        "task": task,
                        "metric": name,
                        "score": score,
                        "seed": seed,
                        "zero-shot": before.metrics[name],
                        "taught": after.metrics[name],
                        "gain": gain,
                        "kept": matcher.adapter.training["kept"],
                        "fit seconds": round(seconds),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
                save(options, rows)


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes what there is so far."""
    settings = {**vars(options), "out": str(options.out), "cores": os.cpu_count()}
    write_text(options.out.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    shown = [
        {
            **{k: r[k] for k in ("task", "metric", "score", "seed", "fit seconds")},
            "zero-shot": format_interval(r["zero-shot"]),
            "taught": format_interval(r["taught"]),
            "gain": f"{r['gain']['value']:+.3f} [{r['gain']['low']:+.2f}, {r['gain']['high']:+.2f}]",
        }
        for r in rows
    ]
    columns = ("task", "metric", "score", "seed", "zero-shot", "taught", "gain", "fit seconds")
    made = f"`python benchmarks/few_shot.py --out {options.out}`"
    text = (
        f"# Few-shot learning on the embedded model\n\n{options.shots} examples, {options.held_out} held-out examples, "
        f"level `{options.level}`; 95 % intervals in brackets. Made by {made}."
        f"\n\n{table(shown, columns)}\n"
    )
    write_text(options.out.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
