"""Data files as their owners distribute them => rows that know where they stand.

Whatever is wrong, the error is a :class:`~dsd.contracts.ManifestError` of one line that names the file and the place in
it: a line where there are lines, else what leads to the entry, as in ``refs(umd).json[12]``.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsd.tasks.manifest import Where, reason, show


@dataclass(frozen=True)
class Row:
    """One entry of a file, of named values that are checked as they are asked for."""

    where: Where
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """A value of any type.

        Raises:
            ManifestError: There is none; so for all other methods, as well as where it is of another type.
        """
        if key not in self.values:
            got = ", ".join(map(str, self.values)) or "nothing"
            self.where.fail(f"no {key!r} among {got[:200]}", f"a value of {key!r}", "download the file again")
        return self.values[key]

    def text(self, key: str) -> str:
        """A string; it may be blank."""
        return text(self.where, self.get(key), key)

    def whole(self, key: str) -> int:
        """A whole number, in a CSV file too."""
        value = self.get(key)
        # a boolean is an integer to isinstance; int() takes underscores and other scripts
        if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
            return int(value)
        if type(value) is not int:
            self.where.fail(f"{key} {show(value)}", "a whole number", "download the file again")
        return value

    def label(self, key: str) -> str:
        """A whole number or a string that is not blank, as a string."""
        value = self.get(key)
        if type(value) is not int and not (isinstance(value, str) and value.strip()):
            self.where.fail(f"{key} {show(value)}", "a number or a string that is not blank", "download the file again")
        return str(value)

    def items(self, key: str, length: int | None = None) -> list[Any]:
        """A list, of ``length`` values if that is given."""
        return items(self.where, self.get(key), key, length)

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        return [text(self.where, value, f"entry of {key}") for value in self.items(key)]

    def rows(self, key: str) -> list[Row]:
        """A list of entries."""
        return rows(inner(self.where, key), self.get(key))


def text(where: Where, value: Any, name: str) -> str:
    """A string that can be written as UTF-8; it may be blank."""
    if not isinstance(value, str):
        where.fail(f"{name} {show(value)}", "a string", "download the file again")
    if any("\ud800" <= c <= "\udfff" for c in value):
        where.fail(f"{name} {show(value)}", "Unicode text", "remove the half of a surrogate pair")
    return value


def items(where: Where, value: Any, name: str, length: int | None = None) -> list[Any]:
    """A list, of ``length`` values if that is given."""
    if not isinstance(value, list) or length not in (None, len(value)):
        expected = "a list" if length is None else f"a list of {length}"
        where.fail(f"{name} {show(value)}", expected, "download the file again")
    return value


def row(where: Where, value: Any) -> Row:
    """An entry, which must be an object."""
    if not isinstance(value, dict):
        where.fail(show(value), "an object of named values", "download the file again")
    return Row(where, value)


def rows(where: Where, value: Any) -> list[Row]:
    """The entries of a list of objects; an empty one is an error."""
    entries = items(where, value, "content")
    if not entries:
        where.fail("an empty list", "at least one entry", "download the file again")
    return [row(at(where, i), entry) for i, entry in enumerate(entries)]


def at(where: Where, index: int | str) -> Where:
    """An entry of what stands at a place."""
    return Where(f"{where.file}[{index if isinstance(index, int) else show(index)}]", where.line)


def inner(where: Where, key: str) -> Where:
    """A named value of what stands at a place."""
    return Where(f"{where.file}.{key}", where.line)


def read_json(path: Path) -> Any:
    """What a JSON file holds; a key that an object has twice is an error.

    Raises:
        ManifestError: It cannot be read or is no JSON.
    """
    where = Where(str(path))
    return _json(where, _text(where, path))


def read_jsonl(path: Path) -> Iterator[Row]:
    """The entries of a file with one JSON object a line; blank lines are skipped."""
    # not splitlines: JSON strings may hold other line separators as they are
    for where, line in _lines(path):
        yield row(where, _json(where, line))


def read_lines(path: Path) -> Iterator[tuple[Where, str]]:
    """The lines of a file that are not blank."""
    yield from ((where, line.rstrip("\r")) for where, line in _lines(path))


def read_csv(path: Path, columns: tuple[str, ...]) -> list[Row]:
    """The rows of a CSV file with a header that names at least ``columns``, each once; blank lines are skipped."""
    reader = csv.reader(io.StringIO(_text(Where(str(path)), path), newline=""), strict=True)
    header: list[str] | None = None
    found: list[Row] = []
    line = 1
    try:
        for cells in reader:
            where, line = Where(str(path), line), reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_header(where, header, columns)
                continue
            if len(cells) != len(header):
                where.fail(f"{len(cells)} cells", f"{len(header)}", "quote cells that hold commas")
            found.append(Row(where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        Where(str(path), line).fail(f"broken CSV ({error})", "comma-separated cells", "check quotes")
    if not found:
        Where(str(path)).fail("no rows", "at least one", "download the file again")
    return found


def read_plain_pickle(path: Path) -> Any:
    """What a pickle file holds of dictionaries, lists, tuples, sets, strings, bytes, numbers, booleans and None.

    A pickle can name any importable function and have it called. Here every name is refused before it is looked up, so
    that nothing is imported and nothing runs.

    Raises:
        ManifestError: It cannot be read, is broken, or names anything.
    """
    where = Where(str(path))
    data = _bytes(where, path)
    try:
        # pickles of Python 2 hold byte strings where text is meant
        return _Plain(io.BytesIO(data), encoding="utf-8").load()
    except _NamedError as error:
        where.fail(f"a pickle that asks for {error}", "plain values only", "do not trust this file")
    # broken pickles raise nearly anything: EOFError, IndexError, KeyError, TypeError, struct.error...
    except Exception as error:
        where.fail(f"a broken pickle ({reason(error)})", "a whole one", "download the file again")


class _NamedError(Exception):
    """A pickle that asks for something by its name."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _NamedError(show(f"{module}.{name}"))

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _NamedError("something stored elsewhere")


def _check_header(where: Where, header: list[str], columns: tuple[str, ...]) -> None:
    twice = next((name for i, name in enumerate(header) if name in header[:i]), None)
    if twice is not None:
        where.fail(f"the column {show(twice)} twice", "each once", "rename or remove it")
    missing = next((name for name in columns if name not in header), None)
    if missing is not None:
        where.fail(f"no column {missing!r}", f"{', '.join(columns)}", "download the file again")


def _lines(path: Path) -> Iterator[tuple[Where, str]]:
    where = Where(str(path))
    for number, line in enumerate(_text(where, path).split("\n"), 1):
        if line.strip():
            yield Where(str(path), number), line


def _text(where: Where, path: Path) -> str:
    """A text file's content without its byte order mark; an empty one is an error."""
    try:
        content = _bytes(where, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the error's object, as a byte order mark shifts its positions
        line = Where(where.file, error.object.count(b"\n", 0, error.start) + 1)
        line.fail(f"the byte 0x{error.object[error.start]:02x}", "UTF-8 text", "download the file again")
    if not content.strip():
        where.fail("an empty file", "data", "download the file again")
    return content


def _bytes(where: Where, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        where.fail(f"a file that cannot be read ({reason(error)})", "data", "check the path and its permissions")


def _json(where: Where, content: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            where.fail(f"the key {show(twice)} twice", "each key once", "remove one")
        return found

    try:
        return json.loads(content, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = Where(where.file, (where.line or 1) + error.lineno - 1)
        line.fail(f"broken JSON ({error.msg} at column {error.colno})", "JSON", "download the file again")
    except (RecursionError, ValueError):  # nesting, or integers, of thousands
        where.fail("JSON too deep or too large to read", "JSON", "download the file again")
