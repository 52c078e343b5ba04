"""What every family must do, on small pipelines of the real classes; a new one joins by a line in ``models.KINDS``.

Oracles: the stock pipeline's own first step, and attention computed anew in double precision from the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import models
from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import FAMILIES, Backbone, TextStates
from dsd.backbone.latent import Flow
from dsd.contracts import AdapterError, ModelError, OptionError, TextError
from dsd.explain import explain
from dsd.explanation import ExplainConfig
from dsd.matcher import Matcher
from dsd.probe import Probe, cross_attention_layers, projections, select_layers, unheard
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import Score, ScoreConfig, noised_pass
from models import KINDS, PIXELS, picture

CAPTION, OTHER = "a red circle left of a dog", "cat"
WORDS = ("circle", "cat")
"""Words of these captions."""
LONG = " ".join(["a red circle left of the blue square and a green dog, right"] * 42)
"""More tokens than any encoder takes at once."""
STEPS = (153, 617)
MAPS = ExplainConfig("attention", timesteps=STEPS, draws=1, words=False)
JOINT = ("sd3", "sd3-without-t5", "sd35", "flux-schnell", "flux-dev")
MASKED = ("pixart-alpha", "pixart-sigma")
TEXTUAL = [kind for kind in KINDS if kind != "dit"]

every = pytest.mark.parametrize("kind", KINDS)
textual = pytest.mark.parametrize("kind", TEXTUAL)
joint = pytest.mark.parametrize("kind", JOINT)

stock = cache(models.pipeline)


@cache
def backbone_of(kind: str) -> Backbone:
    return models.backbone_of(stock(kind))


@pytest.fixture
def backbone(kind: str) -> Iterator[Backbone]:
    made = backbone_of(kind)
    yield made
    prompts.detach(made.denoiser)


def captions(kind: str) -> tuple[str, str]:
    return ("dog", "3") if kind == "dit" else (CAPTION, OTHER)


def pairs(kind: str) -> list[tuple[Any, str]]:
    return [(picture(i), text) for i in range(2) for text in captions(kind)]


def score_of(kind: str) -> str:
    return "denoising" if kind == "dit" else "attention"


def scorer(backbone: Backbone, kind: str, **options: Any) -> Scorer:
    values = {"kind": score_of(kind), "timesteps": STEPS} | options.pop("score", {})
    return Scorer(backbone, ScoreConfig(**values), **{"size": PIXELS} | options)


def texts_of(backbone: Backbone, kind: str, count: int = 2) -> TextStates:
    found = backbone.encode_texts((captions(kind) * count)[:count])
    return TextStates.join(found)


def inputs(backbone: Backbone, kind: str, count: int = 2) -> tuple[Tensor, Tensor, TextStates]:
    noised = torch.randn(count, *backbone.latent_shape(PIXELS))
    return noised, torch.tensor((STEPS * count)[:count]), texts_of(backbone, kind, count)


def prompt_config(kind: str, **options: Any) -> PromptConfig:
    return PromptConfig(**{"rank": 2, "attention": "self" if kind == "dit" else "all"} | options)


def randomise(denoiser: nn.Module, scale: float = 0.2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    values = {name: scale * torch.randn(p.shape, generator=g) for name, p in prompts.parameters(denoiser).items()}
    prompts.load_state(denoiser, values)
    return values


def hooks(module: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    return [(name, kind, list(getattr(m, kind))) for name, m in module.named_modules() for kind in kinds]


# The contract


def test_every_family_is_here() -> None:
    assert {type(backbone_of(kind)) for kind in KINDS} == set(FAMILIES)
    listed = [name for family in FAMILIES for name in family.pipelines]
    assert len(listed) == len(set(listed))


@every
def test_components_are_those_of_the_stock_pipeline(kind: str) -> None:
    family, made = type(backbone_of(kind)), stock(kind)
    assert type(made).__name__ in family.pipelines
    assert set(family.components) <= made.components.keys()
    assert set(family.optional_components) <= made.components.keys()
    missing = dict.fromkeys(family.components)
    with pytest.raises(TypeError):
        family("x", **{k: v for k, v in missing.items() if k != family.components[0]})


@every
def test_networks_are_frozen(kind: str) -> None:
    for part in stock(kind).components.values():
        if isinstance(part, nn.Module):
            assert backbone_of(kind)
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())


@every
def test_latents_are_as_the_decoder_expects_them(kind: str, backbone: Backbone) -> None:
    """The stock pipelines decode ``latents / scale + shift``."""
    config = backbone.vae.config
    pixels = torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = backbone.vae.encode(pixels).latent_dist.mean
    found = backbone.encode_images([picture(0)])
    assert found.dtype == torch.float32
    assert torch.allclose(found / config.scaling_factor + (config.shift_factor or 0), mean, atol=1e-5)


@every
def test_default_timesteps(kind: str, backbone: Backbone) -> None:
    """As much noise for signal as Stable Diffusion has at its own."""
    ones = torch.ones(4, 1, *backbone.latent_shape(backbone.image_size)[1:])
    t = torch.tensor(backbone.timesteps)
    noise, signal = (backbone.add_noise(*v, t)[:, 0, 0, 0] for v in ((0 * ones, ones), (ones, 0 * ones)))
    assert list(backbone.timesteps) == sorted(set(backbone.timesteps))
    if isinstance(backbone.schedule, Flow):
        sd = backbone_of("sd1")
        ones, t = torch.ones(4, 1, 1, 1), torch.tensor(sd.timesteps)
        expected = sd.add_noise(0 * ones, ones, t) / sd.add_noise(ones, 0 * ones, t)
        assert torch.allclose(noise / signal, expected[:, 0, 0, 0], rtol=0.02)
    else:
        assert backbone.timesteps == (189, 389, 589, 789)


# The noised pass


class Stop(Exception):
    """Ends a stock pipeline after its first pass."""


def first_pass(made: DiffusionPipeline, denoiser: nn.Module, **call: Any) -> tuple[Tensor, dict[str, Any], Tensor]:
    """(latents, other arguments, output) of the denoiser in a stock pipeline's first step."""
    seen: list[Any] = []

    def hook(_module: nn.Module, positional: Any, named: Any, output: Any) -> None:
        values = dict(named)
        latents = positional[0] if positional else values.pop("hidden_states")
        if len(positional) > 1:
            values["timestep"] = positional[1]
        seen.append((latents, values, output[0] if isinstance(output, tuple) else output.sample))
        raise Stop

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(Stop):
            made(output_type="latent", **call)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of the stock schedulers, by NumPy 2
@every
def test_pass_is_the_stock_pipelines(kind: str, backbone: Backbone) -> None:
    """The caption's pass, and without any caption where the pipeline makes one, in one call of the stock pipeline."""
    made, text = stock(kind), captions(kind)[0]
    latents = torch.randn(1, *backbone.latent_shape(PIXELS))
    t = 389
    call: dict[str, Any] = {"prompt": text, "height": PIXELS, "width": PIXELS, "guidance_scale": 3.0}
    if kind == "dit":
        call = {"class_labels": [1], "guidance_scale": 3.0}
    elif kind.startswith("flux"):
        call["guidance_scale"] = 1.0
        call["max_sequence_length"] = backbone.encode_texts([text])[0].states.shape[1]
    elif kind == "sd-lcm":
        call["guidance_scale"] = 1.0
    elif kind.startswith("pixart"):
        call |= {"clean_caption": False, "use_resolution_binning": False}
    if isinstance(backbone.schedule, Flow):
        call |= {"sigmas": [(t + 1) / 1000, 0.1]}
    else:
        call["num_inference_steps"] = 3
    if kind.startswith("flux"):
        call["latents"] = made._pack_latents(latents, *latents.shape)
    elif kind != "dit":
        call["latents"] = latents
    given, told, out = first_pass(made, backbone.denoiser, **call)
    if kind.startswith("flux"):
        assert torch.equal(given, call["latents"])
        out = made._unpack_latents(out, PIXELS, PIXELS, made.vae_scale_factor)
        given = latents
    n = len(given)
    if isinstance(backbone.schedule, Flow):
        # noised as the stock scheduler does it
        noise = torch.randn_like(latents)
        s = made.scheduler.sigmas[0]
        timesteps = torch.tensor([t])
        assert torch.allclose(backbone.add_noise(latents, noise, timesteps), (1 - s) * latents + s * noise, atol=1e-6)
        expected = given + (1 - s) * out  # noise out of velocity
        assert torch.allclose(torch.as_tensor(told["timestep"]).reshape(-1)[0] * (1000 if n == 1 else 1), 1000 * s)
    else:
        timesteps = torch.as_tensor(told["timestep"]).reshape(-1)[:1].long()
        out = out[:, : given.shape[1]]
        a = made.scheduler.alphas_cumprod[timesteps]
        expected = a.sqrt() * out + (1 - a).sqrt() * given if kind == "sd2" else out
    order = {"dit": [text, ""]}.get(kind, ["", text]) if n == 2 else [text]
    states = TextStates.join(backbone.encode_texts(order))
    with torch.no_grad():
        found = backbone.predict_noise(given, timesteps.expand(n), states)
    assert n == (1 if call["guidance_scale"] == 1.0 else 2)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("sd3", "flux"))])
@pytest.mark.parametrize("timestep", [0, 400, 998])
def test_velocity_becomes_the_noise(
    kind: str, backbone: Backbone, timestep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A denoiser that is right about the velocity gives the noise that was added."""
    latents, noise = torch.randn(2, 2, *backbone.latent_shape(PIXELS))
    monkeypatch.setattr(backbone, "_denoise", lambda *_: noise - latents)
    t = torch.tensor([timestep, 20])
    noised = backbone.add_noise(latents, noise, t)
    assert torch.allclose(backbone.predict_noise(noised, t, texts_of(backbone, kind)), noise, atol=1e-5)


@joint
def test_timesteps_are_the_schedulers_own(kind: str, backbone: Backbone) -> None:
    """The grid is the stock scheduler's training grid."""
    made = deepcopy(stock(kind).scheduler)
    positions = (backbone.latent_shape(PIXELS)[1] // 2) ** 2
    if made.config.use_dynamic_shifting:
        mu = 0.5 + (1.15 - 0.5) * (positions - 4) / 60
        made.set_timesteps(sigmas=np.linspace(1, 0.001, 1000), mu=mu)
    else:
        made = type(made)(**{k: v for k, v in made.config.items() if not k.startswith("_")})
    ones = torch.ones(1000, 1, *backbone.latent_shape(PIXELS)[1:])
    found = backbone.add_noise(0 * ones, ones, torch.arange(1000))[:, 0, 0, 0]
    assert torch.allclose(found, made.sigmas[:1000].flip(0).float(), atol=1e-5)
    told = backbone.schedule.told(torch.arange(1000), ones)
    assert torch.allclose(told, made.timesteps.flip(0).float(), atol=1e-2)


# Scores against full logits in double precision


@contextmanager
def listened(denoiser: nn.Module) -> Iterator[dict[str, tuple[dict[str, Any], Any]]]:
    """(arguments, output) of every layer that attends to the text, by name."""
    heard: dict[str, tuple[dict[str, Any], Any]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, positional: Any, named: Any, output: Any) -> None:
            heard[name] = (dict(zip(("hidden_states",), positional, strict=False)) | named, output)

        return hook

    layers = cross_attention_layers(denoiser)
    handles = [m.register_forward_hook(listen(n), with_kwargs=True) for n, m in layers.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def linear(module: nn.Module, x: Tensor) -> Tensor:
    out = x @ module.weight.double().T
    return out if module.bias is None else out + module.bias.double()


def split(layer: Any, x: Tensor, norm: str) -> Tensor:
    """(n, length, heads * d) => (n, heads, length, d), normed by its root mean square if the layer does so."""
    x = x.reshape(*x.shape[:2], layer.heads, -1).permute(0, 2, 1, 3)
    module = getattr(layer, norm, None)
    if module is None:
        return x
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight.double()


def turned(x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Neighbouring numbers as complex ones, times ``cos + i sin``."""
    if rotary is None:
        return x
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    cosine, sine = (r.double()[:, ::2] for r in rotary)
    return torch.view_as_real(pairs * torch.complex(cosine, sine)).flatten(-2)


def full(layer: Any, heard: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a layer, of all that attend by all that is attended to; values; what is added as a mask."""
    image, text = heard["hidden_states"].double(), heard.get("encoder_hidden_states")
    added = 0.0
    if hasattr(layer, "is_cross_attention") and layer.is_cross_attention:
        text = text.double()
        q = split(layer, linear(layer.to_q, image), "norm_q")
        k = split(layer, linear(layer.to_k, text), "norm_k")
        v = split(layer, linear(layer.to_v, text), "none")
        mask = heard.get("attention_mask")
        added = 0.0 if mask is None else mask.double()[:, None]
        return q @ k.mT / q.shape[-1] ** 0.5, v, added
    q, k, v = (
        split(layer, linear(getattr(layer, f"to_{x}"), image), f"norm_{x}" if x != "v" else "none") for x in "qkv"
    )
    if text is not None:
        others = (
            split(
                layer,
                linear(getattr(layer, f"add_{x}_proj"), text.double()),
                f"norm_added_{x}" if x != "v" else "none",
            )
            for x in "qkv"
        )
        q, k, v = (torch.cat(both, 2) for both in zip(others, (q, k, v), strict=True))
    rotary = heard.get("image_rotary_emb")
    q, k = turned(q, rotary), turned(k, rotary)
    return q @ k.mT / q.shape[-1] ** 0.5, v, added


def brute(
    backbone: Backbone, latents: Tensor, noise: Tensor, t: Tensor, text: TextStates
) -> dict[str, dict[str, Tensor]]:
    """(own, all) by direction, the mean over layers and heads, of one row; checks the logits by the layers' output."""
    with torch.no_grad(), listened(backbone.denoiser) as heard:
        backbone.predict_noise(backbone.add_noise(latents, noise, t), t, text)
    assert heard
    own, tokens = text.own[0], text.own.shape[1]
    seen = torch.ones_like(own) if text.mask is None else text.mask[0]
    found: dict[str, dict[str, list[Tensor]]] = {d: {"own": [], "all": []} for d in ("image", "text")}
    for name, layer in cross_attention_layers(backbone.denoiser).items():
        arguments, output = heard[name]
        logits, values, added = full(layer, arguments, tokens)
        made = ((logits + added).softmax(-1) @ values).transpose(1, 2).flatten(2)
        if isinstance(output, tuple):
            output, image = output[0], made[:, tokens:]
        else:
            image = made
        if getattr(layer, "to_out", None) is not None:
            image = linear(layer.to_out[0], image)
        assert (image - output).abs().max() < 1e-4, name
        if logits.shape[-1] == tokens:
            block = logits[0]
        else:
            block = logits[0, :, tokens:, :tokens]
            back = logits[0, :, :tokens][:, own]
            found["text"]["own"].append(back[..., tokens:].logsumexp(-1).mean())
            found["text"]["all"].append(back.logsumexp(-1).mean())
        found["image"]["own"].append(block[..., own].logsumexp(-1).mean())
        found["image"]["all"].append(block[..., seen].logsumexp(-1).mean())
    return {d: {w: torch.stack(v).mean() for w, v in by.items() if v} for d, by in found.items()}


@textual
@pytest.mark.parametrize("caption", [CAPTION, LONG[:400]], ids=["short", "long"])
def test_score_is_that_of_full_logits(kind: str, backbone: Backbone, caption: str) -> None:
    made = scorer(backbone, kind)
    image = picture(3)
    (latents,), (text,) = made.latents([image]), made.texts([caption])
    rows = [
        brute(backbone, latents[None], noise[None], torch.tensor([t]), text)
        for noise, t in zip(made.noise, STEPS, strict=True)
    ]
    for direction in ("image", "text") if kind in JOINT else ("image",):
        own, seen = (np.mean([float(row[direction][w]) for row in rows]) for w in ("own", "all"))
        for name, expected in (("attention", own), ("attention-mass", own - seen)):
            made.use(ScoreConfig(name, STEPS, direction=direction))
            (found,) = made.predict([(image, caption)])
            assert found == pytest.approx(expected, abs=1e-4), (name, direction)
    assert own < seen


@every
def test_denoising_score_is_that_of_the_noise(kind: str, backbone: Backbone) -> None:
    made = scorer(backbone, kind, score={"kind": "denoising"})
    image, text = picture(3), captions(kind)[0]
    z = made.latents([image])
    expected = []
    for noise, t in zip(made.noise, STEPS, strict=True):
        errors = []
        for words in ("", text):
            with torch.no_grad():
                noised, step = backbone.add_noise(z, noise[None], torch.tensor([t])), torch.tensor([t])
                predicted = backbone.predict_noise(noised, step, backbone.encode_texts([words])[0])
            errors.append(float((noise - predicted[0]).double().square().sum().sqrt()))
        expected.append(errors[0] - errors[1])
    assert made.predict([(image, text)])[0] == pytest.approx(np.mean(expected), abs=1e-4)
    assert abs(np.mean(expected)) > 1e-3


# Rows do not depend on each other, nor on padding


@every
def test_a_score_does_not_depend_on_the_batch(kind: str, backbone: Backbone) -> None:
    for name in dict.fromkeys((score_of(kind), "denoising")):
        together = scorer(backbone, kind, score={"kind": name}, batch_size=16).predict(pairs(kind))
        alone = [scorer(backbone, kind, score={"kind": name}, batch_size=1).predict([p])[0] for p in pairs(kind)]
        assert np.abs(together - alone).max() < 1e-5
        assert np.ptp(together) > 1e-4


@every
def test_it_is_deterministic(kind: str, backbone: Backbone) -> None:
    first = scorer(backbone, kind).predict(pairs(kind))
    again = scorer(models.backbone_of(models.pipeline(kind)), kind).predict(pairs(kind))
    assert np.array_equal(first, again)


@every
def test_candidates_share_noise_and_timesteps(kind: str, backbone: Backbone) -> None:
    seen: list[Tensor] = []

    def hook(_module: nn.Module, positional: Any, named: Any) -> None:
        seen.append(positional[0] if positional else named["hidden_states"])

    handle = backbone.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    made = scorer(backbone, kind, batch_size=1)
    made.predict([(picture(0), text) for text in captions(kind)])
    handle.remove()
    passes = seen[-2 * len(STEPS) :]  # without those of the empty caption
    assert all(torch.equal(passes[i], passes[i + len(STEPS)]) for i in range(len(STEPS)))
    assert not torch.equal(passes[0], passes[1])
    other = scorer(backbone, kind, score={"seed": 1})
    assert not torch.equal(made.noise, other.noise)


@textual
def test_own_tokens_are_the_captions(kind: str, backbone: Backbone) -> None:
    """Neither start, nor end, nor padding, in every tokenizer; and each of them in a word."""
    for text in (CAPTION, "zebra, 2 dogs!", LONG):
        (states,) = backbone.encode_texts([text])
        expected = 0
        for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            words = getattr(backbone, part, None)
            if words is None or (kind.startswith("sdxl") and part == "tokenizer_2"):
                continue
            if (kind.startswith("flux") and part == "tokenizer") or (kind.startswith("sd3") and part == "tokenizer_2"):
                continue  # one for the pooled output alone; the other's states lie beside those of the first
            expected += len(words(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)
        assert int(states.own.sum()) == expected
        assert states.mask is None or bool((states.mask | ~states.own).all())
        (words,) = states.words
        of_words = {i for tokens in words.tokens for i in tokens}
        assert of_words == set(states.own[0].nonzero().flatten().tolist())
        assert [w for w in words.spelling if w.isalpha()] == [
            w for w in text.replace(",", "").replace("!", "").split() if w.isalpha()
        ]


@pytest.mark.parametrize("kind", MASKED)
def test_padding_changes_nothing(kind: str, backbone: Backbone) -> None:
    noised, t, text = inputs(backbone, kind)
    assert text.mask is not None
    length = int(text.mask.sum(1).max())

    def padded(tokens: int) -> TextStates:
        extra = max(0, tokens - text.states.shape[1])
        states = torch.cat([text.states, torch.randn(2, extra, text.states.shape[2])], 1)[:, :tokens]
        mask, own = (
            torch.cat([m, torch.zeros(2, extra, dtype=torch.bool)], 1)[:, :tokens] for m in (text.mask, text.own)
        )
        states = torch.where(mask[..., None], states, 7 * torch.randn_like(states))
        return TextStates(states, own, text.words, text.pooled, mask)

    results = []
    for variant in (text, padded(length), padded(text.states.shape[1]), padded(text.states.shape[1] + 9)):
        layers = select_layers(backbone.denoiser)
        with torch.no_grad(), Probe(backbone.denoiser, layers, variant.own, variant.mask) as probe:
            out = backbone.predict_noise(noised, t, variant)
        records = [torch.stack([r.own, r.all]) for r in probe.records.values()]
        results.append((out, torch.stack(records)))
    for out, records in results[1:]:
        assert (out - results[0][0]).abs().max() < 1e-5
        assert (records - results[0][1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", MASKED)
def test_padding_changes_nothing_in_the_text_encoder(kind: str, backbone: Backbone) -> None:
    (text,) = backbone.encode_texts([CAPTION])
    assert text.mask is not None
    ids = backbone.tokenizer(CAPTION, return_tensors="pt").input_ids
    with torch.no_grad():
        states = backbone.text_encoder(ids)[0]
    assert torch.allclose(text.states[text.mask], states[0], atol=1e-5)


@textual
def test_long_captions_lose_nothing(kind: str, backbone: Backbone) -> None:
    (short,), (long,) = backbone.encode_texts([CAPTION]), backbone.encode_texts([LONG])
    assert long.states.shape[1] > short.states.shape[1]
    assert long.states.shape[2] == short.states.shape[2]
    assert long.own.sum() > 20 * short.own.sum()
    made = scorer(backbone, kind)
    a, b = made.predict([(picture(0), LONG), (picture(0), LONG + " cat")])
    assert np.isfinite([a, b]).all()
    assert abs(a - b) > 1e-6


@every
@pytest.mark.parametrize("size", [17, 22])
def test_odd_sizes(kind: str, backbone: Backbone, size: int) -> None:
    shape = backbone.latent_shape(size)
    assert tuple(backbone.encode_images([picture(0, size)]).shape[1:]) == shape
    found = scorer(backbone, kind, size=size, score={"kind": "denoising"}).predict(pairs(kind)[:2])
    assert np.isfinite(found).all()
    if kind != "dit":
        made = scorer(backbone, kind, size=size)
        assert np.isfinite(made.predict(pairs(kind)[:2])).all()
        maps = explain(made, picture(0), CAPTION, config=MAPS).maps
        assert maps.shape == (7, size, size)
        assert np.isfinite(maps).all()
        assert maps.max() > 0


def test_a_class_has_no_words_to_show() -> None:
    made = Matcher(backbone_of("dit"), size=PIXELS)
    assert not made.explains
    assert made.explain(picture(0), pairs("dit")[0][1], config=replace(MAPS, method="agreement")).maps.size == 0
    assert Matcher(backbone_of("sd1")).explains


@joint
def test_maps_of_the_text_asking(kind: str, backbone: Backbone) -> None:
    made = scorer(backbone, kind, score={"direction": "text"})
    maps = explain(made, picture(0), CAPTION, config=MAPS).maps
    assert maps.shape == (7, PIXELS, PIXELS)
    assert np.isfinite(maps).all()
    assert maps.max() > 0


def test_sizes_that_a_model_cannot_take() -> None:
    with pytest.raises(OptionError, match="at least 4"):
        backbone_of("flux-dev").latent_shape(3)
    with pytest.raises(OptionError, match="at most 48"):
        backbone_of("sd3").latent_shape(52)
    assert backbone_of("sd3").latent_shape(48) == (4, 24, 24)


@every
def test_half_precision(kind: str, backbone: Backbone) -> None:
    made = models.pipeline(kind).to(torch.bfloat16)
    half = models.backbone_of(made)
    assert half.dtype == torch.bfloat16
    for name in dict.fromkeys((score_of(kind), "denoising")):
        a, b = (scorer(x, kind, score={"kind": name}).predict(pairs(kind)) for x in (backbone, half))
        assert a.dtype == b.dtype == np.float32
        assert np.abs(a - b).max() < 0.03 * max(1, np.abs(a).max())
    noised, t, text = inputs(half, kind)
    assert half.predict_noise(noised, t, text).dtype == torch.float32


@pytest.mark.parametrize("kind", ["sdxl", "pixart-sigma", "sd1"])
def test_a_vae_that_overflows_in_float16_is_left_in_float32(kind: str) -> None:
    made = models.backbone_of(models.pipeline(kind).to(torch.float16))
    assert made.dtype == torch.float16
    assert made.vae.dtype == (torch.float16 if kind == "sd1" else torch.float32)
    assert made.encode_images([picture(0)]).isfinite().all()


# The probe


@textual
def test_maps_are_probabilities(kind: str, backbone: Backbone) -> None:
    noised, t, text = inputs(backbone, kind)
    layers = select_layers(backbone.denoiser)
    for direction, axis in (("image", -1), ("text", -2)) if kind in JOINT else (("image", -1),):
        with (
            torch.no_grad(),
            Probe(backbone.denoiser, layers, text.own, text.mask, direction=direction, maps=True) as probe,
        ):
            backbone.predict_noise(noised, t, text)
        for record in probe.records.values():
            assert record.maps is not None
            assert record.maps.shape[2] == text.own.shape[1]
            assert torch.allclose(record.maps.sum(axis), torch.ones(()), atol=1e-5)
            if text.mask is not None:
                assert not record.maps.mT[~text.mask].any()


@textual
@pytest.mark.parametrize("gradients", [False, True], ids=["scoring", "learning"])
def test_slices_give_the_same(kind: str, backbone: Backbone, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    noised, t, text = inputs(backbone, kind)
    noised.requires_grad_(gradients)
    layers = select_layers(backbone.denoiser)
    for direction in ("image", "text") if kind in JOINT else ("image",):
        found = []
        for size in (Probe.SLICE, 3000):
            monkeypatch.setattr(Probe, "SLICE", size)
            with (
                torch.set_grad_enabled(gradients),
                Probe(backbone.denoiser, layers, text.own, text.mask, direction=direction) as probe,
            ):
                backbone.predict_noise(noised, t, text)
            records = torch.stack([torch.stack([r.own.mean(), r.all.mean()]) for r in probe.records.values()])
            found.append((records, torch.autograd.grad(records.sum(), noised)[0] if gradients else records))
            assert records.requires_grad == gradients
        assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
        assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
        monkeypatch.undo()


@joint
def test_no_more_logits_than_a_slice(kind: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what operations return while records are made, nothing is larger."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    noised, t, text = inputs(backbone, kind)
    limit = 8000
    monkeypatch.setattr(Probe, "SLICE", limit)
    with torch.no_grad(), Probe(backbone.denoiser, select_layers(backbone.denoiser), text.own) as probe:
        settle = probe._settle

        def watched(name: str) -> None:
            # the keys and queries themselves, in float32
            nonlocal largest
            with Watch():
                settle(name)

        monkeypatch.setattr(probe, "_settle", watched)
        backbone.predict_noise(noised, t, text)
    heads, tokens = next(iter(probe.records.values())).own.shape[1], text.own.shape[1]
    positions = (backbone.latent_shape(PIXELS)[1] // 2) ** 2
    assert 2 * heads * positions * tokens > limit  # the whole would be
    width = max(p.shape[-1] for p in backbone.denoiser.parameters() if p.ndim == 1)
    assert largest <= max(limit, 2 * (tokens + positions) * width)


@textual
@torch.no_grad()
def test_a_pass_ends_after_the_last_layer_that_is_looked_at(kind: str, backbone: Backbone) -> None:
    """With the same records as a whole pass, and a model that is as it was."""
    noised, t, text = inputs(backbone, kind)
    noise, before = torch.randn_like(noised), hooks(backbone.denoiser)
    known = select_layers(backbone.denoiser)
    ran: list[nn.Module] = []
    last = backbone.denoiser.register_forward_hook(lambda module, *_: ran.append(module))
    for layers in (known, known[:1]):
        for direction in ("image", "text") if kind in JOINT else ("image",):
            values = (backbone, noised, noise, t, text, layers, direction)
            whole = noised_pass(*values)
            assert len(ran) == 1
            short = noised_pass(*values, over="own", predict=False)
            assert len(ran) == 1
            assert short.predicted is None
            assert list(short.records) == list(layers)
            for name in layers:
                assert short.records[name].all is None
                assert torch.allclose(short.records[name].own, whole.records[name].own, atol=1e-5)
            ran.clear()
    last.remove()
    assert hooks(backbone.denoiser) == before


@pytest.mark.filterwarnings("default")  # what compilers warn of is not ours
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd35", "flux-dev", "pixart-sigma"])
def test_what_nothing_listens_to_is_compiled_once(kind: str) -> None:
    made = models.backbone_of(deepcopy(stock(kind)))
    inside = {id(m) for part in unheard(made.denoiser) for m in part.modules()}
    heard = {id(m) for layer in cross_attention_layers(made.denoiser).values() for m in layer.modules()}
    assert inside
    assert not inside & heard
    made_by = {name: scorer(made, kind, score={"kind": name}) for name in ("attention", "attention-mass", "denoising")}
    expected = {name: s.predict(pairs(kind)) for name, s in made_by.items()}
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    made_by["denoising"].compile(backend="eager")  # the denoiser, which is theirs all
    for name, by in made_by.items():
        found = by.predict(pairs(kind))
        graphs = counters["unique_graphs"]
        assert graphs
        assert found == pytest.approx(expected[name], abs=1e-5)
        # other listeners come and go, and nothing is compiled anew for them
        assert by.predict(pairs(kind)) == pytest.approx(found, abs=1e-6)
        assert counters["unique_graphs"] == graphs
    torch._dynamo.reset()


@every
@torch.no_grad()
def test_a_caption_is_projected_once_for_all_rows_under_it(kind: str, backbone: Backbone) -> None:
    noised, t, text = inputs(backbone, kind, 3)
    noise, before = torch.randn_like(noised), hooks(backbone.denoiser)
    layers = () if kind == "dit" else select_layers(backbone.denoiser)
    captions = [2, 0, 2]
    seen: list[int] = []

    def count(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
        seen.append(len(inputs[0]))

    crossed = [] if kind in JOINT else [backbone.denoiser.get_submodule(name) for name in layers]
    handles = [m.register_forward_hook(count) for layer in crossed for m in (layer.to_k, layer.to_v)]
    once = noised_pass(backbone, noised, noise, t, text, layers, captions=captions)
    assert seen == [2] * len(handles)
    each = noised_pass(backbone, noised, noise, t, text.select(captions), layers)
    for handle in handles:
        handle.remove()
    assert torch.allclose(once.predicted, each.predicted, atol=1e-5)
    for name in layers:
        assert torch.allclose(once.records[name].own, each.records[name].own, atol=1e-5)
        assert torch.allclose(once.records[name].all, each.records[name].all, atol=1e-5)
    assert hooks(backbone.denoiser) == before


@every
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_everything_is_restored_after_errors(kind: str, backbone: Backbone, error: type[BaseException]) -> None:
    values = inputs(backbone, kind)
    before, bare = hooks(backbone.denoiser), backbone.predict_noise(*values)
    layers = [] if kind == "dit" else list(select_layers(backbone.denoiser))

    def fail(*_: Any) -> None:
        raise error("stop")

    attention = list(projections(backbone.denoiser))
    handle = backbone.denoiser.get_submodule(attention[-1]).register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        noised_pass(backbone, values[0], torch.randn_like(values[0]), *values[1:], layers)
    handle.remove()
    assert hooks(backbone.denoiser) == before
    assert torch.equal(backbone.predict_noise(*values), bare)
    if layers:
        with Probe(backbone.denoiser, layers, values[2].own, values[2].mask, maps=True):
            assert hooks(backbone.denoiser) != before
            assert torch.equal(backbone.predict_noise(*values), bare)
        assert hooks(backbone.denoiser) == before


def test_directions_that_there_are_not() -> None:
    for kind in ("sd1", "sdxl", "pixart-sigma"):
        with pytest.raises(OptionError, match="joint attention"):
            Score(backbone_of(kind), ScoreConfig("attention", direction="text"))
    for direction in ("image", "text"):
        config = ScoreConfig("attention", direction=direction)
        assert ScoreConfig.from_dict(config.to_dict()) == config
    with pytest.raises(OptionError, match="expected one of image, text"):
        ScoreConfig("attention", direction="both")
    for kind in JOINT:
        with pytest.raises(ModelError, match="down, mid and up blocks"):
            Score(backbone_of(kind), ScoreConfig("paper"))


# Prompts


def gradients(backbone: Backbone, kind: str, values: tuple[Tensor, Tensor, TextStates]) -> dict[str, Tensor | None]:
    latents, t, text = values
    terms = {"denoising": 1.0} if kind == "dit" else {"denoising": 1.0, "attention": 1.0}
    score = Score(backbone, ScoreConfig("mixture", weights=terms))
    noise = torch.ones_like(latents)
    blank = backbone.encode_texts([""])[0].select([0] * len(text))
    empty = noised_pass(backbone, latents, noise, t, blank, score.empty_layers)
    scores = score(noised_pass(backbone, latents, noise, t, text, score.layers), empty)
    learned = prompts.parameters(backbone.denoiser)
    weights = torch.tensor([1.0, -2.0])
    found = torch.autograd.grad((weights * scores).sum(), list(learned.values()), allow_unused=True)
    return dict(zip(learned, found, strict=True))


@every
def test_gradients_reach_every_prompt_also_under_checkpointing(kind: str, backbone: Backbone) -> None:
    prompts.attach(backbone.denoiser, prompt_config(kind, **({} if kind == "dit" else {"tokens": 2, "words": WORDS})))
    randomise(backbone.denoiser)
    values = inputs(backbone, kind)
    found = gradients(backbone, kind, values)
    assert found
    backbone.denoiser.enable_gradient_checkpointing()
    try:
        again = gradients(backbone, kind, values)
    finally:
        backbone.denoiser.disable_gradient_checkpointing()
    last = max((n for n in projections(backbone.denoiser) if n.endswith(".attn")), default="")
    for name, gradient in found.items():
        if kind.startswith("sd3") and name.startswith(f"{last}.add_q_proj"):
            continue  # what the text asks in the last block goes nowhere
        assert gradient is not None, name
        assert gradient.abs().max() > 1e-6, name
        other = again[name]
        assert other is not None
        assert (gradient - other).abs().max() < 1e-5 * max(1, gradient.abs().max()), name


@textual
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_that_ends_early_has_the_gradients_of_a_whole_one(
    kind: str, backbone: Backbone, checkpointing: bool
) -> None:
    denoiser = backbone.denoiser
    prompts.attach(denoiser, prompt_config(kind, tokens=2, words=WORDS))
    randomise(denoiser)
    latents, t, text = inputs(backbone, kind)
    noise, weights = torch.ones_like(latents), torch.tensor([1.0, -2.0])
    learned = prompts.parameters(denoiser)
    known = select_layers(denoiser)
    ran: list[nn.Module] = []
    last = denoiser.register_forward_hook(lambda module, *_: ran.append(module))
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        for layers in (known, known[:2]):
            score = Score(backbone, ScoreConfig("attention", layers=layers))
            found = []
            for predict in (True, False):
                ran.clear()
                made = noised_pass(backbone, latents, noise, t, text, score.layers, over="own", predict=predict)
                # what a checkpoint is to compute again must have been computed to its end
                assert len(ran) == (predict or checkpointing)
                value = (weights * score(made, None)).sum()
                found.append(torch.autograd.grad(value, list(learned.values()), allow_unused=True))
            assert any(gradient is not None for gradient in found[0])
            for name, whole, short in zip(learned, *found, strict=True):
                assert (whole is None) == (short is None), name
                assert whole is None or torch.allclose(whole, short, atol=1e-6), name
    finally:
        last.remove()
        denoiser.disable_gradient_checkpointing()


@textual
def test_learned_words_move_their_own_tokens_alone(kind: str, backbone: Backbone) -> None:
    text = texts_of(backbone, kind)
    alone = text.select([1])
    prompts.attach(backbone.denoiser, prompt_config(kind, projections=(), words=("circle", "nowhere")))
    assert torch.equal(prompts.prompted(backbone.denoiser, text).states, text.states)
    values = randomise(backbone.denoiser)
    moved = prompts.prompted(backbone.denoiser, text)
    circle = text.words[0].tokens[text.words[0].spelling.index("circle")]
    expected = text.states.clone()
    expected[0, list(circle)] += values["soft_words.circle"]
    assert circle
    assert torch.allclose(moved.states, expected)
    assert (moved.words, moved.own.tolist()) == (text.words, text.own.tolist())
    assert prompts.prompted(backbone.denoiser, alone) == alone  # has none of them
    with prompts.disabled(backbone.denoiser):
        assert prompts.prompted(backbone.denoiser, text) == text


@every
def test_prompts_round_trip(kind: str, backbone: Backbone, tmp_path: Path) -> None:
    bare = scorer(backbone, kind).predict(pairs(kind))
    config = prompt_config(kind, **({} if kind == "dit" else {"tokens": 1, "words": WORDS}))
    base = fingerprint(backbone)
    prompts.attach(backbone.denoiser, config)
    randomise(backbone.denoiser)
    made = scorer(backbone, kind).predict(pairs(kind))
    state = prompts.state(backbone.denoiser)
    score = ScoreConfig(score_of(kind), STEPS)
    folder = Adapter(base, score, config, state, PIXELS, {}, 1.0).save(tmp_path / "adapter")
    prompts.detach(backbone.denoiser)
    assert np.array_equal(scorer(backbone, kind).predict(pairs(kind)), bare)
    fresh = models.backbone_of(models.pipeline(kind))
    Adapter.load(folder).attach(fresh)
    assert np.allclose(scorer(fresh, kind).predict(pairs(kind)), made, atol=1e-6)
    assert np.abs(made - bare).max() > 1e-3


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux-dev", "pixart-sigma", "dit"])
def test_export_is_for_unets(kind: str, backbone: Backbone, tmp_path: Path) -> None:
    config = prompt_config(kind)
    prompts.attach(backbone.denoiser, config)
    adapter = Adapter(None, ScoreConfig(score_of(kind)), config, prompts.state(backbone.denoiser))
    if kind == "sdxl":
        stock_again = models.pipeline(kind)
        randomise(backbone.denoiser)
        adapter = Adapter(None, ScoreConfig("attention"), config, prompts.state(backbone.denoiser))
        stock_again.load_lora_weights(adapter.export(tmp_path / "lora"))
        values = inputs(backbone, kind)
        again = models.backbone_of(stock_again)
        with torch.no_grad():
            found, expected = (x.predict_noise(*values) for x in (again, backbone))
        assert torch.allclose(found, expected, atol=1e-4)
        return
    with pytest.raises(AdapterError, match=r"transformer_blocks\.0.*expected those of a U-Net"):
        adapter.export(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@every
def test_targets(kind: str, backbone: Backbone) -> None:
    """Of each layer the projections of image and text alike."""
    denoiser = backbone.denoiser
    every = {n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and (".to_" in n or ".add_" in n)}
    found = set(prompts.targets(denoiser, prompt_config(kind)))
    assert found == {n for n in every if ".attn" in n}
    if kind == "dit":
        with pytest.raises(ModelError, match="without cross-attention"):
            prompts.targets(denoiser, PromptConfig(attention="cross"))
        return
    cross = set(prompts.targets(denoiser, PromptConfig(attention="cross")))
    rest = set(prompts.targets(denoiser, PromptConfig(attention="self")))
    assert cross | rest == found
    assert not cross & rest
    queries = prompts.targets(denoiser, PromptConfig(projections=("to_q",), attention="cross"))
    added = {n for n in queries if n.endswith("add_q_proj")}
    assert bool(added) == (kind in JOINT)
    assert {n for n in queries if n not in added} == {f"{n}.to_q" for n in cross_attention_layers(denoiser)}
    assert bool(rest) == (kind not in JOINT or kind == "sd35")


@pytest.mark.parametrize("kind", [k for k in TEXTUAL if k != "sd35"])
def test_fused_projections(kind: str) -> None:
    """Records, and prompts on them. Fused as diffusers has it, SD 3.5 fails by itself, and DiT is not."""
    backbone = models.backbone_of(models.pipeline(kind))
    values = inputs(backbone, kind)
    plain = backbone_of(kind)
    backbone.denoiser.fuse_qkv_projections()
    layers = select_layers(plain.denoiser)
    noise = torch.randn_like(values[0])
    for direction in ("image", "text") if kind in JOINT else ("image",):
        with torch.no_grad():
            a, b = (noised_pass(m, values[0], noise, *values[1:], layers, direction) for m in (plain, backbone))
        assert torch.allclose(a.predicted, b.predicted, atol=1e-4)
        for name in layers:
            assert torch.allclose(a.records[name].own, b.records[name].own, atol=1e-4)
            assert torch.allclose(a.records[name].all, b.records[name].all, atol=1e-4)
    named = prompts.targets(backbone.denoiser, prompt_config(kind))
    kinds = {name.rsplit(".", 1)[1] for name in named if ".to_out" not in name}
    joined, crossed = {"to_qkv", "to_added_qkv", "to_add_out"}, {"to_q", "to_kv", "to_qkv"}
    assert kinds == (joined if kind in JOINT else crossed)
    prompts.attach(backbone.denoiser, prompt_config(kind))
    randomise(backbone.denoiser)
    found = gradients(backbone, kind, values)
    assert all(g is not None and g.abs().max() > 1e-6 for g in found.values())


@joint
def test_attention_that_cannot_be_followed_is_refused(kind: str) -> None:
    backbone = models.backbone_of(models.pipeline(kind))
    values = inputs(backbone, kind)
    layers = select_layers(backbone.denoiser)
    layer = backbone.denoiser.get_submodule(layers[0])

    class Other:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
            return hidden_states, encoder_hidden_states

    layer.processor = Other()
    before = hooks(backbone.denoiser)
    with pytest.raises(ModelError, match="expected the stock processor"):
        noised_pass(backbone, values[0], values[0], *values[1:], layers)
    assert hooks(backbone.denoiser) == before


# DiT


def test_classes_by_number_and_by_name() -> None:
    made = backbone_of("dit")

    def told(text: str) -> float:
        pooled = made.encode_texts([text])[0].pooled
        assert pooled is not None
        return float(pooled)

    names = {
        "tench": 0,
        "Tinca  Tinca": 0,
        "tench, tinca tinca": 0,
        "DOG": 1,
        "red circle": 3,
        "2": 2,
        "999": 999,
        "": 1000,
    }
    assert {text: told(text) for text in names} == names
    for text in ("1000", "-1", "a dog", "²"):
        with pytest.raises(TextError, match=r"a number below 1000 or a class's name \(such as tench") as error:
            made.encode_texts([text])
        assert "\n" not in str(error.value)


def test_attention_scores_are_refused_where_nothing_attends_to_text() -> None:
    for name in ("attention", "attention-mass", "paper"):
        with pytest.raises(ModelError, match=r"attends to the image alone.*use --score denoising"):
            Score(backbone_of("dit"), ScoreConfig(name))


# The guide


def test_the_family_in_the_guide_works() -> None:
    """The code in ``docs/bring-your-own-model.md`` does what the real family does."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "bring-your-own-model.md").read_text("utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    real, parts = backbone_of("pixart-sigma"), stock("pixart-sigma").components
    family = names["PixArtLike"]
    guide = family("guide", **{name: parts[name] for name in family.components})
    assert guide.image_size == real.image_size
    noised, t, text = inputs(real, "pixart-sigma")
    states = texts_of(guide, "pixart-sigma")
    assert torch.equal(states.own, text.own)
    with torch.no_grad():
        assert torch.allclose(guide.predict_noise(noised, t, states), real.predict_noise(noised, t, text), atol=1e-6)
    found, expected = (scorer(x, "pixart-sigma").predict(pairs("pixart-sigma")) for x in (guide, real))
    assert np.allclose(found, expected, atol=1e-5)


# Parts that do not fit


MISFITS: dict[str, tuple[str, dict[str, Callable[[], Any]]]] = {
    "U-Net of another width": ("sdxl", {"unet": lambda: stock("sd1").unet}),
    "U-Net without sizes": ("sdxl", {"unet": lambda: models.unet_of(cross_attention_dim=64)}),
    "scheduler of a diffusion": ("sd3", {"scheduler": lambda: stock("sd1").scheduler}),
    "scheduler of a flow": ("sd1", {"scheduler": lambda: stock("sd3").scheduler}),
    "tokenizer of another kind": ("pixart-sigma", {"tokenizer": lambda: models.tokenizer(24)}),
    "T5 of another width": ("pixart-sigma", {"text_encoder": lambda: models.t5_of(models.t5_tokenizer(), 16)}),
    "T5 without its tokenizer": ("sd3", {"tokenizer_3": lambda: None}),
    "VAE of other channels": ("flux-dev", {"vae": lambda: models.vae_of(latent_channels=8)}),
    "another CLIP": ("flux-dev", {"text_encoder": lambda: _clip_of_width(16)}),
    "CLIP of another projection": (
        "sd3",
        {"text_encoder": lambda: models.clip_of(models.tokenizer(24), 24, _projected(), projection_dim=8)},
    ),
    "VAE for a class-conditional model": ("dit", {"vae": lambda: models.vae_of(latent_channels=8)}),
    "windows": ("sdxl", {"tokenizer": lambda: models.tokenizer(12)}),
}


def _projected() -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection


def _clip_of_width(width: int) -> Any:
    made = deepcopy(stock("flux-dev").text_encoder)
    made.config.hidden_size = width
    return made


@pytest.mark.parametrize("name", MISFITS)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    kind, others = MISFITS[name]
    family = type(backbone_of(kind))
    parts = {k: stock(kind).components[k] for k in (*family.components, *family.optional_components)}
    with pytest.raises(ModelError, match=r"got .*expected ") as error:
        family("mine", **parts | {k: v() for k, v in others.items()})
    assert str(error.value).startswith("mine: ")
    assert "\n" not in str(error.value)
