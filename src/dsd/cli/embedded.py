"""Commands about the embedded model and its world: ``world``, ``demo``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import Any

from dsd.cli.options import LEVELS, WORLD_TASKS, Commands, integers, settle_world, world_options
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError


def add(commands: Commands) -> None:
    """Adds these commands."""
    world = commands.add("world", _world, "Draw a task of the procedural world: images and a manifest.", form=False)
    world.add_argument("task", choices=WORLD_TASKS)
    world.add_argument("--out", required=True, metavar="DIR")
    world_options(world)
    world.add_argument("--seed", type=int, default=0)

    study = commands.add("study", _study, "Every method on every task of the embedded world.")
    study.add_argument("--out", metavar="DIR", help="default: study, or quick-study; a study that is there goes on")
    size = study.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one level, few methods, fewer examples: minutes")
    size.add_argument("--full", action="store_true", help="every method, three draws: more than a day")
    study.add_argument(
        "--report-only", action="store_true", help="report what the folder has, and what is missing; measure nothing"
    )
    study.add_argument("--tasks", metavar="T,T,...", help=f"some of {', '.join(WORLD_TASKS)}, novel (default: all)")
    study.add_argument("--levels", metavar="L,L,...", help=f"some of {', '.join(LEVELS)} (default: standard,hard)")
    study.add_argument(
        "--methods", metavar="M;M;...", help="few-shot methods with ; between (default: five; a wrong one lists all)"
    )
    study.add_argument("--shots", type=integers, metavar="N,N,...", help="examples to learn from (default: 16,256)")
    study.add_argument("--seeds", type=int, metavar="N", help="draws of each number (default: 1)")
    study.add_argument("--held-out", type=int, metavar="N", help="examples a task to measure on (default: 200)")
    study.add_argument("--jobs", type=int, metavar="N", help="processes (default: one a core)")

    demo = commands.add("demo", _demo, "The main job on the embedded model: score, teach, see.", form=False)
    demo.add_argument("--out", default="demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--shots", type=int, default=128, metavar="N", help="examples to learn from (default: %(default)s)"
    )
    demo.add_argument("--held-out", type=int, default=200, metavar="N", help="examples a task (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)


def _world(a: argparse.Namespace) -> None:
    from dsd.tasks import world_task, write_manifest

    settle_world(a, True)
    examples = world_task(a.task, a.split, a.level, a.count, a.seed, a.novel)
    say(str(write_manifest(examples, a.out)))


def _study(a: argparse.Namespace) -> None:
    from dsd.study.grid import FULL, QUICK, StudyConfig
    from dsd.study.measure import task_of
    from dsd.study.report import summary, write_report
    from dsd.study.run import gather, run
    from dsd.study.store import Store

    named = {"tasks": (a.tasks, ","), "levels": (a.levels, ","), "methods": (a.methods, ";")}
    given: dict[str, Any] = {k: tuple(v.split(by)) for k, (v, by) in named.items() if v is not None}
    given |= {k: getattr(a, k) for k in ("shots", "seeds", "held_out") if getattr(a, k) is not None}
    base = QUICK if a.quick else FULL if a.full else StudyConfig()
    out = a.out or ("quick-study" if a.quick else "study")
    # who names methods wants them as often as the others
    config = replace(base, **given, thorough=base.thorough or a.methods is not None)
    jobs = os.cpu_count() or 1 if a.jobs is None else a.jobs
    if jobs < 1:
        raise OptionError(f"got {jobs} jobs, expected 1 or more")
    if a.report_only:
        made = gather(out, config)
    else:
        made = run(
            out,
            config,
            jobs=jobs,
            announce=lambda text: print(f"dsd study: {text}", file=sys.stderr, flush=True),
            progress=watched(),
        )
    shown = {task: task_of(task, "val", config.levels[0], 1, 0)[0] for task in config.tasks}
    written = [*write_report(made, out, shown), Store(out, config).pack()]
    found = summary(made)
    if a.format == "json":
        print_json({"out": out, **found})
        return
    if made.missing:
        say(f"not measured yet: {'; '.join(made.missing)}")
    for heading, rows in list(found["tables"].items())[:2]:
        say(f"{heading}:")
        print_table(rows, tuple(dict.fromkeys(key for row in rows for key in row)))
    say("\n".join(str(path) for path in written))


def _demo(a: argparse.Namespace) -> None:
    from dsd.demo import run

    run(a.out, shots=a.shots, held_out=a.held_out, seed=a.seed)
