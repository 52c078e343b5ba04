"""The tasks of the procedural world; captions are read back and compared with the scenes independently of `holds`."""

import math
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.contracts import OptionError
from dsd.tasks import WORLD_TASKS, world_task
from dsd.tasks.world import SPLITS, Drawn, draw
from dsd.tiny import world
from dsd.tiny.captions import Claim, Phrase, say, vocabulary_words

GRID = [(task, level, novel) for task in WORLD_TASKS for level in world.LEVELS for novel in (False, True)]
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
RELATIONS = {
    "to the left of": "left", "left of": "left", "to the right of": "right", "right of": "right",
    "above": "above", "over": "above", "below": "below", "under": "below",
    "inside": "inside", "within": "inside", "overlapping": "overlapping",
}  # fmt: skip
_RELATION = re.compile(rf" (?:is )?({'|'.join(RELATIONS)}) (?=an? |the )")


@cache
def drawn(task, level, novel, split="test", seed=7, count=24) -> tuple[Drawn, ...]:
    return tuple(draw(task, split, level, seed, i, novel) for i in range(count))


# An independent reader of captions


def matches(phrase, thing):
    known = {**dict.fromkeys(world.COLOURS, "colour"), **dict.fromkeys(world.SHAPES, "shape")}
    known |= {**dict.fromkeys(world.SIZES, "size"), **dict.fromkeys(world.FILLS, "fill")}
    words = [w for w in phrase.split() if w not in ("a", "an", "the", "shape")]
    return all(getattr(thing, known[w]) == w for w in words)


def stands(a, relation, b, lenient):
    dx, dy, apart = b.x - a.x, b.y - a.y, math.hypot(b.x - a.x, b.y - a.y)
    if relation == "inside":
        return a.radius < b.radius and apart < b.radius * (0.9 if lenient else 0.4)
    if relation == "overlapping":
        return apart < (a.radius + b.radius) * (0.99 if lenient else 0.75)
    major = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
    return major > 0.06 if lenient else major > 0.2 and major >= 1.3 * min(abs(dx), abs(dy))


def true(text, scene, lenient=False):
    """Whether a caption (no question) is true of a scene."""
    text = re.sub(r"^(there is|there are|a picture of) ", "", text)
    if match := _RELATION.search(text):
        first, relation, second = text[: match.start()], RELATIONS[match.group(1)], text[match.end() :]
    else:
        first, _, second = text.partition(" and ")
        relation = None
    things = scene.things
    if not second:
        return any(matches(first, t) for t in things)
    pairs = [(a, b) for a in things for b in things if a is not b and matches(first, a) and matches(second, b)]
    return any(relation is None or stands(a, relation, b, lenient) for a, b in pairs)


def check_truth(d):
    positives = set(d.positives)
    for i, scene in enumerate(d.scenes):
        for j, text in enumerate(d.texts):
            question, mark, answer = text.partition("? ")
            if mark and answer in ("yes", "no"):
                statement = re.sub(r"^is (there )?", "", question)
                yes = true(statement, scene)
                assert yes == true(statement, scene, lenient=True)
                assert ((i, j) in positives) == (yes == (answer == "yes"))
            elif mark:
                assert ((i, j) in positives) == (answer == answer_of(question, scene))
            elif (i, j) in positives:
                assert true(text, scene)
            else:
                assert not true(text, scene, lenient=True), (text, scene)


def answer_of(question, scene):
    if match := re.fullmatch(r"how many (.*) are there", question):
        words = match.group(1).split()
        words[-1] = "cross" if words[-1] == "crosses" else words[-1].removesuffix("s")
        number = sum(matches(" ".join(words), t) for t in scene.things)
        return next(name for name, n in NUMBERS.items() if n == number)
    slot, subject = re.fullmatch(r"(what colour|what|how) is the (.*?)(?: filled)?", question).groups()
    relation = next((r for r in RELATIONS if f" {r} the " in subject), None)
    found = scene.things
    if relation:
        subject, other = subject.split(f" {relation} the ")
        others = [t for t in scene.things if matches(other, t)]
        assert len(others) == 1
        found = [t for t in found if t is not others[0] and stands(t, RELATIONS[relation], others[0], lenient=True)]
    found = [t for t in found if matches(subject, t)]
    assert len(found) == 1, "the question must ask for one thing"
    return getattr(found[0], {"what colour": "colour", "what": "shape", "how": "fill"}[slot])


# What every example must be


def check(d, task, split, level, novel):
    assert all(world.part_of(scene) == split for scene in d.scenes)
    for scene in d.scenes:
        assert len(scene.things) == 2 if level == "easy" else 3 <= len(scene.things) <= 5
        assert (scene.style in world.SHIFTS) == (level == "hard")
        assert all(t.radius - 1e-9 <= p <= 1 - t.radius + 1e-9 for t in scene.things for p in (t.x, t.y))
    if len(d.scenes) == 2:
        backdrops = {(s.style, s.background, s.pattern, s.seed, len(s.things)) for s in d.scenes}
        assert len(backdrops) == 1
        assert d.scenes[0].things != d.scenes[1].things
    words = {w for text in d.texts for w in text.replace("?", " ?").split()}
    assert words <= set(vocabulary_words())
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", "\n".join(d.texts))
    assert len(set(d.texts)) == len(d.texts)
    if not novel:
        assert not words & {"dotted", "overlapping"}
        assert all(t.fill != "dotted" for scene in d.scenes for t in scene.things)
        pairs = ((a, b) for s in d.scenes for a in s.things for b in s.things if a is not b)
        assert not any(world.related(a, "overlapping", b) for a, b in pairs)
    shapes = {"comvg": {(2, 1), (1, 2)}, "winoground": {(2, 2)}, "refcocog": {(1, 10)}, "vqa": {(1, 2), (1, 10)}}
    assert (len(d.scenes), len(d.texts)) in shapes[task]
    check_truth(d)


@pytest.mark.parametrize(("task", "level", "novel"), GRID)
def test_every_positive_holds_and_no_negative(task, level, novel):
    for d in drawn(task, level, novel):
        check(d, task, "test", level, novel)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GRID), st.sampled_from(SPLITS), st.integers(), st.integers(0, 10**6))
def test_any_seed_of_any_split(what, split, seed, i):
    task, level, novel = what
    d = draw(task, split, level, seed, i, novel)
    check(d, task, split, level, novel)
    assert d == draw(task, split, level, seed, i, novel)


def test_comvg_changes_one_thing():
    words = {}
    for level in world.LEVELS:
        for d in drawn("comvg", level, False):
            kind, mode = d.tags
            words.setdefault((level, kind, mode), 0)
            words[level, kind, mode] += 1
            if mode == "image-choice":
                before, after = (sorted(map(repr, s.things)) for s in d.scenes)
                changed = len(set(before) - set(after))
                assert changed == (2 if kind == "predicate" else 1)
            else:
                a, b = (re.sub(_RELATION, lambda m: f" <{RELATIONS[m.group(1)]}> ", t) for t in d.texts)
                a, b = re.sub(r"\ban\b", "a", a).split(), re.sub(r"\ban\b", "a", b).split()
                assert len(a) == len(b)
                assert sum(x != y for x, y in zip(a, b, strict=True)) == 1
    assert len(words) == 18
    assert set(words.values()) == {4}


def test_winoground_has_the_same_words():
    for level in world.LEVELS:
        for novel in (False, True):
            for d in drawn("winoground", level, novel):
                assert sorted(d.texts[0].split()) == sorted(d.texts[1].split())
                assert d.positives == ((0, 0), (1, 1))


def test_refcocog_captions_are_a_symmetric_grid():
    for d in drawn("refcocog", "standard", False):
        # each caption differs from the nine others in as many words as any other does
        texts = [re.sub(_RELATION, lambda m: f" {RELATIONS[m.group(1)]} ", t).split() for t in d.texts]
        distances = [sorted(sum(x != y for x, y in zip(a, b, strict=True)) for b in texts) for a in texts]
        assert all(row == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2] for row in distances)


@pytest.mark.parametrize("task", ["refcocog", "winoground"])
def test_standard_scenes_have_distractors_akin_to_the_true_ones(task):
    for d in drawn(task, "standard", False):
        main = [t for scene in d.scenes for t in scene.things[:2]]
        extras = d.scenes[0].things[2:]
        assert any(extra.colour == t.colour or extra.shape == t.shape for extra in extras for t in main)


def test_parts_are_disjoint():
    kinds = {}
    for split in SPLITS:
        for task in WORLD_TASKS:
            for d in drawn(task, "easy", False, split):
                for scene in d.scenes:
                    kinds.setdefault(split, set()).add(frozenset(t.kind for t in scene.things))
    rng = random.Random(0)
    kinds["pretraining"] = set()
    for _ in range(100):
        scene = world.sample_scene(rng, "pretraining", "easy")
        kinds["pretraining"].add(frozenset(t.kind for t in scene.things))
        assert not {t.kind for t in scene.things} & world.HELD_OUT
    sets = list(kinds.values())
    assert sum(map(len, sets)) == len(set().union(*sets))


# Nothing but looking helps


def binomial_bound(n, p):
    """What a blind guess stays below, but for one run in ten thousand."""
    return p + 3.7 * math.sqrt(p * (1 - p) / n)


def test_positions_and_answers_are_balanced():
    for task, positions in (("comvg", 2), ("refcocog", 10), ("vqa", 2)):
        counts = Counter()
        for level in world.LEVELS:
            for d in drawn(task, level, False) + drawn(task, level, True):
                if max(len(d.scenes), len(d.texts)) == positions:
                    counts[max(d.positives[0])] += 1
        n = sum(counts.values())
        assert all(counts[i] / n < binomial_bound(n, 1 / positions) for i in range(positions)), (task, counts)
        assert len(counts) == positions
    answers = Counter(d.texts[max(d.positives[0])].split()[-1] for d in drawn("vqa", "easy", True, count=40))
    assert answers == {"yes": 20, "no": 20}


@pytest.mark.parametrize("word", ["dotted", "overlapping"])
def test_the_novel_word_is_true_half_the_time(word):
    won = [
        word in d.texts[d.positives[0][1]]
        for task in ("comvg", "refcocog")
        for level in world.LEVELS
        for d in drawn(task, level, True, count=40)
        if len(d.texts) > 1 and any(word in t for t in d.texts)
    ]
    assert len(won) > 50
    assert 1 - binomial_bound(len(won), 0.5) < np.mean(won) < binomial_bound(len(won), 0.5)


def blind_accuracy(examples):
    """Two-fold accuracy of word, word pair and length statistics that see captions and positions alone."""

    def features(text, index):
        words = text.split()
        pairs = [f"{a} {b}" for a, b in pairwise(words)]
        return {*words, *pairs, *(f"{w}@{index}" for w in words), f"length {len(words)}", f"position {index}"}

    def candidates(d):
        if len(d.scenes) > 1:
            return [(features(d.texts[0], i), (i, 0) in d.positives) for i in range(len(d.scenes))]
        return [(features(t, i), (0, i) in d.positives) for i, t in enumerate(d.texts)]

    won = []
    for fold in (0, 1):
        right, wrong = Counter(), Counter()
        for d in examples[1 - fold :: 2]:
            for f, positive in candidates(d):
                (right if positive else wrong).update(f)
        for d in examples[fold::2]:
            options = candidates(d)
            share = 1 / (len(options) - 1)
            scores = [sum(math.log((right[x] + 1) / (wrong[x] * share + 1)) for x in f) for f, _ in options]
            won.append(options[int(np.argmax(scores))][1])
    return float(np.mean(won)), len(won)


@pytest.mark.parametrize("task", ["comvg", "comvg novel", "refcocog"])
def test_captions_alone_do_not_help(task):
    task, _, novel = task.partition(" ")
    examples = [draw(task, "test", "standard", 1, i, bool(novel)) for i in range(240)]
    accuracy, n = blind_accuracy(examples)
    assert accuracy < binomial_bound(n, 0.1 if task == "refcocog" else 0.5)
    if task == "refcocog":  # where wording gives the truth away, the guess finds it
        told = [
            replace(d, texts=tuple(t + " yes" if (0, j) in d.positives else t for j, t in enumerate(d.texts)))
            for d in examples
        ]
        assert blind_accuracy(told)[0] > 0.9


def test_the_longer_caption_is_no_better():
    won = [
        len(d.texts[d.positives[0][1]]) > len(d.texts[1 - d.positives[0][1]])
        for d in drawn("comvg", "standard", False, count=240)
        if len(d.texts) == 2 and len(d.texts[0]) != len(d.texts[1])
    ]
    assert abs(np.mean(won) - 0.5) < binomial_bound(len(won), 0.5) - 0.5


# Pictures, words and options


def test_images_are_rgb_and_twins_differ_to_the_eye():
    for task, level, novel in GRID:
        for example in world_task(task, "few-shot", level, 4, 0, novel):
            pixels = [np.asarray(image, int) for image in example.images]
            assert all(p.shape == (64, 64, 3) for p in pixels)
            assert all(image.mode == "RGB" for image in example.images)
            if len(pixels) == 2:
                assert (abs(pixels[0] - pixels[1]).max(-1) > 15).sum() >= 10


def test_examples_depend_on_their_number_alone():
    few, many = world_task("comvg", "val", "hard", 2, 5), world_task("comvg", "val", "hard", 4, 5)
    for a, b in zip(few, many, strict=False):
        assert (a.id, a.texts, a.positives, a.tags) == (b.id, b.texts, b.positives, b.tags)
        assert all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    assert [e.texts for e in few] != [e.texts for e in world_task("comvg", "val", "hard", 2, 6)]
    assert [e.texts for e in few] != [e.texts for e in world_task("comvg", "test", "hard", 2, 5)]
    assert len({e.id for e in many}) == 4


def test_say_is_grammatical():
    claim = Claim(Phrase("orange", "star"), "left of", Phrase("red", "circle", size="small"))
    texts = {say(random.Random(k), claim) for k in range(200)}
    assert "an orange star left of a small red circle" in texts
    assert "there is an orange star to the left of a small red circle" in texts
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", t) for t in texts)
    assert say(random.Random(0), claim, "the").startswith("the orange star ")
    assert say(random.Random(1), Claim(Phrase("red", "cross", count=3))).endswith("three red crosses")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coco", "test", "easy", 1, 0), "task 'coco'"),
        (("comvg", "pretraining", "easy", 1, 0), "split 'pretraining'"),
        (("comvg", "test", "extreme", 1, 0), "level 'extreme'"),
        (("comvg", "test", "easy", 0, 0), "count 0"),
        (("comvg", "test", "easy", True, 0), "count True"),
        (("comvg", "test", "easy", 1, "x"), "seed 'x'"),
    ],
)
def test_options_outside_their_range(arguments, message):
    with pytest.raises(OptionError, match=f"got {message}, expected"):
        world_task(*arguments)
