"""How long ``weights`` takes: ``python benchmarks/weights.py --out docs/results/weights``.

The whole lesson on examples of a task of the embedded world, and of it what is left once features are there: the
solver, which fits weights at every strength of the penalty on every fold. One thread; wall-clock seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dsd import weighing
from dsd.evaluate import installed_versions, write_text
from dsd.matcher import Matcher
from dsd.report import table
from dsd.study.grid import FEW, LESSONS
from dsd.tasks import WORLD_TASKS, world_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--tasks", nargs="+", default=["comvg"], choices=WORLD_TASKS)
    parser.add_argument("--shots", type=int, nargs="+", default=[256])
    o = parser.parse_args()
    torch.set_num_threads(1)
    fit_weights = weighing.fit_weights
    matcher = Matcher.from_pretrained("tiny", score="denoising", timesteps=FEW)
    matcher.score([world_task("comvg", "val", "standard", 1, 0)[0].images[0]], ["a star"])  # warm
    rows = []
    for task in o.tasks:
        for shots in o.shots:
            few = world_task(task, "few-shot", "standard", shots, 0)
            spent: list[tuple[float, tuple[int, ...]]] = []

            def timed(features: Any, *rest: Any, spent: list[Any] = spent) -> Any:
                start = time.perf_counter()
                found = fit_weights(features, *rest)
                spent.append((time.perf_counter() - start, features.shape))
                return found

            with patch.object(weighing, "fit_weights", timed):
                start = time.perf_counter()
                matcher.fit(few, config=LESSONS["dsd weights"].config)
                whole = time.perf_counter() - start
            solver, (pairs, width) = spent[0]
            rows.append(
                {
                    "task": task,
                    "examples": shots,
                    "pairs": pairs,
                    "features": width,
                    "features, s": f"{whole - solver:.1f}",
                    "solver, s": f"{solver:.1f}",
                    "whole, s": f"{whole:.1f}",
                }
            )
            print(rows[-1], flush=True)
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": installed_versions(),
        "rows": rows,
    }
    write_text(o.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    head = "# Seconds of a lesson of `weights`\n\nOn one core. Made by "
    command = f"python benchmarks/weights.py --out {o.out} --tasks {' '.join(o.tasks)} --shots "
    command += " ".join(map(str, o.shots))
    write_text(o.out.with_suffix(".md"), f"{head}`{command}`.\n\n{table(rows, list(rows[0]))}\n")


if __name__ == "__main__":
    main()
