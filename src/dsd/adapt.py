"""Few-shot learning: from labelled examples to an adapter.

:func:`fit` learns, by one of several methods, so that matching pairs outscore the others:

- ``prompt``: low-rank attention prompts (:mod:`dsd.prompts`), by gradient, with the same noise and timestep for all
  candidates of an example. The step that does best on validation examples is kept.
- ``heads``: weights of the score's attention heads at each timestep, by gradient, from their importance on.
- ``weights``: weights of all heads and of the denoising score (:mod:`dsd.weights`), in seconds, on a frozen model.
- ``prompt+heads``: both at once. ``prompt+weights``: first prompts, then weights on the prompted model.

All keep the score that they start from unless learning is clearly better.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import Latents, TextStates
from dsd.contracts import Example, ModelError, OptionError, Pair
from dsd.evaluate import dataset_checksum
from dsd.images import content_hash, load_image
from dsd.metrics import bootstrap_interval, expected_calibration_error, wins
from dsd.prompts import PromptConfig
from dsd.scorer import Scorer
from dsd.scores import WEIGHTED, Features, Pass, noised_pass
from dsd.weights import Choice, Choices, better, fit_weights

Objective = Literal["hinge", "softmax"]
Method = Literal["prompt", "weights", "heads", "prompt+heads", "prompt+weights"]


@dataclass(frozen=True)
class FitConfig:
    """How to learn.

    Attributes:
        method: What is learned; see :mod:`dsd.adapt`. ``weights`` heeds ``negatives``, ``draws``, ``folds`` and
            ``seed`` alone.
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
        draws: Of noise, over which ``weights`` averages.
        folds: In which ``weights`` holds out examples by turns.
        jitter: Timesteps are drawn within this distance of the score's own.
        seed: Decides initial prompts, order, noise and the held-out share.
    """

    method: Method = "prompt"
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
    draws: int = 4
    folds: int = 5
    jitter: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise OptionError(f"got method {self.method!r}, expected one of {get_args(Method)}")
        if self.objective not in get_args(Objective):
            raise OptionError(f"got objective {self.objective!r}, expected one of {get_args(Objective)}")
        for name in ("margin", "steps", "batch", "learning_rate", "check_every", "patience", "draws"):
            if not getattr(self, name) > 0:
                raise OptionError(f"got {name} {getattr(self, name)}, expected more than 0")
        if self.folds < 2:
            raise OptionError(f"got {self.folds} folds, expected 2 or more")
        if self.negatives < 0 or self.jitter < 0:
            raise OptionError(f"got negatives {self.negatives}, jitter {self.jitter}, expected 0 or more of each")
        if not self.weight_decay >= 0:
            raise OptionError(f"got weight_decay {self.weight_decay}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"got seed {self.seed}, expected 0 or more, and less than 2 to the power of 63")
        if not 0 < self.validation < 1:
            raise OptionError(f"got validation share {self.validation}, expected more than 0 and less than 1")


def _choices(example: Example) -> list[Choice]:
    """Every image's choice among texts and every text's among images that has right and wrong candidates."""
    columns = len(example.texts)
    table = [[i * columns + j for j in range(columns)] for i in range(len(example.images))]
    lines = table + [list(column) for column in zip(*table, strict=True)]
    positives = {i * columns + j for i, j in example.positives}
    made = [Choice(tuple(line), tuple(r in positives for r in line)) for line in lines]
    return [c for c in made if any(c.right) and not all(c.right)]


def choice_loss(scores: Tensor, choices: Sequence[Choice], objective: Objective, margin: float) -> Tensor:
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


def _apart(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """Groups of examples that share pictures, none with another group, in random order."""
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
    return [groups[name] for name in order]


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and to validate on; examples that share a picture stay on one side."""
    groups = _apart(examples, seed)
    held: list[Example] = []
    while groups and len(held) < round(share * len(examples)):
        held += groups.pop()
    kept = {id(e) for e in held}
    return [e for e in examples if id(e) not in kept], held


def folds(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """Of each example, which of at most ``count`` folds of like size it is in; those that share a picture in one.

    Raises:
        OptionError: If all examples share pictures.
    """
    groups = _apart(examples, seed)
    if len(groups) < 2:
        raise OptionError(
            f"got {len(examples)} examples of which none is free of the others' pictures, expected two or more that "
            "share none, to hold out by turns"
        )
    sizes = [0] * min(count, len(groups))
    fold: dict[int, int] = {}
    for group in groups:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(group)
        fold |= {id(e): smallest for e in group}
    return [fold[id(e)] for e in examples]


@dataclass(frozen=True)
class _Validation:
    """Outcomes on the validation examples at one moment."""

    accuracy: np.ndarray  # (examples,) share of choices won
    loss: np.ndarray  # (examples,) of the softmax over candidates, at the best scale
    scale: float

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: choices won, and the loss where these are equal.

        The loss alone is led by a few choices that are lost by far, and prefers prompts that have hardly learned.
        """
        return float(self.accuracy.mean()), -float(self.loss.mean())

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
    """Learns for the scorer, which has the learned score and prompts in the end.

    Args:
        scorer: Decides score, timesteps, size and batch size; its backbone must be bare. ``weights`` starts from the
            denoising score, whatever the scorer's is.
        examples: Labelled examples, in which right and wrong candidates compete.
        validation: Examples to stop by; None holds out a share of ``examples``. ``weights`` needs none, for it holds
            out all of them by turns; it keeps the zero-shot score if that does better on those given.
        checkpoint: A file to keep the state of training in, removed when training ends. ``weights`` starts anew.
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
    zero = scorer.score.config
    if zero.kind == WEIGHTED:
        raise OptionError("got a score whose weights are learned, expected a zero-shot one to start from")
    if config.method == "weights":
        try:
            return _fit_weights(scorer, usable, validation or None, config, None, progress)
        except BaseException:
            scorer.use(zero)
            raise
    if config.method != "prompt":  # else it comes out after the prompts are learned
        Features(scorer.backbone, zero.layers).weights_of(zero.kind)
    pool = usable
    if validation is None:
        usable, validation = split(usable, config.validation, config.seed)
    if not usable or not validation:
        raise OptionError(
            f"got {len(usable)} examples to learn from and {len(validation)} to validate, expected at least one of each"
        )
    if config.method == "prompt+weights" and len(validation) > 1:
        folds(validation, config.folds, config.seed)  # the same
    keeper = None if checkpoint is None else Path(checkpoint)
    adapter = _fit_steps(scorer, usable, validation, config, prompt, keeper, resume, progress)
    if config.method == "prompt+weights":
        try:
            if adapter.prompts is None:
                adapter = _fit_weights(scorer, pool, None, config, None, progress)
            else:  # prompts fit their own examples too well for weights to be learned from these
                adapter = _fit_weights(scorer, validation, None, config, adapter, progress)
        except BaseException:
            prompts.detach(scorer.backbone.denoiser)
            scorer.use(zero)
            raise
    if keeper is not None:
        keeper.unlink(missing_ok=True)
    return adapter


def _fit_steps(
    scorer: Scorer,
    examples: Sequence[Example],
    validation: Sequence[Example],
    config: FitConfig,
    prompt: PromptConfig,
    keeper: Path | None,
    resume: bool,
    progress: bool,
) -> Adapter:
    """Learns prompts, weights of heads, or both, by gradient."""
    denoiser, zero = scorer.backbone.denoiser, scorer.score.config
    base = fingerprint(scorer.backbone)
    data = dataset_checksum(examples), dataset_checksum(validation)
    request = json.dumps([base, asdict(config), asdict(prompt), zero.to_dict(), scorer.size, *data])
    prompted, heads = config.method != "heads", config.method in ("heads", "prompt+heads")
    features = Features(scorer.backbone, zero.layers) if heads else None
    if prompted:
        prompts.attach(denoiser, prompt, config.seed)
    try:
        if features is not None:  # the same score, with weights that can be learned
            same = features.weights_of(zero.kind).repeat(len(zero.timesteps), 1)
            scorer.use(replace(zero, kind=WEIGHTED, layers=features.layers), same)
        learner = _Learner(scorer, examples, config)
        found = _load_checkpoint(keeper, request) if resume and keeper is not None and keeper.exists() else None
        if found is not None:
            learner.load_state_dict(found)
        else:
            learner.watch(_validate(scorer, validation))
            if features is not None:
                learner.weigh(importance(scorer, features, examples, config))
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
        if learner.better and prompted:
            prompts.attach(denoiser, prompt)
            prompts.load_state(denoiser, learner.best_prompts)
    except BaseException:
        prompts.detach(denoiser)
        scorer.use(zero)
        raise
    before, best = learner.before, learner.best if learner.better else learner.before
    training = {
        "config": asdict(config),
        "examples": len(examples),
        "validation_examples": len(validation),
        "data": {"examples": data[0], "validation": data[1]},
        "kept": learner.better,
        "validation": _figures(before.accuracy, best.accuracy, config.seed),
        "curve": learner.curve,
    }
    learned = scorer.score.config if learner.better else zero
    scorer.use(learned, learner.best_weights if learner.better else None)
    return Adapter(
        base,
        learned,
        prompt if learner.better and prompted else None,
        learner.best_prompts if learner.better else {},
        scorer.size,
        training,
        best.scale,
        learner.best_weights if learner.better else None,
        features.names if learner.better and features is not None else None,
    )


def _figures(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, float]:
    """Accuracies before and after learning, with an interval of the latter."""
    value, low, high = bootstrap_interval(after, seed)
    return {"before": float(before.mean()), "after": value, "low": low, "high": high}


def importance(scorer: Scorer, features: Features, examples: Sequence[Example], config: FitConfig) -> Tensor:
    """How much each weight of the scorer's ``weighted`` score matters: ``|d loss / d weight|``, averaged over examples.

    After He et al. 2023, who weigh attention heads so. Only weights that are not zero count; the result has their sum,
    so that it can take their place.
    """
    assert scorer.score.weights is not None
    found = scorer.features([pair for e in examples for pair in e.pairs], features)[0]
    weights = scorer.score.weights.detach().cpu().clone().requires_grad_()
    scores = (torch.from_numpy(found) * weights).sum(2).mean(1)
    parts = scores.split([len(e.pairs) for e in examples])
    spread = max(1e-6, float(torch.cat([s.detach() - s.detach().mean() for s in parts]).std()))
    total = torch.zeros_like(weights)
    for part, example in zip(parts, examples, strict=True):
        loss = choice_loss(part / spread, _choices(example), config.objective, config.margin)
        (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
        total += gradient.abs()
    total = torch.where(weights != 0, total, 0.0)
    if not total.sum() > 0:  # every choice is won beyond the margin
        return weights.detach()
    return total / total.sum() * weights.detach().sum()


def _fit_weights(
    scorer: Scorer,
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    config: FitConfig,
    taught: Adapter | None,
    progress: bool,
) -> Adapter:
    """Fits weights of the features of the model as it is: bare, or with the prompts of ``taught``.

    They start from the denoising score, and from the score that the prompts were learned for.
    """
    zero = scorer.score.config
    start = replace(zero, kind="denoising", layers=None, weights=None) if taught is None else zero
    features = Features(scorer.backbone, zero.layers)
    groups = folds(examples, config.folds, config.seed)
    rng = random.Random(config.seed)
    captions = sorted({text for e in examples for text in e.texts})
    pairs: list[Pair] = []
    learn: list[list[Choice]] = []
    judge: list[list[Choice]] = []
    tables: list[slice] = []
    for example in examples:
        at, own = len(pairs), _choices(example)
        rows, texts, choices = _with_negatives(example, own, captions, config.negatives, rng)
        pairs += [(example.pairs[row][0], text) for row, text in zip(rows, texts, strict=True)]
        learn.append([Choice(tuple(at + r for r in c.rows), c.right) for c in choices])
        judge.append(learn[-1][: len(own)])
        tables.append(slice(at, at + len(example.pairs)))
    drawn = scorer.features(pairs, features, config.draws, progress=progress)
    flat = drawn.reshape(config.draws, len(pairs), -1).astype(np.float64)
    steps = len(zero.timesteps)
    kinds = dict.fromkeys(("denoising", start.kind))
    prior = np.stack([np.tile(features.weights_of(kind).double().numpy(), steps) / steps for kind in kinds])
    fitted = fit_weights(flat.mean(0), flat[0], learn, judge, prior, groups)
    weights = torch.from_numpy(fitted.weights.reshape(steps, -1) * steps).float()

    judged = Choices(judge)
    plain = flat[0] @ prior[-1]
    kept = math.isfinite(fitted.strength)
    if taught is not None:
        kept = better(fitted.after, judged.losses(judged.best_scale(plain) * plain), 1)
    learned = replace(zero, kind=WEIGHTED, layers=features.layers, weights=None)
    before, after = (
        np.array(
            [wins(s[t].reshape(len(e.images), -1), e.positives).mean() for t, e in zip(tables, examples, strict=True)]
        )
        for s in (plain, fitted.scores)
    )
    if validation is not None:
        scorer.use(start)
        first = _validate(scorer, validation)
        scorer.use(learned, weights)
        second = _validate(scorer, validation)
        kept = kept and bool(second.loss.mean() < first.loss.mean())
        before, after = first.accuracy, second.accuracy
    scores = fitted.scores if kept else plain
    scale = judged.best_scale(scores)
    data = dataset_checksum(examples)
    training: dict[str, Any] = {
        "config": asdict(config),
        "examples": len(examples),
        "validation_examples": len(examples if validation is None else validation),
        "data": {"examples": data, "validation": data if validation is None else dataset_checksum(validation)},
        "kept": kept,
        "validation": _figures(before, after if kept else before, config.seed),
        "curve": [],
    }
    if taught is not None:  # before is zero-shot, not before weights
        training = {**taught.training, "validation": training["validation"]}
        training["validation"]["before"] = taught.training["validation"]["before"]
    # no number in JSON is infinite
    tried = [{"strength": s if math.isfinite(s) else None, "loss": loss} for s, loss in fitted.losses.items()]
    training["weights"] = {
        "kept": kept,
        "strength": fitted.strength if math.isfinite(fitted.strength) else None,
        "tried": tried,
        "folds": len(set(groups)),
        "calibration_error": expected_calibration_error(*judged.confidence(scale * scores)),
    }
    scorer.use(learned if kept else start, weights if kept else None)
    return Adapter(
        fingerprint(scorer.backbone),
        learned if kept else start,
        None if taught is None else taught.prompts,
        {} if taught is None else taught.state,
        scorer.size,
        training,
        scale,
        weights if kept else None,
        features.names if kept else None,
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


def _with_negatives(
    example: Example, choices: Sequence[Choice], captions: Sequence[str], count: int, rng: random.Random
) -> tuple[list[int], list[str], list[Choice]]:
    """An example's own pairs, and each right pair again among ``count`` captions of other examples.

    Returns:
        For each row the pair whose image it has, its caption, and the choices among the rows.
    """
    rows = list(range(len(example.pairs)))
    texts = [text for _, text in example.pairs]
    made = list(choices)
    others = [t for t in captions if t not in example.texts]
    for image, text in example.positives if others else ():
        own = image * len(example.texts) + text
        wrong = rng.sample(others, min(count, len(others)))
        first = len(rows)
        rows += [own] * len(wrong)
        texts += wrong
        candidates = (own, *range(first, first + len(wrong)))
        if wrong:
            made.append(Choice(candidates, tuple(c == own for c in candidates)))
    return rows, texts, made


_HEADS = 10.0
"""Learning rate of weights, which change by parts of themselves, against that of prompts."""


@dataclass(frozen=True)
class _Drawn:
    """What one example brings to a step: a latent and a caption a row, and the choices among the rows."""

    latents: Latents
    captions: tuple[str, ...]
    choices: tuple[Choice, ...]


class _Learner:
    """Optimizer steps over batches of examples, and the best prompts and weights so far.

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
        groups: list[dict[str, Any]] = []
        if self.parameters:
            groups.append({"params": list(self.parameters), "peak": config.learning_rate})
        # of a weighted score: where its weights start, and their learned relative change
        self.start = scorer.score.weights
        if self.start is not None:
            self.change = torch.nn.Parameter(torch.zeros_like(self.start))
            self.parameters.append(self.change)
            groups.append({"params": [self.change], "peak": _HEADS * config.learning_rate})
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.spread: float | None = None
        self.order: list[int] = []
        self.done = 0
        self.stale = 0
        self.losses: list[float] = []
        self.curve: list[dict[str, float]] = []
        self.before: _Validation
        self.best: _Validation
        self.best_prompts: dict[str, Tensor] = {}
        self.best_weights: Tensor | None = None

    @property
    def better(self) -> bool:
        """Whether the best prompts beat the zero-shot score by more than chance would give."""
        before, best = self.before, self.best
        learned = bool(self.best_prompts) or self.best_weights is not None
        return learned and (better(-best.accuracy, -before.accuracy, 1) or better(best.loss, before.loss, 1))

    def weigh(self, start: Tensor | None = None) -> None:
        """Gives the score its weights as they are now; ``start`` is where they are to start."""
        if start is not None:
            self.start = start.to(self.scorer.backbone.device)
        if self.start is not None:
            self.scorer.score.weights = self.start * (1 + self.change)

    def watch(self, now: _Validation) -> None:
        """Takes note of how the validation examples fare at this step."""
        point = {"step": self.done, "accuracy": float(now.accuracy.mean()), "loss": float(now.loss.mean())}
        if self.losses:
            point["train"] = float(np.mean(self.losses))
        self.curve.append(point)
        self.losses = []
        if self.done == 0:
            self.before = self.best = now
        elif now.rank > self.best.rank:
            self.best, self.best_prompts, self.stale = now, prompts.state(self.scorer.backbone.denoiser), 0
            if self.scorer.score.weights is not None:
                self.best_weights = self.scorer.score.weights.detach().cpu().clone()
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
            "weights": None if self.start is None else [self.start, self.change.detach(), self.best_weights],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        prompts.load_state(self.scorer.backbone.denoiser, state["prompts"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.spread, self.order, self.done, self.stale, self.curve = state["progress"]
        self.before, self.best = _Validation.of(state["before"]), _Validation.of(state["best"])
        self.best_prompts = state["best_prompts"]
        if state["weights"] is not None:
            start, change, self.best_weights = state["weights"]
            with torch.no_grad():
                self.change.copy_(change)
            self.weigh(start)

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
        self.weigh()
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
            group["lr"] = group["peak"] * warm * 0.5 * (1 + math.cos(math.pi * (self.done - 1) / config.steps))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.weigh()
        self.losses.append(float(loss.detach()))

    def _draw(self, i: int, rng: random.Random) -> _Drawn:
        """An example's own pairs, and each right pair again among captions of other examples."""
        rows, captions, choices = _with_negatives(
            self.examples[i], self.choices[i], self.captions, self.config.negatives, rng
        )
        return _Drawn(self.latents[i][rows], tuple(captions), tuple(choices))

    def _scores(self, batch: Sequence[_Drawn], rng: random.Random) -> list[Tensor]:
        """Scores of every row of each example, under one noise and one timestep an example: (rows,) each."""
        backbone, score = self.scorer.backbone, self.scorer.score
        generator = torch.Generator().manual_seed(rng.getrandbits(48))
        captions: list[str] = []
        times: list[int] = []
        steps: list[int] = []
        draws: list[Tensor] = []
        sizes = [len(drawn.captions) for drawn in batch]
        for drawn, size in zip(batch, sizes, strict=True):
            step = rng.randrange(len(score.config.timesteps))
            steps += [step] * size
            t = score.config.timesteps[step] + rng.randint(-self.config.jitter, self.config.jitter)
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
            at = torch.tensor([steps[r] for r in rows], device=backbone.device)
            found.append(score(made, None if empty is None else empty.rows(rows), at))
            order += rows
        back = torch.tensor(order, device=backbone.device).argsort()
        return list(torch.cat(found)[back].split(sizes))
