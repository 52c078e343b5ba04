"""Stable Diffusion 1.x and 2.x, and every pipeline of that layout: VAE, one CLIP text encoder, a U-Net."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from dsd.backbone.base import Backbone, CaptionWords, Latents, TextStates, execution_device
from dsd.contracts import ImageError, ModelError, TextError


class StableDiffusionBackbone(Backbone):
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
        self.name = name
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.denoiser = unet.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = scheduler.config
        self.prediction_type = config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                f"{name}: got prediction type {self.prediction_type!r}, "
                "expected epsilon, v_prediction or sample; correct scheduler/scheduler_config.json"
            )
        _check_fit(name, vae.config, text_encoder.config, tokenizer, unet.config)
        self.num_train_timesteps = int(config.num_train_timesteps)
        self._alphas = scheduler.alphas_cumprod.float().to(self.device)
        self._factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.image_size = int(unet.config.sample_size) * self._factor

    @property
    def device(self) -> torch.device:
        return execution_device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.denoiser.parameters()).dtype
        return dtype

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        side = size // self._factor
        return int(self.vae.config.latent_channels), side, side

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Latents:
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise ImageError(f"got pictures of sizes {sorted(sizes)}, expected one size; resize and crop them first")
        stack = np.stack([np.asarray(image) for image in images])
        pixels = torch.from_numpy(stack).to(self.device).permute(0, 3, 1, 2)
        pixels = pixels.to(self.vae.dtype) / 127.5 - 1  # uint8 => -1..1
        posterior = self.vae.encode(pixels).latent_dist  # pixels => latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (posterior.mode().float() - shift) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        window = min(int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))
        found = []
        for text in texts:
            ids, words = self._tokenize(text)
            pieces = _windows(words, window - 2) or [range(0)]
            rows = [[self.tokenizer.bos_token_id, *(ids[i] for i in p), self.tokenizer.eos_token_id] for p in pieces]
            padded = torch.tensor([row + [self.tokenizer.pad_token_id] * (window - len(row)) for row in rows])
            # SD 1.x and 2.x attend to the padding too, so no mask is given, as in the stock pipeline
            states = self.text_encoder(padded.to(self.device)).last_hidden_state
            own = torch.zeros(len(rows) * window, dtype=torch.bool)
            position = np.zeros(len(ids), int)  # of each token of the caption, along the joined windows
            for k, piece in enumerate(pieces):
                position[piece.start : piece.stop] = k * window + 1 + np.arange(len(piece))
            own[position] = True
            spelling = _spelling(self.tokenizer, text, ids, words)
            tokens = tuple(
                tuple(int(position[i]) for i in range(len(ids)) if words[i] == w) for w in range(len(spelling))
            )
            found.append(
                TextStates(states.flatten(0, 1)[None], own[None].to(self.device), (CaptionWords(spelling, tokens),))
            )
        return found

    def _tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids without start and end, and the number of the word that each belongs to."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise TextError(f"got the caption {text!r}, expected Unicode text; save or type it as UTF-8")
        encoded = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        ids = list(encoded.input_ids)
        word_ids = encoded.word_ids() if encoded.is_fast else None
        words = list(range(len(ids))) if word_ids is None else [0 if w is None else w for w in word_ids]
        if text.strip() and not ids:
            raise TextError(f"got the caption {text!r}, of which the tokenizer keeps nothing; expected words")
        return ids, words

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        a = self._alphas_at(timesteps)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def predict_noise(self, noised: Latents, timesteps: Int[Tensor, " n"], text: TextStates) -> Latents:
        out: Tensor = self.denoiser(noised.to(self.dtype), timesteps, text.states.to(self.dtype)).sample.float()
        if self.prediction_type == "epsilon":
            return out
        a = self._alphas_at(timesteps)
        if self.prediction_type == "v_prediction":  # v = sqrt(abar) e - sqrt(1 - abar) z0 (Salimans & Ho 2022)
            return a.sqrt() * out + (1 - a).sqrt() * noised
        return (noised - a.sqrt() * out) / (1 - a).sqrt()

    def _alphas_at(self, timesteps: Tensor) -> Tensor:
        """The share of signal left at each timestep (abar), to multiply latents with."""
        alphas: Tensor = self._alphas[timesteps]
        return alphas[:, None, None, None]


def _check_fit(name: str, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any) -> None:
    """Refuses parts which load, each by itself, yet make no pass together."""
    channels, width = int(vae.latent_channels), int(text_encoder.hidden_size)
    known = "expected a Stable Diffusion 1.x or 2.x pipeline for text to image"
    if not unet.in_channels == unet.out_channels == channels:
        raise ModelError(
            f"{name}: got a U-Net of {unet.in_channels} to {unet.out_channels} channels over latents of {channels}; "
            + known
        )
    if unet.cross_attention_dim != width:
        raise ModelError(
            f"{name}: got a U-Net for texts of width {unet.cross_attention_dim} and a text encoder of width {width}; "
            + known
        )
    # a token for every byte, and for every byte that ends a word, are the least that CLIP has
    if not 512 < len(tokenizer) <= text_encoder.vocab_size:
        raise ModelError(
            f"{name}: got a tokenizer of {len(tokenizer)} tokens for a text encoder of {text_encoder.vocab_size}, "
            "expected those that were saved together; export the pipeline again with save_pretrained"
        )


def _windows(words: Sequence[int], size: int) -> list[range]:
    """Splits token positions into runs of at most ``size``, between words where a word fits a window."""
    runs, start = [], 0
    while start < len(words):
        stop = min(start + size, len(words))
        cut = stop
        while stop < len(words) and cut > start and words[cut - 1] == words[cut]:
            cut -= 1
        stop = cut if cut > start else stop
        runs.append(range(start, stop))
        start = stop
    return runs


def _spelling(tokenizer: Any, text: str, ids: Sequence[int], words: Sequence[int]) -> tuple[str, ...]:
    """How each word is spelled, in the order of the word numbers."""
    count = max(words, default=-1) + 1
    pieces = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_", text.lower())
    if len(pieces) == count:
        return tuple(pieces)
    return tuple(tokenizer.decode([i for i, w in zip(ids, words, strict=True) if w == k]) for k in range(count))
