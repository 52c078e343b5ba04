"""Checkpoint => image latents, text states, one noised pass."""

from dsd.backbone.base import Backbone, CaptionWords, Latents, TextStates
from dsd.backbone.catalog import Card, cards, default_timesteps
from dsd.backbone.families import FAMILIES
from dsd.backbone.loading import LoadConfig, LocalCopy, load_backbone, local_copy
from dsd.backbone.text import words_of

__all__ = [
    "FAMILIES",
    "Backbone",
    "CaptionWords",
    "Card",
    "Latents",
    "LoadConfig",
    "LocalCopy",
    "TextStates",
    "cards",
    "default_timesteps",
    "load_backbone",
    "local_copy",
    "words_of",
]
