"""Captions among wrong ones: what competes, what is left out, and the adapter that was learned from them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsd import Matcher
from dsd.adapters import EMBEDDED, Adapter, where_is
from dsd.contracts import AdapterError, Example, OptionError
from dsd.evaluate import evaluate
from dsd.negatives import HardNegatives
from dsd.tasks import with_hard_negatives, world_task
from dsd.tiny import captioned

IMAGE = Image.new("RGB", (8, 8))
POOL = ("a red circle above a blue square", "a blue circle", "a red square", "a small red circle", "a large red circle")


def of(*captions: str) -> list[Example]:
    return [Example(f"e{i}", (IMAGE,), (text,), ((0, 0),), ("tag",)) for i, text in enumerate(captions)]


def test_every_caption_competes_with_wrong_ones() -> None:
    made, left_out = with_hard_negatives(of(*POOL), 3)
    assert left_out == []
    for example, caption in zip(made, POOL, strict=True):
        assert example.texts[example.positives[0][1]] == caption
        assert 2 < len(set(example.texts)) == len(example.texts) <= 4
        assert example.images == (IMAGE,)
        assert example.tags == ("tag",)
    words = sorted(POOL[0].split())
    assert [sorted(text.split()) == words for text in made[0].texts].count(True) == 2  # itself, and a swap


def test_each_right_pair_is_an_example() -> None:
    both = Example("two", (IMAGE, Image.new("RGB", (4, 4))), ("a red circle", "a red square"), ((0, 0), (1, 1), (1, 0)))
    made, _ = with_hard_negatives([both, *of(*POOL)], 2)
    assert [e.id for e in made[:3]] == ["two-0-0", "two-1-1", "two-1-0"]
    assert [e.images[0].size for e in made[:3]] == [(8, 8), (4, 4), (4, 4)]  # type: ignore[union-attr]
    for example in made[1:3]:  # another right caption of a picture is no wrong one
        assert sum(text in both.texts for text in example.texts) == 1


def test_what_cannot_be_made_wrong_is_said() -> None:
    made, left_out = with_hard_negatives(of(*POOL, "hello"), 3)
    assert left_out == [f"e{len(POOL)}"]
    assert len(made) == len(POOL)
    with pytest.raises(OptionError, match="count 0"):
        with_hard_negatives(of(*POOL), 0)


@given(st.integers(1, 6), st.integers(0, 5), st.permutations(POOL))
def test_any_count(count: int, seed: int, captions: list[str]) -> None:
    made, _ = with_hard_negatives(of(*captions), count, seed)
    again, _ = with_hard_negatives(of(*captions), count, seed)
    assert made == again
    for example in made:
        assert 2 <= len(example.texts) <= 1 + count
        right = example.texts[example.positives[0][1]]
        swaps = HardNegatives(captions).swapped(right, 9, random.Random(0))
        assert sum(text in swaps for text in example.texts) >= min(len(swaps), -(-count // 3))


def test_the_right_one_stands_anywhere() -> None:
    captions = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "moon", "cross")]
    made, _ = with_hard_negatives(of(*captions * 20), 3)
    places = np.bincount([e.positives[0][1] for e in made], minlength=4)
    assert places.min() > 25


def test_recipe_of_the_embedded_adapter() -> None:
    """Pictures of the pretraining part, none of which pretraining saw; the same again, however many."""
    first, second = (replace(stage, pictures=20) for stage in captioned.STAGES)
    config = captioned.Captions((first, second), held_out=10)
    few, held_out = captioned.examples(config, 0)
    more, _ = captioned.examples(captioned.Captions((replace(first, pictures=25),), held_out=5), 0)
    assert [len(few), len(held_out)] == [20, 10]
    assert [e.id for e in more[:20]] == [e.id for e in few]
    assert all(2 <= len(e.texts) <= 4 for e in few)
    later = [e.id for part in captioned.examples(config, 1) for e in part]
    assert later == [f"captioned-{i}" for i in range(30, 60)]


@pytest.mark.slow
def test_a_short_recipe_runs_and_goes_on(tmp_path: Path) -> None:
    stage = captioned.Stage(pictures=24, steps=5, check_every=1, learning_rate=5e-3, detail=0.5)
    captioned.learn(captioned.Captions((stage,), held_out=8, rank=2), tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").base is not None
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_a_stage_learns_on_from_the_one_before(tmp_path: Path) -> None:
    stage = captioned.Stage(pictures=24, steps=5, check_every=1, learning_rate=5e-3, detail=0.5)
    before = Adapter.load("tiny-captions")
    before.save(tmp_path / "adapter.1")  # as if it was stopped after its first stage
    captioned.learn(captioned.Captions((stage, stage), held_out=8), tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").training["started"] == before.digest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "adapter.1"]


# The adapter that comes with the package


def test_embedded_adapter_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Adapter.load("tiny-captions")
    assert adapter.score.kind == "attention"
    assert adapter.training["config"]["negatives"] == 0
    (tmp_path / "tiny-captions").mkdir()  # what is there goes first
    with pytest.raises(AdapterError, match="got no adapter"):
        Adapter.load("tiny-captions")
    assert where_is("other") == Path("other")
    assert set(EMBEDDED) == {"tiny-captions"}


def test_embedded_adapter_knows_tasks_it_never_saw() -> None:
    """In one pass; attention is near chance without it, which is one half of the choices."""
    matcher = Matcher.from_pretrained("tiny", adapter="tiny-captions", device="cpu")
    assert matcher.score_config.passes == 1
    for task, least in (("comvg", 0.75), ("winoground", 0.7)):
        found = evaluate(matcher, world_task(task, "val", "standard", 60, 1))
        assert found.metrics["accuracy"]["value"] > least
