"""Few-shot learning: from labelled examples to an adapter.

:func:`fit` learns, by one of several methods, so that matching pairs outscore the others:

- ``prompt``: low-rank attention prompts (:mod:`dsd.prompts`), by gradient, with the same noise and timestep for all
  candidates of an example.
- ``tokens``: soft tokens that join every caption, by gradient.
- ``words``: what words mean that the model has never seen, as offsets to the states of their tokens, by gradient.
- ``heads``: weights of the score's attention heads at each timestep, by gradient, from their importance on.
- ``weights``: weights of all heads and of the denoising score (:mod:`dsd.weights`), on a frozen model, in a few passes
  over the examples.
- Sums of these, such as ``prompt+heads``: what is learned by gradient is learned at once, and ``weights`` then on the
  model as it was taught, and on the bare one; held-out examples say which are kept.

No examples to stop by need be given: all are held out by turns, which says at which step to stop, how probable a score
makes a match, and whether learning is clearly better than the score it starts from, and no worse than that in as many
passes as what was learned takes; the score is kept as it was if not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import words_of
from dsd.contracts import Example, OptionError, Pair
from dsd.evaluate import dataset_checksum
from dsd.jury import DOUBT, FEWEST, PARTS, Judged, Jury, verdict
from dsd.learn import WEIGHTS, FitConfig, Learner, Team, Trail, checkpointed, held_out_scores, importance, learn
from dsd.lesson import Negatives, check_validation, choices_of, folds, split
from dsd.metrics import bootstrap_interval
from dsd.prompts import PromptConfig
from dsd.records import Log, load_checkpoint, save_checkpoint
from dsd.scorer import Scorer
from dsd.scores import MIXTURE, SCORES, WEIGHTED, Features, ScoreConfig
from dsd.weights import Choice, better, fit_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FitConfig", "fit"]

_RATIOS = tuple(np.geomspace(1 / 8, 8, 13))
"""Weights that are tried of a zero-shot score beside what was learned, in units of their spread."""

SOFT_TOKENS = 8
"""How many soft tokens are learned where the configuration of the prompts does not say."""


def fit(
    scorer: Scorer,
    examples: Sequence[Example],
    validation: Sequence[Example] | None = None,
    *,
    config: FitConfig | None = None,
    prompt: PromptConfig | None = None,
    start: Adapter | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> Adapter:
    """Learns for the scorer, which has the learned score and prompts in the end.

    Args:
        scorer: Decides score, timesteps, size and batch size; its backbone must be bare. ``weights`` starts from the
            denoising score, whatever the scorer's is.
        examples: Labelled examples, in which right and wrong candidates compete.
        validation: Examples to stop by; None holds out some of ``examples``, by turns or once, as ``config`` says.
            ``weights`` by itself holds out ``examples`` by turns in any case, and keeps the zero-shot score if that
            does better on those given; after prompts or tokens, weights are learned from examples that were held out.
        config: How to learn.
        prompt: Where prompts go; their soft tokens count if the method has ``tokens``, and with ``words`` it says
            which. With ``start`` it is that which says where, and words alone can join.
        start: Prompts to learn on from, by a method with ``prompt``. What is learned then has to be better than these
            prompts as they are, and they are kept if it is not. The score is the scorer's; attention that is taught
            beside ``denoising`` is that which the prompts were learned for, at its timesteps.
        checkpoint: A file to keep the state of training in; delete it when the adapter is saved. ``weights`` starts
            anew.
        resume: Go on from ``checkpoint`` if it is there; the result is the same as without the stop. What one method
            learned by gradient, the same and ``weights`` goes on from.
        log: Where to write loss and learning rate step by step: a ``.jsonl`` file, or a folder for TensorBoard.
        accelerator: Brings several processes, which share each batch, and mixed precision (bf16). Every process must
            call this with the same arguments; every one gets the adapter.
        progress: Whether to show progress bars, on stderr.

    Raises:
        OptionError: If there is nothing to learn from, if no caption has a word that is to be learned, if validation
            examples show pictures that are learned from, if ``start`` has nothing to start from or was learned at
            another size of pictures, or if the checkpoint is of another request.
        AdapterError: If ``start`` was made for another base model.
        ModelError: If the loss stops being finite.
    """
    config = (config or FitConfig()).resolved(len(examples))
    zero, denoiser = scorer.score.config, scorer.backbone.denoiser
    idle = [e.id for e in (*examples, *(validation or ())) if not choices_of(e)]
    if idle:
        raise OptionError(
            f"got {len(idle)} examples in which nothing competes ({', '.join(idle)[:200]}), "
            "expected right and wrong candidates in each; add wrong ones, or let dsd negatives make them"
        )
    check_validation(examples, validation or ())
    if zero.kind == WEIGHTED:
        raise OptionError("got a score whose weights are learned, expected a zero-shot one to start from")
    prompts.check_bare(denoiser)
    turns, prompt = planned(examples, validation, config, prompt, start, scorer.size)
    if start is not None:
        start.attach(scorer.backbone)  # refuses now what does not fit
        prompts.detach(denoiser)
    try:
        if config.method == "weights":
            return _fit_weights(scorer, [_Part(list(examples))], validation or None, config, None, progress).adapter
        keeper = None if checkpoint is None else Path(checkpoint)
        team = Team(accelerator)
        with checkpointed(denoiser, config.gradient_checkpointing):
            adapter, parts = _Gradient(scorer, config, prompt, start, team, keeper, log).fit(
                turns, list(examples), resume, progress
            )
        if "weights" in config.pieces:
            prompts.detach(denoiser)
            scorer.use(zero)
            bare = None
            if start is None:
                bare = _fit_weights(scorer, [_Part(list(examples))], validation or None, config, None, progress)
                if adapter.prompts is None:
                    return bare.adapter
            adapter = _follow(scorer, adapter, parts, bare, config, progress)
        return adapter
    except BaseException:
        prompts.detach(denoiser)
        scorer.use(zero)
        raise


@dataclass(frozen=True)
class Turn:
    """Examples to learn from and others to look at."""

    examples: list[Example]
    held_out: list[Example]


def turns_of(examples: Sequence[Example], validation: Sequence[Example] | None, config: FitConfig) -> list[Turn]:
    """What is held out when: the examples given for it, a share of all, or all by turns.

    Raises:
        OptionError: If nothing is left to learn from or to look at.
    """
    if validation is None and config.validation is None and len(examples) > 1:
        fold = folds(examples, config.folds, config.seed)
        return [
            Turn(
                [e for e, f in zip(examples, fold, strict=True) if f != turn],
                [e for e, f in zip(examples, fold, strict=True) if f == turn],
            )
            for turn in range(max(fold) + 1)
        ]
    if validation is None:
        turn = Turn(*split(examples, config.validation or 0.5, config.seed))
    else:
        turn = Turn(list(examples), list(validation))
    if not turn.examples or not turn.held_out:
        raise OptionError(
            f"got {len(turn.examples)} examples to learn from and {len(turn.held_out)} to validate, expected at least "
            "one of each"
        )
    return [turn]


def planned(
    examples: Sequence[Example],
    validation: Sequence[Example] | None,
    config: FitConfig,
    prompt: PromptConfig | None,
    start: Adapter | None,
    size: int,
) -> tuple[list[Turn], PromptConfig]:
    """What is held out when, where anything is by gradient, and where prompts go; see :func:`fit`.

    Args:
        size: Pixels a side of what is learned from.

    Raises:
        OptionError: If the lesson could not be taught to its end.
    """
    named = () if prompt is None else prompt.words
    if start is not None:
        prompt = _placing(start, config, prompt, size)
    turns = [] if config.method == "weights" else turns_of(examples, validation, config)
    if "weights" in config.pieces:
        if start is None:  # the bare model is weighed, too
            folds(examples, config.folds, config.seed)
        if len(turns) == 1 and len(turns[0].held_out) > 1:
            folds(turns[0].held_out, config.folds, config.seed)
    learned_from = examples if len(turns) != 1 else turns[0].examples
    _check_words(named, () if prompt is None else prompt.words, learned_from, config)
    return turns, prompt or PromptConfig()


def _check_words(named: Sequence[str], words: Sequence[str], examples: Sequence[Example], config: FitConfig) -> None:
    """Refuses words that are not learned, or cannot be.

    Args:
        named: Those that were asked for.
        words: All that could be learned: those, and what an adapter that is learned on from has.

    Raises:
        OptionError: If the method does not go with them, or no caption of the examples has one that was asked for.
    """
    learns = "words" in config.pieces
    if learns != bool(words if learns else named):
        raise OptionError(
            f"got method {config.method!r} and {', '.join(named) or 'no words'} to learn, expected words with a method "
            "that has 'words' in it, and with no other"
        )
    said = {word for e in examples for text in e.texts for word in words_of(text)}
    unsaid = [word for word in named if word not in said]
    if learns and said.isdisjoint(words):
        unsaid = list(words)
    if unsaid:
        raise OptionError(
            f"got {', '.join(unsaid)} to learn, which no caption has, expected words as captions spell them; check the "
            "spelling, and leave out what the examples say nothing of"
        )


def _placing(start: Adapter, config: FitConfig, prompt: PromptConfig | None, size: int) -> PromptConfig:
    """Where the prompts of an adapter go that are to be learned on.

    Raises:
        OptionError: If that cannot be.
    """
    if start.prompts is None:
        raise OptionError(
            "got an adapter without prompts to start from (zero-shot was kept, or only weights were learned), expected "
            "one with prompts"
        )
    if "prompt" not in config.pieces:
        raise OptionError(
            f"got method {config.method!r} and an adapter to start from, expected a method with 'prompt', which learns "
            "on from its prompts"
        )
    if "tokens" in config.pieces and not start.prompts.tokens:
        raise OptionError(
            f"got method {config.method!r} and an adapter without soft tokens to start from, expected one with some, "
            "or a method without 'tokens'"
        )
    if start.size not in (None, size):
        raise OptionError(
            f"got an adapter to start from that was learned at {start.size} pixels and a model at {size}, expected the "
            f"same; load the model with size {start.size}"
        )
    words = () if prompt is None else prompt.words
    joining = PromptConfig(words=words) if words else None
    if prompt not in (None, start.prompts, joining):
        raise OptionError("got a configuration of prompts and an adapter to start from, expected one of them")
    return replace(start.prompts, words=tuple(dict.fromkeys((*start.prompts.words, *words))))


def resolve(prompt: PromptConfig, config: FitConfig) -> PromptConfig | None:
    """What a method attaches to the model; None if nothing."""
    if not config.pieces & {"prompt", "tokens", "words"}:
        return None
    return replace(
        prompt,
        projections=prompt.projections if "prompt" in config.pieces else (),
        tokens=(prompt.tokens or SOFT_TOKENS) if "tokens" in config.pieces else 0,
    )


@dataclass(frozen=True)
class _Part:
    """Examples, and what a model that did not learn from them had learned: prompts by name; nothing if it is bare."""

    examples: list[Example]
    prompts: Mapping[str, Tensor] | None = None


class _Gradient:
    """One fit by gradient: a run for each turn, and one on all examples if they were held out by turns."""

    def __init__(
        self,
        scorer: Scorer,
        config: FitConfig,
        prompt: PromptConfig,
        start: Adapter | None,
        team: Team,
        keeper: Path | None,
        log: str | os.PathLike[str] | None,
    ) -> None:
        self.scorer, self.config, self.team, self.keeper, self.log = scorer, config, team, keeper, log
        self.zero = scorer.score.config
        self.origin = start
        """What is learned on, if anything."""
        self.prompt = resolve(prompt, config) if start is None else prompt
        self.features: Features | None = None
        if config.pieces & {"heads", "weights"}:
            self.features = Features(scorer.backbone, self.zero.layers, self.zero.direction)
            self.features.weights_of(self._terms())  # refuses scores that heads have no share in
        self.base = fingerprint(scorer.backbone)
        self.start = self.zero
        """The score that is taught."""
        self.apart = config.mix is None and self.zero.kind == "denoising" and not config.pieces & {"heads", "weights"}
        """Whether attention is taught by itself, and the zero-shot score added as it is without prompts."""

    def _terms(self) -> dict[str, float]:
        """What is taught, each score by itself."""
        mix = self.config.mix
        if mix is None:
            mix = ("attention",) if self.zero.kind == "denoising" else ()
        return {**dict.fromkeys(mix, 1.0), **self.zero.terms}

    def _taught(self, examples: Sequence[Example]) -> ScoreConfig:
        """The score that is taught."""
        if not self.apart:
            return self._mixed(examples)
        if self.origin is not None and not self.scorer.noise_was_given:
            known = self.origin.score
            if known.kind in SCORES and not SCORES[known.kind].noise:
                return replace(known, seed=self.zero.seed, bare=None)
        # attention needs fewer passes; noise that was given has to do for both
        fewer = slice(None, None, 1 if self.scorer.noise_was_given else 2)
        return replace(self.zero, kind="attention", timesteps=self.zero.timesteps[fewer])

    def _weigh(self, jury: Jury, before: np.ndarray, now: np.ndarray) -> float:
        """The weight of the zero-shot score beside what was learned; 0 where that is not added."""
        if not self.apart:
            return 0.0
        unit = jury.spread(now) / jury.spread(before)
        tried = [float(r * unit) for r in _RATIOS]
        return min(tried, key=lambda w: jury.loss(now + w * before))

    def _mixed(self, examples: Sequence[Example]) -> ScoreConfig:
        """The score that is taught: further scores count as much as the scorer's own, in units of their spread."""
        terms = self._terms()
        if terms == self.zero.terms:
            return self.zero
        both = replace(self.zero, kind=MIXTURE, weights=terms)
        jury = Jury(examples)
        self.scorer.use(both)
        try:
            parts = self.scorer.predict_parts(jury.pairs)[1]
        finally:
            self.scorer.use(self.zero)
        own = jury.spread(np.sum([self.zero.terms[k] * parts[k] for k in self.zero.terms], 0))
        return replace(both, weights={k: self.zero.terms.get(k, own / jury.spread(parts[k])) for k in terms})

    def fit(
        self, turns: Sequence[Turn], examples: list[Example], resume: bool, progress: bool
    ) -> tuple[Adapter, list[_Part]]:
        """The adapter, and every held-out example with prompts that did not learn from it.

        Args:
            examples: What is learned from in the end if there are several turns.
        """
        data = [[dataset_checksum(t.examples), dataset_checksum(t.held_out)] for t in turns]
        where = None if self.prompt is None else self.prompt.to_dict()
        # weights that follow have no share in this, so that they can follow later, too
        method = "+".join(piece for piece in self.config.method.split("+") if piece != "weights")
        config = {**asdict(self.config), "method": method, "draws": None, "apart": self.apart}
        asked: list[Any] = [self.base, config, where, self.zero.to_dict(), self.scorer.size, data]
        if self.scorer.noise_was_given:
            asked.append(hashlib.blake2b(self.scorer.noise.cpu().numpy().tobytes(), digest_size=16).hexdigest())
        if self.origin is not None:
            asked.append({"start": self.origin.digest()})
        request = json.dumps(asked, sort_keys=True)
        # in one order, whether it was stopped or not: what is encoded together decides the last bit
        pictures = [image for e in (*turns[0].examples, *turns[0].held_out) for image in e.images]
        shown = progress and self.team.leads
        with tqdm(desc="encoding", unit="picture", total=len(pictures), disable=not shown, leave=False) as bar:
            self.scorer.hold(pictures, bar.update)
        self.start = self._taught([*turns[0].examples, *turns[0].held_out])
        trails: list[Trail] = []
        going: dict[str, Any] | None = None  # what the last of the trails goes on from
        if resume and self.keeper is not None and self.keeper.exists():
            state = load_checkpoint(self.keeper, request)
            trails, going = [Trail(**values) for values in state["trails"]], state["learner"]
        held_out = [e for turn in turns for e in turn.held_out]
        jury = Jury(held_out)
        steps, _ = self.config.schedule
        if len(held_out) < FEWEST:
            steps = 0  # whatever is learned, it could not be kept
        runs = len(turns) + (len(turns) > 1)
        bar = tqdm(desc="learning", unit="step", total=runs * steps, disable=not shown)
        with bar:
            for k, turn in enumerate(turns):
                if k < len(trails) - 1:
                    bar.update(steps)
                    continue
                self._run(turn, steps, trails, k, going, request, bar)
                going = None if k == len(trails) - 1 else going
            looks = min(len(trail.steps) for trail in trails[: len(turns)])
            scores = [torch.cat([t.scores[i] for t in trails[: len(turns)]]).numpy() for i in range(looks)]
            dear = [t.as_dear for t in trails[: len(turns)] if t.as_dear is not None]
            bare = [t.bare for t in trails[: len(turns)] if t.bare is not None]
            found = verdict(
                jury,
                scores,
                self._weigh,
                torch.cat(dear).numpy() if dear else None,
                torch.cat(bare).numpy() if bare else None,
            )
            best = found.best
            learned: dict[str, Tensor] = dict(trails[0].learned[best])
            if best and len(turns) > 1:  # all examples teach, for as long as was best for those held out
                learned = self._run(Turn(examples, []), trails[0].steps[best], trails, len(turns), going, request, bar)
            bar.update(bar.total - bar.n)
        placed = self.prompt
        if not best and self.origin is not None:  # as it was, without words that would have joined
            placed, learned = self.origin.prompts, dict(self.origin.state)
        parts = [
            _Part(turn.held_out, {n: v for n, v in trail.learned[best].items() if n in learned and n != WEIGHTS})
            for turn, trail in zip(turns, trails, strict=False)
        ]
        taught_on, judged_on = (examples, examples) if len(turns) > 1 else (turns[0].examples, held_out)
        figures = _figures(found.before.accuracy, found.after.accuracy, self.config.seed)
        if dear:
            figures["as_dear"] = float(found.as_dear.accuracy.mean())
        training = {
            "config": asdict(self.config),
            "examples": len(taught_on),
            "validation_examples": len(judged_on),
            "turns": len(turns),
            **({} if self.origin is None else {"started": self.origin.digest()}),
            "data": {"examples": dataset_checksum(taught_on), "validation": dataset_checksum(judged_on)},
            "kept": best > 0,
            "validation": figures,
            "calibration": found.calibration,
            "curve": [_point(trails[: len(turns)], i, judged) for i, judged in enumerate(found.curve)],
        }
        return self._adapter(placed, learned, found.weight, found.scale, training), parts

    def _run(
        self,
        turn: Turn,
        steps: int,
        trails: list[Trail],
        k: int,
        state: Mapping[str, Any] | None,
        request: str,
        bar: Any,
    ) -> dict[str, Tensor]:
        """Learns from a turn's examples, from a bare model on, and leaves it bare; returns what was learned.

        Args:
            trails: Of the runs so far, of which the last one is this run's if there is a state to go on from.
        """
        scorer, config, denoiser = self.scorer, self.config, self.scorer.backbone.denoiser
        held_out = Jury(turn.held_out)
        fresh = k == len(trails)
        if fresh:
            trails.append(Trail())
        if fresh and turn.held_out and (self.origin is None or self.apart):
            zero_shot = held_out_scores(scorer, held_out, self.team)
            if self.origin is not None:
                trails[k].bare = zero_shot
            else:
                trails[k].add(0, None, zero_shot, {})
                if self.apart and not scorer.noise_was_given:
                    scorer.use(replace(self.zero, timesteps=self.zero.timesteps + self.start.timesteps))
                    trails[k].as_dear = held_out_scores(scorer, held_out, self.team)
        if self.prompt is not None:
            prompts.attach(denoiser, self.prompt, config.seed)
        try:
            scorer.use(self.start)
            if self.origin is not None:
                prompts.load_state(denoiser, {**prompts.state(denoiser), **self.origin.state})  # words may have joined
                if fresh and turn.held_out:
                    trails[k].add(0, None, held_out_scores(scorer, held_out, self.team), prompts.state(denoiser))
            if "heads" in config.pieces and self.features is not None:  # the same score, with weights to be learned
                same = self.features.weights_of(self.start.terms).repeat(len(self.start.timesteps), 1)
                scorer.use(replace(self.start, kind=WEIGHTED, layers=self.features.layers, weights=None), same)
            done = 0 if state is None else int(state["progress"][-1])
            log = None if self.log is None or not self.team.leads else Log(self.log, k + 1, done)
            learner = Learner(scorer, turn.examples, config, self.team, log)
            if state is not None:
                learner.load_state_dict(state)
            elif scorer.score.weights is not None and self.features is not None:
                learner.weigh(importance(scorer, self.features, turn.examples, config))

            def keep() -> None:
                if self.keeper is not None and self.team.leads:
                    plain = [asdict(trail) for trail in trails]
                    save_checkpoint(self.keeper, request, {"trails": plain, "learner": learner.state_dict()})

            def tick(accuracy: float | None) -> None:
                bar.update()
                if accuracy is not None:
                    bar.set_postfix(accuracy=f"{accuracy:.3f}")

            bar.update(learner.done)
            learn(learner, held_out, steps, trails[k], weigh=self._weigh, keep=keep, tick=tick)
            bar.update(steps - learner.done)
            return learner.learned()
        finally:
            prompts.detach(denoiser)
            scorer.use(self.zero)

    def _adapter(
        self,
        placed: PromptConfig | None,
        learned: dict[str, Tensor],
        bare_weight: float,
        scale: float,
        training: dict[str, Any],
    ) -> Adapter:
        """Gives the scorer what was learned; nothing if it is empty."""
        weights = learned.pop(WEIGHTS, None)
        placed = placed if learned else None
        if placed is not None:
            prompts.attach(self.scorer.backbone.denoiser, placed)
            prompts.load_state(self.scorer.backbone.denoiser, learned)
        score, names = self.start if learned else self.zero, None
        if learned and self.apart:
            score = replace(self.start, bare=self.zero, bare_weight=bare_weight)
        if weights is not None and self.features is not None:
            score = replace(self.start, kind=WEIGHTED, layers=self.features.layers, weights=None)
            names = self.features.names
        self.scorer.use(score, weights)
        return Adapter(self.base, score, placed, learned, self.scorer.size, training, scale, weights, names)


def _point(trails: Sequence[Trail], i: int, judged: Judged) -> dict[str, float]:
    """One look at all held-out examples, for the curve."""
    accuracy, loss = judged.rank
    point = {"step": trails[0].steps[i], "accuracy": accuracy, "loss": -loss}
    losses = [value for t in trails if (value := t.losses[i]) is not None]
    return {**point, "train": float(np.mean(losses))} if losses else point


def _figures(before: np.ndarray, after: np.ndarray, seed: int) -> dict[str, float]:
    """Accuracies before and after learning, with an interval of the latter."""
    value, low, high = bootstrap_interval(after, seed)
    return {"before": float(before.mean()), "after": value, "low": low, "high": high}


@dataclass(frozen=True)
class _Weighed:
    """What weights of features came to.

    Attributes:
        adapter: With them, or without if they were not kept.
        examples: That it was judged by.
        scores: (pairs,) of these, as far as they were learned from, out of fold.
    """

    adapter: Adapter
    examples: list[Example]
    scores: np.ndarray

    def judged_by(self, examples: Sequence[Example]) -> Judged:
        """How it fares on some of its examples."""
        ends = np.cumsum([len(e.pairs) for e in self.examples])[:-1]
        of = {id(e): s for e, s in zip(self.examples, np.split(self.scores, ends), strict=True)}
        return Jury(examples).judge(np.concatenate([of[id(e)] for e in examples]))


def _follow(
    scorer: Scorer, adapter: Adapter, parts: Sequence[_Part], bare: _Weighed | None, config: FitConfig, progress: bool
) -> Adapter:
    """Fits weights of the model as it was taught, and gives the scorer these or those of the bare model.

    Prompts were kept for being better than what they started from. That may be attention alone, and the denoising score
    of the bare model, which the weights of its features start from, better than either.

    Args:
        adapter: What was taught.
        parts: As :meth:`_Gradient.fit` gives them.
        bare: Weights of the bare model; None where prompts were learned on, which stay.
    """
    denoiser = scorer.backbone.denoiser
    assert adapter.prompts is not None
    prompts.attach(denoiser, adapter.prompts)
    scorer.use(adapter.score)
    # prompts fit their own examples too well for weights to be learned from these: each example is seen with prompts
    # that did not learn from it
    taught = _fit_weights(scorer, parts, None, config, adapter, progress)
    if bare is None or taught.judged_by(taught.examples).rank >= bare.judged_by(taught.examples).rank:
        return taught.adapter
    prompts.detach(denoiser)
    scorer.use(bare.adapter.score, bare.adapter.weights)
    return bare.adapter


def _fit_weights(
    scorer: Scorer,
    parts: Sequence[_Part],
    validation: Sequence[Example] | None,
    config: FitConfig,
    taught: Adapter | None,
    progress: bool,
) -> _Weighed:
    """Fits weights of the features of the model: bare, or with prompts that were taught.

    They start from the denoising score, and from the score that the prompts were learned for.

    Args:
        parts: Examples, with the prompts under which their features are to be taken.
        taught: The prompts on the model, which has them again in the end.
    """
    zero, denoiser = scorer.score.config, scorer.backbone.denoiser
    start = replace(zero, kind="denoising", layers=None, weights=None) if taught is None else zero
    features = Features(scorer.backbone, zero.layers, zero.direction)
    examples = [e for part in parts for e in part.examples]
    groups = folds(examples, config.folds, config.seed)
    negatives = Negatives(examples, config.negatives, config.image_negatives, config.swaps)
    rng = random.Random(config.seed)
    learn_from: list[list[Choice]] = []
    judge_by: list[list[Choice]] = []
    own: list[int] = []  # rows of the examples' own pairs
    drawn: list[np.ndarray] = []
    at = 0
    number = 0
    for part in parts:
        pairs: list[Pair] = []
        for example in part.examples:
            rows = negatives.join(number, rng)
            pairs += [(examples[i].images[k], text) for (i, k), text in zip(rows.images, rows.texts, strict=True)]
            learn_from.append([Choice(tuple(at + r for r in c.rows), c.right) for c in rows.choices])
            judge_by.append(learn_from[-1][: len(choices_of(example))])
            own += range(at, at + len(example.pairs))
            at += len(rows.texts)
            number += 1
        if part.prompts is not None:
            prompts.load_state(denoiser, part.prompts)
        drawn.append(scorer.features(pairs, features, config.draws, progress=progress))
    if taught is not None:
        prompts.load_state(denoiser, taught.state)
    flat = np.concatenate(drawn, 1).reshape(config.draws, at, -1).astype(np.float64)
    steps = len(zero.timesteps)
    priors = [{"denoising": 1.0}, *([start.terms] if start.kind != "denoising" else [])]
    prior = np.stack([np.tile(features.weights_of(terms).double().numpy(), steps) / steps for terms in priors])
    fitted = fit_weights(flat.mean(0), flat[0], learn_from, judge_by, prior, groups)
    weights = torch.from_numpy(fitted.weights.reshape(steps, -1) * steps).float()

    jury = Jury(examples)
    plain, found = (flat[0] @ prior[-1])[own], fitted.scores[own]
    kept = math.isfinite(fitted.strength)
    if taught is not None:
        kept = better(fitted.after, jury.judge(plain).loss, DOUBT)
    learned = replace(zero, kind=WEIGHTED, layers=features.layers, weights=None)
    before, after = jury.accuracy(plain), jury.accuracy(found)
    judged_by, judged = examples, (plain, found)
    if validation is not None:
        others = Jury(validation)
        scorer.use(start)
        untaught = scorer.predict(others.pairs)
        scorer.use(learned, weights)
        judged_by, judged = list(validation), (untaught, scorer.predict(others.pairs))
        first, second = (others.judge(scores) for scores in judged)
        kept = kept and bool(second.loss.mean() < first.loss.mean())
        before, after = first.accuracy, second.accuracy
    scores = found if kept else plain
    scale = jury.judge(scores).scale
    honest = scores.copy()
    for mine, others, theirs in jury.parts(PARTS):  # the scale is chosen by others, too
        honest[mine] *= others.judge(scores[theirs]).scale
    data = dataset_checksum(examples)
    training: dict[str, Any] = {
        "config": asdict(config),
        "examples": len(examples),
        "validation_examples": len(examples if validation is None else validation),
        "turns": len(set(groups)),
        "data": {"examples": data, "validation": data if validation is None else dataset_checksum(validation)},
        "kept": kept,
        "validation": _figures(before, after if kept else before, config.seed),
        "curve": [],
    }
    if taught is not None and not kept:
        training = dict(taught.training)
    elif taught is not None:  # before is zero-shot, not before weights
        training = {**taught.training, "kept": True, "validation": training["validation"]}
        training["validation"]["before"] = taught.training["validation"]["before"]
    # no number in JSON is infinite
    tried = [{"strength": s if math.isfinite(s) else None, "loss": loss} for s, loss in fitted.losses.items()]
    training["weights"] = {
        "kept": kept,
        "strength": fitted.strength if math.isfinite(fitted.strength) else None,
        "tried": tried,
        "folds": len(set(groups)),
    }
    if kept or taught is None:
        training["calibration"] = jury.calibration(honest, 1.0)
    scorer.use(learned if kept else start, weights if kept else None)
    adapter = Adapter(
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
    return _Weighed(adapter, judged_by, judged[kept])
