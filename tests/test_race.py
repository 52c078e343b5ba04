"""A race finds who comes first by the whole score, at a price, as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd.backbone import load_backbone
from dsd.baselines import baseline
from dsd.contracts import ImageError, OptionError, choice_of
from dsd.matcher import Matcher
from dsd.race import Budget, Price, Race, Standing, fewest_layers, middle_first, telling_first
from dsd.scorer import Scorer
from dsd.scores import SCORES, ScoreConfig
from dsd.tasks import world_task

EXAMPLES = world_task("comvg", "val", "easy", 6, 0)


def drawn(candidates: int, passes: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Contributions: of each candidate a worth, of each pass something that all share, and noise."""
    rng = np.random.default_rng(seed)
    worth, shared = spread * rng.normal(size=(candidates, 1)), 3 * rng.normal(size=(1, passes))
    return worth + shared + rng.normal(size=(candidates, passes))


def free(passes: int) -> Price:
    return Price((1,) * passes)


def run(table: np.ndarray, budget: Budget, price: Price | None = None) -> Standing:
    race = Race(len(table), price or free(table.shape[1]), budget)
    while (wanted := race.ask()) is not None:
        race.tell(table[np.ix_(*wanted)])
    return race.standing()


# What it promises


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([1e-9, 0.01, 0.3]))
def test_what_is_always_true(candidates: int, passes: int, seed: int, error: float) -> None:
    table = drawn(candidates, passes, seed)
    found = run(table, Budget(error=error))
    assert sorted(found.order) == list(range(candidates))
    assert found.cost == found.passes.sum() <= candidates * passes
    assert found.passes[found.order[0]] == found.passes.max()
    assert np.all(np.diff(found.passes[found.order]) <= 0)  # who was dropped is not above who went on
    assert found.decided
    assert 0 <= found.error <= 1
    whole = found.passes == passes
    assert np.allclose(found.scores[whole], table.mean(1)[whole], atol=1e-5)
    assert np.all(found.low <= found.high)
    assert np.allclose(found.low[whole & (passes > 1)], found.scores[whole & (passes > 1)], atol=1e-4)


def test_without_a_chance_of_error_it_is_the_whole_score() -> None:
    table = drawn(20, 12, 0)
    found = run(table, Budget(error=1e-300))
    assert found.cost == table.size
    assert np.allclose(found.scores, table.mean(1), atol=1e-6)
    assert found.order == np.argsort(-table.mean(1), kind="stable").tolist()


@pytest.mark.parametrize(("candidates", "passes"), [(2, 40), (10, 40), (100, 16)])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_it_errs_no_more_often_than_it_says(candidates: int, passes: int, error: float) -> None:
    wrong, cost, races = 0, 0, 400
    for seed in range(races):
        table = drawn(candidates, passes, seed)
        found = run(table, Budget(error=error))
        wrong += found.order[0] != table.mean(1).argmax()
        cost += found.cost
    # at the rate that is allowed, more than this has a chance of 1 in 1000
    assert wrong <= races * error + 3.1 * np.sqrt(races * error * (1 - error))
    assert cost < 0.7 * races * candidates * passes


def test_its_intervals_hold_the_whole_score() -> None:
    hits = []
    for seed in range(200):
        table = drawn(10, 40, seed)
        race = Race(10, free(40), Budget(error=1e-9))
        for _ in range(5):
            wanted = race.ask()
            assert wanted is not None
            race.tell(table[np.ix_(*wanted)])
        found, whole = race.standing(), table.mean(1)
        hits.append(((found.low <= whole) & (whole <= found.high)).mean())
    assert 0.93 < np.mean(hits) < 0.97


@given(st.integers(2, 60), st.integers(2, 20), st.integers(0, 10**6), st.floats(1, 20), st.booleans())
def test_a_budget_is_never_exceeded(candidates: int, passes: int, seed: int, times: float, half: bool) -> None:
    price = Price(tuple(1 + (half and p % 2) for p in range(passes)))
    budget = int(times * 2 * candidates)
    found = run(drawn(candidates, passes, seed), Budget(passes=budget, error=0.01), price)
    assert found.passes.min() >= 1
    assert found.cost <= budget


def test_a_budget_goes_to_the_best() -> None:
    right, races = 0, 200
    for seed in range(races):
        table = drawn(200, 16, seed, spread=2.0)
        found = run(table, Budget(passes=400))
        right += found.order[0] == table.mean(1).argmax()
        assert found.passes.min() == 1
        assert found.cost <= 400
        assert not found.decided
    even = sum(t[:, :2].mean(1).argmax() == t.mean(1).argmax() for t in (drawn(200, 16, s, 2.0) for s in range(races)))
    assert right > 1.2 * even


def test_what_can_be_afforded_may_run_out() -> None:
    table = drawn(10, 8, 0)
    race = Race(10, free(8), Budget())
    wanted = race.ask(0.0)  # there is always one pass each
    assert wanted is not None
    race.tell(table[np.ix_(*wanted)])
    assert race.ask(1.0) is None
    found = race.standing()
    assert found.cost == 10
    assert not found.decided
    assert found.order == np.argsort(-table[:, wanted[1][0]], kind="stable").tolist()


def test_who_was_dropped_keeps_its_order() -> None:
    table = drawn(40, 20, 3)
    race = Race(40, free(20), Budget(passes=150))
    while (wanted := race.ask()) is not None:
        race.tell(table[np.ix_(*wanted)])
    found = race.standing()
    assert len(set(found.passes.tolist())) > 1
    leader = found.order[0]
    for m in set(found.passes.tolist()):
        group = np.flatnonzero(found.passes == m)
        means = race._seen[group, :m].mean(1)
        assert [int(group[i]) for i in np.argsort(-means, kind="stable")] == [i for i in found.order if i in group]
        assert leader not in group or m == found.passes.max()


def test_budgets_from_text() -> None:
    assert Budget.of(2400) == Budget.of("2400") == Budget(passes=2400)
    assert Budget.of("1.5s") == Budget(seconds=1.5)
    assert Budget.of(Budget(error=0.2)) == Budget(error=0.2)
    assert Budget(passes=3, order=(1, 0)).to_dict() == {"passes": 3, "error": 0.01, "order": [1, 0]}
    for bad in ("", "s", "ten", "1.5", "nans", "-3", "0s", 0):
        with pytest.raises(OptionError, match="budget"):
            Budget.of(bad)
    for error in (0.0, 1.0, float("nan")):
        with pytest.raises(OptionError, match="probability"):
            Budget(error=error)
    with pytest.raises(OptionError, match="one pass for each"):
        Race(10, free(4), Budget(passes=9))
    with pytest.raises(OptionError, match="each of the score's passes"):
        Race(10, free(4), Budget(order=(0, 1, 2)))
    with pytest.raises(OptionError, match="no candidates"):
        Race(0, free(4), Budget())


KINDS = [
    *(ScoreConfig(kind, (200, 600)) for kind in SCORES),
    ScoreConfig("mixture", (200, 600), weights={"attention": 1.0, "denoising": 0.5}),
]


@pytest.mark.parametrize("score", KINDS, ids=lambda s: s.kind)
def test_captions_of_an_image_differ_by_their_own_part_alone(score: ScoreConfig) -> None:
    scorer = Scorer(load_backbone("tiny"), score)
    pairs = [(EXAMPLES[0].images[0], e.texts[0]) for e in EXAMPLES[:3]]
    rows = [(i, p) for i in range(3) for p in range(2)]
    whole = scorer.contributions(pairs, rows).reshape(3, 2)
    own = scorer.contributions(pairs, rows, relative=[True] * 3).reshape(3, 2)
    assert np.allclose(own - own[0], whole - whole[0], atol=1e-5)
    mixed = scorer.contributions(pairs, rows, relative=[False, True, False]).reshape(3, 2)
    assert np.allclose(mixed[[0, 2]], whole[[0, 2]], atol=1e-5)
    assert np.allclose(mixed[1], own[1], atol=1e-5)


# Orders


@given(st.integers(1, 300))
def test_the_middle_comes_first(count: int) -> None:
    order = middle_first(count)
    assert sorted(order) == list(range(count))
    assert count < 3 or count / 4 < order[0] < 3 * count / 4 + 1


@pytest.mark.parametrize("labels", [False, True])
def test_the_most_telling_pass_comes_first(labels: bool) -> None:
    """Of eight passes one is nearly without noise, and one speaks for the wrong candidate."""
    rng = np.random.default_rng(0)
    choices = []
    for _ in range(60):
        worth = np.array([[2.0], [0.0], [0.0]])
        table = worth + rng.normal(size=(3, 8)) * np.array([2, 2, 2, 0.1, 2, 2, 2, 2]) + rng.normal(size=(1, 8))
        table[:, 6] -= 3 * worth[:, 0]
        choices.append(table)
    order = telling_first(choices, [0] * len(choices) if labels else None)
    assert sorted(order) == list(range(8))
    assert order[0] == 3
    assert order[-1] == 6
    for bad in ([], [np.zeros((1, 4))], [np.zeros((2, 4)), np.zeros((2, 5))]):
        with pytest.raises(OptionError, match="two or more candidates"):
            telling_first(bad)


# On a model


@pytest.fixture(scope="module")
def matcher() -> Matcher:
    return Matcher.from_pretrained("tiny", timesteps=(150, 250, 350, 450, 550, 650))


def test_contributions_are_what_scores_are_means_of(matcher: Matcher) -> None:
    pairs = [(EXAMPLES[0].images[0], e.texts[0]) for e in EXAMPLES[:3]]
    rows = [(i, p) for i in range(3) for p in range(6)]
    found = matcher._scorer.contributions(pairs, rows).reshape(3, 6)
    assert np.allclose(found.mean(1), matcher.predict(pairs), atol=1e-5)
    few = [(2, 5), (0, 1), (2, 0)]
    some = matcher._scorer.contributions(pairs, few)
    assert np.allclose(some, [found[i, p] for i, p in few], atol=1e-5)


def test_contributions_of_a_score_with_a_bare_one() -> None:
    bare = ScoreConfig("denoising", (300, 600), seed=3)
    score = ScoreConfig("attention", (200, 400, 500), bare=bare, bare_weight=0.4)
    matcher = Matcher.from_pretrained("tiny", score=score)
    pairs = [(e.images[0], e.texts[0]) for e in EXAMPLES[:2]]
    rows = [(i, p) for i in range(2) for p in range(5)]
    found = matcher._scorer.contributions(pairs, rows).reshape(2, 5)
    assert np.allclose(found.mean(1), matcher.predict(pairs), atol=1e-5)
    assert matcher._scorer.price(1, 2) == Price((1,) * 5)
    assert matcher._scorer.price(2, 1) == Price((1, 1, 1, 2, 2))
    with pytest.raises(OptionError, match="one of either"):
        matcher._scorer.price(2, 2)


@pytest.mark.parametrize("of", ["texts", "images"])
def test_a_ranking_without_error_is_that_of_the_whole_score(matcher: Matcher, of: str) -> None:
    texts, images = [e.texts[0] for e in EXAMPLES], [e.images[0] for e in EXAMPLES]
    query, candidates = (images[0], texts) if of == "texts" else (texts[0], images)
    plain = matcher.rank(query, candidates)
    raced = matcher.rank(query, candidates, budget=Budget(error=1e-300))
    assert [r.index for r in raced] == [r.index for r in plain]
    apart = np.array([r.score for r in raced]) - [r.score for r in plain]
    assert np.allclose(apart, apart[0], atol=1e-5)
    assert of == "texts" or np.allclose(apart, 0, atol=1e-5)
    assert {r.passes for r in raced} == {6}
    assert all(r.interval is not None and r.interval[0] <= r.score + 1e-5 for r in raced)
    assert {(r.interval, r.passes) for r in plain} == {(None, None)}


def test_a_ranking_on_a_budget(matcher: Matcher) -> None:
    image, texts = EXAMPLES[0].images[0], [e.texts[0] for e in EXAMPLES]
    made: list[int] = []
    passes = matcher.backbone.predict_noise

    def counted(noised: object, *rest: object) -> object:
        made.append(len(noised))  # type: ignore[arg-type]
        return passes(noised, *rest)  # type: ignore[arg-type]

    matcher.backbone.predict_noise = counted  # type: ignore[method-assign,assignment]
    try:
        ranked = matcher.rank(image, texts, budget=16)
        assert sum(made) <= 16
        assert len(ranked) == len(texts)
        made.clear()
        standings = list(matcher.race([[(image, t) for t in texts]], "3600s"))
        assert sum(made) == standings[-1][0].cost
        assert [s.cost for (s,) in standings] == sorted({s.cost for (s,) in standings})
        made.clear()
        *_, (last,) = matcher.race([[(image, t) for t in texts]], "0.000001s")
        assert set(last.passes) == {1}
    finally:
        matcher.backbone.predict_noise = passes  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="one pass for each"):
        matcher.rank(image, texts, budget=5)
    images = [e.images[0] for e in EXAMPLES]
    with pytest.raises(OptionError, match="at least 12, one pass for each"):  # and one under the empty caption
        matcher.rank(texts[0], images, budget=11)


def test_choices_side_by_side_are_as_each_by_itself(matcher: Matcher) -> None:
    choices = [e.pairs for e in EXAMPLES]
    budget = Budget(error=0.3)
    *_, together = matcher.race(choices, budget)
    for choice, found in zip(choices, together, strict=True):
        *_, (alone,) = matcher.race([choice], budget)
        assert np.array_equal(alone.passes, found.passes)
        assert np.allclose(alone.scores, found.scores, atol=1e-5)


def test_a_first_stage(matcher: Matcher) -> None:
    texts = sorted((e.texts[0] for e in EXAMPLES), key=len)
    image = EXAMPLES[0].images[0]
    longest = {r.candidate for r in matcher.rank(image, texts, first_stage=baseline("caption-length"), keep=2)}
    shortest_last = baseline("caption-length").predict([(image, t) for t in texts])
    assert longest == {texts[i] for i in np.argsort(-shortest_last, kind="stable")[:2]}
    ranked = matcher.rank(image, texts, first_stage=baseline("caption-length"), keep=2, budget="60s")
    assert {r.candidate for r in ranked} == longest
    assert all(texts[r.index] == r.candidate for r in ranked)
    with pytest.raises(OptionError, match="keep 0"):
        matcher.rank(image, texts, first_stage=baseline("caption-length"), keep=0)


def test_an_order_learned_without_labels(matcher: Matcher) -> None:
    choices = [e.pairs for e in EXAMPLES]
    order = matcher.telling_first(choices)
    assert sorted(order) == list(range(6))
    image, texts = EXAMPLES[0].images[0], [e.texts[0] for e in EXAMPLES]
    assert len(matcher.rank(image, texts, budget=Budget(order=order))) == len(texts)
    assert sorted(matcher.telling_first(choices, [0] * len(choices))) == list(range(6))


@pytest.mark.parametrize("labels", [False, True])
def test_the_fewest_layers_that_choose_as_well_as_all(labels: bool) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 3, 6))
    noise[:, 0, :2] -= 2  # the first two layers are wrong, the third knows, the others add next to nothing
    noise[:, 0, 2] += 40
    right = [0] * 200 if labels else None
    assert fewest_layers(list(noise), right) == 3
    assert fewest_layers(list(noise), right, lost=0.999) == 1
    # what is added decides alone
    assert fewest_layers(list(noise), right, rest=[np.array([1e3, 0, 0])] * 200) == 1
    for bad in ([], [noise[0, :1]], [noise[0], noise[0, :, :2]]):
        with pytest.raises(OptionError, match="two or more"):
            fewest_layers(bad, None)
    with pytest.raises(OptionError, match="share"):
        fewest_layers(list(noise), lost=1.0)


def test_layers_learned_without_labels() -> None:
    matcher = Matcher(load_backbone("tiny", device="cpu"), ScoreConfig("attention", (200, 400)))
    choices = [e.pairs for e in EXAMPLES]
    pairs = [pair for choice in choices for pair in choice]
    layers = matcher.config["layers"]
    np.testing.assert_allclose(matcher._scorer.by_layer(pairs).mean(1), matcher.predict(pairs), atol=1e-5)
    assert list(matcher.telling_layers(choices, lost=0.0)) == layers[: len(matcher.telling_layers(choices, lost=0.0))]
    few = matcher.telling_layers(choices, lost=0.99)
    assert list(few) == layers[:1]
    quick = Matcher(matcher.backbone, ScoreConfig("attention", (200, 400), layers=few))
    np.testing.assert_allclose(quick.predict(pairs), matcher._scorer.by_layer(pairs)[:, 0], atol=1e-5)
    with pytest.raises(OptionError, match="expected attention"):
        Matcher(matcher.backbone, ScoreConfig("denoising", (200,))).telling_layers(choices)


def test_what_is_no_choice(matcher: Matcher) -> None:
    images, texts = EXAMPLES[0].images, [e.texts[0] for e in EXAMPLES]
    with pytest.raises(OptionError, match="one of either"):
        list(matcher.race([[(images[0], texts[0]), (images[1], texts[1])]], 100))
    with pytest.raises(OptionError, match="no candidates"):
        choice_of(images[0], [])
    with pytest.raises(ImageError, match="no image file"):
        choice_of("a cat", ["a dog"])
