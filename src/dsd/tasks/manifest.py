"""Manifests => Examples, and back: JSONL (one example a line), CSV and tables (one pair of image and caption a row).

Whatever is wrong, the error is a :class:`~dsd.contracts.ManifestError` of one line that names file and line.

Rows become examples as follows (:func:`_group`). The same pair twice is an error, and no row is left out.

1. If the rows of every image hold a right and a wrong caption, each image is a text choice.
2. Else, if the rows of every text hold a right and a wrong image, each text is an image choice.
3. Else images that have a right and a wrong caption are text choices. What is left joins all rows of its text: an
   image choice if a right and a wrong image are among them (a row may then serve in a text choice too). A right pair
   that finds no choice is an example of one image and one text; a wrong one is an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from dsd.contracts import Example, ImageInput, ManifestError, inside

COLUMNS = ("image", "text", "label")
_REQUIRED = ("images", "texts", "positives")
_KEYS = ("id", *_REQUIRED, "tags")
_LABELS = {"1": True, "true": True, "0": False, "false": False}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


@dataclass(frozen=True)
class Where:
    """A place in a file, for error messages."""

    file: str
    line: int | None = None

    def fail(self, got: str, expected: str, do: str) -> NoReturn:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        raise ManifestError(f"{place}: got {got}, expected {expected}; {do}")


@dataclass(frozen=True)
class _Row:
    """One labelled pair; rows of the same image have the same key."""

    where: Where
    key: str
    image: ImageInput
    text: str
    label: bool


def read_manifest(path: str | PathLike[str], root: str | PathLike[str] | None = None) -> list[Example]:
    """The examples of a manifest file: CSV if its name ends in ``.csv``, else JSONL. Blank lines are skipped.

    A line of JSONL is an object of ``images`` (paths relative to the manifest's folder), ``texts``, ``positives``
    ([image, text] pairs of indices) and, if wanted, ``id`` (else the line's number) and ``tags``. CSV has the columns
    ``image``, ``text`` and ``label`` (0, 1, true or false); the module's head says how its rows become examples, whose
    ids are line numbers too. A byte order mark is allowed.

    Args:
        path: The manifest.
        root: The folder that image paths start at and must not leave, if not the manifest's own.

    Returns:
        At least one example; images are absolute paths of files that exist.

    Raises:
        ManifestError: Anything else than the above, or an image outside the folder.
    """
    where = Where(os.fspath(path))
    if root is not None and not Path(root).is_dir():
        raise ManifestError(f"{root}: got no folder, expected the one that image paths start at")
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        where.fail("no such file", "a manifest", "check the path")
    except IsADirectoryError:
        where.fail("a folder", "a manifest file", "name the .jsonl or .csv file in it")
    except (OSError, ValueError) as error:
        where.fail(f"a file that cannot be read ({reason(error)})", "a manifest", "check the path and its permissions")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the error's object, as a byte order mark shifts its positions
        line = Where(where.file, error.object.count(b"\n", 0, error.start) + 1)
        line.fail(f"the byte 0x{error.object[error.start]:02x}", "UTF-8 text", "save the file as UTF-8")
    folder = Path(path).absolute().parent if root is None else Path(root).absolute()
    examples = (_read_csv if where.file.lower().endswith(".csv") else _read_jsonl)(text, where.file, folder)
    if not examples:
        where.fail("an empty file", "at least one example", "add one a line")
    return examples


def read_table(
    rows: Iterable[Mapping[str, Any]], name: str = "table", folder: str | PathLike[str] | None = None
) -> list[Example]:
    """The examples of rows with ``image``, ``text`` and ``label``, such as a ``datasets`` dataset.

    Rows become examples as those of a CSV manifest do; ids and errors number them from 1.

    Args:
        rows: Images are PIL images, uint8 arrays (h, w, 3) or paths; labels 0, 1 or booleans, or these as strings.
            PIL images and arrays are the same image if their pixels are.
        name: What errors call the table.
        folder: Where relative paths start, and what they must not leave; without it they start at the working
            directory and may lead anywhere.

    Raises:
        ManifestError: A row that breaks the format, or none at all.
    """
    read: list[_Row] = []
    for number, row in enumerate(rows, 1):
        where = Where(name, number)
        if not isinstance(row, Mapping):
            where.fail(show(row), f"a row with {', '.join(COLUMNS)}", "pass a table of these columns")
        _check_names(where, list(row), COLUMNS, COLUMNS, "column")
        image, text, label = (row[column] for column in COLUMNS)
        key, image = _table_image(where, image, None if folder is None else Path(folder).absolute())
        read.append(_Row(where, key, image, _text(where, text, "text"), _label(where, label)))
    if not read:
        Where(name).fail("no rows", "at least one", "check the split or filter that the table comes from")
    return _group(read)


def write_manifest(examples: Iterable[Example], folder: str | PathLike[str], name: str = "manifest.jsonl") -> Path:
    """Saves examples so that :func:`read_manifest` gives them back.

    PIL images and arrays become PNG files in ``folder/images``; files from outside the folder are copied there, files
    inside are referred to. The manifest appears last and at once, and nothing that it refers to is ever overwritten.

    Returns:
        The manifest's path.

    Raises:
        ManifestError: No examples, ids that repeat, an image or a text that cannot be saved, a folder that cannot be
            written to.
    """
    root = Path(folder).absolute()
    where = Where(str(root / name))
    if Path(name).name != name or not name.lower().endswith(".jsonl"):
        where.fail(f"the name {name!r}", "a plain file name that ends in .jsonl", "choose such a name")
    temporary = root / f".{name}.{os.getpid()}.tmp"
    lines: list[str] = []
    ids: set[str] = set()
    try:
        (root / "images").mkdir(parents=True, exist_ok=True)
        for number, example in enumerate(examples, 1):
            line = Where(where.file, number)
            _new_id(line, _text(line, example.id, "id"), ids)
            entry = {
                "id": example.id,
                "images": [_save(line, im, root, f"{number:05d}-{k}") for k, im in enumerate(example.images)],
                "texts": [_text(line, text, "text") for text in example.texts],
                "positives": _positives(line, example.positives, len(example.images), len(example.texts)),
                "tags": [_text(line, tag, "tag") for tag in example.tags],
            }
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if not lines:
            where.fail("no examples", "at least one", "pass some")
        try:
            temporary.write_text("".join(lines), encoding="utf-8", newline="")
            os.replace(temporary, root / name)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        where.fail(f"a folder that cannot be written to ({reason(error)})", "a writable one", "choose another folder")
    return root / name


# JSONL


def _read_jsonl(text: str, file: str, folder: Path) -> list[Example]:
    examples: list[Example] = []
    ids: set[str] = set()
    # not splitlines: JSON strings may hold other line separators as they are
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            examples.append(_example(_parse(Where(file, number), line), Where(file, number), folder, ids))
    return examples


def _parse(where: Where, line: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            where.fail(f"the key {show(twice)} twice", "each key once", "remove one")
        return dict(pairs)

    do = "write one example a line, as JSON"
    try:
        value = json.loads(line, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where.fail(f"broken JSON ({error.msg} at column {error.colno})", "a JSON object", do)
    except (RecursionError, ValueError):  # nesting, or integers, of thousands
        where.fail("JSON too deep or too large to read", "a JSON object", do)
    if not isinstance(value, dict):
        where.fail(show(value), "a JSON object", do)
    return value


def _example(entry: dict[str, Any], where: Where, folder: Path, ids: set[str]) -> Example:
    _check_names(where, list(entry), _KEYS, _REQUIRED, "key")
    images = [_inside(where, name, folder) for name in _strings(where, entry["images"], "images")]
    texts = _strings(where, entry["texts"], "texts")
    tags = _strings(where, entry.get("tags", []), "tags", least=0)
    positives = _positives(where, entry["positives"], len(images), len(texts))
    name = _text(where, entry.get("id", str(where.line)), "id")
    _new_id(where, name, ids)
    return Example(name, tuple(map(str, images)), tuple(texts), positives, tuple(tags))


def _positives(where: Where, value: Any, images: int, texts: int) -> tuple[tuple[int, int], ...]:
    expected = f"a list of [image, text] pairs of integers with image below {images} and text below {texts}"
    do = "count from 0 in images and texts"
    if not isinstance(value, list | tuple) or not value:
        where.fail(f"positives {show(value)}", expected, do)
    pairs: list[tuple[int, int]] = []
    for pair in value:
        # a boolean is an integer to isinstance
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(index) is not int for index in pair):
            where.fail(f"the positive {show(pair)}", expected, do)
        image, text = pair
        if not (0 <= image < images and 0 <= text < texts):
            where.fail(f"the positive {show(pair)}", expected, do)
        if (image, text) in pairs:
            where.fail(f"the positive {show(pair)} twice", "each once", "remove one")
        pairs.append((image, text))
    return tuple(pairs)


# CSV and tables


def _read_csv(text: str, file: str, folder: Path) -> list[Example]:
    rows: list[_Row] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = Where(file, line), reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_names(where, header, COLUMNS, COLUMNS, "column")
                continue
            if len(cells) != len(header):
                where.fail(f"{len(cells)} cells", f"{len(header)}", "quote cells that hold commas")
            row = dict(zip(header, cells, strict=True))
            path = str(_inside(where, row["image"], folder))
            rows.append(_Row(where, path, path, _text(where, row["text"], "text"), _label(where, row["label"])))
    except csv.Error as error:
        Where(file, line).fail(f"broken CSV ({error})", f"cells of {', '.join(COLUMNS)}", "check quotes")
    return _group(rows)


def _group(rows: Sequence[_Row]) -> list[Example]:
    """Examples of labelled pairs, as the module's head has it; ids are line numbers, each of another line."""
    seen: dict[tuple[str, str], _Row] = {}
    for row in rows:
        earlier = seen.setdefault((row.key, row.text), row)
        if earlier is not row:
            row.where.fail(f"the pair of line {earlier.where.line} again", "each pair once", "remove one of them")
    by_image, by_text = _grouped(rows, lambda row: row.key), _grouped(rows, lambda row: row.text)
    if not all(map(_is_choice, by_image.values())) and all(map(_is_choice, by_text.values())):
        return [_choice(group) for group in by_text.values()]
    examples = [_choice(group) for group in by_image.values() if _is_choice(group)]
    left = [row for row in rows if not _is_choice(by_image[row.key])]
    for text, group in _grouped(left, lambda row: row.text).items():
        if _is_choice(by_text[text]):
            # the id is that of a row which is in no other example
            examples.append(_choice(by_text[text], group[0].where))
            continue
        for row in group:
            if not row.label:
                row.where.fail(
                    f"label 0 for an image and a text ({show(text)}) that no row with label 1 has",
                    "a right pair to tell the wrong one from",
                    "add the row of the right pair, or remove this one",
                )
            examples.append(_choice([row]))
    return examples


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], str]) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _is_choice(rows: Sequence[_Row]) -> bool:
    return len({row.label for row in rows}) == 2


def _choice(rows: Sequence[_Row], where: Where | None = None) -> Example:
    """An example of rows that share an image or a text."""
    images = tuple({row.key: row.image for row in rows}.values())
    texts = tuple(dict.fromkeys(row.text for row in rows))
    right = [i for i, row in enumerate(rows) if row.label]
    positives = tuple((i, 0) if len(images) > 1 else (0, i) for i in right)
    return Example(str((where or rows[0].where).line), images, texts, positives)


def _label(where: Where, value: Any) -> bool:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str) and value.strip().lower() in _LABELS:
        return _LABELS[value.strip().lower()]
    if not isinstance(value, int) or value not in (0, 1):
        where.fail(f"the label {show(value)}", "0, 1, true or false", "say 1 where the text fits the image")
    return bool(value)


def _table_image(where: Where, image: Any, folder: Path | None) -> tuple[str, ImageInput]:
    """A key that the same images share, and the image."""
    if isinstance(image, str | PathLike):
        name = os.fspath(image)
        path = str(_inside(where, name, folder) if folder else _existing(where, name, Path(name).absolute()))
        return path, path
    if isinstance(image, np.ndarray):
        _check_array(where, image)
        pixels, form = image.tobytes(), str(image.shape)
    elif isinstance(image, Image.Image):
        try:
            pixels, form = image.tobytes(), f"{image.mode} {image.size}"
        except (OSError, SyntaxError, ValueError) as error:
            where.fail(f"an image that cannot be read ({reason(error)})", "an image", "save it again or remove the row")
    else:
        where.fail(f"the image {show(image)}", "a path, a PIL image or an array", "decode the column to images")
    return f"{form} {_digest(pixels)}", image


# Checks


def show(value: Any) -> str:
    """The value, shortened, on one line."""
    try:
        return " ".join(_repr.repr(value).split())
    except (ValueError, RecursionError):  # such as an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _check_names(where: Where, got: Sequence[Any], known: Sequence[str], required: Sequence[str], kind: str) -> None:
    for i, name in enumerate(got):
        if name not in known or name in got[:i]:
            twice = " twice" if name in known else ""
            where.fail(f"the {kind} {show(name)}{twice}", f"{', '.join(known)}", "rename or remove it")
    missing = [name for name in required if name not in got]
    if missing:
        where.fail(f"no {kind} {missing[0]!r}", f"{', '.join(required)}", "add it")


def _text(where: Where, value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value.strip():
        where.fail(f"the {kind} {show(value)}", "a string that is not blank", "write it in quotes")
    if any("\ud800" <= c <= "\udfff" for c in value):
        where.fail(f"the {kind} {show(value)}", "Unicode text", "remove the half of a surrogate pair")
    return value


def _strings(where: Where, value: Any, key: str, least: int = 1) -> list[str]:
    if not isinstance(value, list) or len(value) < least:
        where.fail(f"{key} {show(value)}", "a list of strings" + " that is not empty" * least, "put it in [ ]")
    return [_text(where, item, f"entry of {key}") for item in value]


def _new_id(where: Where, name: str, ids: set[str]) -> None:
    if name in ids:
        where.fail(f"the id {show(name)} again", "each id once", "give every example its own, or none")
    ids.add(name)


def _inside(where: Where, name: str, folder: Path) -> Path:
    """The image's path, if it is a file within the folder, links followed."""
    try:
        path = None if Path(name).is_absolute() else inside(folder, name)
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL
        path = folder / name
    if path is None:
        where.fail(
            f"the image {show(name)}, outside the manifest's folder",
            f"a relative path within {folder}",
            "move the image there",
        )
    return _existing(where, name, path)


def _existing(where: Where, name: str, path: Path) -> Path:
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name too long, links in a circle
        found = False
    if not found:
        where.fail(f"the image {show(name)}, which is no file", "an image file", "check the path")
    return path


def _check_array(where: Where, image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        where.fail(f"an image array of {image.dtype} {image.shape}", "uint8 (h, w, 3)", "convert it")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _save(where: Where, image: ImageInput, root: Path, stem: str) -> str:
    """The image's path relative to the manifest, after saving it if need be.

    Names end in a digest of the content, so that no file is overwritten by another image.
    """
    if isinstance(image, str | PathLike):
        name = os.fspath(image)
        source = _existing(where, name, Path(name).absolute()).resolve()
        if source.is_relative_to(root.resolve()):
            return source.relative_to(root.resolve()).as_posix()
        data, suffix = source.read_bytes(), source.suffix
    else:
        data, suffix = _png(where, image), ".png"
    target = root / "images" / f"{stem}-{_digest(data)}{suffix}"
    target.write_bytes(data)
    return target.relative_to(root).as_posix()


def _png(where: Where, image: ImageInput) -> bytes:
    if isinstance(image, np.ndarray):
        _check_array(where, image)
        picture = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        picture = image
    else:
        where.fail(f"the image {show(image)}", "a path, a PIL image or an array", "convert it")
    stream = io.BytesIO()
    try:
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            picture = picture.convert("RGB")  # what PNG cannot hold
        picture.save(stream, "PNG")
    except (OSError, SyntaxError, ValueError) as error:
        where.fail(f"an image that cannot be read ({reason(error)})", "an image", "save it again")
    return stream.getvalue()
