"""PixArt-alpha and PixArt-Sigma: VAE, T5, a transformer in which the image attends to the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsd.backbone.base import TextStates
from dsd.backbone.latent import Diffusion, LatentBackbone, check_channels, check_width, upcast
from dsd.backbone.text import check_vocabulary, t5_windows


class PixArtBackbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` PixArt pipeline (Chen et al. 2023, 2024).

    Captions are lowered in case, as the stock pipeline does. T5 takes 120 tokens of a caption at once (Sigma: 300),
    more in further windows; padding is masked in T5 and in the transformer, so its amount changes nothing. Of the
    transformer's output the channels for a learned variance are left out. Alpha at 1024 pixels is told the picture's
    size.

    Args:
        name: Where it came from.
        vae, text_encoder, tokenizer, transformer, scheduler: The pipeline's parts.

    Raises:
        ModelError: If the parts do not fit together.
    """

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    components = ("vae", "text_encoder", "tokenizer", "transformer", "scheduler")

    def __init__(
        self, name: str, *, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, scheduler: Any
    ) -> None:
        config, family = transformer.config, "PixArt"
        super().__init__(
            name,
            vae=upcast(vae),
            denoiser=transformer,
            schedule=Diffusion(name, scheduler),
            encoders=(text_encoder,),
            patch=int(config.patch_size),
        )
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        learned_variance = transformer.out_channels == 2 * config.in_channels
        out = transformer.out_channels // 2 if learned_variance else transformer.out_channels
        check_channels(name, transformer, vae, config.in_channels, out, family)
        takes = config.cross_attention_dim if config.caption_channels is None else config.caption_channels
        check_width(name, transformer, takes, text_encoder.config.d_model, family)
        check_vocabulary(name, tokenizer, int(text_encoder.config.vocab_size))
        # Sigma's configuration rules them out; alpha's is silent
        self._window = 300 if config.use_additional_conditions is False else 120
        self.image_size = int(config.sample_size) * self._factor

    @property
    def caption_settings(self) -> Mapping[str, Any]:
        return {"window": self._window}

    def _encode_text(self, text: str) -> TextStates:
        windows = t5_windows(self.tokenizer, text.lower().strip(), self._window)
        device = self.text_encoder.device
        states = self.text_encoder(windows.ids.to(device), attention_mask=windows.filled.long().to(device))[0]
        return TextStates(
            states.flatten(0, 1)[None].to(self.device),
            windows.own[None].to(self.device),
            (windows.words,),
            mask=windows.filled.flatten()[None].to(self.device),
        )

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        assert text.mask is not None
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.use_additional_conditions:
            height, width = (side * self._factor for side in noised.shape[-2:])
            told = torch.tensor([height, width, height / width], device=noised.device).expand(len(noised), -1)
            sizes = {"resolution": told[:, :2], "aspect_ratio": told[:, 2:]}
        out: Tensor = self.denoiser(
            noised,
            encoder_hidden_states=text.states.to(self.dtype),
            timestep=timesteps,
            added_cond_kwargs=sizes,
            encoder_attention_mask=text.mask.to(self.dtype),
        ).sample
        return out[:, : noised.shape[1]]
