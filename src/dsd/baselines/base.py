"""What all baselines share: a score table from pairs, checked input, and a way to be taught and kept."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dsd.contracts import Example, ImageInput, ModelError, OptionError, Pair, ScoreTable, image_name
from dsd.images import content_hash, load_image
from dsd.scorer import Cache, check_text


class Baseline(ABC):
    """A method behind :class:`dsd.contracts.MatcherProtocol`; a score depends on its own pair alone."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Everything that decides the scores, as plain values; ``baseline`` names the method."""

    @abstractmethod
    def _scores(self, pairs: Sequence[Pair], progress: bool) -> np.ndarray:
        """(n,) of at least one pair whose captions have been checked."""

    def fit(
        self,
        examples: Sequence[Example],
        validation: Sequence[Example] | None = None,
        *,
        seed: int | None = None,
        progress: bool = False,
    ) -> Self:
        """Teaches it from labelled examples, if it can learn.

        Args:
            examples: In which right and wrong candidates compete.
            validation: Examples to stop by; None holds out ``examples``.
            seed: Of whatever is drawn; None takes the method's own.
            progress: Whether to show a bar on stderr.

        Raises:
            OptionError: If it learns nothing, or there is nothing to learn from.
        """
        raise OptionError(f"got examples for {self.name}, expected a baseline that learns; use it as it is")

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Scores (image, caption) pairs: (n,) float32, higher is a better match.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            ModelError: If the model gives numbers that are not finite.
        """
        for _, text in pairs:
            check_text(text)
        if not pairs:
            return np.zeros(0, np.float32)
        scores = np.asarray(self._scores(pairs, progress), np.float32)
        if not np.isfinite(scores).all():
            first = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise ModelError(
                f"got a score that is not finite for the caption {first[1]!r}, expected a number; load {self.name}'s "
                "model in float32, and check its weights"
            )
        return scores

    def score(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str], *, progress: bool = False
    ) -> ScoreTable:
        """Scores every image against every caption; one image or one caption may be given by itself.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            OptionError: If there are no images or no texts.
        """
        pictures, captions = listed(images, texts)
        flat = self.predict([(image, text) for image in pictures for text in captions], progress=progress)
        return self._table(flat.reshape(len(pictures), len(captions)), pictures, captions)

    def _table(self, scores: np.ndarray, images: Sequence[Any], texts: Sequence[str]) -> ScoreTable:
        names = tuple(image_name(image, i) for i, image in enumerate(images))
        return ScoreTable(np.asarray(scores, np.float32), names, tuple(texts), self.config)


def listed(images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> tuple[list[ImageInput], list[str]]:
    """Images and texts as lists, at least one of each."""
    pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    captions = [texts] if isinstance(texts, str) else list(texts)
    if not pictures or not captions:
        raise OptionError(f"got {len(pictures)} images and {len(captions)} texts, expected at least one of each")
    return pictures, captions


def hashed(*parts: str) -> int:
    """63 bits decided by the parts alone."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "big") >> 1


class Encoded:
    """Tensors of images or captions, each distinct one encoded once.

    Args:
        encode: Of a list of items their tensors, one each along the first dimension.
        batch: Items a call.
    """

    def __init__(self, encode: Callable[[list[Any]], Tensor], batch: int) -> None:
        self._encode, self._batch = encode, batch
        # large vision towers have states of megabytes a picture
        self._cache: Cache[Tensor] = Cache(8192, 2**30, lambda value: value.numel() * value.element_size())

    @torch.no_grad()
    def __call__(self, items: Mapping[str, Any]) -> dict[str, Tensor]:
        """Items by key => their tensors by key."""
        found = {key: value for key in items if (value := self._cache.get(key)) is not None}
        missing = [key for key in items if key not in found]
        for start in range(0, len(missing), self._batch):
            part = missing[start : start + self._batch]
            for key, value in zip(part, self._encode([items[key] for key in part]), strict=True):
                self._cache.put(key, value)
                found[key] = value
        return found


def pictures_of(images: Sequence[ImageInput]) -> tuple[list[str], dict[str, Image]]:
    """Of each image its content's key, and the distinct pictures by key; what is one object or path is read once.

    Raises:
        ImageError: If one cannot be read.
    """
    keys: dict[Hashable, str] = {}
    found: dict[str, Image] = {}
    order = []
    for image in images:
        place: Hashable = str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else id(image)
        if place not in keys:
            picture = load_image(image)
            keys[place] = content_hash(picture)
            found.setdefault(keys[place], picture)
        order.append(keys[place])
    return order, found
