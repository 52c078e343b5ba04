"""A race among the candidates of one choice: passes go to those that can still come first.

A score is the mean of what its passes contribute (:meth:`dsd.scorer.Scorer.contributions`), and all candidates of a
choice share noise and timesteps, so that after a few passes the differences between candidates say how far the whole
score would set them apart. Those that would hardly come first are dropped, and the budget is spent on the others.

NumPy and SciPy alone: whoever races makes the passes that :meth:`Race.ask` wants, and gives them to :meth:`Race.tell`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from dsd.contracts import OptionError, Pair


@dataclass(frozen=True)
class Budget:
    """What a choice may cost, and how sure it must be.

    Attributes:
        passes: Of the denoiser at most, those under the empty caption counted: among images for a caption there is one
            for each; among captions of an image none, as it is the same for all. At least one a candidate is made.
        seconds: After which no more passes are made. What is reached by then depends on the machine, so that results
            differ from run to run; ``passes`` gives the same each time.
        error: The probability, at most, that the candidate which the whole score would put first is dropped while the
            budget leaves a choice.
        order: Of the score's passes, by number, the most telling first; they are made in this order. None: from the
            middle of the schedule, then ever finer between.
    """

    passes: int | None = None
    seconds: float | None = None
    error: float = 0.01
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.passes is not None and self.passes < 1:
            raise OptionError(f"got a budget of {self.passes} passes, expected 1 or more")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds > 0):
            raise OptionError(f"got a budget of {self.seconds} seconds, expected more than 0")
        if not 0 < self.error < 1:
            raise OptionError(f"got an error of {self.error}, expected a probability above 0 and below 1")

    @classmethod
    def of(cls, given: Budget | int | str) -> Budget:
        """A budget from a number of passes, or from text: ``2400`` passes, ``10s`` for seconds.

        Raises:
            OptionError: If it is neither.
        """
        if isinstance(given, Budget):
            return given
        text = str(given).strip()
        try:
            return cls(seconds=float(text[:-1])) if text.endswith("s") else cls(passes=int(text))
        except ValueError:
            raise OptionError(
                f"got the budget {given!r}, expected a number of passes, such as 2400, or of seconds, such as 10s"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those that are given."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Price:
    """What the passes of a score cost.

    Attributes:
        passes: (passes,) of each pass what it costs a candidate, in passes of the denoiser.
    """

    passes: tuple[int, ...]


@dataclass(frozen=True)
class Standing:
    """Where a race stands.

    Attributes:
        scores: (candidates,) float32, among captions of an image up to a number that all share. Of a candidate with all
            its passes its score; of another an estimate of it: the score of the first, less what lay between the two in
            the passes that both have. In the order of the race: who was dropped is below who went on.
        low, high: (candidates,) float32, 95 % interval of what the whole score would be, up to the same number.
        passes: (candidates,) the passes that each has.
        cost: Passes of the denoiser so far, those under the empty caption counted.
        error: The probability, at most, that another would come first by the whole score; of the normal theory that
            candidates are dropped by.
        decided: Whether the race is over within its error, rather than for want of budget.
    """

    scores: Float[np.ndarray, " candidates"]
    low: Float[np.ndarray, " candidates"]
    high: Float[np.ndarray, " candidates"]
    passes: Int[np.ndarray, " candidates"]
    cost: int
    error: float
    decided: bool

    @property
    def order(self) -> list[int]:
        """Candidates, best first; equal scores keep their order."""
        return [int(i) for i in np.argsort(-self.scores, kind="stable")]


def stepped(scores: Float[np.ndarray, " n"], groups: Iterable[Sequence[int] | np.ndarray]) -> Float[np.ndarray, " n"]:
    """Scores, float32, lowered so that whoever was dropped is below all who went on: each group below the one before.

    All of a group are lowered by as much, so that they keep their order.
    """
    scores = scores.copy()
    below = np.finfo(np.float32).max
    for group in groups:
        excess = max(0.0, float(scores[group].max()) - float(below))
        lowered = (scores[group].astype(np.float64) - excess).astype(np.float32)
        scores[group] = np.minimum(lowered, below)
        below = np.nextafter(scores[group].min(), np.float32(-np.inf))
    return scores


class Race:
    """One choice, pass by pass.

        race = Race(len(candidates), price, Budget(passes=2400))
        while (wanted := race.ask()) is not None:
            race.tell(contributions(*wanted))
        race.standing().order

    Rounds have ever more passes, half as many again each time. After each, candidates are dropped for two reasons:

    - They would hardly come first. Let ``d`` be the mean difference to the leader in ``m`` of ``M`` passes, ``s`` the
      standard deviation of the difference. Were the rest of the passes like these, the difference over all of them
      would be normal around ``d`` with variance ``s^2 (1/m - 1/M)``, the variance of a mean of draws without
      replacement; by Student's t this gives the probability that a candidate is yet to overtake. The least probable
      are dropped for as long as the sum over all that were dropped stays within the error (a union bound; the error is
      given out evenly over the rounds). As few passes say little of ``s``, that of a candidate is drawn to the mean
      over all candidates, as if that had been seen in four passes more.
    - The budget has no passes for them. It is spread over the rounds that are left (successive halving: Karnin et al.
      2013; Jamieson & Talwalkar 2016; a little more to early rounds), and the best so far go on.

    Args:
        candidates: How many.
        price: Of the passes.
        budget: Without passes and seconds, the race goes on until it is decided.

    Raises:
        OptionError: If the budget has not a pass for every candidate, or its order is none of these passes.
    """

    GROWTH = 1.5
    """Passes after a round, to those before it."""
    EARLY = 0.5
    """How much more of a budget early rounds get: by the passes made before, to the power of minus this.

    How far down the best may be after ``m`` passes falls faster than ``1/m``; a round costs in proportion to ``m``.
    """
    LIKE = 4
    """Passes that the mean over all candidates counts as in the variance of one."""

    def __init__(self, candidates: int, price: Price, budget: Budget) -> None:
        total = len(price.passes)
        order = tuple(budget.order or middle_first(total))
        if sorted(order) != list(range(total)):
            raise OptionError(f"got the order {list(order)}, expected each of the score's passes 0 to {total - 1} once")
        if candidates < 1:
            raise OptionError("got no candidates, expected at least one")
        self._order, self._price, self._budget = order, price, budget
        least = self._cost(candidates, 0, 1)
        if budget.passes is not None and budget.passes < least:
            raise OptionError(
                f"got a budget of {budget.passes} passes for {candidates} candidates, expected at least {least}, one "
                "pass for each; give more, or fewer candidates, such as the best of a first stage"
            )
        self._rounds = [1]
        while self._rounds[-1] < total:
            self._rounds.append(min(total, max(self._rounds[-1] + 1, math.ceil(self._rounds[-1] * self.GROWTH))))
        self._seen = np.zeros((candidates, total))  # in the order they were made
        self._passes = np.zeros(candidates, int)
        self._alive = np.arange(candidates)
        self._chances = np.zeros(candidates)  # of those dropped, that they would have come first
        self._round = 0
        self._spent = 0.0
        self._short = False
        self.cost = 0

    @property
    def made(self) -> int:
        """Passes that those who are left have."""
        return self._rounds[self._round - 1] if self._round else 0

    def ask(self, left: float | None = None) -> tuple[list[int], list[int]] | None:
        """Who is to make which passes next: numbers of candidates, and of passes that each of them makes.

        Args:
            left: Passes of the denoiser that can still be afforded, if less than the budget has.

        Returns:
            None once the race is over.
        """
        if self._round == len(self._rounds) or (self._round and len(self._alive) == 1):
            return None
        budget = math.inf if self._budget.passes is None else self._budget.passes - self.cost
        budget = min(budget, math.inf if left is None else left)
        begin, end = self.made, self._rounds[self._round]
        if self._round and budget < math.inf:
            weights = [made**-self.EARLY for made in self._rounds[self._round - 1 : -1]]
            share = budget * weights[0] / sum(weights)
            room = int(share // self._cost(1, begin, end))
            if room < 2:  # no share for a duel: the last passes go to the two best, while there are some
                room = 2 if budget >= self._cost(2, begin, end) else 0
            if room < len(self._alive):
                self._short = True
                if room == 0:
                    return None
                means = self._seen[self._alive, :begin].mean(1)
                ranked = self._alive[np.argsort(-means, kind="stable")]
                self._chances[ranked[room:]] = self._overtaking()[ranked[room:]]
                self._alive = np.sort(ranked[:room])
        return self._alive.tolist(), list(self._order[begin:end])

    def tell(self, contributions: Float[np.ndarray, "candidates passes"]) -> None:
        """Takes the contributions of the passes that were asked for, in that order."""
        begin, end = self.made, self._rounds[self._round]
        self._seen[self._alive, begin:end] = contributions
        self._passes[self._alive] = end
        self.cost += self._cost(len(self._alive), begin, end)
        self._round += 1
        if end < 2 or self._round == len(self._rounds):
            return
        chances = self._overtaking()
        ranked = sorted(self._alive.tolist(), key=lambda i: chances[i])[:-1]
        allowed = self._budget.error * self._round / len(self._rounds) - self._spent
        for i, sum_ in zip(ranked, np.cumsum(chances[ranked]), strict=True):
            if sum_ > allowed:
                break
            self._chances[i] = chances[i]
            self._spent += chances[i]
            self._alive = self._alive[self._alive != i]

    def standing(self) -> Standing:
        """Where it stands; once there was a round."""
        total = len(self._order)
        passes, leader = self._passes, self._leader()
        means = np.array([self._seen[i, :m].mean() for i, m in enumerate(passes)])
        of_leader = np.array([self._seen[leader, :m].mean() for m in passes])
        scores = (means - of_leader + means[leader]).astype(np.float32)
        scores = stepped(scores, [np.flatnonzero(passes == m) for m in sorted(set(passes.tolist()), reverse=True)])
        width = np.full(len(means), np.inf)
        for i, m in enumerate(passes):
            if m > 1:
                spread = self._seen[i, :m].std(ddof=1) * math.sqrt(1 / m - 1 / total)
                width[i] = stats.t.ppf(0.975, m - 1) * spread
        rivals = self._overtaking()
        rivals[leader] = 0.0
        alive = np.isin(np.arange(len(means)), self._alive)
        error = float(min(1.0, np.where(alive, rivals, self._chances).sum()))
        return Standing(
            scores,
            (means - width).astype(np.float32),
            (means + width).astype(np.float32),
            passes.copy(),
            self.cost,
            error,
            (len(self._alive) == 1 or self.made == total) and not self._short,
        )

    def _leader(self) -> int:
        return int(self._alive[np.argmax(self._seen[self._alive, : self.made].mean(1))])

    def _overtaking(self) -> Float[np.ndarray, " candidates"]:
        """Of each that is left the probability that it would come before the leader in all passes; 1 of the leader."""
        m, total = self.made, len(self._order)
        found = np.zeros(len(self._seen))
        leader = self._leader()
        others = self._alive[self._alive != leader]
        found[leader] = 1.0
        if not len(others):
            return found
        apart = self._seen[leader, :m] - self._seen[others, :m]
        mean = apart.mean(1)
        if m == total:
            found[others] = 0.0
        elif m == 1:  # nothing is known of how far passes differ
            found[others] = 0.5
        else:
            variance, known = apart.var(1, ddof=1), m - 1
            if len(others) > 1:
                variance = (self.LIKE * variance.mean() + known * variance) / (self.LIKE + known)
                known += self.LIKE
            width = np.sqrt(variance * (1 / m - 1 / total))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.where(width > 0, mean / width, np.where(mean > 0, np.inf, 0.0))
            found[others] = stats.t.sf(ratio, known)
        return found

    def _cost(self, candidates: int, begin: int, end: int) -> int:
        """Of some candidates' passes."""
        return candidates * sum(self._price.passes[p] for p in self._order[begin:end])


class Contributor(Protocol):
    """Who makes passes, such as a :class:`dsd.scorer.Scorer`."""

    def contributions(
        self,
        pairs: Sequence[Pair],
        rows: Sequence[tuple[int, int]],
        *,
        relative: Sequence[bool] | None = None,
        progress: Any = None,
    ) -> Float[np.ndarray, " rows"]:
        """What single passes add to scores: ``rows`` are numbers of pairs and of passes."""
        ...


def run(
    contributor: Contributor,
    choices: Sequence[Sequence[Pair]],
    prices: Sequence[Price],
    relative: Sequence[bool],
    budget: Budget,
    *,
    progress: Any = None,
) -> Iterator[list[Standing]]:
    """Races all choices side by side, so that their passes share batches.

    Args:
        contributor: Makes the passes.
        choices: Of each its candidates.
        prices: Of each choice.
        relative: Of each choice, whether contributions up to what all captions of an image share will do.
        budget: ``passes`` for each choice, ``seconds`` for all.
        progress: A progress bar that counts passes.

    Yields:
        After each round, where each choice stands; the last are the results.

    Raises:
        OptionError: If the budget has not a pass for every candidate.
    """
    begun, made = time.monotonic(), 0
    races = [Race(len(pairs), price, budget) for pairs, price in zip(choices, prices, strict=True)]
    pairs = [pair for choice in choices for pair in choice]
    leave = [r for choice, r in zip(choices, relative, strict=True) for _ in choice]
    starts = np.cumsum([0, *(len(choice) for choice in choices)])
    while True:
        left = None
        if budget.seconds is not None and made:
            rate = made / (time.monotonic() - begun)
            left = max(0.0, budget.seconds - (time.monotonic() - begun)) * rate / len(races)
        asked = [
            (race, int(start), wanted) for race, start in zip(races, starts, strict=False) if (wanted := race.ask(left))
        ]
        if not asked:
            return
        rows = [(start + i, p) for _, start, (alive, passes) in asked for i in alive for p in passes]
        found = contributor.contributions(pairs, rows, relative=leave, progress=progress)
        done = 0
        for race, _, (alive, passes) in asked:
            count = len(alive) * len(passes)
            race.tell(found[done : done + count].reshape(len(alive), len(passes)))
            done += count
        made = sum(race.cost for race in races)
        yield [race.standing() for race in races]


def middle_first(count: int) -> tuple[int, ...]:
    """0 to ``count - 1`` from the middle, then ever finer between (van der Corput's sequence).

    The middle of a schedule tells most of a caption; its ends are nearly clean, or nearly all noise.
    """
    bits = max(1, (count - 1).bit_length())
    spread = (int(format(k, f"0{bits}b")[::-1], 2) for k in range(1, 2**bits))
    return tuple(dict.fromkeys([*(k * count // 2**bits for k in spread), 0]))


def telling_first(
    contributions: Sequence[Float[np.ndarray, "candidates passes"]], right: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Passes in the order in which the first of them set the right candidate apart best.

    Greedy: the next pass is the one with which the lead of the right candidate over the mean of the others is largest
    in units of its standard deviation over the choices.

    Args:
        contributions: Of each choice, of its candidates (two or more) at every pass.
        right: Of each choice the right candidate. None: the one that all passes together put first, so that no labels
            are needed.

    Raises:
        OptionError: If there are none, or they differ in their passes.
    """
    shapes = {np.shape(c)[1] if np.ndim(c) == 2 and len(c) > 1 else 0 for c in contributions}
    if len(shapes) != 1 or 0 in shapes:
        raise OptionError(
            f"got {len(contributions)} choices with {sorted(shapes)} passes, expected one or more, each of two or more "
            "candidates, with as many passes"
        )
    firsts = [int(np.argmax(np.mean(c, 1))) for c in contributions] if right is None else list(right)
    leads = np.array([c[k] - np.delete(c, k, 0).mean(0) for c, k in zip(contributions, firsts, strict=True)])
    order: list[int] = []
    so_far = np.zeros(len(leads))
    while len(order) < leads.shape[1]:
        rest = [p for p in range(leads.shape[1]) if p not in order]
        sums = so_far[:, None] + leads[:, rest]
        best = rest[int(np.argmax(sums.mean(0) / np.maximum(sums.std(0), 1e-12)))]
        order.append(best)
        so_far += leads[:, best]
    return tuple(order)


def fewest_layers(
    shares: Sequence[Float[np.ndarray, "candidates layers"]],
    right: Sequence[int] | None = None,
    *,
    lost: float = 0.02,
    rest: Sequence[Float[np.ndarray, " candidates"]] | None = None,
) -> int:
    """How many layers, from the first that a pass runs, choose nearly as well as all of them; ties are shared.

    Args:
        shares: Of each choice, what each layer says of its candidates (two or more), in the order in which a pass runs
            them. A score over some layers is the mean of theirs.
        right: Of each choice the right candidate. None: the one that all layers together put first, so that no labels
            are needed.
        lost: Share of the choices, at most, that fewer layers may win less than all.
        rest: Of each choice, what is added to the score whatever the layers.

    Raises:
        OptionError: If there are no choices, they differ in their layers, or ``lost`` is no share.
    """
    shapes = {np.shape(s)[1] if np.ndim(s) == 2 and len(s) > 1 else 0 for s in shares}
    if len(shapes) != 1 or 0 in shapes:
        raise OptionError(
            f"got {len(shares)} choices with {sorted(shapes)} layers, expected one or more, each of two or more "
            "candidates, with as many layers"
        )
    if not 0 <= lost < 1:
        raise OptionError(f"got lost {lost}, expected a share from 0 to below 1")
    (count,) = shapes
    added = [np.zeros(len(s)) for s in shares] if rest is None else rest
    # of each choice the scores of the candidates by every number of layers: (candidates, layers)
    scores = [
        np.cumsum(np.asarray(s, np.float64), 1) / np.arange(1, count + 1) + np.asarray(r, np.float64)[:, None]
        for s, r in zip(shares, added, strict=True)
    ]
    firsts = [int(np.argmax(s[:, -1])) for s in scores] if right is None else list(right)
    won = np.zeros(count)
    for s, first in zip(scores, firsts, strict=True):
        best = s == s.max(0)
        won += best[first] / best.sum(0)
    return int(np.argmax(won >= won[-1] - lost * len(scores))) + 1
