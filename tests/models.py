"""Small pipelines of every family, of the real classes with random weights, adapters for them, and pictures.

Those like Stable Diffusion come by :class:`Spec` and are saved as ``save_pretrained`` has it, so that tests load them
as users load theirs (fixture ``pipe``). Those of all families come by name from :data:`KINDS`: :func:`pipeline` makes
the stock pipeline, :func:`backbone` ours over the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import FAMILIES, Backbone, load_backbone
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


def t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer over :data:`WORDS`, letters and some signs."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    whole = [("\u2581" + word, -3.0) for word in dict.fromkeys(WORDS)]
    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    return T5Tokenizer(vocab=[*special, *whole, *letters], extra_ids=0)


def vae_of(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=PIXELS,
        **{"latent_channels": 4, "scaling_factor": SCALE} | options,
    )


def clip_of(words: CLIPTokenizer, window: int, kind: Any = CLIPTextModel, **options: Any) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=window,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            **options,
        )
    )


def t5_of(words: T5Tokenizer, width: int) -> T5EncoderModel:
    made = T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    for name, parameter in made.named_parameters():
        if "embed_tokens" in name or "shared" in name:  # else, by T5's own rule, tokens are too large to tell apart
            nn.init.normal_(parameter, std=0.5)
    return made


def unet_of(layers: int = 1, blocks: int = 1, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 2,
        block_out_channels=(32, 64),
        layers_per_block=layers,
        transformer_layers_per_block=blocks,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        norm_num_groups=8,
        **{"cross_attention_dim": 32, "attention_head_dim": 4} | options,
    )


def liven(denoiser: nn.Module) -> None:
    """Makes attention depend on what is attended to; else all tokens are attended to alike."""
    for name, parameter in denoiser.named_parameters():
        layer, _, kind = name.rpartition(".")
        if layer.endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
            nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5 if kind == "weight" else 0.3)
        elif layer.endswith(("norm_q", "norm_k", "norm_added_q", "norm_added_k")):
            nn.init.normal_(parameter, mean=1.5, std=0.3)


DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def parts(spec: Spec) -> dict[str, object]:
    """The five parts of a pipeline."""
    words = tokenizer(spec.window)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        vae = vae_of()
        text_encoder = clip_of(words, spec.window)
        unet = unet_of(
            spec.layers,
            spec.blocks,
            attention_head_dim=(2, 4) if spec.linear else 4,
            use_linear_projection=spec.linear,
        )
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):  # else all tokens are attended to alike
                nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    scheduler = DDIMScheduler(**DDIM, prediction_type=spec.prediction)
    return {"vae": vae, "text_encoder": text_encoder, "tokenizer": words, "unet": unet, "scheduler": scheduler}


def _stable_diffusion(spec: Spec) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        **parts(spec), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _latent_consistency() -> DiffusionPipeline:
    components = parts(Spec()) | {
        "unet": unet_of(time_cond_proj_dim=16),
        "scheduler": LCMScheduler(prediction_type="epsilon"),
    }
    return LatentConsistencyModelPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _stable_diffusion_xl(zeros: bool = True) -> DiffusionPipeline:
    words, others = tokenizer(24), tokenizer(24)
    others.pad_token = "!"
    return StableDiffusionXLPipeline(
        vae=vae_of(),
        text_encoder=clip_of(words, 24),
        text_encoder_2=clip_of(others, 24, CLIPTextModelWithProjection, projection_dim=24),
        tokenizer=words,
        tokenizer_2=others,
        unet=unet_of(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def _stable_diffusion_3(t5: bool = True, **options: Any) -> DiffusionPipeline:
    words, sentences = tokenizer(24), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=vae_of(latent_channels=4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_of(words, 24, CLIPTextModelWithProjection, projection_dim=32),
        text_encoder_2=clip_of(words, 24, CLIPTextModelWithProjection, projection_dim=32),
        text_encoder_3=t5_of(sentences, 72) if t5 else None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=sentences if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=PIXELS // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=72,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=12,
            **options,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(guided: bool) -> DiffusionPipeline:
    words, sentences = tokenizer(24), t5_tokenizer()
    shifting = {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return FluxPipeline(
        vae=vae_of(shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_of(words, 24),
        text_encoder_2=t5_of(sentences, 40),
        tokenizer=words,
        tokenizer_2=sentences,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=40,
            pooled_projection_dim=32,
            guidance_embeds=guided,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(**shifting if guided else {"shift": 1.0}),
    )


def _pixart(sigma: bool) -> DiffusionPipeline:
    sentences = t5_tokenizer()
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        vae=vae_of(),
        text_encoder=t5_of(sentences, 40),
        tokenizer=sentences,
        transformer=PixArtTransformer2DModel(
            sample_size=PIXELS // 2 if sigma else 128,  # the stock pipeline tells sizes to transformers for 128 alone
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=6,  # so that a third of the width is even, as embedded sizes need
            cross_attention_dim=48,
            caption_channels=40,
            use_additional_conditions=False if sigma else None,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


def _dit() -> DiffusionPipeline:
    made = DiTPipeline(
        vae=vae_of(),
        transformer=DiTTransformer2DModel(
            sample_size=PIXELS // 2,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_embeds_ada_norm=1000,  # the stock pipeline has it that none is class 1000
        ),
        scheduler=DDIMScheduler(**DDIM),
    )
    made.register_to_config(id2label={str(i): names for i, names in enumerate(CLASSES)})  # as the published one has it
    return made


CLASSES = ("tench, Tinca tinca", "dog", "cat", "red circle")
"""Names of the first classes of a DiT."""
KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": partial(_stable_diffusion, Spec()),
    "sd2": partial(_stable_diffusion, Spec(prediction="v_prediction", linear=True)),
    "sd-lcm": _latent_consistency,
    "sdxl": _stable_diffusion_xl,
    "sdxl-turbo": partial(_stable_diffusion_xl, zeros=False),
    "sd3": _stable_diffusion_3,
    "sd3-without-t5": partial(_stable_diffusion_3, t5=False),
    "sd35": partial(_stable_diffusion_3, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "flux-schnell": partial(_flux, guided=False),
    "flux-dev": partial(_flux, guided=True),
    "pixart-alpha": partial(_pixart, sigma=False),
    "pixart-sigma": partial(_pixart, sigma=True),
    "dit": _dit,
}
"""Every family, with what varies within it."""


def pipeline(kind: str, seed: int = 0) -> DiffusionPipeline:
    """A stock pipeline with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = KINDS[kind]()
        liven(made.components.get("unet") or made.components["transformer"])
    made.set_progress_bar_config(disable=True)
    return made


def backbone_of(stock: DiffusionPipeline) -> Backbone:
    """Ours over the parts of a stock pipeline."""
    name = type(stock).__name__
    (family,) = (f for f in FAMILIES if name in f.pipelines)
    known = {*family.components, *family.optional_components}
    values = {k: v for k, v in stock.components.items() if k in known and v is not None}
    assert set(family.components) <= set(values)
    return family(name, **values, **{k: stock.config[k] for k in family.settings if k in stock.config})


def save(spec: Spec, folder: Path) -> Path:
    """Writes a pipeline folder."""
    _stable_diffusion(spec).save_pretrained(folder)
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
