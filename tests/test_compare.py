"""Two results side by side: what their difference is worth, and where they differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsd.cli import main
from dsd.contracts import Example, OptionError
from dsd.evaluate import Result, compare, dataset_checksum
from dsd.metrics import evaluate_scores, mcnemar, outcomes, paired_difference

PICTURE = np.zeros((2, 2, 3), np.uint8)


def result(examples: list[Example], tables: list[np.ndarray], **values: Any) -> Result:
    made = Result(
        **evaluate_scores(examples, tables),
        ids=tuple(e.id for e in examples),
        positives=tuple(e.positives for e in examples),
        tags=tuple(e.tags for e in examples),
        scores=tuple(np.asarray(table, np.float32) for table in tables),
        config={},
        dataset=dataset_checksum(examples),
        seconds=1.0,
    )
    return replace(made, **values)


def choices(count: int) -> list[Example]:
    """Text choices; every third is tagged ``odd``, the others ``even``."""
    return [
        Example(f"e{i}", (PICTURE,), ("a", "b", "c"), ((0, 0),), ("even" if i % 3 else "odd",)) for i in range(count)
    ]


def scored(count: int, seed: int, skill: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.array([[skill, 0, 0]]) + rng.normal(size=(1, 3)) for _ in range(count)]


def test_differences_are_paired_by_example() -> None:
    examples = choices(90)
    a, b = result(examples, scored(90, 0, 0.5)), result(examples, scored(90, 1, 1.5))
    found = compare(a, b)
    won = [outcomes(examples, r.scores) for r in (a, b)]
    accuracy = found.metrics["accuracy"]
    assert accuracy["difference"] == paired_difference(won[1], won[0])
    assert accuracy["difference"]["value"] > 0 > compare(b, a).metrics["accuracy"]["difference"]["value"]
    assert (accuracy["a"], accuracy["b"]) == (a.metrics["accuracy"], b.metrics["accuracy"])
    assert set(found.metrics) == set(a.metrics)
    for of in found.metrics.values():
        gain = of["difference"]
        assert gain["value"] == pytest.approx(of["b"]["value"] - of["a"]["value"])
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert found.mcnemar == {"n": 90, **mcnemar(won[0] == 1, won[1] == 1)}
    assert set(found.by_tag) == {"odd", "even"}
    odd = [e.tags == ("odd",) for e in examples]
    inside = found.by_tag["odd"]
    assert inside["metrics"]["accuracy"]["difference"] == paired_difference(won[1][odd], won[0][odd])
    assert inside["mcnemar"] == {"n": 30, **mcnemar(won[0][odd] == 1, won[1][odd] == 1)}
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_result_does_not_differ_from_itself() -> None:
    a = result(choices(20), scored(20, 0, 0.5))
    found = compare(a, a)
    for of in (*found.metrics.values(), *found.by_tag["odd"]["metrics"].values()):
        assert of["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert found.mcnemar["p"] == 1
    assert (found.disagreements, found.disagreeing) == ((), 0)


def test_the_examples_that_differ_most_are_named() -> None:
    examples = choices(5)
    first = [np.array([row]) for row in ([1.0, 0, 0], [2, 0, 0], [1, 0, 0], [1, 1, 0], [9, 0, 0])]
    second = [np.array([row]) for row in ([0.0, 1, 0], [0, 9, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0])]
    found = compare(result(examples, first), result(examples, second))
    assert [(d.id, d.a, d.b) for d in found.disagreements] == [("e1", 1, 0), ("e0", 1, 0), ("e3", 0.5, 1)]
    assert found.disagreeing == 3
    named = compare(result(examples, first), result(examples, second), most=1)
    assert ([d.id for d in named.disagreements], named.disagreeing) == (["e1"], 3)


def test_a_group_is_right_if_all_its_choices_are_won() -> None:
    groups = [Example(f"g{i}", (PICTURE, PICTURE + 1), ("a", "b"), ((0, 0), (1, 1)), ("swap",)) for i in range(3)]
    whole, half = np.eye(2), np.array([[1.0, 0], [0.5, 0.2]])
    found = compare(result(groups, [whole, half, half]), result(groups, [whole, whole, whole]))
    assert found.mcnemar == {"n": 3, **mcnemar([True, False, False], [True, True, True])}
    assert found.metrics["group"]["difference"]["value"] == pytest.approx(2 / 3)
    assert found.by_tag["swap"]["metrics"]["group"]["b"]["value"] == 1


def test_a_set_is_compared_choice_by_choice() -> None:
    whole = Example("set", (PICTURE,) * 4, tuple("abcd"), tuple((k, k) for k in range(4)))
    worse = np.eye(4)
    worse[2, 2] = -1
    found = compare(result([whole], [np.eye(4)]), result([whole], [worse]))
    assert found.mcnemar["n"] == 8
    assert {d.id for d in found.disagreements} == {"set, image 2", "set, text 2"}
    assert found.metrics["text-recall@1"]["difference"]["value"] == -1 / 4


def test_credits_are_compared_and_calibration_shown() -> None:
    examples = choices(4)
    credits = (np.array([[1.0, 0.5, 0.0]]),) * 4
    first, second = [np.array([[0.0, 1, 0]])] * 4, [np.array([[0.0, 0, 1]])] * 4
    metrics = compare(
        result(examples, first, credits=credits, **evaluate_scores(examples, first, credits=credits, scale=1.0)),
        result(examples, second, credits=credits, **evaluate_scores(examples, second, credits=credits)),
    ).metrics
    assert metrics["soft-accuracy"]["difference"]["value"] == -0.5
    assert metrics["ece"]["a"] is not None
    assert (metrics["ece"]["b"], metrics["ece"]["difference"]) == (None, None)


def test_missing_scores_and_examples_without_a_choice() -> None:
    examples = [*choices(3), Example("pair", (PICTURE,), ("a",), ((0, 0),), ("single",))]
    lone = np.zeros((1, 1))
    a = result(examples, [np.full((1, 3), np.nan), np.array([[np.inf, 0, 0]]), np.array([[0, -np.inf, 0]]), lone])
    b = result(examples, [*scored(3, 0, 1.0), lone])
    found = compare(a, b)
    assert found.mcnemar["n"] == 3
    assert "single" not in found.by_tag
    assert found.metrics["accuracy"]["a"]["n"] == 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_results_on_other_examples_are_refused() -> None:
    a, b = result(choices(4), scored(4, 0, 1)), result(choices(3), scored(3, 0, 1))
    with pytest.raises(OptionError, match="different examples") as caught:
        compare(a, b)
    assert a.dataset in str(caught.value)
    assert "evaluate both on the same" in str(caught.value)


# The command


def test_the_command_reads_files_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = choices(40)
    result(examples, scored(40, 0, 0.5)).save(tmp_path / "a.json")
    result(examples, scored(40, 1, 1.5)).save(tmp_path / "b" / "result.json")
    argv = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b")]
    assert main([*argv, "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert (found["a"], found["b"]) == tuple(argv[1:])
    assert {"value", "low", "high", "p"} == set(found["metrics"]["accuracy"]["difference"])
    assert {"n", "only_a", "only_b", "p", "mid_p"} == set(found["mcnemar"])
    assert set(found["by_tag"]) == {"even", "odd"}
    assert len(found["disagreements"]) <= found["disagreeing"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for shown in ("accuracy, odd", "McNemar", "mid-p", found["disagreements"][0]["id"]):
        assert shown in out


def test_the_command_refuses_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    result(choices(4), scored(4, 0, 1)).save(a)
    result(choices(3), scored(3, 0, 1)).save(b)
    (tmp_path / "empty").mkdir()
    for first, second, named in ((a, b, "different examples"), (a, tmp_path / "no.json", "no.json")):
        assert main(["compare", str(first), str(second)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert named in err
        assert err.count("\n") == 1
    assert main(["compare", str(a), str(tmp_path / "empty")]) == 2
    assert "result.json" in capsys.readouterr().err
