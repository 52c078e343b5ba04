"""A matcher's scores on examples, and what they are worth: everything needed to read, compare and repeat a result.

Knows the matcher protocol only; no deep-learning library is imported here. Each distinct pair is scored once, in parts.
With a folder to write to, each part is a file that appears whole, so that an evaluation that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dsd import images
from dsd.contracts import Example, ImageInput, ManifestError, MatcherProtocol, OptionError
from dsd.metrics import (
    choices,
    evaluate_scores,
    mcnemar,
    paired_difference,
    paired_separation,
    samples,
    tagged,
)
from dsd.work import Cost, Work

Metric = Mapping[str, float]
"""``value`` and its 95 % interval ``low``, ``high``, over ``n`` examples."""

RESULT = "result.json"
SCORES = "scores.parquet"
_REQUEST = "request.json"
_PARTS = "parts"

_PACKAGES = ("discriminative-diffusion", "numpy", "pillow", "torch", "diffusers", "transformers")


@dataclass(frozen=True, eq=False)
class Result:
    """One matcher on one set of examples.

    Attributes:
        metrics: Each metric by name; always ``accuracy``, others as they fit (:func:`dsd.metrics.evaluate_scores`).
        by_tag: Metrics within each tag, those that are means over examples.
        ties: How many choices had a shared best score.
        nans: How many scores are NaN.
        ids: Of the examples, in order.
        positives: Of each example, the (image, text) pairs that match.
        tags: Of each example.
        scores: For each example, (n_images, n_texts) float32.
        config: The matcher's, everything that decides its scores.
        dataset: Checksum of the examples, equal where two results may be compared example by example.
        seconds: Spent scoring.
        versions: Of Python and the packages that were installed.
        request: What else the caller wanted to be known of how the result was made.
        credits: For each example, how right each pair is, (n_images, n_texts) float in 0..1, where there is such a
            thing; None if for no example.
    """

    metrics: Mapping[str, Metric]
    by_tag: Mapping[str, Mapping[str, Metric]]
    ties: int
    nans: int
    ids: tuple[str, ...]
    positives: tuple[tuple[tuple[int, int], ...], ...]
    tags: tuple[tuple[str, ...], ...]
    scores: tuple[np.ndarray, ...]
    config: Mapping[str, Any]
    dataset: str
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    credits: tuple[np.ndarray | None, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a score that is not finite becomes None (NaN), "inf" or "-inf"."""
        examples: list[dict[str, Any]] = [
            {"id": name, "positives": [list(pair) for pair in right], "tags": list(tags), "scores": _plain_rows(table)}
            for name, right, tags, table in zip(self.ids, self.positives, self.tags, self.scores, strict=True)
        ]
        for example, worth in zip(examples, self.credits or (), strict=False):
            if worth is not None:
                example["credits"] = _plain_rows(worth)
        return {
            "metrics": {name: dict(metric) for name, metric in self.metrics.items()},
            "by_tag": {tag: {k: dict(m) for k, m in found.items()} for tag, found in self.by_tag.items()},
            "ties": self.ties,
            "nans": self.nans,
            "dataset": self.dataset,
            "seconds": self.seconds,
            "config": dict(self.config),
            "versions": dict(self.versions),
            "request": dict(self.request),
            "examples": examples,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Writes JSON whole or not at all, making folders as needed.

        Raises:
            OptionError: The path cannot be written.
        """
        # a matcher of someone else's may put a path or a dtype into its configuration
        write_text(path, json.dumps(self.to_dict(), indent=1, default=str) + "\n")

    def save_scores(self, path: str | PathLike[str]) -> None:
        """Writes Parquet, whole or not at all: a row a pair, with the columns ``id``, ``tags`` (of the example),
        ``image``, ``text`` (indices), ``match`` (whether they do) and ``score`` (float32).

        Raises:
            OptionError: pyarrow is not installed, or the path cannot be written.
        """
        check_parquet()
        import pyarrow
        from pyarrow import parquet

        sizes = [table.size for table in self.scores]
        right = [np.zeros(table.shape, bool) for table in self.scores]
        for table, positives in zip(right, self.positives, strict=True):
            table[tuple(np.transpose(positives))] = True
        places = [np.indices(table.shape, np.int32).reshape(2, -1) for table in self.scores]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        columns = {
            "id": pyarrow.array(self.ids, pyarrow.string()).take(owner),
            "tags": pyarrow.array([list(tags) for tags in self.tags], pyarrow.list_(pyarrow.string())).take(owner),
            "image": np.concatenate([rows for rows, _ in places]),
            "text": np.concatenate([columns for _, columns in places]),
            "match": np.concatenate([table.ravel() for table in right]),
            "score": np.concatenate([table.ravel() for table in self.scores]),
        }
        buffer = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(columns, metadata={"dataset": self.dataset}), buffer)
        write_bytes(path, buffer.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Result:
        """Reads what :meth:`save` wrote; of a folder that was evaluated into, the result there.

        Raises:
            ManifestError: The file is missing or is no saved result.
        """
        path = Path(path) / RESULT if Path(path).is_dir() else Path(path)
        try:
            data = json.loads(path.read_text("utf-8"))
            examples = data["examples"]
            credits = [e.get("credits") for e in examples]
            return cls(
                metrics=data["metrics"],
                by_tag=data["by_tag"],
                ties=data["ties"],
                nans=data["nans"],
                ids=tuple(e["id"] for e in examples),
                positives=tuple(tuple((int(i), int(t)) for i, t in e["positives"]) for e in examples),
                tags=tuple(tuple(e["tags"]) for e in examples),
                scores=tuple(_table(e["scores"]) for e in examples),
                config=data["config"],
                dataset=data["dataset"],
                seconds=data["seconds"],
                versions=data["versions"],
                request=data["request"],
                credits=tuple(None if c is None else np.array(c, float) for c in credits) if any(credits) else None,
            )
        except OSError as error:
            reason = error.strerror or "unreadable"
            raise ManifestError(f"{path}: got no result ({reason}), expected a file saved by evaluation") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ManifestError(f"{path}: got another format ({reason}), expected a file saved by evaluation") from None


def evaluate(
    matcher: MatcherProtocol,
    examples: Sequence[Example],
    *,
    progress: bool = False,
    seed: int = 0,
    credits: Sequence[np.ndarray | None] | None = None,
    scale: float | None = None,
    out: str | PathLike[str] | None = None,
    request: Mapping[str, Any] | None = None,
    announce: Callable[[Cost], None] | None = None,
) -> Result:
    """Scores all pairs of all examples, and measures the result.

    Every image is opened first, so that a broken one is found before hours of scoring. Pairs are scored image by image,
    each distinct one once. If that is stopped, even killed, the same call with the same ``out`` goes on: the scores are
    those of a run without the stop, bit by bit where the matcher's scores repeat so.

    Args:
        matcher: Any method behind the protocol.
        examples: At least one that holds a choice.
        progress: Whether to show a progress bar, on stderr.
        seed: Of the bootstrap.
        credits, scale: See :func:`dsd.metrics.evaluate_scores`.
        out: A folder, for ``result.json`` and what is there until it is; a result that is there already is read.
        request: Plain values that decide the result besides the examples, kept with it. A folder of other values is
            refused. Default: the matcher's configuration, and what is passed here.
        announce: Is told once what is left to do, when the first parts are done and if others are not.

    Raises:
        ManifestError: There is no example with a choice, or the folder's result is broken.
        ImageError: An image cannot be read.
        ModelError: The matcher did not give one score a pair.
        OptionError: The folder holds something else, or cannot be written.
    """
    if not examples:
        raise ManifestError("got no examples, expected at least one; check the manifest or the count")
    pictures = _hashes(examples)
    dataset = _checksum(examples, pictures, credits)
    config = dict(matcher.config)
    parts = None
    if out is not None:
        asked = {"matcher": config, "scale": scale, "seed": seed} if request is None else request
        parts = _Parts(Path(out) / _PARTS, claim(out, dataset, asked))
        if (Path(out) / RESULT).exists():
            return Result.load(out)
    work = Work(examples, pictures)
    scores, seconds = work.do(matcher, parts, progress=progress, announce=announce)
    tables = [scores[places] for places in work.places]
    result = Result(
        **evaluate_scores(examples, tables, credits=credits, scale=scale, seed=seed),
        ids=tuple(e.id for e in examples),
        positives=tuple(e.positives for e in examples),
        tags=tuple(e.tags for e in examples),
        scores=tuple(tables),
        config=config,
        dataset=dataset,
        seconds=seconds,
        versions=installed_versions(),
        request=request or {},
        credits=None if credits is None else tuple(credits),
    )
    if parts is not None and out is not None:
        result.save(Path(out) / RESULT)
        parts.clear()
    return result


def claim(out: str | PathLike[str], dataset: str, request: Mapping[str, Any]) -> str:
    """Makes a folder that of one evaluation, or checks that it is; :func:`evaluate` does so before it scores.

    Args:
        out: The folder.
        dataset: As :func:`dataset_checksum` gives it.
        request: As :func:`evaluate` takes it.

    Returns:
        A digest of all that.

    Raises:
        OptionError: The folder holds another evaluation, or cannot be written.
    """
    # as it comes back from JSON, to be compared with what is there
    text = json.dumps({"dataset": dataset, "versions": installed_versions(), **request}, indent=1, default=str) + "\n"
    path = Path(out) / _REQUEST
    asked = json.loads(text)
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        raise OptionError(f"{path}: got a file that cannot be read ({error}); choose another folder") from None
    if found is not None and not isinstance(found, dict):
        raise OptionError(f"{path}: got no request, expected one that an evaluation wrote; choose another folder")
    if found is None and (Path(out) / RESULT).exists():
        raise OptionError(
            f"{out}: got a result whose request is unknown ({_REQUEST} is missing), expected a folder of this "
            "evaluation; choose another"
        )
    if found is not None and found != asked:
        other = [key for key in asked | found if asked.get(key) != found.get(key)]
        raise OptionError(
            f"{out}: got the evaluation of another request (other: {', '.join(other)}), expected one of this; choose "
            "another folder, or delete that one to start anew"
        )
    if found is None:
        write_text(path, text)
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_parquet() -> None:
    """Refuses to go on without pyarrow.

    Raises:
        OptionError: It is not installed.
    """
    if find_spec("pyarrow") is None:
        raise OptionError(
            f"got no pyarrow, expected it for {SCORES}; install it (pip install 'discriminative-diffusion[data]'), or "
            "name a .json file to save to"
        )


def subset(examples: Sequence[Example], count: int, seed: int = 0) -> list[Example]:
    """``count`` examples drawn at random, in the order that they have; fewer are among more of the same seed.

    The draw depends on ids, the seed and ``count`` alone, and is that of :func:`dsd.tasks.few_shot_split`.

    Raises:
        OptionError: There are not so many, or ``count`` is less than 1.
    """
    if not 1 <= count <= len(examples):
        raise OptionError(f"got {count} examples to draw, expected 1 to {len(examples)}, as many as there are")
    order = sorted(range(len(examples)), key=lambda i: random.Random(f"{seed} {examples[i].id}").random())
    return [examples[i] for i in sorted(order[:count])]


def dataset_checksum(examples: Sequence[Example], credits: Sequence[np.ndarray | None] | None = None) -> str:
    """32 hex digits over ids, texts, positives, credits and the pixels of the images, wherever those are stored.

    Raises:
        ImageError: An image cannot be read.
    """
    return _checksum(examples, _hashes(examples), credits)


def _hashes(examples: Sequence[Example]) -> list[list[str]]:
    """What tells the pictures of each example from others: their pixels."""
    known: dict[str | int, str] = {}

    def pixels(image: ImageInput) -> str:
        # objects are alive as long as their example, so that their number stays theirs
        key = str(image) if isinstance(image, str | PathLike) else id(image)
        if key not in known:
            known[key] = images.content_hash(images.load_image(image))
        return known[key]

    return [[pixels(image) for image in example.images] for example in examples]


def _checksum(
    examples: Sequence[Example], pictures: Sequence[Sequence[str]], credits: Sequence[np.ndarray | None] | None
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for i, (e, shown) in enumerate(zip(examples, pictures, strict=True)):
        content: list[Any] = [e.id, list(e.texts), sorted({(i, t) for i, t in e.positives}), list(shown)]
        worth = None if credits is None else credits[i]
        content += [] if worth is None else [_plain_rows(worth)]
        digest.update(json.dumps(content).encode() + b"\n")
    return digest.hexdigest()


class _Parts:
    """Scores of finished parts, a file each, in a folder of one request.

    Args:
        folder: Need not be there.
        request: A digest; files of another do not count.
    """

    def __init__(self, folder: Path, request: str) -> None:
        self._folder, self._request = folder, request

    def read(self, part: int, size: int) -> tuple[np.ndarray, float] | None:
        """The scores, (size,) float32, and the seconds that they took; None if the part is not finished."""
        try:
            data = json.loads(self._path(part).read_text("utf-8"))
            (scores,) = _table([data["scores"]])
            whole = data["request"] == self._request and len(scores) == size
            return (scores, float(data["seconds"])) if whole else None
        except (OSError, ValueError, KeyError, TypeError):  # whatever a crash left there is computed again
            return None

    def write(self, part: int, scores: np.ndarray, seconds: float) -> None:
        data = {"request": self._request, "seconds": seconds, "scores": _plain_rows([scores])[0]}
        write_text(self._path(part), json.dumps(data) + "\n")

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:06d}.json"


# Comparing


@dataclass(frozen=True)
class Disagreement:
    """An example on which two results differ: the share of choices that each won there."""

    id: str
    a: float
    b: float


@dataclass(frozen=True, eq=False)
class PairedComparison:
    """Two results on the same examples. Differences are of the second less the first.

    Attributes:
        metrics: Of each metric, ``a`` and ``b`` as their results have it (None where one has not) and ``difference``:
            ``value``, ``low``, ``high`` and ``p`` (:func:`dsd.metrics.paired_difference`), None for ``ece``.
        mcnemar: Of examples that are right, all of their choices being won (:func:`dsd.metrics.mcnemar`), with their
            number ``n``.
        by_tag: Of each tag, ``metrics`` and ``mcnemar`` within it.
        disagreements: The examples that differ most: by the share of choices won, and among equals by how differently
            the results tell right from wrong, in units of how far each does so on average.
        disagreeing: On how many examples the share of choices won differs.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    mcnemar: Mapping[str, float]
    by_tag: Mapping[str, Mapping[str, Any]]
    disagreements: tuple[Disagreement, ...]
    disagreeing: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "metrics": {name: dict(found) for name, found in self.metrics.items()},
            "mcnemar": dict(self.mcnemar),
            "by_tag": {tag: dict(found) for tag, found in self.by_tag.items()},
            "disagreeing": self.disagreeing,
            "disagreements": [{"id": d.id, "a": d.a, "b": d.b} for d in self.disagreements],
        }


def compare(a: Result, b: Result, *, seed: int = 0, resamples: int = 2000, most: int = 20) -> PairedComparison:
    """Two results on the same examples, paired example by example.

    Args:
        a, b: Measured on the same examples. Tags are those of ``a``; values of ``b`` by tag are of its own.
        seed, resamples: Of the bootstrap.
        most: Examples to name on which they differ.

    Raises:
        OptionError: They were measured on different examples.
    """
    if a.dataset != b.dataset:
        raise OptionError(
            f"got results on different examples (checksums {a.dataset} and {b.dataset}), expected the same examples in "
            "both; evaluate both on the same manifest or task, with the same count, limit and split"
        )
    first, second = (samples(r.scores, r.positives, r.credits) for r in (a, b))

    def sides(within: np.ndarray, of: tuple[Mapping[str, Metric], Mapping[str, Metric]]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys((*of[0], *of[1])):
            difference: Mapping[str, float] | None = None
            if name in first:
                known = within & ~np.isnan(first[name])
                if known.any():  # another tag's examples may be what it is of
                    difference = paired_difference(second[name][known], first[name][known], seed, resamples)
            elif name == "roc-auc":
                difference = paired_separation(b.scores, a.scores, a.positives, seed, resamples)
            found[name] = {"a": of[0].get(name), "b": of[1].get(name), "difference": difference}
        return found

    def exact(within: np.ndarray) -> dict[str, float]:
        known = within & ~np.isnan(first["accuracy"])
        right = [values["accuracy"][known] > 1 - 1e-9 for values in (first, second)]
        return {"n": int(known.sum()), **mcnemar(*right)}

    count = len(first["accuracy"])
    everywhere = np.ones(count, bool)
    members = {tag: of for tag, of in tagged(a.tags, count).items() if tag in a.by_tag}
    gap = np.nan_to_num(np.abs(first["accuracy"] - second["accuracy"]))
    further = np.abs(_margins(a) - _margins(b))
    order = np.lexsort((-further, -gap))[: min(most, int((gap > 0).sum()))]
    names = _names(a)
    return PairedComparison(
        metrics=sides(everywhere, (a.metrics, b.metrics)),
        mcnemar=exact(everywhere),
        by_tag={
            tag: {"metrics": sides(of, (a.by_tag[tag], b.by_tag.get(tag, {}))), "mcnemar": exact(of)}
            for tag, of in members.items()
        },
        disagreements=tuple(
            Disagreement(names[i], float(first["accuracy"][i]), float(second["accuracy"][i])) for i in order
        ),
        disagreeing=int((gap > 0).sum()),
    )


def _names(result: Result) -> list[str]:
    """What each number of :func:`dsd.metrics.samples` is of."""
    (table, *others), (right, *_) = result.scores, result.positives
    if others or min(table.shape) <= 2:
        return list(result.ids)
    other = {"image": "text", "text": "image"}
    return [f"{result.ids[0]}, {other[choice.kind]} {choice.given}" for choice in choices(table, right)]


def _margins(result: Result) -> np.ndarray:
    """By how much right candidates outscore wrong ones in each example, as a multiple of the mean: (n,) float."""
    rows = [
        [np.max(c.scores[c.right]) - np.max(c.scores[~c.right]) for c in choices(table, right)]
        for table, right in zip(result.scores, result.positives, strict=True)
    ]
    lone = len(rows) == 1 and min(result.scores[0].shape) > 2
    margins = np.nan_to_num([np.mean(row) if row else 0.0 for row in ([[m] for m in rows[0]] if lone else rows)])
    return np.asarray(margins / max(float(np.abs(margins).mean()), 1e-12))


# Files


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes a file in UTF-8; see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all, making folders as needed.

    Raises:
        OptionError: The path cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OptionError(
            f"{path}: got a path that cannot be written ({reason}), expected one for a new file; choose another"
        ) from None


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


def _plain_rows(table: Sequence[Any] | np.ndarray) -> list[list[float | str | None]]:
    return [[_plain(score) for score in row] for row in table]


def _table(rows: Sequence[Sequence[float | str | None]]) -> np.ndarray:
    """What :func:`_plain_rows` was given, float32."""
    return np.array([[_number(score) for score in row] for row in rows], np.float32)


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)
