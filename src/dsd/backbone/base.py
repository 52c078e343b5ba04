"""The contract between a text-to-image model and everything built on it.

A :class:`Backbone` owns what differs between model families: pixel range, latent scale, noise schedule, what the
denoiser predicts, how captions become token states, what else the denoiser is told. Nothing beyond this package asks
which family it is. A family is one file with one subclass, listed in :data:`dsd.backbone.families.FAMILIES`;
``docs/bring-your-own-model.md`` is the guide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn

Latents = Float[Tensor, "n c h w"]
EXECUTION_DEVICE = "_execution_device"
"""A module's attribute that says where it computes, if that is not where its weights are kept."""


@dataclass(frozen=True)
class TextStates:
    """Captions as the denoiser sees them. All captions of one value have the same number of tokens.

    Attributes:
        states: (n, tokens, width), what the image attends to; no tokens where a model is told a class.
        own: (n, tokens) bool, true at the caption's own tokens: not at start, end or padding.
        words: For each caption, the word that each own token belongs to, and the words' spelling, in order.
        pooled: (n, width) what the denoiser is told of the caption as a whole, beside its tokens; None if nothing.
        mask: (n, tokens) bool, true at the tokens that the denoiser attends to; None: to all of them.
    """

    states: Float[Tensor, "n tokens width"]
    own: Bool[Tensor, "n tokens"]
    words: tuple[CaptionWords, ...]
    pooled: Float[Tensor, "n pooled"] | None = None
    mask: Bool[Tensor, "n tokens"] | None = None

    def __len__(self) -> int:
        return len(self.states)

    def select(self, index: Sequence[int]) -> TextStates:
        """The captions at ``index``, in that order, repeats allowed."""
        rows = torch.as_tensor(index, dtype=torch.long, device=self.states.device)
        return TextStates(
            self.states[rows],
            self.own[rows],
            tuple(self.words[i] for i in index),
            None if self.pooled is None else self.pooled[rows],
            None if self.mask is None else self.mask[rows],
        )

    def with_tokens(self, soft: Float[Tensor, "tokens width"]) -> TextStates:
        """The captions with further tokens behind them, the same for all, as own tokens of no word."""
        added = soft.to(self.states).expand(len(self), -1, -1)
        true = torch.ones(added.shape[:2], dtype=torch.bool, device=added.device)
        return replace(
            self,
            states=torch.cat([self.states, added], 1),
            own=torch.cat([self.own, true], 1),
            mask=None if self.mask is None else torch.cat([self.mask, true], 1),
        )

    def with_words(self, offsets: Mapping[str, Float[Tensor, " width"]]) -> TextStates:
        """The captions with an offset added to the states of the tokens of some words, by their spelling."""
        found = [
            (row, token, offsets[word])
            for row, caption in enumerate(self.words)
            for word, tokens in zip(caption.spelling, caption.tokens, strict=True)
            if word in offsets
            for token in tokens
        ]
        if not found:
            return self
        rows, tokens, added = zip(*found, strict=True)
        where = tuple(torch.tensor(places, device=self.states.device) for places in (rows, tokens))
        return replace(self, states=self.states.index_put(where, torch.stack(added).to(self.states), accumulate=True))

    @staticmethod
    def join(parts: Sequence[TextStates]) -> TextStates:
        """One value of many of one model, with the same number of tokens."""
        pooled = [p.pooled for p in parts if p.pooled is not None]
        mask = [p.mask for p in parts if p.mask is not None]
        return TextStates(
            torch.cat([p.states for p in parts]),
            torch.cat([p.own for p in parts]),
            tuple(w for p in parts for w in p.words),
            torch.cat(pooled) if pooled else None,
            torch.cat(mask) if mask else None,
        )


@dataclass(frozen=True)
class CaptionWords:
    """The words of one caption and which tokens spell each: ``tokens[i]`` are positions along the token axis."""

    spelling: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes, which is not where its weights wait if it is offloaded."""
    found = getattr(module, EXECUTION_DEVICE, None)
    return found if isinstance(found, torch.device) else next(module.parameters()).device


class Backbone(ABC):
    """A frozen text-to-image model, taken apart into the three steps that scores need.

    A family's constructor is ``Family(name, **components)``: it takes the components by the names that
    ``model_index.json`` gives them, as stock diffusers and transformers load them, and raises
    :class:`dsd.contracts.ModelError` unless they fit together. Of the scheduler only the configuration counts, so any
    scheduler of the pipeline will do.

    Class attributes:
        pipelines: The diffusers pipeline classes it serves, as ``_class_name`` in ``model_index.json`` has them.
        components: Names of the pipeline's components that it must be given.
        optional_components: Names of components that it takes where the pipeline has them (else None, or left out).
        settings: Names of plain values in ``model_index.json`` that it takes where they are there.

    Attributes:
        name: Where it was loaded from.
        denoiser: The network whose attention is probed and prompted.
        image_size: Pixels a side it was trained on.
        num_train_timesteps: Timesteps are integers from 0 (clean) below this (noise).
        timesteps: What scores look at unless told otherwise; each counts the same.
        offload: How its networks are kept off the device (see ``LoadConfig``); None if they stay there.
        compiled: Whether parts of the denoiser are compiled, for few shapes.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    components: ClassVar[tuple[str, ...]] = ()
    optional_components: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()

    name: str
    denoiser: nn.Module
    image_size: int
    num_train_timesteps: int
    timesteps: tuple[int, ...] = (189, 389, 589, 789)
    offload: str | None = None
    compiled: bool = False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser runs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The denoiser's floating-point type."""

    def computation(self) -> dict[str, Any]:
        """What decides the result of a pass besides the weights, plain values by name.

        Two models with the same weights that differ here give other scores: what was learned on one is of no use on
        the other.
        """
        config = dict(getattr(self.denoiser, "config", {}))
        return {
            "denoiser": type(self.denoiser).__name__,
            **{name: value for name, value in config.items() if not name.startswith("_")},
        }

    @abstractmethod
    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a picture of ``size`` pixels a side.

        Raises:
            OptionError: If the model cannot take pictures of this size.
        """

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Latents:
        """RGB pictures of one size => scaled latents, float32; the posterior's mean, never a sample.

        A picture is cropped, around its centre, to the pixels that whole latent positions and patches cover.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        """Captions => token states, one value (of one row) a caption; long captions have more tokens.

        A caption longer than an encoder's window is encoded in windows, whose states are joined. The empty caption
        stands for no caption at all, as the model learned it.

        Raises:
            TextError: If the model has no states for a caption.
        """

    @property
    def caption_settings(self) -> Mapping[str, Any]:
        """What besides text encoders and tokenizers decides the states of a caption, plain values."""
        return {}

    @abstractmethod
    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        """Latents at a noise level, float32.

        ``sqrt(abar) z + sqrt(1 - abar) e`` for a diffusion schedule, ``(1 - s) z + s e`` for a flow.
        """

    @abstractmethod
    def predict_noise(self, noised: Latents, timesteps: Int[Tensor, " n"], text: TextStates) -> Latents:
        """One pass of the denoiser: the noise it sees in ``noised`` given the captions, float32.

        Whatever the model predicts is turned into noise. A row does not depend on the others.
        """
