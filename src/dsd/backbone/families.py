"""The model families that there are; the one place that lists them."""

from __future__ import annotations

from dsd.backbone.base import Backbone
from dsd.backbone.dit import DiTBackbone
from dsd.backbone.flux import FluxBackbone
from dsd.backbone.pixart import PixArtBackbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.backbone.stable_diffusion_3 import StableDiffusion3Backbone
from dsd.backbone.stable_diffusion_xl import StableDiffusionXLBackbone

FAMILIES: tuple[type[Backbone], ...] = (
    StableDiffusionBackbone,
    StableDiffusionXLBackbone,
    StableDiffusion3Backbone,
    FluxBackbone,
    PixArtBackbone,
    DiTBackbone,
)
"""A pipeline belongs to the family that names its class among its ``pipelines``."""
