"""Captions back into claims, and claims into scenes for which they hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsd.contracts import TextError
from dsd.tiny import captions, sketch, world


@given(st.integers(0, 10**6), st.sampled_from(["easy", "standard"]))
def test_what_is_said_is_read_back(seed: int, level: world.Level) -> None:
    rng = random.Random(seed)
    claim = captions.sample_claim(rng, world.sample_scene(rng, "pretraining", level, world.ALL), world.ALL)
    assert sketch.read(captions.say(rng, claim)) == claim


@pytest.mark.parametrize(
    "text",
    [
        "a red circle left of a blue square",
        "Two green stars and a blue moon.",
        "a small striped heart at the top",
        "a yellow cross inside a purple diamond",
        "three pink circles",
        "a white heart is under a green star on a teal background",
        "a shape in the middle",
    ],
)
def test_the_scene_is_one_for_which_the_caption_holds(text: str) -> None:
    claim = sketch.read(text)
    for seed in range(5):
        scene = sketch.stage(random.Random(seed), claim)
        assert captions.holds(claim, scene)
        assert world.render(scene).size == (world.IMAGE_SIZE,) * 2


@pytest.mark.parametrize("text", ["a dog", "democracy", "a red red circle", "a red", "", "a small big circle"])
def test_other_captions_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(TextError, match="such as 'a red circle left of"):
        sketch.read(text)


def test_a_claim_that_no_scene_can_meet() -> None:
    claim = captions.Claim(captions.Phrase("red", "circle", count=5), object=captions.Phrase("blue", "star", count=5))
    with pytest.raises(TextError, match="no scene"):
        sketch.stage(random.Random(0), claim)
