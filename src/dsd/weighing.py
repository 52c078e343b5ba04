"""Weights of a model's features, learned from examples, and what they come to: an adapter.

Of the bare model, or of one that was taught, whose features are then seen with prompts that did not learn from them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsd import prompts
from dsd.adapters import Adapter, fingerprint
from dsd.contracts import Example, Pair
from dsd.evaluate import dataset_checksum
from dsd.jury import DOUBT, PARTS, Judged, Jury, figures
from dsd.learn import FitConfig
from dsd.lesson import Negatives, choices_of, folds
from dsd.scorer import Scorer
from dsd.scores import WEIGHTED, Features
from dsd.weights import Choice, better, fit_weights


@dataclass(frozen=True)
class Part:
    """Examples, and what a model that did not learn from them had learned: prompts by name; nothing if it is bare."""

    examples: list[Example]
    prompts: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Weighed:
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


def follow(
    scorer: Scorer, adapter: Adapter, parts: Sequence[Part], bare: Weighed | None, config: FitConfig, progress: bool
) -> Adapter:
    """Fits weights of the model as it was taught, and gives the scorer these or those of the bare model.

    Prompts were kept for being better than what they started from. That may be attention alone, and the denoising score
    of the bare model, which the weights of its features start from, better than either.

    Args:
        adapter: What was taught.
        parts: As :meth:`dsd.gradient.Gradient.fit` gives them.
        bare: Weights of the bare model; None where prompts were learned on, which stay.
    """
    denoiser = scorer.backbone.denoiser
    assert adapter.prompts is not None
    prompts.attach(denoiser, adapter.prompts)
    scorer.use(adapter.score)
    # prompts fit their own examples too well for weights to be learned from these: each example is seen with prompts
    # that did not learn from it
    taught = weigh(scorer, parts, None, config, adapter, progress)
    if bare is None or taught.judged_by(taught.examples).rank >= bare.judged_by(taught.examples).rank:
        return taught.adapter
    prompts.detach(denoiser)
    scorer.use(bare.adapter.score, bare.adapter.weights)
    return bare.adapter


def weigh(
    scorer: Scorer,
    parts: Sequence[Part],
    validation: Sequence[Example] | None,
    config: FitConfig,
    taught: Adapter | None,
    progress: bool,
) -> Weighed:
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
        "validation": figures(before, after if kept else before, config.seed),
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
    return Weighed(adapter, judged_by, judged[kept])
