"""The contract between a text-to-image model and everything built on it.

A :class:`Backbone` owns what differs between model families: pixel range, latent scale, noise schedule, what the
denoiser predicts, how captions become token states. Nothing beyond this package asks whether it is a U-Net.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn

Latents = Float[Tensor, "n c h w"]


@dataclass(frozen=True)
class TextStates:
    """Captions as the denoiser sees them. All captions of one value have the same number of tokens.

    Attributes:
        states: (n, tokens, width), what cross-attention attends to.
        own: (n, tokens) bool, true at the caption's own tokens: not at start, end or padding.
        words: For each caption, the word that each own token belongs to, and the words' spelling, in order.
    """

    states: Float[Tensor, "n tokens width"]
    own: Bool[Tensor, "n tokens"]
    words: tuple[CaptionWords, ...]

    def __len__(self) -> int:
        return len(self.states)

    def select(self, index: Sequence[int]) -> TextStates:
        """The captions at ``index``, in that order, repeats allowed."""
        rows = torch.as_tensor(index, device=self.states.device)
        return replace(self, states=self.states[rows], own=self.own[rows], words=tuple(self.words[i] for i in index))

    @staticmethod
    def join(parts: Sequence[TextStates]) -> TextStates:
        """One value of many with the same number of tokens."""
        return TextStates(
            torch.cat([p.states for p in parts]),
            torch.cat([p.own for p in parts]),
            tuple(w for p in parts for w in p.words),
        )


@dataclass(frozen=True)
class CaptionWords:
    """The words of one caption and which tokens spell each: ``tokens[i]`` are positions along the token axis."""

    spelling: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


class Backbone(ABC):
    """A frozen text-to-image model, taken apart into the three steps that scores need.

    Attributes:
        name: Where it was loaded from.
        denoiser: The network whose attention is probed and prompted.
        image_size: Pixels a side it was trained on.
        num_train_timesteps: Timesteps are integers from 0 (clean) below this (noise).
    """

    name: str
    denoiser: nn.Module
    image_size: int
    num_train_timesteps: int

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the denoiser runs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The denoiser's floating-point type."""

    @abstractmethod
    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a picture of ``size`` pixels a side."""

    @abstractmethod
    def encode_images(self, images: Sequence[Image]) -> Latents:
        """RGB pictures of one size => scaled latents, float32; the posterior's mean, never a sample."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        """Captions => token states, one value (of one row) a caption; long captions have more tokens.

        A caption longer than the encoder's window is encoded in windows, whose states are joined.
        """

    @abstractmethod
    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        """Latents at a noise level, float32: ``sqrt(abar) z + sqrt(1 - abar) e`` for a diffusion schedule."""

    @abstractmethod
    def predict_noise(self, noised: Latents, timesteps: Int[Tensor, " n"], text: TextStates) -> Latents:
        """One pass of the denoiser: the noise it sees in ``noised`` given the captions, float32."""
