"""Few-shot learning: from labelled examples to an adapter, and adapters on disk.

:func:`fit` learns low-rank attention prompts (:mod:`dsd.prompts`) so that matching pairs outscore the others, with
the same noise and timestep for all candidates of an example. It keeps the step that does best on validation examples,
and keeps the zero-shot score unless learning is clearly better there.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dsd import prompts
from dsd.backbone import Backbone, Latents, TextStates
from dsd.contracts import AdapterError, Example, ModelError, OptionError
from dsd.evaluate import dataset_checksum
from dsd.images import content_hash, load_image
from dsd.metrics import bootstrap_interval, wins
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import Pass, ScoreConfig, noised_pass

Objective = Literal["hinge", "softmax"]


@dataclass(frozen=True)
class FitConfig:
    """How to learn.

    Attributes:
        objective: ``hinge`` on the hardest negative (He et al. 2023) or ``softmax`` over candidates.
        margin: Of the hinge, in units of the score's spread on the first batch.
        steps: Optimizer steps at most.
        batch: Examples a step.
        learning_rate: Peak; falls to zero along a cosine.
        weight_decay: Of AdamW. Without it prompts overfit a hundred examples.
        validation: Share of the examples held out when no validation examples are given.
        check_every: Steps between looks at the validation examples.
        patience: Looks without improvement before it stops.
        negatives: Captions of other examples that join each right pair as wrong candidates, drawn anew each step.
        jitter: Timesteps are drawn within this distance of the score's own.
        seed: Decides initial prompts, order, noise and the held-out share.
    """

    objective: Objective = "softmax"
    margin: float = 0.1
    steps: int = 200
    batch: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    validation: float = 0.25
    check_every: int = 25
    patience: int = 8
    negatives: int = 2
    jitter: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise OptionError(f"got objective {self.objective!r}, expected one of {get_args(Objective)}")
        for name in ("margin", "steps", "batch", "learning_rate", "check_every", "patience"):
            if not getattr(self, name) > 0:
                raise OptionError(f"got {name} {getattr(self, name)}, expected more than 0")
        if self.negatives < 0 or self.jitter < 0:
            raise OptionError(f"got negatives {self.negatives}, jitter {self.jitter}, expected 0 or more of each")
        if not self.weight_decay >= 0:
            raise OptionError(f"got weight_decay {self.weight_decay}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"got seed {self.seed}, expected 0 or more, and less than 2 to the power of 63")
        if not 0 < self.validation < 1:
            raise OptionError(f"got validation share {self.validation}, expected more than 0 and less than 1")


@dataclass(frozen=True)
class Adapter:
    """What was learned, and everything needed to use it again.

    Attributes:
        base: The fingerprint of the base model (see :func:`fingerprint`); None for adapters in the authors' format.
        score: The score that was taught.
        prompts: Where the prompts go; None if the zero-shot score was kept.
        state: The prompts' tensors by name, float32.
        size: Pixels a side of the pictures it was taught on.
        training: Configuration, curve and figures of the training, plain values.
        scale: Turns score differences into log-odds: probabilities are ``softmax(scale * scores)``.
    """

    base: Mapping[str, Any] | None
    score: ScoreConfig
    prompts: PromptConfig | None
    state: Mapping[str, Tensor]
    size: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder, which appears whole."""
        out = check_out(folder)
        config = {
            "format": _FORMAT,
            "base": self.base,
            "size": self.size,
            "score": self.score.to_dict(),
            "prompts": None if self.prompts is None else asdict(self.prompts),
            "scale": self.scale,
            "training": self.training,
        }
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            save_file(dict(self.state), part / _WEIGHTS)
            (part / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
            (part / "README.md").write_text(_card(self, out.name), "utf-8")
            part.chmod(0o755)
            if out.exists():
                old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
                os.replace(out, old)
                os.replace(part, out)
                shutil.rmtree(old)
            else:
                os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return out

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Reads a folder written by :meth:`save`, or the authors' format (``pytorch_model.bin``).

        Raises:
            AdapterError: If the folder holds neither, or files that do not fit together.
        """
        path = Path(folder)
        if not (path / _CONFIG).is_file():
            if (path / _AUTHORS).is_file():
                config, state = prompts.read_authors(path / _AUTHORS)
                return cls(None, ScoreConfig("paper", (189, 389, 589, 789, 989)), config, state)
            raise AdapterError(f"{path}: got no adapter, expected a folder with {_CONFIG} or {_AUTHORS}")
        try:
            values = json.loads((path / _CONFIG).read_text("utf-8"))
            if values.get("format") != _FORMAT:
                raise AdapterError(f"{path}: got format {values.get('format')!r}, expected {_FORMAT!r}")
            where, base, size = values["prompts"], values["base"], values["size"]
            if base is not None and not (base["name"] and same_base(base, base)):
                raise ValueError("base is no fingerprint")
            return cls(
                base,
                ScoreConfig.from_dict(values["score"]),
                None if where is None else PromptConfig.from_dict(where),
                load_file(path / _WEIGHTS),
                None if size is None else int(size),
                dict(values["training"]),
                values["scale"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, OptionError) as error:
            raise AdapterError(
                f"{path}: got an adapter that cannot be read ({type(error).__name__}: {error}), "
                "expected the files as they were saved; copy the folder again"
            ) from None

    def attach(self, backbone: Backbone) -> None:
        """Puts the prompts onto a bare model.

        Raises:
            AdapterError: If it was made for another base model.
        """
        if self.base is not None and not same_base(self.base, fingerprint(backbone)):
            raise AdapterError(
                f"got an adapter for {self.base['name']} ({self.base['parameters']:,} parameters), expected one for "
                f"{backbone.name}; load it with --model {self.base['name']}"
            )
        if self.prompts is not None:
            prompts.attach(backbone.denoiser, self.prompts)
            try:
                prompts.load_state(backbone.denoiser, self.state)
            except AdapterError:
                prompts.detach(backbone.denoiser)
                raise


_FORMAT = "dsd-adapter-1"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_AUTHORS = "pytorch_model.bin"


def check_out(folder: str | os.PathLike[str]) -> Path:
    """Where an adapter is to be saved; makes the folders above it.

    Raises:
        AdapterError: If something else is there, or nothing can be written there.
    """
    out = Path(folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        taken = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _CONFIG).exists()))
    except OSError as error:
        raise AdapterError(f"{out}: got a path that cannot be written ({error.strerror}); choose another") from None
    if taken:
        raise AdapterError(f"{out}: got a path that holds something else, expected a new folder or an adapter's")
    return out


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """What tells one base model from another, whatever precision it is loaded in: a size and some weights."""
    weights = [(n, p) for n, p in backbone.denoiser.named_parameters() if p.ndim > 1 and ".lora_" not in n]
    chosen = weights[:: max(1, len(weights) // 32)]
    sample = [round(float(p.detach().flatten()[p.numel() // 2]), 5) for _, p in chosen]
    return {"name": backbone.name, "parameters": sum(p.numel() for _, p in weights), "sample": sample}


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of one model, up to rounding to half precision."""
    same_size = a["parameters"] == b["parameters"] and len(a["sample"]) == len(b["sample"])
    return same_size and np.allclose(a["sample"], b["sample"], rtol=1e-2, atol=1e-3)


def _card(adapter: Adapter, name: str) -> str:
    base = "unknown" if adapter.base is None else adapter.base["name"]
    training = adapter.training
    lines = [
        f"# {name}",
        "",
        f"Low-rank attention prompts for `{base}`, learned by `dsd` (He et al. 2023, arXiv 2305.10722).",
        "",
        f"- Score: `{adapter.score.kind}` at timesteps {', '.join(map(str, adapter.score.timesteps))}",
        "- Prompts: none, the zero-shot score did as well"
        if adapter.prompts is None
        else f"- Prompts: rank {adapter.prompts.rank} on {', '.join(adapter.prompts.projections)}",
    ]
    if "examples" in training:
        lines.append(f"- Examples: {training['examples']} to learn from, {training['validation_examples']} to validate")
    if "validation" in training:
        before, after = training["validation"]["before"], training["validation"]["after"]
        lines.append(f"- Validation accuracy: {before:.3f} zero-shot, {after:.3f} learned")
    call = f'matcher = dsd.Matcher.from_pretrained("{base}", adapter="{name}")'
    lines += ["", "```python", "import dsd", "", call, "```", ""]
    return "\n".join(lines)


# Learning


@dataclass(frozen=True)
class _Choice:
    """One decision of an example: rows of its table that compete, and which of them are right."""

    rows: tuple[int, ...]
    right: tuple[bool, ...]


def _choices(example: Example) -> list[_Choice]:
    """Every image's choice among texts and every text's among images that has right and wrong candidates."""
    columns = len(example.texts)
    table = [[i * columns + j for j in range(columns)] for i in range(len(example.images))]
    lines = table + [list(column) for column in zip(*table, strict=True)]
    positives = {i * columns + j for i, j in example.positives}
    made = [_Choice(tuple(line), tuple(r in positives for r in line)) for line in lines]
    return [c for c in made if any(c.right) and not all(c.right)]


def choice_loss(scores: Tensor, choices: Sequence[_Choice], objective: Objective, margin: float) -> Tensor:
    """Mean loss over the choices of one example, given its (rows,) scores in units of their spread."""
    losses = []
    for choice in choices:
        candidates = scores[list(choice.rows)]
        right = torch.tensor(choice.right, device=scores.device)
        if objective == "softmax":
            losses.append(candidates.logsumexp(0) - candidates[right].logsumexp(0))
        else:
            losses.append(F.relu(margin + candidates[~right].max() - candidates[right].min()))
    return torch.stack(losses).mean()


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and to validate on; examples that share a picture stay on one side."""
    root = list(range(len(examples)))  # of each example, one that shares a picture with it, no later in the list
    first: dict[str, int] = {}

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i, example in enumerate(examples):
        for image in example.images:
            a, b = find(i), find(first.setdefault(content_hash(load_image(image)), i))
            root[max(a, b)] = min(a, b)
    groups: dict[str, list[Example]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(examples[find(i)].id, []).append(example)
    order = sorted(groups, key=str)
    random.Random(seed).shuffle(order)
    held: list[Example] = []
    while order and len(held) < round(share * len(examples)):
        held += groups[order.pop()]
    kept = {id(e) for e in held}
    return [e for e in examples if id(e) not in kept], held


@dataclass(frozen=True)
class _Validation:
    """Outcomes on the validation examples at one moment."""

    accuracy: np.ndarray  # (examples,) share of choices won
    loss: np.ndarray  # (examples,) of the softmax over candidates, at the best scale
    scale: float

    def plain(self) -> tuple[list[float], list[float], float]:
        return self.accuracy.tolist(), self.loss.tolist(), self.scale

    @classmethod
    def of(cls, values: Sequence[Any]) -> _Validation:
        return cls(np.array(values[0]), np.array(values[1]), float(values[2]))


def _validate(scorer: Scorer, examples: Sequence[Example]) -> _Validation:
    flat = scorer.predict([pair for e in examples for pair in e.pairs])
    tables, at = [], 0
    for e in examples:
        tables.append(flat[at : at + len(e.pairs)])
        at += len(e.pairs)
    accuracy = [
        wins(t.reshape(len(e.images), len(e.texts)), e.positives) for t, e in zip(tables, examples, strict=True)
    ]
    choices = [_choices(e) for e in examples]
    spread = max(1e-6, float(np.std(np.concatenate([t - t.mean() for t in tables]))))

    def losses(scale: float) -> np.ndarray:
        scaled = [torch.from_numpy(t.astype(np.float64)) * scale for t in tables]
        made = [choice_loss(t, c, "softmax", 0) for t, c in zip(scaled, choices, strict=True)]
        return torch.stack(made).numpy()

    # the scale that makes the scores log-odds: one parameter, so a grid finds it
    scales = [s / spread for s in np.geomspace(0.05, 20, 40)]
    scale = min(scales, key=lambda s: float(losses(s).mean()))
    return _Validation(np.array([float(np.mean(a)) for a in accuracy]), losses(scale), float(scale))


def fit(
    scorer: Scorer,
    examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    config: FitConfig | None = None,
    prompt: PromptConfig | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Adapter:
    """Learns attention prompts for the scorer's score; they stay attached to its backbone.

    Args:
        scorer: Decides score, timesteps, size and batch size; its backbone must be bare.
        examples: Labelled examples, in which right and wrong candidates compete.
        validation: Examples to stop by; None holds out a share of ``examples``.
        checkpoint: A file to keep the state of training in, removed when training ends.
        resume: Go on from ``checkpoint`` if it is there; the result is the same as without the stop.

    Raises:
        OptionError: If there is nothing to learn from, or the checkpoint is of another request.
        ModelError: If the loss stops being finite.
    """
    config, prompt = config or FitConfig(), prompt or PromptConfig()
    usable = list(examples)
    idle = [e.id for e in (*usable, *(validation or ())) if not _choices(e)]
    if idle:
        raise OptionError(
            f"got {len(idle)} examples in which nothing competes ({', '.join(idle)[:200]}), "
            "expected right and wrong candidates in each; add negatives to them"
        )
    if validation is None:
        usable, validation = split(usable, config.validation, config.seed)
    if not usable or not validation:
        raise OptionError(
            f"got {len(usable)} examples to learn from and {len(validation)} to validate, expected at least one of each"
        )
    denoiser = scorer.backbone.denoiser
    base = fingerprint(scorer.backbone)
    data = dataset_checksum(usable), dataset_checksum(validation)
    request = json.dumps([base, asdict(config), asdict(prompt), scorer.score.config.to_dict(), scorer.size, *data])
    keeper = None if checkpoint is None else Path(checkpoint)
    prompts.attach(denoiser, prompt, config.seed)
    try:
        learner = _Learner(scorer, usable, config)
        found = _load_checkpoint(keeper, request) if resume and keeper is not None and keeper.exists() else None
        if found is None:
            learner.watch(_validate(scorer, validation))
        else:
            learner.load_state_dict(found)
        with tqdm(total=config.steps, initial=learner.done, desc="learning", unit="step", disable=not progress) as bar:
            while learner.done < config.steps and learner.stale < config.patience:
                learner.step()
                bar.update()
                if learner.done % config.check_every == 0 or learner.done == config.steps:
                    learner.watch(_validate(scorer, validation))
                    bar.set_postfix(accuracy=f"{learner.curve[-1]['accuracy']:.3f}")
                    if keeper is not None:
                        _save_checkpoint(keeper, request, learner.state_dict())
        prompts.detach(denoiser)
        if learner.better:
            prompts.attach(denoiser, prompt)
            prompts.load_state(denoiser, learner.best_prompts)
    except BaseException:
        prompts.detach(denoiser)
        raise
    if keeper is not None:
        keeper.unlink(missing_ok=True)
    before, best = learner.before, learner.best if learner.better else learner.before
    _, low, high = bootstrap_interval(best.accuracy, config.seed)
    training = {
        "config": asdict(config),
        "examples": len(usable),
        "validation_examples": len(validation),
        "kept": learner.better,
        "validation": {
            "before": float(before.accuracy.mean()),
            "after": float(best.accuracy.mean()),
            "low": low,
            "high": high,
        },
        "curve": learner.curve,
    }
    return Adapter(
        base,
        scorer.score.config,
        prompt if learner.better else None,
        learner.best_prompts if learner.better else {},
        scorer.size,
        training,
        best.scale,
    )


def _save_checkpoint(path: Path, request: str, state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    torch.save({"request": request, **state}, part)
    os.replace(part, path)


def _load_checkpoint(path: Path, request: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        same = state.pop("request") == request
    except Exception as error:  # whatever the unpickler makes of it
        raise OptionError(f"{path}: got a checkpoint that cannot be read ({type(error).__name__}); delete it") from None
    if not same:
        raise OptionError(
            f"{path}: got a checkpoint of another request, expected the same examples, model and options; "
            "delete it to start anew"
        )
    return state


@dataclass(frozen=True)
class _Drawn:
    """What one example brings to a step: a latent and a caption a row, and the choices among the rows."""

    latents: Latents
    captions: tuple[str, ...]
    choices: tuple[_Choice, ...]


class _Learner:
    """Optimizer steps over batches of examples, and the best prompts so far.

    All randomness is a function of the seed and the step, so that no random state needs to be kept.
    """

    def __init__(self, scorer: Scorer, examples: Sequence[Example], config: FitConfig) -> None:
        self.scorer, self.config = scorer, config
        self.examples = list(examples)
        self.choices = [_choices(e) for e in self.examples]
        self.captions = sorted({text for e in self.examples for text in e.texts})
        # few-shot sets are small: all latents are held, one row a pair
        self.latents = [scorer.latents([image for image, _ in e.pairs]) for e in self.examples]
        self.parameters = list(prompts.parameters(scorer.backbone.denoiser).values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.spread: float | None = None
        self.order: list[int] = []
        self.done = 0
        self.stale = 0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.before: _Validation
        self.best: _Validation
        self.best_prompts: dict[str, Tensor] = {}

    @property
    def better(self) -> bool:
        """Whether the best prompts beat the zero-shot score by more than chance would give."""
        gain = self.before.loss - self.best.loss
        error = gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        return bool(self.best_prompts) and bool(gain.mean() > error)

    def watch(self, now: _Validation) -> None:
        """Takes note of how the validation examples fare at this step."""
        point = {"step": self.done, "accuracy": float(now.accuracy.mean()), "loss": float(now.loss.mean())}
        if self.losses:
            point["train"] = float(np.mean(self.losses))
        self.curve.append(point)
        self.losses = []
        if self.done == 0:
            self.before = self.best = now
        elif now.loss.mean() < self.best.loss.mean():
            self.best, self.best_prompts, self.stale = now, prompts.state(self.scorer.backbone.denoiser), 0
        else:
            self.stale += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in plain values and tensors."""
        return {
            "prompts": prompts.state(self.scorer.backbone.denoiser),
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.spread, self.order, self.done, self.stale, self.curve],
            "before": self.before.plain(),
            "best": self.best.plain(),
            "best_prompts": self.best_prompts,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        prompts.load_state(self.scorer.backbone.denoiser, state["prompts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.spread, self.order, self.done, self.stale, self.curve = state["progress"]
        self.before, self.best = _Validation.of(state["before"]), _Validation.of(state["best"])
        self.best_prompts = state["best_prompts"]

    def step(self) -> None:
        """One step on the next batch.

        Raises:
            ModelError: If the loss is not finite.
        """
        config = self.config
        self.done += 1
        rng = random.Random(f"{config.seed}/{self.done}")
        while len(self.order) < config.batch:
            fresh = list(range(len(self.examples)))
            rng.shuffle(fresh)
            self.order += fresh
        batch, self.order = self.order[: config.batch], self.order[config.batch :]
        drawn = [self._draw(i, rng) for i in batch]
        scores = self._scores(drawn, rng)
        if self.spread is None:  # the unit in which margin and softmax work: how far candidates' scores lie apart
            apart = torch.cat([s.detach() - s.detach().mean() for s in scores])
            self.spread = max(1e-6, float(apart.std()))
        losses = [
            choice_loss(s / self.spread, d.choices, config.objective, config.margin)
            for s, d in zip(scores, drawn, strict=True)
        ]
        loss = torch.stack(losses).mean()
        if not torch.isfinite(loss):
            names = [self.examples[i].id for i in batch]
            broken = [name for s, name in zip(scores, names, strict=True) if not s.isfinite().all()]
            raise ModelError(
                f"got a loss of {loss.item()} at step {self.done}, example {(broken or names)[0]}; "
                "lower the learning rate, or load the model in float32"
            )
        # cosine to zero after a short rise
        warm = min(1.0, self.done / 10)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * (self.done - 1) / config.steps))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))

    def _draw(self, i: int, rng: random.Random) -> _Drawn:
        """An example's own pairs, and each right pair again among captions of other examples."""
        example = self.examples[i]
        rows = list(range(len(example.pairs)))
        captions = [text for _, text in example.pairs]
        choices = list(self.choices[i])
        others = [t for t in self.captions if t not in example.texts]
        for image, text in example.positives if others else ():
            own = image * len(example.texts) + text
            wrong = rng.sample(others, min(self.config.negatives, len(others)))
            first = len(rows)
            rows += [own] * len(wrong)
            captions += wrong
            candidates = (own, *range(first, first + len(wrong)))
            if wrong:
                choices.append(_Choice(candidates, tuple(c == own for c in candidates)))
        return _Drawn(self.latents[i][rows], tuple(captions), tuple(choices))

    def _scores(self, batch: Sequence[_Drawn], rng: random.Random) -> list[Tensor]:
        """Scores of every row of each example, under one noise and one timestep an example: (rows,) each."""
        backbone, score = self.scorer.backbone, self.scorer.score
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        captions: list[str] = []
        times: list[int] = []
        draws: list[Tensor] = []
        sizes = [len(drawn.captions) for drawn in batch]
        for drawn, size in zip(batch, sizes, strict=True):
            t = rng.choice(score.config.timesteps) + rng.randint(-self.config.jitter, self.config.jitter)
            times += [min(max(t, 0), backbone.num_train_timesteps - 1)] * size
            draws += [torch.randn(self.scorer.noise.shape[1:], generator=generator)] * size
            captions += drawn.captions
        latents = torch.cat([drawn.latents for drawn in batch])
        states = self.scorer.texts(captions)
        noise = torch.stack(draws).to(backbone.device)
        timesteps = torch.tensor(times, device=backbone.device)
        empty: Pass | None = None
        if score.needs_empty:
            (blank,) = backbone.encode_texts([""])
            empty = noised_pass(
                backbone, latents, noise, timesteps, blank.select([0] * len(captions)), score.empty_layers
            )
        # a pass takes captions of one length only, so that nothing is padded for another's sake
        lengths: dict[int, list[int]] = {}
        for row, state in enumerate(states):
            lengths.setdefault(state.states.shape[1], []).append(row)
        found: list[Tensor] = []
        order: list[int] = []
        for rows in lengths.values():
            text = TextStates.join([states[r] for r in rows])
            made = noised_pass(backbone, latents[rows], noise[rows], timesteps[rows], text, score.layers)
            found.append(score(made, None if empty is None else empty.rows(rows)))
            order += rows
        back = torch.tensor(order, device=backbone.device).argsort()
        return list(torch.cat(found)[back].split(sizes))
