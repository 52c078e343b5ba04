"""What scores of held-out examples say: how good they are, whether that is beyond doubt, and how far to trust them.

No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dsd.contracts import Example
from dsd.lesson import choices_of
from dsd.metrics import bootstrap_interval, expected_calibration_error, reliability, wins
from dsd.weights import Choice, Choices, better, fewest

Rows = Int[np.ndarray, " rows"]

DOUBT = 2
"""Standard errors that something has to be better by: one would let a handful of examples do harm."""
FEWEST = fewest(DOUBT)
"""Held-out examples without which nothing is better beyond doubt."""


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

    def beats(self, before: Judged) -> bool:
        """Whether it is better beyond doubt: accuracy or loss, by :data:`DOUBT`, and accuracy no worse."""
        if self.accuracy.mean() < before.accuracy.mean():
            return False
        return better(-self.accuracy, -before.accuracy, DOUBT) or better(self.loss, before.loss, DOUBT)


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

    def loss(self, scores: Float[np.ndarray, " pairs"]) -> float:
        """The mean loss of :meth:`judge`, for less."""
        scores = np.asarray(scores, np.float64)
        return float(self._choices.losses(self._choices.best_scale(scores) * scores).mean())

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


PARTS = 5
"""Of the held-out examples, each judged by what the others chose."""


@dataclass(frozen=True)
class Verdict:
    """What held-out examples say of what was being learned, look by look.

    Attributes:
        best: The look that is kept: the first, before learning, unless a later one is clearly better.
        weight: Of the score beside what was learned by then.
        scale: What the scores of the best look are multiplied by, so that their differences are log-odds.
        curve: Every look, judged by all examples.
        before, as_dear, after: Before learning, that in as many passes, and what is kept, honestly judged.
        calibration: How far probabilities of what is kept can be taken at their word, honestly judged.
    """

    best: int
    weight: float
    scale: float
    curve: tuple[Judged, ...]
    before: Judged
    as_dear: Judged
    after: Judged
    calibration: dict[str, Any]


def alone(_jury: Jury, _before: np.ndarray, _now: np.ndarray) -> float:
    """Weighs a score beside another: not at all."""
    return 0.0


def verdict(
    jury: Jury,
    looks: Sequence[Float[np.ndarray, " pairs"]],
    weigh: Callable[[Jury, np.ndarray, np.ndarray], float] = alone,
    as_dear: Float[np.ndarray, " pairs"] | None = None,
    beside: Float[np.ndarray, " pairs"] | None = None,
) -> Verdict:
    """Chooses a look, and says how good it is.

    The best of many looks at a few examples flatters them. So each part of the examples is judged at the look, with the
    weight and at the scale that the others chose. What was learned is kept if it is then better than what it started
    from beyond doubt (:meth:`Judged.beats`), and ranks no lower than that in as many passes.

    Args:
        jury: Of the held-out examples.
        looks: Scores of all their pairs at each look, the first of them before learning.
        weigh: The weight of a score beside another, given a jury and the scores of its pairs by one and the other.
        as_dear: Scores without learning in as many passes as what was learned takes; None: these are the first look's.
        beside: Scores that are weighed beside every look's; None: the first look's beside those after it.
    """
    added = looks[0] if beside is None else beside

    def choose(jury: Jury, rows: Rows | slice) -> tuple[int, list[float], list[Judged]]:
        weights = [0.0 if now is added else weigh(jury, added[rows], now[rows]) for now in looks]
        judged = [jury.judge(now[rows] + w * added[rows]) for now, w in zip(looks, weights, strict=True)]
        return max(range(len(looks)), key=lambda i: judged[i].rank), weights, judged

    scaled = np.zeros((3, len(jury.pairs)))
    for mine, others, theirs in jury.parts(PARTS):
        best, weights, judged = choose(others, theirs)
        for row, look in ((0, 0), (2, best)):
            scaled[row, mine] = judged[look].scale * (looks[look][mine] + weights[look] * added[mine])
        scaled[1, mine] = scaled[0, mine] if as_dear is None else others.judge(as_dear[theirs]).scale * as_dear[mine]
    before, dear, after = (jury.judge(scores, 1.0) for scores in scaled)
    best, weights, judged = choose(jury, slice(None))
    if not (best and after.beats(before) and after.rank >= dear.rank):
        best, after, scaled[2] = 0, before, scaled[0]
    calibration = jury.calibration(scaled[2], 1.0)
    return Verdict(best, weights[best], judged[best].scale, tuple(judged), before, dear, after, calibration)


def figures(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, float]:
    """Accuracies before and after learning, with an interval of the latter."""
    value, low, high = bootstrap_interval(after, seed)
    return {"before": float(before.mean()), "after": value, "low": low, "high": high}
