"""Wrong captions: which words are swapped or replaced, which never, and how often the world shows what they say."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.negatives import HardNegatives
from dsd.tasks.world import draw
from dsd.tiny import world
from dsd.tiny.captions import NUMBERS, PLACE_WORDS, RELATION_WORDS, Claim, Phrase, holds, sample_claim, say
from dsd.tiny.world import Scene

POOL = (
    "a red circle",
    "a blue circle",
    "a blue square",
    "a small red circle",
    "a large red circle",
    "a dog above a cat",
    "a cat above a dog",
    "a red dog",
    "two dogs next to two cats",
    "two cats next to two dogs",
    "three dogs next to two horses",
)
SWAPS = HardNegatives(POOL)


def all_of(caption: str, swaps: HardNegatives = SWAPS) -> set[str]:
    return set(swaps.swapped(caption, 1000, random.Random(0)))


def words(caption: str) -> list[str]:
    """In any order; "a" and "an" are one word."""
    return sorted(re.sub(r"\ban\b", "a", caption.lower()).split())


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red circle above a blue square", {"a blue circle above a red square", "a red square above a blue circle"}),
        ("a dog above a cat", {"a cat above a dog"}),
        ("a red circle above a red square", {"a red square above a red circle"}),
        ("a small red circle above a large blue circle", {
            "a large red circle above a small blue circle", "a small blue circle above a large red circle",
        }),
        # the same of both sides in either order
        ("a dog and a cat", set()),
        ("a dog, a cat", set()),
        ("a red dog near a cat", set()),
        ("a red circle next to a red square", set()),
        ("two dogs next to two cats", set()),
        # what goes with what has changed
        ("a red circle and a blue square", {"a blue circle and a red square", "a red square and a blue circle"}),
        ("three dogs next to two cats", {"two dogs next to three cats", "three cats next to two dogs"}),
        # not one of them is two, nor is a thing that is denied there
        ("two dogs above a cat", set()),
        ("no dog above a cat", set()),
        ("a dog that isn't above a cat", set()),
        # one thing may be both
        ("a small circle above a red square", {"a small square above a red circle"}),
        # nothing is known of these, or there is but one
        ("a lion above a tiger", set()),
        ("a red circle", set()),
        ("", set()),
    ],
)  # fmt: skip
def test_what_is_swapped(caption: str, expected: set[str]) -> None:
    assert all_of(caption) == expected


def test_kinds_are_known_from_neighbours_of_one_kind() -> None:
    """No two of these stand between the same words, but for "red" and "blue", "circle" and "square"."""
    swaps = HardNegatives(["a red circle", "a blue circle", "a blue square", "a green square", "a green star"])
    assert "a green circle under a red star" in all_of("a red circle under a green star", swaps)


def test_the_kind_that_shares_most_comes_first() -> None:
    """Where "large" stands, "small" does twice and "striped" once; what is striped may be small, so large as well."""
    pool = [
        "a small red circle",
        "a large red circle",
        "a striped red circle",
        "a small blue star",
        "a large blue star",
    ]
    swaps = HardNegatives([*pool, "a small striped star"])
    assert all_of("a small circle above a large circle", swaps) == {"a large circle above a small circle"}
    assert all_of("a striped circle above a large circle", swaps) == set()


def test_articles_and_capitals_fit() -> None:
    swaps = HardNegatives(["an orange star", "a red star", "an heirloom", "a star", "a unicorn", "an hour"])
    assert all_of("A red star above an orange moon", swaps) == {"An orange star above a red moon"}
    assert all_of("a unicorn under an hour", swaps) == {"an hour under a unicorn"}
    swaps = HardNegatives([*POOL, "red circles", "blue circles"])
    assert all_of("Red circles above blue circles.", swaps) == {"Blue circles above red circles."}


def test_another_sentence_says_nothing_of_a_words_place() -> None:
    """What answers stand in place of, a question does not tell: "red" and "above" are of two kinds all the same."""
    pool = ["what colour is the star? red", "where is the star? above", "a red star", "a blue star above a moon"]
    made = HardNegatives([*pool, "a blue star below a moon"])
    assert all_of("a red star above a blue moon", made) == {"a blue star above a red moon"}
    assert made.replaced("a star above a moon", 9, random.Random(0)) == ["a star below a moon"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red circle", {"a blue circle", "a red square", "a red dog", "a red cat"}),
        ("A red dog.", {"A blue dog.", "A red cat.", "A red circle.", "A red square."}),
        ("two dogs", {"three dogs", "two cats", "two horses"}),
        (
            "a small red dog",
            {"a large red dog", "a small blue dog", "a small red cat", "a small red circle", "a small red square"},
        ),
        # nothing is known of these, or it may be denied rightly
        ("a lion", set()),
        ("no red circle", set()),
        ("", set()),
    ],
)
def test_what_is_replaced(caption: str, expected: set[str]) -> None:
    assert set(SWAPS.replaced(caption, 100, random.Random(0))) == expected


def test_every_word_is_replaced_before_one_is_again() -> None:
    """Of the many horses none crowds out the one other size."""
    made = HardNegatives([f"a {size} {colour} horse" for size in ("small", "large") for colour in COLOURS])
    for seed in range(20):
        found = made.replaced("a small red horse", 4, random.Random(seed))
        assert sum("large" in text for text in found) == 1
        assert "large" in found[0] + found[1]


COLOURS = ("red", "blue", "green", "black", "white", "brown")


def test_what_is_forbidden_in_other_letters_is_too() -> None:
    caption = "a red circle above a blue square"
    assert SWAPS.swapped(caption, 9, random.Random(0), ["A blue  circle above a red square."]) == [
        "a red square above a blue circle"
    ]


LETTERS = st.sampled_from(
    "a an the red blue small orange circle square dogs dog cat and above under next to no , It".split()
)
CAPTIONS = st.lists(LETTERS, max_size=12).map(" ".join)


@given(st.lists(CAPTIONS, max_size=12), CAPTIONS, st.integers(0, 5), st.lists(CAPTIONS, max_size=3), st.integers())
@settings(max_examples=300)
def test_any_swap(pool: list[str], caption: str, count: int, forbidden: list[str], seed: int) -> None:
    pool = [*pool, *POOL]
    swaps = HardNegatives(pool)
    every = swaps.swapped(caption, 1000, random.Random(seed))
    assert caption not in every
    assert len(set(every)) == len(every)
    assert all(words(text) == words(caption) for text in every)
    assert all(sum(a != b for a, b in zip(text.split(), caption.split(), strict=True)) <= 4 for text in every)
    banned = [*forbidden, *every[::2]]
    found = swaps.swapped(caption, count, random.Random(seed), banned)
    assert not set(found) & {*banned, caption}
    assert set(found) <= set(every)
    assert len(found) <= count
    for text in swaps.replaced(caption, count, random.Random(seed), banned):
        assert text not in {*banned, caption}
        changed = [(a, b) for a, b in zip(text.split(), caption.split(), strict=True) if a != b]
        assert 1 <= len(changed) <= 2  # with its article
    # whatever the order of the captions
    assert HardNegatives(pool[::-1]).swapped(caption, count, random.Random(seed), banned) == found


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_letters(text: str, other: str) -> None:
    """Capitals that small letters split ("İ"), combining marks, no words at all."""
    swaps = HardNegatives([f"a {text} {other}", text, other])
    for made in swaps.swapped(f"{text} above {other}", 5, random.Random(0)):
        assert made != f"{text} above {other}"


# The procedural world, whose captions are read back


SLOTS = {
    **dict.fromkeys(world.SIZES, "size"), **dict.fromkeys(world.FILLS, "fill"),
    **dict.fromkeys(world.COLOURS, "colour"), **dict.fromkeys(world.SHAPES, "shape"),
}  # fmt: skip
RELATIONS = {said: relation for relation, ways in RELATION_WORDS.items() for said in ways}
PLACES = {said: place for place, ways in PLACE_WORDS.items() for said in ways}
_RELATION = re.compile(rf" (?:is |are )?({'|'.join(sorted(RELATIONS, key=len, reverse=True))}) ")
_PLACE = re.compile(rf" (?:is |are )?({'|'.join(PLACES)})$")


def phrase(text: str) -> Phrase:
    article, *named = text.split()
    count = 1 if article in ("a", "an") else NUMBERS.index(article)
    if count > 1:
        named[-1] = re.sub("(?<=ss)es$|s$", "", named[-1])
    found = Phrase(count=count, **{SLOTS[word]: word for word in named})  # type: ignore[arg-type]
    assert found.words() == text
    return found


def read(caption: str) -> Claim:
    """The claim that a caption of the world makes.

    Raises:
        AssertionError, KeyError, ValueError: The world would not say it so.
    """
    text, _, background = caption.removesuffix(" background").partition(" on a ")
    text = re.sub("^(there is|there are|a picture of) ", "", text)
    rest = {"background": background or None}
    if match := _RELATION.search(text):
        first, second = phrase(text[: match.start()]), phrase(text[match.end() :])
        return Claim(first, RELATIONS[match[1]], second, **rest)
    if match := _PLACE.search(text):
        return Claim(phrase(text[: match.start()]), place=PLACES[match[1]], **rest)
    first, _, second = text.partition(" and ")
    return Claim(phrase(first), object=phrase(second) if second else None, **rest)


def said(level: world.Level, seed: int, count: int) -> list[tuple[str, Scene]]:
    """Captions of scenes."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        scene = world.sample_scene(rng, "few-shot", level)
        claim = sample_claim(rng, scene)
        found.append((say(rng, claim), scene))
        assert read(found[-1][0]) == claim
    return found


def rates(pools: list[list[tuple[str, Scene]]]) -> tuple[float, float, float]:
    """Of captions the share that has swaps; of swaps those that are true, and those that the world would not say."""
    swapped, made, true, odd = 0, 0, 0, 0
    for pool in pools:
        swaps = HardNegatives(caption for caption, _ in pool)
        for caption, scene in pool:
            every = all_of(caption, swaps)
            swapped += bool(every)
            made += len(every)
            for text in every:
                try:
                    true += holds(read(text), scene)
                except (AssertionError, KeyError, ValueError):
                    odd += 1
    return swapped / sum(map(len, pools)), true / made, odd / made


@pytest.mark.parametrize("level", ["easy", "standard"])
@pytest.mark.parametrize(("size", "some", "odd"), [(16, 0.65, 0.02), (128, 0.7, 0.0)])
def test_swaps_are_hardly_ever_true_of_the_scene(level: world.Level, size: int, some: float, odd: float) -> None:
    found = rates([said(level, seed, size) for seed in range(1024 // size)])
    assert found[0] > some
    assert found[1] < 0.01
    assert found[2] <= odd


@pytest.mark.parametrize("level", ["easy", "standard"])
def test_replacements_are_seldom_true_of_the_scene(level: world.Level) -> None:
    """Some are: "over" for "above", and where there is another thing of that name."""
    pool = said(level, 0, 512)
    made = HardNegatives(caption for caption, _ in pool)
    every = [(text, scene) for caption, scene in pool for text in made.replaced(caption, 3, random.Random(0))]
    assert len(every) > 2.9 * len(pool)
    true, odd = 0, 0
    for text, scene in every:
        try:
            true += holds(read(text), scene)
        except (AssertionError, KeyError, ValueError):  # "top of a star", which the world would not say
            odd += 1
    assert true / len(every) < 0.04
    assert odd / len(every) < 0.08


@pytest.mark.parametrize("task", ["comvg", "winoground"])
def test_swaps_of_the_tasks_captions(task: str) -> None:
    """Most captions of a task have swaps, and those of a Winoground group are often each other's."""
    drawn = [draw(task, "few-shot", "standard", 3, i, False) for i in range(64)]  # type: ignore[arg-type]
    pool = [(d.texts[j], d.scenes[i]) for d in drawn for i, j in d.positives]
    some, true, odd = rates([pool])
    assert some > 0.8
    assert true < 0.01
    assert odd == 0
    if task == "winoground":
        swaps = HardNegatives(text for d in drawn for text in d.texts)
        assert sum(d.texts[1] in all_of(d.texts[0], swaps) for d in drawn) > 16
        assert not any(set(d.texts) & set(swaps.swapped(d.texts[0], 99, random.Random(0), d.texts)) for d in drawn)
