"""Checkpoint => image latents, text states, one noised pass."""

from dsd.backbone.base import Backbone, CaptionWords, Latents, TextStates
from dsd.backbone.families import FAMILIES
from dsd.backbone.loading import cards, default_timesteps, load_backbone

__all__ = [
    "FAMILIES",
    "Backbone",
    "CaptionWords",
    "Latents",
    "TextStates",
    "cards",
    "default_timesteps",
    "load_backbone",
]
