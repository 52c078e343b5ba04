"""Files of explanations and failures: what they hold, that nothing in them loads, and that captions stay text."""

from __future__ import annotations

import io
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dsd.contracts import Example, ManifestError, OptionError
from dsd.evaluate import Result
from dsd.explanation import Change, Explanation, ImageDifference, Phrase, TextDifference
from dsd.pages import SUFFIXES, explanation_page, failure_page, save
from dsd.pictures import grown, overlay, sheet, signed_overlay, veil

EVIL = "<script>alert('1')</script> & \"quoted\""
WORDS = ("a", "red", EVIL, "猫", "cat")


def blob(side: int, row: int, column: int) -> np.ndarray:
    rows, columns = np.indices((side, side))
    return np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / side).astype(np.float32)


def explanation(side: int = 24, words: tuple[str, ...] = WORDS, score: float = 0.5) -> Explanation:
    maps = np.stack([blob(side, i * 3 % side, 2) for i in range(len(words))])
    by_word = np.linspace(-0.2, 0.4, len(words)).astype(np.float32)
    by_word[0] = np.nan
    return Explanation(
        image=Image.new("RGB", (side, side), "teal"),
        text=" ".join(words),
        words=words,
        maps=maps,
        strength=np.ones(len(words), np.float32),
        phrases=(Phrase(f"red {EVIL}", 1, 3, maps[1]),) if len(words) > 2 else (),
        score=score,
        by_timestep={200: 0.2, 500: 0.3},
        by_layer={"mid_block.attentions.0.transformer_blocks.0.attn2": 0.1, "denoising": 0.4},
        by_word=by_word,
        crop=(0, 0, side, side),
        config={"model": EVIL, "score": {"kind": "denoising", "timesteps": [200, 500]}},
    )


def texts() -> TextDifference:
    a, b = explanation(), explanation(words=("a", "blue", "cat"), score=0.25)
    changes = (Change("red", "blue", (1, 2), (1, 2), 0.5), Change(EVIL, "", (2, 4), (2, 2), -0.25))
    return TextDifference(
        a, b, 0.25, blob(24, 3, 3) - blob(24, 20, 20), 0.1, changes, {200: 0.1, 500: 0.15}, {"x": 0.25}
    )


def images() -> ImageDifference:
    a, b = explanation(), explanation(score=0.75)
    return ImageDifference(a, b, -0.25, a.by_word - 2 * b.by_word, {200: -0.1, 500: -0.15}, {"x": -0.25})


class Reader(HTMLParser):
    """What a page would load or run, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data-veil"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_page(page: str) -> Reader:
    read = Reader(page)
    assert all(url.startswith("data:image/png;base64,") for url in read.loads)
    assert read.handlers == []
    assert read.tags.count("script") == 1
    assert "alert(" not in re.findall(r"<script>.*?</script>", page, re.S)[0]
    assert "default-src 'none'" in page
    assert EVIL not in page
    return read


# Files


@pytest.mark.parametrize("shown", [explanation(), texts(), images()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("end", SUFFIXES)
def test_files_by_their_ending(shown: Any, end: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"map{end.upper()}"
    save(shown, path)
    content = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    save(shown, path)
    assert path.read_bytes() == content
    if end == ".png":
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 300
    elif end == ".json":
        values = json.loads(content)
        assert values.get("difference", values.get("score")) in (0.25, -0.25, 0.5)
    elif end == ".npz":
        arrays = np.load(path, allow_pickle=False)
        first = shown if isinstance(shown, Explanation) else shown.a
        tail = "" if isinstance(shown, Explanation) else "_a"
        np.testing.assert_array_equal(arrays[f"maps{tail}"], first.maps)
        assert tuple(arrays[f"words{tail}"]) == WORDS
        assert arrays[f"phrase_maps{tail}"].shape == (1, 24, 24)
        assert arrays[f"image{tail}"].shape == (24, 24, 3)


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "map.jpg", tmp_path / "map", tmp_path / "file" / "map.png", tmp_path / "folder.png"):
        with pytest.raises(OptionError, match="expected"):
            save(explanation(), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


def test_labels_of_svg_are_text() -> None:
    for shown in (explanation(), texts(), images()):
        root = ElementTree.fromstring(sheet(shown).svg())
        tags = [element.tag.split("}")[1] for element in root.iter()]
        assert set(tags) == {"svg", "rect", "image", "text"}
        found = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
        assert any("score" in text for text in found)
        for element in root.iter():
            if element.tag.endswith("image"):
                assert element.attrib["href"].startswith("data:image/png;base64,")
    found = [e.text for e in ElementTree.fromstring(sheet(explanation()).svg()).iter() if e.tag.endswith("text")]
    assert "猫" in found


def test_pdf_is_well_formed() -> None:
    for shown in (explanation(), texts(), images()):
        pdf = sheet(shown).pdf()
        start = int(re.findall(rb"startxref\n(\d+)", pdf)[0])
        rows = pdf[start:].split(b"\n")
        assert rows[0] == b"xref"
        count = int(rows[1].split()[1])
        for number in range(1, count):
            at = int(rows[2 + number][:10])
            assert pdf[at:].startswith(b"%d 0 obj" % number)
        for head, at in [(m.group(0), m.end()) for m in re.finditer(rb"<<[^\n]*/Length (\d+) >>\nstream\n", pdf)]:
            length = int(re.findall(rb"/Length (\d+)", head)[0])
            assert pdf[at + length :].startswith(b"\nendstream")
            data = zlib.decompress(pdf[at : at + length])
            size = re.findall(rb"/Width (\d+) /Height (\d+)", head)
            if size:
                assert len(data) == 3 * int(size[0][0]) * int(size[0][1])
            else:
                labels = [bytes.fromhex(h.decode()).decode("cp1252") for h in re.findall(rb"<([0-9a-f]+)> Tj", data)]
                assert "the picture" in labels


def test_long_labels_are_cut() -> None:
    long = replace(explanation(), text="dog " * 200)
    found = [e.text or "" for e in ElementTree.fromstring(sheet(long).svg()).iter() if e.tag.endswith("text")]
    assert any(text.endswith("…") for text in found)
    assert max(map(len, found)) < 150


# Heat


def test_signed_heat_has_a_colour_for_each_sign() -> None:
    values = np.zeros((8, 8))
    values[:, :3], values[:, 5:] = 1, -1
    found = np.asarray(signed_overlay(Image.new("RGB", (64, 64), "grey"), values), int)
    red, _, blue = found[32, 4]
    assert red > blue + 60
    red, _, blue = found[32, 60]
    assert blue > red + 60
    assert np.ptp(found[32, 32]) < 12
    assert np.array_equal(found, np.asarray(signed_overlay(Image.new("RGB", (64, 64), "grey"), 5 * values)))


def test_veils_are_clear_where_they_should_be() -> None:
    signed = np.asarray(veil(np.array([[1.0, 0.0, -1.0]], np.float32)))
    assert signed.shape[2] == 4
    assert signed[0, 36, 3] < 30 < 150 < min(signed[0, 0, 3], signed[0, -1, 3])
    plain = np.asarray(veil(blob(24, 12, 12)))
    assert plain[36, 36, 3] < plain[0, 0, 3]
    assert plain[36, 36, :3].sum() > plain[0, 0, :3].sum() + 200


def test_sizes() -> None:
    assert grown(Image.new("RGB", (32, 32))).size == (256, 256)
    assert grown(Image.new("RGB", (3000, 1000))).size == (256, 85)
    with pytest.raises(OptionError, match="heat"):
        overlay(Image.new("RGB", (8, 8)), np.zeros(3))
    large = explanation(side=600)
    assert len(explanation_page(large)) < 400_000
    assert len(json.dumps(large.to_dict(image=False))) < 400_000


# Pages


@pytest.mark.parametrize("shown", [explanation(), texts(), images()], ids=lambda s: type(s).__name__)
def test_explanation_page(shown: Any) -> None:
    read = check_page(explanation_page(shown))
    assert read.tags.count("button") >= len(WORDS)
    assert EVIL in read.texts
    assert "Settings" in read.texts


def test_changes_are_on_the_page() -> None:
    page = explanation_page(texts())
    read = check_page(page)
    assert "red / blue" in read.texts
    assert f"{EVIL} / (nothing)" in read.texts
    assert "+0.5000" in read.texts
    assert page.count('class="decides"') == 3 + 1  # words 1 to 3 of the one, 1 of the other
    same = replace(texts(), changes=())
    assert "the same words" in explanation_page(same)


def failing() -> tuple[Result, list[Example]]:
    """Text choices won by 3, 2, 1, tied, lost by 1, 2, 3 and one that is NaN; then an image choice lost by 10."""
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    margins = [3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, np.nan]
    examples = [Example(f"e{i}", (red,), ("right", EVIL), ((0, 0),), ("tag",)) for i in range(len(margins))]
    scores = [np.array([[m, 0.0]], np.float32) for m in margins]
    examples.append(Example("pictures", (red, blue), ("a blue one",), ((1, 0),)))
    scores.append(np.array([[10.0], [0.0]], np.float32))
    result = Result(
        metrics={"accuracy": {"value": 0.4, "low": 0.2, "high": 0.6, "n": 9}},
        by_tag={},
        ties=1,
        nans=1,
        ids=tuple(e.id for e in examples),
        positives=tuple(e.positives for e in examples),
        tags=tuple(e.tags for e in examples),
        scores=tuple(scores),
        config={"name": EVIL},
        dataset="x",
        seconds=1.0,
    )
    return result, examples


def shown_ids(page: str) -> list[str]:
    return re.findall(r'aria-label="Example (\w+)"', page)


def test_worst_and_closest() -> None:
    result, examples = failing()
    page = failure_page(result, examples, count=3)
    read = check_page(page)
    assert shown_ids(page) == ["e7", "pictures", "e6", "e3", "e2", "e4"]
    assert "6 of 9 examples" in page
    assert "button" not in read.tags
    assert EVIL in "".join(read.texts)
    assert "✗ wrong by 10.0000" in page
    assert "✗ wrong by far (no number)" in page
    assert "✓ right by 1.0000" in page
    # nobody is shown twice, and nobody is left out
    everyone = shown_ids(failure_page(result, examples, count=99))
    assert sorted(everyone) == sorted(result.ids)
    assert shown_ids(failure_page(result, examples, count=0)) == []


def test_failures_have_maps_of_right_and_wrong() -> None:
    result, examples = failing()
    asked: list[tuple[Any, str]] = []

    def explain(image: Any, text: str) -> Explanation:
        asked.append((image, text))
        return explanation(words=("a", EVIL))

    page = failure_page(result, examples, explain, count=2)
    read = check_page(page)
    assert len(asked) == 8
    assert [text for _, text in asked[:2]] == ["right", EVIL]
    assert [text for _, text in asked[2:4]] == ["a blue one"] * 2
    assert asked[2][0].getpixel((0, 0)) == (0, 0, 255)
    assert asked[3][0].getpixel((0, 0)) == (255, 0, 0)
    assert read.tags.count("button") == 16
    # scores are the result's, whatever explains
    assert "score 10.0000" in page


def test_failures_of_others_are_refused() -> None:
    result, examples = failing()
    with pytest.raises(ManifestError, match="same"):
        failure_page(result, examples[1:])
    with pytest.raises(OptionError, match="0 or more"):
        failure_page(result, examples, count=-1)


def test_pictures_stay_small() -> None:
    result, examples = failing()
    large = Image.effect_noise((3000, 2000), 50).convert("RGB")
    examples[8] = replace(examples[8], images=(large, large))
    page = failure_page(result, examples, count=1)
    sizes = []
    for uri in re.findall(r"data:image/png;base64,([^\"]+)", page):
        import base64

        sizes.append(max(Image.open(io.BytesIO(base64.b64decode(uri))).size))
    assert max(sizes) <= 512
