"""Prompts change nothing until they learn, and nothing is left of them when they go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsd import prompts
from dsd.backbone import Backbone, load_backbone
from dsd.contracts import AdapterError, OptionError
from dsd.probe import select_layers
from dsd.prompts import PromptConfig

Pipe = Callable[..., str]
Run = Callable[[], Tensor]


@pytest.fixture
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


@pytest.fixture
def run(backbone: Backbone) -> Run:
    """One pass over fixed inputs."""
    noised, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 700])
    text = backbone.encode_texts(["a dog"])[0].select([0, 0])

    @torch.no_grad()
    def predict() -> Tensor:
        return backbone.predict_noise(noised, t, text)

    return predict


def randomise(denoiser: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Prompts that do change something."""
    g = torch.Generator().manual_seed(seed)
    values = {name: 0.2 * torch.randn(p.shape, generator=g) for name, p in prompts.parameters(denoiser).items()}
    prompts.load_state(denoiser, values)
    return values


def modules(denoiser: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(m)) for name, m in denoiser.named_modules()]


BLOCK = "mid_block.attentions.0.transformer_blocks.0"
CONFIGS = {
    "all": PromptConfig(attention="all"),
    "cross, query and key": PromptConfig(rank=2, projections=("to_q", "to_k"), attention="cross"),
    "self": PromptConfig(rank=1, attention="self"),
    "some layers": PromptConfig(rank=3, attention="cross", layers=("mid_block", "up_blocks.0")),
    "half as strong": PromptConfig(scale=0.5),
    "named": PromptConfig(
        scale=2,
        ranks={
            f"{BLOCK}.attn2.to_q": 2,
            f"{BLOCK}.attn1.to_out.0": 3,
            f"{BLOCK}.ff.net.0.proj": 2,
            f"{BLOCK}.ff.net.2": 1,
        },
    ),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@configs
def test_prompts_change_nothing_at_first_and_nothing_when_gone(
    backbone: Backbone, run: Run, config: PromptConfig
) -> None:
    network = backbone.denoiser
    bare, before = run(), modules(network)
    weights = {name: p.clone() for name, p in network.named_parameters()}
    prompts.attach(network, config)
    assert modules(network) != before
    assert torch.allclose(run(), bare, atol=1e-6)
    randomise(network)
    assert not torch.allclose(run(), bare, atol=1e-3)
    prompts.detach(network)
    assert modules(network) == before
    assert torch.equal(run(), bare)
    assert all(torch.equal(p, weights[name]) for name, p in network.named_parameters())
    assert list(weights) == [name for name, _ in network.named_parameters()]
    assert not hasattr(network, "peft_config")
    assert prompts.parameters(network) == {}


@configs
def test_prompts_are_low_rank_changes_of_the_weights(backbone: Backbone, run: Run, config: PromptConfig) -> None:
    """``W + scale * B A`` by hand gives the same."""
    network = backbone.denoiser
    prompts.attach(network, config)
    values = randomise(network)
    prompted = run()
    prompts.detach(network)
    with torch.no_grad():
        for name in prompts.targets(network, config):
            up, down = values[f"{name}.lora_B.weight"], values[f"{name}.lora_A.weight"]
            assert down.shape[0] == up.shape[1] == (config.ranks or {}).get(name, config.rank)
            network.get_submodule(name).weight += config.scale * up @ down
    assert torch.allclose(run(), prompted, atol=1e-4)


def test_targets(backbone: Backbone) -> None:
    network = backbone.denoiser
    cross = select_layers(network)
    self_ = [name.replace("attn2", "attn1") for name in cross]
    every = ("to_q", "to_k", "to_v", "to_out.0")
    found = {key: set(prompts.targets(network, config)) for key, config in CONFIGS.items()}
    assert found["all"] == {f"{n}.{p}" for n in [*cross, *self_] for p in every}
    assert found["cross, query and key"] == {f"{n}.{p}" for n in cross for p in ("to_q", "to_k")}
    assert found["self"] == {f"{n}.{p}" for n in self_ for p in every}
    some = select_layers(network, ["mid_block", "up_blocks.0"])
    assert found["some layers"] == {f"{n}.{p}" for n in some for p in every}
    assert len(some) < len(cross)
    assert found["named"] == set(CONFIGS["named"].ranks or {})


@pytest.mark.parametrize("name", ["mid_block.nonesuch", "mid_block.resnets.0.norm1", "mid_block"])
def test_names_without_a_place_for_prompts(backbone: Backbone, name: str) -> None:
    config = PromptConfig(ranks={f"{BLOCK}.attn2.to_q": 2, name: 2})
    with pytest.raises(AdapterError, match=f"1 of 2 modules .*{name}"):
        prompts.attach(backbone.denoiser, config)
    assert prompts.parameters(backbone.denoiser) == {}


def test_only_prompts_learn(backbone: Backbone) -> None:
    expected = len(prompts.targets(backbone.denoiser, PromptConfig(rank=2)))
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    own = set(map(id, prompts.parameters(backbone.denoiser).values()))
    assert len(own) == 2 * expected
    for parameter in backbone.denoiser.parameters():
        assert parameter.requires_grad == (id(parameter) in own)


def test_soft_tokens_learn_beside_prompts(backbone: Backbone) -> None:
    prompts.attach(backbone.denoiser, PromptConfig(rank=2, tokens=3))
    own = prompts.parameters(backbone.denoiser)
    assert own[prompts.TOKENS].shape == (3, 32)
    assert all(p.requires_grad for p in own.values())


@pytest.mark.parametrize("words", [("Dotted",), ("two words",), ("dotted", "dotted"), ("",), ("7",)])
def test_words_that_no_caption_could_have_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="lower-case letters alone"):
        PromptConfig(words=words)


def test_initial_prompts_are_decided_by_the_seed(backbone: Backbone) -> None:
    def initial(seed: int) -> dict[str, Tensor]:
        prompts.attach(backbone.denoiser, PromptConfig(rank=2), seed)
        found = prompts.state(backbone.denoiser)
        prompts.detach(backbone.denoiser)
        return found

    a, b, c = initial(1), initial(1), initial(2)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)
    assert all(not v.any() for n, v in a.items() if "lora_B" in n)


def test_disabled_is_the_bare_model_for_a_while(backbone: Backbone, run: Run) -> None:
    bare = run()
    with prompts.disabled(backbone.denoiser):  # on a bare model, no change
        assert torch.equal(run(), bare)
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    randomise(backbone.denoiser)
    prompted = run()
    with suppress(KeyboardInterrupt), prompts.disabled(backbone.denoiser):
        without = run()
        raise KeyboardInterrupt
    assert torch.allclose(without, bare, atol=1e-6)
    assert torch.equal(run(), prompted)
    assert not torch.allclose(prompted, bare, atol=1e-3)
    assert all(p.requires_grad for p in prompts.parameters(backbone.denoiser).values())


def test_prompts_do_not_stack(backbone: Backbone, run: Run) -> None:
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    randomise(backbone.denoiser)
    prompted = run()
    with pytest.raises(AdapterError, match="already carries prompts"):
        prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    assert torch.equal(run(), prompted)


def test_detach_of_a_bare_model(backbone: Backbone, run: Run) -> None:
    bare = run()
    prompts.detach(backbone.denoiser)
    assert torch.equal(run(), bare)


def test_state_is_a_copy_that_can_be_set_again(backbone: Backbone, run: Run) -> None:
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    randomise(backbone.denoiser, 1)
    first, kept = run(), prompts.state(backbone.denoiser)
    randomise(backbone.denoiser, 2)
    assert not torch.equal(run(), first)
    prompts.load_state(backbone.denoiser, kept)
    assert torch.equal(run(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_learn_in_float32(pipe: Pipe, dtype: torch.dtype) -> None:
    backbone = load_backbone(pipe(), dtype=dtype)
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    assert {p.dtype for p in prompts.parameters(backbone.denoiser).values()} == {torch.float32}
    assert {v.dtype for v in prompts.state(backbone.denoiser).values()} == {torch.float32}
    with torch.no_grad():
        noised, (text,) = torch.randn(1, 4, 8, 8), backbone.encode_texts(["cat"])
        assert backbone.predict_noise(noised, torch.tensor([5]), text).isfinite().all()


def missing(values: dict[str, Tensor]) -> None:
    values.pop(next(iter(values)))


def left_over(values: dict[str, Tensor]) -> None:
    values["nonesuch.lora_A.weight"] = torch.zeros(2, 2)


def another_shape(values: dict[str, Tensor]) -> None:
    values[next(iter(values))] = torch.zeros(7, 7)


@pytest.mark.parametrize("damage", [missing, left_over, another_shape])
def test_state_of_another_model_is_refused(backbone: Backbone, damage: Callable[[dict[str, Tensor]], None]) -> None:
    prompts.attach(backbone.denoiser, PromptConfig(rank=2))
    values = prompts.state(backbone.denoiser)
    damage(values)
    with pytest.raises(AdapterError, match="made for") as error:
        prompts.load_state(backbone.denoiser, values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": 2000},
        {"projections": ()},
        {"projections": ("to_q", "to_z")},
        {"attention": "both"},
        {"attention": "all", "layers": ("mid_block",)},
        {"ranks": {}},
        {"ranks": {"mid_block.resnets.0.conv1": 0}},
    ],
)
def test_bad_configuration(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        PromptConfig(**options)


def test_pattern_without_a_layer(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="nonesuch"):
        prompts.attach(backbone.denoiser, PromptConfig(attention="cross", layers=("nonesuch",)))
    assert prompts.parameters(backbone.denoiser) == {}
