"""One sweep of passes over all pairs and many timesteps, from which every zero-shot score is read.

What a pass is worth under any choice of timesteps, layers, pooling and norm is a mean of a few numbers a pass, so that
a study of all these choices costs one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dsd.backbone import Backbone
from dsd.contracts import OptionError, Pair
from dsd.probe import Direction, Over, paper_layers, select_layers
from dsd.scorer import Scorer
from dsd.scores import Pass, ScoreConfig, over_all

ERRORS: dict[str, Callable[..., Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}
"""How the error of the predicted noise is measured, element by element."""


class _Measures:
    """What of a pass is kept: log-sum-exps of each layer, and errors of the noise, with and without the caption."""

    needs_empty = True
    direction: Direction = "image"
    over: Over = "all"
    sees_noise = True

    def __init__(self, backbone: Backbone) -> None:
        self.layers = self.empty_layers = select_layers(backbone.denoiser)
        self.names = (
            *(f"{what} {layer}" for what in ("own", "all", "empty") for layer in self.layers),
            *(f"{error}{of}" for error in ERRORS for of in ("", " empty")),
        )

    def __call__(self, caption: Pass, empty: Pass | None) -> Float[Tensor, "n features"]:
        assert empty is not None
        records = [caption.records[name] for name in self.layers]
        columns = [r.own.mean(1) for r in records] + [over_all(r).mean(1) for r in records]
        columns += [over_all(empty.records[name]).mean(1) for name in self.layers]
        for error in ERRORS.values():
            for made in (caption, empty):
                assert made.predicted is not None
                columns.append(error(made.predicted.float(), made.noise.float(), reduction="none").flatten(1).mean(1))
        return torch.stack(columns, 1)


@dataclass(frozen=True)
class Sweep:
    """What passes did, and the scores that come of it.

    Attributes:
        timesteps: Of the passes.
        layers: Names of the probed layers.
        elements: Numbers in a latent.
        values: By name (pairs, timesteps) float32: ``own LAYER`` and ``all LAYER``, the log-sum-exp over the caption's
            own tokens and over all, ``empty LAYER``, that over all tokens of the empty caption; ``l2``, ``l1`` and
            ``huber``, mean errors of the noise given the caption, and ``l2 empty`` and so on, given none.
    """

    timesteps: tuple[int, ...]
    layers: tuple[str, ...]
    elements: int
    values: Mapping[str, np.ndarray]

    def steps(self, count: int, low: int = 0, high: int = 1000) -> tuple[int, ...]:
        """Places of ``count`` timesteps of the sweep, as evenly spread over [low, high) as it allows."""
        wanted = [low + (i + 0.5) * (high - low) / count for i in range(count)]
        return tuple(int(np.argmin([abs(t - w) for t in self.timesteps])) for w in wanted)

    def near(self, timesteps: Sequence[int]) -> tuple[int, ...]:
        """Places of the sweep's timesteps next to those given."""
        return tuple(int(np.argmin([abs(t - w) for t in self.timesteps])) for w in timesteps)

    def attention(
        self, steps: Sequence[int], layers: Sequence[str] | None = None, pooling: str = "own"
    ) -> Float[np.ndarray, " pairs"]:
        """The attention score.

        Args:
            steps: Places of timesteps.
            layers: By default all.
            pooling: ``own`` (``attention``), ``all`` (start, end and padding too), or ``mass`` (``attention-mass``).
        """
        layers = self.layers if layers is None else layers
        found = np.zeros(len(self.values["l2"]))
        for layer in layers:
            own, every = (self.values[f"{what} {layer}"][:, list(steps)].astype(np.float64) for what in ("own", "all"))
            found += {"own": own, "all": every, "mass": own - every}[pooling].mean(1)
        return found / len(layers)

    def paper_attention(self, steps: Sequence[int], layers: Sequence[str]) -> Float[np.ndarray, " pairs"]:
        """That of He et al. 2023: all tokens, the mean over the caption's and the empty caption's pass."""
        both = [self.values[f"{what} {layer}"][:, list(steps)] for layer in layers for what in ("all", "empty")]
        found: np.ndarray = np.mean(both, 0, dtype=np.float64).mean(1)
        return found

    def denoising(self, steps: Sequence[int]) -> Float[np.ndarray, " pairs"]:
        """The denoising score: the L2 norm of the error without a caption, less that with it."""
        caption, empty = (np.sqrt(self.values[name][:, list(steps)] * self.elements) for name in ("l2", "l2 empty"))
        found: np.ndarray = (empty - caption).mean(1, dtype=np.float64)
        return found

    def error(self, steps: Sequence[int], norm: str = "l2", empty: bool = False) -> Float[np.ndarray, " pairs"]:
        """Minus the mean error, as Diffusion Classifier has it; plus that without a caption, as DiffusionITM."""
        found: np.ndarray = -self.values[norm][:, list(steps)].mean(1, dtype=np.float64)
        return found + self.values[f"{norm} empty"][:, list(steps)].mean(1, dtype=np.float64) if empty else found


def sweep(
    backbone: Backbone, pairs: Sequence[Pair], timesteps: Sequence[int], *, seed: int = 0, progress: bool = False
) -> Sweep:
    """Makes the passes of all pairs at all timesteps, under the noise of a score of that seed.

    Raises:
        ImageError, TextError: If an image or caption cannot be scored.
        ModelError: If the model gives numbers that are not finite.
    """
    if not timesteps:
        raise OptionError("got no timesteps, expected at least one")
    scorer = Scorer(backbone, ScoreConfig("denoising", tuple(timesteps), seed=seed))
    measures = _Measures(backbone)
    (found,) = scorer.features(pairs, measures, progress=progress)
    elements = math.prod(backbone.latent_shape(scorer.size))
    values = {name: found[:, :, k] for k, name in enumerate(measures.names)}
    return Sweep(tuple(timesteps), measures.layers, elements, values)


def groups_of(backbone: Backbone) -> dict[str, tuple[str, ...]]:
    """Layers by where they are in the network, those of the paper, and all."""
    layers = select_layers(backbone.denoiser)
    found: dict[str, tuple[str, ...]] = {}
    for part in dict.fromkeys(name.split("_")[0] for name in layers):
        found[part] = tuple(name for name in layers if name.split("_")[0] == part)
    return {**found, "paper's": paper_layers(backbone.denoiser), "all": layers}
