"""Learning by gradient: steps over batches of examples, resumable, the same however many processes share a batch.

A :class:`Learner` changes what is attached to a scorer's model (prompts, soft tokens) and the weights of its score;
:func:`learn` lets it run and looks at held-out examples now and then, which a :class:`dsd.jury.Jury` judges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dsd import prompts
from dsd.backbone import Latents, TextStates
from dsd.contracts import DsdError, Example, ModelError, OptionError
from dsd.jury import Jury
from dsd.lesson import Drawn, Negatives, Turn, choices_of, turns_of
from dsd.records import Log
from dsd.scorer import Scorer, out_of_memory
from dsd.scores import SCORES, Features, Pass, noised_pass
from dsd.weights import Choice

if TYPE_CHECKING:
    from accelerate import Accelerator

V = TypeVar("V")
Objective = Literal["hinge", "softmax"]
PIECES = ("prompt", "tokens", "words", "heads", "weights")
"""What a method is made of, in the order in which it is written; not of the last two together."""

HEEDED_BY_WEIGHTS = ("method", "negatives", "image_negatives", "swaps", "draws", "folds", "seed")
"""The fields of :class:`FitConfig` that ``weights`` alone depends on."""


@dataclass(frozen=True)
class FitConfig:
    """How to learn.

    Attributes:
        method: What is learned; see :mod:`dsd.adapt`. ``weights`` alone heeds the negatives, ``draws``, ``folds`` and
            ``seed``, and nothing else.
        mix: Scores that are taught along with the scorer's own in the same passes, each in units of its spread. None:
            nothing, but instead of ``denoising``, which is the best zero-shot but learns little, ``attention`` is
            taught, and the denoising score of the model without prompts is added, in passes of its own, with the
            weight that held-out examples give it. (With ``heads`` or ``weights``: ``attention`` along with it.)
        objective: ``hinge`` on the hardest negative (He et al. 2023) or ``softmax`` over candidates.
        margin: Of the hinge, in units of the score's spread on the first batch.
        temperature: Of the softmax, in the same units.
        steps: Optimizer steps at most. None: as many as go through the examples 25 times, but 100 to 400.
        batch: Examples a step.
        learning_rate: Peak; falls to zero along a cosine.
        weight_decay: Of AdamW. Without it prompts overfit a hundred examples.
        folds: In which examples are held out by turns when no validation examples are given.
        validation: Share of the examples to hold out once instead, which costs one run rather than one a fold and one
            more on all; None holds out by turns.
        check_every: Steps between looks at the held-out examples. None: an eighth of all steps.
        patience: Looks without improvement before it stops.
        negatives: Captions of other examples that join each right pair as wrong candidates, drawn anew each step. None:
            one, but none for an example that asks in both directions already, with wrong captions for a picture and
            wrong pictures for a caption: these are harder than those of others, which then cost more than they teach.
        image_negatives: Pictures of other examples that do; None: as for ``negatives``.
        swaps: Captions with two words exchanged that do. Such a caption can be true all the same (see
            :mod:`dsd.negatives`), so there are none by default.
        candidates: Images, and texts, of an example that take part in a step at most: the right ones, and others drawn
            anew each step. More teach little and cost as much each. None takes all.
        draws: Of noise, over which ``weights`` averages.
        jitter: Timesteps are drawn within this distance of the score's own.
        gradient_accumulation_steps: Parts in which a batch goes through the model; the result is the same. None: as
            few as the scorer's batch size allows, which is halved when memory runs out.
        gradient_checkpointing: Whether activations are computed again rather than kept, which saves memory.
        seed: Decides initial prompts, order, noise and what is held out.
    """

    method: str = "prompt"
    mix: tuple[str, ...] | None = None
    objective: Objective = "softmax"
    margin: float = 0.1
    temperature: float = 1.0
    steps: int | None = None
    batch: int = 16
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    folds: int = 3
    validation: float | None = None
    check_every: int | None = None
    patience: int = 4
    negatives: int | None = None
    image_negatives: int | None = None
    swaps: int = 0
    candidates: int | None = 4
    draws: int = 4
    jitter: int = 50
    gradient_accumulation_steps: int | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        pieces = self.method.split("+")
        if pieces != [p for p in PIECES if p in pieces] or {"heads", "weights"} <= set(pieces):
            raise OptionError(
                f"got method {self.method!r}, expected {', '.join(PIECES[:-1])} or {PIECES[-1]}, or several in this "
                "order with + between, but not both of the last two"
            )
        if self.mix is not None and not set(self.mix) <= set(SCORES):
            raise OptionError(f"got scores {self.mix} to mix, expected some of {', '.join(SCORES)}")
        if self.objective not in get_args(Objective):
            raise OptionError(f"got objective {self.objective!r}, expected one of {get_args(Objective)}")
        above = ("margin", "temperature", "batch", "learning_rate", "patience", "draws")
        maybe = ("steps", "check_every", "gradient_accumulation_steps")
        for name in (*above, *(name for name in maybe if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                raise OptionError(f"got {name} {getattr(self, name)}, expected more than 0")
        if self.candidates is not None and self.candidates < 2:
            raise OptionError(f"got {self.candidates} candidates, expected 2 or more")
        if self.folds < 2:
            raise OptionError(f"got {self.folds} folds, expected 2 or more")
        for name in ("negatives", "image_negatives", "swaps", "jitter", "weight_decay"):
            if not (getattr(self, name) is None or getattr(self, name) >= 0):
                raise OptionError(f"got {name} {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"got seed {self.seed}, expected 0 or more, and less than 2 to the power of 63")
        if self.validation is not None and not 0 < self.validation < 1:
            raise OptionError(f"got validation share {self.validation}, expected more than 0 and less than 1")

    def resolved(self, examples: int) -> FitConfig:
        """The same with numbers of steps that suit so many examples, where it has none."""
        steps = self.steps or min(400, max(100, 25 * examples // self.batch))
        return replace(self, steps=steps, check_every=self.check_every or max(1, steps // 8))

    def turns(self, examples: Sequence[Example], validation: Sequence[Example] | None) -> list[Turn]:
        """What is held out when; see :func:`dsd.lesson.turns_of`."""
        return turns_of(examples, validation, count=self.folds, share=self.validation, seed=self.seed)

    @property
    def schedule(self) -> tuple[int, int]:
        """Steps, and steps between looks, once they are resolved."""
        assert self.steps is not None
        assert self.check_every is not None
        return self.steps, self.check_every

    @property
    def pieces(self) -> frozenset[str]:
        """What the method is made of."""
        return frozenset(self.method.split("+"))


# Learning


def choice_loss(
    scores: Tensor, choices: Sequence[Choice], objective: Objective, margin: float, temperature: float = 1.0
) -> Tensor:
    """Mean loss over the choices of one example, given its (rows,) scores in units of their spread."""
    losses = []
    for choice in choices:
        candidates = scores[list(choice.rows)]
        right = torch.tensor(choice.right, device=scores.device)
        if objective == "softmax":
            logits = candidates / temperature
            losses.append(logits.logsumexp(0) - logits[right].logsumexp(0))
        else:
            losses.append(F.relu(margin + candidates[~right].max() - candidates[right].min()))
    return torch.stack(losses).mean()


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
        loss = choice_loss(part / spread, choices_of(example), config.objective, config.margin, config.temperature)
        (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
        total += gradient.abs()
    total = torch.where(weights != 0, total, 0.0)
    if not total.sum() > 0:  # every choice is won beyond the margin
        return weights.detach()
    return total / total.sum() * weights.detach().sum()


class Team:
    """The processes that share each batch; one, unless an ``Accelerator`` brings more."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator
        self.size = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index
        if accelerator is not None and accelerator.mixed_precision not in ("no", "bf16"):
            raise OptionError(
                f"got mixed precision {accelerator.mixed_precision}, expected no or bf16, whose range needs no scaling "
                "of the loss"
            )

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> list[Any]:
        """What this process takes of the items."""
        return list(items[self.rank :: self.size])

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size == 1 or self.accelerator is None:
            return value
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    def whole(self, shares: Sequence[Any]) -> list[Any]:
        """Of what each process made of its :meth:`share`, all, in the order of the items."""
        if self.size == 1:
            return list(shares)
        from accelerate.utils import gather_object

        found = gather_object([(i * self.size + self.rank, value) for i, value in enumerate(shares)])
        return [value for _, value in sorted(found, key=lambda item: item[0])]

    def everywhere(self, value: Any) -> list[Any]:
        """The value of every process."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def autocast(self) -> Any:
        """Mixed precision, where it was asked for."""
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()


@contextmanager
def checkpointed(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """A denoiser that computes activations again in the backward pass, inside this context."""
    if not wanted:
        yield
        return
    try:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    except (AttributeError, ValueError):
        raise ModelError(
            f"got a {type(denoiser).__name__} that cannot compute activations again, expected gradient checkpointing "
            "in it; leave that option out"
        ) from None
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]


_FASTER = 10.0
"""Learning rate of states in the text, and of weights, which change by parts of themselves, against that of prompts."""

WEIGHTS = "weights"
"""The name of a weighted score's weights among what was learned."""


@dataclass(frozen=True)
class _Chance:
    """What one example brings to a step: rows of pairs, and under what noise, which is the same for all of them."""

    pairs: Drawn
    step: int
    """Which of the score's timesteps."""
    timestep: int
    noise: Float[Tensor, "c h w"]


_Part = list[tuple[str, _Chance]]
"""Examples by id."""


class Learner:
    """Optimizer steps over batches of examples, for a scorer whose model carries prompts, tokens, or whose score has
    weights.

    All randomness is a function of the seed and the step, so that no random state needs to be kept, and an example's
    is its own, so that it does not matter which process or part of a batch it falls to.
    """

    def __init__(
        self, scorer: Scorer, examples: Sequence[Example], config: FitConfig, team: Team, log: Log | None = None
    ) -> None:
        self.scorer, self.config, self.team = scorer, config, team
        self.examples = list(examples)
        self._log = log
        self._negatives = Negatives(
            self.examples, config.negatives, config.image_negatives, config.swaps, config.candidates
        )
        # few-shot sets are small: all latents are held
        self._latents = [scorer.latents(e.images) for e in self.examples]
        named: dict[str, torch.nn.Parameter] = {}
        for name, parameter in prompts.parameters(scorer.backbone.denoiser).items():
            # prompts that were started from may have more than is learned
            if parameter.requires_grad_(prompts.piece_of(name) in config.pieces).requires_grad:
                named[name] = parameter
        self.parameters = list(named.values())
        rate = config.learning_rate
        groups: list[dict[str, Any]] = [
            {"params": [p], "peak": (1.0 if prompts.piece_of(name) == "prompt" else _FASTER) * rate}
            for name, p in named.items()
        ]
        # of a weighted score: where its weights start, and their learned relative change
        self._start = scorer.score.weights
        if self._start is not None:
            self._change = torch.nn.Parameter(torch.zeros_like(self._start))
            self.parameters.append(self._change)
            groups.append({"params": [self._change], "peak": _FASTER * rate})
        self._optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay)
        self._spread: float | None = None
        self._order: list[int] = []
        self.done = 0
        """Steps taken."""

    def weigh(self, start: Tensor | None = None) -> None:
        """Gives the score its weights as they are now; ``start`` is where they are to start."""
        if start is not None:
            self._start = start.to(self.scorer.backbone.device)
        if self._start is not None:
            self.scorer.score.weights = self._start * (1 + self._change)

    def learned(self) -> dict[str, Tensor]:
        """A copy of what has been learned by now: prompts by name, and weights."""
        found = prompts.state(self.scorer.backbone.denoiser)
        if self.scorer.score.weights is not None:
            found[WEIGHTS] = self.scorer.score.weights.detach().cpu().clone()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in plain values and tensors."""
        return {
            "prompts": prompts.state(self.scorer.backbone.denoiser),
            "weights": None if self._start is None else [self._start, self._change.detach()],
            "optimizer": self._optimizer.state_dict(),
            "progress": [self._spread, self._order, self.done],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        prompts.load_state(self.scorer.backbone.denoiser, state["prompts"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._spread, self._order, self.done = state["progress"]
        if state["weights"] is not None:
            start, change = state["weights"]
            with torch.no_grad():
                self._change.copy_(change)
            self.weigh(start)

    def step(self) -> float:
        """One step on the next batch; returns its loss.

        Raises:
            ModelError: If the loss is not finite.
        """
        config, team = self.config, self.team
        self.done += 1
        rng = random.Random(f"{config.seed}/{self.done}")
        while len(self._order) < config.batch:
            fresh = list(range(len(self.examples)))
            rng.shuffle(fresh)
            self._order += fresh
        batch, self._order = self._order[: config.batch], self._order[config.batch :]
        seeds = [rng.getrandbits(48) for _ in batch]
        mine = team.share([(self.examples[i].id, self._draw(i, s)) for i, s in zip(batch, seeds, strict=True)])
        self._fit_memory(mine, self._measure_spread)
        loss, broken = self._fit_memory(mine, lambda parts: self._gradients(parts, len(batch)))
        value = float(team.total(loss))
        if not math.isfinite(value):
            where = next((name for name in team.everywhere(broken) if name is not None), "unknown")
            raise ModelError(
                f"got a loss of {value} at step {self.done}, example {where}; lower the learning rate, or load the "
                "model in float32"
            )
        self._add_up_gradients()
        # cosine to zero after a short rise
        fall = min(1.0, self.done / 10) * 0.5 * (1 + math.cos(math.pi * (self.done - 1) / config.schedule[0]))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * fall
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not norm.isfinite():
            raise ModelError(
                f"got a gradient of {float(norm)} at step {self.done}, though the loss is {value:.3g}; lower the "
                "learning rate, or load the model in float32"
            )
        self._optimizer.step()
        with torch.no_grad():
            self.weigh()
        if self._log is not None:
            rate = fall * config.learning_rate
            self._log.write(self.done, loss=value, learning_rate=rate, gradient_norm=float(norm))
        return value

    def _gradients(self, parts: Sequence[_Part], count: int) -> tuple[Tensor, str | None]:
        """Adds up gradients of the loss, a mean over ``count`` examples; that loss, and which example broke it."""
        config = self.config
        assert self._spread is not None
        self._optimizer.zero_grad()
        self.weigh()
        total = torch.zeros((), device=self.scorer.backbone.device)
        broken: str | None = None
        for part in parts:
            scores = self._scores([drawn for _, drawn in part])
            losses = [
                choice_loss(s / self._spread, d.pairs.choices, config.objective, config.margin, config.temperature)
                for s, (_, d) in zip(scores, part, strict=True)
            ]
            loss = torch.stack(losses).sum() / count
            if loss.requires_grad:  # unless words alone are learned, and none of them is here
                loss.backward()
            self.weigh()  # what the weights were made of is used up by a backward pass
            total += loss.detach()
            broken = next((n for (n, _), s in zip(part, scores, strict=True) if not s.isfinite().all()), broken)
        return total, broken

    def _add_up_gradients(self) -> None:
        """Gives every process the sum of all gradients; what the loss of none depends on stays without one."""
        if self.team.size == 1:
            return
        device = self.scorer.backbone.device
        there = self.team.total(torch.tensor([float(p.grad is not None) for p in self.parameters], device=device))
        each = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters]
        summed = self.team.total(torch.cat(each)).split([len(g) for g in each])
        for parameter, gradient, any_ in zip(self.parameters, summed, there.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter).clone() if any_ else None

    @torch.no_grad()
    def _measure_spread(self, parts: Sequence[_Part]) -> None:
        """Finds the unit in which margin and softmax work: how far candidates' scores lie apart, at the first step."""
        if self._spread is not None:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=self.scorer.backbone.device)
        for part in parts:
            for scores in self._scores([drawn for _, drawn in part]):
                sums += torch.stack([(scores - scores.mean()).double().square().sum(), sums.new_tensor(len(scores))])
        squares, count = self.team.total(sums)
        self._spread = max(1e-6, float((squares / (count - 1)).sqrt()))

    def _fit_memory(self, batch: _Part, run: Callable[[list[_Part]], V]) -> V:
        """Runs over a batch in parts, which get smaller for as long as memory runs out."""
        while True:
            parts = self._parts(batch)
            try:
                return run(parts)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if isinstance(error, DsdError) or not out_of_memory(error):
                    raise
                if self.config.gradient_accumulation_steps is not None or max(map(len, parts)) == 1:
                    raise ModelError(
                        f"{self.scorer.backbone.device} has too little memory to learn from {max(map(len, parts))} "
                        f"examples at once at {self.scorer.size} pixels; try gradient checkpointing, fewer negatives, "
                        "more gradient accumulation steps, a smaller size or dtype bfloat16"
                    ) from error
            self.scorer.batch_size = max(1, self.scorer.batch_size // 2)
            with suppress(Exception):  # nothing to free on some devices
                torch.cuda.empty_cache()

    def _parts(self, batch: _Part) -> list[_Part]:
        """A batch in parts of like many examples, or of as many as the scorer's batch size takes rows."""
        count = self.config.gradient_accumulation_steps
        if count is not None:
            size = math.ceil(self.config.batch / self.team.size / count)
            return [batch[i : i + size] for i in range(0, len(batch), size)]
        parts: list[_Part] = []
        rows = 0
        for item in batch:
            new = len(item[1].pairs.texts)
            if not parts or rows + new > self.scorer.batch_size:
                parts.append([])
                rows = 0
            parts[-1].append(item)
            rows += new
        return parts

    def _draw(self, i: int, seed: int) -> _Chance:
        """An example's own pairs, its right pairs again among wrong ones, and one noise and timestep for all."""
        rng = random.Random(seed)
        pairs = self._negatives.join(i, rng)
        times = self.scorer.score.config.timesteps
        step = rng.randrange(len(times))
        last = self.scorer.backbone.num_train_timesteps - 1
        timestep = min(max(times[step] + rng.randint(-self.config.jitter, self.config.jitter), 0), last)
        noise = torch.randn(self.scorer.noise.shape[1:], generator=torch.Generator().manual_seed(rng.getrandbits(48)))
        return _Chance(pairs, step, timestep, noise)

    def _scores(self, batch: Sequence[_Chance]) -> list[Tensor]:
        """Scores of every row of each example: (rows,) each."""
        backbone, score = self.scorer.backbone, self.scorer.score
        sizes = [len(drawn.pairs.texts) for drawn in batch]
        each = torch.tensor(sizes, device=backbone.device)
        latents = torch.stack([self._latents[i][k] for drawn in batch for i, k in drawn.pairs.images])
        states = self.scorer.texts([text for drawn in batch for text in drawn.pairs.texts])
        noise = torch.stack([drawn.noise for drawn in batch]).to(backbone.device).repeat_interleave(each, 0)
        timesteps, steps = (
            torch.tensor(values, device=backbone.device).repeat_interleave(each)
            for values in ([drawn.timestep for drawn in batch], [drawn.step for drawn in batch])
        )
        found: list[Tensor] = []
        order: list[int] = []
        with self.team.autocast():
            empty: Pass | None = None
            if score.needs_empty:  # once for each image of an example
                (blank,) = backbone.encode_texts([""])
                shown = [(n, at) for n, drawn in enumerate(batch) for at in drawn.pairs.images]
                first = {key: row for row, key in reversed(list(enumerate(shown)))}
                place = {key: k for k, key in enumerate(first)}
                rows = list(first.values())
                text = blank.select([0] * len(rows))
                empty = self._pass(latents[rows], noise[rows], timesteps[rows], text, score.empty_layers)
                empty = empty.rows([place[key] for key in shown])
            # a pass takes captions of one length only, so that nothing is padded for another's sake
            lengths: dict[int, list[int]] = {}
            for row, state in enumerate(states):
                lengths.setdefault(state.states.shape[1], []).append(row)
            for rows in lengths.values():
                text = TextStates.join([states[r] for r in rows])
                made = self._pass(latents[rows], noise[rows], timesteps[rows], text, score.layers)
                found.append(score(made, None if empty is None else empty.rows(rows), steps[rows]))
                order += rows
        back = torch.tensor(order, device=backbone.device).argsort()
        return list(torch.cat(found)[back].split(sizes))

    def _pass(
        self, latents: Latents, noise: Latents, timesteps: Tensor, text: TextStates, layers: tuple[str, ...]
    ) -> Pass:
        """A pass as far as the score looks at it."""
        score, backbone = self.scorer.score, self.scorer.backbone
        return noised_pass(
            backbone,
            latents,
            noise,
            timesteps,
            text,
            layers,
            score.direction,
            over=score.over,
            predict=score.sees_noise,
        )


# Runs


@dataclass
class Trail:
    """What a run saw when it looked, in plain values and tensors.

    Attributes:
        steps: Taken by each look.
        losses: Mean training loss since the look before; None at the first.
        scores: (pairs,) of all pairs of the held-out examples.
        learned: What had been learned (:meth:`Learner.learned`).
        as_dear: (pairs,) zero-shot scores in as many passes as what is learned takes; None where that takes no more,
            and where noise was given, which has no more to give.
        bare: (pairs,) zero-shot scores, which are added to what an adapter started from; None where nothing is, or
            where the first look is zero-shot.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    learned: list[dict[str, Tensor]] = field(default_factory=list)
    as_dear: Tensor | None = None
    bare: Tensor | None = None

    def add(self, step: int, loss: float | None, scores: Tensor, learned: dict[str, Tensor]) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.scores.append(scores)
        self.learned.append(learned)


def held_out_scores(scorer: Scorer, jury: Jury, team: Team) -> Tensor:
    """Scores of all pairs that the jury judges: (pairs,) float32."""
    # by example: a pass is shared by the candidates of one
    shares = [scorer.predict(e.pairs).tolist() for e in team.share(jury.examples)] if team.size > 1 else None
    if shares is None:
        return torch.from_numpy(scorer.predict(jury.pairs))
    return torch.tensor([value for table in team.whole(shares) for value in table])


def learn(
    learner: Learner,
    jury: Jury,
    steps: int,
    trail: Trail,
    *,
    weigh: Callable[[Jury, np.ndarray, np.ndarray], float],
    keep: Callable[[], None],
    tick: Callable[[float | None], None],
) -> None:
    """Takes steps up to ``steps``, or until held-out examples fare no better for long.

    Args:
        learner: Where it starts, or goes on.
        jury: Of the examples to look at; without any, there are no looks, and it takes all steps.
        steps: At most.
        trail: Of the looks so far, the first before learning; is added to.
        weigh: As for :func:`dsd.jury.verdict`, which adds the same.
        keep: Called where the state of learning is worth keeping.
        tick: Called after every step, with the latest held-out accuracy.
    """
    config = learner.config
    _, every = config.schedule

    def rank(scores: Tensor) -> tuple[float, float]:
        beside = trail.scores[0] if trail.bare is None else trail.bare
        added, now = beside.numpy(), scores.numpy()
        weight = 0.0 if scores is beside else weigh(jury, added, now)
        return jury.judge(now + weight * added).rank

    ranks = [rank(scores) for scores in trail.scores]
    losses: list[float] = []
    while learner.done < steps and (not ranks or len(ranks) - 1 - ranks.index(max(ranks)) < config.patience):
        losses.append(learner.step())
        if learner.done % every == 0 or learner.done == steps:
            if jury.examples:
                scores = held_out_scores(learner.scorer, jury, learner.team)
                trail.add(learner.done, float(np.mean(losses)), scores, learner.learned())
                ranks.append(rank(scores))
                losses.clear()
            keep()
        tick(ranks[-1][0] if ranks else None)
