"""Takes the pictures of the playground in docs/images: python tests/browser/screenshots.py [FOLDER]"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from looking import browser, root, served
from PIL import Image

LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
}

LARGEST = 300_000
"""Bytes of a picture."""


def main() -> None:
    """Opens the page in each look, uses it a little, and saves it."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else root() / "docs" / "images"
    with served() as url, browser() as chromium:
        for name, look in LOOKS.items():
            page = chromium.new_context(**look).new_page()
            page.goto(url)
            page.wait_for_selector("body[data-ready]", timeout=30_000)
            show(page)
            data = page.screenshot(full_page=True)
            save(data, out / f"playground_{name}.png")


def show(page: Any) -> None:
    """A page in use: marks, a comparison, and a word that is looked at."""
    page.wait_for_selector("#words button")
    page.locator("#ranking li").nth(0).locator(".right").click()
    page.locator("#ranking li").nth(1).locator(".wrong").click()
    page.click("#compare-captions")
    page.wait_for_selector("#difference canvas", timeout=30_000)
    words = page.locator("#words button")
    names = words.all_inner_texts()
    words.nth(next(i for i, word in enumerate(names) if word not in ("a", "an"))).focus()
    page.evaluate("() => window.scrollTo(0, 0)")
    page.wait_for_timeout(400)


def save(data: bytes, path: Path) -> None:
    """A PNG as small as it gets without loss; of 256 colours where that is too large for a repository."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB", file=sys.stderr)


if __name__ == "__main__":
    main()
