"""The embedded model as it ships."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

import dsd
from dsd.evaluate import evaluate
from dsd.tasks import world_task
from dsd.tiny import world
from dsd.tiny.captions import Claim, Phrase, say

WEIGHTS = Path(str(files("dsd.tiny").joinpath("weights")))


def test_weights_are_small_safe_and_described():
    size = sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file())
    assert size < 25e6
    assert {p.suffix for p in WEIGHTS.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt", ".md"}
    card = (WEIGHTS / "README.md").read_text()
    record = json.loads((WEIGHTS / "training.json").read_text())
    for word in ("Data", "Hardware", f"{record['stages']['unet']['samples']:,}", "predicate"):
        assert word in card


def test_stock_diffusers_loads_and_draws_with_it():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = pipeline(
        "a red circle above a blue square",
        num_inference_steps=20,
        height=32,
        width=32,
        generator=generator,
        output_type="np",
    ).images[0]
    assert image.shape == (32, 32, 3)
    assert image.std() > 0.02


@pytest.mark.slow
def test_zero_shot_is_far_above_chance_on_held_out_scenes():
    matcher = dsd.Matcher.from_pretrained("tiny")
    result = evaluate(matcher, world_task("comvg", "test", "easy", 90, 1))
    assert result.metrics["accuracy"]["low"] > 0.6


def test_latents_keep_what_a_caption_speaks_of():
    """Decoded latents of scenes that never occurred in pretraining are close to the scenes."""
    matcher = dsd.Matcher.from_pretrained("tiny")
    backbone = matcher.backbone
    rng = random.Random(0)
    pictures = [world.render(world.sample_scene(rng, "test", "standard")).resize((32, 32)) for _ in range(8)]
    latents = backbone.encode_images(pictures)
    assert 0.5 < latents.std() < 2
    decoded = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample
    truth = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    error = (decoded - truth).square().mean()
    assert 10 * torch.log10(4 / error) > 24  # dB


def test_it_knows_its_words():
    tokens = dsd.Matcher.from_pretrained("tiny").backbone.encode_texts(
        [say(random.Random(0), Claim(Phrase("red", "circle"), "left of", Phrase("blue", "square")))]
    )[0]
    assert all(len(t) == 1 for t in tokens.words[0].tokens)
