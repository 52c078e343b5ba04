"""Learning on a toy that can be learned, guards where there is nothing to learn, adapters that survive the disk."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dsd import learn, prompts, weighing
from dsd.adapt import fit
from dsd.adapters import Adapter, fingerprint, same_base
from dsd.backbone import Backbone, TextStates, load_backbone
from dsd.contracts import AdapterError, Example, ModelError, OptionError
from dsd.learn import FitConfig, Learner, Team, choice_loss
from dsd.lesson import choices_of, split
from dsd.metrics import wins
from dsd.probe import text_width
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig
from looks import looks_as
from models import COLOURS, toy

Pipe = Callable[..., str]
SCORE = ScoreConfig("attention", (20, 100))
LEARN = FitConfig(steps=20, batch=6, check_every=4, learning_rate=3e-2, jitter=10)
QUICK = FitConfig(steps=5, batch=2, check_every=2, jitter=10)
PROMPT = PromptConfig(rank=2, attention="cross")
LESSON = PromptConfig(rank=4)


def scorer(pipe: Pipe, config: ScoreConfig = SCORE) -> Scorer:
    return Scorer(load_backbone(pipe()), config)


def accuracy(scorer: Scorer, examples: Sequence[Example]) -> float:
    return float(np.mean([wins(scorer.predict(e.pairs).reshape(1, 2), e.positives).mean() for e in examples]))


def is_bare(backbone: Backbone) -> bool:
    return not prompts.parameters(backbone.denoiser) and not hasattr(backbone.denoiser, "peft_config")


@pytest.fixture(scope="module")
def taught(pipe: Pipe) -> tuple[Scorer, Adapter]:
    made = scorer(pipe)
    return made, fit(made, toy(12, 0), toy(8, 1), config=LEARN, prompt=LESSON)


def improving(scorer: Scorer) -> float:
    """Where only the steps count: what changes more is better."""
    return 1 / (1 + sum(float(v.abs().sum()) for v in prompts.state(scorer.backbone.denoiser).values()))


@pytest.fixture(scope="module")
def steps_taken(pipe: Pipe) -> tuple[Scorer, Adapter]:
    """A few steps without a stop."""
    with pytest.MonkeyPatch.context() as patch:
        looks_as(patch, improving)
        made = scorer(pipe)
        return made, fit(made, toy(6, 0), toy(6, 1), config=QUICK, prompt=PROMPT)


def same_state(a: Adapter, b: Adapter) -> bool:
    return (
        bool(a.state) and a.state.keys() == b.state.keys() and all(torch.equal(a.state[n], b.state[n]) for n in a.state)
    )


# Learning


def test_a_toy_is_learned(taught: tuple[Scorer, Adapter]) -> None:
    """What holds on pictures that were never seen, from twelve examples."""
    made, adapter = taught
    curve = adapter.training["curve"]
    assert [p["step"] for p in curve] == [0, 4, 8, 12, 16, 20]
    assert curve[-1]["train"] < 0.5 * curve[1]["train"]
    assert adapter.training["kept"]
    assert adapter.training["examples"] == 12
    assert adapter.training["validation_examples"] == 8
    before, after = (adapter.training["validation"][k] for k in ("before", "after"))
    assert before < 0.8 < after
    fresh = toy(20, 2)
    assert accuracy(made, fresh) > 0.9
    with prompts.disabled(made.backbone.denoiser):
        assert accuracy(made, fresh) < 0.8


def test_the_scale_makes_scores_log_odds(taught: tuple[Scorer, Adapter]) -> None:
    """What was sure and right gets a loss near nothing; half the scale does worse."""
    made, adapter = taught

    def loss(scale: float) -> float:
        tables = [made.predict(e.pairs) for e in toy(8, 1)]
        rows = [torch.from_numpy(t).double() * scale for t in tables]
        return float(np.mean([float(r.logsumexp(0) - r[i % 2]) for i, r in enumerate(rows)]))

    assert adapter.scale is not None
    assert adapter.scale > 0
    best = max(adapter.training["curve"], key=lambda p: (p["accuracy"], -p["loss"]))
    assert loss(adapter.scale) == pytest.approx(best["loss"], abs=1e-3)
    assert loss(adapter.scale) <= loss(adapter.scale / 2) + 1e-9


@pytest.mark.parametrize(("kind", "objective"), [("denoising", "hinge"), ("paper", "softmax")])
def test_other_scores_and_objectives_learn(pipe: Pipe, kind: str, objective: Any) -> None:
    made = scorer(pipe, ScoreConfig(kind, (20,)))
    config = FitConfig(objective=objective, margin=1, steps=8, batch=2, check_every=4, learning_rate=3e-2, jitter=0)
    adapter = fit(made, toy(2, 0), toy(6, 1), config=replace(config, mix=()), prompt=LESSON)
    curve = adapter.training["curve"]
    assert curve[-1]["train"] < 0.9 * curve[1]["train"]
    assert adapter.training["config"]["objective"] == objective


def test_labels_without_a_rule_teach_nothing(pipe: Pipe) -> None:
    made = scorer(pipe)
    adapter = fit(made, toy(12, 0, shuffled=True), toy(8, 1, shuffled=True), config=LEARN, prompt=LESSON)
    if adapter.training["kept"]:
        assert abs(accuracy(made, toy(40, 20)) - 0.5) < 0.3
    else:
        assert adapter.prompts is None
        assert adapter.state == {}
        assert is_bare(made.backbone)
        assert adapter.training["validation"]["after"] == adapter.training["validation"]["before"]


def test_zero_shot_score_is_kept_unless_learning_is_better(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that always looks the same is no reason to change anything."""
    looks_as(monkeypatch, lambda _: 0.5)
    made = scorer(pipe)
    plain = made.predict(toy(1, 0)[0].pairs)
    adapter = fit(made, toy(4, 0), toy(6, 1), config=replace(QUICK, steps=4), prompt=PROMPT)
    assert not adapter.training["kept"]
    assert adapter.prompts is None
    assert np.array_equal(made.predict(toy(1, 0)[0].pairs), plain)


@pytest.mark.parametrize(("dear", "kept"), [(0.1, False), (0.7, True)])
def test_a_lesson_is_worth_its_passes(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, dear: float, kept: bool) -> None:
    """What is learned beside the zero-shot score takes further passes, in which that might have done better."""
    seen: list[ScoreConfig] = []

    def loss(scorer: Scorer) -> float:
        seen.append(scorer.score.config)
        if scorer.score.config.kind != "denoising":
            return 0.5  # and an eighth of the zero-shot score's, which is the least that is added
        return dear if len(scorer.score.config.timesteps) > 3 else 0.9

    looks_as(monkeypatch, loss)
    made = scorer(pipe, ScoreConfig("denoising", (20, 60, 100)))
    adapter = fit(made, toy(4, 0), toy(6, 1), config=replace(QUICK, steps=4), prompt=PROMPT)
    assert adapter.training["kept"] == kept
    assert [s.timesteps for s in seen if s.kind == "denoising"] == [(20, 60, 100), (20, 60, 100, 20, 100)]
    assert made.score.config.passes == (5 if kept else 3)


def test_given_noise_has_no_further_passes(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_as(monkeypatch, lambda scorer: 0.9 if scorer.score.config.kind == "denoising" else 0.5)
    backbone = load_backbone(pipe())
    noise = np.random.default_rng(0).standard_normal((2, *backbone.latent_shape(backbone.image_size)))
    made = Scorer(backbone, ScoreConfig("denoising", (20, 100)), noise=noise)
    adapter = fit(made, toy(4, 0), toy(6, 1), config=replace(QUICK, steps=4), prompt=PROMPT)
    assert adapter.training["kept"]
    assert "as_dear" not in adapter.training["validation"]


def test_learning_stops_when_patience_runs_out(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.9, 0.5, 0.6, 0.7, 0.1])
    looks_as(monkeypatch, lambda _: next(losses))
    config = replace(QUICK, steps=20, check_every=1, patience=2)
    adapter = fit(scorer(pipe), toy(4, 0), toy(6, 1), config=config, prompt=PROMPT)
    assert [p["loss"] for p in adapter.training["curve"]] == pytest.approx([0.935, 0.535, 0.635, 0.735])
    assert adapter.training["kept"]


def test_the_same_request_gives_the_same_adapter(
    pipe: Pipe, steps_taken: tuple[Scorer, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_as(monkeypatch, improving)
    torch.manual_seed(123)  # the surroundings' state is of no account
    again = fit(scorer(pipe), toy(6, 0), toy(6, 1), config=QUICK, prompt=PROMPT)
    assert same_state(again, steps_taken[1])
    assert again.training == steps_taken[1].training
    other = fit(scorer(pipe), toy(6, 0), toy(6, 1), config=replace(QUICK, seed=1), prompt=PROMPT)
    assert not same_state(other, steps_taken[1])


# Learning on from prompts that were learned before


STARTS = {"held out": {"validation": toy(6, 1)}, "by turns": {"validation": None}}


@pytest.mark.parametrize("how", STARTS.values(), ids=STARTS.keys())
def test_what_it_started_from_is_kept_unless_learning_is_better(
    pipe: Pipe, taught: tuple[Scorer, Adapter], monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    first, start = taught
    looks_as(monkeypatch, lambda _: 0.5)
    made = scorer(pipe)
    adapter = fit(made, toy(12, 4), config=QUICK, start=start, **how)
    assert not adapter.training["kept"]
    assert adapter.training["started"] == start.digest()
    assert same_state(adapter, start)
    pairs = toy(3, 5)[0].pairs
    assert np.array_equal(made.predict(pairs), first.predict(pairs))


@pytest.mark.parametrize("how", STARTS.values(), ids=STARTS.keys())
def test_learning_starts_from_an_adapter(
    pipe: Pipe, taught: tuple[Scorer, Adapter], monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """With steps too small to count, what is learned is where it started; with others it has moved from there."""
    _, start = taught
    seen: list[float] = []

    def nearer(scorer: Scorer) -> float:
        state = prompts.state(scorer.backbone.denoiser)
        seen.append(sum(float((v - start.state[n]).abs().sum()) for n, v in state.items()))
        return 1 / (1 + seen[-1])

    looks_as(monkeypatch, nearer)
    config = replace(QUICK, weight_decay=0.0)
    still = fit(scorer(pipe), toy(12, 4), config=replace(config, learning_rate=1e-12), start=start, **how)
    assert seen[0] == 0
    assert all(torch.allclose(still.state[n], v, atol=1e-9) for n, v in start.state.items())
    moved = fit(scorer(pipe), toy(12, 4), config=config, start=start, **how)
    assert moved.training["kept"]
    assert moved.prompts == start.prompts
    assert 0 < max(float((moved.state[n] - v).abs().max()) for n, v in start.state.items()) < 1


def test_a_start_knows_what_another_lesson_taught(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    """Too few examples to learn from by themselves."""
    made = scorer(pipe)
    adapter = fit(made, toy(2, 6), toy(2, 7), config=QUICK, start=taught[1])
    assert same_state(adapter, taught[1])
    assert accuracy(made, toy(20, 2)) > 0.9


def test_a_start_beside_the_bare_score(pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    """A denoising score is the bare model's, and weighed beside the attention of the start from the first look on."""
    made = scorer(pipe, ScoreConfig("denoising", (20, 60, 100)))
    plain = made.predict(toy(3, 5)[0].pairs)
    start = replace(taught[1], score=replace(taught[1].score, timesteps=(50,)))
    adapter = fit(made, toy(8, 4), toy(8, 1), config=replace(QUICK, learning_rate=1e-9), start=start)
    assert not adapter.training["kept"]
    assert (adapter.score.timesteps, made.score.config.passes) == ((50,), 4)
    assert same_state(adapter, taught[1])
    bare = adapter.score.bare
    assert bare is not None
    assert (adapter.score.kind, bare.kind) == ("attention", "denoising")
    assert adapter.score.bare_weight > 0
    card = (adapter.save(tmp_path / "adapter") / "README.md").read_text()
    assert (
        f"{adapter.score.bare_weight:.3g} times `denoising` of the model without prompts at timesteps 20, 60, 100"
        in card
    )
    pairs = toy(3, 5)[0].pairs
    whole = made.predict(pairs)
    made.use(replace(adapter.score, bare=None))
    assert np.allclose(whole, made.predict(pairs) + adapter.score.bare_weight * plain, atol=1e-5)
    assert accuracy(made, toy(20, 2)) > 0.9


def test_weights_follow_a_start(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    made = scorer(pipe)
    adapter = fit(made, toy(8, 4), toy(8, 1), config=replace(QUICK, method="prompt+weights"), start=taught[1])
    assert adapter.prompts == taught[1].prompts
    assert adapter.training["weights"]["kept"] <= adapter.training["kept"]
    assert accuracy(made, toy(20, 2)) > 0.9


def test_what_was_started_from_stays_whatever_the_bare_model_can_do(
    pipe: Pipe, taught: tuple[Scorer, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are kept on top of prompts that nothing was learned for are something learned."""
    monkeypatch.setattr(weighing, "better", lambda *_: True)
    given: dict[str, Any] = {"config": replace(QUICK, method="prompt+weights", learning_rate=1e-12)}
    start = replace(taught[1], state={n: -v if "lora_B" in n else v for n, v in taught[1].state.items()})  # does harm
    adapter = fit(scorer(pipe), toy(12, 4), toy(8, 1), start=start, **given)
    assert same_state(adapter, start)
    assert adapter.training["weights"]["kept"]
    assert adapter.training["kept"]
    assert "started" in adapter.training


def test_words_join_a_start(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    """To the start's prompts, which are kept without them if nothing was learned."""
    made = scorer(pipe)
    start, words = taught[1], {"prompt": PromptConfig(words=("square",))}
    config = replace(QUICK, method="prompt+words")
    adapter = fit(made, toy(8, 4), toy(8, 1), config=replace(config, learning_rate=1e-9), start=start, **words)
    assert adapter.prompts == start.prompts
    assert not adapter.training["kept"]
    assert same_state(adapter, start)
    pairs = toy(3, 5)[0].pairs
    assert np.allclose(made.predict(pairs), taught[0].predict(pairs), atol=1e-6)
    with pytest.raises(OptionError, match="expected one of them"):
        fit(scorer(pipe), toy(8, 4), config=config, start=start, prompt=PromptConfig(rank=2, words=("square",)))


@pytest.mark.parametrize("method", ["prompt", "prompt+words"])
def test_a_start_that_has_words(
    pipe: Pipe, taught: tuple[Scorer, Adapter], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """They are learned on only if the method says so, and need not be named again."""
    looks_as(monkeypatch, improving)
    meaning = torch.linspace(-1, 1, text_width(scorer(pipe).backbone.denoiser))
    start = replace(
        taught[1],
        prompts=replace(taught[1].prompts, words=("square",)),
        state={**taught[1].state, "soft_words.square": meaning},
    )
    config = replace(QUICK, method=method)
    on = fit(scorer(pipe), toy(8, 4), toy(8, 1), config=config, start=start)
    assert on.training["kept"]
    assert on.prompts == start.prompts
    assert torch.equal(on.state["soft_words.square"], meaning) == (method == "prompt")
    assert not same_state(on, start)
    unsaid = [replace(e, texts=("a", "b")) for e in toy(8, 4)]
    with pytest.raises(OptionError, match="got square to learn, which no caption has"):
        fit(scorer(pipe), unsaid, toy(8, 1), config=replace(config, method="prompt+words"), start=start)


def test_words_that_only_held_out_examples_have_are_refused(pipe: Pipe) -> None:
    rare = [replace(e, texts=("a red oblong", "a blue oblong")) if i == 3 else e for i, e in enumerate(toy(4))]
    seeds = [s for s in range(9) if rare[3] not in replace(QUICK, validation=0.5, seed=s).turns(rare, None)[0].examples]
    config = replace(QUICK, method="words", validation=0.5, seed=seeds[0])
    with pytest.raises(OptionError, match="got oblong to learn, which no caption has"):
        fit(scorer(pipe), rare, config=config, prompt=PromptConfig(words=("oblong",)))


def test_what_weights_would_refuse_is_refused_before_anything_is_learned(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "step", None)
    one = [replace(toy(1)[0], id=f"{k}") for k in range(3)]
    with pytest.raises(OptionError, match="none is free of the others' pictures"):
        fit(scorer(pipe), one, toy(8, 1), config=replace(QUICK, method="prompt+weights"))


def test_a_start_that_does_not_do(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    start = taught[1]
    made = scorer(pipe)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"start": replace(start, prompts=None, state={})}, "without prompts"),
        ({"start": start, "config": replace(QUICK, method="heads")}, "'heads' and an adapter"),
        ({"start": start, "config": replace(QUICK, method="weights")}, "'weights' and an adapter"),
        ({"start": start, "config": replace(QUICK, method="prompt+tokens")}, "without soft tokens"),
        ({"start": start, "prompt": PromptConfig(rank=2)}, "expected one of them"),
        ({"start": replace(start, prompts=PromptConfig(rank=2)), "prompt": PromptConfig()}, "expected one of them"),
        ({"start": replace(start, size=made.size * 2)}, "load the model with size"),
    ]
    for given, message in bad:
        with pytest.raises(OptionError, match=message):
            fit(made, toy(4, 0), toy(6, 1), **given)
        assert is_bare(made.backbone)
    other = Scorer(load_backbone(pipe(seed=5)), SCORE)
    with pytest.raises(AdapterError, match="got an adapter for"):
        fit(other, toy(4, 0), toy(6, 1), start=start)
    assert is_bare(other.backbone)


def test_a_stopped_fit_goes_on_from_the_same_start_alone(
    pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = taught[1]
    given: dict[str, Any] = {"config": QUICK, "checkpoint": tmp_path / "fit.checkpoint"}
    looks_as(monkeypatch, improving)
    whole = fit(scorer(pipe), toy(6, 0), toy(6, 1), config=QUICK, start=start)
    step = Learner.step

    def until(self: Learner) -> float:
        if self.done == 3:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", until)
        with pytest.raises(KeyboardInterrupt):
            fit(scorer(pipe), toy(6, 0), toy(6, 1), **given, start=start)
    for other in (None, replace(start, state={n: v + 1e-3 for n, v in start.state.items()})):
        placed = {"prompt": start.prompts} if other is None else {"start": other}
        with pytest.raises(OptionError, match="another request"):
            fit(scorer(pipe), toy(6, 0), toy(6, 1), **given, **placed, resume=True)
    adapter = fit(scorer(pipe), toy(6, 0), toy(6, 1), **given, start=start, resume=True)
    assert same_state(adapter, whole)
    assert adapter.training == whole.training


@dataclass
class Watched:
    """What a step was made of: a row each, and the scores of each example that the loss was taken of."""

    latents: list[Tensor]
    noises: list[Tensor]
    timesteps: list[int]
    states: list[Tensor]
    scores: list[Tensor]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Takes one step on examples."""

    def one_step(made: Scorer, examples: Sequence[Example], config: FitConfig) -> Watched:
        seen = Watched([], [], [], [], [])
        prompts.attach(made.backbone.denoiser, PROMPT)
        learner = Learner(made, examples, config, Team())
        learner._spread = 1.0
        add, predict, loss = made.backbone.add_noise, made.backbone.predict_noise, learn.choice_loss

        def spy_add(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            seen.latents.extend(latents)
            seen.noises.extend(noise)
            seen.timesteps.extend(t.tolist())
            return add(latents, noise, t)

        def spy_predict(noised: Tensor, t: Tensor, text: TextStates) -> Tensor:
            seen.states.extend(text.states)
            return predict(noised, t, text)

        def spy_loss(scores: Tensor, *rest: Any) -> Tensor:
            seen.scores.append(scores.detach())
            return loss(scores, *rest)

        monkeypatch.setattr(made.backbone, "add_noise", spy_add)
        monkeypatch.setattr(made.backbone, "predict_noise", spy_predict)
        monkeypatch.setattr(learn, "choice_loss", spy_loss)
        learner.step()
        return seen

    return one_step


def test_candidates_of_an_example_share_noise_and_timestep(pipe: Pipe, watch: Callable[..., Watched]) -> None:
    """So that only their captions tell them apart; other examples have their own."""
    seen = watch(scorer(pipe), toy(4, 0), replace(QUICK, batch=4))
    rows: dict[bytes, list[int]] = {}
    for row, latent in enumerate(seen.latents):
        rows.setdefault(latent.numpy().tobytes(), []).append(row)
    assert len(rows) == 4
    for same in rows.values():
        assert len(same) >= 2
        assert all(torch.equal(seen.noises[same[0]], seen.noises[row]) for row in same)
        assert len({seen.timesteps[row] for row in same}) == 1
        assert min(abs(seen.timesteps[same[0]] - own) for own in SCORE.timesteps) <= QUICK.jitter
    assert len({seen.noises[same[0]].numpy().tobytes() for same in rows.values()}) == 4


@pytest.mark.parametrize("kind", ["attention", "denoising", "paper"])
def test_what_is_taught_is_what_is_measured(pipe: Pipe, watch: Callable[..., Watched], kind: str) -> None:
    """Under the scorer's own noise the two agree, for long captions among short ones too."""
    made = scorer(pipe, ScoreConfig(kind, (100,)))
    texts = ("a red square", "the dog " * 13, "cat")
    example = Example("mixed", (toy(1, 0)[0].images[0], toy(2, 0)[1].images[0]), texts, ((0, 0), (1, 1)))
    seen = watch(made, [example], replace(QUICK, batch=1, jitter=0))
    prompts.detach(made.backbone.denoiser)  # after the step they are no longer those that were scored
    same = Scorer(made.backbone, made.score.config, noise=seen.noises[0][None].numpy())
    assert np.abs(seen.scores[0].numpy()[:6] - same.predict(example.pairs)).max() < 1e-5


def test_gradient_that_is_not_finite(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    made = scorer(pipe)
    with pytest.raises(ModelError, match="got a gradient of inf at step 1"):
        fit(made, toy(4, 0), toy(6, 1), config=QUICK, prompt=PROMPT)
    assert is_bare(made.backbone)


def test_loss_that_is_not_finite(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model breaks on one picture, in the second step."""
    made = scorer(pipe)
    examples = toy(4, 0)
    bad = made.latents(examples[2].images)[0]
    add, trained = made.backbone.add_noise, 0

    def spy(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        nonlocal trained
        trained += torch.is_grad_enabled()
        broken = trained == 2 and (latents == bad).flatten(1).all(1)[:, None, None, None]
        return torch.where(torch.as_tensor(broken), math.nan, add(latents, noise, t))

    monkeypatch.setattr(made.backbone, "add_noise", spy)
    with pytest.raises(ModelError, match=r"step 2, example 0-2") as error:
        fit(made, examples, toy(6, 1), config=replace(QUICK, batch=4), prompt=PROMPT)
    assert "\n" not in str(error.value)
    assert is_bare(made.backbone)


# What is asked for


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "nonesuch"},
        {"steps": 0},
        {"batch": 0},
        {"margin": -1.0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"validation": 0.0},
        {"validation": 1.0},
        {"validation": math.nan},
        {"check_every": 0},
        {"patience": 0},
        {"jitter": -1},
        {"seed": -1},
        {"weight_decay": -0.1},
    ],
)
def test_bad_configuration(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=name):
        FitConfig(**options)


def test_examples_without_a_choice_are_refused(pipe: Pipe) -> None:
    single = Example("alone", (picture_of(1),), ("cat",), ((0, 0),))
    all_right = Example("all right", (picture_of(1),), ("cat", "dog"), ((0, 0), (0, 1)))
    made = scorer(pipe)
    with pytest.raises(OptionError, match="alone, all right"):
        fit(made, [*toy(2, 0), single, all_right], config=QUICK)
    assert is_bare(made.backbone)


@pytest.mark.parametrize("method", ["prompt", "weights"])
def test_validation_examples_that_are_learned_from_are_refused(pipe: Pipe, method: Any) -> None:
    made = scorer(pipe)
    with pytest.raises(OptionError, match="got 2 validation examples with pictures that are learned from"):
        fit(made, toy(4, 0), [*toy(6, 1), *toy(4, 0)[:2]], config=replace(QUICK, method=method))
    assert is_bare(made.backbone)


def test_validation_examples_without_a_choice_are_refused(pipe: Pipe) -> None:
    single = Example("alone", (picture_of(1),), ("cat",), ((0, 0),))
    made = scorer(pipe)
    with pytest.raises(OptionError, match="alone"):
        fit(made, toy(2, 0), [single], config=QUICK)
    assert is_bare(made.backbone)


@pytest.mark.parametrize(("examples", "validation"), [(0, None), (1, None), (0, 2), (2, 0)])
def test_too_few_examples(pipe: Pipe, examples: int, validation: int | None) -> None:
    with pytest.raises(OptionError, match="at least one of each"):
        fit(scorer(pipe), toy(examples, 0), None if validation is None else toy(validation, 1), config=QUICK)


def test_model_with_prompts_is_refused_and_left_alone(pipe: Pipe) -> None:
    made = scorer(pipe)
    prompts.attach(made.backbone.denoiser, PROMPT)
    with pytest.raises(AdapterError, match="already carries prompts"):
        fit(made, toy(2, 0), toy(6, 1), config=QUICK)
    assert prompts.parameters(made.backbone.denoiser)


# Losses


def picture_of(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))


TABLES = {
    "text choice": (1, 3, [(0, 1)]),
    "image choice": (3, 1, [(2, 0)]),
    "winoground": (2, 2, [(0, 0), (1, 1)]),
    "two right": (1, 4, [(0, 0), (0, 3)]),
    "a row that is all right": (2, 2, [(0, 0), (0, 1), (1, 0)]),
}


@pytest.mark.parametrize("objective", ["hinge", "softmax"])
@pytest.mark.parametrize(("rows", "columns", "positives"), TABLES.values(), ids=TABLES.keys())
def test_loss_equals_a_plain_loop(rows: int, columns: int, positives: list[tuple[int, int]], objective: Any) -> None:
    images, texts = tuple(picture_of(i) for i in range(rows)), tuple(f"text {j}" for j in range(columns))
    example = Example("x", images, texts, tuple(positives))
    for seed in range(5):
        scores = torch.randn(rows * columns, generator=torch.Generator().manual_seed(seed))
        table = scores.reshape(rows, columns).tolist()
        lines = [[(table[i][j], (i, j) in positives) for j in range(columns)] for i in range(rows)]
        lines += [[(table[i][j], (i, j) in positives) for i in range(rows)] for j in range(columns)]
        losses = []
        for line in lines:
            right, wrong = [s for s, ok in line if ok], [s for s, ok in line if not ok]
            if not right or not wrong:
                continue
            if objective == "hinge":
                losses.append(max(0.0, 0.3 + max(wrong) - min(right)))
            else:
                share = sum(math.exp(s) for s in right) / sum(math.exp(s) for s, _ in line)
                losses.append(-math.log(share))
        found = choice_loss(scores, choices_of(example), objective, 0.3)
        assert float(found) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# Held-out examples


def of(name: str, *images: Any) -> Example:
    return Example(name, images, COLOURS, ((0, 0),))


def apart(count: int) -> list[Example]:
    """Examples of one picture each, all different."""
    return [of(f"{i}", np.full((4, 4, 3), i, np.uint8)) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_split_is_a_partition(share: float, seed: int) -> None:
    examples = apart(20)
    kept, held = split(examples, share, seed)
    assert sorted(int(e.id) for e in kept + held) == list(range(20))
    assert len(held) == round(share * 20)
    again = split(examples, share, seed)
    assert [[e.id for e in part] for part in again] == [[e.id for e in part] for part in (kept, held)]


def test_splits_of_two_seeds_differ() -> None:
    examples = apart(20)
    assert [e.id for e in split(examples, 0.5, 0)[1]] != [e.id for e in split(examples, 0.5, 1)[1]]


def shared_images(kind: str, folder: Path) -> list[Example]:
    """Examples of which each shares a picture with the next, in chains of four."""
    made = []
    for chain in range(5):
        pixels = [np.full((4, 4, 3), 10 * chain + k, np.uint8) for k in range(5)]
        for k, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{chain}-{k}.png")
        pair = {
            "strings": lambda k, c=chain: str(folder / f"{c}-{k}.png"),
            "paths": lambda k, c=chain: folder / f"{c}-{k}.png",
            "arrays": lambda k, p=pixels: p[k],
            "copies": lambda k, p=pixels: Image.fromarray(p[k]),
            "files and arrays": lambda k, c=chain, p=pixels: p[k] if k % 2 else str(folder / f"{c}-{k}.png"),
        }[kind]
        # the one that links two others comes last
        made += [of(f"{chain}{k}", pair(k), pair(k + 1)) for k in (0, 2, 3, 1)]
    return made


@pytest.mark.parametrize("kind", ["strings", "paths", "arrays", "copies", "files and arrays"])
@pytest.mark.parametrize("seed", range(3))
def test_split_keeps_what_shares_a_picture_together(tmp_path: Path, kind: str, seed: int) -> None:
    kept, held = split(shared_images(kind, tmp_path), 0.4, seed)
    assert kept
    assert held
    assert len(kept) + len(held) == 20
    assert {e.id[0] for e in kept}.isdisjoint(e.id[0] for e in held)


# Stopping and going on


class Stop(Exception):
    """Stands for whatever ends a run early."""


def stopped(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, keeper: Path, at: int, error: type[BaseException]) -> None:
    """A fit that is stopped in step ``at``."""
    made = scorer(pipe)
    step = Learner.step

    def until(self: Learner) -> float:
        if self.done + 1 == at:
            raise error
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", until)
        looks_as(patch, improving)
        with pytest.raises(error):
            fit(made, toy(6, 0), toy(6, 1), config=QUICK, prompt=PROMPT, checkpoint=keeper)
    assert is_bare(made.backbone)


@pytest.mark.parametrize(("at", "error"), [(1, KeyboardInterrupt), (3, Stop), (5, KeyboardInterrupt)])
def test_a_stopped_fit_goes_on_to_the_same_adapter(
    pipe: Pipe,
    steps_taken: tuple[Scorer, Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    error: type[BaseException],
) -> None:
    keeper = tmp_path / "state" / "fit.checkpoint"
    stopped(pipe, monkeypatch, keeper, at, error)
    assert keeper.exists() == (at > QUICK.check_every)
    made = scorer(pipe)
    steps: list[int] = []
    step = Learner.step
    looks_as(monkeypatch, improving)
    monkeypatch.setattr(Learner, "step", lambda self: (step(self), steps.append(self.done))[0])
    adapter = fit(made, toy(6, 0), toy(6, 1), config=QUICK, prompt=PROMPT, checkpoint=keeper, resume=True)
    assert steps == list(range((at - 1) // QUICK.check_every * QUICK.check_every + 1, QUICK.steps + 1))
    assert same_state(adapter, steps_taken[1])
    assert adapter.training == steps_taken[1].training
    assert adapter.scale == steps_taken[1].scale
    pairs = toy(2, 3)[0].pairs
    assert np.array_equal(made.predict(pairs), steps_taken[0].predict(pairs))
    assert [p.name for p in tmp_path.rglob("*.checkpoint*")] == ["fit.checkpoint"]
    steps.clear()  # what was learned could not be saved: it is not learned again
    again = fit(scorer(pipe), toy(6, 0), toy(6, 1), config=QUICK, prompt=PROMPT, checkpoint=keeper, resume=True)
    assert steps == []
    assert same_state(again, adapter)


def test_a_fit_stopped_while_validating_goes_on(
    pipe: Pipe, steps_taken: tuple[Scorer, Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look(scorer: Scorer) -> float:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        return improving(scorer)

    looks_as(monkeypatch, look)
    given: dict[str, Any] = {"config": QUICK, "prompt": PROMPT, "checkpoint": tmp_path / "fit.checkpoint"}
    with pytest.raises(KeyboardInterrupt):
        fit(scorer(pipe), toy(6, 0), toy(6, 1), **given)
    adapter = fit(scorer(pipe), toy(6, 0), toy(6, 1), **given, resume=True)
    assert looks == 5  # at 0, 2, 4, and then, again at 4, and at the end
    assert same_state(adapter, steps_taken[1])


@pytest.fixture(scope="module")
def checkpoint(pipe: Pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keeper = tmp_path_factory.mktemp("stopped") / "fit.checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        stopped(pipe, patch, keeper, 4, KeyboardInterrupt)
    return keeper


def relabelled() -> list[Example]:
    return [replace(e, positives=((0, 1 - e.positives[0][1]),)) for e in toy(6, 0)]


OTHER: dict[str, dict[str, Any]] = {
    "examples": {"examples": toy(6, 7)},
    "labels": {"examples": relabelled()},
    "validation examples": {"validation": toy(4, 7)},
    "fit options": {"config": replace(QUICK, learning_rate=1e-2)},
    "prompts": {"prompt": PromptConfig(rank=3)},
    "score": {"score": ScoreConfig("attention-mass", SCORE.timesteps)},
    "model": {"spec": {"seed": 5}},
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_checkpoint_of_another_request_is_refused(
    pipe: Pipe, checkpoint: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    keeper = Path(shutil.copy(checkpoint, tmp_path / "fit.checkpoint"))
    made = Scorer(load_backbone(pipe(**change.get("spec", {}))), change.get("score", SCORE))
    with pytest.raises(OptionError, match="another request") as error:
        fit(
            made,
            change.get("examples", toy(6, 0)),
            change.get("validation", toy(6, 1)),
            config=change.get("config", QUICK),
            prompt=change.get("prompt", PROMPT),
            checkpoint=keeper,
            resume=True,
        )
    assert str(keeper) in str(error.value)
    assert is_bare(made.backbone)
    assert keeper.exists()


@pytest.mark.parametrize("data", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_broken_checkpoint_is_refused(pipe: Pipe, tmp_path: Path, data: bytes) -> None:
    keeper = tmp_path / "fit.checkpoint"
    keeper.write_bytes(data)
    with pytest.raises(OptionError, match="cannot be read"):
        fit(scorer(pipe), toy(2, 0), toy(6, 1), config=QUICK, checkpoint=keeper, resume=True)


# Adapters on disk


def test_an_adapter_survives_the_disk(pipe: Pipe, taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    made, adapter = taught
    folder = adapter.save(tmp_path / "out" / "adapter")
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "reliability.png",
    }
    plain = tmp_path / "plain"
    plain.touch()  # others may read what they may read of other files
    assert {p.stat().st_mode for p in folder.iterdir()} == {plain.stat().st_mode}
    again = Adapter.load(folder)
    assert again.score == SCORE
    assert again.prompts == LESSON
    assert again.scale == adapter.scale
    assert again.training == adapter.training
    assert again.size == 16
    assert same_state(again, adapter)
    fresh = scorer(pipe)
    again.attach(fresh.backbone)
    pairs = [pair for e in toy(4, 3) for pair in e.pairs]
    assert np.array_equal(fresh.predict(pairs), made.predict(pairs))


def test_saving_replaces_an_adapter_and_nothing_else(taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    adapter = taught[1]
    folder = adapter.save(tmp_path / "a")
    replace(adapter, scale=9.0).save(folder)
    assert Adapter.load(folder).scale == 9.0
    (tmp_path / "empty").mkdir()
    adapter.save(tmp_path / "empty")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        with pytest.raises(AdapterError, match="something else"):
            adapter.save(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty", "file", "photos"]
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]


def test_saving_under_a_file(taught: tuple[Scorer, Adapter], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="file"):
        taught[1].save(tmp_path / "file" / "adapter")


def test_adapter_of_a_kept_zero_shot_score(pipe: Pipe, tmp_path: Path) -> None:
    backbone = load_backbone(pipe())
    adapter = Adapter(fingerprint(backbone), SCORE, None, {}, 16, {}, 2.0)
    again = Adapter.load(adapter.save(tmp_path / "a"))
    assert again.prompts is None
    assert again.state == {}
    again.attach(backbone)
    assert is_bare(backbone)


def test_card_says_what_it_is(taught: tuple[Scorer, Adapter], tmp_path: Path, pipe: Pipe) -> None:
    text = (taught[1].save(tmp_path / "my-adapter") / "README.md").read_text()
    assert "\n# my-adapter\n" in text
    for part in (pipe(), "`attention`", "20, 100", "rank 4", "12 to learn from (checksum ", "8 to validate (checksum "):
        assert part in text


def edit(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


BREAKS: dict[str, Callable[[Path], None]] = {
    "weights truncated": lambda f: cut(f, "adapter_model.safetensors"),
    "weights empty": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "weights missing": lambda f: (f / "adapter_model.safetensors").unlink(),
    "configuration truncated": lambda f: cut(f, "adapter_config.json"),
    "configuration empty": lambda f: (f / "adapter_config.json").write_text(""),
    "configuration missing": lambda f: (f / "adapter_config.json").unlink(),
    "configuration is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "configuration is no text": lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe\x00"),
    "another format": lambda f: edit(f, format="dsd-adapter-99"),
    "no score": lambda f: edit(f, score=None),
    "unknown score": lambda f: edit(f, score={"kind": "nonesuch"}),
    "unknown option": lambda f: edit(f, score={"nonesuch": 1}),
    "prompts of no rank": lambda f: edit(f, prompts={"rank": 0}),
    "prompts are a number": lambda f: edit(f, prompts=3),
    "base is a number": lambda f: edit(f, base=3),
    "base without figures": lambda f: edit(f, base={"name": "x"}),
    "size is text": lambda f: edit(f, size="big"),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS.keys())
def test_broken_adapter(taught: tuple[Scorer, Adapter], tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = taught[1].save(tmp_path / "a")
    damage(folder)
    with pytest.raises(AdapterError, match="expected") as error:
        Adapter.load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_adapter(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(AdapterError, match="got no adapter"):
            Adapter.load(path)


@pytest.mark.parametrize("spec", [{"seed": 1}, {"layers": 2}, {"linear": True, "seed": 1}], ids=str)
def test_adapter_for_another_base_is_refused(pipe: Pipe, taught: tuple[Scorer, Adapter], spec: dict[str, Any]) -> None:
    backbone = load_backbone(pipe(**spec))
    with pytest.raises(AdapterError, match=f"expected one for {pipe(**spec)}") as error:
        taught[1].attach(backbone)
    assert pipe() in str(error.value)
    assert is_bare(backbone)


def test_weights_that_do_not_fit_leave_the_model_bare(pipe: Pipe, taught: tuple[Scorer, Adapter]) -> None:
    backbone = load_backbone(pipe())
    adapter = replace(taught[1], state={n: v for n, v in taught[1].state.items() if "mid_block" not in n})
    with pytest.raises(AdapterError, match="mid_block"):
        adapter.attach(backbone)
    assert is_bare(backbone)


def test_authors_folder_brings_the_score_of_the_paper(pipe: Pipe, tmp_path: Path) -> None:
    backbone = load_backbone(pipe())
    state = {}
    for name in prompts.targets(backbone.denoiser, PromptConfig(attention="all")):
        layer, _, projection = name.partition(".to_")
        weight = backbone.denoiser.get_submodule(name).weight
        stem = f"{layer}.processor.to_{projection.removesuffix('.0')}_lora"
        state |= {
            f"{stem}.down.weight": torch.randn(2, weight.shape[1]),
            f"{stem}.up.weight": torch.randn(len(weight), 2),
        }
    torch.save(state, tmp_path / "pytorch_model.bin")
    adapter = Adapter.load(tmp_path)
    assert adapter.score.kind == "paper"
    assert adapter.base is None
    adapter.attach(backbone)
    assert len(prompts.parameters(backbone.denoiser)) == len(state)


# Fingerprints


def test_fingerprint_is_of_the_model_not_of_its_precision_or_prompts(pipe: Pipe) -> None:
    backbone = load_backbone(pipe())
    bare = fingerprint(backbone)
    half = fingerprint(load_backbone(pipe(), dtype=torch.float16))
    assert same_base(bare, half)
    assert same_base(json.loads(json.dumps(bare)), half)
    prompts.attach(backbone.denoiser, PROMPT)
    assert fingerprint(backbone) == bare
    for spec in ({"seed": 1}, {"layers": 2}):
        assert not same_base(bare, fingerprint(load_backbone(pipe(**spec))))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("unet/config.json", {"flip_sin_to_cos": False}),
        ("vae/config.json", {"scaling_factor": 0.5}),
    ],
)
def test_adapter_is_refused_on_a_base_that_computes_otherwise(
    pipe: Pipe, tmp_path: Path, file: str, values: dict[str, object]
) -> None:
    """The weights are the same; what is made of them is not."""
    folder = Path(shutil.copytree(pipe(), tmp_path / "model"))
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **values}))
    made, other = fingerprint(load_backbone(pipe())), load_backbone(str(folder))
    assert not same_base(made, fingerprint(other))
    adapter = Adapter(json.loads(json.dumps(made)), SCORE, None, {}, 16, {}, 2.0)
    with pytest.raises(AdapterError, match=f"with another {'abar' if 'beta_end' in values else ''}") as error:
        adapter.attach(other)
    assert "expected" in str(error.value)
    adapter.attach(load_backbone(pipe()))


def test_fingerprints_of_earlier_versions_are_still_those_of_their_base(pipe: Pipe, tmp_path: Path) -> None:
    """Those before knew no computation, and configurations grow with the versions of diffusers."""
    backbone = load_backbone(pipe())
    new = fingerprint(backbone)
    old = {k: v for k, v in new.items() if k != "computation"}
    grown = {**new, "computation": {**new["computation"], "brand_new_option": True}}
    for base in (old, grown):
        assert same_base(base, new)
        assert same_base(new, base)
        loaded = Adapter.load(Adapter(base, SCORE, None, {}, 16, {}, 2.0).save(tmp_path / "adapter"))
        loaded.attach(backbone)
