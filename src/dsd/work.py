"""The pairs of many examples as work: each distinct pair once, image by image, in parts that are kept when finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from tqdm import tqdm

from dsd.contracts import Example, ImageInput, MatcherProtocol, ModelError, Pair

_PART = 128
"""Pairs of a part, and so at most what is computed again after a stop; more where there would be many parts."""
_MOST_PARTS = 1000
_WARM_UP = (8, 24)
"""Pairs of the first parts: those after which a model has warmed up, and those by which the time is estimated."""


@dataclass(frozen=True)
class Cost:
    """What is left of an evaluation, told after its first parts.

    Attributes:
        pairs: Distinct pairs to score.
        images, texts: Distinct images and texts among them.
        done: Pairs that are scored already.
        measured: Pairs by which the time is estimated.
        seconds: That the pairs will take, if they take as long as those measured.
    """

    pairs: int
    images: int
    texts: int
    done: int
    measured: int
    seconds: float


class Store(Protocol):
    """Keeps the scores of finished parts."""

    def read(self, part: int, size: int) -> tuple[np.ndarray, float] | None:
        """The scores, (size,) float32, and the seconds that they took; None if the part is not finished."""
        ...

    def write(self, part: int, scores: np.ndarray, seconds: float) -> None:
        """Takes a finished part."""
        ...


class Work:
    """The distinct pairs of examples in the order in which they are scored, in parts.

    All pairs of an image are in one part, or in parts of its own. So what a matcher encodes together is the same
    whether it was stopped before or not, and with it the last bit of the scores.

    Args:
        examples: At least one.
        pictures: For each, a name of each image; images are the same where their names are.

    Attributes:
        places: For each example, where its scores are among all, (n_images, n_texts) int.
    """

    def __init__(self, examples: Sequence[Example], pictures: Sequence[Sequence[str]]) -> None:
        shown: dict[str, int] = {}
        said: dict[str, int] = {}
        self._images: list[ImageInput] = []
        for example, names in zip(examples, pictures, strict=True):
            for image, name in zip(example.images, names, strict=True):
                if name not in shown:
                    shown[name] = len(shown)
                    self._images.append(image)
            for text in example.texts:
                said.setdefault(text, len(said))
        self._texts = list(said)
        codes = [
            np.array([shown[name] for name in names])[:, None] * len(said) + np.array([said[text] for text in e.texts])
            for e, names in zip(examples, pictures, strict=True)
        ]
        self._codes, inverse = np.unique(np.concatenate([code.ravel() for code in codes]), return_inverse=True)
        ends = np.cumsum([code.size for code in codes])[:-1]
        self.places = [
            place.reshape(code.shape) for code, place in zip(codes, np.split(inverse.ravel(), ends), strict=True)
        ]
        size = max(_PART, len(self._codes) // _MOST_PARTS)
        self._bounds = [0, *_ends(np.bincount(self._codes // len(said)), size)]

    def do(
        self,
        matcher: MatcherProtocol,
        store: Store | None = None,
        *,
        progress: bool = False,
        announce: Callable[[Cost], None] | None = None,
    ) -> tuple[np.ndarray, float]:
        """The scores of all pairs, float32, and the seconds that they took.

        Args:
            matcher: Scores the parts that are not in the store.
            store: Without one, all of them.
            progress: Whether to show a progress bar, on stderr.
            announce: Is told once what is left to do, when two parts are done and if others are not.

        Raises:
            ModelError: The matcher did not give one score a pair.
        """
        scores = np.zeros(len(self._codes), np.float32)
        seconds = 0.0
        left: list[tuple[int, int, int]] = []
        for part, (start, end) in enumerate(pairwise(self._bounds)):
            kept = None if store is None else store.read(part, end - start)
            if kept is None:
                left.append((part, start, end))
            else:
                scores[start:end] = kept[0]
                seconds += kept[1]
        done = len(scores) - sum(end - start for _, start, end in left)
        with tqdm(total=len(scores), initial=done, desc="scoring", unit="pair", disable=not progress) as bar:
            for k, (part, start, end) in enumerate(left):
                began = time.perf_counter()
                found = np.asarray(matcher.predict([self._pair(c) for c in self._codes[start:end]]), np.float32)
                took = time.perf_counter() - began
                if found.shape != (end - start,):
                    raise ModelError(f"got scores of shape {found.shape}, expected one for each of {end - start} pairs")
                scores[start:end] = found
                seconds += took
                if store is not None:
                    store.write(part, found, took)
                bar.update(end - start)
                # the first part is slow, for whatever is loaded or compiled when it is first used
                if announce is not None and k == 1 and len(left) > 2:
                    announce(self._cost(np.concatenate([self._codes[s:e] for _, s, e in left[2:]]), end - start, took))
        return scores, seconds

    def _cost(self, codes: np.ndarray, measured: int, took: float) -> Cost:
        images, texts = np.divmod(codes, len(self._texts))
        return Cost(
            pairs=len(codes),
            images=len(np.unique(images)),
            texts=len(np.unique(texts)),
            done=len(self._codes) - len(codes),
            measured=measured,
            seconds=took / measured * len(codes),
        )

    def _pair(self, code: int) -> Pair:
        image, text = divmod(int(code), len(self._texts))
        return self._images[image], self._texts[text]


def _ends(counts: np.ndarray, size: int) -> list[int]:
    """Where parts end, of images with so many pairs each: (n_images,) int => increasing numbers up to their sum."""
    ends: list[int] = []
    start = end = 0
    for count in counts.tolist():
        most = (*_WARM_UP, size)[min(len(ends), len(_WARM_UP))]
        if end > start and end + count - start > most:
            ends.append(end)
            start = end
        end += count
        if count > size:
            ends += [*range(start + size, end, size), end]
            start = end
    return ends if end == start else [*ends, end]
