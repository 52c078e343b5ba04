"""The pretraining recipe of the embedded model: ``python -m dsd.tiny.pretrain --out runs/tiny``.

Three stages, each resumable after a stop at any moment, on CPU or GPU:

1. ``vae``: 32 x 32 pixels to an 8 x 8 x 4 latent, on pictures of the pretraining part.
2. ``text``: the text encoder learns from words alone to tell what stands where (:class:`LayoutHead`), and is frozen
   then. A text encoder that learns from the diffusion loss alone never learns to bind two objects to two places.
3. ``unet``: noise prediction given the caption, first on one and two objects, then on up to five. The noise loss is
   weighted towards noisy steps, where layout is decided (1/SNR, that is the error of the predicted latent).

``export`` writes a Stable Diffusion pipeline folder in half precision, with a card of what went into it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dsd.backbone import default_timesteps, load_backbone
from dsd.evaluate import evaluate, write_text
from dsd.matcher import Matcher
from dsd.report import table
from dsd.scores import ScoreConfig
from dsd.tasks import world_task
from dsd.tiny import world
from dsd.tiny.captions import DETAIL, Claim, Phrase, answer, ask, sample_claim, say, vocabulary_words
from dsd.tiny.world import Scene

WINDOW = 32
"""Tokens a caption, start and end included."""

PIXELS = 32
"""Pixels a side that the model sees; the world's pictures are resized to it."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; saved with them."""

    seed: int = 0
    scenes: int = 120_000
    """How many pretraining scenes there are; captions are drawn anew each time a scene is seen."""
    vae_samples: int = 104_000
    vae_batch: int = 16
    vae_lr: float = 1e-3
    kl_weight: float = 1e-4
    text_samples: int = 140_000
    text_batch: int = 128
    text_lr: float = 1e-3
    unet_samples: int = 1_060_000
    unet_batch: int = 64
    unet_lr: float = 8e-4
    easy_samples: int = 60_000
    """U-Net samples before scenes of three and more objects join."""
    easy_share: float = 0.6
    """Share of the samples after that which are drawn from scenes of one and two objects alone."""
    caption_dropout: float = 0.1
    weight_range: tuple[float, float] = (1.0, 3.0)
    """Bounds of the noise loss's weight, which is 1/SNR between them."""
    ema: float = 0.999


STEPS_OF_DECAY = 0.25
"""The share of a stage over which its learning rate falls to zero."""


# Data


def scene_at(recipe: Recipe, index: int) -> Scene:
    """Pretraining scene ``index``: of one object, of two, or of level standard."""
    rng = random.Random(f"{recipe.seed}/scene/{index}")
    if rng.random() < 0.45:
        return world.sample_scene(rng, "pretraining", "standard", world.ALL)
    return world.sample_scene(rng, "pretraining", "easy", world.ALL, things=rng.choice((1, 2, 2)))


def caption_of(rng: random.Random, scene: Scene, detail: float = DETAIL) -> tuple[Claim, str]:
    """A true claim about a scene and its words: a caption, or a question with its answer (one in ten).

    ``detail`` is how probable it is that a thing's size is told, and its fill.
    """
    claim = sample_claim(rng, scene, detail=detail)
    return claim, words_of(rng, claim)


def words_of(rng: random.Random, claim: Claim) -> str:
    """A claim as pretraining words it: a caption, or a question with the claim's answer (one in ten)."""
    if rng.random() > 0.1:
        return say(rng, claim, "the" if rng.random() < 0.1 else "a")
    if claim.subject.count > 1:
        slot: Any = rng.choice(("count", "truth"))
    else:
        slots = ["colour", "shape", "truth"]
        slots += ["fill"] if claim.subject.fill else []
        slots += ["size"] if claim.subject.size else []
        slots += ["relation"] if claim.relation else []
        slot = rng.choice(slots)
    return f"{ask(claim, slot)} {answer(claim, slot)}"


def _draw(recipe: Recipe, index: int) -> np.ndarray:
    picture = world.render(scene_at(recipe, index))
    return np.asarray(picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))


def pictures(recipe: Recipe, folder: Path) -> np.ndarray:
    """All pretraining pictures, (scenes, 32, 32, 3) uint8, drawn once and kept on disk."""
    path = folder / "pictures.npy"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(partial(_draw, recipe), range(recipe.scenes), chunksize=250)
            stack = np.stack(list(tqdm(drawn, "drawing", recipe.scenes, unit="scene")))
        with open(path.with_suffix(".part"), "wb") as file:
            np.save(file, stack)
        path.with_suffix(".part").replace(path)
    found: np.ndarray = np.load(path, mmap_mode="r")
    return found


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (b, h, w, 3) => float32 (b, 3, h, w) in -1..1."""
    return torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# Parts of the model


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer that ships: learning it anew breaks ties another way each time, and swaps ids between words.

    Whatever goes on from a checkpoint, or from another model's text encoder, must read words as that did.
    """
    return CLIPTokenizer.from_pretrained(str(files("dsd.tiny").joinpath("weights", "tokenizer")))


def learn_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with a token for every word of the world; other text falls into smaller pieces.

    How the one that ships was made. Ids of a few tokens differ from call to call.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([w for w in vocabulary_words() for _ in range(2)], trainer)
    learned = json.loads(bpe.to_str())["model"]
    # CLIP's order: bytes, bytes that end a word, merges, start, end
    merges = [tuple(m) for m in learned["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *dict.fromkeys("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def build_vae() -> AutoencoderKL:
    channels = (32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=96,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class LayoutHead(nn.Module):
    """Reads from token states what stands in each place, through one learned query a place.

    Cross-attention is all that the U-Net will have, so it is all that this head has. Dropped after its stage.
    """

    PLACES = (*world.PLACES, "inner", "outer", "first", "second")
    FIELDS: ClassVar[dict[str, tuple[Any, ...]]] = {
        "colour": (None, *world.COLOURS),
        "shape": (None, *world.SHAPES),
        "size": (None, *world.SIZES),
        "fill": (None, *world.KNOWN_FILLS),
        "count": (0, 1, 2, 3, 4),
    }
    _SIDES: ClassVar[dict[str, tuple[str, str]]] = {
        "left of": ("left", "right"),
        "right of": ("right", "left"),
        "above": ("top", "bottom"),
        "below": ("bottom", "top"),
        "inside": ("inner", "outer"),
    }

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(self.PLACES) + 1, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.hidden = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.fields = nn.ModuleDict({k: nn.Linear(2 * width, len(v)) for k, v in self.FIELDS.items()})
        self.background = nn.Linear(2 * width, len(world.BACKGROUNDS) + 1)

    def forward(self, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(b, tokens, width) => logits of each field, (b, places, values), and of the background."""
        queries = self.queries.expand(len(states), -1, -1)
        found, _ = self.attention(queries, states, states, need_weights=False)
        hidden = self.hidden(found + queries)
        return {k: f(hidden[:, :-1]) for k, f in self.fields.items()}, self.background(hidden[:, -1])

    @classmethod
    def targets(cls, claims: Sequence[Claim]) -> tuple[dict[str, Tensor], Tensor]:
        """Class indices for :meth:`forward`: (b, places) a field, and (b,) for the background."""
        rows: dict[str, list[list[int]]] = {k: [] for k in cls.FIELDS}
        grounds = [None, *world.BACKGROUNDS]
        for claim in claims:
            there: dict[str, Phrase] = {}
            if claim.relation is not None and claim.object is not None:
                first, second = cls._SIDES[claim.relation]
                there = {first: claim.subject, second: claim.object}
            elif claim.object is not None:
                there = {"first": claim.subject, "second": claim.object}
            else:
                there = {claim.place or "first": claim.subject}
            for field, values in cls.FIELDS.items():
                row = [values.index(getattr(there[p], field)) if p in there else 0 for p in cls.PLACES]
                rows[field].append(row)
        background = torch.tensor([grounds.index(c.background) for c in claims])
        return {k: torch.tensor(v) for k, v in rows.items()}, background


# Training


class Stage:
    """One stage's model, averaged weights, optimizer and progress, on disk between stops."""

    def __init__(
        self, name: str, folder: Path, model: nn.Module, lr: float, total: int, device: torch.device, ema: float
    ) -> None:
        self.name, self.folder, self.lr, self.total, self.decay = name, folder, lr, total, ema
        self.model = model.to(device)
        self.samples, self.seconds = 0, 0.0
        self.began_at = 0
        """Samples seen before this optimizer's first step: its learning rate warms up from there."""
        decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
        plain = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embedding" not in n)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.path = folder / f"{name}.pt"
        if self.path.exists():
            state = torch.load(self.path, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.samples, self.seconds, self.began_at = state["samples"], state["seconds"], state["began_at"]
        self._saved = self._began = time.monotonic()

    def step(self, loss: Tensor, samples: int) -> None:
        """One optimizer step; warms up over 100 steps and falls to zero at the end of the stage."""
        progress = self.samples / self.total
        warmup = ((self.samples - self.began_at) / samples + 1) / 100
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, warmup, max(0.01, (1 - progress) / STEPS_OF_DECAY))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.samples += samples
        decay = min(self.decay, self.samples / samples / (10 + self.samples / samples))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
        if time.monotonic() - self._saved > 60:
            self.save()

    def save(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._began
        self._saved = self._began = now
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "samples": self.samples,
                "seconds": self.seconds,
                "began_at": self.began_at,
            },
            part,
        )
        os.replace(part, self.path)

    def batches(self, size: int, until: float, seed: int) -> Iterator[random.Random]:
        """A random state a batch, decided by the samples seen; stops at the stage's end or at time ``until``."""
        with tqdm(total=self.total, initial=self.samples, desc=self.name, unit="sample") as bar:
            while self.samples < self.total and time.monotonic() < until:
                rng = random.Random(f"{seed}/{self.name}/{self.samples}")
                torch.manual_seed(rng.getrandbits(48))
                yield rng
                bar.update(size)
        self.save()

    def averaged(self) -> nn.Module:
        """The model with its averaged weights, for use after training."""
        self.model.load_state_dict(self.average)
        return self.model.eval().requires_grad_(False)

    def log(self, **figures: Any) -> None:
        line = {"stage": self.name, "samples": self.samples, "seconds": round(self.seconds, 1), **figures}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def adopt(pipeline: Path, folder: Path) -> None:
    """Makes an exported pipeline the state to go on from, where its training's own checkpoints are not at hand.

    Weights and progress are taken over; optimizer states and the text encoder's layout head, which a pipeline does not
    hold, begin anew. Stages that ``folder`` already holds are left as they are.

    Args:
        pipeline: A folder written by :func:`export`.
        folder: Of the checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stock = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32)
    done = json.loads((pipeline / "training.json").read_text())["stages"]
    text = nn.ModuleDict({"encoder": stock.text_encoder, "head": LayoutHead()})
    for name, model in {"vae": stock.vae, "text": text, "unet": stock.unet}.items():
        stage = Stage(name, folder, model, 0, 1, torch.device("cpu"), 0)
        if not stage.path.exists():
            stage.samples = stage.began_at = done[name]["samples"]
            stage.seconds = done[name]["seconds"]
            stage.save()


def train_vae(recipe: Recipe, folder: Path, device: torch.device, until: float) -> Stage:
    images = pictures(recipe, folder)
    torch.manual_seed(recipe.seed)
    model = build_vae()
    stage = Stage("vae", folder, model, recipe.vae_lr, recipe.vae_samples, device, recipe.ema)
    for rng in stage.batches(recipe.vae_batch, until, recipe.seed):
        index = sorted(rng.sample(range(len(images)), recipe.vae_batch))
        pixels = to_pixels(images[index], device)
        posterior = model.encode(pixels).latent_dist
        error = model.decode(posterior.sample()).sample - pixels
        # objects are a tenth of the picture: without weight their colours are learned last
        ground = pixels.flatten(2).median(-1).values[..., None, None]
        weight = 1 + 9 * ((pixels - ground).abs().mean(1, keepdim=True) > 0.15)
        loss = (weight * (error.abs() + 2 * error.square())).mean() + recipe.kl_weight * posterior.kl().mean() / 256
        stage.step(loss, recipe.vae_batch)
        if stage.samples % (100 * recipe.vae_batch) == 0:
            stage.log(loss=loss.item(), psnr=-10 * (error.square().mean() / 4).log10().item())
    return stage


def train_text(recipe: Recipe, folder: Path, device: torch.device, until: float) -> Stage:
    tokenizer = build_tokenizer()
    torch.manual_seed(recipe.seed)
    model = nn.ModuleDict({"encoder": build_text_encoder(tokenizer), "head": LayoutHead()})
    stage = Stage("text", folder, model, recipe.text_lr, recipe.text_samples, device, recipe.ema)
    for rng in stage.batches(recipe.text_batch, until, recipe.seed):
        scenes = [scene_at(recipe, rng.randrange(recipe.scenes)) for _ in range(recipe.text_batch)]
        claims, texts = zip(*(caption_of(rng, s) for s in scenes), strict=True)
        ids = tokenizer(list(texts), padding="max_length", return_tensors="pt").input_ids.to(device)
        assert ids.shape[1] == WINDOW, max(texts, key=len)
        logits, ground = model["head"](model["encoder"](ids).last_hidden_state)
        targets, background = LayoutHead.targets(claims)
        losses = [F.cross_entropy(logits[k].flatten(0, 1), targets[k].flatten().to(device)) for k in targets]
        loss = torch.stack([*losses, F.cross_entropy(ground, background.to(device))]).sum()
        stage.step(loss, recipe.text_batch)
        if stage.samples % (100 * recipe.text_batch) == 0:
            right = torch.stack([logits[k].argmax(-1).cpu() == targets[k] for k in targets]).all(0).all(-1)
            stage.log(loss=loss.item(), all_right=right.float().mean().item())
    return stage


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, images: np.ndarray, folder: Path, device: torch.device) -> tuple[Tensor, float]:
    """Latents of all pictures (posterior mean, scaled to unit variance) and the scale."""
    path = folder / "latents.pt"
    if not path.exists():
        means = [
            vae.encode(to_pixels(images[i : i + 100], device)).latent_dist.mean.cpu()
            for i in tqdm(range(0, len(images), 100), "encoding", unit="batch")
        ]
        latents = torch.cat(means)
        torch.save({"latents": latents, "scale": 1 / latents.std().item()}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    state = torch.load(path, weights_only=True)
    return state["latents"] * state["scale"], state["scale"]


def train_unet(
    recipe: Recipe, folder: Path, device: torch.device, until: float, measure_minutes: float, compiled: bool = False
) -> Stage:
    vae = train_vae(recipe, folder, device, until).averaged()
    encoder = train_text(recipe, folder, device, until).averaged()["encoder"]  # type: ignore[index]
    latents, _ = encode_pictures(vae, pictures(recipe, folder), folder, device)
    tokenizer = build_tokenizer()
    alphas = build_scheduler().alphas_cumprod.to(device)
    torch.manual_seed(recipe.seed)
    model = build_unet().to(memory_format=torch.channels_last)
    denoise = torch.compile(model) if compiled else model
    stage = Stage("unet", folder, model, recipe.unet_lr, recipe.unet_samples, device, recipe.ema)
    scenes = [scene_at(recipe, i) for i in tqdm(range(recipe.scenes), "scenes", unit="scene")]
    easy = [i for i, s in enumerate(scenes) if len(s.things) <= 2]
    measured = time.monotonic()
    for rng in stage.batches(recipe.unet_batch, until, recipe.seed):
        n = recipe.unet_batch
        share = 1.0 if stage.samples < recipe.easy_samples else recipe.easy_share
        chosen = [rng.choice(easy) if rng.random() < share else rng.randrange(recipe.scenes) for _ in range(n)]
        texts = ["" if rng.random() < recipe.caption_dropout else caption_of(rng, scenes[i])[1] for i in chosen]
        ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(device)
        with torch.no_grad():
            states = encoder(ids).last_hidden_state
        z = latents[chosen].to(device)
        noise = torch.randn(z.shape, device=device)
        # shapes are decided in 100..400, what stands where in 400..800; a quarter of the draws keeps the rest in use
        t = torch.where(
            torch.rand(n, device=device) < 0.75,
            torch.randint(100, 800, (n,), device=device),
            torch.randint(0, 1000, (n,), device=device),
        )
        a = alphas[t][:, None, None, None]
        predicted = denoise(a.sqrt() * z + (1 - a).sqrt() * noise, t, states).sample
        weight = ((1 - a) / a).clamp(*recipe.weight_range)
        loss = (weight * (predicted - noise).square()).mean()
        stage.step(loss, n)
        if stage.samples % (100 * n) == 0:
            stage.log(loss=loss.item())
        if time.monotonic() - measured > 60 * measure_minutes:
            stage.save()
            export(recipe, folder, folder / "pipeline")
            stage.log(held_out=measure(folder / "pipeline", 60, ("easy", "standard")))
            measured = time.monotonic()
    return stage


def export(recipe: Recipe, folder: Path, out: Path) -> None:
    """Averaged weights of all stages => a pipeline folder in half precision."""
    device = torch.device("cpu")
    tokenizer = build_tokenizer()
    text = nn.ModuleDict({"encoder": build_text_encoder(tokenizer), "head": LayoutHead()})
    stages = {
        "vae": Stage("vae", folder, build_vae(), 0, 1, device, 0),
        "text": Stage("text", folder, text, 0, 1, device, 0),
        "unet": Stage("unet", folder, build_unet(), 0, 1, device, 0),
    }
    vae, encoder, unet = (s.averaged() for s in stages.values())
    scale = torch.load(folder / "latents.pt", weights_only=True)["scale"]
    vae.register_to_config(scaling_factor=scale)  # type: ignore[operator]
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=encoder["encoder"].half(),  # type: ignore[index]
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    record = {
        "recipe": asdict(recipe),
        "stages": {k: {"samples": s.samples, "seconds": round(s.seconds)} for k, s in stages.items()},
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(pipeline: Path, count: int, levels: Sequence[world.Level] = world.LEVELS) -> dict[str, Any]:
    """Two-way ``comvg`` accuracy of a pipeline's denoising score on held-out scenes: by level, then by kind.

    Args:
        pipeline: A folder written by :func:`export`.
        count: Examples a kind (subject, object, predicate).
        levels: Of the world.
    """
    matcher = Matcher(load_backbone(str(pipeline)), ScoreConfig("denoising", default_timesteps("tiny")))
    figures: dict[str, Any] = {}
    for level in levels:
        result = evaluate(matcher, world_task("comvg", "val", level, 3 * count, 0), progress=True)
        figures[level] = {"overall": dict(result.metrics["accuracy"])}
        for kind in ("subject", "predicate", "object", "image-choice", "text-choice"):
            figures[level][kind] = dict(result.by_tag[kind]["accuracy"])
    return figures


def draw_samples(pipeline: Path, caption: str, out: Path, count: int = 16) -> None:
    """Draws ``count`` pictures of a caption with the stock pipeline (50 steps, guidance 5): one PNG, two rows."""
    stock = StableDiffusionPipeline.from_pretrained(pipeline, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    images = stock(
        [caption] * count,
        num_inference_steps=50,
        guidance_scale=5.0,
        height=PIXELS,
        width=PIXELS,
        generator=torch.Generator().manual_seed(0),
    ).images
    side, gap, columns = 4 * PIXELS, 8, -(-count // 2)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, 2 * (side + gap) + gap), "white")
    for i, image in enumerate(images):
        at = (gap + i % columns * (side + gap), gap + i // columns * (side + gap))
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), at)
    sheet.save(out)


def write_card(pipeline: Path, hardware: str) -> None:
    """Writes the model's card from the training record and the held-out figures beside the weights."""
    record = json.loads((pipeline / "training.json").read_text())
    figures = json.loads((pipeline / "held_out.json").read_text())
    kinds = ("overall", "subject", "predicate", "object", "image-choice", "text-choice")
    rows = [
        {"level": level, **{k: f"{v[k]['value']:.3f} ± {(v[k]['high'] - v[k]['low']) / 2:.3f}" for k in kinds}}
        for level, v in figures.items()
    ]
    stages = [
        {"stage": k, "samples": f"{v['samples']:,}", "hours": f"{v['seconds'] / 3600:.2f}"}
        for k, v in record["stages"].items()
    ]
    text = f"""# tiny

A latent diffusion model of the Stable Diffusion layout (AutoencoderKL, CLIPTextModel, UNet2DConditionModel), small
enough to be shipped: {PIXELS} x {PIXELS} pixels, 8 x 8 x 4 latents, {WINDOW} tokens. Apache-2.0.

- **Data**: {record["recipe"]["scenes"]:,} procedural scenes of `dsd.tiny.world`, part `pretraining`, of one to five
  objects, with captions drawn anew each time. The words `{world.NOVEL_FILL}` and `{world.NOVEL_RELATION}` and the
  colour-shape combinations of `world.HELD_OUT` never occur.
- **Hardware**: {hardware}.
- **Recipe**: `python -m dsd.tiny.pretrain --out runs/tiny`; all numbers in `training.json`.

{table(stages, ("stage", "samples", "hours"))}

Two-way `comvg` accuracy of the zero-shot denoising score at {len(default_timesteps("tiny"))} timesteps, on
{figures["easy"]["overall"]["n"]} validation examples a level (half the width of the 95 % interval after the sign);
`python -m dsd.tiny.pretrain --out runs/tiny --stage measure`:

{table(rows, ("level", *kinds))}
"""
    write_text(pipeline / "README.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the pipeline")
    parser.add_argument(
        "--stage", choices=("vae", "text", "unet", "export", "measure"), default="unet", help="last stage to run"
    )
    parser.add_argument("--from", dest="source", type=Path, help="exported pipeline to go on from, if --out is empty")
    parser.add_argument("--hardware", default=f"{os.cpu_count()} CPU cores", help="for the card")
    parser.add_argument("--measure-minutes", type=float, default=20, help="between looks at held-out accuracy")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop (resumably) after so long")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net: faster, needs a C++ compiler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("vae_samples", "text_samples", "unet_samples", "scenes", "easy_samples"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    options = vars(parser.parse_args())
    folder, stage, device = options.pop("out"), options.pop("stage"), torch.device(options.pop("device"))
    until = time.monotonic() + 60 * options.pop("minutes")
    hardware, measure_minutes, source, compiled = (
        options.pop(k) for k in ("hardware", "measure_minutes", "source", "compile")
    )
    recipe = Recipe(**options)
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        adopt(source, folder)
    if stage == "vae":
        train_vae(recipe, folder, device, until)
    elif stage == "text":
        train_text(recipe, folder, device, until)
    else:
        if stage == "unet":
            train_unet(recipe, folder, device, until, measure_minutes, compiled)
        if stage in ("unet", "export"):
            export(recipe, folder, folder / "pipeline")
        figures = measure(folder / "pipeline", 300)
        write_text(folder / "pipeline" / "held_out.json", json.dumps(figures, indent=1) + "\n")
        write_card(folder / "pipeline", hardware)
        draw_samples(folder / "pipeline", "a red circle above a blue square", folder / "samples.png")


if __name__ == "__main__":
    main()
