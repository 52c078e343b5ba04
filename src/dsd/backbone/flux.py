"""FLUX.1: VAE, CLIP for the caption as a whole, T5 for its tokens, a transformer over text and image jointly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsd.backbone.base import TextStates
from dsd.backbone.latent import GUIDANCE, Flow, LatentBackbone, check_channels, check_width
from dsd.backbone.text import check_vocabulary, clip_window, clip_windows, t5_windows

_PACK = 2
"""Latent positions a side that the transformer is given as one, whose channels lie side by side."""


class FluxBackbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` FLUX.1 pipeline (dev and schnell).

    A caption's tokens are T5's alone, at most 512 at once (schnell: 256), more in further windows; CLIP's pooled output
    (of several windows, their mean) goes in with the timestep. The model has no masks: padding is attended to, as in
    the stock pipeline. A model that was distilled with guidance is told a guidance of 1, which is none.

    Args:
        name: Where it came from.
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, transformer, scheduler: The pipeline's parts.

    Raises:
        ModelError: If the parts do not fit together.
    """

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline")
    components = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")

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
    ) -> None:
        config, family = transformer.config, "FLUX.1"
        schedule = Flow(name, scheduler, lambda height, width: (height // _PACK) * (width // _PACK))
        encoders = (text_encoder, text_encoder_2)
        super().__init__(name, vae=vae, denoiser=transformer, schedule=schedule, encoders=encoders, patch=_PACK)
        self.text_encoder, self.text_encoder_2 = encoders
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        channels, out = (c // _PACK**2 for c in (config.in_channels, transformer.out_channels))
        check_channels(name, transformer, vae, channels, out, family)
        check_width(name, transformer, config.joint_attention_dim, text_encoder_2.config.d_model, family)
        check_width(
            name, transformer, config.pooled_projection_dim, text_encoder.config.hidden_size, family, "pooled texts"
        )
        check_vocabulary(name, tokenizer_2, int(text_encoder_2.config.vocab_size))
        self._window = clip_window(name, tokenizer, text_encoder)
        self._guided = bool(config.guidance_embeds)
        self._t5_window = 512 if self._guided else 256
        self.image_size = int(vae.config.sample_size)  # the transformer is for any size
        self.timesteps = schedule.default_timesteps(*self.latent_shape(self.image_size)[1:])

    @property
    def caption_settings(self) -> Mapping[str, Any]:
        return {"t5_window": self._t5_window}

    def _encode_text(self, text: str) -> TextStates:
        clip = clip_windows(self.tokenizer, text, self._window)
        pooled = self.text_encoder(clip.ids.to(self.text_encoder.device)).pooler_output.mean(0)
        windows = t5_windows(self.tokenizer_2, text, self._t5_window)
        # without a mask, as in the stock pipeline
        states = self.text_encoder_2(windows.ids.to(self.text_encoder_2.device))[0]
        return TextStates(
            states.flatten(0, 1)[None].to(self.device),
            windows.own[None].to(self.device),
            (windows.words,),
            pooled[None].to(self.device),
        )

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        assert text.pooled is not None
        n, channels, height, width = noised.shape
        rows, columns = height // _PACK, width // _PACK
        # (n, c, rows * 2, columns * 2) => (n, rows * columns, c * 2 * 2)
        packed = noised.unflatten(3, (columns, _PACK)).unflatten(2, (rows, _PACK)).permute(0, 2, 4, 1, 3, 5)
        axes = [torch.arange(length, dtype=torch.float32, device=noised.device) for length in (1, rows, columns)]
        out: Tensor = self.denoiser(
            hidden_states=packed.reshape(n, rows * columns, channels * _PACK**2),
            timestep=timesteps / 1000,
            guidance=torch.full((n,), GUIDANCE, device=noised.device) if self._guided else None,
            pooled_projections=text.pooled.to(self.dtype),
            encoder_hidden_states=text.states.to(self.dtype),
            txt_ids=torch.zeros(text.states.shape[1], 3, device=noised.device),
            img_ids=torch.cartesian_prod(*axes),
        ).sample
        unpacked: Tensor = out.unflatten(2, (channels, _PACK, _PACK)).unflatten(1, (rows, columns))
        return unpacked.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, height, width)
