"""Zero-shot matching by how well a text-to-image model predicts noise: Diffusion Classifier and DiffusionITM.

Both noise the picture's latent and measure the error of the predicted noise given the caption, with the same timesteps
and noise for all candidates. Their passes are counted, since that is what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dsd.backbone import Backbone, TextStates, load_backbone
from dsd.baselines.base import Baseline, listed, pictures_of
from dsd.contracts import ImageInput, ModelError, OptionError, Pair, ScoreTable
from dsd.race import stepped
from dsd.scorer import Scorer, check_text
from dsd.scores import ScoreConfig, noised_pass

Loss = Literal["l1", "l2", "huber"]
_LOSSES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


def spaced_timesteps(samples: int, total: int = 1000) -> tuple[int, ...]:
    """``samples`` timesteps at equal distances, the first half a distance from 0, as Diffusion Classifier has them."""
    if not 1 <= samples <= total:
        raise OptionError(f"got {samples} timesteps, expected 1 to {total}")
    distance = total // samples
    return tuple(range(distance // 2, total, distance))[:samples]


class _Errors(Scorer):
    """Errors of predicted noise, with a count of the passes they took."""

    passes = 0

    @torch.no_grad()
    def mean_errors(
        self, pairs: Sequence[tuple[int, str]], latents: Tensor, draws: Sequence[int], loss: Loss, bar: Any
    ) -> np.ndarray:
        """Mean errors over the latent of (row of ``latents``, caption) pairs: (n, draws) float64.

        Args:
            pairs: The caption may be empty.
            latents: (m, c, h, w).
            draws: Which of the score's timesteps, and of the noise drawn for each.
            loss: Taken of each element, and averaged.
            bar: Of progress, counts passes.
        """
        timesteps = torch.tensor(self.score.config.timesteps, device=self.backbone.device)
        states = self.texts([text for _, text in pairs])
        found = np.zeros((len(pairs), len(draws)))
        # a pass takes captions of one length only, so that nothing is padded for another's sake
        lengths: dict[int, list[tuple[int, int]]] = {}
        for i, state in enumerate(states):
            lengths.setdefault(state.states.shape[1], []).extend((i, d) for d in range(len(draws)))
        for items in lengths.values():
            done = 0

            def run(rows: int, items: list[tuple[int, int]] = items) -> None:
                nonlocal done
                part = items[done : done + rows]
                draw = torch.tensor([draws[d] for _, d in part], device=latents.device)
                text = TextStates.join([states[i] for i, _ in part])
                z = latents[[pairs[i][0] for i, _ in part]]
                made = noised_pass(self.backbone, z, self.noise[draw], timesteps[draw], text)
                assert made.predicted is not None
                error = _LOSSES[loss](made.predicted.float(), made.noise.float(), reduction="none")
                for (i, d), value in zip(part, error.flatten(1).mean(1).tolist(), strict=True):
                    found[i, d] = value
                done += len(part)
                self.passes += len(part)
                bar.update(len(part))

            while done < len(items):
                self._fit_memory(run)
        return found


class _Noise(Baseline):
    """A backbone, and the draws of timestep and noise that all candidates share.

    Args:
        model: An alias such as ``tiny``, a hub name, a folder, or a backbone; it must be bare.
        samples: Timesteps, evenly spaced.
        trials: Draws of noise at each.
        loss: Of the predicted noise, averaged over the latent: ``l2``, ``l1`` or ``huber``.
        seed: Decides the noise.
        size: Pixels a side. Default: the model's own.
        batch_size: Rows a pass. Default: by the latent's size.
        device: Default: the first GPU if there is one, else the CPU.
        dtype: Of the weights; errors are taken in float32.

    Raises:
        ModelError: If the model cannot be loaded.
        OptionError: If an option is outside what it may be.
    """

    samples_by_default: ClassVar[int] = 50

    def __init__(
        self,
        model: str | Backbone = "tiny",
        *,
        samples: int | None = None,
        trials: int = 1,
        loss: Loss = "l2",
        seed: int = 0,
        size: int | None = None,
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if loss not in get_args(Loss):
            raise OptionError(f"got loss {loss!r}, expected one of {', '.join(get_args(Loss))}")
        if trials < 1:
            raise OptionError(f"got {trials} trials, expected 1 or more")
        backbone = load_backbone(model, device=device, dtype=dtype) if isinstance(model, str) else model
        self.samples = self.samples_by_default if samples is None else samples
        self.trials, self.loss = trials, loss
        times = spaced_timesteps(self.samples, backbone.num_train_timesteps)
        config = ScoreConfig("denoising", tuple(t for t in times for _ in range(trials)), seed=seed)
        self._errors = _Errors(backbone, config, size=size, batch_size=batch_size)

    @property
    def config(self) -> Mapping[str, Any]:
        return {
            "baseline": self.name,
            "model": self._errors.backbone.name,
            "samples": self.samples,
            "trials": self.trials,
            "loss": self.loss,
            "seed": self._errors.score.config.seed,
            "size": self._errors.size,
            "dtype": str(self._errors.backbone.dtype).removeprefix("torch."),
        }

    @property
    def passes(self) -> int:
        """Rows that went through the denoiser since this was made."""
        return self._errors.passes

    def _mean_errors(self, pairs: Sequence[Pair], progress: bool, unconditional: bool = False) -> np.ndarray:
        """Mean errors over all draws given the caption, (n,), less those given none where asked."""
        every = range(len(self._errors.noise))
        keys, pictures = pictures_of([image for image, _ in pairs])
        row = {key: i for i, key in enumerate(pictures)}
        latents = self._errors.latents(list(pictures.values()))
        distinct = list(dict.fromkeys((row[key], text) for key, (_, text) in zip(keys, pairs, strict=True)))
        blank = [(i, "") for i in range(len(pictures))] if unconditional else []
        total = (len(distinct) + len(blank)) * len(every)
        with tqdm(total=total, desc="scoring", unit="pass", disable=not progress) as bar:
            found = self._errors.mean_errors(distinct + blank, latents, every, self.loss, bar).mean(1)
        of = dict(zip(distinct + blank, found, strict=True))
        errors = np.array([of[row[key], text] for key, (_, text) in zip(keys, pairs, strict=True)])
        return errors - np.array([of[row[key], ""] for key in keys]) if unconditional else errors


class DiffusionClassifier(_Noise):
    """Diffusion Classifier (Li et al. 2023, arXiv 2303.16203): minus the mean error of the noise given the caption.

    :meth:`predict` makes all draws for each pair. :meth:`score`, which sees the candidates together, can leave out
    those that do badly on part of the draws, in stages, as the authors do.

    Args:
        stages: How many timesteps all that are left have been tried on after each stage, and how many of them go on:
            ``((10, 5), (50, 1))`` tries all candidates at 10 timesteps, and the best 5 at the 40 others. The last
            stage is at all ``samples``. None: no stages.
        model, options: As for the other methods: ``samples`` (50), ``trials`` (1), ``loss`` (``l2``), ``seed``,
            ``size``, ``batch_size``, ``device``, ``dtype``.
    """

    name = "diffusion-classifier"

    def __init__(
        self, model: str | Backbone = "tiny", *, stages: Sequence[tuple[int, int]] | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.stages = None if stages is None else tuple((int(n), int(k)) for n, k in stages)
        if self.stages is not None:
            counts, kept = [n for n, _ in self.stages], [k for _, k in self.stages]
            rising = all(0 < a < b and b % a == 0 for a, b in pairwise(counts))
            falling = all(a >= b for a, b in pairwise(kept))
            if not counts or counts[0] < 1 or not rising or counts[-1] != self.samples or not falling or kept[-1] < 1:
                raise OptionError(
                    f"got stages {self.stages}, expected (timesteps, candidates kept) with timesteps that each divide "
                    f"the next, the last of them {self.samples}, and ever fewer candidates"
                )

    @property
    def config(self) -> Mapping[str, Any]:
        return {**super().config, "stages": None if self.stages is None else [list(s) for s in self.stages]}

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        return -self._mean_errors(pairs, progress)

    def score(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str], *, progress: bool = False
    ) -> ScoreTable:
        """Scores every image against every caption; where one of them is alone, in stages if there are any.

        A candidate that is left out keeps the score that it had, lowered along with those left out with it where that
        would otherwise not lie below all that went on. So the order of candidates is right, and the best one's score
        is that of :meth:`predict`. In a table of several images and several captions, where every image and every
        caption has candidates of its own, nothing is left out.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
        """
        pictures, captions = listed(images, texts)
        if self.stages is None or min(len(pictures), len(captions)) > 1:
            return super().score(pictures, captions, progress=progress)
        for text in captions:
            check_text(text)
        keys, distinct = pictures_of(pictures)
        latents = self._errors.latents(list(distinct.values()))
        row = {key: i for i, key in enumerate(distinct)}
        pairs = [(row[key], text) for key in keys for text in captions]
        scores = self._staged(pairs, latents, progress)
        if not np.isfinite(scores).all():
            raise ModelError(f"got a score that is not finite, expected a number; load {self.name}'s model in float32")
        return self._table(scores.reshape(len(pictures), len(captions)), pictures, captions)

    def _staged(self, pairs: Sequence[tuple[int, str]], latents: Tensor, progress: bool) -> np.ndarray:
        """Scores of candidates of one choice, in stages: (n,) float32."""
        assert self.stages is not None
        errors = np.full((len(pairs), len(self._errors.noise)), np.nan)
        left = list(range(len(pairs)))
        out: list[list[int]] = []  # those left out at each stage
        tried: list[int] = []
        with tqdm(desc="scoring", unit="pass", disable=not progress) as bar:
            for count, keep in self.stages:
                distance = self.samples // count
                here = [
                    s * self.trials + k
                    for s in range(distance // 2, self.samples, distance)
                    for k in range(self.trials)
                ]
                fresh = [d for d in here if d not in tried]
                tried += fresh
                errors[np.ix_(left, fresh)] = self._errors.mean_errors(
                    [pairs[i] for i in left], latents, fresh, self.loss, bar
                )
                if count == self.samples:
                    break
                means = errors[left].mean(1, where=~np.isnan(errors[left]))
                order = np.argsort(means, kind="stable")
                out.append([left[i] for i in order[keep:]])
                left = sorted(left[i] for i in order[:keep])
        scores: np.ndarray = -errors.mean(1, where=~np.isnan(errors)).astype(np.float32)
        return stepped(scores, [left, *(group for group in reversed(out) if group)])


class DiffusionITM(_Noise):
    """DiffusionITM (Krojer et al. 2023, arXiv 2305.16397): how much the caption lowers the error of the noise.

    The error without a caption is the same for all captions of a picture; among pictures it takes away that some are
    easier to denoise than others, whatever the caption.

    Args:
        unconditional: Whether the error without a caption is subtracted. Without it this is
            :class:`DiffusionClassifier`, at fewer timesteps.
        model, options: As for the other methods; ``samples`` is 10 by default, as in the authors' code.
    """

    name = "diffusion-itm"
    samples_by_default = 10

    def __init__(self, model: str | Backbone = "tiny", *, unconditional: bool = True, **options: Any) -> None:
        super().__init__(model, **options)
        self.unconditional = bool(unconditional)

    @property
    def config(self) -> Mapping[str, Any]:
        return {**super().config, "unconditional": self.unconditional}

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        return -self._mean_errors(pairs, progress, self.unconditional)
