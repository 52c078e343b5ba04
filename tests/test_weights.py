"""Learned weights of features: what they pick, what the solver finds and leaves alone, and that the disk keeps them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from dsd import prompts, weighing
from dsd.adapt import fit
from dsd.adapters import Adapter
from dsd.backbone import Backbone, load_backbone
from dsd.contracts import AdapterError, Example, OptionError
from dsd.jury import DOUBT, FEWEST, Jury
from dsd.learn import HEEDED_BY_WEIGHTS, FitConfig, Learner, choice_loss, importance
from dsd.lesson import choices_of, folds
from dsd.matcher import Matcher
from dsd.metrics import expected_calibration_error, wins
from dsd.scorer import Scorer
from dsd.scores import WEIGHTED, Features, Score, ScoreConfig
from dsd.weights import Choice, Choices, better, choose, fewest, fit_weights
from looks import looks_as
from models import picture, toy

Pipe = Callable[..., str]
TIMESTEPS = (20, 100)
DENOISING = ScoreConfig("denoising", TIMESTEPS)
LEARNED = ScoreConfig(WEIGHTED, TIMESTEPS)
IMAGES = [picture(i) for i in range(3)]
CAPTIONS = ["a red circle left of a dog", "cat", "the dog " * 13]
"""Of one, one and two windows."""
PAIRS = [(image, text) for image in IMAGES for text in CAPTIONS]
WEIGHTS = FitConfig(method="weights", draws=2, folds=4)
QUICK = FitConfig(steps=4, batch=4, check_every=2, jitter=10, negatives=0)


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


def random_weights(backbone: Backbone, seed: int = 0) -> torch.Tensor:
    shape = len(TIMESTEPS), len(Features(backbone).names)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def accuracy(scorer: Scorer, examples: list[Example]) -> float:
    return float(np.mean([wins(scorer.predict(e.pairs).reshape(1, 2), e.positives).mean() for e in examples]))


# The score


@pytest.mark.parametrize("kind", ["denoising", "attention", "attention-mass"])
@pytest.mark.parametrize("layers", [None, ("mid_block", "up_blocks.1")])
def test_weights_that_pick_a_score_give_it(backbone: Backbone, kind: str, layers: Any) -> None:
    expected = Scorer(backbone, ScoreConfig(kind, TIMESTEPS, None if kind == "denoising" else layers)).predict(PAIRS)
    weights = Features(backbone, layers).weights_of({kind: 1.0}).repeat(2, 1)
    found = Scorer(backbone, replace(LEARNED, layers=layers), weights=weights).predict(PAIRS)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5


def test_a_score_is_the_mean_over_timesteps_of_weighted_features(backbone: Backbone) -> None:
    weights = random_weights(backbone)
    scorer = Scorer(backbone, LEARNED, weights=weights)
    features = Features(backbone)
    found = scorer.features(PAIRS, features, 2)
    assert found.shape == (2, len(PAIRS), *weights.shape)
    assert np.abs((found[0] * weights.numpy()).sum(2).mean(1) - scorer.predict(PAIRS)).max() < 1e-4
    assert np.abs(found[0] - found[1]).max() > 1e-2  # another noise
    again = Scorer(backbone, DENOISING, batch_size=2).features(PAIRS[::-1], features, 2)
    assert np.abs(again[:, ::-1] - found).max() < 1e-5


def test_names_follow_the_columns(backbone: Backbone) -> None:
    """A head's columns are those of its layer alone."""
    features = Features(backbone)
    found = Scorer(backbone, DENOISING).features(PAIRS[:2], features)[0]
    layer = features.layers[1]
    chosen = Features(backbone, [layer])
    alone = Scorer(backbone, DENOISING).features(PAIRS[:2], chosen)[0]
    assert len(set(features.names)) == len(features.names) == found.shape[2]
    for name in chosen.names:
        a, b = alone[..., chosen.names.index(name)], found[..., features.names.index(name)]
        assert np.abs(a - b).max() < 1e-5
    assert (found[..., [n.startswith("mass") for n in features.names]] <= 0).all()


def test_pairs_are_scored_each_by_itself(backbone: Backbone) -> None:
    """Large weights, so that a small leak would show."""
    weights = random_weights(backbone)
    together = Scorer(backbone, LEARNED, weights=weights).predict(PAIRS)
    alone = [Scorer(backbone, LEARNED, weights=weights, batch_size=1).predict([pair])[0] for pair in PAIRS]
    assert np.abs(together - alone).max() < 1e-5 * max(1, np.abs(together).max())


def test_weights_differ_by_timestep(backbone: Backbone) -> None:
    weights = random_weights(backbone)
    a = Scorer(backbone, LEARNED, weights=weights).predict(PAIRS[:2])
    b = Scorer(backbone, LEARNED, weights=weights.flip(0)).predict(PAIRS[:2])
    assert np.abs(a - b).min() > 1e-3


def test_half_the_batch_when_memory_runs_out(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(backbone)
    expected = Scorer(backbone, LEARNED, weights=weights).predict(PAIRS)
    predict = backbone.predict_noise

    def limited(noised: Any, *rest: Any) -> Any:
        if len(noised) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return predict(noised, *rest)

    monkeypatch.setattr(backbone, "predict_noise", limited)
    scorer = Scorer(backbone, LEARNED, batch_size=16, weights=weights)
    assert np.abs(scorer.predict(PAIRS) - expected).max() < 1e-4
    assert scorer.batch_size == 2


@pytest.mark.parametrize(
    ("config", "shape", "reason"),
    [
        (LEARNED, None, "without learned weights"),
        (DENOISING, (2, 3), "with learned weights"),
        (LEARNED, (2, 3), "shape"),
        (replace(LEARNED, timesteps=(5,)), "features", "shape"),
        (replace(LEARNED, layers=("mid_block",)), "features", "shape"),
    ],
)
def test_weights_that_do_not_fit(backbone: Backbone, config: ScoreConfig, shape: Any, reason: str) -> None:
    weights = random_weights(backbone) if shape == "features" else None if shape is None else torch.zeros(shape)
    with pytest.raises(OptionError, match=reason):
        Score(backbone, config, weights)


def test_only_sums_of_heads_can_be_weighted(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="got score 'paper'"):
        Features(backbone).weights_of({"paper": 1.0})


# The solver


def planted(count: int, signal: float, seed: int) -> tuple[np.ndarray, list[list[Choice]], list[int]]:
    """Two candidates an example: feature 0 knows a little, feature 1 as much as asked, 18 are noise of all sizes."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2 * count, 20)) * np.geomspace(0.01, 100, 20)
    choices, labels = [], rng.integers(2, size=count)
    for i, right in enumerate(labels):
        features[2 * i + right, 0] += 0.01
        features[2 * i + right, 1] += signal * np.geomspace(0.01, 100, 20)[1]
        choices.append([Choice((2 * i, 2 * i + 1), (right == 0, right == 1))])
    return features, choices, labels.tolist()


def won(features: np.ndarray, labels: list[int], weights: np.ndarray) -> float:
    return float(np.mean((features @ weights).reshape(-1, 2).argmax(1) == labels))


PRIOR = np.eye(20)[:1]


def test_a_planted_signal_is_found() -> None:
    features, choices, _ = planted(200, 3.0, 0)
    fitted = fit_weights(features, features, choices, choices, PRIOR, [i % 5 for i in range(200)])
    fresh, _, labels = planted(2000, 3.0, 1)
    assert math.isfinite(fitted.strength)
    assert fitted.after.mean() < 0.5 * fitted.before.mean()
    assert won(fresh, labels, fitted.weights) > 0.95 > 0.8 > won(fresh, labels, PRIOR[0])
    told = np.abs(fitted.weights) * np.geomspace(0.01, 100, 20)
    assert told[1] > 3 * np.delete(told, [0, 1]).max()


def test_noise_leaves_the_prior_alone() -> None:
    kept = 0
    for seed in range(10):
        features, choices, _ = planted(8, 0.0, seed)
        fitted = fit_weights(features, features, choices, choices, PRIOR, [i % 5 for i in range(8)])
        if math.isinf(fitted.strength):
            kept += 1
            assert np.abs(fitted.weights[1:]).max() == 0
            assert fitted.weights[0] > 0
    assert kept >= 9


def test_labels_by_chance_teach_nothing() -> None:
    """On 2,000 fresh examples, within what a fair coin gives in 9,999 of 10,000 cases."""
    for seed in range(5):
        features, choices, _ = planted(100, 3.0, seed)
        rng = np.random.default_rng(seed)
        shuffled = [[Choice(c.rows, c.right[::-1] if rng.integers(2) else c.right) for c in own] for own in choices]
        fitted = fit_weights(features, features, shuffled, shuffled, np.eye(20)[5:6], [i % 5 for i in range(100)])
        fresh, _, labels = planted(2000, 3.0, seed + 100)
        coin = np.random.default_rng(seed).integers(2, size=2000)
        labels = [label ^ int(c) for label, c in zip(labels, coin, strict=True)]
        assert abs(won(fresh, labels, fitted.weights) - 0.5) < 3.9 * 0.5 / 2000**0.5


def test_strength_is_chosen_by_standard_errors() -> None:
    base, rng = np.full(100, 0.7), np.random.default_rng(0)
    noise = rng.normal(size=100) - rng.normal(size=100).mean()
    noise -= noise.mean()
    clear, doubtful = base - 0.05 + 0.1 * noise, base - 0.015 + 0.1 * noise
    assert choose({math.inf: base, 1.0: clear}) == 1.0
    assert choose({math.inf: base, 1.0: doubtful}) == math.inf  # one standard error and a half
    assert choose({math.inf: base, 1.0: clear, 0.1: clear - 0.005 + 0.1 * noise}) == 1.0
    assert choose({math.inf: base, 1.0: clear, 0.1: clear - 0.05}) == 0.1
    assert choose({math.inf: base[:1], 1.0: clear[:1]}) == math.inf
    assert choose({math.inf: base, 1.0: base}) == math.inf


def test_losses_and_gradients_equal_plain_loops() -> None:
    """Choices of several lengths, with several right ones, in examples of several choices."""
    examples = [
        [Choice((0, 1), (True, False)), Choice((0, 2, 3), (False, True, True))],
        [Choice((4, 5, 6, 7), (False, False, True, False))],
    ]
    ready, rng = Choices(examples), np.random.default_rng(0)
    scores = rng.normal(size=8)
    expected = [float(choice_loss(torch.from_numpy(scores), own, "softmax", 0)) for own in examples]
    assert ready.losses(scores) == pytest.approx(expected)
    assert ready.loss_and_gradient(scores)[0] == pytest.approx(np.mean(expected))
    for row, slope in enumerate(ready.loss_and_gradient(scores)[1]):
        step = 1e-6 * np.eye(8)[row]
        change = (ready.losses(scores + step) - ready.losses(scores - step)).mean() / 2e-6
        assert slope == pytest.approx(change, abs=1e-6)
    far = np.array([0.0, 5000, 0, 0, 0, 0, 0, 0])  # no sum underflows
    assert ready.losses(far)[0] == pytest.approx((5000 + math.log(1.5)) / 2)
    assert np.isfinite(ready.loss_and_gradient(far)[1]).all()
    probabilities, hits = ready.confidence(np.array([0.0, 0, 3, 1, 0, 0, 0, 0]))
    assert probabilities == pytest.approx([0.5, math.exp(3) / (1 + math.exp(3) + math.e), 0.25])
    assert hits == pytest.approx([0.5, 1, 0.25])  # ties share


def test_256_examples_take_seconds() -> None:
    import time

    rng = np.random.default_rng(0)
    features = rng.normal(size=(1024, 500))
    choices = [[Choice((4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3), (True, False, False, False))] for i in range(256)]
    start = time.process_time()
    fit_weights(features, features, choices, choices, np.eye(500)[:1], [i % 5 for i in range(256)])
    assert time.process_time() - start < 30


# Folds and calibration


def test_folds_keep_what_shares_a_picture_together() -> None:
    shared = [Example(f"{i}", (picture(i // 3),), ("cat", "dog"), ((0, 0),)) for i in range(30)]
    found = folds(shared, 4, 0)
    assert len(set(found)) == 4
    assert all(len({found[3 * g + k] for k in range(3)}) == 1 for g in range(10))
    assert max(found.count(f) for f in set(found)) <= 9
    assert folds(shared, 4, 0) == found != folds(shared, 4, 1)
    assert len(set(folds(shared[:6], 5, 0))) == 2
    with pytest.raises(OptionError, match="share none"):
        folds(shared[:3], 5, 0)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_equals_a_plain_loop(bins: int) -> None:
    rng = np.random.default_rng(bins)
    claimed = np.concatenate([rng.random(200), [0.0, 1.0, 0.25, 0.5]])
    hits = (rng.random(204) < claimed**2).astype(float)
    expected = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(claimed) if b / bins <= p < (b + 1) / bins or (b == bins - 1 and p == 1)]
        if inside:
            expected += len(inside) / 204 * abs(np.mean(claimed[inside]) - np.mean(hits[inside]))
    assert expected_calibration_error(claimed, hits, bins) == pytest.approx(expected)


def test_calibration_error_of_the_sure() -> None:
    assert expected_calibration_error([1, 1, 0, 0], [1, 1, 0, 0]) == 0
    assert expected_calibration_error([1, 1], [0, 0]) == 1
    assert expected_calibration_error([0.8] * 5, [1, 1, 1, 1, 0]) == pytest.approx(0)


@pytest.mark.parametrize(
    ("claimed", "hits", "bins"),
    [([], [], 5), ([0.5], [1, 0], 5), ([1.5], [1], 5), ([math.nan], [1], 5), ([0.5], [2], 5), ([0.5], [1], 0)],
)
def test_bad_calibration_input(claimed: list[float], hits: list[float], bins: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        expected_calibration_error(claimed, hits, bins)


# Learning


@pytest.fixture(scope="module")
def taught(pipe: Pipe) -> tuple[Scorer, Adapter]:
    made = Scorer(load_backbone(pipe()), DENOISING)
    return made, fit(made, toy(40, 0), config=WEIGHTS)


def test_weights_are_learned_on_a_toy(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    made, adapter = taught
    assert adapter.score.kind == WEIGHTED
    assert adapter.weights is not None
    assert adapter.prompts is None
    training = adapter.training
    assert training["kept"]
    assert training["validation_examples"] == training["examples"] == 40
    assert training["weights"]["folds"] == 4
    assert 0 <= training["calibration"]["error"] <= 0.3
    assert adapter.scale is not None
    json.dumps(training, allow_nan=False)
    fresh = toy(40, 2)
    assert accuracy(made, fresh) > 0.9 > accuracy(Scorer(load_backbone(pipe()), DENOISING), fresh)


def test_nothing_else_is_heeded(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    """A study keeps a lesson for as long as what it heeds is the same."""
    changes: dict[str, Any] = {
        "objective": "hinge",
        "margin": 0.2,
        "temperature": 2.0,
        "steps": 3,
        "batch": 2,
        "learning_rate": 1.0,
        "weight_decay": 0.5,
        "validation": 0.5,
        "check_every": 1,
        "patience": 1,
        "candidates": 2,
        "jitter": 0,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "mix": (),
    }
    assert changes.keys() | set(HEEDED_BY_WEIGHTS) == {f.name for f in fields(FitConfig)}
    made = Scorer(load_backbone(pipe()), DENOISING)
    found = fit(made, toy(40, 0), config=replace(WEIGHTS, **changes))
    assert found.weights is not None
    assert taught[1].weights is not None
    assert torch.equal(found.weights, taught[1].weights)


def test_zero_shot_is_kept_where_labels_have_no_rule(pipe: Pipe) -> None:
    made = Scorer(load_backbone(pipe()), ScoreConfig("attention", TIMESTEPS))
    adapter = fit(made, toy(12, 0, shuffled=True), config=WEIGHTS)
    assert not adapter.training["kept"]
    assert adapter.score == made.score.config == DENOISING
    assert adapter.weights is None
    assert adapter.features is None
    assert adapter.training["weights"]["strength"] is None
    figures = adapter.training["validation"]
    assert figures["before"] == figures["after"]
    plain = Scorer(load_backbone(pipe()), DENOISING)
    assert np.array_equal(made.predict(PAIRS), plain.predict(PAIRS))


def test_validation_examples_may_object(pipe: Pipe) -> None:
    """Their labels are the other way round."""
    wrong = [replace(e, positives=((0, 1 - e.positives[0][1]),)) for e in toy(8, 1)]
    made = Scorer(load_backbone(pipe()), DENOISING)
    adapter = fit(made, toy(40, 0), wrong, config=WEIGHTS)
    assert not adapter.training["kept"]
    assert adapter.score == DENOISING
    assert adapter.training["validation_examples"] == 8


def test_image_choices_are_learned_too(pipe: Pipe) -> None:
    singles = toy(120, 0)
    both = [
        Example(str(i), (*a.images, *b.images), (a.texts[i % 2],), ((i % 2, 0),))
        for i, (a, b) in enumerate(zip(singles[::2], singles[1::2], strict=True))
    ]
    made = Scorer(load_backbone(pipe()), DENOISING)
    adapter = fit(made, both, config=replace(WEIGHTS, draws=1))
    assert adapter.training["kept"]
    figures = adapter.training["validation"]
    assert figures["after"] > figures["before"] + 0.05


def test_too_few_examples(pipe: Pipe) -> None:
    made = Scorer(load_backbone(pipe()), DENOISING)
    for count in (0, 1):
        with pytest.raises(OptionError, match="two or more"):
            fit(made, toy(count, 0), config=WEIGHTS)
    adapter = fit(made, toy(2, 0), config=WEIGHTS)
    assert not adapter.training["kept"]


def test_a_resume_starts_anew(pipe: Pipe, tmp_path: Path, taught: tuple[Scorer, Adapter]) -> None:
    made = Scorer(load_backbone(pipe()), DENOISING)
    adapter = fit(made, toy(40, 0), config=WEIGHTS, checkpoint=tmp_path / "none.checkpoint", resume=True)
    assert adapter.weights is not None
    assert taught[1].weights is not None
    assert torch.equal(adapter.weights, taught[1].weights)


# Gradients


def test_importance_equals_finite_differences(backbone: Backbone) -> None:
    """The mean over examples of the loss's slope, measured by scoring with weights a little larger and smaller."""
    examples, features = toy(3, 0), Features(backbone, ["mid_block"])
    uniform = features.weights_of({"attention": 1.0}).repeat(2, 1)
    config = replace(LEARNED, layers=features.layers)
    scorer = Scorer(backbone, config, weights=uniform)
    found = importance(scorer, features, examples, QUICK)
    assert float(found.sum()) == pytest.approx(float(uniform.sum()), abs=1e-5)
    assert (found[uniform == 0] == 0).all()
    tables = [scorer.predict(e.pairs) for e in examples]
    spread = float(torch.cat([torch.from_numpy(t - t.mean()) for t in tables]).std())

    def losses(weights: torch.Tensor) -> np.ndarray:
        scorer.use(config, weights)
        made = [torch.from_numpy(scorer.predict(e.pairs)).double() / spread for e in examples]
        return np.array([choice_loss(t, choices_of(e), "softmax", 0) for t, e in zip(made, examples, strict=True)])

    expected = torch.zeros_like(uniform)
    for step, place in torch.nonzero(uniform).tolist():
        change = torch.zeros_like(uniform)
        change[step, place] = 0.005
        expected[step, place] = float(np.abs((losses(uniform + change) - losses(uniform - change)) / 0.01).mean())
    assert torch.allclose(found, expected / expected.sum() * uniform.sum(), atol=2e-3 * float(found.max()), rtol=0.02)


@pytest.mark.parametrize("method", ["heads", "prompt+heads"])
def test_weights_of_heads_learn(pipe: Pipe, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes more is called better, for only the steps count here."""
    seen: list[np.ndarray] = []

    def look(scorer: Scorer) -> float:
        seen.append(scorer.predict(PAIRS))
        return 1 / len(seen)

    looks_as(monkeypatch, look)
    made = Scorer(load_backbone(pipe()), ScoreConfig("attention", TIMESTEPS))
    zero = made.predict(PAIRS)
    adapter = fit(made, toy(6, 0), toy(6, 1), config=replace(QUICK, method=method))
    assert np.abs(seen[0] - zero).max() < 1e-5
    assert adapter.score == replace(LEARNED, layers=Features(made.backbone).layers)
    assert (adapter.prompts is not None) == (method == "prompt+heads") == bool(adapter.state)
    assert adapter.weights is not None
    own = Features(made.backbone).weights_of({"attention": 1.0}) != 0
    assert (adapter.weights[:, ~own] == 0).all()
    assert len(set(adapter.weights[:, own].flatten().tolist())) > own.sum()
    assert np.array_equal(made.predict(PAIRS), seen[-1])


@pytest.mark.parametrize("method", ["heads", "prompt+heads"])
def test_a_stopped_fit_of_heads_goes_on(
    pipe: Pipe, tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(QUICK, method=method)
    looks = iter(range(1, 100))
    looks_as(monkeypatch, lambda _: 1 / next(looks))

    def run(**given: Any) -> Adapter:
        return fit(Scorer(load_backbone(pipe()), ScoreConfig("attention", TIMESTEPS)), toy(6, 0), toy(6, 1), **given)

    whole = run(config=config)
    step = Learner.step

    def until(self: Learner) -> float:
        if self.done == 3:
            raise KeyboardInterrupt
        return step(self)

    keeper = tmp_path / "fit.checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", until)
        with pytest.raises(KeyboardInterrupt):
            run(config=config, checkpoint=keeper)
    assert keeper.exists()
    resumed = run(config=config, checkpoint=keeper, resume=True)
    assert whole.weights is not None
    assert resumed.weights is not None
    assert torch.equal(whole.weights, resumed.weights)
    assert whole.state.keys() == resumed.state.keys()
    assert all(torch.equal(whole.state[n], resumed.state[n]) for n in whole.state)


def test_heads_of_a_score_without_heads(pipe: Pipe) -> None:
    made = Scorer(load_backbone(pipe()), ScoreConfig("paper", TIMESTEPS))
    with pytest.raises(OptionError, match="got score 'paper'"):
        fit(made, toy(4, 0), config=replace(QUICK, method="heads"))


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("bare_is_better", [True, False])
def test_prompts_then_weights(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, better: bool, bare_is_better: bool) -> None:
    """Weights of the bare model, and on examples that kept prompts were not taught on: the better ones of them."""
    count = iter(range(1, 100))
    looks_as(monkeypatch, lambda _: 1 / next(count) if better else 1.0)
    used: list[int] = []
    real, judged_by = weighing.fit_weights, weighing.Weighed.judged_by

    def spy(*given: Any) -> Any:
        used.append(len(given[2]))
        assert len(given[4]) == (1 if len(used) == 1 else 2)
        return real(*given)

    def judge(weighed: Any, examples: Any) -> Any:
        assert len(examples) == 12
        found = judged_by(weighed, examples)
        best = (weighed.adapter.prompts is None) == bare_is_better
        return replace(found, accuracy=np.full(12, float(best)))

    monkeypatch.setattr(weighing, "fit_weights", spy)
    monkeypatch.setattr(weighing.Weighed, "judged_by", judge)
    made = Scorer(load_backbone(pipe()), ScoreConfig("attention", TIMESTEPS))
    config = replace(QUICK, method="prompt+weights", validation=0.5, draws=1)
    adapter = fit(made, toy(24, 0), config=config)
    assert used == ([24, 12] if better else [24])
    prompted = better and not bare_is_better
    assert (adapter.prompts is not None) == prompted == bool(prompts.parameters(made.backbone.denoiser))
    assert adapter.score == made.score.config
    scores = made.predict(PAIRS)
    fresh = load_backbone(pipe())
    assert np.array_equal(Matcher(fresh, adapter=adapter).predict(PAIRS), scores)


@given(
    st.floats(0.1, 4),
    arrays(np.float64, st.integers(2, 12), elements=st.floats(-3, 3)),
)
def test_fewer_than_the_fewest_are_never_better(errors: float, gains: np.ndarray) -> None:
    few = gains[: fewest(errors) - 1]
    assert few.size < 2 or not better(-few, np.zeros_like(few), errors)
    alike = np.ones(max(2, fewest(errors)))
    assert better(-alike, np.zeros_like(alike), errors)


def test_six_held_out_examples_can_confirm_a_lesson() -> None:
    assert (DOUBT, FEWEST) == (2, 6)


def test_what_was_fitted_is_judged_by_scores_out_of_fold(pipe: Pipe) -> None:
    examples = toy(12, 0, shuffled=True)
    made = Scorer(load_backbone(pipe()), DENOISING)
    found = weighing.weigh(made, [weighing.Part(examples)], None, replace(WEIGHTS, draws=1), None, False)
    assert found.adapter.weights is None  # zero-shot was kept, which learned from nothing
    assert found.scores == pytest.approx(made.predict(Jury(examples).pairs), abs=1e-4)
    some = examples[3:8]
    rows = np.split(found.scores, np.cumsum([len(e.pairs) for e in examples])[:-1])[3:8]
    assert found.judged_by(some).rank == Jury(some).judge(np.concatenate(rows)).rank


# Through the facade, and on disk


def test_learned_weights_survive_the_disk(pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    made, adapter = taught
    again = Adapter.load(adapter.save(tmp_path / "a"))
    assert again.score == adapter.score
    assert again.features == adapter.features == Features(made.backbone).names
    assert again.weights is not None
    assert adapter.weights is not None
    assert torch.equal(again.weights, adapter.weights)
    matcher = Matcher.from_pretrained(pipe(), adapter=tmp_path / "a")
    assert np.array_equal(matcher.predict(PAIRS), made.predict(PAIRS))
    assert matcher.probability(IMAGES[0], CAPTIONS).sum() == pytest.approx(1)
    assert "weights" in (tmp_path / "a" / "README.md").read_text()


def test_another_lesson_starts_from_zero_shot(pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    matcher = Matcher.from_pretrained(pipe(), adapter=taught[1].save(tmp_path / "a"))
    matcher.fit(toy(12, 0, shuffled=True), config=WEIGHTS)
    assert matcher.score_config == replace(DENOISING, layers=None)
    matcher.fit(toy(40, 0), config=WEIGHTS)
    assert matcher.score_config.kind == WEIGHTED
    matcher.forget()
    assert np.array_equal(matcher.predict(PAIRS), Scorer(load_backbone(pipe()), DENOISING).predict(PAIRS))


def test_weights_at_other_timesteps_are_refused(pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    folder = taught[1].save(tmp_path / "a")
    for other in ({"timesteps": (5, 9)}, {"layers": ["mid_block"]}):
        with pytest.raises(OptionError, match="leave them out"):
            Matcher.from_pretrained(pipe(), adapter=folder, **other)  # type: ignore[arg-type]
    plain = Matcher.from_pretrained(pipe(), adapter=folder, score="denoising", timesteps=(5, 9))
    assert plain.score_config.kind == "denoising"


def damage_config(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def damage_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    weights = tensors.pop("weights")
    if change is not None:
        tensors["weights"] = change(weights).contiguous()
    save_file(tensors, file)


BREAKS: dict[str, Callable[[Path], None]] = {
    "a timestep less": lambda f: damage_weights(f, lambda w: w[1:]),
    "a feature less": lambda f: damage_weights(f, lambda w: w[:, 1:]),
    "one number": lambda f: damage_weights(f, lambda w: w.sum()),
    "no weights": lambda f: damage_weights(f, None),
    "no features": lambda f: damage_config(f, features=None),
    "features are a number": lambda f: damage_config(f, features=3),
    "another score": lambda f: damage_config(f, score=DENOISING.to_dict()),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS.keys())
def test_weights_of_a_wrong_shape(taught: tuple[Scorer, Adapter], tmp_path: Path, damage: Any) -> None:
    folder = taught[1].save(tmp_path / "a")
    damage(folder)
    with pytest.raises(AdapterError, match="cannot be read"):
        Adapter.load(folder)


def test_features_of_another_model_are_refused(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    names = taught[1].features
    assert names is not None
    adapter = replace(taught[1], features=(*names[1:], names[0]))
    with pytest.raises(AdapterError, match="does not have in this order"):
        adapter.attach(load_backbone(pipe()))


@pytest.mark.parametrize("options", [{"method": "nonesuch"}, {"draws": 0}, {"folds": 1}])
def test_bad_configuration(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        FitConfig(**options)
