"""What an explanation is: maps of words over a picture, shares of a score, and the differences of two; no torch.

:mod:`dsd.explain` makes them, :mod:`dsd.pictures` draws them. They go to JSON and back, so that they can be served.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from dsd.contracts import OptionError, TextError

Method = Literal["joint", "agreement", "evidence", "effect", "attention", "raw-attention"]

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class ExplainConfig:
    """How maps are made.

    Attributes:
        method: What a word's map shows, one of :data:`METHODS` (see :mod:`dsd.explain`).
        timesteps: Integers on the model's training grid; None: six over its middle three fifths, where maps are best.
        draws: Draws of noise a timestep, which are averaged: more make maps steadier, and take longer.
        layers: For the attention methods: patterns of layers (:func:`dsd.probe.select_layers`); None takes all.
        heads: For the attention methods: numbers of the heads of each layer; None takes all.
        words: Whether to find each word's share of the score too, which takes one more scored caption a word.
    """

    method: Method = "joint"
    timesteps: tuple[int, ...] | None = None
    draws: int = 4
    layers: tuple[str, ...] | None = None
    heads: tuple[int, ...] | None = None
    words: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"got explanation method {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 1 <= self.draws <= 64:
            raise OptionError(f"got {self.draws} draws of noise, expected 1 to 64")
        for name in ("timesteps", "layers", "heads"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise OptionError(f"got no {name}, expected at least one; leave it out for the default")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Phrase:
    """A run of a caption's words with a map of its own.

    Attributes:
        text: The words, joined by spaces.
        start, stop: Which words: ``words[start:stop]``.
        map: (h, w) float32 in 0..1, as the maps of words are.
    """

    text: str
    start: int
    stop: int
    map: np.ndarray


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why a caption fits a picture as well as it does.

    Attributes:
        image: The picture as the model saw it, PIL RGB.
        text: The caption.
        words: Its words in order, as the tokenizer tells them apart; start, end and padding are no words.
        maps: (n_words, h, w) float32 in 0..1 on the picture's own pixels; each word's largest value is 1 (all zero if
            it is nowhere).
        strength: (n_words,) float32, each map's largest value in the method's own unit, so that
            ``strength[:, None, None] * maps`` can be compared between words.
        phrases: Noun phrases, or those that were asked for.
        score: The pair's score, as the matcher gives it.
        by_timestep: Of each of the score's timesteps its share; they sum to the score.
        by_layer: Of each layer that the score probes its share, and ``denoising``; they sum to the score.
        by_word: (n_words,) float32, what the score loses without the word: the score less that of the caption without
            it. Words need each other, so these do not sum to the score. NaN where a caption of no words has no score.
        crop: (left, top, right, bottom) of ``image`` in the given picture's own pixels.
        config: Everything that decides the explanation, plain values.
    """

    image: Image.Image
    text: str
    words: tuple[str, ...]
    maps: np.ndarray
    strength: np.ndarray
    phrases: tuple[Phrase, ...]
    score: float
    by_timestep: Mapping[int, float]
    by_layer: Mapping[str, float]
    by_word: np.ndarray
    crop: tuple[float, float, float, float]
    config: Mapping[str, Any] = field(default_factory=dict)

    def find(self, phrase: str) -> tuple[int, int]:
        """Where a phrase stands among the words: ``words[start:stop]``, the first place of several.

        Raises:
            TextError: The caption does not hold it.
        """
        return find_phrase(self.words, phrase)

    def to_dict(self, *, side: int | None = 64, image: bool = True) -> dict[str, Any]:
        """Plain values for JSON.

        Args:
            side: Maps larger than so many pixels a side are averaged down to it; None keeps them.
            image: Whether to put the picture in, as a data URI of a PNG.
        """
        return {
            "text": self.text,
            "words": list(self.words),
            "maps": [_rows(m, side) for m in self.maps],
            "strength": [float(v) for v in self.strength],
            "phrases": [
                {"text": p.text, "start": p.start, "stop": p.stop, "map": _rows(p.map, side)} for p in self.phrases
            ],
            "score": self.score,
            "by_timestep": {str(t): v for t, v in self.by_timestep.items()},
            "by_layer": dict(self.by_layer),
            "by_word": [None if np.isnan(v) else float(v) for v in self.by_word],
            "crop": list(self.crop),
            "config": dict(self.config),
            **({"image": data_uri(self.image)} if image else {}),
        }


@dataclass(frozen=True)
class Change:
    """Where two captions differ, and how much of the difference of their scores is due to it.

    Attributes:
        a, b: The words there in each caption, joined by spaces; one of them may be empty.
        span_a, span_b: Which words: ``words[start:stop]`` of each caption.
        share: Shares of all changes sum to the difference of the scores; above zero speaks for the first caption.
    """

    a: str
    b: str
    span_a: tuple[int, int]
    span_b: tuple[int, int]
    share: float


@dataclass(frozen=True, eq=False)
class TextDifference:
    """Why one caption fits a picture better than another; with the captions exchanged, every sign changes.

    Attributes:
        a, b: The explanations of both captions.
        difference: Score of the first less that of the second.
        map: (h, w) float32 in -1..1, above zero where the first explains the picture better; its largest magnitude
            is 1.
        strength: That magnitude, in squared error of the noise, averaged over its channels.
        changes: Where the captions differ, and each place's share of the difference.
        by_timestep, by_layer: The differences of the shares.
    """

    a: Explanation
    b: Explanation
    difference: float
    map: np.ndarray
    strength: float
    changes: tuple[Change, ...]
    by_timestep: Mapping[int, float]
    by_layer: Mapping[str, float]

    def to_dict(self, *, side: int | None = 64, image: bool = True) -> dict[str, Any]:
        """Plain values for JSON; see :meth:`Explanation.to_dict`."""
        return {
            "a": self.a.to_dict(side=side, image=image),
            "b": self.b.to_dict(side=side, image=False),
            "difference": self.difference,
            "map": _rows(self.map, side),
            "strength": self.strength,
            "changes": [asdict(change) for change in self.changes],
            "by_timestep": {str(t): v for t, v in self.by_timestep.items()},
            "by_layer": dict(self.by_layer),
        }


@dataclass(frozen=True, eq=False)
class ImageDifference:
    """Why one picture fits a caption better than another; with the pictures exchanged, every sign changes.

    Attributes:
        a, b: The explanations of both pictures; strengths of their maps can be compared.
        difference: Score of the first less that of the second.
        by_word: (n_words,) float32, how much more the first picture's score needs each word.
        by_timestep, by_layer: The differences of the shares.
    """

    a: Explanation
    b: Explanation
    difference: float
    by_word: np.ndarray
    by_timestep: Mapping[int, float]
    by_layer: Mapping[str, float]

    def to_dict(self, *, side: int | None = 64, image: bool = True) -> dict[str, Any]:
        """Plain values for JSON; see :meth:`Explanation.to_dict`."""
        return {
            "a": self.a.to_dict(side=side, image=image),
            "b": self.b.to_dict(side=side, image=image),
            "difference": self.difference,
            "by_word": [None if np.isnan(v) else float(v) for v in self.by_word],
            "by_timestep": {str(t): v for t, v in self.by_timestep.items()},
            "by_layer": dict(self.by_layer),
        }


_BETWEEN = frozenset(
    "a an the this that these those some any no and or but not with without of to from in on at by for as into onto "
    "over under above below beneath behind beside besides between near next inside outside within around across "
    "through against off up down left right top bottom middle centre center is are was were be being been am has have "
    "had do does did it its there here he she they his her their who which what where how many than then while "
    "overlapping picture photo photograph image".split()
)
"""Words that end a noun phrase, or are no part of one."""


def noun_phrases(words: Sequence[str]) -> list[tuple[int, int]]:
    """Runs of neighbouring content words, such as "red circle": (start, stop) of each, of one word or more.

    What separates them is a short list of English function and place words, punctuation and the like; no grammar is
    parsed.
    """
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for i, word in enumerate([*words, ""]):
        inside = bool(re.search(r"\w", word)) and word.lower() not in _BETWEEN
        if inside and start is None:
            start = i
        if not inside and start is not None:
            spans.append((start, i))
            start = None
    return spans


def find_phrase(words: Sequence[str], phrase: str) -> tuple[int, int]:
    """The first place of a phrase among words: (start, stop).

    Raises:
        TextError: It is not there.
    """
    wanted = re.findall(r"\w+|[^\w\s]+", phrase.lower())
    spelled = [w.lower() for w in words]
    for start in range(len(spelled)):
        # a word of the tokenizer's may be part of one of ours, or several
        joined = ""
        for stop in range(start, len(spelled)):
            joined += spelled[stop]
            if wanted and joined == "".join(wanted):
                return start, stop + 1
    raise TextError(f"got the phrase {phrase!r}, expected words that stand together in the caption {' '.join(words)!r}")


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG in a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _rows(values: np.ndarray, side: int | None) -> list[list[float]]:
    """A map as nested lists of four decimals, averaged down to at most ``side`` pixels a side."""
    if side is not None and max(values.shape) > side:
        size = tuple(max(1, round(n * side / max(values.shape))) for n in values.shape[::-1])
        values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BOX))
    return [[round(float(v), 4) for v in row] for row in values]
