"""Held-out examples judge what was learned without being flattered by what they chose."""

from __future__ import annotations

import numpy as np
import pytest

from dsd.jury import PARTS, Jury, verdict
from models import toy


def jury_of(count: int) -> Jury:
    return Jury(toy(count, 0))


def scores_of(jury: Jury, won: np.ndarray, margin: float = 1.0) -> np.ndarray:
    """Scores by which the right one of each example's two candidates wins, or loses."""
    found = np.zeros(len(jury.pairs), np.float32)
    for i, (example, wins) in enumerate(zip(jury.examples, won, strict=True)):
        ((_, right),) = example.positives
        found[2 * i + (right if wins else 1 - right)] = margin
    return found


@pytest.mark.parametrize("count", [2, 4, 6, 22])
def test_parts_share_the_examples(count: int) -> None:
    jury = jury_of(count)
    seen: list[int] = []
    for mine, others, theirs in jury.parts(PARTS):
        assert sorted([*mine, *theirs]) == list(range(len(jury.pairs)))
        assert others.pairs == [jury.pairs[k] for k in theirs]
        seen += mine.tolist()
    assert sorted(seen) == list(range(len(jury.pairs)))


def test_one_example_is_judged_by_itself() -> None:
    jury = Jury(toy(1, 0))
    ((mine, others, theirs),) = jury.parts(PARTS)
    assert mine.tolist() == theirs.tolist() == [0, 1]
    assert others.pairs == jury.pairs


def test_the_best_of_many_looks_is_not_flattered() -> None:
    """Looks at nothing but chance: the best of forty seems to win much more than half, and is not said to."""
    jury, rng = jury_of(30), np.random.default_rng(0)
    lost = scores_of(jury, np.zeros(30, bool))
    best, told = [], []
    for _ in range(12):
        looks = [lost, *(scores_of(jury, rng.random(30) < 0.5) for _ in range(40))]
        found = verdict(jury, looks)
        assert found.best > 0  # beyond doubt better than losing all
        best.append(max(j.accuracy.mean() for j in found.curve))
        told.append(found.after.accuracy.mean())
    assert np.mean(best) > 0.65
    assert abs(np.mean(told) - 0.5) < 0.1


def test_what_is_clearly_better_is_kept() -> None:
    jury = jury_of(20)
    first, second = (scores_of(jury, np.arange(20) % k > 0) for k in (2, 9))
    found = verdict(jury, [first, second])
    assert found.best == 1
    assert found.before.accuracy.mean() == 0.5
    assert found.after.accuracy.mean() == 0.85
    sure = sum(b["confidence"] * b["n"] for b in found.calibration["bins"]) / 20
    assert sure == pytest.approx(0.85, abs=0.05)
    assert verdict(jury, [first, second], as_dear=scores_of(jury, np.ones(20, bool))).best == 0


@pytest.mark.parametrize("count", [2, 3, 4, 8, 20])
def test_chance_is_not_kept(count: int) -> None:
    """Over many lessons that teach nothing, hardly any is kept, however few examples are held out."""
    jury, rng = jury_of(count), np.random.default_rng(1)
    kept = 0
    for _ in range(60):
        looks = [rng.standard_normal(len(jury.pairs)).astype(np.float32) for _ in range(9)]
        found = verdict(jury, looks)
        kept += found.best > 0
        assert found.best > 0 or np.array_equal(found.after.accuracy, found.before.accuracy)
    assert kept <= (0 if count < 6 else 6)
