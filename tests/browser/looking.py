"""A headless browser and a server to look at: shared by the tests and by ``screenshots.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# no sandbox: tests may run as root; the rest keeps it from asking anything of anyone but our server
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --disable-dev-shm-usage --mute-audio"
).split()


@contextmanager
def served(*options: str, **environment: str) -> Iterator[str]:
    """The address of ``dsd serve`` in a process of its own, with the embedded model."""
    with serving(*options, **environment) as (_, url):
        yield url


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address of ``dsd serve``."""
    command = [sys.executable, "-m", "dsd.cli", "serve", "--port", "0", "--no-open", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("dsd serve: http"):
            raise RuntimeError(f"the server did not start: {line!r}")
        yield process, line.split()[2]
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield found
        finally:
            found.close()


def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[2]
