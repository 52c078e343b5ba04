"""Baselines that do not look: a random score, and the caption's length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np

from dsd.baselines.base import Baseline, hashed, pictures_of
from dsd.contracts import Example, OptionError, Pair
from dsd.lesson import choices_of

Better = Literal["short", "long"]


class Chance(Baseline):
    """A random number in 0..1 for each pair of picture and caption, whatever their order, decided by the seed.

    What gives it more than chance is a broken metric, or a task with copies.

    Args:
        seed: Any integer.
    """

    name = "chance"

    def __init__(self, seed: int = 0) -> None:
        if type(seed) is not int:
            raise OptionError(f"got seed {seed!r}, expected an integer")
        self.seed = seed

    @property
    def config(self) -> Mapping[str, Any]:
        return {"baseline": self.name, "seed": self.seed}

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        keys, _ = pictures_of([image for image, _ in pairs])
        # 24 bits, which float32 holds exactly
        draws = [hashed(str(self.seed), key, text) >> 39 for key, (_, text) in zip(keys, pairs, strict=True)]
        return np.array(draws) / 2.0**24


class CaptionLength(Baseline):
    """The number of a caption's words, and within that of its letters: a bias of datasets that is no understanding.

    Args:
        better: Which captions score higher, ``short`` ones or ``long`` ones. :meth:`fit` finds out.
    """

    name = "caption-length"

    def __init__(self, better: Better = "short") -> None:
        if better not in get_args(Better):
            raise OptionError(f"got better {better!r}, expected one of {', '.join(get_args(Better))}")
        self.better: Better = better

    @property
    def config(self) -> Mapping[str, Any]:
        return {"baseline": self.name, "better": self.better}

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        pictures_of([image for image, _ in pairs])  # refuses what is no image, as all methods do
        # letters count less than any word, and fewer than 1,024 of them are told apart exactly in float32
        lengths = [len(text.split()) + min(len(text), 1023) / 1024 for _, text in pairs]
        return np.array(lengths) * (1 if self.better == "long" else -1)

    def fit(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example] | None = None,
        *,
        seed: int | None = None,
        progress: bool = False,
    ) -> Self:
        """Learns whether the right captions of choices among captions are the longer or the shorter ones."""
        longer = 0.0
        for example in (*examples, *(validation or ())):
            lengths = [len(text.split()) + min(len(text), 1023) / 1024 for _, text in example.pairs]
            for choice in choices_of(example):
                right = [lengths[r] for r, own in zip(choice.rows, choice.right, strict=True) if own]
                wrong = [lengths[r] for r, own in zip(choice.rows, choice.right, strict=True) if not own]
                longer += float(np.sign(np.mean(right) - np.mean(wrong)))
        self.better = "long" if longer > 0 else "short"
        return self
