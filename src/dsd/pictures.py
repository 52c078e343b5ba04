"""Explanations as pictures: heat over a picture, and sheets as PNG, SVG or PDF whose labels stay text.

A sheet is laid out once, as images, words and boxes on a page; how a page becomes a file is decided below. In SVG and
PDF only the pictures are raster. No torch, and nothing but Pillow draws.
"""

from __future__ import annotations

import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsd.contracts import ImageInput, OptionError
from dsd.explanation import Explanation, ImageDifference, TextDifference, data_uri
from dsd.images import load_image

HEAT = ("#000004", "#1d1147", "#51127c", "#822681", "#b63679", "#e65164", "#fb8861", "#fec287", "#fcfdbf")
"""Anchors of a colour map of even steps in lightness, from dark to light."""

FIRST, SECOND = "#e07b00", "#2f74bb"
"""What speaks for the first of two, and for the second: apart in hue and in lightness, for every kind of sight."""

FIRST_TEXT = "#b05a00"
"""The first as letters, dark enough to be read on white."""

_PAPER, _INK, _SOFT, _RULE, _WASH = "#ffffff", "#1b1d22", "#5b606b", "#dedfe0", "#f1f1ee"
_SIDE = 256
"""Pixels a side that small pictures are grown to before heat is laid over them, and large ones shrunk."""
_QUIET = frozenset("a an the of to is are and , .".split())
"""Words that a sheet leaves out."""

_MINUS = "−"
"""Fonts that have none get what looks most like it."""

Shown = Explanation | TextDifference | ImageDifference


# Heat


def overlay(image: ImageInput, heat: np.ndarray, alpha: float = 0.75) -> Image.Image:
    """A picture under a heat map, at the picture's size.

    The map is enlarged smoothly and scaled to its own range, dark for its lowest value and light for its highest; a
    flat map is dark throughout, and so is NaN. The picture shows through in grey, so that all colour is heat.

    Args:
        image: Any picture.
        heat: (h, w) float, higher is more.
        alpha: Opacity of the highest heat, 0..1; the lowest has a third of it.

    Raises:
        OptionError: ``heat`` is no map, or ``alpha`` lies outside 0..1.
    """
    values = _map(heat)
    if not 0 <= alpha <= 1:
        raise OptionError(f"got alpha {alpha}, expected 0..1")
    picture = load_image(image)
    known = np.isfinite(values)
    low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
    share = np.where(known, values - low, 0) / (high - low) if high > low else np.zeros_like(values)
    level = _smooth(share, picture.size).clip(0, 1)
    anchors = np.array([_rgb(code) for code in HEAT], float)
    steps = np.linspace(0, 1, len(anchors))
    colour = np.stack([np.interp(level, steps, channel) for channel in anchors.T], -1)
    # thinner where there is little, or dark scenes drown
    return _over(picture, colour, alpha * (0.35 + 0.65 * level))


def signed_overlay(image: ImageInput, values: np.ndarray, alpha: float = 0.85) -> Image.Image:
    """A picture in grey under a map of what speaks for the first of two (orange) and for the second (blue).

    Args:
        image: Any picture.
        values: (h, w) float; opacity is the magnitude, in shares of the largest.
        alpha: Opacity of the largest magnitude, 0..1.

    Raises:
        OptionError: ``values`` is no map.
    """
    picture = load_image(image)
    grown = _smooth(np.nan_to_num(_map(values)), picture.size)
    level = (np.abs(grown) / max(float(np.abs(grown).max()), 1e-12)).clip(0, 1)
    colour = np.where((grown > 0)[..., None], np.array(_rgb(FIRST), float), np.array(_rgb(SECOND), float))
    return _over(picture, colour, alpha * level)


def veil(heat: np.ndarray, side: int = 72) -> Image.Image:
    """Heat by itself as an RGBA picture to lay over another, clear where there is none.

    Args:
        heat: (h, w) float in 0..1, or in -1..1 for a signed map, which gets two colours.
        side: Larger maps are shrunk to so many pixels a side, small ones are grown to it.
    """
    values = np.nan_to_num(_map(heat))
    scale = side / max(values.shape)
    grown = _smooth(values, (max(1, round(values.shape[1] * scale)), max(1, round(values.shape[0] * scale))))
    level = np.abs(grown).clip(0, 1)
    if values.min() < 0:
        colour = np.where((grown > 0)[..., None], np.array(_rgb(FIRST), float), np.array(_rgb(SECOND), float))
        opacity = 0.85 * level
    else:
        anchors = np.array([_rgb(code) for code in HEAT], float)
        colour = np.stack([np.interp(level, np.linspace(0, 1, len(anchors)), c) for c in anchors.T], -1)
        # the rest of the picture is dimmed, so that what is left light is what is meant
        opacity = 0.78 - 0.18 * level
    rgba = np.concatenate([colour, 255 * opacity[..., None]], -1).round().astype(np.uint8)
    return Image.fromarray(rgba)


def grown(image: Image.Image, side: int = _SIDE) -> Image.Image:
    """A picture about ``side`` pixels large: a small one with its pixels to be seen, a large one shrunk."""
    largest = max(image.size)
    if largest >= side:
        size = tuple(max(1, round(n * side / largest)) for n in image.size)
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = side // largest
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def _map(values: np.ndarray) -> np.ndarray:
    found = np.asarray(values, np.float32)
    if found.ndim != 2 or not found.size:
        raise OptionError(f"got a heat map of shape {found.shape}, expected (h, w); pass one map")
    return found


def _smooth(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))


def _over(picture: Image.Image, colour: np.ndarray, opacity: np.ndarray) -> Image.Image:
    grey = np.asarray(picture.convert("L"), float)[..., None]
    mixed = opacity[..., None] * colour + (1 - opacity[..., None]) * grey
    return Image.fromarray(mixed.round().astype(np.uint8))


def _rgb(code: str) -> tuple[int, int, int]:
    red, green, blue = (int(code[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue


# Sheets


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """A number for people, with a minus sign that is as wide as a digit."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", _MINUS)


def sheet(shown: Shown) -> Page:
    """The page that shows an explanation or a difference."""
    if isinstance(shown, Explanation):
        return _explanation_sheet(shown)
    return _text_sheet(shown) if isinstance(shown, TextDifference) else _image_sheet(shown)


_TILE, _GAP, _COLUMNS = 150.0, 14.0, 6
_WIDTH = _COLUMNS * (_TILE + _GAP) + _GAP


def _explanation_sheet(e: Explanation) -> Page:
    page = Page(_WIDTH)
    y = _heading(page, f"“{e.text}”", f"score {number(e.score)}")
    tiles = [_Tile("the picture", grown(e.image)), *_phrase_tiles(e), *_word_tiles(e)]
    y = _tiles(page, tiles, y)
    page.height = _legend(page, y, "most, each map on its own scale; below a word, what the score loses without it")
    return page


def _text_sheet(d: TextDifference) -> Page:
    page = Page(_WIDTH)
    y = 30.0
    for name, e, colour in (("A", d.a, FIRST), ("B", d.b, SECOND)):
        page.box(_GAP, y - 13, 4, 18, colour)
        page.text(_GAP + 12, y, f"{name}  “{e.text}”", size=16, width=_WIDTH - 200)
        page.text(_WIDTH - _GAP, y, f"score {number(e.score)}", anchor="end", size=13, colour=_SOFT)
        y += 26
    y += 4
    large = 2 * _TILE + _GAP
    page.image(_GAP, y, large, grown(d.a.image))
    page.image(2 * _GAP + large, y, large, signed_overlay(grown(d.a.image), d.map))
    page.text(_GAP + large / 2, y + large + 18, "the picture", anchor="middle", size=13, colour=_SOFT)
    x = 2 * _GAP + 1.5 * large
    page.text(x - 6, y + large + 18, "A explains more", anchor="end", size=13, colour=FIRST_TEXT)
    page.text(x + 6, y + large + 18, "B explains more", size=13, colour=SECOND)
    left = 3 * _GAP + 2 * large
    right = _WIDTH - _GAP
    page.text(
        left, y + 12, f"score of A less that of B: {number(d.difference, sign=True)}", size=14, width=right - left
    )
    page.text(left, y + 32, "what each change of words adds", size=12, colour=_SOFT)
    _bars(
        page,
        [(f"{c.a or '(nothing)'} / {c.b or '(nothing)'}", c.share) for c in d.changes],
        left,
        right,
        y + 50,
        colours=(FIRST, SECOND),
    )
    page.height = max(y + large + 34, y + 56 + 40 * len(d.changes))
    return page


def _image_sheet(d: ImageDifference) -> Page:
    page = Page(_WIDTH)
    y = _heading(page, f"“{d.a.text}”", f"score of A less that of B: {number(d.difference, sign=True)}")
    for name, e, colour in (("A", d.a, FIRST), ("B", d.b, SECOND)):
        page.box(_GAP, y, 4, 18, colour)
        page.text(_GAP + 12, y + 14, f"{name}   score {number(e.score)}", size=14)
        tiles = [_Tile("the picture", grown(e.image)), *_phrase_tiles(e)][:_COLUMNS]
        top = _tiles(page, tiles, y + 28)
        if len(tiles) < _COLUMNS - 1:
            left = _GAP + len(tiles) * (_TILE + _GAP) + 6
            page.text(left, y + 40, "what the score loses without each word", size=12, colour=_SOFT)
            rows = [(w, v) for w, v in zip(e.words, e.by_word, strict=True) if np.isfinite(v) and w not in _QUIET]
            rows = sorted(rows, key=lambda r: -abs(r[1]))[:6]
            _bars(page, rows, left, _WIDTH - _GAP, y + 54, colours=(colour, _SOFT), step=24)
        y = top + 8
    page.height = _legend(page, y, "most, each map on its own scale")
    return page


@dataclass(frozen=True)
class _Tile:
    label: str
    image: Image.Image
    note: str = ""


def _phrase_tiles(e: Explanation) -> list[_Tile]:
    large = grown(e.image)
    return [_Tile(p.text, overlay(large, p.map)) for p in e.phrases if p.stop - p.start > 1 or len(e.words) == 1]


def _word_tiles(e: Explanation) -> list[_Tile]:
    large = grown(e.image)
    return [
        _Tile(word, overlay(large, heat), number(value, sign=True) if np.isfinite(value) else "")
        for word, heat, value in zip(e.words, e.maps, e.by_word, strict=True)
        if word not in _QUIET
    ]


def _heading(page: Page, title: str, note: str) -> float:
    page.text(_GAP, 30, title, size=17, width=_WIDTH - 2 * _GAP - 250)
    page.text(_WIDTH - _GAP, 30, note, anchor="end", size=13, colour=_SOFT)
    return 46.0


def _tiles(page: Page, tiles: Sequence[_Tile], y: float) -> float:
    for i, tile in enumerate(tiles):
        x = _GAP + i % _COLUMNS * (_TILE + _GAP)
        top = y + i // _COLUMNS * (_TILE + 46)
        page.image(x, top, _TILE, tile.image)
        for k, line in enumerate(_lines(tile.label, 14, _TILE)):
            page.text(x + _TILE / 2, top + _TILE + 17 * (k + 1), line, anchor="middle", size=14, width=_TILE)
        page.text(x + _TILE / 2, top + _TILE + 33, tile.note, anchor="middle", size=11.5, colour=_SOFT)
    return y + -(-len(tiles) // _COLUMNS) * (_TILE + 46)


def _lines(text: str, size: float, width: float) -> list[str]:
    """A label in one line, or in two if it is too long for one: as alike in length as its words allow."""
    words = text.split()
    if _length(text, size) <= width or len(words) < 2:
        return [text]
    halves = [(" ".join(words[:k]), " ".join(words[k:])) for k in range(1, len(words))]
    return list(min(halves, key=lambda half: max(_length(line, size) for line in half)))


def _legend(page: Page, y: float, note: str) -> float:
    """The colour scale; returns where the page ends."""
    x, wide = _GAP, 150.0
    page.text(x, y + 13, "least", size=11.5, colour=_SOFT)
    strip = np.linspace(0, 1, 128, dtype=np.float32)[None]
    anchors = np.array([_rgb(code) for code in HEAT], float)
    colour = np.stack([np.interp(strip, np.linspace(0, 1, len(anchors)), c) for c in anchors.T], -1)
    page.image(x + 34, y + 5, wide, Image.fromarray(colour.round().astype(np.uint8)), high=9)
    page.text(x + 42 + wide, y + 13, note, size=11.5, colour=_SOFT)
    return y + 28


def _bars(
    page: Page,
    rows: Sequence[tuple[str, float]],
    left: float,
    right: float,
    y: float,
    *,
    colours: tuple[str, str],
    step: float = 40,
) -> None:
    """Signed bars about a middle line, each with its name above it, or left of it where rows are narrow."""
    most = max((abs(v) for _, v in rows), default=0.0) or 1.0
    narrow = step < 36
    start = left + 78 if narrow else left
    middle, half = (start + right) / 2, (right - start) / 2 - 44
    for i, (name, value) in enumerate(rows):
        top = y + i * step
        if narrow:
            page.text(left, top + 11, name, size=12.5, width=74)
        else:
            page.text(left, top + 11, name, size=13, width=right - left)
            top += 17
        wide = half * abs(value) / most
        page.box(middle if value >= 0 else middle - wide, top, max(wide, 0.5), 12, colours[0 if value >= 0 else 1])
        place, anchor = (middle + wide + 5, "start") if value >= 0 else (middle - wide - 5, "end")
        page.text(place, top + 10, number(value, sign=True), anchor=anchor, size=11.5, colour=_SOFT)  # type: ignore[arg-type]
        page.box(middle - 0.5, top - 3, 1, 18, _SOFT)


# Pages

Anchor = Literal["start", "middle", "end"]


@dataclass
class Page:
    """Images, text and boxes in points, y downwards from the top, and three ways to write them."""

    width: float
    height: float = 0.0
    items: list[Callable[[_Canvas], None]] = field(default_factory=list)

    def image(self, x: float, y: float, wide: float, image: Image.Image, high: float | None = None) -> None:
        """A picture; within the square of ``wide`` if it is no square, unless ``high`` is given."""
        if high is None:
            scale = wide / max(image.size)
            w, h = image.width * scale, image.height * scale
            x, y = x + (wide - w) / 2, y + (wide - h) / 2
        else:
            w, h = wide, high
        self.items.append(lambda canvas: canvas.image(x, y, w, h, image))

    def box(self, x: float, y: float, wide: float, high: float, colour: str) -> None:
        self.items.append(lambda canvas: canvas.box(x, y, wide, high, colour))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: Anchor = "start",
        size: float = 13,
        colour: str = _INK,
        width: float | None = None,
    ) -> None:
        """A line of text on the base line ``y``; where it is wider than ``width`` it is cut."""
        text = "".join(c if c.isprintable() else " " for c in text)
        if width is not None and _length(text, size) > width:
            while text and _length(text + "…", size) > width:
                text = text[:-1]
            text += "…"
        if text:
            self.items.append(lambda canvas: canvas.text(x, y, text, anchor, size, colour))

    def png(self) -> bytes:
        canvas = _Raster(self.width, self.height)
        self._draw(canvas)
        buffer = io.BytesIO()
        canvas.picture.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def svg(self) -> bytes:
        canvas = _Svg()
        self._draw(canvas)
        size = f"{self.width:g} {self.height:g}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{self.width:g}" '
            f'height="{self.height:g}" font-family="Helvetica, Arial, sans-serif">\n'
            f'<rect width="100%" height="100%" fill="{_PAPER}"/>\n' + "\n".join(canvas.parts) + "\n</svg>\n"
        ).encode()

    def pdf(self) -> bytes:
        canvas = _Pdf(self.width, self.height)
        self._draw(canvas)
        return canvas.file()

    def _draw(self, canvas: _Canvas) -> None:
        for item in self.items:
            item(canvas)


class _Canvas(ABC):
    @abstractmethod
    def image(self, x: float, y: float, w: float, h: float, image: Image.Image) -> None: ...

    @abstractmethod
    def box(self, x: float, y: float, w: float, h: float, colour: str) -> None: ...

    @abstractmethod
    def text(self, x: float, y: float, text: str, anchor: Anchor, size: float, colour: str) -> None: ...


class _Raster(_Canvas):
    SCALE = 2

    def __init__(self, width: float, height: float) -> None:
        self.picture = Image.new("RGB", (round(width * self.SCALE), round(height * self.SCALE)), _PAPER)
        self._pen = ImageDraw.Draw(self.picture)

    def image(self, x: float, y: float, w: float, h: float, image: Image.Image) -> None:
        size = (max(1, round(w * self.SCALE)), max(1, round(h * self.SCALE)))
        self.picture.paste(image.resize(size, Image.Resampling.BICUBIC), (round(x * self.SCALE), round(y * self.SCALE)))

    def box(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        ends = [round(v * self.SCALE) for v in (x, y, x + w, y + h)]
        self._pen.rectangle((ends[0], ends[1], max(ends[0], ends[2] - 1), max(ends[1], ends[3] - 1)), fill=colour)

    def text(self, x: float, y: float, text: str, anchor: Anchor, size: float, colour: str) -> None:
        font = ImageFont.load_default(size * self.SCALE)
        text = text.replace(_MINUS, "-")
        side = {"start": "l", "middle": "m", "end": "r"}[anchor]
        self._pen.text((x * self.SCALE, y * self.SCALE), text, fill=colour, font=font, anchor=f"{side}s")


class _Svg(_Canvas):
    def __init__(self) -> None:
        self.parts: list[str] = []

    def image(self, x: float, y: float, w: float, h: float, image: Image.Image) -> None:
        self.parts.append(
            f'<image x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" preserveAspectRatio="none" '
            f'href="{data_uri(image)}"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        self.parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, anchor: Anchor, size: float, colour: str) -> None:
        self.parts.append(
            f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size:g}" fill="{colour}" '
            f'xml:space="preserve">{escape(text)}</text>'
        )


class _Pdf(_Canvas):
    """One page of PDF 1.4. Labels are Helvetica, which every reader has; what it lacks is drawn as a small picture."""

    def __init__(self, width: float, height: float) -> None:
        self._size = width, height
        self._lines: list[str] = []
        self._images: list[bytes] = []

    def image(self, x: float, y: float, w: float, h: float, image: Image.Image) -> None:
        pixels = zlib.compress(image.convert("RGB").tobytes(), 9)
        head = (
            f"<< /Type /XObject /Subtype /Image /Width {image.width} /Height {image.height} /ColorSpace /DeviceRGB "
            f"/BitsPerComponent 8 /Filter /FlateDecode /Length {len(pixels)} >>"
        )
        self._images.append(head.encode() + b"\nstream\n" + pixels + b"\nendstream")
        at = self._size[1] - y - h
        self._lines.append(f"q {w:.2f} 0 0 {h:.2f} {x:.2f} {at:.2f} cm /I{len(self._images)} Do Q")

    def box(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        self._lines.append(f"{self._fill(colour)} {x:.2f} {self._size[1] - y - h:.2f} {w:.2f} {h:.2f} re f")

    def text(self, x: float, y: float, text: str, anchor: Anchor, size: float, colour: str) -> None:
        try:
            coded = text.replace(_MINUS, "–").encode("cp1252")
        except UnicodeEncodeError:
            return self._drawn(x, y, text, anchor, size, colour)
        x -= {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * _length(text, size)
        shown = coded.hex()
        self._lines.append(
            f"BT {self._fill(colour)} /F1 {size:g} Tf {x:.2f} {self._size[1] - y:.2f} Td <{shown}> Tj ET"
        )
        return None

    def _drawn(self, x: float, y: float, text: str, anchor: Anchor, size: float, colour: str) -> None:
        font, text = ImageFont.load_default(4 * size), text.replace(_MINUS, "-")
        left, top, right, bottom = font.getbbox(text, anchor="ls")
        picture = Image.new("RGB", (max(1, round(right - left)), max(1, round(bottom - top))), _PAPER)
        ImageDraw.Draw(picture).text((-left, -top), text, fill=colour, font=font, anchor="ls")
        w, h = picture.width / 4, picture.height / 4
        self.image(x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * w, y + top / 4, w, h, picture)

    @staticmethod
    def _fill(colour: str) -> str:
        return " ".join(f"{v / 255:.3f}" for v in _rgb(colour)) + " rg"

    def file(self) -> bytes:
        content = zlib.compress("\n".join(self._lines).encode("ascii"), 9)
        names = " ".join(f"/I{i + 1} {i + 6} 0 R" for i in range(len(self._images)))
        wide, high = self._size
        objects = [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {wide:g} {high:g}] /Contents 4 0 R "
            f"/Resources << /Font << /F1 5 0 R >> /XObject << {names} >> >> >>".encode(),
            f"<< /Filter /FlateDecode /Length {len(content)} >>\nstream\n".encode() + content + b"\nendstream",
            b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
            *self._images,
        ]
        out = io.BytesIO()
        out.write(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")
        places = []
        for number, body in enumerate(objects, 1):
            places.append(out.tell())
            out.write(b"%d 0 obj\n" % number + body + b"\nendobj\n")
        start = out.tell()
        out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
        out.writelines(b"%010d 00000 n \n" % place for place in places)
        out.write(b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
        return out.getvalue()


_HELVETICA = (
    "278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 278 "
    "584 584 584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 944 "
    "667 667 611 278 278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 "
    "278 556 500 722 500 500 500 334 260 334 584"
)
_WIDTHS = dict(zip(map(chr, range(32, 127)), map(int, _HELVETICA.split()), strict=True)) | {
    "“": 333,
    "”": 333,
    "…": 1000,
    _MINUS: 556,
}
"""Of Helvetica's letters, in thousandths of the size (Adobe's metrics)."""


def _length(text: str, size: float) -> float:
    return sum(_WIDTHS.get(c, 556) for c in text) * size / 1000
