"""Checkpoint => image latents, text states, one noised pass."""

from dsd.backbone.base import Backbone, CaptionWords, Latents, TextStates
from dsd.backbone.loading import cards, load_backbone

__all__ = ["Backbone", "CaptionWords", "Latents", "TextStates", "cards", "load_backbone"]
