"""A matcher's scores on examples, and what they are worth: everything needed to read, compare and repeat a result.

Knows the matcher protocol only; no deep-learning library is imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dsd import images
from dsd.contracts import Example, ImageInput, ManifestError, MatcherProtocol, ModelError, OptionError
from dsd.metrics import evaluate_scores

Metric = Mapping[str, float]
"""``value`` and its 95 % interval ``low``, ``high``, over ``n`` examples."""

_PACKAGES = ("discriminative-diffusion", "numpy", "pillow", "torch", "diffusers", "transformers")


@dataclass(frozen=True, eq=False)
class Result:
    """One matcher on one set of examples.

    Attributes:
        metrics: Each metric by name; always ``accuracy``, others as they fit (:func:`dsd.metrics.evaluate_scores`).
        by_tag: The accuracy within each tag.
        ties: How many choices had a shared best score.
        ids: Of the examples, in order.
        scores: For each example, (n_images, n_texts) float32.
        config: The matcher's, everything that decides its scores.
        dataset: Checksum of the examples, equal where two results may be compared example by example.
        seconds: Spent scoring.
        versions: Of Python and the packages that were installed.
    """

    metrics: Mapping[str, Metric]
    by_tag: Mapping[str, Mapping[str, Metric]]
    ties: int
    ids: tuple[str, ...]
    scores: tuple[np.ndarray, ...]
    config: Mapping[str, Any]
    dataset: str
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a score that is not finite becomes None (NaN), "inf" or "-inf"."""
        examples = [
            {"id": name, "scores": [[_plain(s) for s in row] for row in table]}
            for name, table in zip(self.ids, self.scores, strict=True)
        ]
        return {
            "metrics": {name: dict(metric) for name, metric in self.metrics.items()},
            "by_tag": {tag: {k: dict(m) for k, m in found.items()} for tag, found in self.by_tag.items()},
            "ties": self.ties,
            "dataset": self.dataset,
            "seconds": self.seconds,
            "config": dict(self.config),
            "versions": dict(self.versions),
            "examples": examples,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Writes JSON whole or not at all, making folders as needed.

        Raises:
            OptionError: The path cannot be written.
        """
        # a matcher of someone else's may put a path or a dtype into its configuration
        write_text(path, json.dumps(self.to_dict(), indent=1, default=str) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Result:
        """Reads what :meth:`save` wrote.

        Raises:
            ManifestError: The file is missing or is no saved result.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            examples = data["examples"]
            return cls(
                metrics=data["metrics"],
                by_tag=data["by_tag"],
                ties=data["ties"],
                ids=tuple(e["id"] for e in examples),
                scores=tuple(
                    np.array([[_number(s) for s in row] for row in e["scores"]], np.float32) for e in examples
                ),
                config=data["config"],
                dataset=data["dataset"],
                seconds=data["seconds"],
                versions=data["versions"],
            )
        except OSError as error:
            reason = error.strerror or "unreadable"
            raise ManifestError(f"{path}: got no result ({reason}), expected a file saved by evaluation") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ManifestError(f"{path}: got another format ({reason}), expected a file saved by evaluation") from None


def evaluate(matcher: MatcherProtocol, examples: Sequence[Example], *, progress: bool = False, seed: int = 0) -> Result:
    """Scores all pairs of all examples in one call of the matcher, and measures the result.

    Every image is opened first, so that a broken one is found before hours of scoring.

    Args:
        matcher: Any method behind the protocol.
        examples: At least one that holds a choice.
        progress: Whether the matcher shows its progress, on stderr.
        seed: Of the bootstrap.

    Raises:
        ManifestError: There is no example with a choice.
        ImageError: An image cannot be read.
        ModelError: The matcher did not give one score a pair.
    """
    if not examples:
        raise ManifestError("got no examples, expected at least one; check the manifest or the count")
    dataset = dataset_checksum(examples)
    pairs = [pair for example in examples for pair in example.pairs]
    start = time.perf_counter()
    flat = np.asarray(matcher.predict(pairs, progress=progress), np.float32)
    seconds = time.perf_counter() - start
    if flat.shape != (len(pairs),):
        raise ModelError(f"got scores of shape {flat.shape}, expected one for each of {len(pairs)} pairs")
    ends = np.cumsum([len(e.images) * len(e.texts) for e in examples])[:-1]
    tables = [part.reshape(len(e.images), len(e.texts)) for e, part in zip(examples, np.split(flat, ends), strict=True)]
    return Result(
        **evaluate_scores(examples, tables, seed=seed),
        ids=tuple(e.id for e in examples),
        scores=tuple(tables),
        config=dict(matcher.config),
        dataset=dataset,
        seconds=seconds,
        versions=installed_versions(),
    )


def dataset_checksum(examples: Sequence[Example]) -> str:
    """32 hex digits over ids, texts, positives and the pixels of the images, wherever those are stored.

    Raises:
        ImageError: An image cannot be read.
    """
    known: dict[str | int, str] = {}

    def pixels(image: ImageInput) -> str:
        # objects are alive as long as their example, so that their number stays theirs
        key = str(image) if isinstance(image, str | PathLike) else id(image)
        if key not in known:
            known[key] = images.content_hash(images.load_image(image))
        return known[key]

    digest = hashlib.blake2b(digest_size=16)
    for e in examples:
        content = [e.id, list(e.texts), sorted({(i, t) for i, t in e.positives}), [pixels(image) for image in e.images]]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes a file whole or not at all, making folders as needed.

    Raises:
        OptionError: The path cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text.encode("utf-8", "replace"))
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OptionError(f"{path}: got a path that cannot be written ({reason}); choose another") from None


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _plain(score: float) -> float | str | None:
    if math.isnan(score):
        return None
    return float(score) if math.isfinite(score) else str(float(score))


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
