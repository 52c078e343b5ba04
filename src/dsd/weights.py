"""Regularised weights of features, fitted in seconds: a linear score that starts from one that is known to work.

A score is ``features @ weights``. Weights minimise the softmax loss over the candidates of each choice, with an L2
penalty on how far they leave the *prior* scores (a few weight vectors, such as the zero-shot score's, whose own scale
is free). The penalty's strength is chosen by cross-validation; its largest value keeps the prior. NumPy and SciPy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import logsumexp, ndtr, stdtrit

STRENGTHS = (math.inf, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)
"""Strengths of the penalty that are tried; an infinite one keeps the prior."""
_SCALES = (0.05, 20.0)
"""How much a prior score may weigh, in units of the spread of its scores."""
_STOP = {"maxiter": 500, "ftol": 1e-6, "gtol": 1e-5}


@dataclass(frozen=True)
class Choice:
    """One decision of an example: rows of its table that compete, and which of them are right."""

    rows: tuple[int, ...]
    right: tuple[bool, ...]


class Choices:
    """Choices of many examples, ready for arithmetic: every example counts the same.

    Args:
        examples: The choices of each example, whose rows count through all examples.
    """

    def __init__(self, examples: Sequence[Sequence[Choice]]) -> None:
        flat = [c for choices in examples for c in choices]
        width = max((len(c.rows) for c in flat), default=0)
        self.count = len(examples)
        self.rows = np.zeros((len(flat), width), int)
        self.real = np.zeros((len(flat), width), bool)
        self.right = np.zeros((len(flat), width), bool)
        for i, c in enumerate(flat):
            self.rows[i, : len(c.rows)], self.real[i, : len(c.rows)], self.right[i, : len(c.rows)] = (
                c.rows,
                True,
                c.right,
            )
        self.example = np.repeat(np.arange(len(examples)), [len(choices) for choices in examples])
        self.share = 1 / np.bincount(self.example, minlength=len(examples))[self.example]

    def losses(self, scores: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " examples"]:
        """The mean softmax loss over each example's choices."""
        each, _ = self._softmax(scores)
        return np.bincount(self.example, each * self.share, self.count)

    def loss_and_gradient(self, scores: Float[np.ndarray, " rows"]) -> tuple[float, Float[np.ndarray, " rows"]]:
        """The mean of :meth:`losses`, and its gradient."""
        each, pull = self._softmax(scores)
        share = self.share / self.count
        return float(each @ share), np.bincount(self.rows.ravel(), (pull * share[:, None]).ravel(), len(scores))

    def _softmax(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each choice its loss, and of each of its candidates the gradient."""
        logits = np.where(self.real, scores[self.rows], -np.inf)
        top = np.where(self.right, logits, -np.inf).max(1, keepdims=True)
        # of all and of the right ones, each by its own largest: the sum of the right ones must not vanish
        best = logits.max(1, keepdims=True)
        odds, right = np.exp(logits - best), np.where(self.right, np.exp(np.minimum(logits - top, 0)), 0.0)
        total, own = odds.sum(1, keepdims=True), right.sum(1, keepdims=True)
        loss = (best + np.log(total) - top - np.log(own))[:, 0]
        return loss, odds / total - right / own

    def spread(self, features: np.ndarray) -> np.ndarray:
        """How far the candidates of a choice lie apart: the standard deviation from the mean of their choice.

        Args:
            features: (rows, ...) => the same without rows.
        """
        total = np.zeros(features.shape[1:])
        for width in np.unique(self.real.sum(1)):  # choices of so many candidates at once
            own = features[self.rows[self.real.sum(1) == width][:, :width]]
            total += ((own - own.mean(1, keepdims=True)) ** 2).sum((0, 1))
        spread = np.sqrt(total / max(1, self.real.sum()))
        return np.where(spread > 1e-9, spread, 1.0)  # what never differs has no say

    def best_scale(self, scores: Float[np.ndarray, " rows"]) -> float:
        """What to multiply scores by so that differences are log-odds: one number, so a grid finds it."""
        scales = np.geomspace(*_SCALES, 40) / float(self.spread(scores))
        return float(min(scales, key=lambda s: float(self.losses(s * scores).mean())))

    def confidence(self, scores: Float[np.ndarray, " rows"]) -> tuple[np.ndarray, np.ndarray]:
        """Of each choice, the probability of its best candidate, and whether that is right (ties share)."""
        logits = np.where(self.real, scores[self.rows], -np.inf)
        best = logits == logits.max(1, keepdims=True)
        return np.exp(logits.max(1) - logsumexp(logits, 1)), (best & self.right).sum(1) / best.sum(1)


class _Problem:
    """Features in units of their spread, and what is minimised over them."""

    def __init__(
        self, features: Float[np.ndarray, "rows d"], choices: Choices, prior: Float[np.ndarray, "p d"]
    ) -> None:
        self.choices = choices
        self.scale = choices.spread(features)
        known = features @ prior.T
        self.prior = prior / choices.spread(known)[:, None]
        self.columns = np.concatenate([features @ self.prior.T, features / self.scale], 1)
        self.free = len(prior)

    def solve(self, strength: float, start: np.ndarray | None) -> np.ndarray:
        """Scales of the priors, then standardised weights: the minimum, by L-BFGS."""
        size = self.columns.shape[1]
        used = self.free if math.isinf(strength) else size
        penalty = np.zeros(used) if math.isinf(strength) else np.repeat([0.0, strength], [self.free, size - self.free])
        columns = self.columns[:, :used]

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            scores = columns @ x
            value, gradient = self.choices.loss_and_gradient(scores)
            return value + 0.5 * float((penalty * x * x).sum()), columns.T @ gradient + penalty * x

        first = np.repeat([1.0, 0.0], [self.free, size - self.free]) if start is None else start
        bounds = [_SCALES] * self.free + [(None, None)] * (used - self.free)
        found = minimize(loss, first[:used], jac=True, method="L-BFGS-B", bounds=bounds, options=_STOP)
        return np.concatenate([found.x, np.zeros(size - used)])

    def weights(self, x: np.ndarray) -> np.ndarray:
        """Solution => weights of the features as they are."""
        out: np.ndarray = x[: self.free] @ self.prior + x[self.free :] / self.scale
        return out


@dataclass(frozen=True)
class Fitted:
    """What cross-validation chose, and how it fares on examples that it was not fitted on.

    Attributes:
        weights: (d,), fitted on all examples.
        strength: Of the penalty; infinite if the prior was kept.
        scores: (rows,) out of fold.
        before, after: (examples,) out-of-fold losses of the prior and of the choice.
        losses: Mean out-of-fold loss of each strength tried.
    """

    weights: np.ndarray
    strength: float
    scores: np.ndarray
    before: np.ndarray
    after: np.ndarray
    losses: dict[float, float]


def fit_weights(
    train: Float[np.ndarray, "rows d"],
    features: Float[np.ndarray, "rows d"],
    learn: Sequence[Sequence[Choice]],
    judge: Sequence[Sequence[Choice]],
    prior: Float[np.ndarray, "p d"],
    folds: Sequence[int],
) -> Fitted:
    """Fits weights and chooses their regularisation.

    Args:
        train: Features to learn on, averaged over noise.
        features: Features as the score will see them.
        learn: Each example's choices to learn from.
        judge: Each example's choices to judge by.
        prior: Weights of scores to start from.
        folds: Of each example, the fold in which it is held out.
    """
    scores = {s: np.zeros(len(features)) for s in STRENGTHS}
    for fold in sorted(set(folds)):
        inside = [c for c, f in zip(learn, folds, strict=True) if f != fold]
        rows = sorted({r for c, f in zip(judge, folds, strict=True) if f == fold for one in c for r in one.rows})
        for strength, weights in _path(train, Choices(inside), prior).items():
            scores[strength][rows] = features[rows] @ weights
    judged = Choices(judge)
    losses = {s: judged.losses(found) for s, found in scores.items()}
    strength = choose(losses)
    weights = _path(train, Choices(learn), prior, strength)[strength]
    means = {s: float(found.mean()) for s, found in losses.items()}
    return Fitted(weights, strength, scores[strength], losses[math.inf], losses[strength], means)


def _path(train: np.ndarray, choices: Choices, prior: np.ndarray, last: float = 0) -> dict[float, np.ndarray]:
    """Weights at each strength down to ``last``, from the strongest on, each solution the start of the next."""
    problem = _Problem(train, choices, prior)
    found, x = {}, None
    for strength in (s for s in STRENGTHS if s >= last):
        x = problem.solve(strength, x)
        found[strength] = problem.weights(x)
    return found


def choose(losses: dict[float, np.ndarray]) -> float:
    """The strongest penalty that is within one standard error of the best, by the losses (examples,) of each.

    The prior, which comes first, is left only for what is better beyond doubt: by two standard errors, for one alone
    would let a handful of examples do harm.
    """
    best: float = min(losses, key=lambda s: float(losses[s].mean()))
    prior: float = next(iter(losses))
    if not better(losses[best], losses[prior], 2):
        return prior
    return next(s for s in losses if not better(losses[best], losses[s], 1))


def better(a: np.ndarray, b: np.ndarray, errors: float) -> bool:
    """Whether losses ``a`` are below ``b`` by so many standard errors, widened for few examples (Student's t).

    A few that gain alike have no spread, and so seem beyond any doubt: :func:`fewest` have to differ.
    """
    gain = b - a
    if not gain.mean() > 0 or np.count_nonzero(gain) < fewest(errors):
        return False
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    return bool(gain.mean() > error * stdtrit(len(gain) - 1, ndtr(errors)))


def fewest(errors: float) -> int:
    """How many examples :func:`better` needs: as many as a coin would hardly bring up the same side of."""
    return math.ceil(-math.log2(1 - ndtr(errors)))
