"""Tables, overlays and the page: what they show, and that nothing in them runs or loads."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsd import report
from dsd.contracts import Example, OptionError, Ranked
from dsd.images import load_image
from dsd.pictures import overlay
from dsd.report import (
    Comparison,
    CurvePoint,
    HeldOut,
    Ranking,
    Training,
    WordMaps,
    demo_report,
    format_interval,
    learning_curve_chart,
    reliability_diagram,
    table,
)

EVIL = "<script>alert('1')</script> & \"quoted\""
VOID = {"img", "meta", "link", "br", "rect", "path", "line", "circle", "polyline"}


def metric(value: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.04, "n": n}


def picture(colour: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, colour)


class Page(HTMLParser):
    """Checks that elements are closed in order; gathers elements, their attributes and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "deep" / "demo.html"
    two = (picture("red"), picture("blue", (600, 300)))
    demo_report(
        path,
        ranking=Ranking(
            picture("red"),
            [Ranked(1, EVIL, -3.25), Ranked(0, "a blue square", -4.5), Ranked(2, "broken", np.nan)],
            frozenset({1}),
        ),
        comparisons=[
            Comparison("comvg", {"attention": metric(0.617), "denoising": metric(0.842)}, {"attention": metric(0.861)}),
            Comparison("winoground", {"attention": metric(0.541)}, {EVIL: metric(0.792)}, chance=0.25),
        ],
        held_out=[
            HeldOut(
                Example("img-1", two, ("a caption",), ((0, 0),), ("subject",)),
                np.array([[0.125], [0.375]]),
                np.array([[0.625], [0.5]]),
            ),
            HeldOut(
                Example("txt-1", two[:1], (EVIL, "other"), ((0, 0),)), np.array([[1.0, 1.0]]), np.array([[np.nan, 0.0]])
            ),
            HeldOut(Example("grp-1", two, ("one", "two"), ((0, 0), (1, 1))), np.zeros((2, 2)), np.eye(2)),
            HeldOut(Example("single", two[:1], ("only",), ((0, 0),)), np.zeros((1, 1)), np.ones((1, 1))),
        ],
        word_maps=WordMaps(picture("red"), EVIL, {EVIL: np.eye(4), "flat": np.ones((4, 4))}),
        training=Training(
            {"method": "prompt", "examples": 128},
            {"loss": [(0, 0.7), (50, 0.3), (100, 0.25)], "one": [(0, 1.0)], "no": []},
        ),
        settings={"model": "tiny", "seed": 7, "score": EVIL},
    )
    return path.read_text("utf-8")


def test_nothing_is_loaded_and_nothing_runs(html: str) -> None:
    page = Page(html)
    markup = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<script|javascript:|\son\w+=", markup)
    assert all(str(a["src"]).startswith("data:image/png;base64,") for a in page.all("img"))
    assert not [a for _, attributes in page.found for a in attributes if a in ("href", "srcset", "action")]


def test_captions_are_shown_as_they_are(html: str) -> None:
    assert Page(html).text.count(EVIL) >= 6


def test_the_numbers_are_there(html: str) -> None:
    text = Page(html).text
    for number in ("-3.25", "-4.50", "nan", "0.617 [0.57, 0.66]", "0.861 [0.81, 0.90]", "0.792", "chance 0.25"):
        assert number in text
    for number in ("0.12", "0.38", "0.62", "128", "tiny", "at the end 0.25", "200"):
        assert number in text


def test_right_and_wrong_are_told_in_words(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert "before ✗ wrong after ✓ right" in text  # img-1
    assert "before ◐ 50 % after ✗ wrong" in text  # txt-1: a tie, then NaN
    assert "before ◐ 50 % after ✓ right" in text  # grp-1
    assert len(re.findall(r"before [✗✓◐]", text)) == 3  # a single pair is no choice


def test_the_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    assert len(page.all("svg")) == 4
    assert "prefers-color-scheme: dark" in html
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_pictures_are_embedded_small(html: str) -> None:
    sizes = set()
    for attributes in Page(html).all("img"):
        content = base64.b64decode(str(attributes["src"]).partition(",")[2])
        with Image.open(io.BytesIO(content)) as image:
            sizes.add(image.size)
            assert ("pixelated" in str(attributes["class"])) == (max(image.size) <= 128)
    assert sizes == {(16, 16), (512, 256), (256, 256)}


def test_bars_are_as_long_as_they_should_be(html: str) -> None:
    bars = [a for a in Page(html).all("rect") if "after" in str(a["class"])]
    lengths = [float(str(a["width"])) for a in bars]
    assert lengths[0] / lengths[1] == pytest.approx(0.861 / 0.792, rel=0.01)


def test_parts_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    demo_report(path, ranking=Ranking(picture("red"), []), comparisons=[], settings={}, title="T & T", summary="S")
    page = Page(path.read_text("utf-8"))
    assert "T & T" in page.text
    assert len(page.all("section")) == 2


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-9, 2e-9], [-3.0, 1e6], [np.nan], [0.1, np.inf, 0.3]])
def test_any_curve_is_drawn_within_its_box(tmp_path: Path, values: list[float]) -> None:
    path = tmp_path / "page.html"
    training = Training(curves={"loss": list(enumerate(values))})
    demo_report(path, ranking=Ranking(picture("red"), []), comparisons=[], training=training, settings={})
    (line,) = Page(path.read_text("utf-8")).all("polyline")
    points = np.array([[float(x) for x in point.split(",")] for point in str(line["points"]).split()])
    assert (points >= [44, 10]).all()
    assert (points <= [384, 140]).all()


def test_format_interval() -> None:
    assert format_interval({"value": 0.8612, "low": 0.8201, "high": 0.9, "n": 10}) == "0.861 [0.82, 0.90]"


def test_table() -> None:
    rows = [
        {"name": "attention", "accuracy": metric(0.6), "n": 12, "p": 0.00151},
        {"name": "a|b\nc", "accuracy": None, "n": 3},
    ]
    assert table(rows, ["name", "accuracy", "n", "p"]).splitlines() == [
        "| name      |           accuracy |   n |     p |",
        "| --------- | -----------------: | --: | ----: |",
        "| attention | 0.600 [0.55, 0.64] |  12 | 0.002 |",
        "| a\\|b c    |                    |   3 |       |",
    ]
    assert table([], ["x"]).splitlines()[0].strip("| ") == "x"


def test_overlay_is_light_where_heat_is() -> None:
    heat = np.zeros((4, 4))
    heat[0, 0] = 5
    found = np.asarray(overlay(picture("gray", (64, 48)), heat), float)
    assert found.shape == (48, 64, 3)
    assert found[2, 2].sum() > 2 * found[40, 56].sum()
    # the scale of the heat does not matter, nor does what is added to it
    np.testing.assert_allclose(np.asarray(overlay(picture("gray", (64, 48)), 3 * heat - 7), float), found, atol=1)


def test_overlay_of_odd_maps() -> None:
    flat = np.asarray(overlay(picture("white"), np.full((2, 2), 3.0)))
    np.testing.assert_array_equal(np.asarray(overlay(picture("white"), np.full((2, 2), np.nan))), flat)
    assert (flat == flat[0, 0]).all()
    holed = np.array([[np.nan, 1.0], [0.0, np.inf]])
    assert np.asarray(overlay(picture("white"), holed)).shape == (16, 16, 3)
    grey = np.asarray(overlay(picture("red"), np.eye(2), alpha=0))
    np.testing.assert_array_equal(grey[..., 0], np.asarray(load_image(picture("red")).convert("L")))
    for heat in (np.zeros(3), np.zeros((0, 4)), np.zeros((1, 2, 3))):
        with pytest.raises(OptionError, match="heat map"):
            overlay(picture("red"), heat)
    with pytest.raises(OptionError, match="alpha"):
        overlay(picture("red"), np.eye(2), alpha=1.5)


@pytest.mark.parametrize("span", [0.0, 1e-6, 0.0859, 0.1, 0.4, 0.4999, 0.5, 0.99, 1.0, 4.3, 9.99, 10.0, 123.0])
def test_ticks_enclose_every_range(span: float) -> None:
    ticks = report._ticks(0.53125, 0.53125 + span)
    assert 2 <= len(ticks) <= 6
    assert ticks[0] <= 0.53125
    assert ticks[-1] >= 0.53125 + span - 1e-9


CURVES = {
    "even": [(0, 0.5), (4, 0.5), (16, 0.6), (64, 0.7), (256, 0.8)],
    "crowded": [(0, 0.1), (1, 0.3), (2, 0.95), (3, 0.95), (1000, 0.95)],
    "zero-shot alone": [(0, 0.5)],
    "without zero-shot": [(4, 0.5), (16, 0.9)],
    "one fit": [(0, 0.05), (7, 0.05)],
}


@pytest.mark.parametrize("values", CURVES.values(), ids=CURVES.keys())
def test_learning_curves_are_drawn(tmp_path: Path, values: list[tuple[int, float]]) -> None:
    points = [CurvePoint(shots, metric(value), (value - 0.04, value + 0.05)) for shots, value in values]
    out = tmp_path / "new" / "curve.png"
    learning_curve_chart(out, points, chance=0.5, title="A long title " * 20, note="a note")
    assert [p.name for p in out.parent.iterdir()] == ["curve.png"]
    with Image.open(out) as drawn:
        pixels = np.asarray(drawn)
    height, width, _ = pixels.shape
    assert (pixels[:, :24] > 250).all()  # nothing is cut at the edges, the title neither
    assert (pixels[:, width - 24 :] > 250).all()
    blue = (pixels.astype(int) - (0x2F, 0x74, 0xBB)).__abs__().sum(2) < 12
    columns = np.flatnonzero(blue[: height * 4 // 5].any(0))
    assert len(columns)
    # from the first to the last point
    if len(values) > 1:
        assert np.ptp(columns) > width / 2


def test_places_on_the_axis_of_examples() -> None:
    assert report._places([0, 4, 16, 64, 256]) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert report._places([0, 10]) == [0, 1]
    assert report._places([2, 4, 16]) == pytest.approx([0, 1 / 3, 1])
    assert report._places([0]) == [0]


def test_a_curve_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        learning_curve_chart(tmp_path, [CurvePoint(0, metric(0.5))], chance=0.5, title="t")


BINS = {
    "spread": [(0.05, 0.0, 3), (0.35, 0.6, 20), (0.55, 0.4, 7), (0.97, 1.0, 12_345)],
    "one, surely right": [(1.0, 1.0, 1)],
    "one, surely wrong": [(1.0, 0.0, 12_345_678)],
    "crowded": [(0.599, 0.5, 1000), (0.601, 0.7, 2000)],
}


@pytest.mark.parametrize("values", BINS.values(), ids=BINS.keys())
def test_reliability_is_drawn(tmp_path: Path, values: list[tuple[float, float, int]]) -> None:
    bins = [dict(zip(("confidence", "accuracy", "n"), value, strict=True)) for value in values]
    out = tmp_path / "new" / "reliability.png"
    reliability_diagram(out, bins, title="A long title " * 20, note="a long note " * 20)
    assert [p.name for p in out.parent.iterdir()] == ["reliability.png"]
    with Image.open(out) as drawn:
        pixels = np.asarray(drawn)
    width = pixels.shape[1]
    for edge in (pixels[:24], pixels[-24:], pixels[:, :24], pixels[:, width - 24 :]):
        assert (edge > 250).all()
    # a point on every bin's place, in a square that begins at a corner
    blue = (pixels.astype(int) - (0x2F, 0x74, 0xBB)).__abs__().sum(2) < 12
    side = 800
    for confidence, accuracy, _ in values:
        assert blue[round(1012 - side * accuracy), round(128 + side * confidence)]


def test_reliability_is_headed_by_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(report._Pen, "text", lambda self, x, y, text, *a, **k: texts.append(text))
    bins = [{"confidence": 0.75, "accuracy": 0.5, "n": 2}, {"confidence": 1.0, "accuracy": 1.0, "n": 1998}]
    reliability_diagram(tmp_path / "a.png", bins, title="mine", note="a note")
    assert texts[:2] == ["ECE 0.000: mine", "a note"]
    assert {"2", "1,998"} <= set(texts)
    reliability_diagram(tmp_path / "a.png", [{**b, "n": 5} for b in bins], title="mine")
    assert "ECE 0.125: mine" in texts


def test_a_diagram_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        reliability_diagram(tmp_path, [{"confidence": 1.0, "accuracy": 1.0, "n": 1}], title="t")
