"""Metrics against brute force, and against what they should say of a matcher that knows nothing or everything."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.contracts import Example, ManifestError
from dsd.metrics import (
    bootstrap_interval,
    crossed_interval,
    evaluate_scores,
    expected_calibration_error,
    mcnemar,
    outcomes,
    paired_difference,
    paired_separation,
    reliability,
    wins,
)

NAN, INF = np.nan, np.inf
LEVELS = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0, INF, NAN])


def example(images: int, texts: int, *positives: tuple[int, int], tags: tuple[str, ...] = ()) -> Example:
    return Example("e", ("i",) * images, ("t",) * texts, positives or ((0, 0),), tags)


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Scores with many ties and holes, and some positives."""
    images, texts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    scores = np.array([[draw(LEVELS) for _ in range(texts)] for _ in range(images)])
    cell = st.tuples(st.integers(0, images - 1), st.integers(0, texts - 1))
    return scores, tuple(draw(st.sets(cell, min_size=1)))


def brute_choice(scores: list[float], right: list[bool]) -> float:
    """A choice won, with plain loops."""
    best, tied, hits = None, 0, 0
    for score, is_right in zip(scores, right, strict=True):
        if score != score:
            continue
        if best is None or score > best:
            best, tied, hits = score, 0, 0
        if score == best:
            tied += 1
            hits += is_right
    return hits / tied if tied else 0.0


def brute_wins(scores: np.ndarray, positives: tuple[tuple[int, int], ...]) -> list[float]:
    images, texts = scores.shape
    found = []
    for t in range(texts):
        right = [(i, t) in positives for i in range(images)]
        if any(right) and not all(right):
            found.append(brute_choice([scores[i, t] for i in range(images)], right))
    for i in range(images):
        right = [(i, t) in positives for t in range(texts)]
        if any(right) and not all(right):
            found.append(brute_choice([scores[i, t] for t in range(texts)], right))
    return found


@given(tables())
@settings(max_examples=200, deadline=None)
def test_wins_as_plain_loops_have_them(case: tuple[np.ndarray, tuple[tuple[int, int], ...]]) -> None:
    scores, positives = case
    np.testing.assert_allclose(wins(scores, positives), brute_wins(scores, positives))


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_wins_do_not_depend_on_the_order_of_candidates(
    case: tuple[np.ndarray, tuple[tuple[int, int], ...]], random: st.DataObject
) -> None:
    scores, positives = case
    rows = list(range(len(scores)))
    random.shuffle(rows)  # type: ignore[attr-defined]
    moved = [(rows.index(i), t) for i, t in positives]
    np.testing.assert_allclose(sorted(wins(scores[rows], moved)), sorted(wins(scores, positives)))


@pytest.mark.parametrize(
    ("scores", "positives", "expected"),
    [
        ([[2.0, 1.0]], [(0, 0)], [1]),
        ([[1.0, 2.0]], [(0, 0)], [0]),
        ([[1.0, 1.0]], [(0, 0)], [0.5]),
        ([[1.0, 1.0, 1.0, 0.0]], [(0, 0)], [1 / 3]),
        ([[1.0, 1.0, 1.0, 0.0]], [(0, 0), (0, 1)], [2 / 3]),
        ([[0.0, 1.0, 1.0]], [(0, 0)], [0]),
        ([[NAN, -INF]], [(0, 0)], [0]),
        ([[-INF, NAN]], [(0, 0)], [1]),
        ([[NAN, NAN]], [(0, 0)], [0]),
        ([[-INF, -INF]], [(0, 0)], [0.5]),
        ([[1.0], [0.0]], [(0, 0)], [1]),
        ([[1.0]], [(0, 0)], []),
        ([[1.0, 2.0]], [(0, 0), (0, 1)], []),
        ([[2.0, 1.0], [0.0, 0.0]], [(0, 0), (1, 1)], [1, 0, 1, 0.5]),
    ],
)
def test_wins_by_hand(scores: list[list[float]], positives: list[tuple[int, int]], expected: list[float]) -> None:
    np.testing.assert_allclose(wins(np.array(scores), positives), expected)


def test_wins_asks_for_a_matrix() -> None:
    with pytest.raises(ValueError, match="shape"):
        wins(np.zeros(3), [(0, 0)])


def test_accuracy_is_over_examples_not_choices() -> None:
    examples = [example(2, 1), example(2, 2, (0, 0), (1, 1))]
    found = evaluate_scores(examples, [np.array([[1.0], [0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])])
    assert found["metrics"]["accuracy"]["value"] == 0.5
    assert found["metrics"]["accuracy"]["n"] == 2


def test_examples_without_a_choice_are_left_out() -> None:
    examples = [example(1, 1, tags=("single",)), example(2, 1, tags=("pair",))]
    scores = [np.zeros((1, 1)), np.array([[1.0], [0.0]])]
    found = evaluate_scores(examples, scores)
    assert found["metrics"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert set(found["by_tag"]) == {"pair"}
    np.testing.assert_array_equal(outcomes(examples, scores), [NAN, 1.0])
    with pytest.raises(ManifestError, match="without a choice"):
        evaluate_scores(examples[:1], scores[:1])
    with pytest.raises(ManifestError, match="0 examples"):
        evaluate_scores([], [])


def test_scores_must_fit_the_examples() -> None:
    with pytest.raises(ValueError, match="one an example"):
        evaluate_scores([example(2, 1)], [])
    with pytest.raises(ValueError, match=r"expected \(2, 1\)"):
        evaluate_scores([example(2, 1)], [np.zeros((1, 2))])


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[2.0, 1.0], [0.0, 3.0]], 1, 1),
        ([[2.0, 1.0], [5.0, 6.0]], 1, 0),
        ([[2.0, 5.0], [1.0, 6.0]], 0, 1),
        ([[1.0, 2.0], [2.0, 1.0]], 0, 0),
        ([[1.0, 1.0], [0.0, 2.0]], 0, 1),
        ([[1.0, 0.0], [1.0, 2.0]], 1, 0),
        ([[1.0, 1.0], [1.0, 1.0]], 0, 0),
        ([[1.0, NAN], [NAN, 1.0]], 1, 1),
        ([[NAN, 0.0], [0.0, 1.0]], 0, 0),
    ],
)
def test_winoground_scores_are_strict(scores: list[list[float]], text: int, image: int) -> None:
    metrics = evaluate_scores([example(2, 2, (1, 1), (0, 0))], [np.array(scores)])["metrics"]
    assert [metrics[name]["value"] for name in ("text", "image", "group")] == [text, image, text * image]


def test_winoground_scores_are_for_its_groups_only() -> None:
    metrics = evaluate_scores([example(2, 2, (0, 1), (1, 0)), example(2, 2)], [np.zeros((2, 2))] * 2)["metrics"]
    assert set(metrics) == {"accuracy", "roc-auc"}


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=3, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_ranks_as_all_orders_of_the_tied_have_them(scores: list[float], data: st.DataObject) -> None:
    n = len(scores)
    right = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    reciprocal, first, fifth, places = [], [], [], []
    for order in permutations(range(n)):
        ranked = sorted((i for i in order if scores[i] == scores[i]), key=lambda i: -scores[i])
        rank = next((r for r, i in enumerate(ranked, 1) if i in right), None)
        reciprocal.append(1 / rank if rank else 0.0)
        first.append(rank == 1)
        fifth.append(rank is not None and rank <= 5)
        places.append(rank or n)
    metrics = evaluate_scores([example(1, n, *((0, i) for i in right))], [np.array([scores])], resamples=1)["metrics"]
    assert metrics["mrr"]["value"] == pytest.approx(np.mean(reciprocal))
    assert metrics["recall@1"]["value"] == pytest.approx(np.mean(first))
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean(first))
    assert metrics["mean-rank"]["value"] == pytest.approx(np.mean(places))
    if n > 5:
        assert metrics["recall@5"]["value"] == pytest.approx(np.mean(fifth))
    else:
        assert "recall@5" not in metrics


def test_ranks_need_more_than_two_candidates() -> None:
    assert "mrr" not in evaluate_scores([example(2, 1)], [np.zeros((2, 1))])["metrics"]
    assert "mrr" in evaluate_scores([example(3, 1)], [np.zeros((3, 1))])["metrics"]
    assert "mrr" not in evaluate_scores([example(3, 2)], [np.zeros((3, 2))])["metrics"]


def test_ties_and_missing_scores_are_counted() -> None:
    scores = [np.array([[1.0, 1.0, 0.0]]), np.array([[1.0, 0.0, 0.0]]), np.array([[NAN, NAN, 0.0]])]
    found = evaluate_scores([example(1, 3)] * 3, scores)
    assert (found["ties"], found["nans"]) == (1, 2)


# Sets


def brute_first(scores: list[float], right: list[bool]) -> list[float]:
    """How probable each rank is for the first right candidate: exact, by counting how ties can fall."""
    hits = [s for s, is_right in zip(scores, right, strict=True) if is_right and s == s]
    chances = [0.0] * len(scores)
    if hits:
        best = max(hits)
        above = sum(s > best for s in scores if s == s)
        tied = sum(s == best for s in scores)
        among = sum(s == best for s in hits)
        for place in range(tied - among + 1):
            chances[above + place] = comb(tied - place - 1, among - 1) / comb(tied, among)
    return chances


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_retrieval_over_a_set_as_plain_loops_have_it(data: st.DataObject) -> None:
    images, captions = data.draw(st.integers(3, 7)), data.draw(st.integers(1, 3))
    level = st.sampled_from([-INF, 0.0, 1.0, 2.0, 3.0, NAN])
    scores = np.array([[data.draw(level) for _ in range(images * captions)] for _ in range(images)])
    positives = tuple((t // captions, t) for t in range(images * captions))
    metrics = evaluate_scores([example(images, images * captions, *positives)], [scores], resamples=5)["metrics"]
    for name, lines, rights in (
        ("text", scores, [[t // captions == i for t in range(images * captions)] for i in range(images)]),
        ("image", scores.T, [[t // captions == i for i in range(images)] for t in range(images * captions)]),
    ):
        firsts = [brute_first(list(line), right) for line, right in zip(lines, rights, strict=True)]
        k = len(firsts[0])
        expected = {f"recall@{n}": [sum(first[:n]) for first in firsts] for n in (1, 5, 10) if n == 1 or k > n}
        expected["mrr"] = [sum(p / rank for rank, p in enumerate(first, 1)) for first in firsts]
        expected["mean-rank"] = [sum(p * r for r, p in enumerate(f, 1)) if any(f) else float(k) for f in firsts]
        for metric, values in expected.items():
            assert metrics[f"{name}-{metric}"]["value"] == pytest.approx(np.mean(values))
            assert metrics[f"{name}-{metric}"]["n"] == len(firsts)
        assert ("recall@10" in expected) == (f"{name}-recall@10" in metrics)
    assert metrics["accuracy"]["value"] == pytest.approx(np.mean(brute_wins(scores, positives)))
    assert metrics["accuracy"]["n"] == images * (captions + 1)


def test_the_interval_of_a_set_is_over_its_choices_and_of_sets_over_these() -> None:
    scores = np.eye(4)
    scores[0, 0] = -1  # one of four is not found
    one = Example("one", ("i",) * 4, ("t",) * 4, tuple((k, k) for k in range(4)), ("all",))
    alone = evaluate_scores([one], [scores])
    assert alone["metrics"]["text-recall@1"]["low"] < alone["metrics"]["text-recall@1"]["high"]
    assert alone["by_tag"]["all"]["accuracy"] == alone["metrics"]["accuracy"]
    two = evaluate_scores([one, one], [scores, scores])["metrics"]
    assert two["text-recall@1"]["n"] == 2
    assert two["text-recall@1"]["value"] == two["text-recall@1"]["low"] == alone["metrics"]["text-recall@1"]["value"]


# Credits, separation, calibration


@given(st.lists(LEVELS, min_size=2, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_soft_accuracy_as_plain_loops_have_it(scores: list[float], data: st.DataObject) -> None:
    worth = [data.draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])) for _ in scores]
    real = [s for s in scores if s == s]
    best = [w for s, w in zip(scores, worth, strict=True) if real and s == max(real)]
    expected = sum(best) / len(best) if best else 0.0
    asked = example(1, len(scores))
    credits: list[np.ndarray | None] = [np.array([worth]), None]
    found = evaluate_scores([asked, asked], [np.array([scores])] * 2, credits=credits, resamples=1)
    assert found["metrics"]["soft-accuracy"]["value"] == pytest.approx(expected)
    assert found["metrics"]["soft-accuracy"]["n"] == 1


def test_soft_accuracy_counts_questions_whose_answers_are_all_right() -> None:
    """Of a yes-no question that people answered half and half, both answers are worth all that one can be."""
    both = Example("both", (0,), ("no", "yes"), ((0, 0), (0, 1)))  # type: ignore[arg-type]
    one = replace(both, id="one", positives=((0, 1),))
    scores = [np.array([[0.0, 1.0]])] * 3
    credits: list[np.ndarray | None] = [np.array([worth]) for worth in ([1.0, 1.0], [1.0, 0.3], [0.0, 1.0])]
    right = [both, replace(both, id="less", positives=((0, 0),)), one]
    found = evaluate_scores(right, scores, credits=credits, resamples=1)["metrics"]
    assert (found["soft-accuracy"]["n"], found["accuracy"]["n"]) == (3, 2)
    assert found["soft-accuracy"]["value"] == pytest.approx((1 + 0.3 + 1) / 3)


def test_credits_must_fit() -> None:
    with pytest.raises(ValueError, match="credits of shape"):
        evaluate_scores([example(1, 2)], [np.zeros((1, 2))], credits=[np.zeros(2)])


def brute_separation(tables: list[np.ndarray], positives: list[Any]) -> float:
    pairs = [
        (score, (i, t) in right)
        for table, right in zip(tables, positives, strict=True)
        for i, row in enumerate(table)
        for t, score in enumerate(row)
    ]
    won = [
        0.0 if a != a else 1.0 if b != b or a > b else 0.5 * (a == b)
        for a, is_right in pairs
        for b, other in pairs
        if is_right and not other
    ]
    return sum(won) / len(won)


@given(st.lists(tables(), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_separation_as_plain_loops_have_it(cases: list[tuple[np.ndarray, tuple[tuple[int, int], ...]]]) -> None:
    cases = [*cases, (np.array([[1.0, 0.0]]), ((0, 0),))]
    examples = [example(*scores.shape, *right) for scores, right in cases]
    metric = evaluate_scores(examples, [scores for scores, _ in cases], resamples=20)["metrics"]["roc-auc"]
    assert metric["value"] == pytest.approx(brute_separation(*map(list, zip(*cases, strict=True))))
    assert 0 <= metric["low"] <= metric["high"] <= 1
    assert metric["n"] == len(cases)


def test_the_interval_of_separation_is_that_of_resampling_examples() -> None:
    rng = np.random.default_rng(20)
    asked = example(1, 3)
    tables = [np.array([[0.7, 0, 0]]) + rng.normal(size=(1, 3)) + rng.normal() for _ in range(40)]
    metric = evaluate_scores([asked] * 40, tables)["metrics"]["roc-auc"]
    drawn = [brute_separation([tables[i] for i in rng.integers(0, 40, 40)], [asked.positives] * 40) for _ in range(200)]
    np.testing.assert_allclose([metric["low"], metric["high"]], np.percentile(drawn, [2.5, 97.5]), atol=0.04)
    other = [table + 0.3 * rng.normal(size=(1, 3)) for table in tables]
    paired = paired_separation(tables, other, [asked.positives] * 40)
    apart = evaluate_scores([asked] * 40, other)["metrics"]["roc-auc"]
    assert paired["value"] == pytest.approx(metric["value"] - apart["value"])
    assert paired["high"] - paired["low"] < metric["high"] - metric["low"]
    same = paired_separation(tables, tables, [asked.positives] * 40)
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_many_pairs_are_resampled_less_often_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(21)
    examples, tables = [example(1, 3)] * 50, list(rng.normal(size=(50, 1, 3)))
    whole = evaluate_scores(examples, tables)["metrics"]["roc-auc"]
    monkeypatch.setattr("dsd.metrics._CELLS", 1000)
    assert evaluate_scores(examples, tables)["metrics"]["roc-auc"] == pytest.approx(whole, abs=0.02)
    monkeypatch.setattr("dsd.metrics._WORK", 1000)
    assert evaluate_scores(examples, tables)["metrics"]["roc-auc"] == pytest.approx(whole, abs=0.05)


@given(st.lists(tables(), min_size=1, max_size=5), st.sampled_from([0.5, 3.0]))
@settings(max_examples=100, deadline=None)
def test_calibration_as_plain_loops_have_it(
    cases: list[tuple[np.ndarray, tuple[tuple[int, int], ...]]], scale: float
) -> None:
    cases = [*cases, (np.array([[1.0, 0.0]]), ((0, 0),))]
    sure, right = [], []
    for scores, positives in cases:
        lines = [(scores[:, t], [(i, t) in positives for i in range(len(scores))]) for t in range(scores.shape[1])]
        lines += [(row, [(i, t) in positives for t in range(len(row))]) for i, row in enumerate(scores)]
        for line, truth in lines:
            if any(truth) and not all(truth):
                logits = [-INF if s != s else scale * s for s in line]
                top = max(logits)
                sure.append(1 / sum(1.0 if v == top else np.exp(v - top) for v in logits))
                right.append(brute_choice(list(line), truth))
    examples = [example(*scores.shape, *positives) for scores, positives in cases]
    found = evaluate_scores(examples, [scores for scores, _ in cases], scale=scale, resamples=20)["metrics"]["ece"]
    assert found["value"] == pytest.approx(expected_calibration_error(sure, right))
    assert found["n"] == len([wins(*case) for case in cases if len(wins(*case))])


def test_the_interval_of_a_calibration_error_holds_it() -> None:
    rng = np.random.default_rng(22)
    logits = rng.normal(size=(300, 1, 2))
    right = rng.random(300) < 1 / (1 + np.exp(logits[:, 0, 1] - logits[:, 0, 0]))
    examples = [example(1, 2, (0, 0 if is_right else 1)) for is_right in right]
    metric = evaluate_scores(examples, list(logits), scale=1.0)["metrics"]["ece"]
    assert metric["low"] <= metric["value"] <= metric["high"] < 0.15


def test_tags() -> None:
    examples = [example(2, 1, tags=("a", "b")), example(2, 1, tags=("b",)), example(2, 1)]
    scores = [np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]])]
    by_tag = evaluate_scores(examples, scores)["by_tag"]
    assert {tag: (m["accuracy"]["value"], m["accuracy"]["n"]) for tag, m in by_tag.items()} == {
        "a": (1, 1),
        "b": (0.5, 2),
    }
    groups = [example(2, 2, (0, 0), (1, 1), tags=(tag,)) for tag in ("swap", "swap", "other")]
    by_tag = evaluate_scores(groups, [np.eye(2), 1 - np.eye(2), np.eye(2)])["by_tag"]
    assert {tag: (m["group"]["value"], m["text"]["n"]) for tag, m in by_tag.items()} == {
        "swap": (0.5, 2),
        "other": (1, 1),
    }


def test_a_matcher_that_knows_nothing_is_at_chance() -> None:
    rng = np.random.default_rng(3)
    for images, texts, chance in ((2, 1, 1 / 2), (1, 4, 1 / 4), (2, 2, 1 / 2)):
        positives = ((0, 0), (1, 1)) if images == texts else ((0, 0),)
        examples = [example(images, texts, *positives) for _ in range(500)]
        metric = evaluate_scores(examples, list(rng.normal(size=(500, images, texts))))["metrics"]["accuracy"]
        assert metric["low"] < chance < metric["high"]
        constant = evaluate_scores(examples, [np.zeros((images, texts))] * 500)
        assert constant["metrics"]["accuracy"]["value"] == pytest.approx(chance)
        assert constant["ties"] == 500 * len(wins(np.zeros((images, texts)), positives))


def test_random_scores_are_at_chance_on_every_metric() -> None:
    rng = np.random.default_rng(1)

    def check(examples: list[Example], expected: dict[str, float], **options: Any) -> None:
        tables = [rng.normal(size=(len(e.images), len(e.texts))) for e in examples]
        found = evaluate_scores(examples, tables, **options)["metrics"]
        assert set(found) == set(expected)
        for name, chance in expected.items():
            assert found[name]["low"] <= chance <= found[name]["high"], name

    check(
        [example(1, 4)] * 600, {"accuracy": 1 / 4, "mrr": 25 / 48, "recall@1": 1 / 4, "mean-rank": 2.5, "roc-auc": 0.5}
    )
    group = example(2, 2, (0, 0), (1, 1))
    check([group] * 600, {"accuracy": 0.5, "text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "roc-auc": 0.5})
    worth = np.linspace(0, 1, 12)[None]
    ranks = {f"recall@{k}": k / 12 for k in (1, 5, 10)} | {"mrr": sum(1 / r for r in range(1, 13)) / 12}
    check(
        [example(1, 12)] * 600,
        {"accuracy": 1 / 12, "mean-rank": 6.5, "soft-accuracy": 0.5, "roc-auc": 0.5, **ranks},
        credits=[worth] * 600,
    )
    # five captions an image; how probable it is that none of them is among the first k of 200
    rng = np.random.default_rng(2)  # the bootstrap knows no spread where nothing is found, as may well be at rank 1
    whole = example(40, 200, *((t // 5, t) for t in range(200)))
    missed = {k: comb(195, k) / comb(200, k) for k in range(200)}
    check(
        [whole],
        {
            "accuracy": (200 / 40 + 40 * 5 / 200) / 240,  # of 200 choices of images and 40 of texts
            "roc-auc": 0.5,
            **{f"image-recall@{k}": k / 40 for k in (1, 5, 10)},
            "image-mrr": sum(1 / r for r in range(1, 41)) / 40,
            "image-mean-rank": 20.5,
            **{f"text-recall@{k}": 1 - missed[k] for k in (1, 5, 10)},
            "text-mrr": sum((missed[r - 1] - missed.get(r, 0)) / r for r in range(1, 197)),
            "text-mean-rank": 201 / 6,
        },
    )


def test_the_interval_is_that_of_resampling_by_index() -> None:
    values = np.random.default_rng(4).choice([0, 0.5, 1], 60)
    value, low, high = bootstrap_interval(values, 0, 20_000)
    by_index = values[np.random.default_rng(5).integers(0, 60, (20_000, 60))].mean(1)
    assert value == values.mean()
    np.testing.assert_allclose([low, high], np.percentile(by_index, [2.5, 97.5]), atol=0.01)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    intervals = [bootstrap_interval(rng.random(80) < 0.7, seed, 400) for seed in range(300)]
    assert 0.90 <= np.mean([low <= 0.7 <= high for _, low, high in intervals]) <= 0.985


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_the_interval_lies_within_the_values_and_repeats(values: list[float], seed: int) -> None:
    value, low, high = bootstrap_interval(values, seed, 50)
    assert (value, low, high) == bootstrap_interval(values, seed, 50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_many_distinct_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).normal(size=200)
    monkeypatch.setattr("dsd.metrics._CELLS", 1000)
    _, low, high = bootstrap_interval(values, 0, 2000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.15)


@pytest.mark.parametrize("values", [[], [NAN], [INF, 1.0], [[1.0]]])
def test_intervals_of_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(values)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval([1.0], 0, 0)


@pytest.mark.parametrize(("spread", "noise"), [(0.3, 0.1), (0.1, 1.0), (0.0, 1.0)])
def test_the_interval_over_repeats_and_examples_covers_both(spread: float, noise: float) -> None:
    rng = np.random.default_rng(10)
    hits = 0
    for seed in range(200):
        values = spread * rng.normal(size=(8, 1)) + noise * rng.normal(size=(1, 60)) + 0.2 * rng.normal(size=(8, 60))
        value, low, high = crossed_interval(values, seed, 400)
        assert value == pytest.approx(values.mean())
        hits += low <= 0 <= high
    assert hits >= 0.86 * 200


def test_the_interval_over_repeats_that_agree_is_that_over_examples() -> None:
    won = np.random.default_rng(11).random(50) < 0.7
    one = crossed_interval(won[None].astype(float))
    assert crossed_interval(np.tile(won, (3, 1)).astype(float)) == pytest.approx(one)
    assert one == pytest.approx(bootstrap_interval(won.astype(float)), abs=0.03)


def test_the_interval_over_repeats_is_not_too_narrow() -> None:
    """Drawing as many repeats as there are gives the spread with the denominator n, which is a tenth less for five."""
    repeats = np.random.default_rng(0).normal(size=5)
    _, low, high = crossed_interval(np.tile(repeats[:, None], (1, 20)), resamples=20_000)
    expected = 2 * 1.96 * repeats.std(ddof=1) / 5**0.5
    assert high - low == pytest.approx(expected, rel=0.07)


def test_many_examples_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(12).random((3, 40))
    whole = crossed_interval(values, resamples=3000)
    monkeypatch.setattr("dsd.metrics._CELLS", 100)
    assert crossed_interval(values, resamples=3000) == pytest.approx(whole, abs=0.02)


@pytest.mark.parametrize("values", [[], [[]], [1.0], [[1.0, NAN]]])
def test_intervals_over_repeats_of_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="got values"):
        crossed_interval(values)
    with pytest.raises(ValueError, match="resamples"):
        crossed_interval([[1.0]], resamples=0)


def test_paired_difference() -> None:
    rng = np.random.default_rng(8)
    hard = rng.random(400)
    good, poor = (hard < 0.8).astype(float), (hard < 0.7).astype(float)
    found = paired_difference(good, poor)
    assert found["value"] == pytest.approx(good.mean() - poor.mean())
    assert 0 < found["low"] < found["value"] < found["high"]
    # pairing takes the shared difficulty out
    _, low, high = bootstrap_interval(good)
    assert found["high"] - found["low"] < high - low
    assert found["p"] == pytest.approx(1 / 2001)
    back = paired_difference(poor, good)
    assert back["value"] == -found["value"]
    assert paired_difference(good, good) == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    with pytest.raises(ValueError, match="same examples"):
        paired_difference(good, poor[:3])


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_mcnemar_as_counting_all_outcomes_has_it(only_a: int, only_b: int, both: int) -> None:
    n = only_a + only_b
    a = [True] * only_a + [False] * only_b + [True] * both
    b = [False] * only_a + [True] * only_b + [True] * both
    chance = [comb(n, k) / 2**n for k in range(n + 1)]
    tail = sum(chance[: min(only_a, only_b) + 1])
    assert mcnemar(a, b) == {
        "only_a": only_a,
        "only_b": only_b,
        "p": pytest.approx(min(1, 2 * tail)),
        "mid_p": pytest.approx(min(1, 2 * tail - chance[min(only_a, only_b)])),
    }


def test_mcnemar_of_many_and_of_none() -> None:
    assert mcnemar([], []) == {"only_a": 0, "only_b": 0, "p": 1.0, "mid_p": 1.0}
    rng = np.random.default_rng(23)
    a, b = rng.random(200_000) < 0.5, rng.random(200_000) < 0.5
    assert mcnemar(a, b)["p"] > 1e-3
    assert mcnemar(a | (rng.random(200_000) < 0.2), b)["p"] < 1e-100
    with pytest.raises(ValueError, match="same examples"):
        mcnemar([True], [True, False])


def test_p_values_of_equal_methods_are_spread_evenly() -> None:
    rng = np.random.default_rng(9)
    found = [paired_difference(*rng.normal(size=(2, 60)), seed, 300)["p"] for seed in range(300)]
    assert np.mean(np.array(found) < 0.05) < 0.1
    assert 0.4 < np.mean(found) < 0.6


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=60), st.integers(1, 12)
)
@settings(max_examples=200, deadline=None)
def test_reliability_as_plain_loops_have_it(predictions: list[tuple[float, float]], bins: int) -> None:
    expected = []
    for b in range(bins):
        inside = [p for p in predictions if int(p[0] * bins) == b or (b == bins - 1 and p[0] == 1)]
        if inside:
            confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            expected.append({"confidence": confidence, "accuracy": accuracy, "n": len(inside)})
    confidences, hits = zip(*predictions, strict=True)
    found = reliability(confidences, hits, bins)
    assert found == [pytest.approx(b) for b in expected]
    assert sum(b["n"] for b in found) == len(predictions)
    gap = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in expected) / len(predictions)
    assert expected_calibration_error(confidences, hits, bins) == pytest.approx(gap)
    # both have as many bins where none are named
    shown = reliability(confidences, hits)
    gap = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in shown) / len(predictions)
    assert expected_calibration_error(confidences, hits) == pytest.approx(gap)


def test_reliability_by_hand() -> None:
    assert reliability([0.0, 0.05, 0.1, 1.0, 0.95], [0, 1, 1, 1, 0]) == [
        {"confidence": 0.025, "accuracy": 0.5, "n": 2},
        {"confidence": 0.1, "accuracy": 1.0, "n": 1},
        {"confidence": 0.975, "accuracy": 0.5, "n": 2},
    ]
    assert all(type(value) in (int, float) for b in reliability([0.5], [True]) for value in b.values())


@pytest.mark.parametrize(
    ("confidence", "correct", "bins"),
    [
        ([], [], 5),
        ([0.5], [1, 0], 5),
        ([1.5], [1], 5),
        ([-0.1], [1], 5),
        ([NAN], [1], 5),
        ([0.5], [2], 5),
        ([1], [1], 0),
    ],
)
def test_reliability_of_what_is_no_probability(confidence: list[float], correct: list[float], bins: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        reliability(confidence, correct, bins)
