"""Takes the pictures in docs/images that docs/serve.md and docs/explain.md show: python screenshots.py [FOLDER]"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
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
    """Opens each page in its looks, uses it a little, and saves it."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else root() / "docs" / "images"
    with tempfile.TemporaryDirectory() as folder:
        explanations(Path(folder), out)
    with served() as url, browser() as chromium:
        for name, look in LOOKS.items():
            page = chromium.new_context(**look).new_page()
            page.goto(url)
            page.wait_for_selector("body[data-ready]", timeout=30_000)
            show(page)
            data = page.screenshot(full_page=True)
            save(data, out / f"playground_{name}.png")


def explanations(folder: Path, out: Path) -> None:
    """Sheets and pages of the commands in docs/explain.md."""

    def run(*command: str) -> None:
        subprocess.run([sys.executable, "-m", "dsd.cli", *command], cwd=folder, check=True, stdout=sys.stderr)

    scene, other = (str(root() / "docs" / "images" / f"{name}.png") for name in ("scene", "other"))
    over, under = "a blue star is over a pink diamond", "a pink diamond is over a blue star"
    run(*"world comvg --split test --level standard --count 12 --seed 1 --out scenes".split())
    (striped,) = map(str, folder.glob("scenes/images/00001-0-*.png"))
    text = "a large striped purple circle is below a red square"
    run("explain", striped, "--draws", "8", "--out", "explain_words.png", "--text", text)
    run("explain", scene, "--text", over, "--text2", under, "--out", "explain_captions.png")
    run("explain", scene, other, "--text", over, "--out", "explain_images.png")
    run("explain", scene, "--text", over, "--out", "page.html")
    run(*"eval comvg --level standard --count 24 --out run --failures 3".split())
    for name in ("words", "captions", "images"):
        save((folder / f"explain_{name}.png").read_bytes(), out / f"explain_{name}.png")
    wide, phone = {"width": 1100, "height": 800}, {"width": 400, "height": 1600}
    with browser() as chromium:
        for name, file, look in (
            ("explain_page", "page.html", {"color_scheme": "dark", "viewport": wide}),
            ("failures", "run/report.html", {"color_scheme": "light", "viewport": {**wide, "height": 1300}}),
            ("failures_phone", "run/report.html", {"color_scheme": "dark", "viewport": phone}),
        ):
            page = chromium.new_context(**look).new_page()
            page.goto(f"file://{folder}/{file}")
            save(page.screenshot(), out / f"{name}.png")


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
