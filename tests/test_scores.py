"""Scores against plain loops and against a denoiser whose noise is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor, nn

from dsd import prompts
from dsd.backbone import Backbone, CaptionWords, TextStates, load_backbone
from dsd.contracts import ModelError, OptionError
from dsd.probe import LayerRecord, cross_attention_layers, paper_layers, select_layers
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import MIXTURE, SCORES, Pass, Score, ScoreConfig, even_timesteps, noised_pass

Pipe = Callable[..., str]
LAYERS = ("one", "two", "three")


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


def made_up(rows: int = 4, heads: Sequence[int] = (2, 3, 4), seed: int = 0) -> Pass:
    """A pass with random numbers, in layers of various numbers of heads."""
    g = torch.Generator().manual_seed(seed)
    noise, predicted = torch.randn((2, rows, 4, 3, 5), generator=g)
    records = {}
    for name, h in zip(LAYERS, heads, strict=True):
        own, rest = torch.randn((2, rows, h), generator=g)
        records[name] = LayerRecord(own, own + rest.abs(), None)
    return Pass(noise, predicted, records)


# The plain loops


def error_of(made: Pass, row: int) -> float:
    a, b = made.noise[row].numpy().ravel(), made.predicted[row].numpy().ravel()
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def mean_of(made: Pass, row: int, what: Callable[[LayerRecord], Tensor]) -> float:
    """Every layer counts the same, whatever its number of heads."""
    per_layer = [[float(v) for v in what(record)[row]] for record in made.records.values()]
    return sum(sum(values) / len(values) for values in per_layer) / len(per_layer)


LOOPS: dict[str, Callable[[Pass, Pass, int], float]] = {
    "attention": lambda c, _, i: mean_of(c, i, lambda r: r.own),
    "attention-mass": lambda c, _, i: mean_of(c, i, lambda r: r.own) - mean_of(c, i, lambda r: r.all),
    "denoising": lambda c, e, i: error_of(e, i) - error_of(c, i),
    "paper-attention": lambda c, e, i: (mean_of(c, i, lambda r: r.all) + mean_of(e, i, lambda r: r.all)) / 2,
}
LOOPS["paper"] = lambda c, e, i: LOOPS["paper-attention"](c, e, i) + LOOPS["denoising"](c, e, i)


@pytest.mark.parametrize("kind", SCORES)
def test_score_equals_a_plain_loop(kind: str) -> None:
    caption, empty = made_up(seed=1), made_up(seed=2)
    found = SCORES[kind].function(caption, empty)
    assert found.shape == (4,)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([LOOPS[kind](caption, empty, i) for i in range(4)], abs=1e-5)


def test_mass_is_a_log_share() -> None:
    assert (SCORES["attention-mass"].function(made_up(), None) <= 0).all()


def test_rows_and_join_are_inverse() -> None:
    made = made_up()
    again = Pass.join([made.rows([2]), made.rows([0, 3])])
    for row, source in enumerate([2, 0, 3]):
        assert torch.equal(again.predicted[row], made.predicted[source])
        assert torch.equal(again.noise[row], made.noise[source])
        for name in LAYERS:
            assert torch.equal(again.records[name].own[row], made.records[name].own[source])
            assert torch.equal(again.records[name].all[row], made.records[name].all[source])


# A denoiser known in closed form


class Known(Backbone):
    """Pictures are latents of their mean colour; the noise is seen right but for a tenth of the caption's length.

    ``eps(z_t, t, c) = e + gap(c)`` in every entry; ``gap`` is 1 for the empty caption and 1 - len / 10 for others,
    times ``1 + t / 100``.
    """

    name = "known"
    image_size = 8
    num_train_timesteps = 100

    def __init__(self) -> None:
        self.denoiser = nn.Linear(1, 1)
        self.device_ = torch.device("cpu")

    device = property(lambda self: self.device_)  # type: ignore[assignment]
    dtype = property(lambda self: torch.float32)  # type: ignore[assignment]

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        return 3, 2, 2

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        means = torch.tensor(np.stack([np.asarray(i, np.float32).mean((0, 1)) for i in images]))
        return means[:, :, None, None].expand(-1, 3, 2, 2) / 255

    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        words = (CaptionWords((), ()),)
        return [TextStates(torch.full((1, 1, 1), float(len(t))), torch.ones(1, 1) > 0, words) for t in texts]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.last = noise
        return latents + noise

    def predict_noise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        length = text.states[:, 0, 0]
        gap = torch.where(length > 0, 1 - length / 10, 1.0) * (1 + timesteps / 100)
        return self.last + gap[:, None, None, None]


def test_denoising_score_in_closed_form() -> None:
    """|gap| over 12 entries has the norm sqrt(12) |gap|; timesteps 0 and 50 weigh 1 and 1.5."""
    scorer = Scorer(Known(), ScoreConfig("denoising", (0, 50)))
    image = np.full((8, 8, 3), 128, np.uint8)
    found = scorer.predict([(image, "abc"), (image, "ten words."), (image, "a" * 15), (image, "a" * 30)])
    expected = [12**0.5 * 1.25 * gain for gain in (0.3, 1.0, 0.5, -1.0)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_right_denoiser_scores_the_error_of_the_empty_caption(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise told exactly under any caption, and as zero under the empty one: the score is the norm of the noise."""
    noise = torch.randn(1, 4, 8, 8)

    def predict(noised: Tensor, t: Tensor, text: TextStates) -> Tensor:
        return torch.where(text.own.any(1)[:, None, None, None], noise, 0.0).expand(noised.shape)

    monkeypatch.setattr(backbone, "predict_noise", predict)
    scorer = Scorer(backbone, ScoreConfig("denoising", (500,)), noise=noise.numpy())
    (found,) = scorer.predict([(np.zeros((9, 9, 3), np.uint8), "a dog")])
    assert found == pytest.approx(float(noise.norm()), abs=1e-5)


# Resolved over a model


def test_layers_of_each_kind(backbone: Backbone) -> None:
    network = backbone.denoiser
    for kind, of in SCORES.items():
        score = Score(backbone, ScoreConfig(kind, (5,)))
        expected = (paper_layers if kind.startswith("paper") else select_layers)(network) if of.attention else ()
        assert score.layers == expected
        assert score.needs_empty == (kind in ("denoising", "paper", "paper-attention"))
    assert Score(backbone, ScoreConfig("attention", (5,), layers=("mid_block",))).layers == select_layers(
        network, ["mid_block"]
    )


@torch.no_grad()
def test_mixture_is_the_weighted_sum(backbone: Backbone) -> None:
    """Though its terms look at other layers, and some at the empty caption."""
    weights = {"attention": 0.5, "denoising": -2.0, "paper-attention": 3.0, "attention-mass": 1.25}
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    text = TextStates.join(backbone.encode_texts(["a dog", "left of the cat"]))
    blank = TextStates.join(backbone.encode_texts(["", ""]))

    def value(config: ScoreConfig) -> Tensor:
        score = Score(backbone, config)
        caption = noised_pass(backbone, latents, noise, t, text, score.layers)
        empty = noised_pass(backbone, latents, noise, t, blank, score.empty_layers) if score.needs_empty else None
        return score(caption, empty)

    found = value(ScoreConfig(MIXTURE, (5,), weights=weights))
    expected = sum(w * value(ScoreConfig(kind, (5,))) for kind, w in weights.items())
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", SCORES)
def test_gradients_reach_the_prompts(pipe: Pipe, kind: str) -> None:
    backbone = load_backbone(pipe())
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    for parameter in prompts.parameters(backbone.denoiser).values():
        torch.nn.init.normal_(parameter, std=0.1)
    score = Score(backbone, ScoreConfig(kind, (5,)))
    latents, noise, t = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([300])
    (text,), (blank,) = backbone.encode_texts(["a dog"]), backbone.encode_texts([""])
    caption = noised_pass(backbone, latents, noise, t, text, score.layers)
    empty = noised_pass(backbone, latents, noise, t, blank, score.empty_layers) if score.needs_empty else None
    score(caption, empty).sum().backward()
    learned = prompts.parameters(backbone.denoiser)
    reached = {name for name, p in learned.items() if p.grad is not None and p.grad.abs().max() > 0}
    if SCORES[kind].empty and kind != "paper-attention":  # the prediction depends on every prompt
        assert reached == set(learned)
    else:  # what comes after the last layer that is looked at does not matter
        last = f"{score.layers[-1]}.to_q"
        assert {f"{last}.lora_A.weight", f"{last}.lora_B.weight"} <= reached
        assert f"{score.layers[-1]}.to_v.lora_A.weight" not in reached
    for name, parameter in backbone.denoiser.named_parameters():
        assert ".lora_" in name or parameter.grad is None


# Configurations


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kind": "nonesuch"}, "nonesuch"),
        ({"kind": MIXTURE}, "weights"),
        ({"kind": MIXTURE, "weights": {}}, "weights"),
        ({"kind": MIXTURE, "weights": {"nonesuch": 1.0}}, "nonesuch"),
        ({"kind": "denoising", "weights": {"attention": 1.0}}, "weights"),
        ({"timesteps": ()}, "no timesteps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_configuration(options: dict[str, object], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        ScoreConfig(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("timesteps", [(1000,), (-1,), (5, 10**9)])
def test_timesteps_outside_the_grid(backbone: Backbone, timesteps: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=str(timesteps[-1])):
        Score(backbone, ScoreConfig(timesteps=timesteps))


@pytest.mark.parametrize("kind", [k for k, of in SCORES.items() if of.attention])
def test_attention_needs_cross_attention(kind: str) -> None:
    with pytest.raises(ModelError, match="cross-attention"):
        Score(Known(), ScoreConfig(kind, (5,)))


@pytest.mark.parametrize(
    "config",
    [
        ScoreConfig(),
        ScoreConfig("attention", (1, 2), ("mid_block",), seed=7),
        ScoreConfig(MIXTURE, (9,), weights={"attention": 0.5, "denoising": 2.0}),
    ],
)
def test_configuration_survives_json(config: ScoreConfig) -> None:
    import json

    assert ScoreConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_even_timesteps() -> None:
    assert even_timesteps(1) == (500,)
    assert even_timesteps(4) == (125, 375, 625, 875)
    assert even_timesteps(3, 100, 400) == (150, 250, 350)
    assert even_timesteps(1000) == tuple(range(1000))
    for steps in (0, 1001, -3):
        with pytest.raises(OptionError, match=str(steps)):
            even_timesteps(steps)


def test_every_cross_attention_layer_is_looked_at_by_default(backbone: Backbone) -> None:
    assert set(Score(backbone, ScoreConfig("attention", (5,))).layers) == set(cross_attention_layers(backbone.denoiser))
