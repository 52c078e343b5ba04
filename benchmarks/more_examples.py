"""Five taught passes against fifty: ``python benchmarks/more_examples.py --out docs/results/more-examples``.

Attention alone is taught from far more examples than the study's, and measured on its test examples, beside the
zero-shot scores that the study measured there. Lessons take 8 to 15 minutes of one core each; they stay in ``--work``,
and what is there is not taught again. Four runs, one draw each.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsd.cli import main as dsd
from dsd.evaluate import Result, installed_versions, write_text
from dsd.metrics import bootstrap_interval, paired_difference
from dsd.report import table
from dsd.study.grid import FEW, StudyConfig
from dsd.study.measure import held_out, outcomes_of
from dsd.study.store import Store

LEVEL = "standard"
RIVALS = ("denoising, 50 passes", "Diffusion Classifier, L2, 50 passes", "DiffusionITM, 50 passes")
STUDY = StudyConfig()


@dataclass(frozen=True)
class Run:
    """A lesson: from how many examples, how long, and what share is held out to stop by."""

    task: str
    shots: int
    steps: int
    every: int
    share: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.shots}"

    @property
    def command(self) -> str:
        task = "comvg --novel" if self.task == "novel" else self.task
        return (
            f"dsd eval {task} --level {LEVEL} --count {STUDY.held_out} --score attention "
            f"--timesteps {','.join(map(str, FEW))} --shots {self.shots} --rank 8 --max-steps {self.steps} "
            f"--check-every {self.every} --hold-out {self.share} --out {self.name}"
        )


RUNS = (
    Run("winoground", 1024, 800, 100, 0.1),
    Run("winoground", 4096, 1200, 150, 0.04),
    Run("comvg", 4096, 1000, 200, 0.04),
    Run("novel", 4096, 1000, 200, 0.04),
)


def taught(run: Run, work: Path) -> tuple[Result, float | None]:
    """The result of a run, and the processor seconds that it took where it was made in one go."""
    folder, clock = work / run.name, work / f"{run.name}.seconds"
    anew = not folder.exists()
    start = time.process_time()
    if dsd([*shlex.split(run.command)[1:-1], str(folder)]) != 0:
        raise SystemExit(1)
    if anew:
        write_text(clock, f"{time.process_time() - start}\n")
    return Result.load(folder), float(clock.read_text()) if clock.exists() else None


def measured(run: Run, work: Path, study: Path) -> dict[str, Any]:
    """What a run won, over what zero-shot scores with ten times the passes did on the same examples."""
    result, seconds = taught(run, work)
    made = outcomes_of(run.task, held_out(STUDY, run.task, LEVEL), result.scores)
    value, low, high = bootstrap_interval(made)
    swept = Store(study, STUDY).get(("sweep", run.task, LEVEL)) or {"zero": []}
    zero = {cell["method"]: cell["outcomes"] for cell in swept["zero"]}
    training = result.config["adapter"]["training"]
    return {
        "command": run.command,
        "task": run.task,
        "shots": run.shots,
        "held out while learning": training["validation_examples"],
        "accuracy": {"value": value, "low": low, "high": high},
        "over": {
            name: {"their accuracy": sum(zero[name]) / len(made), **paired_difference(made, zero[name])}
            for name in RIVALS
            if name in zero
        },
        "by tag": {tag: dict(found["accuracy"]) for tag, found in result.by_tag.items()},
        "curve": training["curve"],
        "seconds": seconds,
    }


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The figures as a page."""

    def interval(of: dict[str, float], scale: float = 1, form: str = ".3f") -> str:
        value, low, high = (f"{scale * of[k]:{form}}" for k in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    shown = []
    for row in rows:
        gaps = {
            f"over {name}": f"{interval(of, 100, '+.1f')} ({of['their accuracy']:.3f})"
            for name, of in row["over"].items()
        }
        time_taken = "" if row["seconds"] is None else f"{row['seconds'] / 60:.0f} min"
        task = f"{row['task']}{' (group)' if row['task'] == 'winoground' else ''}"
        head = {"task": task, "examples": row["shots"], "five taught passes": interval(row["accuracy"])}
        shown.append({**head, **gaps, "one core": time_taken})
    columns = list(dict.fromkeys(key for row in shown for key in row if key != "one core"))
    novel = next(row for row in rows if row["task"] == "novel")["by tag"]
    return f"""# Five taught passes against fifty, with more examples

Attention alone, by prompts of rank 8 on all attention layers, five passes a pair, level `{LEVEL}`,
{STUDY.held_out} test examples, one draw. 95 % intervals; differences in points, paired, to zero-shot scores of
[the study](study-draws/study.md) on the same examples, whose own accuracy is in parentheses. Made by `{command}`.

{table(shown, [*columns, "one core"])}

`novel` is choices of two that hinge on words which pretraining never saw: {interval(novel["novel-relation"])}
of those about the relation, {interval(novel["novel-fill"])} of those about the fill.

The lessons, of which a part is held out to stop by; their curves are in the JSON file beside this page:

{chr(10).join("    " + row["command"] for row in rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--work", type=Path, default=Path("runs/more"), help="folder of the lessons")
    parser.add_argument("--study", type=Path, default=Path("docs/results/study-draws"), help="folder of the study")
    o = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(run, o.work, o.study) for run in RUNS]
    record = {"versions": installed_versions(), "rows": rows}
    write_text(o.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(o.out.with_suffix(".md"), page(rows, f"python benchmarks/more_examples.py --out {o.out}"))


if __name__ == "__main__":
    main()
