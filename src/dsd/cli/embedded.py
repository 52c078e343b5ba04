"""Commands about the embedded model and its world: ``world``, ``demo``."""

from __future__ import annotations

import argparse

from dsd.cli.options import WORLD_TASKS, Commands, world_options
from dsd.cli.printing import say


def add(commands: Commands) -> None:
    """Adds these commands."""
    world = commands.add("world", _world, "Draw a task of the procedural world: images and a manifest.", form=False)
    world.add_argument("task", choices=WORLD_TASKS)
    world.add_argument("--out", required=True, metavar="DIR")
    world_options(world)
    world.add_argument("--seed", type=int, default=0)

    demo = commands.add("demo", _demo, "The main job on the embedded model: score, teach, see.", form=False)
    demo.add_argument("--out", default="demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--shots", type=int, default=128, metavar="N", help="examples to learn from (default: %(default)s)"
    )
    demo.add_argument("--held-out", type=int, default=200, metavar="N", help="examples a task (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)


def _world(a: argparse.Namespace) -> None:
    from dsd.tasks import world_task, write_manifest

    examples = world_task(a.task, a.split, a.level, a.count, a.seed, a.novel)
    say(str(write_manifest(examples, a.out)))


def _demo(a: argparse.Namespace) -> None:
    from dsd.demo import run

    run(a.out, shots=a.shots, held_out=a.held_out, seed=a.seed)
