"""Kills a fit (SIGKILL) at random moments and lets it go on: ``python killed.py MODEL FOLDER TIMES SCORE``.

Prints a line of JSON: how many adapters are, byte for byte, that of a fit without a stop, whether there is anything in
that, and after how many steps each was killed. Every fit is a process of its own, forked so that nothing is imported
twice.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from dsd.adapt import fit
from dsd.backbone import load_backbone
from dsd.learn import FitConfig
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig
from models import toy

CONFIG = FitConfig(steps=16, batch=4, check_every=4, folds=2, learning_rate=0.05, jitter=10, patience=9)
METHODS = {"attention": "prompt+tokens+words+heads", "denoising": "prompt+tokens"}
"""By score. With ``denoising``, attention is taught by itself, and what it costs is looked at too."""


def lesson(model: str, folder: Path, kind: str) -> None:
    """One fit, from wherever it was stopped."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    scorer = Scorer(load_backbone(model), ScoreConfig(kind, (20, 100)))
    fit(
        scorer,
        toy(12),
        config=replace(CONFIG, method=METHODS[kind]),
        prompt=PromptConfig(rank=4, tokens=2, words=("blue",) if "words" in METHODS[kind] else ()),
        checkpoint=folder / "fit.checkpoint",
        resume=True,
        log=folder / "log.jsonl",
    ).save(folder / "adapter")


def start(model: str, folder: Path, kind: str) -> int:
    """A process that fits; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            lesson(model, folder, kind)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def main(model: str, out: Path, times: int, kind: str) -> None:
    began = time.perf_counter()
    assert ended(start(model, out / "whole", kind)) == 0
    seconds = time.perf_counter() - began
    kept = json.loads((out / "whole" / "adapter" / "adapter_config.json").read_text())["training"]["kept"]
    whole = {p.name: p.read_bytes() for p in (out / "whole" / "adapter").iterdir()}
    log = (out / "whole" / "log.jsonl").read_text()
    rng = random.Random(0)
    same, killed = 0, []
    while len(killed) < times:
        folder = out / str(len(killed))
        child = start(model, folder, kind)
        time.sleep(rng.uniform(0.1, 0.95) * seconds)
        os.kill(child, signal.SIGKILL)
        if ended(child) != -signal.SIGKILL:  # it was quicker
            shutil.rmtree(folder)
            continue
        killed.append(steps(folder))
        assert ended(start(model, folder, kind)) == 0
        found = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
        same += found == whole and (folder / "log.jsonl").read_text() == log
    print(json.dumps({"same": same, "kept": kept, "steps": log.count("\n"), "killed_after": killed}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
