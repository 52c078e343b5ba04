"""What a probe records equals the layers' own arithmetic, and the model is as it was when the probe is gone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dsd import prompts
from dsd.backbone import Backbone, TextStates, load_backbone
from dsd.contracts import ModelError, OptionError
from dsd.probe import Probe, cross_attention_layers, paper_layers, select_layers
from dsd.prompts import PromptConfig
from dsd.scores import Score, ScoreConfig, noised_pass

Pipe = Callable[..., str]
Inputs = tuple[Tensor, Tensor, TextStates]
KINDS = {"SD 1.x": {}, "SD 2.x": {"linear": True, "prediction": "v_prediction"}}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def backbone(pipe: Pipe, request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(pipe(**request.param))


@pytest.fixture
def inputs(backbone: Backbone) -> Inputs:
    texts = ["a red circle left of a dog", "cat", "a blue square"]
    noised = torch.randn(len(texts), 4, 8, 8)
    return noised, torch.tensor([30, 400, 900]), TextStates.join(backbone.encode_texts(texts))


def hooks(module: nn.Module) -> list[Any]:
    """All hooks of a network, in order."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    return [(name, kind, list(getattr(m, kind))) for name, m in module.named_modules() for kind in kinds]


# What is recorded


def by_hand(layer: Any, image: Tensor, text: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(own, all, maps) of one row from the layer's weights, head by head, in double precision."""
    head = layer.to_q.weight.shape[0] // layer.heads
    q = image.double() @ layer.to_q.weight.double().T
    k = text.double() @ layer.to_k.weight.double().T
    kept, every, maps = [], [], []
    for h in range(layer.heads):
        part = slice(h * head, (h + 1) * head)
        logits = q[:, part] @ k[:, part].T / head**0.5
        kept.append(logits[:, own].exp().sum(1).log().mean())
        every.append(logits.exp().sum(1).log().mean())
        maps.append(logits.exp() / logits.exp().sum(1, keepdim=True))
    return torch.stack(kept), torch.stack(every), torch.stack(maps).mean(0)


@torch.no_grad()
def test_records_equal_the_layers_own_arithmetic(backbone: Backbone, inputs: Inputs) -> None:
    noised, t, text = inputs
    layers = cross_attention_layers(backbone.denoiser)
    heard: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, positional: Any, named: Any) -> None:
            heard[name] = (positional[0], named["encoder_hidden_states"])

        return hook

    handles = [m.register_forward_pre_hook(listen(n), with_kwargs=True) for n, m in layers.items()]
    with Probe(backbone.denoiser, list(layers), text.own, maps=True) as probe:
        backbone.predict_noise(noised, t, text)
    for handle in handles:
        handle.remove()
    assert probe.records
    assert set(probe.records) == set(heard) == set(layers)
    for name, layer in layers.items():
        record = probe.records[name]
        assert record.maps is not None
        assert torch.allclose(record.maps.sum(-1), torch.ones(()), atol=1e-5)
        for row in range(len(noised)):
            own, every, maps = by_hand(layer, heard[name][0][row], heard[name][1][row], text.own[row])
            assert (record.own[row] - own).abs().max() < 1e-5
            assert (record.all[row] - every).abs().max() < 1e-5
            assert (record.maps[row] - maps).abs().max() < 1e-5


@torch.no_grad()
def test_maps_are_kept_on_request_only(backbone: Backbone, inputs: Inputs) -> None:
    noised, t, text = inputs
    name = next(iter(cross_attention_layers(backbone.denoiser)))
    with Probe(backbone.denoiser, [name], text.own) as probe:
        backbone.predict_noise(noised, t, text)
    assert list(probe.records) == [name]
    assert probe.records[name].maps is None


@torch.no_grad()
def test_each_pass_replaces_the_records(backbone: Backbone, inputs: Inputs) -> None:
    noised, t, text = inputs
    names = list(cross_attention_layers(backbone.denoiser))
    with Probe(backbone.denoiser, names, text.own) as probe:
        backbone.predict_noise(noised, t, text)
        first = dict(probe.records)
        backbone.predict_noise(2 * noised, t, text)
    assert all(not torch.equal(first[n].own, probe.records[n].own) for n in names)


def test_records_carry_gradients(backbone: Backbone, inputs: Inputs) -> None:
    noised, t, text = inputs
    noised = noised.requires_grad_()
    name = list(cross_attention_layers(backbone.denoiser))[-1]
    with Probe(backbone.denoiser, [name], text.own) as probe:
        backbone.predict_noise(noised, t, text)
    (gradient,) = torch.autograd.grad(probe.records[name].own.sum(), noised)
    assert gradient.abs().max() > 0


def test_records_of_a_pass_with_gradients_give_way_to_those_of_a_pass_without(
    backbone: Backbone, inputs: Inputs
) -> None:
    noised, t, text = inputs
    names = list(cross_attention_layers(backbone.denoiser))
    with torch.no_grad(), Probe(backbone.denoiser, names, text.own) as alone:
        backbone.predict_noise(2 * noised, t, text)
    with Probe(backbone.denoiser, names, text.own) as probe:
        backbone.predict_noise(noised.requires_grad_(), t, text)
        with torch.no_grad():
            backbone.predict_noise(2 * noised, t, text)
    assert all(torch.equal(probe.records[n].own, alone.records[n].own) for n in names)


@torch.no_grad()
def test_without_gradients_queries_are_freed_layer_by_layer(backbone: Backbone, inputs: Inputs) -> None:
    noised, t, text = inputs
    layers = cross_attention_layers(backbone.denoiser)
    queries: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def hear(_module: nn.Module, _inputs: Any, query: Tensor) -> None:
        alive.append(sum(made() is not None for made in queries))
        queries.append(weakref.ref(query))

    handles = [layer.to_q.register_forward_hook(hear) for layer in layers.values()]
    with Probe(backbone.denoiser, list(layers), text.own):
        backbone.predict_noise(noised, t, text)
    for handle in handles:
        handle.remove()
    assert alive == [0] * len(layers)


# Gradient checkpointing


@pytest.fixture
def prompted(backbone: Backbone) -> Iterator[Backbone]:
    """With prompts on all attention layers that are not zero, so that each has a gradient."""
    prompts.attach(backbone.denoiser, PromptConfig(rank=2, attention="all"))
    with torch.no_grad():
        for parameter in prompts.parameters(backbone.denoiser).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    yield backbone
    prompts.detach(backbone.denoiser)


@contextmanager
def checkpointed(denoiser: Any) -> Iterator[None]:
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


def scored(backbone: Backbone, inputs: Inputs, kind: str) -> Tensor:
    """Scores of the captions for one picture."""
    latents, t, text = inputs
    score = Score(backbone, ScoreConfig(kind))
    noise = torch.ones_like(latents)
    blank = backbone.encode_texts([""])[0].select([0] * len(text))
    made = noised_pass(backbone, latents, noise, t, text, score.layers)
    empty = noised_pass(backbone, latents, noise, t, blank, score.empty_layers) if score.needs_empty else None
    return score(made, empty)


@pytest.mark.parametrize("kind", ["attention", "denoising", "paper"])
def test_gradients_are_the_same_under_checkpointing(prompted: Backbone, inputs: Inputs, kind: str) -> None:
    weights = torch.tensor([1.0, -2.0, 0.5])

    def gradients() -> tuple[Tensor, dict[str, Tensor | None]]:
        parameters = prompts.parameters(prompted.denoiser)
        scores = scored(prompted, inputs, kind)
        found = torch.autograd.grad((weights * scores).sum(), list(parameters.values()), allow_unused=True)
        return scores, dict(zip(parameters, found, strict=True))

    scores, expected = gradients()
    with checkpointed(prompted.denoiser):
        again, got = gradients()
    assert torch.equal(scores, again)
    assert any("attn1" in name and g is not None and g.abs().max() > 1e-3 for name, g in expected.items())
    for name, gradient in expected.items():
        if gradient is None:  # behind the last query that the score looks at
            assert got[name] is None
            continue
        assert (got[name] - gradient).abs().max() < 1e-6 * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("kind", ["attention", "denoising"])
def test_checkpointing_saves_memory(prompted: Backbone, inputs: Inputs, kind: str) -> None:
    weights = {p.untyped_storage().data_ptr() for p in prompted.denoiser.parameters()}

    def saved() -> int:
        """Bytes kept for the backward pass, parameters aside."""
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x.detach()  # itself, it would keep alive the graph that keeps it

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scores = scored(prompted, inputs, kind)
        assert scores.requires_grad
        return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)

    everything = saved()
    with checkpointed(prompted.denoiser):
        assert saved() < everything / 2


# Leaving nothing behind


@torch.no_grad()
def test_probe_changes_nothing(backbone: Backbone, inputs: Inputs) -> None:
    names = list(cross_attention_layers(backbone.denoiser))
    before, bare = hooks(backbone.denoiser), backbone.predict_noise(*inputs)
    with Probe(backbone.denoiser, names, inputs[2].own, maps=True):
        assert hooks(backbone.denoiser) != before
        assert torch.equal(backbone.predict_noise(*inputs), bare)
    assert hooks(backbone.denoiser) == before
    assert torch.equal(backbone.predict_noise(*inputs), bare)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@torch.no_grad()
def test_probe_leaves_on_errors(backbone: Backbone, inputs: Inputs, error: type[BaseException]) -> None:
    names = list(cross_attention_layers(backbone.denoiser))
    before, bare = hooks(backbone.denoiser), backbone.predict_noise(*inputs)

    def fail(*_: Any) -> None:
        raise error("stop")

    # within the pass, when some layers have been heard and others have not
    handle = backbone.denoiser.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"), Probe(backbone.denoiser, names, inputs[2].own):
        backbone.predict_noise(*inputs)
    handle.remove()
    assert hooks(backbone.denoiser) == before
    assert torch.equal(backbone.predict_noise(*inputs), bare)


def test_probe_leaves_if_it_cannot_begin(backbone: Backbone, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = cross_attention_layers(backbone.denoiser)
    before = hooks(backbone.denoiser)
    last = list(layers.values())[-1]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    with monkeypatch.context() as patch:
        patch.setattr(last, "register_forward_hook", fail)
        with pytest.raises(RuntimeError, match="no more hooks"), Probe(backbone.denoiser, list(layers), inputs[2].own):
            pass
    assert hooks(backbone.denoiser) == before


# Which layers


@pytest.mark.parametrize("network", [nn.Linear(2, 2), "UNet2DModel"], ids=["linear map", "U-Net without text"])
def test_network_without_cross_attention_is_refused(network: nn.Module | str) -> None:
    if isinstance(network, str):
        blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
        network = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=4, **blocks)
    for ask in (cross_attention_layers, select_layers, paper_layers, lambda n: Probe(n, [], torch.ones(1, 1) > 0)):
        with pytest.raises(ModelError, match="without cross-attention") as error:
            ask(network)
        assert "denoising" in str(error.value)


def test_unknown_layer_is_refused(backbone: Backbone, inputs: Inputs) -> None:
    with pytest.raises(OptionError, match="nonesuch"):
        Probe(backbone.denoiser, ["nonesuch"], inputs[2].own)
    # self-attention is no layer in which the image attends to the text
    with pytest.raises(OptionError, match="attn1"):
        Probe(backbone.denoiser, ["mid_block.attentions.0.transformer_blocks.0.attn1"], inputs[2].own)


DEEP = [f"down_blocks.{b}.attentions.{a}.transformer_blocks.{t}.attn2" for b in (0, 1) for a in (0, 1) for t in (0, 1)]
DEEP += [f"mid_block.attentions.0.transformer_blocks.{t}.attn2" for t in (0, 1)]
DEEP += [
    f"up_blocks.{b}.attentions.{a}.transformer_blocks.{t}.attn2" for b in (0, 1) for a in (0, 1, 2) for t in (0, 1)
]


@pytest.fixture(scope="module")
def deep(pipe: Pipe) -> nn.Module:
    """A U-Net with two layers a block and two transformer blocks a layer."""
    return load_backbone(pipe(layers=2, blocks=2)).denoiser


def test_layers_are_listed_in_the_order_of_the_network(deep: nn.Module) -> None:
    assert list(cross_attention_layers(deep)) == DEEP
    assert select_layers(deep) == tuple(DEEP)


def test_layers_of_the_paper(deep: nn.Module) -> None:
    """All attentions of the last down block, the mid block and the last up block, in each the last transformer."""
    assert paper_layers(deep) == (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2",
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2",
        "mid_block.attentions.0.transformer_blocks.1.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.1.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.1.attn2",
        "up_blocks.1.attentions.2.transformer_blocks.1.attn2",
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["mid_block"], [n for n in DEEP if n.startswith("mid_block")]),
        (["up_blocks.1", "mid_block"], [n for n in DEEP if n.startswith(("mid_block", "up_blocks.1"))]),
        (["*.transformer_blocks.1.attn2"], DEEP[1::2]),
        (["*"], DEEP),
        ([DEEP[5], DEEP[5], DEEP[2]], [DEEP[2], DEEP[5]]),
        (["down_blocks.[0-9].attentions.0.*"], [*DEEP[0:2], *DEEP[4:6]]),
    ],
)
def test_patterns_select_layers(deep: nn.Module, patterns: list[str], expected: list[str]) -> None:
    assert select_layers(deep, patterns) == tuple(expected)


@pytest.mark.parametrize("pattern", ["nonesuch", "", "mid", "up_blocks.7", "MID_BLOCK"])
def test_pattern_without_a_layer_is_refused(deep: nn.Module, pattern: str) -> None:
    with pytest.raises(OptionError, match=r"mid_block\.attentions\.0") as error:
        select_layers(deep, ["up_blocks.0", pattern])
    assert repr(pattern) in str(error.value)


@torch.no_grad()
def test_reductions_stay_in_float32_in_mixed_precision(backbone: Backbone, inputs: Inputs) -> None:
    """Of the projections as they are in halves, the record is exact."""
    noised, timesteps, text = inputs
    name, layer = next(iter(cross_attention_layers(backbone.denoiser).items()))
    heard: list[Tensor] = []
    handles = [m.register_forward_hook(lambda _m, _i, out: heard.append(out)) for m in (layer.to_q, layer.to_k)]
    try:
        with torch.autocast("cpu", torch.bfloat16), Probe(backbone.denoiser, [name], text.own) as probe:
            backbone.predict_noise(noised, timesteps, text)
    finally:
        for handle in handles:
            handle.remove()
    assert {out.dtype for out in heard} == {torch.bfloat16}
    q, k = (out.double().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for out in heard)
    expected = (q @ k.transpose(-1, -2) * layer.scale).logsumexp(-1).mean(-1)
    assert torch.allclose(probe.records[name].all.double(), expected, atol=1e-5)
