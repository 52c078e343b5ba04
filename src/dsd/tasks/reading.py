"""Rows => examples, with all that is missing or says nothing in sight.

A row that breaks its format is an error. A row that is whole but says nothing, such as one whose right text is among
its wrong ones, is left out and reported, for benchmarks have them and stay what they are. Missing images are an error
with their count, or, if asked for, their examples are left out and reported.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeVar

import numpy as np

from dsd.contracts import Example, ImageError, ImageInput, ManifestError, inside
from dsd.images import load_image
from dsd.tasks.manifest import Where, show

T = TypeVar("T")

MISSING = "an image is missing"
CLASH = "what is right is also among what is wrong"
BLANK = "a text is blank"

_SHOWN = 5
"""How many missing images an error names."""


@dataclass(frozen=True)
class LeftOut:
    """A row that became no example.

    Attributes:
        where: Its file and place.
        why: One of few reasons, to count by.
        what: The text or the image that it is about.
    """

    where: str
    why: str
    what: str


@dataclass(frozen=True)
class Loaded:
    """A split of a benchmark.

    Attributes:
        name: The benchmark.
        split: One of its splits.
        examples: At least one, ids unique; images are absolute paths.
        left_out: The rows that are no examples, and why.
        credit: For examples whose texts are more or less right: what each text is worth, 0..1, by the example's id.
            ``positives`` are then those worth most.
    """

    name: str
    split: str
    examples: list[Example]
    left_out: tuple[LeftOut, ...] = ()
    credit: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def credits(self) -> list[np.ndarray | None] | None:
        """The credits as :func:`dsd.metrics.evaluate_scores` takes them, (1, n_texts) each; None if there are none."""
        known = [self.credit.get(example.id) for example in self.examples]
        return [None if worth is None else np.array([worth]) for worth in known] if self.credit else None

    def report(self) -> str:
        """One line: how many examples there are, how many rows were left out, and why."""
        counts = Counter(row.why for row in self.left_out)
        reasons = "; ".join(f"{count} because {why}" for why, count in sorted(counts.items()))
        left = f"{len(self.left_out)} rows left out" + (f": {reasons}" if reasons else "")
        return f"{self.name}, {self.split}: {len(self.examples)} examples, {left}"


@dataclass(frozen=True)
class Crop(PathLike[str]):
    """A part of a picture as a path: the file is cut when it is first asked for, and kept.

    Attributes:
        source: The picture.
        box: Left, top, right and bottom in pixels; what lies outside the picture is black.
        folder: Where the file is kept.
    """

    source: str
    box: tuple[int, int, int, int]
    folder: str

    def __str__(self) -> str:
        return f"{self.source}[{', '.join(map(str, self.box))}]"

    def __fspath__(self) -> str:
        """The path of the cut file.

        Raises:
            ImageError: The picture cannot be read, holds nothing of the box, or the folder cannot be written to.
        """
        try:
            state = os.stat(self.source)
        except OSError:
            load_image(self.source)  # says what is wrong
            raise
        # one that is replaced, or has the same name elsewhere, is another picture
        of = hashlib.blake2b(f"{self.source}\n{state.st_size}\n{state.st_mtime_ns}".encode(), digest_size=6).hexdigest()
        path = Path(self.folder) / f"{Path(self.source).stem}-{'-'.join(map(str, self.box))}-{of}.png"
        if not path.is_file():
            picture = load_image(self.source)
            left, top, right, bottom = self.box
            if left >= picture.width or top >= picture.height or right <= 0 or bottom <= 0:
                raise ImageError(
                    f"{str(self)!r}: got a box outside the picture of {picture.width} x {picture.height} pixels, "
                    "expected one inside; check that the picture has its original size"
                )
            part = path.with_name(f".{path.stem}.{os.getpid()}.png")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.crop(self.box).save(part)
                part.replace(path)
            except OSError as error:
                raise ImageError(
                    f"{str(path.parent)!r}: got a folder that cannot be written to ({error.strerror or error}), "
                    "expected a writable one for parts of pictures; make it writable"
                ) from None
        return str(path)


class Reading:
    """One run over the files of one split: finds files and images, collects examples.

    Args:
        name: The benchmark.
        split: One of its splits.
        root: The data folder.
        files: The needed files, relative to it; ``a|b`` takes the first that is there.
        folders: Where images are looked for, in this order.

    Raises:
        ManifestError: A file is missing.
    """

    def __init__(self, name: str, split: str, root: Path, files: Sequence[str], folders: Sequence[str]) -> None:
        self.name, self.split, self.root, self.folders = name, split, root.absolute(), tuple(folders)
        if not root.is_dir():
            raise ManifestError(f"{root}: got no folder, expected the data of {name}; see docs/benchmarks.md")
        self.files = tuple(self._file(names.split("|")) for names in files)
        self._examples: list[Example] = []
        self._ids: set[str] = set()
        self._left: list[LeftOut] = []
        self._credit: dict[str, tuple[float, ...]] = {}
        self._images: dict[tuple[str, tuple[str, ...]], str | None] = {}

    def _file(self, names: Sequence[str]) -> Path:
        for name in names:
            if (self.root / name).exists():
                return self.root / name
        missing = " or ".join(str(self.root / name) for name in names)
        raise ManifestError(f"{missing}: got no such file, expected data of {self.name}; see docs/benchmarks.md")

    def image(self, where: Where, name: str, folders: Sequence[str] | None = None) -> str | None:
        """The path of an image, or None if it is missing; folders that are links may lead anywhere, names may not.

        Raises:
            ManifestError: The name is blank or leaves its folder.
        """
        key = (name, tuple(self.folders if folders is None else folders))
        if key not in self._images:
            if not name.strip():
                where.fail("a blank image name", "a file name", "download the file again")
            self._images[key] = self._find(where, *key)
        return self._images[key]

    def _find(self, where: Where, name: str, folders: Sequence[str]) -> str | None:
        for folder in folders:
            base = self.root / folder
            try:
                # a folder may be a link that the user made, so that only the name must stay within
                path = None if Path(name).is_absolute() else inside(base, name)
            except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL
                continue
            if path is None:
                where.fail(f"the image {show(name)}, outside its folder", f"a path within {base}", "correct the name")
            try:
                if path.is_file():
                    return str(path)
            except OSError:  # a name too long
                continue
        return None

    def crop(self, image: str | None, box: tuple[int, int, int, int]) -> Crop | None:
        """A part of an image, kept in the data folder's ``crops`` when it is used."""
        return None if image is None else Crop(image, box, str(self.root / "crops"))

    def add(
        self,
        where: Where,
        name: str,
        images: Sequence[ImageInput | None],
        texts: Sequence[str],
        positives: Iterable[tuple[int, int]],
        tags: Iterable[str] = (),
        credit: Sequence[float] | None = None,
    ) -> None:
        """Takes an example, or leaves it out if an image is None, a text blank or a wrong pair right.

        Raises:
            ManifestError: The id is not new.
        """
        if name in self._ids:
            where.fail(f"the id {show(name)} again", "each id once", "remove one of them")
        self._ids.add(name)
        right = tuple(positives)
        found = tuple(image for image in images if image is not None)
        if not all(text.strip() for text in texts):
            self.leave_out(where, BLANK, name)
        elif clashes(images, texts, right):
            self.leave_out(where, CLASH, texts[right[0][1]])
        elif len(found) < len(images):
            self.leave_out(where, MISSING, name)
        else:
            kept = tuple(dict.fromkeys(tag for tag in tags if tag.strip()))
            self._examples.append(Example(name, found, tuple(texts), right, kept))
            if credit is not None:
                self._credit[name] = tuple(credit)

    def leave_out(self, where: Where, why: str, what: str) -> None:
        """Reports a row that becomes no example."""
        place = where.file if where.line is None else f"{where.file}:{where.line}"
        self._left.append(LeftOut(place, why, what))

    def done(self, leave_out_missing: bool) -> Loaded:
        """What was read.

        Raises:
            ManifestError: Images are missing and must not be, or no example is left.
        """
        missing = sorted({name for (name, _), path in self._images.items() if path is None})
        if missing and not leave_out_missing:
            shown = ", ".join(map(show, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
            folders = " or ".join(str(self.root / folder) for folder in self.folders)
            raise ManifestError(
                f"{self.name}: got {len(missing)} of {len(self._images)} images missing ({shown}), expected them in "
                f"{folders}; download them (docs/benchmarks.md), or leave their examples out with "
                "on_missing='leave-out'"
            )
        loaded = Loaded(self.name, self.split, self._examples, tuple(self._left), self._credit)
        if not self._examples:
            raise ManifestError(f"{loaded.report()}; expected at least one example; check the data folder")
        return loaded


def clashes(
    images: Sequence[ImageInput | None], texts: Sequence[str], positives: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The wrong pairs of an example that are as right as a right one: of the same image and the same text.

    Texts are the same whatever their capitals, spaces and final full stop; images if they are one path or one object.
    """
    true = set(positives)
    same_image, same_text = defaultdict[str | int, list[int]](list), defaultdict[str, list[int]](list)
    shown = [str(image) if isinstance(image, str | PathLike) else id(image) for image in images]
    spoken = [plain(text) for text in texts]
    for i, key in enumerate(shown):
        same_image[key].append(i)
    for t, said in enumerate(spoken):
        same_text[said].append(t)
    # pairs may be millions, right ones are few
    found = {(i, t) for a, b in true for i in same_image[shown[a]] for t in same_text[spoken[b]]}
    return sorted((i, t) for i, t in found - true if images[i] is not None)


def plain(text: str) -> str:
    """A text without what makes no other text of it: capitals, spaces at its ends and in a row, a final full stop."""
    return " ".join(text.casefold().split()).rstrip(" .")


def draw(
    rng: random.Random, pool: Sequence[T], count: int, key: Callable[[T], Hashable], taken: Iterable[Hashable]
) -> list[T]:
    """``count`` members of a pool in random order whose keys differ from each other's and from those taken.

    Fewer if there are no more.
    """
    seen, tried = set(taken), set[int]()
    found: list[T] = []
    while len(found) < count and len(tried) < len(pool):
        i = rng.randrange(len(pool))
        if i in tried:
            continue
        tried.add(i)
        if key(pool[i]) not in seen:
            seen.add(key(pool[i]))
            found.append(pool[i])
    return found
