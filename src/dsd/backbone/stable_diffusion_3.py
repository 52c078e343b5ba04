"""Stable Diffusion 3 and 3.5: VAE, two CLIP text encoders, T5 if wanted, a transformer over image and text jointly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dsd.backbone.base import CaptionWords, TextStates
from dsd.backbone.latent import Flow, LatentBackbone, check_channels, check_width
from dsd.backbone.text import check_vocabulary, clip_states, clip_window, clip_windows, joined_words, t5_windows
from dsd.contracts import ModelError, OptionError


class StableDiffusion3Backbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` Stable Diffusion 3 or 3.5 pipeline (Esser et al. 2024).

    A caption's tokens are those of the CLIP encoders, whose states are joined by width and padded with zeros, and
    behind them those of T5; ``own`` marks the caption in both. Without T5 its tokens are zeros, and none is own. The
    model has no masks: padding is attended to, as in the stock pipeline. The pooled outputs of the CLIP encoders (of
    several windows, their mean) go in with the timestep. T5 takes 256 tokens at once, more in further windows.

    Args:
        name: Where it came from.
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, transformer, scheduler: The pipeline's parts.
        text_encoder_3, tokenizer_3: T5, or None.

    Raises:
        ModelError: If the parts do not fit together.
    """

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")
    optional_components = ("text_encoder_3", "tokenizer_3")

    T5_WINDOW = 256

    def __init__(
        self,
        name: str,
        *,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        transformer: Any,
        scheduler: Any,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
    ) -> None:
        config, family = transformer.config, "Stable Diffusion 3"
        patch = int(config.patch_size)
        schedule = Flow(name, scheduler, lambda height, width: (height // patch) * (width // patch))
        encoders = [e for e in (text_encoder, text_encoder_2, text_encoder_3) if e is not None]
        super().__init__(name, vae=vae, denoiser=transformer, schedule=schedule, encoders=encoders, patch=patch)
        self.text_encoder, self.text_encoder_2, self.text_encoder_3 = text_encoder, text_encoder_2, text_encoder_3
        self.tokenizer, self.tokenizer_2, self.tokenizer_3 = tokenizer, tokenizer_2, tokenizer_3
        check_channels(name, transformer, vae, config.in_channels, config.out_channels, family)
        pooled = text_encoder.config.projection_dim + text_encoder_2.config.projection_dim
        check_width(name, transformer, config.pooled_projection_dim, pooled, family, "pooled texts")
        width = text_encoder.config.hidden_size + text_encoder_2.config.hidden_size
        if width > config.joint_attention_dim:
            check_width(name, transformer, config.joint_attention_dim, width, family)
        if (text_encoder_3 is None) != (tokenizer_3 is None):
            raise ModelError(f"{name}: got T5 without its tokenizer or the other way, expected both or neither")
        if text_encoder_3 is not None:
            check_width(name, transformer, config.joint_attention_dim, text_encoder_3.config.d_model, family)
            check_vocabulary(name, tokenizer_3, int(text_encoder_3.config.vocab_size))
        windows = {clip_window(name, t, e) for t, e in ((tokenizer, text_encoder), (tokenizer_2, text_encoder_2))}
        if len(windows) != 1:
            raise ModelError(f"{name}: got text encoders of windows {sorted(windows)}, expected one window for both")
        self._window = windows.pop()
        self.image_size = int(config.sample_size) * self._factor
        self.timesteps = schedule.default_timesteps(*self.latent_shape(self.image_size)[1:])

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        shape = super().latent_shape(size)
        most = int(self.denoiser.config.pos_embed_max_size) * self._patch
        if shape[1] > most:
            raise OptionError(f"got size {size}, expected at most {most * self._factor} for {self.name}")
        return shape

    def _encode_text(self, text: str) -> TextStates:
        windows = clip_windows(self.tokenizer, text, self._window)
        first, pooled = clip_states(self.text_encoder, windows)
        second, pooled_2 = clip_states(self.text_encoder_2, clip_windows(self.tokenizer_2, text, self._window))
        clip = torch.cat([first.to(self.device), second.to(self.device)], -1)
        clip = F.pad(clip, (0, self.denoiser.config.joint_attention_dim - clip.shape[-1]))
        t5, own, words = self._t5(text)
        if words is not None:
            words = joined_words(windows.words, len(windows.own), words)
        return TextStates(
            torch.cat([clip, t5.to(clip.dtype)])[None],
            torch.cat([windows.own, own])[None].to(self.device),
            (words or windows.words,),
            torch.cat([pooled.to(self.device), pooled_2.to(self.device)], -1)[None],
        )

    def _t5(self, text: str) -> tuple[Tensor, Tensor, CaptionWords | None]:
        """T5's states (tokens, width), its own tokens, and the words along them."""
        if self.text_encoder_3 is None:
            states = torch.zeros(self.T5_WINDOW, self.denoiser.config.joint_attention_dim, device=self.device)
            return states, torch.zeros(self.T5_WINDOW, dtype=torch.bool), None
        windows = t5_windows(self.tokenizer_3, text, self.T5_WINDOW)
        # without a mask, as in the stock pipeline
        states = self.text_encoder_3(windows.ids.to(self.text_encoder_3.device))[0]
        return states.flatten(0, 1).to(self.device), windows.own, windows.words

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        assert text.pooled is not None
        out: Tensor = self.denoiser(
            hidden_states=noised,
            timestep=timesteps,
            encoder_hidden_states=text.states.to(self.dtype),
            pooled_projections=text.pooled.to(self.dtype),
        ).sample
        return out
