"""What scores are worth: accuracy, ranks, group scores, calibration, with bootstrap intervals. NumPy and SciPy only.

A *choice* asks which candidates belong to one text (among two or more images) or to one image (among two or more
texts). Higher scores are better. Ties are never wins: where k candidates share the best score and p of them are
right, the choice counts p/k. NaN is worse than any number, and a NaN candidate never wins.

A *set* is an example of more than two images and more than two texts, such as all those of a retrieval benchmark.
Intervals are over examples, or over the choices of a set that is the only example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.special import bdtr

from dsd.contracts import Example, ManifestError

Positives = Sequence[tuple[int, int]]

_GROUP = {(0, 0), (1, 1)}
_RECALLS = (1, 5, 10)
_BINS = 10
"""Of probabilities; for a few hundred predictions, such as few-shot learning has to judge by."""
_CELLS = 4_000_000
"""Most numbers drawn at once in a bootstrap (32 MB)."""
_WORK = 100_000_000
"""Most pairs times bootstrap samples for which a statistic of pairs is computed (seconds)."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Candidates for one text or one image.

    Attributes:
        kind: What is chosen, ``image`` or ``text``.
        given: The index of the text that images are chosen for, or of the image that texts are.
        scores: Of the candidates, (k,) float.
        right: Which of them are, (k,) bool.
    """

    kind: str
    given: int
    scores: np.ndarray
    right: np.ndarray


def choices(scores: np.ndarray, positives: Positives) -> Iterator[Choice]:
    """The choices of one example: those of images in the order of the texts, then those of texts in that of the images.

    Arguments and errors are those of :func:`wins`. Where nothing or everything matches there is no choice.
    """
    table, right = np.asarray(scores, float), _truth(scores, positives)
    # a single candidate is either all or nothing too
    for kind, lines, truths in (("image", table.T, right.T), ("text", table, right)):
        for i, (line, truth) in enumerate(zip(lines, truths, strict=True)):
            if truth.any() and not truth.all():
                yield Choice(kind, i, line, truth)


def wins(scores: np.ndarray, positives: Positives) -> np.ndarray:
    """How far each choice of one example is won.

    Args:
        scores: (n_images, n_texts) float.
        positives: (image, text) pairs that match.

    Returns:
        (n_choices,) float in 0..1, in the order of :func:`choices`.

    Raises:
        ValueError: ``scores`` is no matrix.
    """
    return np.array([_first_hit(c.scores, c.right)[0] for c in choices(scores, positives)], float)


def outcomes(examples: Sequence[Example], score_matrices: Sequence[np.ndarray]) -> np.ndarray:
    """The share of choices won in each example: (n,) float in 0..1, NaN where an example holds no choice.

    Two methods on the same examples are compared by passing both to :func:`paired_difference`.
    """
    _check(examples, score_matrices)
    shares = np.full(len(examples), np.nan)
    for i, (example, scores) in enumerate(zip(examples, score_matrices, strict=True)):
        won = wins(scores, example.positives)
        if won.size:
            shares[i] = won.mean()
    return shares


def evaluate_scores(
    examples: Sequence[Example],
    score_matrices: Sequence[np.ndarray],
    *,
    credits: Sequence[np.ndarray | None] | None = None,
    scale: float | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Every metric that fits the examples, with 95 % bootstrap intervals.

    - ``accuracy``: mean over examples of the share of choices won. An example without a choice (one image and one
      text, or all pairs matching) says nothing about a ranking and is left out, of ``n`` too.
    - ``text``, ``image``, ``group``: Winoground's, for 2 x 2 examples with positives (0, 0) and (1, 1): the right
      text beats the other for both images, the right image for both texts, both. Strictly: ties are lost.
    - ``recall@1``, ``recall@5``, ``recall@10``, ``mrr``, ``mean-rank``: for one image among more than two texts or one
      text among more than two images (``recall@5``: more than five, ``recall@10``: more than ten), of the first right
      candidate; expected values under random tie breaks. The rank is 1 or more; where every right candidate is NaN it
      is the last, and the others are 0.
    - ``text-recall@1``, ``image-recall@1`` and so on: the same of a set, of texts for each image and of images for
      each text; captions of the same image are all right.
    - ``soft-accuracy``: the mean credit of the best candidate, where ``credits`` are given; ties share.
    - ``roc-auc``: how probable it is that a matching pair of any example outscores one that does not match (ties half).
    - ``ece``: the expected calibration error of ``softmax(scale * scores)`` over each choice, where ``scale`` is given.

    Args:
        examples: n examples.
        score_matrices: For each, (n_images, n_texts) float.
        credits: For each, (n_images, n_texts) float in 0..1, how right a pair is, such as VQA's share of people who
            gave that answer; None where there is no such thing.
        scale: Turns score differences into log-odds.
        seed: Of the resampling.
        resamples: Bootstrap samples; fewer for ``roc-auc`` of more than 50,000 pairs.

    Returns:
        ``{"metrics": {name: {"value", "low", "high", "n"}}, "by_tag": {tag: {name: {...}}}, "ties": count, "nans":
        count}``; ``n`` counts examples, or the choices of a set that is the only one (for ``roc-auc`` its images).
        ``by_tag`` has the metrics that are means over examples. ``ties`` counts choices whose best score is shared,
        ``nans`` scores that are NaN.

    Raises:
        ManifestError: No example holds a choice.
        ValueError: The matrices do not fit the examples.
    """
    _check(examples, score_matrices)
    positives = [example.positives for example in examples]
    values = samples(score_matrices, positives, credits)
    if "accuracy" not in values:
        raise ManifestError(
            f"got {len(examples)} examples without a choice, expected images or texts of which only some match; "
            "add candidates that do not match"
        )

    def interval(sample: np.ndarray) -> dict[str, float | int]:
        known = sample[~np.isnan(sample)]
        value, low, high = bootstrap_interval(known, seed, resamples)
        return {"value": value, "low": low, "high": high, "n": len(known)}

    statistics: dict[str, _Statistic] = {"roc-auc": _Separation(score_matrices, positives)}
    if scale is not None:
        statistics["ece"] = _Calibration(score_matrices, positives, scale)
    members = tagged([example.tags for example in examples], len(values["accuracy"]))
    lines = [
        choice.scores
        for table, right in zip(score_matrices, positives, strict=True)
        for choice in choices(table, right)
    ]
    return {
        "metrics": {name: interval(sample) for name, sample in values.items()}
        | {name: _interval(statistic, seed, resamples) for name, statistic in statistics.items()},
        "by_tag": {
            tag: {name: interval(sample[of]) for name, sample in values.items() if not np.isnan(sample[of]).all()}
            for tag, of in members.items()
            if not np.isnan(values["accuracy"][of]).all()
        },
        "ties": sum(int(_tied(line)) for line in lines),
        "nans": sum(int(np.isnan(table).sum()) for table in score_matrices),
    }


def samples(
    score_matrices: Sequence[np.ndarray],
    positives: Sequence[Positives],
    credits: Sequence[np.ndarray | None] | None = None,
) -> dict[str, np.ndarray]:
    """What the metrics that are means are means of: by name (n,) float, NaN where a metric says nothing.

    There is one number for each example or, if the only example is a set, for each of its choices. Metrics and
    arguments are those of :func:`evaluate_scores`.
    """
    rows: list[dict[str, float]] = []
    for i, (table, right) in enumerate(zip(score_matrices, positives, strict=True)):
        found = list(_of_choices(table, right, None if credits is None else credits[i]))
        if len(score_matrices) == 1 and _is_set(table):
            rows = found
            break
        names = dict.fromkeys(name for values in found for name in values)
        means = {name: float(np.mean([values[name] for values in found if name in values])) for name in names}
        rows.append(means | _of_group(table, right))
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def tagged(tags: Sequence[Sequence[str]], count: int) -> dict[str, np.ndarray]:
    """Which of ``count`` numbers of :func:`samples` are of each tag, in alphabetical order: (count,) bool.

    Args:
        tags: Of each example.
        count: As many as there are examples; or any number, of a single example.
    """
    owners = range(count) if len(tags) == count else [0] * count
    return {tag: np.array([tag in tags[i] for i in owners]) for tag in sorted({tag for of in tags for tag in of})}


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """The mean of ``values`` (n,) and its 95 % percentile bootstrap interval: (value, low, high).

    Raises:
        ValueError: There are no values, one is not finite, or ``resamples`` is less than 1.
    """
    array = _finite(values)
    low, high = np.percentile(_resampled_means(array, seed, resamples), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def crossed_interval(
    values: Sequence[Sequence[float]] | np.ndarray, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """The mean of outcomes (repeats, examples) and its 95 % bootstrap interval over both: (value, low, high).

    Every repeat sees the same examples, so repeats and examples are drawn anew independently of each other (the
    pigeonhole bootstrap of Owen 2007). One repeat fewer is drawn than there are, or the spread over a few of them would
    be underestimated (Rao and Wu 1988); a single one shows none.

    Raises:
        ValueError: There are no values, one is not finite, or ``resamples`` is less than 1.
    """
    array = np.asarray(values, float)
    if array.ndim != 2:
        raise ValueError(f"got values of shape {array.shape}, expected (repeats, examples)")
    _finite(array.ravel())
    if resamples < 1:
        raise ValueError(f"got {resamples} resamples, expected at least 1")
    repeats, examples = array.shape
    drawn = max(1, repeats - 1)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // examples)
    means = []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        # first, so that they are the same for any number of repeats
        columns = rng.multinomial(examples, np.full(examples, 1 / examples), size=size) / examples
        rows = rng.multinomial(drawn, np.full(repeats, 1 / repeats), size=size) / drawn
        means.append(((rows @ array) * columns).sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000
) -> dict[str, float]:
    """How much better ``a`` is than ``b``, from their outcomes (n,) on the same examples in the same order.

    Returns:
        ``value`` = mean(a) - mean(b), its 95 % interval ``low``, ``high``, and the two-sided ``p`` of no difference:
        how often the resampled differences, moved to mean 0, are as far from 0 (at least 1 / (resamples + 1)).

    Raises:
        ValueError: The lengths differ, there are no values, or one is not finite.
    """
    first, second = _finite(a), _finite(b)
    if first.shape != second.shape:
        raise ValueError(f"got {len(first)} and {len(second)} outcomes, expected the same examples in both")
    differences = first - second
    return _difference(float(differences.mean()), _resampled_means(differences, seed, resamples))


def average_difference(
    pairs: Sequence[tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, float]:
    """:func:`paired_difference`, averaged over several sets of examples that count the same, whatever their sizes.

    Raises:
        ValueError: As there, or there are no sets.
    """
    if not pairs:
        raise ValueError("got no sets of outcomes, expected at least one")
    differences = []
    for a, b in pairs:
        first, second = _finite(a), _finite(b)
        if first.shape != second.shape:
            raise ValueError(f"got {len(first)} and {len(second)} outcomes, expected the same examples in both")
        differences.append(first - second)
    draws = np.mean([_resampled_means(d, seed + k, resamples) for k, d in enumerate(differences)], 0)
    return _difference(float(np.mean([d.mean() for d in differences])), draws)


def paired_separation(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    positives: Sequence[Positives],
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, float]:
    """As :func:`paired_difference`, of ``roc-auc``: ``a`` and ``b`` are scores of the same n examples, each
    (n_images, n_texts) float, which are resampled together."""
    both = [_Separation(tables, positives) for tables in (a, b)]
    first, second = (_resampled(statistic, seed, resamples) for statistic in both)
    return _difference(_of_all(both[0]) - _of_all(both[1]), first - second)


def mcnemar(a: Sequence[bool] | np.ndarray, b: Sequence[bool] | np.ndarray) -> dict[str, float]:
    """McNemar's test of two methods on the same examples, from whether each was right: (n,) bool both.

    Returns:
        ``only_a`` and ``only_b``, the numbers of examples that one alone got right; the two-sided ``p`` of the exact
        binomial test that either is as probable, and ``mid_p``, which counts the outcome itself half: the exact test
        errs on the safe side, this one hardly does (Fagerland et al. 2013).

    Raises:
        ValueError: The lengths differ.
    """
    first, second = np.asarray(a, bool), np.asarray(b, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"got outcomes of shapes {first.shape} and {second.shape}, expected the same examples in both")
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    fewer, n = min(only_a, only_b), only_a + only_b
    below = float(bdtr(fewer - 1, n, 0.5)) if fewer else 0.0
    upto = float(bdtr(fewer, n, 0.5))
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * upto), "mid_p": min(1.0, below + upto)}


def reliability(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray, bins: int = _BINS
) -> list[dict[str, float]]:
    """How often predictions come true that are equally sure: a reliability diagram's bins (Guo et al. 2017).

    Args:
        confidence: (n,) in 0..1, the probability that a prediction is right.
        correct: (n,) in 0..1, whether it is.
        bins: Of equal width; the last holds 1, the others their lower edge.

    Returns:
        Of each bin that is not empty, from the least to the most sure, the means ``confidence`` and ``accuracy`` of its
        predictions, and how many they are, ``n``.

    Raises:
        ValueError: The lengths differ, there are no values, one is outside 0..1, or ``bins`` is less than 1.
    """
    claimed, true = _finite(confidence), _finite(correct)
    if claimed.shape != true.shape or min(claimed.min(), true.min()) < 0 or max(claimed.max(), true.max()) > 1:
        raise ValueError(f"got {len(claimed)} probabilities and {len(true)} hits, expected as many, all in 0..1")
    if bins < 1:
        raise ValueError(f"got {bins} bins, expected at least 1")
    place = np.minimum((claimed * bins).astype(int), bins - 1)
    columns = (np.bincount(place, values, bins) for values in (claimed, true))
    return [
        {"confidence": float(sure / n), "accuracy": float(right / n), "n": int(n)}
        for n, sure, right in zip(np.bincount(place, minlength=bins), *columns, strict=True)
        if n
    ]


def expected_calibration_error(
    confidence: Sequence[float] | np.ndarray, correct: Sequence[float] | np.ndarray, bins: int = _BINS
) -> float:
    """How far probabilities lie from what comes true: the mean over predictions of the gap within their bin.

    Bins, arguments and errors are those of :func:`reliability`.
    """
    found = reliability(confidence, correct, bins)
    return sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in found) / len(confidence)


def _check(examples: Sequence[Example], score_matrices: Sequence[np.ndarray]) -> None:
    if len(examples) != len(score_matrices):
        raise ValueError(f"got {len(score_matrices)} score matrices, expected {len(examples)}, one an example")
    for example, scores in zip(examples, score_matrices, strict=True):
        if np.shape(scores) != (len(example.images), len(example.texts)):
            expected = (len(example.images), len(example.texts))
            raise ValueError(f"example {example.id!r}: got scores of shape {np.shape(scores)}, expected {expected}")


def _truth(scores: np.ndarray, positives: Positives) -> np.ndarray:
    """Which pairs match: (n_images, n_texts) bool."""
    if np.ndim(scores) != 2:
        raise ValueError(f"got scores of shape {np.shape(scores)}, expected (n_images, n_texts)")
    right = np.zeros(np.shape(scores), bool)
    for image, text in positives:
        right[image, text] = True
    return right


def _is_set(scores: np.ndarray) -> bool:
    return all(side > 2 for side in np.shape(scores))


def _tied(scores: np.ndarray) -> bool:
    real = scores[~np.isnan(scores)]
    return real.size > 1 and int(np.count_nonzero(real == real.max())) > 1


def _first_hit(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The chance that the first right candidate stands at each rank, ties broken at random: (k,) float.

    Sums to 1, or is 0 throughout where every right candidate is NaN.
    """
    ranks = np.zeros(len(scores))
    hits = scores[right & ~np.isnan(scores)]
    if not hits.size:
        return ranks
    best = hits.max()
    above, tied = int(np.count_nonzero(scores > best)), int(np.count_nonzero(scores == best))
    among = int(np.count_nonzero(hits == best))
    # drawing the tied ones without replacement
    hit = among / np.arange(tied, among - 1, -1)
    ranks[above : above + len(hit)] = hit * np.cumprod([1.0, *(1 - hit[:-1])])
    return ranks


def _beats(a: float, b: float) -> bool:
    return a > b or bool(np.isnan(b) and not np.isnan(a))


def _of_choices(scores: np.ndarray, positives: Positives, credits: np.ndarray | None) -> Iterator[dict[str, float]]:
    """The metrics of each choice."""
    n_images, n_texts = np.shape(scores)
    ranked = _is_set(scores) or (min(n_images, n_texts) == 1 and max(n_images, n_texts) > 2)
    if credits is not None and np.shape(credits) != (n_images, n_texts):
        raise ValueError(f"got credits of shape {np.shape(credits)}, expected {(n_images, n_texts)} as of the scores")
    worths = [] if credits is None else [choice.scores for choice in choices(credits, positives)]
    if credits is not None and not worths and n_images == 1:  # all answers are right, and worth more or less
        yield {"soft-accuracy": _worth(np.asarray(scores)[0], np.asarray(credits)[0])}
    for i, choice in enumerate(choices(scores, positives)):
        line, first = choice.scores, _first_hit(choice.scores, choice.right)
        values = {"accuracy": float(first[0])}
        if ranked:
            prefix = f"{choice.kind}-" if _is_set(scores) else ""
            places = np.arange(1, len(first) + 1)
            values |= {f"{prefix}recall@{k}": float(first[:k].sum()) for k in _RECALLS if k == 1 or len(first) > k}
            values[f"{prefix}mrr"] = float((first / places).sum())
            values[f"{prefix}mean-rank"] = float((first * places).sum()) if first.any() else float(len(first))
        if worths:
            values["soft-accuracy"] = _worth(line, worths[i])
        yield values


def _worth(line: np.ndarray, credits: np.ndarray) -> float:
    """The credit of the candidate with the highest score, ties broken at random."""
    best = ~np.isnan(line) & (line == np.max(line, initial=-np.inf, where=~np.isnan(line)))
    return float(credits[best].mean()) if best.any() else 0.0


def _of_group(scores: np.ndarray, positives: Positives) -> dict[str, float]:
    """The metrics of a Winoground group; none of another example."""
    if np.shape(scores) != (2, 2) or set(positives) != _GROUP:
        return {}
    (s00, s01), (s10, s11) = scores
    text = _beats(s00, s01) and _beats(s11, s10)
    image = _beats(s00, s10) and _beats(s11, s01)
    return {"text": float(text), "image": float(image), "group": float(text and image)}


class _Statistic(Protocol):
    """A metric that is no mean over examples: how often each of ``units`` counts, (b, units) => its values, (b,)."""

    units: int
    size: int

    def __call__(self, counts: np.ndarray) -> np.ndarray: ...


class _Separation:
    """The area under the ROC curve over all pairs; units are examples, or the images of a set that is the only one.

    A right pair that is NaN loses to every wrong one, and a wrong one to every right one that is a number.
    """

    def __init__(self, score_matrices: Sequence[np.ndarray], positives: Sequence[Positives]) -> None:
        scores = np.concatenate([np.ravel(table) for table in score_matrices]).astype(float)
        right = np.concatenate([_truth(*both).ravel() for both in zip(score_matrices, positives, strict=True)])
        if len(score_matrices) == 1 and _is_set(score_matrices[0]):
            unit = np.repeat(np.arange(len(score_matrices[0])), np.shape(score_matrices[0])[1])
        else:
            unit = np.repeat(np.arange(len(score_matrices)), [np.size(table) for table in score_matrices])
        wrong = scores[~right]
        order = np.lexsort((wrong, ~np.isnan(wrong)))  # NaN first
        missing = int(np.isnan(wrong).sum())
        rivals, mine = wrong[order][missing:], scores[right]
        self.units, self.size = int(unit[-1]) + 1, len(scores)
        self._right, self._wrong = unit[right], unit[~right][order]
        # of the wrong ones in order, how many lie below each right one, and how many not above it
        self._below, self._upto = (
            np.where(np.isnan(mine), 0, missing + np.searchsorted(rivals, mine, side)) for side in ("left", "right")
        )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        beaten = np.pad(np.cumsum(counts[:, self._wrong], 1, float), ((0, 0), (1, 0)))
        weights = counts[:, self._right]
        won = (weights * (beaten[:, self._below] + beaten[:, self._upto])).sum(1) / 2
        with np.errstate(invalid="ignore"):  # a sample may hold no right or no wrong pair
            found: np.ndarray = won / (weights.sum(1) * beaten[:, -1])
        return found


class _Calibration:
    """The expected calibration error over all choices; units are those of :func:`samples` that hold a choice."""

    def __init__(self, score_matrices: Sequence[np.ndarray], positives: Sequence[Positives], scale: float) -> None:
        gaps: list[np.ndarray] = []
        sizes: list[int] = []
        for table, right in zip(score_matrices, positives, strict=True):
            found = [_gap(choice.scores, choice.right, scale) for choice in choices(table, right)]
            if len(score_matrices) == 1 and _is_set(table):
                gaps, sizes = found, [1] * len(found)
            elif found:
                gaps.append(np.sum(found, axis=0))
                sizes.append(len(found))
        self._gaps, self._sizes = np.array(gaps), np.array(sizes)
        self.units = self.size = len(gaps)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.abs(counts @ self._gaps).sum(1) / (counts @ self._sizes)
        return found


def _gap(scores: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """How much surer a choice is than it is right, in the bin of how sure it is: (bins,) float, 0 elsewhere."""
    logits = np.where(np.isnan(scores), -np.inf, scale * scores)
    tied = logits == logits.max()
    sure = 1 / np.exp(np.where(tied, 0, logits - np.where(tied, 0, logits.max()))).sum()
    gap = np.zeros(_BINS)
    gap[min(int(sure * _BINS), _BINS - 1)] = sure - _first_hit(scores, right)[0]
    return gap


def _of_all(statistic: _Statistic) -> float:
    return float(statistic(np.ones((1, statistic.units)))[0])


def _interval(statistic: _Statistic, seed: int, resamples: int) -> dict[str, float | int]:
    value, draws = _of_all(statistic), _resampled(statistic, seed, resamples)
    # what is no mean is biased by resampling, a calibration error upwards, for chance gaps grow
    low, high = np.clip(np.nanpercentile(draws - np.nanmean(draws) + value, [2.5, 97.5]), 0, 1)
    return {"value": value, "low": float(low), "high": float(high), "n": statistic.units}


def _resampled(statistic: _Statistic, seed: int, resamples: int) -> np.ndarray:
    """The statistic of samples drawn from its units with replacement: (b,) float, b at most ``resamples``."""
    resamples = min(resamples, max(200, _WORK // statistic.size))
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // statistic.size)
    share = np.full(statistic.units, 1 / statistic.units)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([statistic(rng.multinomial(statistic.units, share, size=size)) for size in sizes])


def _difference(value: float, draws: np.ndarray) -> dict[str, float]:
    """A difference with what came of resampling it, (b,) float, as :func:`paired_difference` gives it."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    # the slack takes rounding for a tie, so that equal methods get p = 1
    extreme = np.count_nonzero(np.abs(draws - value) >= abs(value) - 1e-12)
    return {"value": value, "low": float(low), "high": float(high), "p": (1 + extreme) / (1 + len(draws))}


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, float)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"got values of shape {array.shape}, expected one or more finite numbers in a row")
    return array


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Means of ``resamples`` samples drawn from ``values`` with replacement: (resamples,) float."""
    if resamples < 1:
        raise ValueError(f"got {resamples} resamples, expected at least 1")
    # how often each distinct value is drawn is multinomial; outcomes have few values, so this is small and exact
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CELLS // len(distinct))
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    draws = [rng.multinomial(len(values), counts / len(values), size=size) @ distinct for size in sizes]
    return np.concatenate(draws) / len(values)
