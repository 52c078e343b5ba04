"""The pretraining recipe of the embedded CLIP: ``python -m dsd.tiny.clip --out runs/clip``.

A stock ``transformers.CLIPModel`` for the same world as ``tiny``, as a baseline that has seen the same: the same
pretraining scenes and captions, as many samples as tiny's U-Net, and tiny's own text encoder, which was taught from
words alone, to start from. It learns from contrast as CLIP does (Radford et al. 2021), with hard negatives as NegCLIP
has them (Yuksekgonul et al. 2023): of each caption one that swaps or changes a part of it, and pictures in batches with
pictures of the same things. Unlike with photographs it is known which captions of others are true of a picture too;
they are left out of the loss.

Training stops at any moment and goes on with the same command. ``--stage export`` writes the averaged weights of the
last checkpoint in half precision, with held-out figures and a card.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from dsd.contracts import Example, batched
from dsd.evaluate import write_text
from dsd.images import load_image, resize_crop
from dsd.metrics import wins
from dsd.report import table
from dsd.tasks import world_task
from dsd.tiny import world
from dsd.tiny.captions import Claim, Phrase, holds, sample_claim
from dsd.tiny.pretrain import (
    PIXELS,
    STEPS_OF_DECAY,
    WINDOW,
    Recipe,
    Stage,
    build_tokenizer,
    pictures,
    scene_at,
    to_pixels,
    words_of,
)
from dsd.tiny.world import Scene

TEXT_ENCODER = Path(str(files("dsd.tiny").joinpath("weights", "text_encoder")))
"""What the text tower starts from."""

KINDS = ("subject", "predicate", "object", "image-choice", "text-choice")
"""Tags of ``comvg`` that held-out figures are given for."""


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the weights; saved with them."""

    seed: int = 0
    scenes: int = Recipe.scenes
    samples: int = Recipe.unet_samples
    """Pictures seen, each with a caption drawn anew; as many as tiny's U-Net saw."""
    batch: int = 64
    lr: float = 1e-3
    easy_samples: int = Recipe.easy_samples
    easy_share: float = Recipe.easy_share
    """As in tiny's recipe: what is drawn from scenes of one and two objects alone."""
    negatives: int = 3
    """False captions made of each true one."""
    neighbours: float = 0.5
    """Share of a batch whose pictures show two of the things that another of the batch shows."""
    text: str = "tiny"
    """What the text tower starts from: ``tiny`` or ``random``."""
    width: int = 128
    layers: int = 6
    heads: int = 4
    patch: int = 4
    keep: int = 32
    """Patches of each picture that most batches show, those that differ most from its background; the rest are left
    out, which halves the work."""
    whole: float = 0.125
    """Share of batches that show all patches; all batches do once the learning rate falls."""
    dim: int = 128
    """Of the joint space."""
    ema: float = 0.999


# Data


Said = TypeVar("Said", Claim, Phrase)

_WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(world.COLOURS),
    "shape": world.SHAPES,
    "size": world.SIZES,
    "fill": world.KNOWN_FILLS,
}


def altered(rng: random.Random, claim: Claim) -> Claim:
    """A claim with one thing changed: two phrases, or one attribute of both, in each other's place, or another value.

    Only words and kinds that pretraining knows come of it. It may still be true of the same scene.
    """
    groups: dict[str, list[Claim]] = defaultdict(list)
    sides = {"subject": claim.subject} | ({"object": claim.object} if claim.object is not None else {})
    a, b = claim.subject, claim.object
    if b is not None and a.count == b.count == 1:
        if claim.relation is not None:
            groups["swap"].append(replace(claim, subject=b, object=a))
        for name in ("colour", "shape", "size", "fill"):
            one, other = getattr(a, name), getattr(b, name)
            if None not in (one, other) and one != other:
                groups["exchange"].append(replace(claim, subject=_with(a, name, other), object=_with(b, name, one)))
    for name, values in (
        ("relation", world.KNOWN_RELATIONS),
        ("place", world.PLACES),
        ("background", world.BACKGROUNDS),
    ):
        if getattr(claim, name) is not None:
            groups[name] += [_with(claim, name, v) for v in values if v != getattr(claim, name)]
    for side, phrase in sides.items():
        for name, values in _WORDS.items():
            if getattr(phrase, name) is not None:
                others = [_with(phrase, name, v) for v in values if v != getattr(phrase, name)]
                groups[f"{side} {'kind' if name in ('colour', 'shape') else name}"] += [
                    _with(claim, side, p) for p in others
                ]
        if phrase.count > 1:
            groups["count"] += [_with(claim, side, replace(phrase, count=n)) for n in (2, 3, 4) if n != phrase.count]
    known = {k: [c for c in v if c != claim and _kinds(c).isdisjoint(world.HELD_OUT)] for k, v in groups.items()}
    return rng.choice(rng.choice([v for v in known.values() if v]))


def _with(of: Said, name: str, value: Any) -> Said:
    return replace(of, **{name: value})


def _kinds(claim: Claim) -> set[tuple[str | None, str | None]]:
    return {(p.colour, p.shape) for p in (claim.subject, claim.object) if p is not None}


def captions(rng: random.Random, scene: Scene, negatives: int) -> tuple[list[Claim], list[str]]:
    """A true claim about a scene and up to so many false ones made of it, all worded alike; the true one first."""
    claims = [sample_claim(rng, scene)]
    for _ in range(8 * negatives):
        if len(claims) > negatives:
            break
        wrong = altered(rng, claims[0])
        if wrong not in claims and not holds(wrong, scene):
            claims.append(wrong)
    wording = rng.getrandbits(32)
    return claims, [words_of(random.Random(wording), claim) for claim in claims]


class Data:
    """The pretraining scenes and their pictures, drawn in batches.

    Args:
        recipe: Of the CLIP.
        folder: Holds the pictures, or will.
    """

    def __init__(self, recipe: ClipRecipe, folder: Path) -> None:
        self.recipe = recipe
        shared = Recipe(seed=recipe.seed, scenes=recipe.scenes)
        self._pictures = pictures(shared, folder)
        self._scenes = [scene_at(shared, i) for i in tqdm(range(recipe.scenes), "scenes", unit="scene")]
        self._kinds = [frozenset(t.kind for t in s.things) for s in self._scenes]
        self._easy = [i for i, s in enumerate(self._scenes) if len(s.things) <= 2]
        self._like: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for i, kinds in enumerate(self._kinds):
            for pair in combinations(sorted(kinds), 2):
                self._like[pair].append(i)

    def draw(self, rng: random.Random, samples: int) -> tuple[np.ndarray, list[str], Tensor]:
        """A batch after ``samples`` samples.

        Returns:
            Pictures (b, h, w, 3) uint8, captions (c,) of which the first b are those of the pictures, and which are
            true of which, (b, c) bool.
        """
        recipe = self.recipe
        share = 1.0 if samples < recipe.easy_samples else recipe.easy_share
        chosen: list[int] = []
        while len(chosen) < recipe.batch:
            i = rng.choice(self._easy) if rng.random() < share else rng.randrange(recipe.scenes)
            chosen.append(i)
            kinds = sorted(self._kinds[i])
            if len(kinds) > 1 and len(chosen) < recipe.batch and rng.random() < 2 * recipe.neighbours:
                chosen.append(rng.choice(self._like[tuple(sorted(rng.sample(kinds, 2)))]))
        own, wrong = [], []
        for i in chosen:
            claims, texts = captions(rng, self._scenes[i], recipe.negatives)
            said = list(zip(claims, texts, strict=True))
            own.append(said[0])
            wrong += said[1:]
        both = [*own, *wrong]
        true = torch.zeros(len(chosen), len(both), dtype=torch.bool)
        for j, (claim, _) in enumerate(both):
            named = {k for k in _kinds(claim) if None not in k}
            for row, i in enumerate(chosen):
                if named <= self._kinds[i]:
                    true[row, j] = holds(claim, self._scenes[i])
        return self._pictures[chosen], [text for _, text in both], true


# Model


def build_clip(recipe: ClipRecipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The model before training; its text tower as the recipe says."""
    encoder = CLIPTextModel.from_pretrained(TEXT_ENCODER, dtype=torch.float32)
    text = {k: v for k, v in encoder.config.to_dict().items() if k not in ("architectures", "dtype", "projection_dim")}
    vision = {
        "hidden_size": recipe.width,
        "intermediate_size": 4 * recipe.width,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "image_size": PIXELS,
        "patch_size": recipe.patch,
    }
    # eager attention: on CPUs the fused kernel's backward pass in bfloat16 takes twice as long
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.dim)
    config._attn_implementation = "eager"
    torch.manual_seed(recipe.seed)
    model = CLIPModel(config)
    if recipe.text == "tiny":
        model.text_model.load_state_dict(encoder.state_dict())
    return model


def see(model: CLIPModel, pixels: Tensor, keep: int | None = None) -> Tensor:
    """Pictures (n, 3, h, w) in -1..1 => unit vectors in the joint space, (n, dim) float32.

    Args:
        model: The CLIP.
        pixels: The pictures.
        keep: Go through the tower with so many patches of each picture, those furthest from its background, alone
            (after Li et al. 2023, arXiv 2212.00794, who leave out random ones).
    """
    tower = model.vision_model
    states = tower.embeddings(pixels)
    if keep is not None and keep < states.shape[1] - 1:
        far = (pixels - pixels.flatten(2).median(-1).values[..., None, None]).abs().mean(1, keepdim=True)
        places = F.avg_pool2d(far, tower.config.patch_size).flatten(1).topk(keep, sorted=False).indices
        kept = states[:, 1:].gather(1, places[..., None].expand(-1, -1, states.shape[2]))
        states = torch.cat([states[:, :1], kept], 1)
    states = tower.encoder(inputs_embeds=tower.pre_layrnorm(states)).last_hidden_state
    return F.normalize(model.visual_projection(tower.post_layernorm(states[:, 0])).float(), dim=-1)


def read(model: CLIPModel, ids: Tensor) -> Tensor:
    """Tokens (n, tokens) => unit vectors in the joint space, (n, dim) float32."""
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def contrast(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss over unit vectors of b pictures and c captions, the first b of them the pictures' own.

    A caption that is true of another's picture is no negative for it.

    Args:
        image: (b, dim).
        text: (c, dim).
        scale: What similarities are multiplied by.
        true: (b, c) bool.
    """
    own = torch.eye(*true.shape, dtype=torch.bool, device=true.device)
    logits = (scale * image @ text.T).masked_fill(true & ~own, -math.inf)
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(image)].T, target)) / 2


# Training


def train(
    recipe: ClipRecipe,
    folder: Path,
    device: torch.device,
    until: float,
    look_minutes: float,
    look: int = 200,
    autocast: bool = True,
) -> Stage:
    """Trains until the recipe's samples are seen, or until a time; goes on from the checkpoint in ``folder``."""
    tokenizer = build_tokenizer()
    model = build_clip(recipe, tokenizer)
    stage = Stage("clip", folder, model, recipe.lr, recipe.samples, device, recipe.ema)
    if stage.samples >= stage.total:
        return stage
    data = Data(recipe, folder)
    looked = time.monotonic()
    losses: list[float] = []
    for rng in stage.batches(recipe.batch, until, recipe.seed):
        images, texts, true = data.draw(rng, stage.samples)
        ids = tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(device)
        falls = stage.samples > (1 - STEPS_OF_DECAY) * stage.total
        keep = None if falls or rng.random() < recipe.whole else recipe.keep
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            image, text = see(model, to_pixels(images, device), keep), read(model, ids)
        scale = model.logit_scale.clamp(max=math.log(100)).exp()
        loss = contrast(image, text, scale, true.to(device))
        stage.step(loss, recipe.batch)
        losses.append(loss.item())
        if stage.samples % (100 * recipe.batch) == 0:
            stage.log(loss=float(np.mean(losses)), scale=scale.item())
            losses.clear()
        if time.monotonic() - looked > 60 * look_minutes:
            stage.save()
            keep_best(recipe, folder, look, stage)
            looked = time.monotonic()
    return stage


def keep_best(recipe: ClipRecipe, folder: Path, count: int, stage: Stage) -> None:
    """Logs held-out figures of the averaged weights, and exports them to ``best`` if they are the best so far."""
    figures = measure(averaged(recipe, folder), count, ("easy", "standard"))
    stage.log(held_out=figures)
    value = float(np.mean([v["overall"] for level in figures.values() for v in level.values()]))
    record = folder / "best.json"
    if not record.exists() or value > json.loads(record.read_text())["value"]:
        export(recipe, folder, folder / "best", look=0)
        write_text(record, json.dumps({"value": value, "samples": stage.samples, "held_out": figures}) + "\n")


def averaged(recipe: ClipRecipe, folder: Path) -> CLIPModel:
    """The averaged weights of the last checkpoint."""
    model = build_clip(recipe, build_tokenizer())
    stage = Stage("clip", folder, model, 0, 1, torch.device("cpu"), 0)
    found: CLIPModel = stage.averaged()
    return found


@torch.no_grad()
def measure(model: CLIPModel, count: int, levels: Sequence[world.Level] = world.LEVELS) -> dict[str, Any]:
    """Zero-shot shares of choices won on held-out scenes: by level, by task, overall and by kind (tag).

    Args:
        model: In float32.
        count: Examples a task and level; of ``comvg`` three times as many.
        levels: Of the world.
    """
    tokenizer = build_tokenizer()
    figures: dict[str, Any] = {}
    for level in levels:
        figures[level] = {}
        for task in ("comvg", "winoground", "refcocog", "vqa"):
            examples = world_task(task, "val", level, 3 * count if task == "comvg" else count, 0)
            shares = _shares(model, tokenizer, examples)
            kinds = sorted({tag for e in examples for tag in e.tags})
            figures[level][task] = {"overall": float(shares.mean())} | {
                kind: float(np.mean([s for s, e in zip(shares, examples, strict=True) if kind in e.tags]))
                for kind in kinds
            }
    return figures


def _shares(model: CLIPModel, tokenizer: CLIPTokenizer, examples: Sequence[Example]) -> np.ndarray:
    """Of each example the share of its choices that is won."""
    shares = []
    for part in batched(examples, 50):
        drawn = np.stack([np.asarray(resize_crop(load_image(i), PIXELS)) for e in part for i in e.images])
        ids = tokenizer([t for e in part for t in e.texts], padding=True, return_tensors="pt").input_ids
        image, text = see(model, to_pixels(drawn, torch.device("cpu"))).numpy(), read(model, ids).numpy()
        row = column = 0
        for e in part:
            table = image[row : row + len(e.images)] @ text[column : column + len(e.texts)].T
            shares.append(float(wins(table, e.positives).mean()))
            row, column = row + len(e.images), column + len(e.texts)
    return np.array(shares)


def export(recipe: ClipRecipe, folder: Path, out: Path, look: int = 300, hardware: str = "") -> None:
    """Averaged weights of the last checkpoint => a folder in half precision that stock ``transformers`` loads.

    Args:
        recipe: Of the checkpoint.
        folder: Of the checkpoint.
        out: Made if it is not there.
        look: Held-out examples a task and level for the card; 0 leaves card and figures out.
        hardware: For the card.
    """
    model = averaged(recipe, folder)
    progress = torch.load(folder / "clip.pt", weights_only=True, map_location="cpu")
    figures = measure(model, look) if look else None
    model.config.text_config._name_or_path = ""  # where the text tower came from on this machine
    model.half().save_pretrained(out, safe_serialization=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(out)
    record = {"recipe": asdict(recipe), "samples": progress["samples"], "seconds": round(progress["seconds"])}
    write_text(out / "training.json", json.dumps(record, indent=1) + "\n")
    if figures is not None:
        write_text(out / "held_out.json", json.dumps(figures, indent=1) + "\n")
        legs = folder / "legs.md"
        write_card(out, hardware, legs.read_text("utf-8") if legs.exists() else "")


def write_card(folder: Path, hardware: str, legs: str = "") -> None:
    """Writes the model's card from the training record and the held-out figures beside the weights.

    Args:
        folder: Of the weights.
        hardware: In words.
        legs: How the recipe changed on the way, if it did: a paragraph (``legs.md`` beside the checkpoint).
    """
    record = json.loads((folder / "training.json").read_text())
    figures = json.loads((folder / "held_out.json").read_text())
    recipe = record["recipe"]
    rows = [
        {"level": level, "all": f"{v['comvg']['overall']:.3f}"} | {k: f"{v['comvg'][k]:.3f}" for k in KINDS}
        for level, v in figures.items()
    ]
    others = [
        {"level": level} | {task: f"{v[task]['overall']:.3f}" for task in ("winoground", "refcocog", "vqa")}
        for level, v in figures.items()
    ]
    start = (
        "starts from tiny's own text encoder, which was taught from words alone to tell what stands where"
        if recipe["text"] == "tiny"
        else "starts from random weights"
    )
    text = f"""# clip-tiny

A CLIP (stock `transformers.CLIPModel`) of the world that `tiny` draws, as a baseline for it: {PIXELS} x {PIXELS}
pixels in patches of {recipe["patch"]}, a vision tower of width {recipe["width"]} and {recipe["layers"]} layers,
{WINDOW} tokens. Apache-2.0.

- **Data**: as of `tiny`: {recipe["scenes"]:,} procedural scenes of `dsd.tiny.world`, part `pretraining`, of one to five
  objects, with captions drawn anew each time. The words `{world.NOVEL_FILL}` and `{world.NOVEL_RELATION}` and the
  colour-shape combinations of `world.HELD_OUT` never occur.
- **Samples**: {record["samples"]:,} (tiny's U-Net: {Recipe.unet_samples:,}), in batches of {recipe["batch"]}.
- **Loss**: CLIP's, with {recipe["negatives"]} false caption(s) made of each true one by a swap or a change (NegCLIP),
  and {recipe["neighbours"]:.0%} of the batch showing two things that another picture of it shows too. Captions that are
  true of another's picture are no negatives for it.
- **Text tower**: {start}.
- **Hardware**: {hardware}, {record["seconds"] / 3600:.2f} hours.
- **Recipe**: `python -m dsd.tiny.clip --out runs/clip`; all numbers in `training.json`.

Zero-shot shares of choices won on held-out scenes (part `val`), `comvg` by kind:

{table(rows, ("level", "all", *KINDS))}

The other tasks, overall (a choice of `winoground` and of yes-no questions has two candidates, others ten):

{table(others, ("level", "winoground", "refcocog", "vqa"))}
"""
    write_text(folder / "README.md", text + (f"\n{legs.strip()}\n" if legs.strip() else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and of what is exported")
    parser.add_argument("--stage", choices=("train", "export"), default="train", help="export: what is there, now")
    parser.add_argument("--export", type=Path, help="folder for the weights; default: OUT/model")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores", help="for the card")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop (resumably) after so long")
    parser.add_argument("--look-minutes", type=float, default=8, help="between looks at held-out accuracy")
    parser.add_argument("--look", type=int, default=200, help="held-out examples a task, at each look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in fields(ClipRecipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    recipe = ClipRecipe(**{f.name: options[f.name] for f in fields(ClipRecipe)})
    folder, device = options["out"], torch.device(options["device"])
    torch.set_num_threads(options["threads"])
    folder.mkdir(parents=True, exist_ok=True)
    if options["stage"] == "train":
        until = time.monotonic() + 60 * options["minutes"]
        stage = train(
            recipe,
            folder,
            device,
            until,
            options["look_minutes"],
            options["look"],
            autocast=not options["float32"],
        )
        keep_best(recipe, folder, options["look"], stage)
        if stage.samples < stage.total:
            return
    export(recipe, folder, options["export"] or folder / "model", hardware=options["hardware"])


if __name__ == "__main__":
    main()
