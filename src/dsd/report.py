"""Results for people: aligned tables, and one self-contained HTML page that shows what learning changed.

The page loads nothing: pictures are embedded, charts are inline SVG. Its looks live in ``templates/demo.html``; what
it shows is prepared here as plain values.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dsd.contracts import Example, ImageInput, Ranked
from dsd.evaluate import Metric, write_bytes, write_text
from dsd.images import load_image
from dsd.metrics import wins
from dsd.pictures import HEAT, overlay

TITLE = "Asking a picture-drawing model which caption fits"
SUMMARY = (
    "A diffusion model that draws pictures from captions is turned round: shown a picture under noise, it scores how "
    "well each caption explains it. Small low-rank prompts in its attention layers are then learned from a few "
    "labelled examples while the model itself stays frozen. This page shows what the scores say, and what the "
    "learning changes on scenes it has never seen."
)

_LARGEST = 512
_PIXELATED = 128
"""Pictures up to so many pixels a side are shown with visible pixels; above _LARGEST they are shrunk."""


@dataclass(frozen=True)
class Ranking:
    """One picture and its captions, best first; ``right`` are the indices of those that match."""

    image: ImageInput
    ranked: Sequence[Ranked]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Comparison:
    """The accuracy on one task before and after learning, by score; a score may be missing from either."""

    task: str
    before: Mapping[str, Metric]
    after: Mapping[str, Metric]
    chance: float = 0.5


@dataclass(frozen=True)
class HeldOut:
    """One example that learning did not see, with scores (n_images, n_texts) before and after."""

    example: Example
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class WordMaps:
    """Where each word of a caption is found in a picture: (h, w) float each, higher is more."""

    image: ImageInput
    caption: str
    maps: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Training:
    """What is told of the learning: facts to list, and curves of (step, value) by name."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class CurvePoint:
    """The accuracy at one number of examples: the mean with its interval, and each repeat's own."""

    shots: int
    accuracy: Metric
    repeats: Sequence[float] = ()


def format_interval(metric: Metric) -> str:
    """A metric and its 95 % interval, such as ``0.861 [0.82, 0.90]``."""
    return f"{metric['value']:.3f} [{metric['low']:.2f}, {metric['high']:.2f}]"


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """An aligned table, Markdown as well as plain text; columns of numbers are aligned right.

    Floats get three decimals, metrics their interval, None and missing values an empty cell.
    """
    values = [[row.get(column) for column in columns] for row in rows]
    cells = [[_cell(v) for v in row] for row in values]
    widths = [max(3, *(len(row[i]) for row in [[_cell(c) for c in columns], *cells])) for i in range(len(columns))]
    numeric = (int, float, np.number, Mapping, type(None))
    right = [all(isinstance(row[i], numeric) for row in values) for i in range(len(columns))]
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    lines = [[_cell(c) for c in columns], rule, *cells]
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    )


def demo_report(
    path: str | PathLike[str],
    *,
    ranking: Ranking,
    comparisons: Sequence[Comparison],
    held_out: Sequence[HeldOut] = (),
    word_maps: WordMaps | None = None,
    training: Training | None = None,
    settings: Mapping[str, Any],
    title: str = TITLE,
    summary: str = SUMMARY,
) -> None:
    """Writes one HTML page that needs no other file and no network.

    Args:
        path: Where to.
        ranking: A picture and its captions, best first.
        comparisons: Accuracy before and after learning, one chart a task.
        held_out: Examples to show with their scores before and after.
        word_maps: Word-by-region maps of one picture and caption.
        training: How the adapter was learned.
        settings: Everything needed to repeat the page; nested values are shown as they print.
        title: Heading.
        summary: One paragraph that explains the page.

    Raises:
        ImageError: A picture cannot be read.
        OptionError: The page cannot be written, or a map is none.
    """
    # tables and overlays do without the template engine
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("dsd"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = page.get_template("demo.html").render(
        title=title,
        summary=summary,
        ranking=_ranking(ranking),
        charts=[_chart(c) for c in comparisons],
        held_out=[_card(h) for h in held_out],
        words=None if word_maps is None else _words(word_maps),
        training=training,
        curves=[] if training is None else [_curve(name, points) for name, points in training.curves.items() if points],
        settings=settings,
        heat=", ".join(HEAT),
    )
    write_text(path, html)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return format_interval(value)
    if isinstance(value, float | np.floating):
        return f"{value:.3f}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _picture(image: Image.Image) -> dict[str, Any]:
    """An ``src`` that holds the picture itself, and whether to show its pixels."""
    if max(image.size) > _LARGEST:
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    src = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"src": src, "pixelated": max(image.size) <= _PIXELATED}


def _numbers(values: Sequence[float] | np.ndarray) -> list[str]:
    """Scores as text, all with as many decimals as their spread asks for."""
    finite = [float(v) for v in values if math.isfinite(v)]
    spread = max(finite, default=0.0) - min(finite, default=0.0)
    decimals = min(6, max(2, 1 - math.floor(math.log10(spread)))) if spread > 0 else 3
    return [f"{float(v):.{decimals}f}" for v in values]


def _ranking(ranking: Ranking) -> dict[str, Any]:
    scores = [r.score for r in ranking.ranked]
    finite = [s for s in scores if math.isfinite(s)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # scores have no natural zero: the best fills the row, the lowest keeps a stub
    widths = [3 + 97 * ((s - low) / (high - low) if high > low else 1.0) if math.isfinite(s) else 0.0 for s in scores]
    rows = [
        {"text": r.candidate, "score": text, "width": round(width, 1), "right": r.index in ranking.right}
        for r, text, width in zip(ranking.ranked, _numbers(scores), widths, strict=True)
    ]
    return {"picture": _picture(load_image(ranking.image)), "rows": rows, "told": bool(ranking.right)}


def _chart(comparison: Comparison) -> dict[str, Any]:
    """One chart's rows: for each score its bars before and after learning."""
    rows: list[dict[str, Any]] = []
    for score in dict.fromkeys([*comparison.before, *comparison.after]):
        bars = [
            {**m, "when": when, "interval": format_interval(m)}
            for when, m in (("before", comparison.before.get(score)), ("after", comparison.after.get(score)))
            if m is not None
        ]
        rows.append({"score": score, "bars": bars})
    return {"task": comparison.task, "chance": comparison.chance, "rows": rows}


def _card(held: HeldOut) -> dict[str, Any]:
    """One example as questions: a picture with its captions, or a caption with its pictures."""
    example = held.example
    before, after = np.asarray(held.before, float), np.asarray(held.after, float)
    pictures = [_picture(load_image(image)) for image in example.images]
    right = np.zeros(before.shape, bool)
    for pair in example.positives:
        right[pair] = True
    if len(example.texts) > 1:
        questions = [
            _question({"picture": p}, [{"text": t} for t in example.texts], right[i], before[i], after[i])
            for i, p in enumerate(pictures)
        ]
    else:
        candidates = [{"picture": p} for p in pictures]
        questions = [_question({"text": example.texts[0]}, candidates, right[:, 0], before[:, 0], after[:, 0])]
    verdicts = {
        when: float(won.mean()) if (won := wins(scores, example.positives)).size else None
        for when, scores in (("before", before), ("after", after))
    }
    return {"id": example.id, "tags": example.tags, "questions": questions, "verdicts": verdicts}


def _question(
    stem: dict[str, Any], candidates: list[dict[str, Any]], right: np.ndarray, before: np.ndarray, after: np.ndarray
) -> dict[str, Any]:
    numbers = _numbers([*before, *after])
    rows = [
        candidate
        | {"right": bool(right[i]), "before": numbers[i], "after": numbers[len(candidates) + i]}
        | {"chosen_before": _is_best(before, i), "chosen_after": _is_best(after, i)}
        for i, candidate in enumerate(candidates)
    ]
    return {"stem": stem, "rows": rows}


def _is_best(scores: np.ndarray, i: int) -> bool:
    return not np.isnan(scores[i]) and bool(scores[i] == np.nanmax(scores))


def _words(word_maps: WordMaps) -> dict[str, Any]:
    image = load_image(word_maps.image)
    picture = _picture(image)
    # smooth heat over crisp pixels takes a larger picture
    factor = max(1, 256 // max(image.size))
    large = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    maps = [{"word": word, "picture": _picture(overlay(large, heat))} for word, heat in word_maps.maps.items()]
    return {"picture": picture, "caption": word_maps.caption, "maps": maps}


def _curve(name: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """A line over steps: points and ticks in percent of a box, y downwards."""
    steps, values = np.array([p for p in points if math.isfinite(p[1])] or [(0.0, 0.0)], float).T
    ticks = _ticks(float(values.min()), float(values.max()))
    low, high = ticks[0], ticks[-1]
    first, span = steps.min(), max(float(np.ptp(steps)), 1e-9)
    xs, ys = 100 * (steps - first) / span, 100 * (high - values) / (high - low)
    return {
        "name": name,
        "points": [(round(float(x), 2), round(float(y), 2)) for x, y in zip(xs, ys, strict=True)],
        "ticks": [{"y": round(100 * (high - t) / (high - low), 2), "label": f"{t:.4g}"} for t in ticks],
        "first": f"{steps.min():g}",
        "last": f"{steps.max():g}",
        "end": f"{values[-1]:.4g}",
    }


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose a range."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    size = 10.0 ** math.floor(math.log10(high - low))
    step = next(s * size for s in (0.25, 0.5, 1.0, 2.0, 2.5) if (high - low) / (s * size) <= 4)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(start, end + 1)]


def learning_curve_chart(
    path: str | PathLike[str], points: Sequence[CurvePoint], *, chance: float, title: str, note: str = ""
) -> None:
    """Draws accuracy against the number of examples, as a PNG.

    The axis is logarithmic with 0 at its left, set off by a break. The zero-shot accuracy, where there is a point of
    no examples, and chance are lines across.

    Args:
        path: Where to; folders are made as needed.
        points: At least one, in the order of ``shots``.
        chance: What a blind guess wins.
        title: Heading.
        note: A line below it; each is cut where it does not fit.

    Raises:
        OptionError: The file cannot be written.
    """
    picture = Image.new("RGB", (_WIDE * _DRAWN, _HIGH * _DRAWN), _PAPER)
    pen = _Pen(ImageDraw.Draw(picture))
    left, right, top, bottom = 64, _WIDE - 132, 106, _HIGH - 64
    pen.text(20, 24, title, "lt", size=18, colour=_INK, width=_WIDE - 40)
    pen.text(20, 50, note, "lt", size=12.5, width=_WIDE - 40)

    low = min(chance, *(min(p.accuracy["low"], *p.repeats, 1.0) for p in points))
    high = max(chance, *(max(p.accuracy["high"], *p.repeats, 0.0) for p in points))
    ticks = [t for t in _ticks(low, high) if 0 <= t <= 1]
    start, span = min(low, ticks[0]), max(high, ticks[-1]) - min(low, ticks[0])

    def height(value: float) -> float:
        return bottom - (bottom - top) * (value - start) / span

    inner = 30  # whiskers keep off the ends of the axis
    places = [left + inner + (right - left - 2 * inner) * share for share in _places([p.shots for p in points])]
    for tick in ticks:
        pen.line((left, height(tick)), (right, height(tick)), _RULE)
        pen.text(left - 10, height(tick), f"{tick:.4g}", "rm")
    pen.text(20, top - 20, "accuracy", "lm")
    pen.text((left + right) / 2, bottom + 44, "labelled examples", "mm")

    levels = [("chance", chance, _SOFT)]
    if points[0].shots == 0:
        zero = points[0].accuracy
        pen.box((left, height(zero["high"])), (right, height(zero["low"])), _WASH)
        levels.append(("zero-shot", zero["value"], _INK))
    levels.sort(key=lambda level: level[1])
    for i, (name, value, colour) in enumerate(levels):
        pen.line((left, height(value)), (right, height(value)), colour, dash=2 if name == "chance" else 6)
        shift = 0.0  # two labels of nearly one height part
        if len(levels) == 2:
            shift = max(0.0, 18 - abs(height(levels[0][1]) - height(levels[1][1]))) / 2 * (1 if i == 0 else -1)
        pen.text(right + 10, height(value) + shift, f"{name} {value:.3f}", "lm", colour=colour)

    pen.line((left, bottom), (right, bottom), _SOFT, 1.25)
    if points[0].shots == 0 and len(points) > 1:
        middle = (places[0] + places[1]) / 2
        pen.box((middle - 3, bottom - 2), (middle + 3, bottom + 2), _PAPER)
        for x in (middle - 3, middle + 3):
            pen.line((x - 3, bottom + 6), (x + 3, bottom - 6), _SOFT, 1.25)
    for (x, a), (y, b) in pairwise(zip(places, points, strict=True)):
        pen.line((x, height(a.accuracy["value"])), (y, height(b.accuracy["value"])), _BLUE, 2)
    numbered = -math.inf
    for x, point in zip(places, points, strict=True):
        ends = height(point.accuracy["low"]), height(point.accuracy["high"])
        pen.line((x, ends[0]), (x, ends[1]), _BLUE, 1.5)
        for y in ends:
            pen.line((x - 5, y), (x + 5, y), _BLUE, 1.5)
        for i, value in enumerate(point.repeats):
            pen.dot((x + 11 + 5 * (i % 2), height(value)), 2.5, _PALE)
        pen.dot((x, height(point.accuracy["value"])), 5, _BLUE)
        if x - numbered < 46:  # a number for each would run together
            continue
        numbered = x
        pen.text(x, bottom + 20, f"{point.shots:,}", "mm", colour=_INK)
        if point.shots:
            highest = min(ends[1], *(height(v) for v in point.repeats), math.inf)
            pen.text(x, highest - 11, f"{point.accuracy['value']:.3f}", "mm", colour=_BLUE)
    # drawn larger and shrunk, for smooth edges
    _save_png(path, picture.resize((2 * _WIDE, 2 * _HIGH), Image.Resampling.LANCZOS))


def reliability_diagram(
    path: str | PathLike[str], bins: Sequence[Mapping[str, float]], *, title: str, note: str = ""
) -> None:
    """Draws how often predictions are right against how sure they are, as a PNG, and below how many are so sure.

    Well calibrated ones lie on the diagonal; their distance from it makes the expected calibration error, which heads
    the picture.

    Args:
        path: Where to; folders are made as needed.
        bins: At least one, as :func:`dsd.metrics.reliability` has them.
        title: Of what, after the error.
        note: A line below it; each is cut where it does not fit.

    Raises:
        OptionError: The file cannot be written.
    """
    wide, high = 500, 686
    picture = Image.new("RGB", (wide * _DRAWN, high * _DRAWN), _PAPER)
    pen = _Pen(ImageDraw.Draw(picture))
    left, right, top, floor, bottom = 64, wide - 36, 106, high - 180, high - 64
    total = sum(b["n"] for b in bins)
    error = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / total
    pen.text(20, 24, f"ECE {error:.3f}: {title}", "lt", size=18, colour=_INK, width=wide - 40)
    pen.text(20, 50, note, "lt", size=12.5, width=wide - 40)

    def place(confidence: float, accuracy: float) -> tuple[float, float]:
        return left + (right - left) * confidence, floor - (floor - top) * accuracy

    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        pen.line(place(0, tick), place(1, tick), _RULE)
        pen.line((place(tick, 0)[0], bottom), (place(tick, 0)[0], bottom + 5), _SOFT)
        pen.text(left - 10, place(0, tick)[1], f"{tick:.1f}", "rm")
        pen.text(place(tick, 0)[0], bottom + 18, f"{tick:.1f}", "mm")
    pen.text(20, top - 20, "accuracy", "lm")
    pen.text((left + right) / 2, bottom + 44, "confidence", "mm")
    pen.text(20, floor + 26, "predictions", "lm")
    pen.text(*place(0.03, 0.95), "underconfident", "lm", size=12)
    pen.text(*place(0.97, 0.05), "overconfident", "rm", size=12)
    for height in (floor, bottom):
        pen.line((left, height), (right, height), _SOFT, 1.25)
    pen.line(place(0, 0), place(1, 1), _SOFT, 1.25, dash=6)

    most, tallest = max(b["n"] for b in bins), bottom - floor - 52
    for b in bins:
        x, y = place(b["confidence"], b["accuracy"])
        pen.line((x, y), place(b["confidence"], b["confidence"]), _PALE, 4)
        pen.box((x - 9, bottom - max(1, tallest * b["n"] / most)), (x + 9, bottom), _PALE)
    numbered = -math.inf
    for b in bins:
        # its area is in proportion to the number of predictions
        x, y = place(b["confidence"], b["accuracy"])
        pen.dot((x, y), max(3.0, 11 * math.sqrt(b["n"] / most)), _BLUE)
        number = f"{b['n']:,}"
        half = 3.5 * len(number) + 3
        middle = min(x, wide - 16 - half)
        if middle - half >= numbered:  # else they would run together
            numbered = middle + half
            pen.text(middle, bottom - tallest * b["n"] / most - 9, number, "mm", size=12, colour=_INK)
    # drawn larger and shrunk, for smooth edges
    _save_png(path, picture.resize((2 * wide, 2 * high), Image.Resampling.LANCZOS))


_WIDE, _HIGH = 760, 476
_DRAWN = 4
_PAPER, _INK, _SOFT, _RULE, _WASH = "#ffffff", "#1b1d22", "#5b606b", "#dedfe0", "#f1f1ee"
_BLUE, _PALE = "#2f74bb", "#9cc3ea"


@dataclass(frozen=True)
class _Pen:
    """Draws in units of the finished chart."""

    draw: ImageDraw.ImageDraw

    def line(
        self, a: tuple[float, float], b: tuple[float, float], colour: str, width: float = 1, dash: float = 0
    ) -> None:
        length = math.dist(a, b)
        count = max(1, math.ceil(length / (2 * dash))) if dash else 1
        part = min(1.0, dash / length) if dash and length else 1.0
        for k in range(count):
            ends = [2 * k * part, min(1.0, (2 * k + 1) * part)]
            points = [_DRAWN * (p + (q - p) * share) for share in ends for p, q in zip(a, b, strict=True)]
            self.draw.line(points, fill=colour, width=round(width * _DRAWN))

    def box(self, a: tuple[float, float], b: tuple[float, float], colour: str) -> None:
        self.draw.rectangle([_DRAWN * v for v in (*a, *b)], fill=colour)

    def dot(self, at: tuple[float, float], radius: float, colour: str) -> None:
        x, y = at
        ends = (x - radius, y - radius, x + radius, y + radius)
        self.draw.ellipse([_DRAWN * v for v in ends], fill=colour, outline=_PAPER, width=_DRAWN)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str,
        *,
        size: float = 13,
        colour: str = _SOFT,
        width: float = math.inf,
    ) -> None:
        font = ImageFont.load_default(size * _DRAWN)
        if font.getlength(text) > width * _DRAWN:
            while text and font.getlength(f"{text}...") > width * _DRAWN:
                text = text[:-1]
            text = f"{text}..."
        # the rim keeps numbers legible across a line
        rim = _DRAWN if colour == _BLUE else 0
        at = (x * _DRAWN, y * _DRAWN)
        self.draw.text(at, text, fill=colour, anchor=anchor, font=font, stroke_width=rim, stroke_fill=_PAPER)


def _places(shots: Sequence[int]) -> list[float]:
    """Where numbers of examples stand on an axis of 0..1: 0 at its start, the others by their logarithm."""
    logs = [math.log(n) for n in shots if n]
    if not logs:
        return [0.0] * len(shots)
    # as wide as a step between the others, where those are even
    gap = 1 / len(logs) if 0 in shots else 0.0
    span = max(logs) - min(logs)
    return [(gap + (1 - gap) * (math.log(n) - min(logs)) / span if span else 1.0) if n else 0.0 for n in shots]


def _save_png(path: str | PathLike[str], picture: Image.Image) -> None:
    """Writes a PNG whole or not at all, making folders as needed."""
    data = BytesIO()
    picture.save(data, "PNG")
    write_bytes(path, data.getvalue())
