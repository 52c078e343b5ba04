"""Where in an image each word of a caption is seen: cross-attention, mapped back onto the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dsd.backbone import TextStates
from dsd.contracts import ImageInput
from dsd.images import load_image, resize_crop
from dsd.probe import Probe, select_layers
from dsd.prompts import join_tokens
from dsd.scorer import Scorer, check_text


@dataclass(frozen=True)
class WordMaps:
    """A picture and, for each word of a caption, where attention to that word is above the caption's average.

    Attributes:
        image: The picture as the model saw it, PIL RGB.
        words: The caption's words in order.
        maps: (n_words, h, w) float32 in 0..1; each word's map has its largest value at 1 (all zero if none).
    """

    image: Any
    words: tuple[str, ...]
    maps: np.ndarray


@torch.no_grad()
def word_maps(scorer: Scorer, image: ImageInput, text: str) -> WordMaps:
    """Attention maps of each word, over the score's timesteps and layers, averaged over heads.

    Each map is the share of a position's attention to the caption's own words that falls on this word, less the mean
    share of that word over the picture: words that everything attends to alike stay dark. Layers of all resolutions
    are brought to the picture's size before they are averaged.
    """
    check_text(text)
    picture = resize_crop(load_image(image), scorer.size)
    (latent,) = scorer.latents([picture])
    (states,) = scorer.texts([text])
    backbone, config = scorer.backbone, scorer.score.config
    states = join_tokens(backbone.denoiser, states)
    layers = scorer.score.layers or select_layers(backbone.denoiser, config.layers)
    timesteps = torch.tensor(config.timesteps, device=backbone.device)
    side = latent.shape[-2:]
    total = torch.zeros(len(states.words[0].spelling), scorer.size, scorer.size)
    # one timestep a pass: maps are large
    for timestep, noise in zip(timesteps, scorer.noise, strict=True):
        t = timestep[None]
        noised = backbone.add_noise(latent[None], noise[None], t)
        with Probe(backbone.denoiser, layers, states.own, states.mask, direction=config.direction, maps=True) as probe:
            backbone.predict_noise(noised, t, states)
        for record in probe.records.values():
            assert record.maps is not None
            total += _upsampled(record.maps[0], states, (side[0], side[1]), scorer.size)
    total = total.clamp(min=0)
    peak = total.flatten(1).max(1).values[:, None, None]
    maps = torch.where(peak > 0, total / peak.clamp(min=1e-12), total)
    return WordMaps(picture, states.words[0].spelling, maps.numpy())


def _upsampled(maps: torch.Tensor, states: TextStates, latent: tuple[int, int], size: int) -> torch.Tensor:
    """(positions, tokens) probabilities => (words, size, size), each word's share above its mean."""
    per_word = torch.stack([maps[:, list(tokens)].sum(1) for tokens in states.words[0].tokens])
    share = per_word / maps[:, states.own[0]].sum(1).clamp(min=1e-12)
    # positions of a layer => its height and width, in the latent's proportions
    ratio = (latent[0] * latent[1] / share.shape[1]) ** 0.5
    grid = share.unflatten(1, (round(latent[0] / ratio), -1))
    grid = grid - grid.mean((1, 2), keepdim=True)
    return F.interpolate(grid[None].float().cpu(), size=(size, size), mode="bicubic", align_corners=False)[0]
