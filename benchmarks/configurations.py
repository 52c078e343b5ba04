"""Models at full size as their published configuration files describe them, with random weights.

``small`` ones have the same layout and little width, to try a script on. Weights take the default device, so that
``with torch.device("meta")`` counts without making any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dsd.backbone import Backbone
from dsd.backbone.flux import FluxBackbone
from dsd.backbone.pixart import PixArtBackbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.backbone.stable_diffusion_3 import StableDiffusion3Backbone
from dsd.backbone.stable_diffusion_xl import StableDiffusionXLBackbone
from dsd.tiny.pretrain import build_tokenizer

Parts = dict[str, Any]


def clip_tokenizer() -> Any:
    """CLIP's tokenizer with few merges, and its window."""
    made = build_tokenizer()
    made.model_max_length = 77
    return made


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with letters for tokens."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz")], extra_ids=0)


def vae(small: bool, pixels: int, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8 if small else 32,
        sample_size=pixels,
        **options,
    )


def flow_vae(small: bool, pixels: int, scale: float, shift: float) -> AutoencoderKL:
    options = {"use_quant_conv": False, "use_post_quant_conv": False}
    return vae(small, pixels, latent_channels=16, scaling_factor=scale, shift_factor=shift, **options)


def clip(kind: Any, small: bool, width: int, layers: int, heads: int, **options: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads,
        num_hidden_layers=2 if small else layers,
        **options,
    )
    return kind(config)


def clip_l(kind: Any, small: bool) -> Any:
    width, heads = (32, 2) if small else (768, 12)
    return clip(kind, small, width, 12, heads, hidden_act="quick_gelu", projection_dim=width)


def clip_g(small: bool) -> Any:
    width, heads = (48, 2) if small else (1280, 20)
    return clip(CLIPTextModelWithProjection, small, width, 32, heads, hidden_act="gelu", projection_dim=width)


def t5(small: bool) -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL."""
    width, inner, layers, heads = (96, 192, 2, 4) if small else (4096, 10240, 24, 64)
    config = T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=64,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def diffusion(**options: Any) -> DDPMScheduler:
    with torch.device("cpu"):
        return DDPMScheduler(**{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | options)


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    with torch.device("cpu"):
        return FlowMatchEulerDiscreteScheduler(**options)


def sd15(small: bool) -> Parts:
    return {
        "vae": vae(small, 512),
        "text_encoder": clip_l(CLIPTextModel, small),
        "tokenizer": clip_tokenizer(),
        "unet": UNet2DConditionModel(
            sample_size=16 if small else 64,
            block_out_channels=(32, 64, 64, 64) if small else (320, 640, 1280, 1280),
            attention_head_dim=8,
            cross_attention_dim=32 if small else 768,
        ),
        "scheduler": diffusion(),
    }


def sd21_base(small: bool) -> Parts:
    width = 64 if small else 1024
    return {
        "vae": vae(small, 768),
        "text_encoder": clip(CLIPTextModel, small, width, 23, 16, hidden_act="gelu", projection_dim=512),
        "tokenizer": clip_tokenizer(),
        "unet": UNet2DConditionModel(
            sample_size=16 if small else 64,
            block_out_channels=(32, 64, 64, 64) if small else (320, 640, 1280, 1280),
            attention_head_dim=(1, 2, 2, 2) if small else (5, 10, 20, 20),
            cross_attention_dim=width,
            use_linear_projection=True,
        ),
        "scheduler": diffusion(),
    }


def sdxl(small: bool) -> Parts:
    pooled = 48 if small else 1280
    return {
        "vae": vae(small, 1024, scaling_factor=0.13025),
        "text_encoder": clip_l(CLIPTextModel, small),
        "text_encoder_2": clip_g(small),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": UNet2DConditionModel(
            sample_size=16 if small else 128,
            block_out_channels=(32, 64, 64) if small else (320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2) if small else (1, 2, 10),
            attention_head_dim=(1, 2, 2) if small else (5, 10, 20),
            cross_attention_dim=80 if small else 2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=16 if small else 256,
            projection_class_embeddings_input_dim=pooled + 6 * (16 if small else 256),
        ),
        "scheduler": diffusion(),
    }


def _sd3(small: bool, largest: int, **options: Any) -> Parts:
    heads, dim, layers = (2, 32, 2) if small else (24, 64, 24)
    return {
        "vae": flow_vae(small, 1024, 1.5305, 0.0609),
        "text_encoder": clip_l(CLIPTextModelWithProjection, small),
        "text_encoder_2": clip_g(small),
        "text_encoder_3": t5(small),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
        "transformer": SD3Transformer2DModel(
            sample_size=16 if small else 128,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=dim,
            joint_attention_dim=96 if small else 4096,
            caption_projection_dim=heads * dim,
            pooled_projection_dim=80 if small else 2048,
            pos_embed_max_size=largest,
            **options,
        ),
        "scheduler": flow(shift=3.0),
    }


def sd3_medium(small: bool) -> Parts:
    return _sd3(small, 192)


def sd35_medium(small: bool) -> Parts:
    return _sd3(small, 384, qk_norm="rms_norm", dual_attention_layers=(0,) if small else tuple(range(13)))


def flux_schnell(small: bool) -> Parts:
    tiny = {
        "num_layers": 1,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 96,
        "pooled_projection_dim": 32,
    }
    return {
        "vae": flow_vae(small, 128 if small else 1024, 0.3611, 0.1159),
        "text_encoder": clip_l(CLIPTextModel, small),
        "text_encoder_2": t5(small),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": FluxTransformer2DModel(**tiny if small else {}),
        "scheduler": flow(shift=1.0),
    }


def pixart_sigma(small: bool) -> Parts:
    heads, dim, layers = (3, 16, 2) if small else (16, 72, 28)
    return {
        "vae": vae(small, 1024, scaling_factor=0.13025),
        "text_encoder": t5(small),
        "tokenizer": t5_tokenizer(),
        "transformer": PixArtTransformer2DModel(
            sample_size=16 if small else 128,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=dim,
            cross_attention_dim=heads * dim,
            caption_channels=96 if small else 4096,
            interpolation_scale=2,
            use_additional_conditions=False,
        ),
        "scheduler": diffusion(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    }


CONFIGURATIONS: dict[str, tuple[type[Backbone], Callable[[bool], Parts]]] = {
    "sd15": (StableDiffusionBackbone, sd15),
    "sd21-base": (StableDiffusionBackbone, sd21_base),
    "sdxl": (StableDiffusionXLBackbone, sdxl),
    "sd3-medium": (StableDiffusion3Backbone, sd3_medium),
    "sd35-medium": (StableDiffusion3Backbone, sd35_medium),
    "pixart-sigma": (PixArtBackbone, pixart_sigma),
    "flux-schnell": (FluxBackbone, flux_schnell),
}
"""Each model by its short name: the family, and what makes the parts; an argument says whether small ones."""


def networks(parts: Parts) -> list[torch.nn.Module]:
    return [part for part in parts.values() if isinstance(part, torch.nn.Module)]


def pipeline(name: str, dtype: torch.dtype, *, small: bool = False) -> DiffusionPipeline:
    """The stock pipeline, on the default device, with random weights of a fixed seed."""
    family, make = CONFIGURATIONS[name]
    torch.manual_seed(0)
    parts = make(small)
    for network in networks(parts):
        network.to(dtype)
    if family is StableDiffusionBackbone:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if family is StableDiffusionXLBackbone:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    stock = {
        StableDiffusion3Backbone: StableDiffusion3Pipeline,
        FluxBackbone: FluxPipeline,
        PixArtBackbone: PixArtSigmaPipeline,
    }
    return stock[family](**parts)
