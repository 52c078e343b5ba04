"""The recipe of the embedded adapter, ``tiny-captions``: ``python -m dsd.tiny.captioned --out runs/captioned``.

Prompts for the attention of ``tiny``, learned from captioned pictures alone: pictures of the pretraining part with
their captions, which nobody labelled, among wrong captions that differ in a word or two (:mod:`dsd.negatives`). No
example of a task is seen, and no word that pretraining never saw. Few-shot lessons can start from it. Some forty
minutes of one core; goes on where it was stopped.

What is taught is one pass: under these prompts further passes, at other timesteps, tell next to nothing more.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

from dsd.contracts import Example
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig
from dsd.tasks.captioned import with_hard_negatives
from dsd.tiny import world
from dsd.tiny.pretrain import Recipe, caption_of, scene_at

_FIRST = 30_000_000
"""The number of the first picture: none that pretraining saw."""


@dataclass(frozen=True)
class Captions:
    """Everything that decides the adapter."""

    pictures: int = 24_576
    held_out: int = 200
    """Further pictures to stop by."""
    steps: int = 2400
    rank: int = 8
    timesteps: tuple[int, ...] = (100,)
    seed: int = 0


def examples(config: Captions) -> tuple[list[Example], list[Example]]:
    """Captioned pictures to learn from and to stop by, each caption among three wrong ones."""
    drawn = [_picture(i) for i in range(config.pictures + config.held_out)]
    made, _ = with_hard_negatives(drawn)
    return made[: -config.held_out], made[-config.held_out :]


def _picture(i: int) -> Example:
    rng = random.Random(f"captions {i}")
    scene = scene_at(Recipe(), _FIRST + i)
    _, caption = caption_of(rng, scene)
    return Example(f"captioned-{i}", (world.render(scene),), (caption,), ((0, 0),))


def learn(config: Captions, out: Path) -> None:
    """Learns the adapter into a folder, or goes on where that was stopped."""
    few, held_out = examples(config)
    matcher = Matcher.from_pretrained("tiny", score=ScoreConfig("attention", config.timesteps), device="cpu")
    fitting = FitConfig(
        steps=config.steps,
        check_every=config.steps // 5,
        patience=8,
        negatives=0,
        image_negatives=1,
        seed=config.seed,
    )
    checkpoint = Path(f"{out}.checkpoint")
    matcher.fit(
        few,
        held_out,
        config=fitting,
        prompt=PromptConfig(rank=config.rank),
        checkpoint=checkpoint,
        resume=True,
        progress=True,
    )
    matcher.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    for name in ("pictures", "held_out", "steps", "rank", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Captions, name))
    options = vars(parser.parse_args())
    out = options.pop("out")
    learn(Captions(**options), out)


if __name__ == "__main__":
    main()
