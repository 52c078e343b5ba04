"""CLIP and SigLIP: two towers whose embeddings of picture and caption are compared, zero-shot.

Radford et al. 2021 (arXiv 2103.00020) and Zhai et al. 2023 (arXiv 2303.15343), as ``transformers`` has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from dsd.backbone.placement import pick_device
from dsd.baselines.base import Baseline, Encoded, pictures_of
from dsd.contracts import ModelError, Pair, TextError, batched

ALIASES = {"clip-tiny": "clip_weights"}
"""Models that ship with the library, by name: folders of ``dsd.tiny``."""


def load_parts(
    model: str, kinds: Mapping[str, str], device: str | torch.device | None
) -> tuple[str, Any, Any, Callable[[Sequence[Any]], Tensor]]:
    """A pretrained model in float32, its tokenizer, and its way from RGB pictures to pixels.

    Args:
        model: An alias of :data:`ALIASES`, a folder as ``save_pretrained`` writes it, or a name on the hub.
        kinds: Of each ``model_type`` that will do the name of the class in ``transformers``.
        device: Default: the first GPU if there is one, else the CPU.

    Returns:
        The model's type, the model, the tokenizer, and pictures => (n, 3, h, w) float32 on the CPU.

    Raises:
        ModelError: If there is no such model, it is of another type, or its weights are not whole or no safetensors.
    """
    at = pick_device(device)
    where: str = str(files("dsd.tiny").joinpath(ALIASES[model])) if model in ALIASES else model
    folder = Path(os.path.expanduser(where))  # Path's own raises where there is no such user
    local = folder.is_dir()
    if not local and (where.count("/") != 1 or where.startswith((".", "/", "~")) or folder.exists()):
        raise ModelError(
            f"got model {model!r}, expected an alias ({', '.join(ALIASES)}), a folder that save_pretrained wrote, or a "
            "hub name such as openai/clip-vit-base-patch32"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if config.model_type not in kinds:
            raise ModelError(
                f"{model}: got a model of type {config.model_type}, expected {' or '.join(kinds)}; name another"
            )
        loaded, info = getattr(transformers, kinds[config.model_type]).from_pretrained(
            where, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ModelError(
                f"{model}: got {len(info['missing_keys'])} weights fewer than {kinds[config.model_type]} has, expected "
                "all of them; save the model again with save_pretrained"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        processor = _processor(config.model_type).from_pretrained(where)
    except ModelError:
        raise
    except Exception as error:  # transformers and the hub raise a dozen kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            "the folder needs config, safetensors, tokenizer and image processor; save it again with save_pretrained"
            if local
            else f"to fetch it: hf download {where}"
        )
        raise ModelError(f"{model}: cannot be loaded ({line}); {advice}") from error

    def pixels(pictures: Sequence[Any]) -> Tensor:
        made: Tensor = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return made

    return config.model_type, loaded.to(at).eval().requires_grad_(False), tokenizer, pixels


def _processor(kind: str) -> Any:
    """The image processor of a type of model that works on PIL images, without torchvision."""
    names = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "blip": "BlipImageProcessor"}
    name = names[kind]
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


class Tokens:
    """Captions => token ids that fit the model's window.

    Args:
        tokenizer: Of the model.
        window: Tokens that the model takes.
        truncate: Whether longer captions lose their end; else they are refused.
        fill: Whether all are padded to the whole window, as SigLIP was trained.
    """

    def __init__(self, tokenizer: Any, window: int, truncate: bool, fill: bool = False) -> None:
        self.tokenizer, self.window, self.truncate, self.fill = tokenizer, window, truncate, fill

    def check(self, texts: Sequence[str]) -> None:
        """Refuses captions that are too long.

        Raises:
            TextError: If one is.
        """
        if self.truncate:
            return
        distinct = list(dict.fromkeys(texts))
        for text, ids in zip(distinct, self.tokenizer(distinct)["input_ids"], strict=True):
            if len(ids) > self.window:
                raise TextError(
                    f"got a caption of {len(ids)} tokens, expected at most {self.window}: {text[:60]!r}...; shorten "
                    "it, or give truncate=True to leave its end out"
                )

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """(n, tokens) of ``input_ids`` and ``attention_mask``, padded on the right."""
        padding = "max_length" if self.fill else True
        made = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.window, return_tensors="pt"
        )
        return {k: made[k] for k in ("input_ids", "attention_mask") if k in made}


class TwoTowers(Baseline):
    """CLIP or SigLIP zero-shot: the scaled cosine of the embeddings of picture and caption (their logit).

    Args:
        model: ``clip-tiny``, a folder, or a name on the hub.
        device: Default: the first GPU if there is one, else the CPU.
        batch_size: Pictures or captions at once.
        truncate: Whether captions beyond the model's window lose their end; else they are refused.

    Raises:
        ModelError: If the model cannot be loaded.
    """

    kinds: Mapping[str, str] = {"clip": "CLIPModel", "siglip": "SiglipModel"}

    def __init__(
        self,
        model: str = "clip-tiny",
        *,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        truncate: bool = False,
    ) -> None:
        self.model_name = str(model)
        self.kind, self.model, tokenizer, self._pixels = load_parts(self.model_name, self.kinds, device)
        window = int(self.model.config.text_config.max_position_embeddings)
        self.tokens = Tokens(tokenizer, window, truncate, fill=self.kind == "siglip")
        self.batch_size = batch_size
        self._images = Encoded(self.embed_images, batch_size)
        self._texts = Encoded(self.embed_texts, batch_size)

    @property
    def config(self) -> Mapping[str, Any]:
        return {"baseline": self.name, "model": self.model_name, "truncate": self.tokens.truncate}

    # Encoding

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """RGB pictures => (n, 3, h, w) on the model's device."""
        return self._pixels(pictures).to(self.model.device)

    def embed_images(self, pictures: Sequence[Any]) -> Tensor:
        """RGB pictures => unit vectors (n, d) float32."""
        return self.embed_pixels(self.pixels(pictures))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) => unit vectors (n, d) float32."""
        return _unit(self.model.get_image_features(pixel_values=pixels))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Captions => unit vectors (n, d) float32."""
        made = self.tokens(texts)
        if self.kind == "siglip":  # was trained without a mask
            made.pop("attention_mask", None)
        return _unit(self.model.get_text_features(**{k: v.to(self.model.device) for k, v in made.items()}))

    @property
    def scale(self) -> float:
        """What cosines are multiplied by."""
        return float(self.model.logit_scale.exp())

    def forget(self) -> Self:
        """Empties the caches, for the towers have changed."""
        self._images = Encoded(self.embed_images, self.batch_size)
        self._texts = Encoded(self.embed_texts, self.batch_size)
        return self

    def embeddings(self, pairs: Sequence[Pair], progress: bool = False) -> tuple[Tensor, Tensor]:
        """Unit vectors of the picture and of the caption of each pair: (n, d) each, on the CPU."""
        self.tokens.check([text for _, text in pairs])
        image, text = [], []
        with tqdm(total=len(pairs), desc="scoring", unit="pair", disable=not progress) as bar:
            for part in batched(pairs, 1024):
                keys, pictures = pictures_of([i for i, _ in part])
                images = self._images(pictures)
                texts = self._texts({t: t for _, t in part})
                image += [images[key] for key in keys]
                text += [texts[t] for _, t in part]
                bar.update(len(part))
        return torch.stack(image).float().cpu(), torch.stack(text).float().cpu()

    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        image, text = self.embeddings(pairs, progress)
        cosine = (image * text).sum(1)
        bias = float(self.model.logit_bias) if self.kind == "siglip" else 0.0
        found: np.ndarray = (self.scale * cosine + bias).numpy()
        return found


class Clip(TwoTowers):
    """CLIP zero-shot."""

    name = "clip"
    kinds: Mapping[str, str] = {"clip": "CLIPModel"}


class Siglip(TwoTowers):
    """SigLIP zero-shot."""

    name = "siglip"
    kinds: Mapping[str, str] = {"siglip": "SiglipModel"}

    def __init__(self, model: str = "google/siglip-base-patch16-224", **options: Any) -> None:
        super().__init__(model, **options)


def _unit(features: Any) -> Tensor:
    """Projected features, bare or as the pooled output of a tower => unit vectors."""
    found = features if isinstance(features, Tensor) else features.pooler_output
    return F.normalize(found.float(), dim=-1)
