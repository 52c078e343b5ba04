"""Evaluation of a matcher that is not ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsd.contracts import (
    DsdError,
    Example,
    ImageError,
    ImageInput,
    ManifestError,
    MatcherProtocol,
    ModelError,
    OptionError,
    Pair,
    ScoreTable,
)
from dsd.evaluate import Result, dataset_checksum, evaluate, write_text


class Redness:
    """Scores how red an image is where the text says red, and how blue where it does not."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    @property
    def config(self) -> Mapping[str, Any]:
        return {"model": "redness", "weights": Path("here")}

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        self.calls.append((len(pairs), progress))
        channels = [0 if "red" in text else 2 for _, text in pairs]
        return np.array([np.asarray(i)[..., c].mean() for (i, _), c in zip(pairs, channels, strict=True)], np.float32)

    def score(self, images: Sequence[ImageInput], texts: Sequence[str]) -> ScoreTable:
        raise NotImplementedError


RED, BLUE = Image.new("RGB", (4, 4), "red"), np.zeros((4, 4, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
EXAMPLES = [
    Example("choice", (RED, BLUE), ("red",), ((0, 0),), ("image",)),
    Example("texts", (BLUE,), ("red", "blue", "red again"), ((0, 1),), ("text",)),
    Example("group", (RED, BLUE), ("red", "blue"), ((0, 0), (1, 1)), ("text", "image")),
    Example("fooled", (RED, BLUE), ("red",), ((1, 0),)),
]


def test_evaluate_scores_all_pairs_at_once() -> None:
    matcher = Redness()
    assert isinstance(matcher, MatcherProtocol)
    result = evaluate(matcher, EXAMPLES, progress=True)
    assert matcher.calls == [(2 + 3 + 4 + 2, True)]
    assert result.ids == ("choice", "texts", "group", "fooled")
    assert [s.tolist() for s in result.scores] == [[[255], [0]], [[0, 255, 0]], [[255, 0], [0, 255]], [[255], [0]]]
    assert all(s.dtype == np.float32 for s in result.scores)
    assert result.metrics["accuracy"]["value"] == 0.75
    assert result.metrics["group"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert result.by_tag["text"]["accuracy"]["n"] == 2
    assert result.ties == 0
    assert result.config["model"] == "redness"
    assert result.seconds >= 0
    assert {"python", "numpy"} <= set(result.versions)


def test_results_are_saved_whole_and_read_back(tmp_path: Path) -> None:
    result = evaluate(Redness(), EXAMPLES)
    odd = np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32)
    result = replace(result, ids=(*result.ids, "odd"), scores=(*result.scores, odd))
    path = tmp_path / "new" / "folder" / "result.json"
    result.save(path)
    result.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["metrics"]["accuracy"]["value"] == 0.75
    found = Result.load(path)
    for a, b in zip(found.scores, result.scores, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.float32
    assert found.config == {"model": "redness", "weights": "here"}
    assert {**found.to_dict(), "config": 0} == {**result.to_dict(), "config": 0}


def test_the_checksum_is_of_what_is_asked(tmp_path: Path) -> None:
    first = EXAMPLES[0]
    path = tmp_path / "red.bmp"
    RED.save(path)
    known = dataset_checksum([first])
    assert dataset_checksum([replace(first, images=(path, BLUE), tags=())]) == known
    assert dataset_checksum([replace(first, images=(str(path), BLUE), positives=((0, 0), (0, 0)))]) == known
    others = [
        replace(first, id="other"),
        replace(first, texts=("blue",)),
        replace(first, positives=((1, 0),)),
        replace(first, images=(BLUE, RED)),
        replace(first, images=(RED, BLUE + np.uint8(0) ^ np.uint8(1))),
    ]
    assert len({known, *(dataset_checksum([e]) for e in others), dataset_checksum([first, first])}) == 7
    # where one text ends and the next begins counts
    a, b = (Example("x", (RED,), texts, ((0, 0),)) for texts in (("ab", "c"), ("a", "bc")))
    assert dataset_checksum([a]) != dataset_checksum([b])


def test_broken_examples_are_found_before_scoring(tmp_path: Path) -> None:
    matcher = Redness()
    with pytest.raises(ManifestError, match="no examples"):
        evaluate(matcher, [])
    with pytest.raises(ImageError, match="no such file"):
        evaluate(matcher, [*EXAMPLES, Example("x", (tmp_path / "no.png", RED), ("t",), ((0, 0),))])
    assert not matcher.calls
    with pytest.raises(ManifestError, match="choice"):
        evaluate(matcher, [Example("x", (RED,), ("t",), ((0, 0),))])


def test_a_matcher_that_miscounts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Redness, "predict", lambda *_, **__: np.zeros((3, 1)))
    with pytest.raises(ModelError, match=r"\(3, 1\)"):
        evaluate(Redness(), EXAMPLES)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"examples": 3}', "\x00", '{"examples": [{"id": 1}]}'])
def test_files_that_are_no_results(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ManifestError, match="expected a file saved by evaluation"):
        Result.load(path)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "below"):
        with pytest.raises(OptionError, match="cannot be written"):
            write_text(path, "text")
    assert (tmp_path / "file").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert issubclass(OptionError, DsdError)


def test_no_deep_learning_library_is_imported() -> None:
    code = "import sys, dsd.evaluate, dsd.report; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
