"""Explanations and failures as files for people and programs, above all as HTML pages that load nothing.

Pictures and maps are embedded; a few lines of script, the same in every page, lay a word's map over the picture while
the word is pointed at or has the keyboard's focus. What a page shows is prepared here as plain values; its looks live
in ``templates/seen.html``. No torch: explanations are passed in.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsd.contracts import Example, ImageInput, ManifestError, OptionError
from dsd.evaluate import Result, write_bytes
from dsd.explanation import Explanation, TextDifference, data_uri
from dsd.images import load_image
from dsd.metrics import Choice, choices
from dsd.pictures import HEAT, Shown, grown, number, sheet, veil
from dsd.report import format_interval

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".npz", ".json")

_PIXELATED = 128
"""Pictures up to so many pixels a side are shown with visible pixels."""
_LARGEST = 512
_WORDS = 60
"""Words of a caption that can be pointed at; each has a map in the page."""

_SHADES = 48

Explain = Callable[[ImageInput, str], Explanation]


def save(shown: Shown, path: str | PathLike[str]) -> None:
    """Writes an explanation or a difference, in the kind of file that the path's suffix names.

    ``.png``, ``.svg`` and ``.pdf`` are sheets for papers, ``.html`` a page to hover over, ``.npz`` and ``.json`` are
    for programs: maps at the picture's size as arrays, or everything as text with maps of at most 64 pixels a side.

    Raises:
        OptionError: The suffix is another, or the file cannot be written.
    """
    suffix = check_suffix(path)
    if suffix == ".html":
        content = explanation_page(shown).encode()
    elif suffix == ".json":
        content = (json.dumps(shown.to_dict(), allow_nan=False) + "\n").encode()
    elif suffix == ".npz":
        content = _arrays(shown)
    else:
        page = sheet(shown)
        content = {".png": page.png, ".svg": page.svg, ".pdf": page.pdf}[suffix]()
    write_bytes(path, content)


def check_suffix(path: str | PathLike[str]) -> str:
    """The suffix that decides the kind of file, in small letters.

    Raises:
        OptionError: It is none of those.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(f"got the file {str(path)!r}, expected a name that ends in {', '.join(SUFFIXES)}")
    return suffix


def _arrays(shown: Shown) -> bytes:
    """NumPy's archive, without pickles: what :class:`dsd.explanation.Explanation` holds, by the same names."""

    def of(e: Explanation, end: str = "") -> dict[str, np.ndarray]:
        maps = np.array([p.map for p in e.phrases], np.float32)
        return {
            f"image{end}": np.asarray(e.image),
            f"words{end}": np.array(e.words, np.str_),
            f"maps{end}": e.maps,
            f"strength{end}": e.strength,
            f"phrases{end}": np.array([p.text for p in e.phrases], np.str_),
            f"phrase_maps{end}": maps.reshape(-1, e.image.height, e.image.width),
            f"by_word{end}": e.by_word,
            f"timesteps{end}": np.array(list(e.by_timestep)),
            f"by_timestep{end}": np.array(list(e.by_timestep.values()), np.float32),
            f"layers{end}": np.array(list(e.by_layer), np.str_),
            f"by_layer{end}": np.array(list(e.by_layer.values()), np.float32),
            f"score{end}": np.array(e.score, np.float32),
        }

    if isinstance(shown, Explanation):
        arrays = of(shown)
    else:
        arrays = {**of(shown.a, "_a"), **of(shown.b, "_b"), "difference": np.array(shown.difference, np.float32)}
        if isinstance(shown, TextDifference):
            arrays["map"] = shown.map
            arrays["changes"] = np.array([[c.a, c.b] for c in shown.changes], np.str_).reshape(-1, 2)
            arrays["shares"] = np.array([c.share for c in shown.changes], np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


# Pages


def explanation_page(shown: Shown) -> str:
    """One HTML page that needs no other file and no network."""
    changes = by_word = difference = None
    if isinstance(shown, Explanation):
        first = shown
        title, lead = f"“{shown.text}”", "Where the model sees each word of the caption, and what the score is made of."
        panels = [_panel(shown, shares=True)]
    elif isinstance(shown, TextDifference):
        first = shown.a
        title = "Two captions of one picture"
        lead = "Where the captions disagree about the picture, and which of their words decide."
        panels = [
            _panel(e, side, tag, shares=True, decisive=spans, signed=shown.map)
            for e, side, tag, spans in (
                (shown.a, "first", "A", [c.span_a for c in shown.changes]),
                (shown.b, "second", "B", [c.span_b for c in shown.changes]),
            )
        ]
        changes = _bars([(f"{c.a or '(nothing)'} / {c.b or '(nothing)'}", c.share) for c in shown.changes])
        difference = number(shown.difference, 4, sign=True)
    else:
        first = shown.a
        title, lead = f"“{first.text}”", "Why the caption fits one picture better than the other."
        panels = [_panel(shown.a, "first", "A", shares=True), _panel(shown.b, "second", "B", shares=True)]
        by_word = _bars(list(zip(first.words, shown.by_word, strict=True)))
        difference = number(shown.difference, 4, sign=True)
    return _render(
        "explanation.html",
        title=title,
        lead=lead,
        panels=panels,
        changes=changes,
        by_word=by_word,
        difference=difference,
        settings=_flat({k: v for k, v in first.config.items() if k != "words"}),
    )


@dataclass(frozen=True)
class _Margin:
    """A choice of an example, and by how much what matches beats what does not; NaN counts as lost by far."""

    example: int
    choice: Choice
    value: float


def failure_page(
    result: Result,
    examples: Sequence[Example],
    explain: Explain | None = None,
    *,
    count: int = 6,
    title: str = "Where it fails",
) -> str:
    """One HTML page of a result's worst and closest examples, with the maps of what was right and what was chosen.

    The worst are those lost by the largest margin, the closest those won or lost by the smallest; of each example its
    worst choice counts.

    Args:
        result: Of the examples, in their order.
        examples: What was asked.
        explain: Makes the maps, at most four a shown example; None for results of a matcher that has none.
        count: How many of either kind are shown at most.
        title: Heading.

    Raises:
        ManifestError: The result is of other examples.
        OptionError: ``count`` is negative.
        ImageError: A picture cannot be read.
    """
    return _render(
        "failures.html",
        title=title,
        lead="The examples that a result lost by most, and those that were nearly tied: what matches beside what was "
        "chosen" + (", and where the model sees each word of either." if explain else "."),
        groups=failure_groups(result, examples, explain, count=count),
        metrics={name: format_interval(m) for name, m in result.metrics.items()},
        mapped=explain is not None,
        settings=_flat(result.config),
    )


def failure_groups(
    result: Result, examples: Sequence[Example], explain: Explain | None = None, *, count: int = 6
) -> list[dict[str, Any]]:
    """What :func:`failure_page` shows, as plain values: ``title``, ``note`` and ``cards`` of the worst and the closest.

    Raises:
        ManifestError, OptionError, ImageError: As :func:`failure_page`.
    """
    if count < 0:
        raise OptionError(f"got {count} examples to show, expected 0 or more")
    if tuple(e.id for e in examples) != tuple(result.ids):
        raise ManifestError(
            f"got a result of {len(result.ids)} examples and {len(examples)} examples that are not those, expected the "
            "same in the same order"
        )
    margins = [m for i in range(len(examples)) if (m := _worst(i, result)) is not None]
    lost = sorted((m for m in margins if not m.value > 0), key=lambda m: (m.value, m.example))
    worst = lost[:count]
    # an example is shown once
    left = [m for m in margins if m not in worst and math.isfinite(m.value)]
    closest = sorted(left, key=lambda m: (abs(m.value), m.example))[:count]
    return [
        {
            "title": "The worst",
            "note": f"{len(lost)} of {len(margins)} examples hold a choice that was not won; these are lost by most.",
            "cards": [_failure(m, examples[m.example], explain) for m in worst],
        },
        {
            "title": "The closest",
            "note": "Won or lost by a hair: a little noise may turn them.",
            "cards": [_failure(m, examples[m.example], explain) for m in closest],
        },
    ]


def _worst(index: int, result: Result) -> _Margin | None:
    """The choice of an example that was lost by most, or won by least; None if there is none."""
    found = []
    for choice in choices(result.scores[index], result.positives[index]):
        scores = np.where(np.isnan(choice.scores), -np.inf, choice.scores)
        right, wrong = scores[choice.right].max(), scores[~choice.right].max()
        found.append(_Margin(index, choice, -math.inf if right == -np.inf else float(right - wrong)))
    return min(found, key=lambda m: m.value, default=None)


def _failure(margin: _Margin, example: Example, explain: Explain | None) -> dict[str, Any]:
    choice = margin.choice
    scores = np.where(np.isnan(choice.scores), -np.inf, choice.scores)
    right = int(np.where(choice.right, scores, -np.inf).argmax()) if choice.right.any() else 0
    if not choice.right[right]:  # all of them NaN
        right = int(choice.right.argmax())
    wrong = int(np.flatnonzero(~choice.right)[scores[~choice.right].argmax()])
    of_images = choice.kind == "image"
    pairs = [
        (example.images[i if of_images else choice.given], example.texts[choice.given if of_images else i])
        for i in (right, wrong)
    ]
    numbers = [number(s, 4) for s in choice.scores]
    panels = []
    for (image, text), tag, tone, i in zip(
        pairs, ("matches", "does not match"), ("won", "lost"), (right, wrong), strict=True
    ):
        if explain is None:
            panels.append(_bare(load_image(image), text, numbers[i], tag=tag, tone=tone))
        else:
            panels.append(_panel(explain(image, text), tag=tag, score=numbers[i], tone=tone))
    best = scores.max()
    rows = [
        {
            "picture": _picture(grown(load_image(example.images[i]), 64)) if of_images else None,
            "text": None if of_images else example.texts[i],
            "right": bool(choice.right[i]),
            "chosen": bool(scores[i] == best and best > -np.inf),
            "score": numbers[i],
        }
        for i in range(len(scores))
    ]
    return {
        "id": example.id,
        "tags": example.tags,
        "won": margin.value > 0,
        "margin": f"{abs(margin.value):.4f}" if math.isfinite(margin.value) else "far (no number)",
        "panels": panels,
        "rows": rows,
    }


def _bare(image: Image.Image, text: str, score: str, side: str = "", tag: str = "", tone: str = "") -> dict[str, Any]:
    """A picture and its caption without maps."""
    return {
        "picture": _picture(image),
        "alt": f"Picture for the caption: {text}",
        "text": text,
        "words": [],
        "plain": True,
        "phrases": [],
        "map": None,
        "rest": "",
        "score": score,
        "side": side,
        "tone": tone or side,
        "tag": tag,
        "by_word": None,
    }


def _panel(
    e: Explanation,
    side: str = "",
    tag: str = "",
    *,
    shares: bool = False,
    decisive: Sequence[tuple[int, int]] = (),
    signed: np.ndarray | None = None,
    score: str | None = None,
    tone: str = "",
) -> dict[str, Any]:
    decides = {i for start, stop in decisive for i in range(start, stop)}
    phrases = [p for p in e.phrases if p.stop - p.start > 1]
    values = _bare(e.image, e.text, number(e.score, 4) if score is None else score, side, tag, tone)
    values |= {
        "plain": False,
        "words": [
            {"text": word, "veil": _veil(heat), "decides": i in decides}
            for i, (word, heat) in enumerate(zip(e.words[:_WORDS], e.maps[:_WORDS], strict=True))
        ],
        "phrases": [{"text": p.text, "veil": _veil(p.map)} for p in phrases],
        "map": None if signed is None else _veil(signed),
        "rest": phrases[0].text if phrases and signed is None else "",
    }
    if signed is not None:
        values["rest"] = "where A (orange) and B (blue) explain more"
    if shares:
        layers = list(e.by_layer.items())
        values |= {
            "by_word": _bars(list(zip(e.words, e.by_word, strict=True))),
            "by_timestep": _bars([(f"t = {t}", v) for t, v in e.by_timestep.items()]),
            "by_layer": _bars([(_short(name), v) for name, v in layers]) if len(layers) > 1 else None,
        }
    return values


def _veil(heat: np.ndarray) -> str:
    """A map to lay over a picture, in few shades: a page has many, and each is a quarter as large so."""
    return data_uri(veil(heat).quantize(_SHADES, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE))


def _short(layer: str) -> str:
    """A layer's name without what all of them share."""
    return layer.replace(".transformer_blocks", "").removesuffix(".attn2").replace("_blocks", "").replace(".", " ")


def _bars(rows: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Signed bars over one scale, in percent of its width."""
    finite = [float(v) for _, v in rows if math.isfinite(v)]
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    span = (high - low) or 1.0
    zero = 100 * -low / span
    found = []
    for name, value in rows:
        wide = 100 * abs(value) / span if math.isfinite(value) else 0.0
        found.append(
            {
                "name": name,
                "value": number(value, 4, sign=True) if math.isfinite(value) else "none",
                "zero": round(zero, 2),
                "less": bool(value < 0),
                "left": round(zero - wide if value < 0 else zero, 2),
                "width": round(wide, 2),
            }
        )
    return found


def _picture(image: Image.Image) -> dict[str, Any]:
    if max(image.size) > _LARGEST:
        image = grown(image, _LARGEST)
    return {"src": data_uri(image), "pixelated": max(image.size) <= _PIXELATED}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one list of names and short texts."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}, ")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found[prefix + name] = text if len(text) <= 300 else text[:299] + "…"
    return found


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # pictures do without the template engine

    pages = Environment(
        loader=PackageLoader("dsd"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return pages.get_template(template).render(heat=", ".join(HEAT), **values)
