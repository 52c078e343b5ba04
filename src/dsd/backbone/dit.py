"""DiT: a transformer that draws pictures of a class; captions are classes, and there are no tokens to attend to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsd.backbone.base import CaptionWords, TextStates
from dsd.backbone.latent import Diffusion, LatentBackbone, check_channels
from dsd.contracts import ModelError, TextError


class DiTBackbone(LatentBackbone):
    """A backbone over the parts of a ``diffusers`` DiT pipeline (Peebles & Xie 2023).

    A caption is a class: its number, or one of its names in any case. The class scales and shifts the norms of the
    transformer, which attends to nothing but the image. So there is a denoising score, that of Diffusion Classifier
    (Li et al. 2023), and no attention score. The empty caption is the class that stands for none.

    Args:
        name: Where it came from.
        vae, transformer, scheduler: The pipeline's parts.
        id2label: Names of the classes by number, several parted by commas.

    Raises:
        ModelError: If the parts do not fit together.
    """

    pipelines = ("DiTPipeline",)
    components = ("vae", "transformer", "scheduler")
    settings = ("id2label",)

    def __init__(
        self,
        name: str,
        *,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        id2label: Mapping[str | int, str] | None = None,
    ) -> None:
        config = transformer.config
        super().__init__(
            name,
            vae=vae,
            denoiser=transformer,
            schedule=Diffusion(name, scheduler),
            patch=int(config.patch_size),
        )
        learned_variance = transformer.out_channels == 2 * config.in_channels
        out = transformer.out_channels // 2 if learned_variance else transformer.out_channels
        check_channels(name, transformer, vae, config.in_channels, out, "DiT")
        self._classes = int(config.num_embeds_ada_norm)
        self._numbers: dict[str, int] = {}
        for number, names in (id2label or {}).items():
            if not 0 <= int(number) < self._classes:
                raise ModelError(f"{name}: got a name for class {number}, expected classes below {self._classes}")
            for label in (names, *names.split(",")):
                self._numbers.setdefault(_folded(label), int(number))
        self.image_size = int(config.sample_size) * self._factor

    def _encode_text(self, text: str) -> TextStates:
        told = torch.tensor([[self._class_of(text)]], dtype=torch.float32, device=self.device)
        none = torch.zeros(1, 0, dtype=torch.bool, device=self.device)
        return TextStates(told.new_zeros(1, 0, 1), none, (CaptionWords((), ()),), pooled=told)

    def _class_of(self, text: str) -> int:
        if not text:
            return self._classes
        folded = _folded(text)
        if folded in self._numbers:
            return self._numbers[folded]
        if folded.isascii() and folded.isdecimal() and int(folded) < self._classes:
            return int(folded)
        names = ", ".join(list(self._numbers)[:5])
        known = f" or a class's name (such as {names})" if names else ""
        raise TextError(
            f"got the caption {text!r}, expected a class of {self.name}: a number below {self._classes}{known}; "
            "for free text use a text-to-image model"
        )

    def _denoise(self, noised: Tensor, timesteps: Tensor, text: TextStates) -> Tensor:
        assert text.pooled is not None
        out: Tensor = self.denoiser(noised, timestep=timesteps, class_labels=text.pooled[:, 0].round().long()).sample
        return out[:, : noised.shape[1]]


def _folded(label: str) -> str:
    return " ".join(label.casefold().split())
