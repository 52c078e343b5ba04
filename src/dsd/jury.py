"""What scores of held-out examples say: how good they are, whether that is beyond doubt, and how far to trust them.

NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsd.contracts import Example
from dsd.lesson import choices_of
from dsd.metrics import expected_calibration_error, reliability, wins
from dsd.weights import Choice, Choices, better

Rows = Int[np.ndarray, " rows"]


@dataclass(frozen=True)
class Judged:
    """How scores fare on examples.

    Attributes:
        accuracy: (examples,) share of choices won.
        loss: (examples,) of the softmax over candidates, at the best scale.
        scale: What scores are multiplied by so that their differences are log-odds.
    """

    accuracy: Float[np.ndarray, " examples"]
    loss: Float[np.ndarray, " examples"]
    scale: float

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: choices won, and the loss where these are equal.

        The loss alone is led by a few choices that are lost by far, and prefers prompts that have hardly learned.
        """
        return float(self.accuracy.mean()), -float(self.loss.mean())

    def matches(self, other: Judged) -> bool:
        """Whether it is no worse, in accuracy and in loss."""
        return bool(self.accuracy.mean() >= other.accuracy.mean() and self.loss.mean() <= other.loss.mean())

    def beats(self, before: Judged) -> bool:
        """Whether it is better beyond doubt: accuracy or loss, by two standard errors, and accuracy no worse.

        One would let a handful of examples do harm: it is the best of many looks, and the scale is fitted to them.
        """
        if self.accuracy.mean() < before.accuracy.mean():
            return False
        return better(-self.accuracy, -before.accuracy, 2) or better(self.loss, before.loss, 2)


class Jury:
    """Judges scores of all pairs of some examples: (pairs,), one example after the other."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.pairs = [pair for e in self.examples for pair in e.pairs]
        self._tables: list[slice] = []
        self.own: list[list[Choice]] = []
        """Each example's choices, whose rows count through all examples."""
        at = 0
        for e in self.examples:
            self._tables.append(slice(at, at + len(e.pairs)))
            self.own.append([Choice(tuple(at + r for r in c.rows), c.right) for c in choices_of(e)])
            at += len(e.pairs)
        self._choices = Choices(self.own)

    def accuracy(self, scores: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " examples"]:
        """Share of each example's choices that is won."""
        tables = [scores[t].reshape(len(e.images), -1) for t, e in zip(self._tables, self.examples, strict=True)]
        return np.array([wins(t, e.positives).mean() for t, e in zip(tables, self.examples, strict=True)])

    def spread(self, scores: Float[np.ndarray, " pairs"]) -> float:
        """How far the scores of candidates lie apart."""
        return float(self._choices.spread(np.asarray(scores, np.float64)))

    def judge(self, scores: Float[np.ndarray, " pairs"], scale: float | None = None) -> Judged:
        """Judges scores, at the scale that suits them best unless it is given."""
        scores = np.asarray(scores, np.float64)
        scale = self._choices.best_scale(scores) if scale is None else scale
        return Judged(self.accuracy(scores), self._choices.losses(scale * scores), scale)

    def parts(self, count: int) -> Iterator[tuple[Rows, Jury, Rows]]:
        """Of each of at most ``count`` parts of the examples: its pairs, a jury of all others, and their pairs.

        One example alone is judged by itself.
        """
        numbers = np.arange(len(self.pairs))
        count = min(count, len(self.examples))
        for part in range(count):
            chosen = [i % count != part or count == 1 for i in range(len(self.examples))]
            others = Jury([e for e, other in zip(self.examples, chosen, strict=True) if other])
            theirs = np.concatenate([numbers[t] for t, other in zip(self._tables, chosen, strict=True) if other])
            yield np.concatenate([numbers[t] for t in self._tables[part::count]]), others, theirs

    def calibration(self, scores: Float[np.ndarray, " pairs"], scale: float) -> dict[str, Any]:
        """How far probabilities ``softmax(scale * scores)`` can be taken at their word, plain values."""
        confidence, correct = self._choices.confidence(scale * np.asarray(scores, np.float64))
        return {
            "error": expected_calibration_error(confidence, correct),
            "bins": [dict(b) for b in reliability(confidence, correct)],
            "held_out": len(self.examples),
        }
