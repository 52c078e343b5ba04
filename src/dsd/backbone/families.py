"""The model families that there are; the one place that lists them."""

from __future__ import annotations

from dsd.backbone.base import Backbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone

FAMILIES: tuple[type[Backbone], ...] = (StableDiffusionBackbone,)
"""A pipeline belongs to the family that names its class among its ``pipelines``."""
