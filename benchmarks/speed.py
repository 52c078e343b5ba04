"""What a score costs, and what is saved: ``python benchmarks/speed.py --out docs/results/speed``.

Ratios are measured side by side in one run, each part in a process of its own, so that its peak memory is its own.
Parts that are there already are kept; ``--parts`` makes some anew. Writes JSON, a Markdown page and a picture.

    exact     the authors' procedure as a plain loop against ours, at the same scores; each saving by itself
    equal     Diffusion Classifier with all candidates against races, at the accuracy of 40 timesteps (embedded model)
    ranking   the best of 1,000 captions of an image (embedded model); long, and kept image by image in runs/ranking
    overhead  a pass that is scored against the bare denoiser
    scaling   in images, texts and timesteps, with the model of cost fitted to it
    learning  steps of few-shot learning
    taught    attention that was taught, on all or on few layers, at few timesteps, against Diffusion Classifier's
              many (embedded model)
    start     of the command line, the library and the embedded model
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from scipy import stats
from torch import Tensor
from transformers import CLIPTextModel

from configurations import clip, clip_tokenizer, diffusion
from dsd.adapters import Adapter
from dsd.backbone import Backbone, load_backbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.baselines.diffusion import DiffusionClassifier
from dsd.contracts import Example, Pair
from dsd.evaluate import installed_versions, write_text
from dsd.images import load_image, resize_crop
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.metrics import outcomes
from dsd.probe import cross_attention_layers, paper_layers, select_layers
from dsd.race import Budget, Price, Race
from dsd.scorer import Scorer, common_noise
from dsd.scores import Pass, ScoreConfig, denoising, even_timesteps, noised_pass
from dsd.tasks import world_task
from machine import cpu_name, peak
from speed_page import draw, page

CAPTIONS = tuple(
    f"a {colour} {shape} {side} a {other} square"
    for colour in ("red", "green")
    for shape in ("circle", "star", "square", "heart", "moon")
    for side, other in (("above", "blue"),)
)


# What is measured on


def like_stable_diffusion(part: int = 4) -> Backbone:
    """Stable Diffusion's layout with a part of its width, at 256 pixels, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=tuple(c // part for c in (320, 640, 1280, 1280)),
        attention_head_dim=tuple(max(1, c // part // 40) for c in (320, 640, 1280, 1280)),  # heads of 40
        cross_attention_dim=768,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=tuple(c // part for c in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=256,
    )
    return StableDiffusionBackbone(
        "Stable Diffusion's layout",
        vae=vae,
        unet=unet,
        text_encoder=clip(CLIPTextModel, False, 768, 12, 12, hidden_act="quick_gelu", projection_dim=768),
        tokenizer=clip_tokenizer(),
        scheduler=diffusion(),
    )


def pictures(count: int, size: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((size, size)) for _ in range(count)]


def seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    """Median of several runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def side_by_side(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians of runs that take turns, in another order each time, after one of each to warm up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order, rng = list(runs), random.Random(0)
    for _ in range(repeats):
        rng.shuffle(order)
        for name in order:
            found[name].append(seconds(runs[name]))
    return {name: statistics.median(values) for name, values in found.items()}


# The exact path


class Loop:
    """The authors' procedure, restated: for each pair and timestep the image is encoded, and both captions, and two
    passes of batch one are made, whose logits are kept whole.

    What follows the encoding can be shared step by step: ``images``, ``texts``, ``empty``.
    """

    def __init__(self, backbone: Backbone, config: ScoreConfig, shared: Sequence[str] = ()) -> None:
        self._backbone, self._config, self._shared = backbone, config, set(shared)
        self._layers = paper_layers(backbone.denoiser)
        self._kept: dict[Any, Any] = {}
        shape = backbone.latent_shape(backbone.image_size)
        self._noise = common_noise(shape, len(config.timesteps), config.seed)

    def _once(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        if what not in self._shared:
            return make()
        if (what, key) not in self._kept:
            self._kept[what, key] = make()
        return self._kept[what, key]

    @torch.no_grad()
    def __call__(self, image: Image.Image, text: str) -> float:
        total = 0.0
        for step in range(len(self._config.timesteps)):
            z = self._once("images", id(image), lambda: self._backbone.encode_images([image]))
            empty = self._once("empty", (id(image), step), lambda z=z, s=step: self.one_pass(z, s, ""))
            caption = self.one_pass(z, step, text)
            attention = (empty[0] + caption[0]) / 2
            total += attention + empty[1] - caption[1]
        return total / len(self._config.timesteps)

    def one_pass(self, z: Tensor, step: int, text: str) -> tuple[float, float]:
        """Mean log-sum-exp over all tokens, and the norm of the error."""
        states = self._once("texts", text, lambda: self._backbone.encode_texts([text])[0])
        heard: dict[str, Tensor] = {}
        handles = []
        known = cross_attention_layers(self._backbone.denoiser)
        for name in self._layers:
            for what in ("to_q", "to_k"):
                handles.append(
                    getattr(known[name], what).register_forward_hook(
                        lambda _m, _i, out, key=f"{name} {what}": heard.__setitem__(key, out)
                    )
                )
        t = torch.tensor([self._config.timesteps[step]])
        noise = self._noise[step : step + 1]
        made = self._backbone.predict_noise(self._backbone.add_noise(z, noise, t), t, states)
        for handle in handles:
            handle.remove()
        means = []
        for name in self._layers:
            heads = known[name].heads
            q, k = (heard[f"{name} {w}"].unflatten(-1, (heads, -1)).transpose(1, 2) for w in ("to_q", "to_k"))
            logits = q @ k.transpose(-1, -2) * known[name].scale
            means.append(logits.logsumexp(-1).mean())
        return float(torch.stack(means).mean()), float(torch.linalg.vector_norm(noise - made))


def exact(quick: bool) -> dict[str, Any]:
    backbone = like_stable_diffusion(16 if quick else 4)
    images, texts = pictures(2 if quick else 4, backbone.image_size), CAPTIONS[: 4 if quick else 10]
    config = ScoreConfig("paper", (200, 700) if quick else (189, 389, 589, 789))
    pairs = [(image, text) for image in images for text in texts]
    scores: dict[str, np.ndarray] = {}
    took: dict[str, float] = {}

    def measure(name: str, run: Callable[[], np.ndarray]) -> None:
        start = time.perf_counter()
        scores[name] = np.asarray(run(), np.float64)
        took[name] = time.perf_counter() - start
        print(f"{name}: {took[name]:.2f} s", file=sys.stderr, flush=True)

    Loop(backbone, config)(images[0], texts[0])  # to warm up
    savings = ((), ("images",), ("images", "texts"), ("images", "texts", "empty"))
    for shared in savings:
        loop = Loop(backbone, config, shared)
        measure("loop" + "".join(f", {s} once" for s in shared), lambda loop=loop: [loop(*pair) for pair in pairs])
    with mock.patch("dsd.scores.text_once", return_value=nullcontext()):
        measure("batches", lambda: Scorer(backbone, config).predict(pairs))
    measure("ours", lambda: Scorer(backbone, config).predict(pairs))
    worst = max(float(np.abs(scores[name] - scores["loop"]).max()) for name in scores)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "timesteps": len(config.timesteps),
        "seconds": took,
        "times faster": {name: took["loop"] / value for name, value in took.items()},
        "largest difference": worst,
    }
    # savings of attention scores
    names = select_layers(backbone.denoiser)
    middle = tuple(n for n in names if not n.startswith("up_blocks"))
    rows = 4
    z = Scorer(backbone, config).latents(images[:1]).expand(rows, -1, -1, -1)
    noise, t = torch.randn_like(z), torch.full((rows,), 389)
    states = backbone.encode_texts(list(texts[:1]))[0]

    def run(layers: Sequence[str], **options: Any) -> Callable[[], Pass]:
        def one() -> Pass:
            with torch.no_grad():
                return noised_pass(backbone, z, noise, t, states, layers, captions=[0] * rows, **options)

        return one

    found["attention, seconds a pass of 4"] = side_by_side(
        {
            "all layers, whole pass, both log-sum-exps": run(names),
            "all layers, ends after the last": run(names, predict=False),
            "all layers, ends after the last, own tokens alone": run(names, predict=False, over="own"),
            "down and mid, whole pass": run(middle, over="own"),
            "down and mid, ends after the last": run(middle, over="own", predict=False),
        },
        2 if quick else 5,
    )
    return found


# Equal accuracy


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Of two outcomes of the same choices: the mean difference and its 95 % interval, in points."""
    apart = 100 * (np.asarray(a, float) - np.asarray(b, float))
    width = float(stats.norm.ppf(0.975) * apart.std(ddof=1) / np.sqrt(len(apart)))
    return {"mean": float(apart.mean()), "low": float(apart.mean()) - width, "high": float(apart.mean()) + width}


def choices_of(task: str, count: int, candidates: int, split: str = "test") -> tuple[list[list[Pair]], list[int]]:
    """Choices of one image among captions, the right one among them."""
    if task == "captions":  # as many captions of the world, of which one is the picture's
        pool = world_task("comvg", "test", "standard", 4 * candidates, 0)
        texts = list(dict.fromkeys(e.texts[0] for e in pool))[:candidates]
        shown = [e for e in pool if e.texts[0] in texts][:count]
        own = [(e.images[e.positives[0][0]], e.texts[0]) for e in shown]
        return [[(image, t) for t in texts] for image, _ in own], [texts.index(text) for _, text in own]
    found, right = [], []
    for e in world_task(task, split, "standard", count, 0):
        for a, image in enumerate(e.images):
            if len(e.texts) > 1 and (pos := [c for b, c in e.positives if b == a]):
                found.append([(image, text) for text in e.texts])
                right.append(pos[0])
    return found, right


def equal(quick: bool) -> dict[str, Any]:
    backbone = load_backbone("tiny", device="cpu")
    steps = 8 if quick else 40
    config = ScoreConfig("denoising", even_timesteps(steps))
    matcher = Matcher(backbone, config)
    found: dict[str, Any] = {"timesteps": steps, "tasks": {}}
    sets = {"winoground texts": ("winoground", 200, 2), "vqa": ("vqa", 300, 0), "100 captions": ("captions", 30, 100)}
    for name, (task, count, candidates) in sets.items():
        choices, right = choices_of(task, 6 if quick else count, 8 if quick and candidates == 100 else candidates)
        # Diffusion Classifier's procedure: all candidates at all timesteps, in our batches
        rival = DiffusionClassifier(backbone, samples=steps)
        start = time.perf_counter()
        errors = rival.predict([pair for choice in choices for pair in choice])
        whole = time.perf_counter() - start
        ends = np.cumsum([len(c) for c in choices])[:-1]
        first = [int(np.argmax(s)) for s in np.split(errors, ends)]
        plain = [float(a == b) for a, b in zip(first, right, strict=True)]
        sizes = [len(c) for c in choices]
        made: dict[str, Any] = {
            "choices": len(choices),
            "candidates": float(np.mean(sizes)),
            "all candidates": {"accuracy": float(np.mean(plain)), "passes": steps * sum(sizes), "seconds": whole},
            "races": {},
        }
        loop = Loop(backbone, replace(config, kind="paper"))
        shown = [(resize_crop(load_image(c[0][0]), backbone.image_size), c[0][1]) for c in choices[:10]]
        alone = seconds(
            lambda shown=shown, loop=loop: [loop.one_pass(backbone.encode_images([i]), 0, text) for i, text in shown]
        ) / len(shown)
        made["a pass in a plain loop, seconds"] = alone
        ways = {"": (matcher, None)}
        if task != "captions":  # the sixteen most telling timesteps of the forty, by labelled choices of another split
            told = choices_of(task, 6 if quick else count // 2, candidates, "val")
            order = matcher.telling_first(*told)[: steps * 2 // 5]
            few = sorted(order)
            chosen = tuple(config.timesteps[p] for p in few)
            made["most telling timesteps"] = chosen
            ways["most telling, "] = Matcher(backbone, replace(config, timesteps=chosen)), tuple(map(few.index, order))
        for way, error in product(ways, (0.05, 0.1, 0.2, 0.3)):
            racing, order = ways[way]
            start = time.perf_counter()
            *_, last = racing.race(choices, Budget(error=error, order=order))
            took = time.perf_counter() - start
            outcome = [float(s.order[0] == k) for s, k in zip(last, right, strict=True)]
            cost = sum(s.cost for s in last)
            made["races"][f"{way}{error}"] = {
                "accuracy": float(np.mean(outcome)),
                "less all candidates, points": difference(outcome, plain),
                "passes": cost,
                "times fewer": steps * sum(sizes) / cost,
                "seconds": took,
                "times faster than in our batches": whole / took,
                "times faster than a plain loop": alone * steps * sum(sizes) / took,
            }
            print(name, way, error, made["races"][f"{way}{error}"], file=sys.stderr, flush=True)
        found["tasks"][name] = made
    return found


# Ranking many captions


class _Denoising:
    """The denoising score of each pass, to have them all."""

    names = ("denoising",)
    layers = empty_layers = ()
    needs_empty = sees_noise = True
    direction = "image"
    over = "own"

    def __call__(self, caption: Pass, empty: Pass | None) -> Tensor:
        return denoising(caption, empty)[:, None]


SEEN = 50
"""Pictures on which it was set how much more the early rounds of a race get."""


def ranking(quick: bool, images: int = 100, captions: int = 1000, steps: int = 16) -> dict[str, Any]:
    if quick:
        images, captions, steps = 2, 20, 4
    folder = Path(tempfile.mkdtemp()) if quick else Path("runs/ranking")
    folder.mkdir(parents=True, exist_ok=True)
    backbone = load_backbone("tiny", device="cpu", dtype=torch.bfloat16)
    pool = world_task("comvg", "test", "standard", 2 * captions, 0)
    texts = list(dict.fromkeys(e.texts[0] for e in pool))[:captions]
    scorer = Scorer(backbone, ScoreConfig("denoising", even_timesteps(steps)))
    tables, seen, spent = [], set(), 0.0
    for k, e in enumerate(pool):
        if len(tables) == images:
            break
        if e.texts[0] not in texts or e.texts[0] in seen:
            continue
        seen.add(e.texts[0])
        file = folder / f"{k:04d}.npy"
        if not file.exists():
            start = time.perf_counter()
            (found,) = scorer.features([(e.images[e.positives[0][0]], t) for t in texts], _Denoising())
            spent = time.perf_counter() - start
            part = file.with_suffix(".part.npy")
            np.save(part, found[:, :, 0])
            part.replace(file)
            print(f"image {len(tables) + 1} of {images}: {spent:.0f} s", file=sys.stderr, flush=True)
        tables.append((np.load(file), texts.index(e.texts[0])))
    price = Price((1,) * steps)
    found = {"images": len(tables), "captions": len(texts), "timesteps": steps, "budgets": {}}
    whole = [int(t.mean(1).argmax()) for t, _ in tables]
    found["right by the whole score"] = float(np.mean([w == k for w, (_, k) in zip(whole, tables, strict=True)]))
    least = captions / steps
    equivalents = (least + 1, 2 * least) if quick else (75, 100, 125, 150, 200)
    for full in (*equivalents, None):
        budget = Budget(passes=None if full is None else int(full * steps))
        same, right, cost = [], [], []
        for (values, own), top in zip(tables, whole, strict=True):
            race = Race(len(values), price, budget)
            while (wanted := race.ask()) is not None:
                race.tell(values[np.ix_(*wanted)])
            standing = race.standing()
            same.append(standing.order[0] == top)
            right.append(standing.order[0] == own)
            cost.append(standing.cost / steps)
        low, high = stats.binomtest(int(sum(same)), len(same)).proportion_ci(method="wilson")
        fresh = same[SEEN:]
        found["budgets"]["no budget, error 0.01" if full is None else f"{full:g}"] = {
            "full-score equivalents": float(np.mean(cost)),
            "same first": float(np.mean(same)),
            "interval": [float(low), float(high)],
            "same first, fresh": float(np.mean(fresh)) if fresh else None,
            "right": float(np.mean(right)),
        }
    return found


# What a score adds to a pass


def overhead(quick: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, backbone, rows, repeats in (
        ("Stable Diffusion's layout", like_stable_diffusion(16 if quick else 4), 4, 20),
        ("tiny", load_backbone("tiny", device="cpu"), 64, 60),
    ):
        z = torch.randn(rows, *backbone.latent_shape(backbone.image_size))
        noise, t = torch.randn_like(z), torch.full((rows,), 389)
        text = backbone.encode_texts([CAPTIONS[0]])[0].select([0] * rows)
        layers = select_layers(backbone.denoiser)

        def bare(b: Backbone = backbone, z: Tensor = z, t: Tensor = t, text: Any = text) -> None:
            with torch.no_grad():
                b.predict_noise(z, t, text)

        def probed(over: Any, args: Any = (backbone, z, noise, t, text, layers)) -> Callable[[], None]:
            def run() -> None:
                with torch.no_grad():
                    noised_pass(*args, over=over)

            return run

        def denoised(args: Any = (backbone, z, noise, t, text)) -> None:
            with torch.no_grad():
                made = noised_pass(*args)
                denoising(made, made)

        took = side_by_side(
            {"bare": bare, "denoising": denoised, "attention": probed("own"), "attention-mass": probed("all")},
            2 if quick else repeats,
        )
        found[name] = {
            "rows": rows,
            "seconds": took,
            "overhead": {score: value / took["bare"] - 1 for score, value in took.items() if score != "bare"},
        }
    return found


# Scaling


def scaling(quick: bool) -> dict[str, Any]:
    backbone = like_stable_diffusion(16)
    config = ScoreConfig("denoising")
    grid = [
        (1, 1, 1),
        (4, 1, 4),
        (1, 8, 4),
        (2, 4, 2),
        (4, 8, 1),
        (4, 4, 4),
        (2, 8, 8),
        (8, 2, 2),
        (1, 16, 2),
        (6, 6, 2),
    ]
    rows, took = [], []
    Matcher(backbone, config).score(pictures(1, 256), CAPTIONS[:2])
    for images, texts, steps in grid[:4] if quick else grid:
        said = [f"{CAPTIONS[i % 10]} {i}" for i in range(texts)]
        matcher = Matcher(backbone, replace(config, timesteps=even_timesteps(steps)))
        took.append(seconds(lambda m=matcher, i=images, s=said: m.score(pictures(i, 256), s)))
        rows.append({"images": images, "texts": texts, "timesteps": steps, "passes": images * (texts + 1) * steps})
    design = np.array([[r["images"], r["texts"], r["passes"]] for r in rows], float)
    weights = 1 / np.array(took)  # so that relative errors count
    cost, *_ = np.linalg.lstsq(design * weights[:, None], np.ones(len(rows)), rcond=None)
    fitted = design @ cost
    return {
        "model": "seconds = images * a + texts * b + images * (texts + 1) * timesteps * c",
        "a, b, c": cost.tolist(),
        "largest relative error": float(np.abs(fitted / np.array(took) - 1).max()),
        "rows": [{**r, "seconds": s, "fitted": float(f)} for r, s, f in zip(rows, took, fitted, strict=True)],
    }


# Learning


def learning(quick: bool) -> dict[str, Any]:
    matcher = Matcher.from_pretrained("tiny", score="attention", device="cpu")
    steps = 2 if quick else 20
    found: dict[str, Any] = {}
    for task in ("comvg", "winoground"):
        examples: list[Example] = world_task(task, "few-shot", "standard", 16 if quick else 64, 0)
        held = examples[:2]

        def fit(count: int, examples: Any = examples, held: Any = held) -> None:
            config = FitConfig(steps=count, check_every=count, patience=1)
            matcher.fit(examples, held, config=config)
            matcher.forget()

        fit(1)
        # what is there besides steps falls out of the difference
        one, many = seconds(lambda f=fit: f(1)), seconds(lambda f=fit: f(steps + 1))
        found[task] = {"seconds a step": (many - one) / steps, "examples a step": FitConfig().batch}
    return found


# Taught from few examples


def taught(quick: bool) -> dict[str, Any]:
    backbone = load_backbone("tiny", device="cpu")
    few_shot, val, test = (
        world_task("winoground", split, "standard", 8 if quick else count, 0)
        for split, count in (("few-shot", 256), ("val", 100), ("test", 500))
    )
    many = 8 if quick else 40
    timesteps = even_timesteps(5, 0, 600)
    config = FitConfig(validation=0.25, steps=4) if quick else FitConfig(validation=0.25)
    told = [[(image, text) for text in e.texts] for e in val for image in e.images]
    right = [j for e in val for _, j in sorted(e.positives)]
    pairs = [pair for e in test for pair in e.pairs]

    def won(scores: np.ndarray) -> np.ndarray:
        return outcomes(test, [part.reshape(2, 2) for part in np.split(scores, len(test))])

    rival = DiffusionClassifier(backbone, samples=many)
    began = time.perf_counter()
    all_candidates = won(rival.predict(pairs))
    whole = time.perf_counter() - began
    loop = Loop(backbone, ScoreConfig("paper", timesteps))
    shown = [(resize_crop(load_image(image), backbone.image_size), text) for image, text in pairs[:10]]
    alone = seconds(lambda: [loop.one_pass(backbone.encode_images([image]), 0, text) for image, text in shown]) / 10
    runs: dict[str, tuple[Adapter, ScoreConfig]] = {}
    learning: dict[str, float] = {}
    for name, chosen in {"all": None, "down and mid": ("down_blocks", "mid_block"), "down": ("down_blocks",)}.items():
        matcher = Matcher(backbone, ScoreConfig("attention", timesteps, layers=chosen))
        began = time.process_time()
        matcher.fit(few_shot, config=config)
        learning[name] = time.process_time() - began
        assert matcher.adapter is not None
        score = matcher.score_config
        runs[name] = matcher.adapter, score
        if chosen is None:
            runs["all, 2 timesteps"] = matcher.adapter, replace(score, timesteps=timesteps[1:4:2])
            runs["all, 1 timestep"] = matcher.adapter, replace(score, timesteps=timesteps[2:3])
            found = matcher.telling_layers(told, right)
            runs[f"all, scored by the first {len(found)}"] = matcher.adapter, replace(score, layers=found)
        matcher.forget()
    made: dict[str, Any] = {}
    results: dict[str, np.ndarray] = {}
    for name, (adapter, score) in runs.items():
        matcher = Matcher(backbone, score, adapter=replace(adapter, score=score))
        began = time.perf_counter()
        results[name] = won(matcher.predict(pairs))  # pictures and captions are encoded now
        cold = time.perf_counter() - began
        took = seconds(lambda m=matcher: m.predict(pairs), 3)  # type: ignore[misc]
        passes = len(pairs) * len(score.timesteps)
        made[name] = {
            "timesteps": len(score.timesteps),
            "choices won": float(results[name].mean()),
            "less all layers, points": difference(list(results[name]), list(results["all"])),
            "less all candidates, points": difference(list(results[name]), list(all_candidates)),
            "times fewer passes": many * len(pairs) / passes,
            "times faster than in our batches": whole / cold,
            "times faster than a plain loop": alone * many * len(pairs) / cold,
            "seconds a pass of a row": took / passes,
            "processor seconds to learn": learning.get(name),
        }
        print(name, made[name], file=sys.stderr, flush=True)
        matcher.forget()
    before = won(Matcher(backbone, ScoreConfig("attention", timesteps)).predict(pairs))
    return {
        "examples": len(few_shot),
        "test": len(test),
        "timesteps of all candidates": many,
        "all candidates": float(all_candidates.mean()),
        "before": float(before.mean()),
        "ways": made,
    }


# Starting


def start(quick: bool) -> dict[str, Any]:
    repeats = 1 if quick else 5

    def python(*argv: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, *argv], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        pictures(1, 64)[0].save(picture)
        score = ("-m", "dsd.cli", "score", str(picture), "--text", "a red circle")
        return {
            "bare Python": seconds(python("-c", ""), repeats),
            "import dsd": seconds(python("-c", "import dsd"), repeats),
            "dsd --help": seconds(python("-m", "dsd.cli", "--help"), repeats),
            "dsd score, one pair on tiny": seconds(python(*score), min(2, repeats)),
        }


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "exact": exact,
    "equal": equal,
    "overhead": overhead,
    "scaling": scaling,
    "learning": learning,
    "taught": taught,
    "start": start,
    "ranking": ranking,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="make anew (default: those not there yet)")
    parser.add_argument("--quick", action="store_true", help="small, to try the script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = PARTS[options.one](options.quick)
        print(json.dumps({"found": found, "peak": peak()}))
        return
    path = options.out.with_suffix(".json")
    values: dict[str, Any] = {"parts": {}, "peak, GB": {}}
    if path.exists():
        values |= json.loads(path.read_text("utf-8"))
    values["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    values["versions"] = installed_versions()
    for name in options.parts or [name for name in PARTS if name not in values["parts"]]:
        print(f"== {name}", file=sys.stderr, flush=True)
        again = [sys.executable, __file__, "--out", str(options.out), "--one", name]
        made = subprocess.run([*again, *(["--quick"] if options.quick else [])], stdout=subprocess.PIPE, check=True)
        answer = json.loads(made.stdout.decode().splitlines()[-1])
        values["parts"][name], values["peak, GB"][name] = answer["found"], answer["peak"]
        write_text(path, json.dumps(values, indent=1) + "\n")
    draw(options.out.with_suffix(".png"), values["parts"])
    write_text(options.out.with_suffix(".md"), page(options.out, values))


if __name__ == "__main__":
    main()
