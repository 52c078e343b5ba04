"""Stands in for looking at held-out examples while learning, where only the course of it is of interest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dsd import gradient, learn
from dsd.jury import Judged, Jury
from dsd.learn import Team
from dsd.scorer import Scorer


def looks_as(patch: pytest.MonkeyPatch, value: Callable[[Scorer], float]) -> None:
    """The loss of held-out examples is what ``value`` says of the scorer."""

    def scores(scorer: Scorer, jury: Jury, _team: Team) -> Tensor:
        return torch.full((len(jury.pairs),), value(scorer), dtype=torch.float64)

    def judge(self: Jury, scores: np.ndarray, _scale: float | None = None) -> Judged:
        count = max(8, len(self.examples))  # as many as it takes to be beyond doubt
        return Judged(np.ones(count), scores[0] + 0.01 * np.arange(count), 1 + scores[0])

    patch.setattr(Jury, "loss", lambda _self, scores: float(scores[0]))
    for module in (gradient, learn):
        patch.setattr(module, "held_out_scores", scores)
    patch.setattr(Jury, "judge", judge)
