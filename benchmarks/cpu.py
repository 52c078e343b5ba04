"""A full-size model on a CPU, end to end: ``python benchmarks/cpu.py --out docs/results/cpu``.

Stable Diffusion 2.1-base as its published configuration has it, with random weights: saved as a pipeline, loaded,
one picture scored against two captions, one step of few-shot learning, and the paper authors' adapter put on if one is
named. Writes a JSON file and a Markdown page with times and peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from configurations import pipeline
from dsd.adapters import Adapter
from dsd.contracts import Example
from dsd.evaluate import write_text
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.report import table
from dsd.scores import ScoreConfig
from machine import cpu_name, peak

MODEL = "sd21-base"
PHASES = ("score", "step", "adapter")
CAPTIONS = ("a red circle above a blue square", "a blue square above a red circle")


def measure(
    folder: Path,
    dtype: torch.dtype,
    phases: Sequence[str],
    adapter: Path | None,
    timestep: int,
    keep: Callable[..., None],
) -> None:
    """Goes through the phases; each result is kept as soon as it is there, for some take long."""

    def timed(name: str, run: Callable[[], Any], **more: Callable[[Any], Any]) -> Any:
        start = time.perf_counter()
        out = run()
        values = {"seconds": time.perf_counter() - start, "peak, GB": peak()}
        keep(**{name: values | {what: of(out) for what, of in more.items()}})
        return out

    score = ScoreConfig("mixture", (timestep,), weights={"attention": 1.0, "denoising": 1.0})
    matcher = timed("load", lambda: Matcher.from_pretrained(str(folder), score=score, device="cpu", dtype=dtype))
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    size = matcher.backbone.image_size
    image = Image.fromarray(pixels).resize((size, size))
    keep(model=MODEL, pixels=size, dtype=str(dtype).removeprefix("torch."), timestep=timestep)
    if "score" in phases:
        timed("score", lambda: matcher.score([image], CAPTIONS), scores=lambda t: t.scores.tolist())
    if "step" in phases:
        examples = [Example(str(i), (image,), CAPTIONS, ((0, i),)) for i in (0, 1)]
        options = {"negatives": 0, "image_negatives": 0, "gradient_checkpointing": True}
        config = FitConfig(steps=1, batch=1, check_every=1, **options)
        learner = Matcher(matcher.backbone, ScoreConfig("attention", (timestep,)))
        prompt = PromptConfig(attention="all")
        timed("few-shot step", lambda: learner.fit(examples[:1], examples[1:], config=config, prompt=prompt))
        learner.forget()
    if "adapter" in phases and adapter is not None:
        given = Matcher(matcher.backbone, score, adapter=Adapter.load(adapter))
        timed(
            "score with the authors' adapter",
            lambda: given.score([image], CAPTIONS),
            scores=lambda t: t.scores.tolist(),
        )


def page(out: Path, values: dict[str, Any]) -> str:
    """The results as Markdown."""
    timed = {name: value for name, value in values.items() if isinstance(value, dict) and "seconds" in value}
    rows = [{"what": n, "seconds": v["seconds"], "peak, GB": v["peak, GB"]} for n, v in timed.items()]
    no_step = "\nThe few-shot step is not measured yet: `--phases step` adds it.\n"
    return f"""# A full-size model on a CPU

Stable Diffusion 2.1-base by its published configuration, with random weights: {values["pixels"]} pixels a side,
{values["dtype"]}, {values["threads"]} threads of {values["cpu"]}, shared with other work (times are upper bounds).
Scored: one picture against two captions at one timestep, attention and denoising (three passes of the U-Net). The
few-shot step learns prompts of rank 4 on all attention layers for the attention score, from one example with two
candidates, with gradient checkpointing; a look at one held-out example before and after is counted in. Peak memory is
that of the process so far, weights and Python included. Made by `python benchmarks/cpu.py --out {out}`.

{table(rows, list(rows[0]))}
{"" if "few-shot step" in values else no_step}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    parser.add_argument("--adapter", type=Path, help="a folder in the authors' format")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--timestep", type=int, default=389)
    parser.add_argument("--small", action="store_true", help="a small network of the same layout, to try the script")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save is not None:
        # half precision on disk, as models are published
        pipeline(MODEL, torch.float16, small=options.small).save_pretrained(options.save)
        return
    if options.out is None:
        parser.error("expected --out")
    path = options.out.with_suffix(".json")
    values: dict[str, Any] = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "cpu": cpu_name()}
    values["versions"] = {"torch": torch.__version__, "python": platform.python_version()}
    if path.exists() and set(options.phases) != set(PHASES):  # some anew, the others as they were
        values |= json.loads(path.read_text("utf-8"))

    def keep(**more: Any) -> None:
        values.update(more)
        print(more, file=sys.stderr, flush=True)
        write_text(path, json.dumps(values, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, whose memory does not count
        again = [sys.executable, __file__, "--save", folder, *(["--small"] if options.small else [])]
        subprocess.run(again, check=True)
        dtype = getattr(torch, options.dtype)
        measure(Path(folder), dtype, options.phases, options.adapter, options.timestep, keep)
    write_text(options.out.with_suffix(".md"), page(options.out, values))


if __name__ == "__main__":
    main()
