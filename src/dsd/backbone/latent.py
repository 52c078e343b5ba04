"""What all latent diffusion models share: a VAE, a schedule that mixes latents and noise, a denoiser over the mixture.

A family says what its denoiser is told (:meth:`LatentBackbone._denoise`); the schedule turns whatever that predicts
into noise.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from dsd.backbone.base import Backbone, Latents, TextStates, execution_device
from dsd.contracts import ImageError, ModelError, OptionError

GUIDANCE = 1.0
"""What models that were distilled with guidance are told: none, because scores need the prediction itself."""


class Schedule(Protocol):
    """How latents and noise are mixed at each timestep, and what the denoiser's prediction says of the noise."""

    num_train_timesteps: int

    @property
    def computation(self) -> dict[str, Any]:
        """What decides how it mixes and what a prediction means, plain values by name."""
        ...

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents: ...

    def to_noise(self, predicted: Latents, noised: Latents, timesteps: Int[Tensor, " n"]) -> Latents: ...

    def told(self, timesteps: Int[Tensor, " n"], noised: Latents) -> Float[Tensor, " n"] | Int[Tensor, " n"]:
        """The timesteps as the denoiser is told them, on a scale of 0 to 1000."""
        ...


class Diffusion:
    """``z_t = sqrt(abar) z0 + sqrt(1 - abar) e`` (Ho et al. 2020).

    Args:
        name: The model's.
        scheduler: Any scheduler of diffusers for this process.

    Raises:
        ModelError: If it is none, or its prediction type is none of epsilon, v_prediction and sample.
    """

    def __init__(self, name: str, scheduler: Any) -> None:
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                f"{name}: got prediction type {self.prediction_type!r}, "
                "expected epsilon, v_prediction or sample; correct scheduler/scheduler_config.json"
            )
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(f"{name}: got a {type(scheduler).__name__}, expected a scheduler of a diffusion process")
        self.num_train_timesteps = int(scheduler.config.num_train_timesteps)
        self._alphas = scheduler.alphas_cumprod.float()

    @property
    def computation(self) -> dict[str, Any]:
        some = self._alphas[:: max(1, len(self._alphas) // 8)]
        return {"prediction_type": self.prediction_type, "abar": [round(float(a), 5) for a in some]}

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        a = self._alphas_at(timesteps)
        return a.sqrt() * latents + (1 - a).sqrt() * noise

    def to_noise(self, predicted: Latents, noised: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        if self.prediction_type == "epsilon":
            return predicted
        a = self._alphas_at(timesteps)
        if self.prediction_type == "v_prediction":  # v = sqrt(abar) e - sqrt(1 - abar) z0 (Salimans & Ho 2022)
            return a.sqrt() * predicted + (1 - a).sqrt() * noised
        return (noised - a.sqrt() * predicted) / (1 - a).sqrt()

    def told(self, timesteps: Int[Tensor, " n"], noised: Latents) -> Int[Tensor, " n"]:
        return timesteps

    def _alphas_at(self, timesteps: Tensor) -> Tensor:
        """The share of signal left at each timestep (abar), to multiply latents with."""
        self._alphas = self._alphas.to(timesteps.device)
        alphas: Tensor = self._alphas[timesteps]
        return alphas[:, None, None, None]


class Flow:
    """``z_t = (1 - s) z0 + s e``, a straight line from picture to noise (Liu et al. 2022; Esser et al. 2024, eq. 13).

    The denoiser predicts the velocity ``v = e - z0`` along it, so the noise is ``e = z_t + (1 - s) v``, and an error
    of that noise is ``1 - s`` times the error of the velocity: the denoising score is that of the velocity, with less
    weight the more noise there is.

    Timesteps are integers on an even grid ``u = (t + 1) / 1000``, as for a diffusion process: 0 is nearly clean, 999
    is noise alone. The scheduler's shift makes of it ``s = shift u / (1 + (shift - 1) u)`` (Esser et al. 2024, eq. 23);
    with dynamic shifting, ``shift`` (or its logarithm) grows in line with the number of image positions. These are the
    scheduler's own training sigmas. The denoiser is told ``1000 s``.

    Args:
        name: The model's.
        scheduler: A flow-matching scheduler of diffusers.
        positions: (height, width) of a latent => image positions that the denoiser attends over.

    Raises:
        ModelError: If it is none.
    """

    LEVELS = (0.353, 0.529, 0.687, 0.829)
    """``s`` where noise over signal is what Stable Diffusion has at the timesteps 189, 389, 589 and 789."""

    def __init__(self, name: str, scheduler: Any, positions: Callable[[int, int], int]) -> None:
        config = scheduler.config
        if "shift" not in config:
            raise ModelError(f"{name}: got a {type(scheduler).__name__}, expected a scheduler for flow matching")
        self.num_train_timesteps = int(config.num_train_timesteps)
        self._config = config
        self._positions = positions

    @property
    def computation(self) -> dict[str, Any]:
        shifts = ("use_dynamic_shifting", "base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        known = {name: self._config.get(name) for name in ("shift", *shifts, "time_shift_type")}
        return {"prediction_type": "flow", **{name: value for name, value in known.items() if value is not None}}

    def shift(self, height: int, width: int) -> float:
        """How far the grid is shifted towards noise for latents of this size; 1 is not at all."""
        config = self._config
        if not config.get("use_dynamic_shifting"):
            return float(config.shift)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = least + (most - least) * (self._positions(height, width) - low) / (high - low)
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)

    def default_timesteps(self, height: int, width: int) -> tuple[int, ...]:
        """The timesteps nearest to :attr:`LEVELS`."""
        shift, count = self.shift(height, width), self.num_train_timesteps
        return tuple(round(count * s / (shift - (shift - 1) * s)) - 1 for s in self.LEVELS)

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        s = self._sigmas_at(timesteps, latents)[:, None, None, None]
        return (1 - s) * latents + s * noise

    def to_noise(self, predicted: Latents, noised: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        s = self._sigmas_at(timesteps, noised)[:, None, None, None]
        return noised + (1 - s) * predicted

    def told(self, timesteps: Int[Tensor, " n"], noised: Latents) -> Float[Tensor, " n"]:
        return 1000 * self._sigmas_at(timesteps, noised)

    def _sigmas_at(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        shift = self.shift(*latents.shape[-2:])
        u = (timesteps.float() + 1) / self.num_train_timesteps
        return shift * u / (1 + (shift - 1) * u)


class LatentBackbone(Backbone):
    """A backbone over the components of a latent diffusion pipeline; all become frozen.

    Args:
        name: Where it came from.
        vae, denoiser: The networks.
        schedule: What the scheduler's configuration says.
        encoders: Text encoders, if any.
        patch: Latent positions a side that the denoiser takes as one.
    """

    vae: Any
    denoiser: Any

    def __init__(
        self, name: str, *, vae: Any, denoiser: Any, schedule: Schedule, encoders: Sequence[Any] = (), patch: int = 1
    ) -> None:
        for module in (vae, denoiser, *encoders):
            module.eval().requires_grad_(False)
        self.name = name
        self.vae = vae
        self.denoiser = denoiser
        self.schedule = schedule
        self.num_train_timesteps = schedule.num_train_timesteps
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._patch = patch

    @property
    def device(self) -> torch.device:
        return execution_device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.denoiser.parameters()).dtype
        return dtype

    def computation(self) -> dict[str, Any]:
        scale = {"latent_scale": self.vae.config.scaling_factor, "latent_shift": self.vae.config.get("shift_factor")}
        return {**super().computation(), **self.schedule.computation, **scale}

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        side = size // (self._factor * self._patch) * self._patch
        if not side:
            raise OptionError(f"got size {size}, expected at least {self._factor * self._patch} for {self.name}")
        return int(self.vae.config.latent_channels), side, side

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Latents:
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise ImageError(f"got pictures of sizes {sorted(sizes)}, expected one size; resize and crop them first")
        stack = np.stack([np.asarray(image) for image in images])
        if self._patch > 1:
            height, width = (n // (self._factor * self._patch) * self._factor * self._patch for n in stack.shape[1:3])
            top, left = (stack.shape[1] - height) // 2, (stack.shape[2] - width) // 2
            stack = stack[:, top : top + height, left : left + width]
        pixels = torch.from_numpy(stack).to(self.vae.device).permute(0, 3, 1, 2)
        pixels = pixels.to(self.vae.dtype) / 127.5 - 1  # uint8 => -1..1
        posterior = self.vae.encode(pixels).latent_dist  # pixels => latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        latents: Tensor = (posterior.mode().float() - shift) * self.vae.config.scaling_factor
        return latents.to(self.device)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> list[TextStates]:
        return [self._encode_text(text) for text in texts]

    def add_noise(self, latents: Latents, noise: Latents, timesteps: Int[Tensor, " n"]) -> Latents:
        return self.schedule.add_noise(latents, noise, timesteps)

    def predict_noise(self, noised: Latents, timesteps: Int[Tensor, " n"], text: TextStates) -> Latents:
        predicted = self._denoise(noised.to(self.dtype), self.schedule.told(timesteps, noised), text)
        return self.schedule.to_noise(predicted.float(), noised, timesteps)

    @abstractmethod
    def _encode_text(self, text: str) -> TextStates:
        """One caption => its token states, on the denoiser's device."""

    @abstractmethod
    def _denoise(self, noised: Latents, timesteps: Tensor, text: TextStates) -> Latents:
        """What the denoiser predicts, for latents of its own type and timesteps as it is told them."""


def upcast(vae: Any) -> Any:
    """A VAE that overflows in float16, as its configuration says and SDXL's does, in float32; others as they are."""
    return vae.float() if vae.dtype == torch.float16 and vae.config.get("force_upcast") else vae


def check_channels(name: str, denoiser: Any, vae: Any, latent: int, out: int, family: str) -> None:
    """Refuses a denoiser that does not take and give such latents as the VAE makes.

    Args:
        latent: Channels that the denoiser takes, as latents have them.
        out: Channels that it gives.
        family: What was expected.

    Raises:
        ModelError: If it does not.
    """
    channels = int(vae.config.latent_channels)
    if not latent == out == channels:
        kind = "U-Net" if "UNet" in type(denoiser).__name__ else "transformer"
        raise ModelError(
            f"{name}: got a {kind} of {latent} to {out} channels over latents of {channels}; "
            f"expected a {family} pipeline for text to image"
        )


def check_width(name: str, denoiser: Any, takes: Any, gets: int, family: str, what: str = "texts") -> None:
    """Refuses text encoders that do not make such states as the denoiser takes.

    Raises:
        ModelError: If they do not.
    """
    if takes != gets:
        kind = "U-Net" if "UNet" in type(denoiser).__name__ else "transformer"
        raise ModelError(
            f"{name}: got a {kind} for {what} of width {takes} and a text encoder of width {gets}; "
            f"expected a {family} pipeline for text to image"
        )
