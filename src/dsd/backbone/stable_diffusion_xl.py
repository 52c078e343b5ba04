"""Stable Diffusion XL, and its distilled forms: VAE, two CLIP text encoders, a U-Net that is told sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsd.backbone.base import TextStates
from dsd.backbone.latent import Diffusion, LatentBackbone, check_channels, check_width, upcast
from dsd.backbone.stable_diffusion import guidance_embedding
from dsd.backbone.text import clip_states, clip_window, clip_windows
from dsd.contracts import ModelError

_SIZES = 6
"""Numbers that the U-Net is told: the picture's size, where it was cropped, the size that is wanted."""


class StableDiffusionXLBackbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` Stable Diffusion XL pipeline (Podell et al. 2023).

    The image attends to the joined states of both text encoders; the second one's pooled output and the picture's
    size, said to be original and not cropped, go in with the timestep. A caption in several windows has the mean of
    their pooled outputs.

    Args:
        name: Where it came from.
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler: The pipeline's parts.
        force_zeros_for_empty_prompt: The empty caption is zeros, as the base model learned it, not what the encoders
            make of an empty text.

    Raises:
        ModelError: If the parts do not fit together.
    """

    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    settings = ("force_zeros_for_empty_prompt",)

    def __init__(
        self,
        name: str,
        *,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        schedule, encoders = Diffusion(name, scheduler), (text_encoder, text_encoder_2)
        super().__init__(name, vae=upcast(vae), denoiser=unet, schedule=schedule, encoders=encoders)
        self.text_encoder, self.text_encoder_2 = encoders
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        family, config = "Stable Diffusion XL", unet.config
        check_channels(name, unet, vae, config.in_channels, config.out_channels, family)
        width = text_encoder.config.hidden_size + text_encoder_2.config.hidden_size
        check_width(name, unet, config.cross_attention_dim, width, family)
        if config.addition_embed_type != "text_time":
            raise ModelError(
                f"{name}: got a U-Net that is told {config.addition_embed_type or 'no sizes'}, expected one of a "
                f"{family} pipeline for text to image"
            )
        pooled = config.projection_class_embeddings_input_dim - _SIZES * config.addition_time_embed_dim
        check_width(name, unet, pooled, text_encoder_2.config.projection_dim, family, "pooled texts")
        windows = {clip_window(name, t, e) for t, e in ((tokenizer, text_encoder), (tokenizer_2, text_encoder_2))}
        if len(windows) != 1:
            raise ModelError(f"{name}: got text encoders of windows {sorted(windows)}, expected one window for both")
        self._window = windows.pop()
        self._zeros = force_zeros_for_empty_prompt
        self.image_size = int(config.sample_size) * self._factor

    @property
    def caption_settings(self) -> Mapping[str, Any]:
        return {"empty_is_zeros": self._zeros}

    def _encode_text(self, text: str) -> TextStates:
        windows = clip_windows(self.tokenizer, text, self._window)
        first, _ = clip_states(self.text_encoder, windows)
        second, pooled = clip_states(self.text_encoder_2, clip_windows(self.tokenizer_2, text, self._window))
        states = torch.cat([first.to(self.device), second.to(self.device)], -1)[None]
        pooled = pooled[None].to(self.device)
        if self._zeros and not text:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        return TextStates(states, windows.own[None].to(self.device), (windows.words,), pooled)

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        assert text.pooled is not None
        height, width = (side * self._factor for side in noised.shape[-2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noised.device)
        told = {"text_embeds": text.pooled.to(self.dtype), "time_ids": sizes.expand(len(noised), -1)}
        out: Tensor = self.denoiser(
            noised,
            timesteps,
            text.states.to(self.dtype),
            added_cond_kwargs=told,
            **guidance_embedding(self.denoiser, noised),
        ).sample
        return out
