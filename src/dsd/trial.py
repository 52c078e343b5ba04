"""The few-shot side of an evaluation: what is learned before measuring, where it is kept, what tells trials apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

from dsd.adapters import Adapter, fingerprint, where_is
from dsd.contracts import Example
from dsd.evaluate import dataset_checksum
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig


@dataclass(frozen=True)
class Lesson:
    """What is learned from, and how.

    Attributes:
        examples: The few shots.
        config: How to learn; its seed also says which examples were drawn.
        prompt: Where prompts go; None where an adapter says so that is started from.
        start: The file or folder of that adapter.
    """

    examples: tuple[Example, ...]
    config: FitConfig
    prompt: PromptConfig | None
    start: str | PathLike[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that tell it from other lessons."""
        return {
            "shots": len(self.examples),
            "seed": self.config.seed,
            "dataset": dataset_checksum(self.examples),
            "fit": asdict(self.config),
            "prompt": None if self.prompt is None else self.prompt.to_dict(),
            **({} if self.start is None else {"start": Adapter.load(self.start).digest()}),
        }


def request(
    matcher: Matcher,
    source: Mapping[str, Any],
    *,
    adapter: str | PathLike[str] | None = None,
    lesson: Lesson | None = None,
) -> dict[str, Any]:
    """What decides a matcher's scores, for :func:`dsd.evaluate.evaluate` to keep and to compare.

    Args:
        matcher: As it is before it learns.
        source: Where the examples come from, plain values.
        adapter: The file or folder that the matcher was loaded with.
        lesson: What it is going to learn.
    """
    return {
        "source": source,
        "config": dict(matcher.config),
        "base": fingerprint(matcher.backbone),
        "device": str(matcher.backbone.device),
        "adapter": None if adapter is None else _digest(where_is(adapter)),
        "few_shot": None if lesson is None else lesson.to_dict(),
    }


def teach(
    matcher: Matcher, lesson: Lesson, folder: str | PathLike[str] | None = None, *, progress: bool = False
) -> None:
    """Gives the matcher what it learns from a lesson.

    Args:
        folder: Where what was learned is kept, and is taken from if it is there; a stopped fit goes on.
        progress: Whether to show a progress bar, on stderr.
    """
    out = None if folder is None else Path(folder) / "adapter"
    if out is not None and out.exists():
        matcher.load_adapter(out)
        return
    checkpoint = None if out is None else Path(f"{out}.checkpoint")
    matcher.fit(
        lesson.examples,
        config=lesson.config,
        prompt=lesson.prompt,
        start=lesson.start,
        checkpoint=checkpoint,
        resume=True,
        progress=progress,
    )
    if out is not None and checkpoint is not None:
        matcher.save_pretrained(out)
        checkpoint.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    """32 hex digits over a file, or over the files of a folder."""
    digest = blake2b(digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()
