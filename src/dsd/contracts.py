"""What the parts of the library promise each other: examples, score tables, the matcher protocol, errors.

Imports nothing outside the standard library, so that tasks, metrics and evaluation work with any matcher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    ImageInput = str | PathLike[str] | Image | np.ndarray
else:
    ImageInput = Any

Pair = tuple[ImageInput, str]
"""One image and one caption."""


class DsdError(Exception):
    """A request that cannot be met; the message says what was got, what was expected and what to do.

    The command line prints it as one line and exits with status 2.
    """


class ImageError(DsdError):
    """An image that is missing, unreadable or outside the limits."""


class TextError(DsdError):
    """A caption that cannot be scored."""


class ManifestError(DsdError):
    """A manifest or data file that breaks its format; the message names file and line."""


class ModelError(DsdError):
    """A model that cannot be found, loaded or probed."""


class AdapterError(DsdError):
    """An adapter that cannot be read, or belongs to another base model."""


class OptionError(DsdError):
    """An option outside what it may be."""


class ServiceError(DsdError):
    """A server that cannot be reached, is busy or stopping, or refuses who asks."""


@dataclass(frozen=True)
class Example:
    """One question to a matcher: which of these images and texts belong together?

    Many images and one text make an image choice, one image and many texts a text choice, 2 x 2 a Winoground group.

    Attributes:
        id: Unique within its dataset.
        images: Paths, PIL images or uint8 arrays (h, w, 3).
        texts: Captions.
        positives: (image index, text index) pairs that match; every other pair does not.
        tags: Groups that metrics are also given for.
    """

    id: str
    images: tuple[ImageInput, ...]
    texts: tuple[str, ...]
    positives: tuple[tuple[int, int], ...]
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.images or not self.texts or not self.positives:
            raise ManifestError(
                f"example {self.id!r}: got {len(self.images)} images, {len(self.texts)} texts and "
                f"{len(self.positives)} positives, expected at least one of each"
            )
        for pair in self.positives:
            if len(pair) != 2 or not (0 <= pair[0] < len(self.images) and 0 <= pair[1] < len(self.texts)):
                raise ManifestError(
                    f"example {self.id!r}: got positive {list(pair)}, expected [image, text] with "
                    f"0 <= image < {len(self.images)} and 0 <= text < {len(self.texts)}"
                )

    @property
    def pairs(self) -> list[Pair]:
        """All (image, text) pairs, row by row of the score table."""
        return [(image, text) for image in self.images for text in self.texts]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of images against texts.

    Attributes:
        scores: (n_images, n_texts) float32; higher is a better match.
        images: A name for each row.
        texts: The captions, a column each.
        config: The resolved configuration that made the scores.
    """

    scores: np.ndarray
    images: tuple[str, ...]
    texts: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": list(self.images),
            "texts": list(self.texts),
            "scores": [[float(s) for s in row] for row in self.scores],
            **self.config,
        }


@dataclass(frozen=True)
class Ranked:
    """One candidate of a ranking.

    Attributes:
        index: Among the candidates.
        candidate: The text, or the image's name.
        score: Higher is a better match; with a budget, among captions up to a number that all share, and an estimate
            for those that left the race.
        interval: With a budget, 95 % interval of what the whole score would be.
        passes: With a budget, the passes that were spent on it.
    """

    index: int
    candidate: str
    score: float
    interval: tuple[float, float] | None = None
    passes: int | None = None


@runtime_checkable
class MatcherProtocol(Protocol):
    """What every method that matches images and texts offers, ours and the baselines."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Everything that decides the scores, as plain values; saved with every result."""
        ...

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Scores each pair, independently of the others: (n,) float32, higher is better."""
        ...

    def score(self, images: Sequence[ImageInput], texts: Sequence[str]) -> ScoreTable:
        """Scores every image against every text."""
        ...


def choice_of(query: ImageInput, candidates: Sequence[Any]) -> tuple[list[Pair], list[str]]:
    """The pairs of a choice, captions for an image or images for a caption, and a name for each candidate.

    A string is an image if a file of that name exists, and a caption wherever the candidates are images already.

    Raises:
        OptionError: If there are no candidates.
        ImageError: If query and candidates are all texts.
    """
    if not candidates:
        raise OptionError("got no candidates, expected at least one")
    if isinstance(query, str) and not any(not isinstance(c, str) or _is_file(c) for c in (query, *candidates)):
        raise ImageError(
            f"got no image file in {query!r} nor in any candidate, expected an image to rank texts for, or images "
            "to rank for a text; check the path"
        )
    if isinstance(query, str) and (any(not isinstance(c, str) for c in candidates) or not _is_file(query)):
        return [(image, query) for image in candidates], [image_name(image, i) for i, image in enumerate(candidates)]
    return [(query, text) for text in candidates], list(candidates)


def _is_file(text: str) -> bool:
    try:
        return isfile(text)
    except ValueError:  # a null byte is in no path
        return False


def image_name(image: ImageInput, index: int) -> str:
    """A name to show for an image: its path, or its number."""
    return str(image) if isinstance(image, str | PathLike) else f"image {index}"


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def inside(folder: Path, name: str) -> Path | None:
    """``folder / name`` if that stays within the folder, else None."""
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None
