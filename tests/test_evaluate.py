"""Evaluation of a matcher that is not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
from dsd.evaluate import Result, claim, dataset_checksum, evaluate, subset, write_text
from dsd.work import Cost, Work


class Redness:
    """Scores how red an image is where the text says red, and how blue where it does not."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls: list[int] = []
        self.stop = stop

    @property
    def config(self) -> Mapping[str, Any]:
        return {"model": "redness", "weights": Path("here")}

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append(len(pairs))
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


def test_evaluate_scores_each_distinct_pair_once() -> None:
    matcher = Redness()
    assert isinstance(matcher, MatcherProtocol)
    result = evaluate(matcher, EXAMPLES)
    assert matcher.calls == [5]  # the red one with red and blue, the blue one with red again, too
    assert result.ids == ("choice", "texts", "group", "fooled")
    assert [s.tolist() for s in result.scores] == [[[255], [0]], [[0, 255, 0]], [[255, 0], [0, 255]], [[255], [0]]]
    assert all(s.dtype == np.float32 for s in result.scores)
    assert result.positives == tuple(e.positives for e in EXAMPLES)
    assert result.tags == tuple(e.tags for e in EXAMPLES)
    assert result.metrics["accuracy"]["value"] == 0.75
    assert result.metrics["group"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert result.by_tag["text"]["accuracy"]["n"] == 2
    assert (result.ties, result.nans) == (0, 0)
    assert result.config["model"] == "redness"
    assert result.seconds >= 0
    assert {"python", "numpy"} <= set(result.versions)


def test_results_are_saved_whole_and_read_back(tmp_path: Path) -> None:
    result = evaluate(Redness(), EXAMPLES)
    odd = np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32)
    result = replace(
        result,
        ids=(*result.ids, "odd"),
        scores=(*result.scores, odd),
        positives=(*result.positives, ((0, 1), (0, 3))),
        tags=(*result.tags, ("a", "b")),
        credits=(None, np.array([[0.0, 1.0, 0.3]]), None, None, None),
        request={"limit": 5},
    )
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
    assert (found.positives, found.tags, found.request) == (result.positives, result.tags, {"limit": 5})
    assert found.credits is not None
    np.testing.assert_array_equal(found.credits[1], [[0.0, 1.0, 0.3]])
    assert [worth is None for worth in found.credits] == [True, False, True, True, True]
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
    credited = dataset_checksum([first], [np.array([[0.5], [0.0]])])
    assert credited not in (known, dataset_checksum([first], [np.array([[0.6], [0.0]])]))
    assert dataset_checksum([first], [None]) == known
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


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"examples": 3}', "\x00", '{"examples": [{"id": 1}]}', '{"examples": [1]}']
)
def test_files_that_are_no_results(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ManifestError, match="expected a file saved by evaluation"):
        Result.load(path)


def test_scores_as_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    result = evaluate(Redness(), EXAMPLES)
    result.save_scores(tmp_path / "new" / "scores.parquet")
    table = parquet.read_table(tmp_path / "new" / "scores.parquet")
    assert table.schema.metadata[b"dataset"].decode() == result.dataset
    assert str(table.schema.field("score").type) == "float"
    rows = table.to_pylist()
    assert len(rows) == 11
    for example, scores in zip(EXAMPLES, result.scores, strict=True):
        for i, row in enumerate(scores):
            for t, score in enumerate(row):
                assert rows.pop(0) == {
                    "id": example.id,
                    "tags": list(example.tags),
                    "image": i,
                    "text": t,
                    "match": (i, t) in example.positives,
                    "score": score,
                }
    first = (tmp_path / "new" / "scores.parquet").read_bytes()
    result.save_scores(tmp_path / "new" / "scores.parquet")
    assert (tmp_path / "new" / "scores.parquet").read_bytes() == first
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["scores.parquet"]


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.evaluate.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'discriminative-diffusion\[data\]'"):
        evaluate(Redness(), EXAMPLES).save_scores(tmp_path / "scores.parquet")
    assert not list(tmp_path.iterdir())


# Going on where it was stopped


def many(count: int, texts: int = 2) -> list[Example]:
    """Text choices about pictures of random colours; a quarter shares its picture with the one before."""
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (2, 2, 3), np.uint8) for _ in range(count)]
    said = tuple("red " * k + "thing" for k in range(texts))
    return [Example(f"{i}", (shown[i - (i % 4 == 3)],), said, ((0, i % texts),)) for i in range(count)]


def values(result: Result) -> dict[str, Any]:
    """All of a result but the time that it took."""
    return {**json.loads(json.dumps(result.to_dict(), default=str)), "seconds": 0}


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_stopped_evaluation_goes_on(tmp_path: Path, stop: int) -> None:
    examples = many(200)
    whole, stopped, rest = Redness(), Redness(stop), Redness()
    expected = evaluate(whole, examples, out=tmp_path / "whole")
    assert sum(whole.calls) == 300
    assert len(whole.calls) == 5
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, examples, out=tmp_path / "run")
    assert evaluate(rest, examples, out=tmp_path / "run").seconds > 0
    assert stopped.calls + rest.calls == whole.calls
    for name in ("whole", "run"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["request.json", "result.json"]
        assert values(Result.load(tmp_path / name)) == values(expected) == values(evaluate(Redness(), examples))
    # what is finished is read
    again = Redness()
    assert values(evaluate(again, examples, out=tmp_path / "run")) == values(expected)
    assert again.calls == []


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_evaluate
from dsd.evaluate import evaluate

class Slow(test_evaluate.Redness):
    def predict(self, pairs, *, progress=False):
        time.sleep(0.05)
        return super().predict(pairs)

evaluate(Slow(), test_evaluate.many(1500), out=sys.argv[2])
"""


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parts = tmp_path / "run" / "parts"
    for _ in range(1000):
        time.sleep(0.02)
        if parts.exists() and len(list(parts.glob("[0-9]*.json"))) >= 3:
            break
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    finished = len(list(parts.glob("[0-9]*.json")))
    rest, whole = Redness(), Redness()
    found = evaluate(rest, many(1500), out=tmp_path / "run")
    assert values(found) == values(evaluate(whole, many(1500)))
    assert 3 <= finished < len(whole.calls)
    assert rest.calls == whole.calls[finished:]


def test_a_broken_part_is_scored_again(tmp_path: Path) -> None:
    examples = many(200)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Redness(4), examples, out=tmp_path)
    (tmp_path / "parts" / "000000.json").write_text('{"scores": [1')
    (tmp_path / "parts" / "000001.json").write_bytes(b"")
    other = json.loads((tmp_path / "parts" / "000002.json").read_text())
    (tmp_path / "parts" / "000002.json").write_text(json.dumps({**other, "request": "another"}))
    rest = Redness()
    assert values(evaluate(rest, examples, out=tmp_path)) == values(evaluate(Redness(), examples))
    assert len(rest.calls) == 4


def test_the_folder_of_another_request_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = many(20)
    evaluate(Redness(), examples, out=tmp_path / "a")
    before = (tmp_path / "a" / "result.json").read_bytes()
    with pytest.raises(OptionError, match=r"other: dataset\).*another folder"):
        evaluate(Redness(), examples[:-1], out=tmp_path / "a")
    monkeypatch.setattr(Redness, "config", {"model": "blueness"})
    with pytest.raises(OptionError, match=r"other: matcher\)"):
        evaluate(Redness(), examples, out=tmp_path / "a")
    with pytest.raises(OptionError, match=r"other: .*limit"):
        evaluate(Redness(), examples, out=tmp_path / "a", request={"limit": 3})
    assert (tmp_path / "a" / "result.json").read_bytes() == before
    (tmp_path / "a" / "request.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        evaluate(Redness(), examples, out=tmp_path / "a")
    (tmp_path / "a" / "request.json").unlink()
    with pytest.raises(OptionError, match="unknown"):
        evaluate(Redness(), examples, out=tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file"):
        evaluate(Redness(), examples, out=tmp_path / "file")


def test_a_folder_can_be_claimed_before(tmp_path: Path) -> None:
    examples, request = many(20), {"learned": "first"}
    digest = claim(tmp_path, dataset_checksum(examples), request)
    assert digest == claim(tmp_path, dataset_checksum(examples), request)
    result = evaluate(Redness(), examples, out=tmp_path, request=request)
    assert result.request == request
    with pytest.raises(OptionError, match="other: learned"):
        claim(tmp_path, dataset_checksum(examples), {"learned": "last"})


def test_the_cost_is_told_once_after_the_first_parts(tmp_path: Path) -> None:
    told: list[Cost] = []
    evaluate(Redness(), many(2), announce=told.append)
    assert told == []  # nothing is left by then
    evaluate(Redness(), many(200), announce=told.append)
    (cost,) = told
    assert (cost.done, cost.pairs, cost.images, cost.texts, cost.measured) == (32, 268, 134, 2, 24)
    assert cost.seconds > 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(Redness(2), many(200), out=tmp_path)
    evaluate(Redness(), many(200), out=tmp_path, announce=told.append)
    assert (told[1].done, told[1].pairs) == (288, 12)


@pytest.mark.parametrize("texts", [1, 3, 50, 300])
def test_pairs_of_an_image_stay_together(texts: int) -> None:
    examples = many(60, texts)
    seen: list[list[int]] = []

    class Watch(Redness):
        def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
            seen.append([id(image) for image, _ in pairs])
            return super().predict(pairs)

    work = Work(examples, [[str(id(image)) for image in e.images] for e in examples])
    work.do(Watch())
    assert sum(map(len, seen)) == 45 * texts
    assert max(map(len, seen)) <= 128
    owners: dict[int, list[int]] = {}
    for part, images in enumerate(seen):
        for image in set(images):
            owners.setdefault(image, []).append(part)
    for parts in owners.values():  # in one part, or alone in several
        assert len(parts) == 1 or all(len(set(seen[part])) == 1 for part in parts)


def test_there_are_not_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.work._MOST_PARTS", 2)
    matcher = Redness()
    evaluate(matcher, many(400))
    assert matcher.calls == [8, 24, 300, 268]


def test_subsets_are_random_nested_and_in_order() -> None:
    examples = many(50)
    small, large = subset(examples, 10), subset(examples, 30)
    assert [e.id for e in small] == [e.id for e in large if e in small]
    assert [int(e.id) for e in large] == sorted(int(e.id) for e in large)
    assert [e.id for e in subset(examples[::-1], 10)] == [e.id for e in small][::-1]
    assert small != examples[:10]
    assert subset(examples, 10, seed=1) != small
    assert subset(examples, 50) == examples
    for count in (0, -1, 51):
        with pytest.raises(OptionError, match="expected 1 to 50"):
            subset(examples, count)
    from dsd.tasks import few_shot_split

    split = few_shot_split(examples, 10, seed=3)
    assert split.shots == subset(examples, 10, seed=3)


def test_credits_and_scale_reach_the_metrics() -> None:
    credits = [None, np.array([[0.0, 0.6, 1.0]]), None, None]
    metrics = evaluate(Redness(), EXAMPLES, credits=credits, scale=1.0).metrics
    assert metrics["soft-accuracy"]["value"] == 0.6
    assert metrics["ece"]["value"] == pytest.approx(1 / 7)  # one of seven choices is lost, all are sure


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
