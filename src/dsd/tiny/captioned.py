"""The recipe of the embedded adapter, ``tiny-captions``: ``python -m dsd.tiny.captioned --out runs/captioned``.

Prompts for the attention of ``tiny``, learned from captioned pictures alone: pictures of the pretraining part with
their captions, which nobody labelled, among wrong captions that differ in a word or two (:mod:`dsd.negatives`). No
example of a task is seen, and no word that pretraining never saw. Few-shot lessons can start from it. Some eighty
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
from dsd.tiny.captions import DETAIL
from dsd.tiny.pretrain import Recipe, caption_of, scene_at

_FIRST = 30_000_000
"""The number of the first picture: none that pretraining saw."""


@dataclass(frozen=True)
class Stage:
    """Lessons from pictures that no other stage saw.

    Attributes:
        pictures: To learn from.
        steps: Of the optimizer.
        check_every: Steps between looks at what is held out.
        learning_rate: At its peak.
        detail: How probable it is that a caption tells a thing's size, and its fill.
    """

    pictures: int
    steps: int
    check_every: int
    learning_rate: float
    detail: float


STAGES = (Stage(24_576, 2400, 480, 5e-3, DETAIL), Stage(24_576, 3000, 250, 2.5e-3, 0.6))
"""First as pretraining had it, then with smaller steps and captions that tell more."""


@dataclass(frozen=True)
class Captions:
    """Everything that decides the adapter."""

    stages: tuple[Stage, ...] = STAGES
    held_out: int = 200
    """Further pictures of each stage, to stop by."""
    rank: int = 8
    timesteps: tuple[int, ...] = (100,)
    seed: int = 0


def examples(config: Captions, stage: int) -> tuple[list[Example], list[Example]]:
    """Captioned pictures of a stage to learn from and to stop by, each caption among three wrong ones."""
    count, detail = config.stages[stage].pictures, config.stages[stage].detail
    first = sum(earlier.pictures + config.held_out for earlier in config.stages[:stage])
    drawn = [_picture(first + i, detail) for i in range(count + config.held_out)]
    made, _ = with_hard_negatives(drawn)
    return made[: -config.held_out], made[-config.held_out :]


def _picture(i: int, detail: float) -> Example:
    rng = random.Random(f"captions {i}")
    scene = scene_at(Recipe(), _FIRST + i)
    _, caption = caption_of(rng, scene, detail)
    return Example(f"captioned-{i}", (world.render(scene),), (caption,), ((0, 0),))


def learn(config: Captions, out: Path) -> None:
    """Learns the adapter into a folder, or goes on where that was stopped."""
    folders = [Path(f"{out}.{k}") for k in range(1, len(config.stages))] + [out]
    for k, (stage, folder) in enumerate(zip(config.stages, folders, strict=True)):
        if folder.exists():
            continue
        few, held_out = examples(config, k)
        matcher = Matcher.from_pretrained("tiny", score=ScoreConfig("attention", config.timesteps), device="cpu")
        fitting = FitConfig(
            steps=stage.steps,
            check_every=stage.check_every,
            patience=100,
            learning_rate=stage.learning_rate,
            negatives=0,
            image_negatives=1,
            seed=config.seed,
        )
        checkpoint = Path(f"{folder}.checkpoint")
        matcher.fit(
            few,
            held_out,
            config=fitting,
            prompt=None if k else PromptConfig(rank=config.rank),
            start=folders[k - 1] if k else None,
            checkpoint=checkpoint,
            resume=True,
            progress=True,
        )
        matcher.save_pretrained(folder)
        checkpoint.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter; earlier stages beside it")
    for name in ("held_out", "rank", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Captions, name))
    options = vars(parser.parse_args())
    out = options.pop("out")
    learn(Captions(**options), out)


if __name__ == "__main__":
    main()
