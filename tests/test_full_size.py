"""Models at full size: their published configurations, without memory for weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsd import prompts
from dsd.adapters import Adapter
from dsd.backbone import Backbone
from dsd.probe import cross_attention_layers, paper_layers
from dsd.prompts import PromptConfig

PUBLISHED = {
    "sd15": (859_520_964, 16, 512),
    "sd21-base": (865_910_724, 16, 512),
    "sdxl": (2_567_463_684, 70, 1024),
    "sd3-medium": (2_028_328_000, 24, 1024),
    "sd35-medium": (2_243_171_520, 24, 1024),
    "pixart-sigma": (610_856_096, 28, 1024),
    "flux-schnell": (11_891_178_560, 57, 1024),
}
"""Parameters of the denoiser, layers that attend to text, pixels."""


@pytest.fixture(scope="module")
def configurations() -> Any:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "configurations.py"
    spec = importlib.util.spec_from_file_location("configurations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["configurations"] = module
    spec.loader.exec_module(module)
    return module


def full_size(configurations: Any, name: str) -> Backbone:
    family, make = configurations.CONFIGURATIONS[name]
    with torch.device("meta"):
        parts = make(False)
    made: Backbone = family(name, **parts)
    return made


def test_every_configuration_is_here(configurations: Any) -> None:
    assert set(configurations.CONFIGURATIONS) == set(PUBLISHED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_is_the_published_one(configurations: Any, name: str) -> None:
    backbone = full_size(configurations, name)
    count, layers, pixels = PUBLISHED[name]
    assert sum(p.numel() for p in backbone.denoiser.parameters()) == count
    assert len(cross_attention_layers(backbone.denoiser)) == layers
    assert backbone.image_size == pixels
    assert backbone.latent_shape(pixels)[1:] == (pixels // 8, pixels // 8)
    prompts.attach(backbone.denoiser, PromptConfig(attention="all", tokens=2))
    assert all(p.requires_grad for p in prompts.parameters(backbone.denoiser).values())


def test_the_authors_adapter_loads_onto_sd21_base(configurations: Any, shared: Path) -> None:
    folder = shared / "official" / "adapter"
    if not (folder / "pytorch_model.bin").is_file():
        pytest.skip("needs the authors' adapter in ../shared/official")
    backbone = full_size(configurations, "sd21-base")
    Adapter.load(folder).attach(backbone)
    assert len(prompts.parameters(backbone.denoiser)) == 256
    assert len(paper_layers(backbone.denoiser)) == 6
