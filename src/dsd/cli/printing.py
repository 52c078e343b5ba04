"""Results to stdout, as text or JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def watched() -> bool:
    """Whether somebody may look at stderr; logs of pipelines are spared the bars."""
    return sys.stderr.isatty() or os.environ.get("DSD_PROGRESS", "") == "1"


def print_json(values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    say(text if _printable(text) else json.dumps(values, indent=1, allow_nan=False, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from dsd.report import table

    say(table(rows, columns))


def _printable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an odd terminal, or a file name that is no Unicode
        return False
    return True


def say(text: str) -> None:
    """Prints, with escapes for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text if _printable(text) else text.encode(encoding, "backslashreplace").decode(encoding))
