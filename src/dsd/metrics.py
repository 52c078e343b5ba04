"""What scores are worth: accuracy, ranks and group scores, each with a bootstrap interval. NumPy only.

A *choice* asks which candidates belong to one text (among two or more images) or to one image (among two or more
texts). Higher scores are better. Ties are never wins: where k candidates share the best score and p of them are
right, the choice counts p/k. NaN is worse than any number, and a NaN candidate never wins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dsd.contracts import Example, ManifestError

Positives = Sequence[tuple[int, int]]

_GROUP = {(0, 0), (1, 1)}
_BINS = 10
"""Of probabilities; for a few hundred predictions, such as few-shot learning has to judge by."""
_CELLS = 4_000_000
"""Most numbers drawn at once in a bootstrap (32 MB)."""


def wins(scores: np.ndarray, positives: Positives) -> np.ndarray:
    """How far each choice of one example is won.

    Args:
        scores: (n_images, n_texts) float.
        positives: (image, text) pairs that match.

    Returns:
        (n_choices,) float in 0..1: image choices in the order of the texts, then text choices in the order of the
        images. Where nothing or everything matches there is no choice.

    Raises:
        ValueError: ``scores`` is no matrix.
    """
    return np.array([_first_hit(row, right)[0] for row, right in _choices(scores, positives)], float)


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
    examples: Sequence[Example], score_matrices: Sequence[np.ndarray], *, seed: int = 0, resamples: int = 2000
) -> dict[str, Any]:
    """Every metric that fits the examples, with 95 % bootstrap intervals over examples.

    - ``accuracy``: mean over examples of the share of choices won. An example without a choice (one image and one
      text, or all pairs matching) says nothing about a ranking and is left out, of ``n`` too.
    - ``text``, ``image``, ``group``: Winoground's, for 2 x 2 examples with positives (0, 0) and (1, 1): the right
      text beats the other for both images, the right image for both texts, both. Strictly: ties are lost.
    - ``mrr``, ``recall@1``, ``recall@5``: for one image among more than two texts or one text among more than two
      images (``recall@5``: more than five), of the first right candidate; expected values under random tie breaks.

    Args:
        examples: n examples.
        score_matrices: For each, (n_images, n_texts) float.
        seed: Of the resampling.
        resamples: Bootstrap samples.

    Returns:
        ``{"metrics": {name: {"value", "low", "high", "n"}}, "by_tag": {tag: {"accuracy": {...}}}, "ties": count}``;
        ``ties`` counts choices whose best score is shared.

    Raises:
        ManifestError: No example holds a choice.
        ValueError: The matrices do not fit the examples.
    """
    shares = outcomes(examples, score_matrices)
    chosen = ~np.isnan(shares)
    if not chosen.any():
        raise ManifestError(
            f"got {len(examples)} examples without a choice, expected images or texts of which only some match; "
            "add candidates that do not match"
        )

    def interval(values: Sequence[float] | np.ndarray) -> dict[str, float | int]:
        value, low, high = bootstrap_interval(values, seed, resamples)
        return {"value": value, "low": low, "high": high, "n": len(values)}

    samples: dict[str, list[float]] = {}
    ties = 0
    for example, scores in zip(examples, score_matrices, strict=True):
        for name, value in _extra(example, scores):
            samples.setdefault(name, []).append(value)
        ties += sum(int(_tied(row)) for row, _ in _choices(scores, example.positives))
    tags = sorted({tag for example in examples for tag in example.tags})
    members = {tag: chosen & np.array([tag in example.tags for example in examples]) for tag in tags}
    return {
        "metrics": {"accuracy": interval(shares[chosen])} | {name: interval(v) for name, v in samples.items()},
        "by_tag": {tag: {"accuracy": interval(shares[of])} for tag, of in members.items() if of.any()},
        "ties": ties,
    }


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
    means = _resampled_means(differences, seed, resamples)
    value = float(differences.mean())
    low, high = np.percentile(means, [2.5, 97.5])
    # the slack takes rounding for a tie, so that equal methods get p = 1
    extreme = np.count_nonzero(np.abs(means - value) >= abs(value) - 1e-12)
    return {"value": value, "low": float(low), "high": float(high), "p": (1 + extreme) / (1 + resamples)}


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


def _choices(scores: np.ndarray, positives: Positives) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Candidates' scores and which of them are right, (k,) float and (k,) bool, for each choice."""
    table = np.asarray(scores, float)
    if table.ndim != 2:
        raise ValueError(f"got scores of shape {table.shape}, expected (n_images, n_texts)")
    right = np.zeros(table.shape, bool)
    for image, text in positives:
        right[image, text] = True
    # a single candidate is either all or nothing too
    for of_text, truth in zip(table.T, right.T, strict=True):
        if truth.any() and not truth.all():
            yield of_text, truth
    for of_image, truth in zip(table, right, strict=True):
        if truth.any() and not truth.all():
            yield of_image, truth


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
    missed = 1.0
    for drawn in range(tied - among + 1):
        ranks[above + drawn] = missed * among / (tied - drawn)
        missed *= 1 - among / (tied - drawn)
    return ranks


def _beats(a: float, b: float) -> bool:
    return a > b or bool(np.isnan(b) and not np.isnan(a))


def _extra(example: Example, scores: np.ndarray) -> Iterator[tuple[str, float]]:
    """The metrics of one example besides its accuracy."""
    n_images, n_texts = scores.shape
    if (n_images, n_texts) == (2, 2) and set(example.positives) == _GROUP:
        (s00, s01), (s10, s11) = scores
        text = _beats(s00, s01) and _beats(s11, s10)
        image = _beats(s00, s10) and _beats(s11, s01)
        yield from (("text", float(text)), ("image", float(image)), ("group", float(text and image)))
    if min(n_images, n_texts) == 1 and max(n_images, n_texts) > 2:
        for row, right in _choices(scores, example.positives):
            first = _first_hit(row, right)
            yield "mrr", float((first / np.arange(1, len(first) + 1)).sum())
            yield "recall@1", float(first[0])
            if len(first) > 5:
                yield "recall@5", float(first[:5].sum())


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
