"""Small Stable-Diffusion-like pipelines of the real classes with random weights, adapters for them, and pictures.

They are saved as ``save_pretrained`` has it, so that tests load them as users load theirs (fixture ``pipe``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import load_backbone
from dsd.contracts import Example
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig

WORDS = "a red blue green circle square left of right above the and dog cat".split()
"""Words that are one token each; others fall into bytes."""
COLOURS = ("a red square", "a blue square")
"""Captions of :func:`toy`."""
PIXELS = 16
"""A side of the pictures that the pipelines are made for: 8 x 8 latents."""
SCALE = 4.0
"""Brings the latents of a VAE with random weights near unit variance."""


@dataclass(frozen=True)
class Spec:
    """What varies between the pipelines.

    Attributes:
        prediction: What the U-Net is said to predict.
        linear: Projections into the transformers as in SD 2.x.
        window: Tokens that the text encoder takes at once.
        layers: Transformers in each down block (one more in each up block).
        blocks: Transformer blocks in each of those.
        seed: Of the weights.
    """

    prediction: str = "epsilon"
    linear: bool = False
    window: int = 24
    layers: int = 1
    blocks: int = 1
    seed: int = 0


def tokenizer(window: int) -> CLIPTokenizer:
    """CLIP's tokenizer over bytes and :data:`WORDS`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        letters = [*word[:-1], word[-1] + "</w>"]
        for i in range(1, len(letters)):
            merges["".join(letters[:i]), letters[i]] = None
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=window)


def parts(spec: Spec) -> dict[str, object]:
    """The five parts of a pipeline."""
    words = tokenizer(spec.window)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=PIXELS,
            scaling_factor=SCALE,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=spec.window,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=PIXELS // 2,
            block_out_channels=(32, 64),
            layers_per_block=spec.layers,
            transformer_layers_per_block=spec.blocks,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=32,
            attention_head_dim=(2, 4) if spec.linear else 4,
            use_linear_projection=spec.linear,
            norm_num_groups=8,
        )
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):  # else all tokens are attended to alike
                nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=spec.prediction,
    )
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": words, "unet": unet, "scheduler": scheduler}


def save(spec: Spec, folder: Path) -> Path:
    """Writes a pipeline folder."""
    pipeline = StableDiffusionPipeline(
        **parts(spec), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


def picture(seed: int, size: int = PIXELS) -> Image.Image:
    """A picture of smooth random colours."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(rough).resize((size, size), Image.Resampling.BICUBIC)


def save_adapter(folder: Path, model: str, **values: Any) -> Path:
    """An adapter with random prompts for a pipeline; ``values`` replace those of :class:`dsd.adapters.Adapter`."""
    backbone = load_backbone(model)
    base = fingerprint(backbone)
    config = PromptConfig(rank=2, attention="cross")
    prompts.attach(backbone.denoiser, config)
    g = torch.Generator().manual_seed(1)
    state = {n: 0.3 * torch.randn(p.shape, generator=g) for n, p in prompts.parameters(backbone.denoiser).items()}
    made = Adapter(base, ScoreConfig("attention", (50, 450)), config, state, PIXELS, {}, 2.5)
    return replace(made, **values).save(folder)


def toy(count: int, seed: int = 0, shuffled: bool = False) -> list[Example]:
    """Red and blue pictures by turns, and which caption is right; or labels that have nothing to do with colours."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        pixels = rng.integers(0, 60, (PIXELS, PIXELS, 3)).astype(np.uint8)
        pixels[..., 2 * (i % 2)] += 180
        right = i // 2 % 2 if shuffled else i % 2
        examples.append(Example(f"{seed}-{i}", (Image.fromarray(pixels),), COLOURS, ((0, right),)))
    return examples
