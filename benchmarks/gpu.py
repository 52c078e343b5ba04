"""Checks that need a GPU, in one run of at most 9 minutes: ``python benchmarks/gpu.py --out results.json``.

Full-size configurations with random weights: what a pass, a score and a step of learning cost in time and memory, and
how far half precision is from float32. ``--small`` runs the same on a tiny network, to try the script on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from dsd.backbone import Backbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.contracts import Example
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig, noised_pass
from dsd.tiny.pretrain import build_tokenizer

TIMESTEPS = (189, 389, 589, 789)


def sd21_base(device: torch.device, dtype: torch.dtype, small: bool) -> Backbone:
    """Stable Diffusion 2.1-base as its configuration files describe it, with random weights."""
    torch.manual_seed(0)
    channels = (32, 64, 64, 64) if small else (320, 640, 1280, 1280)
    heads = (1, 2, 2, 2) if small else (5, 10, 20, 20)
    width = 64 if small else 1024
    unet = UNet2DConditionModel(
        sample_size=16 if small else 64,
        block_out_channels=channels,
        attention_head_dim=heads,
        cross_attention_dim=width,
        use_linear_projection=True,
    )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=16,
        num_hidden_layers=2 if small else 23,
        hidden_act="gelu",
        projection_dim=512,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8 if small else 32,
    )
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    return StableDiffusionBackbone(
        "sd21-base (random weights)",
        vae=vae.to(device, dtype),
        text_encoder=CLIPTextModel(text).to(device, dtype),
        tokenizer=tokenizer,
        unet=unet.to(device, dtype),
        scheduler=schedule,
    )


def clock(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> dict[str, Any]:
    """Median seconds of a call, after one to warm up, and its peak memory in GiB (GPU alone)."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"seconds": float(np.median(times)), "peak_gib": memory}


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8).repeat(8, 0).repeat(8, 1)) for _ in range(count)
    ]


def passes(backbone: Backbone, rows: int, device: torch.device) -> dict[str, Any]:
    """The bare denoiser pass against the pass with every cross-attention layer probed, side by side."""
    scorer = Scorer(backbone, ScoreConfig("attention", TIMESTEPS))
    latents = scorer.latents(pictures(1)).expand(rows, -1, -1, -1)
    text = scorer.texts(["a red circle above a blue square"])[0].select([0] * rows)
    timesteps = torch.full((rows,), 500, device=device)
    noise = scorer.noise[:1].expand(rows, -1, -1, -1)
    with torch.no_grad():
        bare = clock(lambda: noised_pass(backbone, latents, noise, timesteps, text), device)
        probed = clock(lambda: noised_pass(backbone, latents, noise, timesteps, text, scorer.score.layers), device)
    return {"rows": rows, "bare": bare, "probed": probed, "overhead": probed["seconds"] / bare["seconds"] - 1}


def step(backbone: Backbone, device: torch.device) -> dict[str, Any]:
    """A step of learning prompts of rank 4 on all attention layers, from one example with two candidates."""
    image = pictures(1)[0]
    examples = [Example(str(i), (image,), ("a red circle", "a blue square"), ((0, i % 2),)) for i in range(4)]
    steps = 6
    config = FitConfig(steps=steps, batch=1, check_every=steps)
    matcher = Matcher(backbone, ScoreConfig("attention", TIMESTEPS))
    prompt = PromptConfig(attention="all")
    made = clock(lambda: matcher.fit(examples[:2], examples[2:], config=config, prompt=prompt), device, repeats=1)
    return {"seconds": made["seconds"] / steps, "peak_gib": made["peak_gib"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "small": options.small}
    captions = ["a red circle above a blue square", "a blue square above a red circle"]
    tables = {}
    for dtype in (torch.float32, torch.bfloat16):
        backbone = sd21_base(device, dtype, options.small)
        found: dict[str, Any] = {"passes": [passes(backbone, rows, device) for rows in (1, 8)]}
        kinds = ("attention", "denoising")
        tables[dtype] = {
            k: Matcher(backbone, ScoreConfig(k, TIMESTEPS)).score(pictures(2), captions).scores for k in kinds
        }
        found["learning step"] = step(backbone, device)
        results[str(dtype).removeprefix("torch.")] = found
        print(f"{dtype}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        del backbone
    results["largest difference of bfloat16 from float32, as a share of the spread"] = {
        k: float(np.abs(tables[torch.bfloat16][k] - v).max() / max(v.std(), 1e-9))
        for k, v in tables[torch.float32].items()
    }
    results["seconds"] = time.perf_counter() - start
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
