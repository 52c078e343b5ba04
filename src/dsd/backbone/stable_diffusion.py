"""Stable Diffusion 1.x and 2.x, and every pipeline of that layout: VAE, one CLIP text encoder, a U-Net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsd.backbone.base import TextStates
from dsd.backbone.latent import GUIDANCE, Diffusion, LatentBackbone, check_channels, check_width
from dsd.backbone.text import clip_window, clip_windows


class StableDiffusionBackbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` Stable Diffusion pipeline.

    Args:
        name: Where it came from.
        vae, text_encoder, tokenizer, unet, scheduler: The pipeline's parts; of the scheduler, only its schedule counts.

    Raises:
        ModelError: If the scheduler's prediction type is none of epsilon, v_prediction and sample, or the parts do not
            fit together.
    """

    pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline")
    components = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")

    def __init__(self, name: str, *, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        super().__init__(name, vae=vae, denoiser=unet, schedule=Diffusion(name, scheduler), encoders=(text_encoder,))
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        family = "Stable Diffusion 1.x or 2.x"
        check_channels(name, unet, vae, unet.config.in_channels, unet.config.out_channels, family)
        check_width(name, unet, unet.config.cross_attention_dim, text_encoder.config.hidden_size, family)
        self._window = clip_window(name, tokenizer, text_encoder)
        self.image_size = int(unet.config.sample_size) * self._factor

    def _encode_text(self, text: str) -> TextStates:
        windows = clip_windows(self.tokenizer, text, self._window)
        # SD 1.x and 2.x attend to the padding too, so no mask is given, as in the stock pipeline
        states = self.text_encoder(windows.ids.to(self.text_encoder.device)).last_hidden_state
        return TextStates(
            states.flatten(0, 1)[None].to(self.device), windows.own[None].to(self.device), (windows.words,)
        )

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        told = guidance_embedding(self.denoiser, noised)
        out: Tensor = self.denoiser(noised, timesteps, text.states.to(self.dtype), **told).sample
        return out


def guidance_embedding(unet: Any, noised: Tensor) -> dict[str, Tensor]:
    """What a U-Net that was distilled with guidance (a latent consistency model, Luo et al. 2023) is told of it."""
    width = unet.config.get("time_cond_proj_dim")
    if width is None:
        return {}
    assert GUIDANCE == 1.0  # it is embedded as guidance less one, and of 0 that is sines of 0, then cosines
    embedded = torch.cat([noised.new_zeros(width // 2), noised.new_ones(width // 2), noised.new_zeros(width % 2)])
    return {"timestep_cond": embedded.expand(len(noised), -1)}
