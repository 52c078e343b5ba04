"""What the cards say is true: families that exist, networks as large as published configurations make them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from dsd.backbone import FAMILIES, Card, cards, default_timesteps
from dsd.backbone.hub import card_of, resolve
from dsd.contracts import ModelError

# As the models' repositories on the hub have them, but for what makes no parameters.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
VAE_16 = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35 = {**SD3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
PIXART = {"sample_size": 128, "out_channels": 8, "caption_channels": 4096, "use_additional_conditions": False}


@cache
def counts() -> dict[str, int]:
    """Parameters of every network that the cards speak of."""

    def clip(values: Mapping[str, Any]) -> CLIPTextConfig:
        return CLIPTextConfig(**values)

    with torch.device("meta"):
        made = {
            "vae": AutoencoderKL(**VAE),
            "vae 16": AutoencoderKL(**VAE_16),
            "clip l": CLIPTextModel(clip(CLIP_L)),
            "clip l projected": CLIPTextModelWithProjection(clip(CLIP_L)),
            "clip h": CLIPTextModel(clip(CLIP_H)),
            "clip g": CLIPTextModelWithProjection(clip(CLIP_G)),
            "t5": T5EncoderModel(T5Config(**T5)),
            "sd1": UNet2DConditionModel(cross_attention_dim=768),
            "sd2": UNet2DConditionModel(**SD2),
            "sdxl": UNet2DConditionModel(**SDXL),
            "sd3": SD3Transformer2DModel(**SD3),
            "sd3.5": SD3Transformer2DModel(**SD35),
            "flux schnell": FluxTransformer2DModel(),
            "flux dev": FluxTransformer2DModel(guidance_embeds=True),
            "pixart": PixArtTransformer2DModel(**PIXART),
        }
    return {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}


NETWORKS = {
    "sd15": {"unet": "sd1", "text_encoder": "clip l", "vae": "vae"},
    "sd21-base": {"unet": "sd2", "text_encoder": "clip h", "vae": "vae"},
    "sd21": {"unet": "sd2", "text_encoder": "clip h", "vae": "vae"},
    "sdxl": {"unet": "sdxl", "text_encoder": "clip l", "text_encoder_2": "clip g", "vae": "vae"},
    **{
        name: {
            "transformer": network,
            "text_encoder": "clip l projected",
            "text_encoder_2": "clip g",
            "text_encoder_3": "t5",
            "vae": "vae 16",
        }
        for name, network in (("sd3-medium", "sd3"), ("sd35-medium", "sd3.5"))
    },
    **{
        name: {"transformer": network, "text_encoder": "clip l", "text_encoder_2": "t5", "vae": "vae 16"}
        for name, network in (("flux-schnell", "flux schnell"), ("flux-dev", "flux dev"))
    },
    "pixart-sigma": {"transformer": "pixart", "text_encoder": "t5", "vae": "vae"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_the_published_configurations(name: str) -> None:
    assert dict(cards()[name].parameters) == {part: counts()[network] for part, network in NETWORKS[name].items()}


def test_embedded_model_has_the_parameters_of_its_files() -> None:
    folder = resolve("tiny")
    assert isinstance(folder, Path)
    for part, count in cards()["tiny"].parameters.items():
        (file,) = (folder / part).glob("*.safetensors")
        with safe_open(file, "pt") as weights:
            assert sum(math.prod(weights.get_slice(k).get_shape()) for k in weights.keys()) == count  # noqa: SIM118


def test_there_are_the_models_people_use() -> None:
    assert set(cards()) == {"tiny", *NETWORKS}


@pytest.mark.parametrize("name", ["tiny", *NETWORKS])
def test_card_is_of_a_family_that_exists(name: str) -> None:
    card = cards()[name]
    (family,) = [f for f in FAMILIES if card.pipeline in f.pipelines]
    takes = {*family.components, *family.optional_components}
    networks = {c for c in takes if c != "scheduler" and not c.startswith("tokenizer")}
    assert set(card.parameters) == networks
    assert card_of(name) is card
    assert card.hub is None or card_of(card.hub) in cards().values()


def test_memory_is_two_bytes_a_parameter() -> None:
    card = replace(cards()["sd15"], parameters={"unet": 3, "vae": 4})
    assert card.bytes_in_bf16 == 14


def test_default_timesteps_are_the_cards_or_the_papers() -> None:
    assert default_timesteps("tiny") == cards()["tiny"].timesteps == (200, 350, 500)
    assert default_timesteps("sd15") == default_timesteps("no/such") == (189, 389, 589, 789)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pipeline", "StableDiffusion"),
        ("licence", ""),
        ("resolution", "512"),
        ("resolution", 0),
        ("prediction_type", "velocity"),
        ("parameters", {}),
        ("parameters", {"unet": 0}),
        ("parameters", 7),
        ("hub", "nobody"),
        ("hub", None),
        ("revision", "main"),
        ("revision", "451F4FE16113BFF5A5D2269ED5AD43B0592E9A14"),
        ("gated", "yes"),
        ("layers", ()),
        ("timesteps", ()),
        ("timesteps", (1000,)),
    ],
)
def test_wrong_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"'sd15': got {field}"):
        replace(cards()["sd15"], **{field: value})


def test_unknown_and_missing_fields_are_refused() -> None:
    with pytest.raises(ModelError, match="fields of a card"):
        Card.from_dict("x", {"licence": "mit"})
    with pytest.raises(ModelError, match="licenses"):
        Card.from_dict("x", {"licenses": "mit"})
