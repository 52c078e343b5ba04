"""One fit by gradient: a run for each turn, one on all examples where they were held out by turns, and a verdict."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.contracts import Example
from dsd.evaluate import dataset_checksum
from dsd.jury import FEWEST, Judged, Jury, figures, verdict
from dsd.learn import WEIGHTS, FitConfig, Learner, Team, Trail, held_out_scores, importance, learn
from dsd.lesson import Turn
from dsd.prompts import PromptConfig
from dsd.records import Log, load_checkpoint, save_checkpoint
from dsd.scorer import Scorer
from dsd.scores import MIXTURE, SCORES, WEIGHTED, Features, ScoreConfig
from dsd.weighing import Part

_RATIOS = tuple(np.geomspace(1 / 8, 8, 13))
"""Weights that are tried of a zero-shot score beside what was learned, in units of their spread."""


class Gradient:
    """A fit of prompts, tokens, words and weights of heads, all at once.

    Args:
        scorer: Decides the score that is started from; its model is bare.
        prompt: What is attached to the model; None if nothing is.
        start: What is learned on, if anything.
        keeper: A file for the state of training.
        log: Where steps are written.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: FitConfig,
        prompt: PromptConfig | None,
        start: Adapter | None,
        team: Team,
        keeper: Path | None,
        log: str | os.PathLike[str] | None,
    ) -> None:
        self.scorer, self.config, self.team, self.keeper, self.log = scorer, config, team, keeper, log
        self.zero = scorer.score.config
        self.origin = start
        """What is learned on, if anything."""
        self.prompt = prompt
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
    ) -> tuple[Adapter, list[Part]]:
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
            Part(turn.held_out, {n: v for n, v in trail.learned[best].items() if n in learned and n != WEIGHTS})
            for turn, trail in zip(turns, trails, strict=False)
        ]
        taught_on, judged_on = (examples, examples) if len(turns) > 1 else (turns[0].examples, held_out)
        validation = figures(found.before.accuracy, found.after.accuracy, self.config.seed)
        if dear:
            validation["as_dear"] = float(found.as_dear.accuracy.mean())
        training = {
            "config": asdict(self.config),
            "examples": len(taught_on),
            "validation_examples": len(judged_on),
            "turns": len(turns),
            **({} if self.origin is None else {"started": self.origin.digest()}),
            "data": {"examples": dataset_checksum(taught_on), "validation": dataset_checksum(judged_on)},
            "kept": best > 0,
            "validation": validation,
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
