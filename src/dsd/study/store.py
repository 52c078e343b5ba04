"""Measurements of a study as files, one each, that appear whole; and all of them in one file."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsd.adapters import EMBEDDED
from dsd.contracts import OptionError
from dsd.evaluate import claim, write_bytes, write_text
from dsd.learn import HEEDED_BY_WEIGHTS
from dsd.study.grid import CAPTIONS, LESSONS, RIVALS, Item, StudyConfig, work

RULES = 3
"""Of teaching and judging, beyond what configurations say: another number makes lessons anew."""
PACK = "measurements.jsonl.gz"
"""All measurements of a study in one file, which is enough to go on from."""


class Store:
    """Where the measurements of a grid are kept: ``cells/`` of a folder, and its :data:`PACK`.

    Args:
        folder: The study's.
        config: The grid; measurements that it would make otherwise do not count.
    """

    def __init__(self, folder: str | os.PathLike[str], config: StudyConfig) -> None:
        self.folder, self.config = Path(folder), config

    def claim(self) -> None:
        """Makes the folder that of this study.

        Raises:
            OptionError: If it holds a study of other held-out examples, passes or steps, or cannot be written.
        """
        own = asdict(self.config)
        claim(self.folder, "study", {"study": {k: own[k] for k in ("held_out", "passes", "max_steps")}})

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not (self.folder / PACK).exists() and not any((self.folder / "cells").glob("*.json"))

    # Files of one measurement

    def path(self, item: Item) -> Path:
        """Where a measurement is kept as it is made."""
        return self.folder / "cells" / f"{_name(item)}.json"

    def checkpoint(self, item: Item) -> Path:
        """Where the state of a lesson is kept while it is being taught."""
        return self.path(item).with_suffix(".checkpoint")

    def taught(self, item: Item) -> Path:
        """Where the state of a lesson that was taught waits for another that goes on from it."""
        return self.path(item).with_suffix(".taught")

    def adapter(self, task: str, level: str, method: str, shots: int) -> Path:
        """Where what a lesson of the first seed taught is kept."""
        return self.path(("lesson", task, level, method, shots, 0)).with_suffix(".adapter")

    # Measurements

    def put(self, item: Item, values: Mapping[str, Any]) -> None:
        """Keeps a measurement."""
        write_text(self.path(item), json.dumps({**values, "made_by": self._made_by(item)}) + "\n")

    def get(self, item: Item) -> dict[str, Any] | None:
        """A measurement that was kept and still holds."""
        try:
            values: dict[str, Any] = json.loads(self.path(item).read_text("utf-8"))
        except (OSError, ValueError):
            values = self._packed().get(_name(item), {})
        return values if values.get("made_by") == json.loads(json.dumps(self._made_by(item))) else None

    def found(self) -> dict[Item, dict[str, Any]]:
        """What there is of the grid, and of lessons that the folder has besides at its places."""
        besides = [i for i in self._lessons() if i[1:3] in self.config.places and i[3] in (*LESSONS, *RIVALS)]
        known = dict.fromkeys((*work(self.config), *besides))
        return {item: values for item in known if (values := self.get(item)) is not None}

    def pack(self) -> Path:
        """Puts all measurements, but for failures, into one file; returns where.

        It can be read line by line (each has a name and the values), and a study goes on from it as from ``cells/``.
        """
        fresh = {_name(item): values for item, values in self.found().items()}
        lines = {**self._packed(), **fresh}  # those of other grids stay
        text = "".join(json.dumps({"name": name, **values}) + "\n" for name, values in sorted(lines.items()))
        write_bytes(self.folder / PACK, gzip.compress(text.encode(), mtime=0))
        return self.folder / PACK

    def _packed(self) -> dict[str, dict[str, Any]]:
        """Measurements in the pack, by name."""
        path = self.folder / PACK
        return _unpack(path, path.stat().st_mtime) if path.exists() else {}

    def _lessons(self) -> list[Item]:
        """Lessons in the folder, whether they still hold or not."""
        kept = [values for name, values in self._packed().items() if name.startswith("lesson-")]
        for path in sorted((self.folder / "cells").glob("lesson-*.json")):
            with suppress(ValueError):  # broken: made again when asked for
                kept.append(json.loads(path.read_text("utf-8")))
        found: list[Item] = []
        for values in kept:
            with suppress(KeyError, TypeError):
                cell = values["cell"]
                found.append(("lesson", cell["task"], cell["level"], cell["method"], cell["shots"], cell["seed"]))
        return found

    def _made_by(self, item: Item) -> dict[str, Any]:
        """What decides a measurement besides what the folder is of: other values make it anew."""
        if item[0] == "sweep" or item[3:4] in (("denoising",), ("attention",)):
            return {"model": _digest("weights")}
        if item[0] == "blind":
            return {"model": _digest("clip_weights")}
        captions = {"model": _digest("weights"), "start": _digest(EMBEDDED[CAPTIONS])}
        if item[0] == "captions" or item[3:4] == ("captions",):
            return captions
        if item[3] in RIVALS:
            return {"model": _digest("clip_weights"), "rules": RULES}
        lesson = LESSONS[item[3]]
        made: dict[str, Any] = {"model": _digest("weights"), **asdict(lesson), "rules": RULES}
        made["prompt"] = lesson.prompt.to_dict()
        del made["start"]
        if lesson.start is not None:
            made |= captions
        if lesson.config.method == "weights":  # heeds no more than these
            del made["prompt"]
            made["config"] = {name: made["config"][name] for name in HEEDED_BY_WEIGHTS}
            return made
        made["config"] = asdict(lesson.config.resolved(item[4]))
        return {**made, "max_steps": self.config.max_steps}


def _name(item: Item) -> str:
    return "-".join(str(part) for part in item).replace(" ", "_").replace(",", "").replace("+", "and")


@cache
def _unpack(path: Path, _changed: float) -> dict[str, dict[str, Any]]:
    """Measurements in a :data:`PACK`, by name.

    Raises:
        OptionError: If it cannot be read.
    """
    try:
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        return {line.pop("name"): line for line in lines}
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise OptionError(f"{path}: got a file that cannot be read ({error}); delete it") from None


@cache
def _digest(folder: str) -> str:
    """32 hex digits over the weights of a model of the package."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(str(files("dsd.tiny").joinpath(folder))).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
