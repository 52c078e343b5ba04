"""Checks that need a GPU, in one run of at most 9 minutes: ``python benchmarks/gpu.py --out results.json``.

Full-size configurations with random weights: each is saved as a pipeline and loaded as users load theirs; then what a
pass, a score and a step of learning cost in time and memory, and how far bfloat16 is from float32 on the same weights.
What no time is left for is skipped, and said to be. ``--small`` runs the same on small networks of the same layout, to
try the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from configurations import CONFIGURATIONS, pipeline
from dsd.backbone import Backbone, load_backbone
from dsd.contracts import Example
from dsd.evaluate import write_text
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig, noised_pass

MODELS = ("sd21-base", "sd15", "sdxl", "sd3-medium")
LIMIT = 420.0
"""Seconds after which nothing new is begun; what is begun, compiling above all, ends within 120."""
CAPTIONS = ("a red circle above a blue square", "a blue square above a red circle")


def clock(run: Callable[[], Any], device: torch.device, repeats: int = 3) -> dict[str, Any]:
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
    """The bare denoiser pass against the pass with every layer probed, side by side."""
    scorer = Scorer(backbone, ScoreConfig("attention", backbone.timesteps))
    latents = scorer.latents(pictures(1)).expand(rows, -1, -1, -1)
    text = scorer.texts([CAPTIONS[0]])[0].select([0] * rows)
    timesteps = torch.full((rows,), 500, device=device)
    noise = scorer.noise[:1].expand(rows, -1, -1, -1)
    with torch.no_grad():
        bare = clock(lambda: noised_pass(backbone, latents, noise, timesteps, text), device)
        probed = clock(lambda: noised_pass(backbone, latents, noise, timesteps, text, scorer.score.layers), device)
    return {"rows": rows, "bare": bare, "probed": probed, "overhead": probed["seconds"] / bare["seconds"] - 1}


def matrix_product_peak(device: torch.device, size: int) -> float:
    """Floating-point operations a second of products of bfloat16 matrices, as measured."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / float(clock(lambda: a @ b, device, repeats=10)["seconds"])


WAYS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled, CUDA graphs": {"mode": "reduce-overhead"},
    "compiled, tuned": {"mode": "max-autotune-no-cudagraphs"},
}
"""Options of ``Scorer.compile``, the quickest to compile first."""


def throughput(
    backbone: Backbone, rows: int, device: torch.device, peak: float, late: Callable[[], bool]
) -> dict[str, Any]:
    """Passes a second, bare and with the attention score, plain, in channels-last layout and compiled.

    With each the share of the peak that bare passes reach, and how far scores are from the plain ones.
    """
    scorer = Scorer(backbone, ScoreConfig("attention", backbone.timesteps))
    latents = scorer.latents(pictures(1)).expand(rows, -1, -1, -1).contiguous()
    text = scorer.texts([CAPTIONS[0]])[0]
    captions = [0] * rows
    timesteps = torch.full((rows,), 500, device=device)
    noise = scorer.noise[:1].expand(rows, -1, -1, -1).contiguous()

    @torch.no_grad()
    def bare() -> Any:
        return noised_pass(backbone, latents, noise, timesteps, text, captions=captions).predicted

    @torch.no_grad()
    def scored() -> Any:
        layers = scorer.score.layers
        made = noised_pass(
            backbone, latents, noise, timesteps, text, layers, captions=captions, over="own", predict=False
        )
        return scorer.score(made, None)

    with FlopCounterMode(display=False) as counter:
        bare()
    operations = counter.get_total_flops()
    found: dict[str, Any] = {"rows": rows, "operations a row": operations / rows, "ways": {}}
    plain = bare().clone(), scored().clone()

    def measure(name: str) -> None:
        apart = [float((now - before).abs().max()) for now, before in zip((bare(), scored()), plain, strict=True)]
        made, heard = clock(bare, device, repeats=5), clock(scored, device, repeats=5)
        found["ways"][name] = {
            "rows a second": rows / made["seconds"],
            "share of peak": operations / made["seconds"] / peak,
            "peak_gib": made["peak_gib"],
            "attention score, rows a second": rows / heard["seconds"],
            "overhead of the score": heard["seconds"] / made["seconds"] - 1,
            "noise differs by": apart[0],
            "score differs by": apart[1],
        }

    measure("plain")
    backbone.denoiser.to(memory_format=torch.channels_last)
    measure("channels last")
    fastest = max(found["ways"], key=lambda name: found["ways"][name]["rows a second"])
    if fastest == "plain":
        backbone.denoiser.to(memory_format=torch.contiguous_format)
    found["compiled with"] = fastest
    try:
        for name, options in WAYS.items():
            if late():
                found.setdefault("skipped, no time left", []).append(name)
                continue
            torch._dynamo.reset()
            start = time.perf_counter()
            scorer.compile(**options)
            bare()
            scored()
            seconds = time.perf_counter() - start
            measure(name)
            found["ways"][name]["compiling, seconds"] = seconds
    finally:
        for module in backbone.denoiser.modules():
            module._compiled_call_impl = None
        backbone.compiled = False
        backbone.denoiser.to(memory_format=torch.contiguous_format)
    return found


def step(backbone: Backbone, device: torch.device) -> dict[str, Any]:
    """A step of learning prompts of rank 4 on all attention layers, from one example with two candidates."""
    examples = [Example(str(i), (pictures(1)[0],), CAPTIONS, ((0, i % 2),)) for i in range(4)]
    steps = 4
    config = FitConfig(steps=steps, batch=1, check_every=steps, gradient_checkpointing=True)
    matcher = Matcher(backbone, ScoreConfig("attention", backbone.timesteps))
    prompt = PromptConfig(attention="all")
    made = clock(lambda: matcher.fit(examples[:2], examples[2:], config=config, prompt=prompt), device, repeats=1)
    matcher.forget()
    return {"seconds": made["seconds"] / steps, "peak_gib": made["peak_gib"]}


def check(name: str, device: torch.device, small: bool, peak: float, late: Callable[[], bool]) -> dict[str, Any]:
    """All that is measured of one model; ``peak`` is of matrix products, operations a second."""
    found: dict[str, Any] = {}
    tables: dict[torch.dtype, dict[str, np.ndarray]] = {}

    def unless_late(what: str, run: Callable[[], Any]) -> Any:
        if late():
            found.setdefault("skipped, no time left", []).append(what)
            return None
        return run()

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with device:
            pipeline(name, torch.bfloat16, small=small).save_pretrained(folder)
        found["making and saving, seconds"] = time.perf_counter() - start
        for dtype in (torch.bfloat16, torch.float32):
            free(device)
            start = time.perf_counter()
            backbone = unless_late(f"{dtype}", lambda d=dtype: load_backbone(folder, device=device, dtype=d))
            if backbone is None:
                break
            key = str(dtype).removeprefix("torch.")
            made: dict[str, Any] = {"loading, seconds": time.perf_counter() - start}
            found[key] = made
            found["pixels"], found["family"] = backbone.image_size, type(backbone).__name__
            tables[dtype] = {}
            for kind in ("attention", "denoising"):
                score = ScoreConfig(kind, backbone.timesteps)
                start = time.perf_counter()
                table = unless_late(
                    f"{key} {kind}", lambda b=backbone, s=score: Matcher(b, s).score(pictures(2), CAPTIONS)
                )
                if table is not None:
                    tables[dtype][kind] = table.scores
                    made[f"{kind} of 2 x 2, seconds"] = time.perf_counter() - start
            rows = (1, 8) if dtype == torch.bfloat16 else (1,)
            made["passes"] = [
                p
                for n in rows
                if (p := unless_late(f"{key} pass of {n}", lambda b=backbone, n=n: passes(b, n, device)))
            ]
            if dtype == torch.bfloat16:
                made["throughput"] = unless_late(
                    "throughput", lambda b=backbone: throughput(b, 2 if small else 8, device, peak, late)
                )
                made["learning step"] = unless_late("learning step", lambda b=backbone: step(b, device))
            print(f"{name} {key}", file=sys.stderr, flush=True)
            del backbone
    if len(tables) == 2:
        half, full = tables[torch.bfloat16], tables[torch.float32]
        found["bfloat16 less float32"] = {
            k: {
                "largest difference": float(np.abs(half[k] - full[k]).max()),
                "largest score": float(np.abs(full[k]).max()),
                "spread of scores": float(full[k].std()),
            }
            for k in half.keys() & full.keys()
        }
    return found


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(CONFIGURATIONS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which nothing new is begun")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    device = torch.device(options.device)
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    peak = matrix_product_peak(device, 512 if options.small else 8192)
    results: dict[str, Any] = {
        "device": name,
        "peak of matrix products, TFLOP/s": peak / 1e12,
        "versions": versions,
        "small": options.small,
        "models": {},
    }
    for model in options.models:
        try:
            results["models"][model] = check(
                model, device, options.small, peak, lambda: time.perf_counter() - start > options.limit
            )
        except Exception as error:  # of one model, so that the others are still measured; it is written down
            results["models"][model] = {"error": f"{type(error).__name__}: {error}"}
        free(device)
        results["seconds"] = time.perf_counter() - start
        write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    if any("error" in found for found in results["models"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
