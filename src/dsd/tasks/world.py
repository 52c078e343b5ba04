"""The four tasks of the procedural world: scenes of a split and captions about them => Examples.

Nothing but looking helps. Examples of ``comvg``, ``winoground`` and the yes-no questions of ``vqa`` are made of
*twins*: two scenes that differ in one thing and two claims, each true of one of them; which of the two is asked for is
a coin toss, so that the captions alone, or the images alone, give chance exactly. The ten captions of ``refcocog``
form a 2 x 5 grid of attribute values, in which the true one is no nearer to the rest than any other. What is asked for
is drawn before any rejection sampling, which therefore cannot favour an answer. Open questions of ``vqa`` leave a
blind guess one chance in eight for a colour or a shape, in three for a fill, in two (easy) or four for a count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from dsd.contracts import Example, OptionError
from dsd.tasks import twins
from dsd.tasks.twins import OPPOSITES, TOUCHING, VALUES, Split
from dsd.tiny import world
from dsd.tiny.captions import NUMBERS, Claim, Phrase, Slot, answer, ask, holds, say
from dsd.tiny.world import Level, Scene

Task = Literal["comvg", "refcocog", "vqa", "winoground"]
Novelty = Literal["novel-fill", "novel-relation"]

WORLD_TASKS: tuple[Task, ...] = get_args(Task)
SPLITS: tuple[Split, ...] = get_args(Split)
_NOVELTIES: tuple[Novelty, ...] = get_args(Novelty)

_PATIENCE = 4000
"""Tries before a drawn question counts as one that the split has no scene for, and another is drawn."""


@dataclass(frozen=True)
class Drawn:
    """An example before it is rendered; ``claims[j]`` is what ``texts[j]`` says, None for "no" and for filler words."""

    scenes: tuple[Scene, ...]
    texts: tuple[str, ...]
    claims: tuple[Claim | None, ...]
    positives: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]


def world_task(task: str, split: str, level: str, count: int, seed: int, novel: bool = False) -> list[Example]:
    """Examples of a task of the procedural world, with 64x64 RGB PIL images.

    - ``comvg``: by turns image choice (two images, one caption) and text choice (one image, two captions) about a
      relation of two things; the negative differs in the subject, the predicate or the object, a third each.
      Tags: what differs, and ``image-choice`` or ``text-choice``.
    - ``winoground``: two images and two captions of the same words. Tags: what changes places.
    - ``refcocog``: one image and ten referring expressions, one of them true. Tags: the attributes that vary.
    - ``vqa``: one image, and a question with ten answers (tags ``other`` and what is asked) or with yes and no
      (``binary``, ``truth``), by turns.

    Example ``i`` depends on the arguments and ``i`` alone, so that a longer list begins with the shorter one.

    Args:
        task: One of :data:`WORLD_TASKS`.
        split: ``few-shot``, ``val`` or ``test``; no scene of one occurs in another, or in pretraining.
        level: ``easy`` (two things), ``standard`` (three to five, with distractors) or ``hard`` (``standard`` in a
            style never pretrained on).
        count: How many examples, at least one.
        seed: Any integer.
        novel: Ask about the fill and the relation whose words pretraining never saw (tags ``novel-fill`` and
            ``novel-relation`` by turns; ``winoground`` at ``easy`` has the fill alone, ``vqa`` only yes-no questions).

    Raises:
        OptionError: An argument outside what it may be.
    """
    for name, got, known in (("task", task, WORLD_TASKS), ("split", split, SPLITS), ("level", level, world.LEVELS)):
        if got not in known:
            raise OptionError(f"got {name} {got!r}, expected one of {', '.join(known)}")
    if type(count) is not int or count < 1:
        raise OptionError(f"got count {count!r}, expected an integer of at least 1")
    if type(seed) is not int:
        raise OptionError(f"got seed {seed!r}, expected an integer")
    examples = []
    for i in range(count):
        drawn = draw(cast(Task, task), cast(Split, split), cast(Level, level), seed, i, bool(novel))
        name = "-".join((task, "novel", split, level) if novel else (task, split, level))
        images = tuple(world.render(scene) for scene in drawn.scenes)
        examples.append(Example(f"{name}-{seed}-{i}", images, drawn.texts, drawn.positives, drawn.tags))
    return examples


def draw(task: Task, split: Split, level: Level, seed: int, i: int, novel: bool) -> Drawn:
    """Example ``i`` of :func:`world_task`, unrendered."""
    rng = random.Random(f"{task} {split} {level} {seed} {'novel' if novel else 'known'} {i}")
    novelty: Novelty | None = None
    if novel:
        novelty = "novel-fill" if (task, level) == ("winoground", "easy") else _NOVELTIES[i % 2]
    match task:
        case "comvg":
            return _comvg(rng, split, level, novelty, i)
        case "winoground":
            return _winoground(rng, split, level, novelty, i)
        case "refcocog":
            return _refcocog(rng, split, level, novelty)
        case "vqa":
            if novelty or i % 2:
                return _vqa_binary(rng, split, level, novelty, i // 2)
            return _vqa_other(rng, split, level, i // 2)


def _say_alike(rng: random.Random, claims: Sequence[Claim], article: Literal["a", "the"] = "a") -> list[str]:
    """Captions in the same paraphrase, so that wording gives nothing away."""
    while True:
        k = rng.getrandbits(32)
        texts = [say(random.Random(k), claim, article) for claim in claims]
        # "overlapping", which has no synonym, puts the generator into another state than the other relations do
        if len({(t.startswith("there "), t.startswith("a picture "), " is " in t) for t in texts}) == 1:
            return texts


def _comvg(rng: random.Random, split: Split, level: Level, novelty: Novelty | None, i: int) -> Drawn:
    mode = ("image-choice", "text-choice")[i // (2 if novelty else 3) % 2]
    kind: str = novelty or ("subject", "predicate", "object")[i % 3]
    if kind == "novel-relation":
        make = twins.moved(rng, split, level, world.NOVEL_RELATION)
    elif kind == "predicate":
        make = twins.moved(rng, split, level, rng.choice(world.KNOWN_RELATIONS))
    else:
        attributes = ("colour", "shape") if level == "easy" else tuple(VALUES)
        attribute = "fill" if novelty else rng.choice(attributes)
        # what is inside is small, what is around it large
        relations = tuple(OPPOSITES) if novelty or attribute == "size" else world.KNOWN_RELATIONS
        side = rng.randrange(2) if novelty else ("subject", "object").index(kind)
        make = twins.changed(rng, split, level, side, rng.choice(relations), attribute, novel=bool(novelty))
    both = twins.settle(rng, make)
    texts = _say_alike(rng, both.claims)
    j = rng.randrange(2)
    if mode == "image-choice":
        return Drawn(both.scenes, (texts[j],), (both.claims[j],), ((j, 0),), (kind, mode))
    return Drawn((both.scenes[j],), tuple(texts), both.claims, ((0, j),), (kind, mode))


def _winoground(rng: random.Random, split: Split, level: Level, novelty: Novelty | None, i: int) -> Drawn:
    kinds = ("relation", "colour") if level == "easy" else ("relation", "colour", "fill", "size")
    kind: str = novelty or kinds[i % len(kinds)]
    if kind == "novel-relation":
        make = twins.crossed(rng, split, level)
    elif kind == "relation":
        make = twins.moved(rng, split, level, rng.choice(world.KNOWN_RELATIONS), reverse=True)
    else:
        make = twins.swapped(rng, split, level, "fill" if novelty else kind, novel=bool(novelty))
    both = twins.settle(rng, make)
    return Drawn(both.scenes, tuple(_say_alike(rng, both.claims)), both.claims, ((0, 0), (1, 1)), (kind,))


def _put(claim: Claim, side: int, attribute: str, value: str) -> Claim:
    """The claim with another relation, or another attribute of its subject (``side`` 0) or object (1)."""
    if attribute == "relation":
        return replace(claim, relation=value)
    phrase = claim.object if side else claim.subject
    assert phrase is not None
    return twins.having(claim, **{"object" if side else "subject": twins.having(phrase, **{attribute: value})})


def _refcocog(rng: random.Random, split: Split, level: Level, novelty: Novelty | None) -> Drawn:
    relation: str | None = rng.choice((*world.KNOWN_RELATIONS, None, None))
    if novelty == "novel-relation":
        relation = rng.choice((world.NOVEL_RELATION, rng.choice(list(OPPOSITES))))
    side = rng.randrange(2) if relation else 0
    wide, kin = rng.sample(("colour", "shape"), 2)
    five = rng.sample(VALUES[wide], 5)
    # the other two values: of the relation, of either thing's size or fill, or of the varied thing itself
    options = [(side, kin)]
    if relation in OPPOSITES:
        options.append((0, "relation"))
    if level != "easy":
        sides = (0, 1) if relation else (0,)
        options += [(s, a) for s in sides for a in ("size", "fill") if a == "fill" or relation not in TOUCHING]
    where, narrow = rng.choice(options)
    before: list[dict[str, str]] = [{}, {}]
    if novelty == "novel-relation":
        assert relation is not None
        where, narrow = 0, "relation"
        two = [relation, rng.choice(list(OPPOSITES)) if relation == world.NOVEL_RELATION else world.NOVEL_RELATION]
    elif novelty == "novel-fill":
        where, narrow = rng.randrange(2) if relation else 0, "fill"
        two = rng.sample((world.NOVEL_FILL, rng.choice(world.KNOWN_FILLS)), 2)
        before[where]["size"] = "large"
    elif narrow == "relation":
        assert relation is not None
        two = [relation, OPPOSITES[relation]]
    else:
        two = rng.sample(VALUES[narrow], 2)
    before[side][wide] = five[0]
    if narrow != "relation":
        before[where][narrow] = two[0]
    vocabulary = world.ALL if novelty == "novel-fill" else world.KNOWN

    def grid(claim: Claim) -> list[Claim]:
        return [_put(_put(claim, side, wide, w), where, narrow, n) for w in five for n in two]

    touching = next((r for r in (relation, *two) if r in TOUCHING), None)
    for _ in range(_PATIENCE):
        pair = twins.two(rng, *before)
        p, q = (Phrase(*t.kind) for t in pair)
        # a caption that could be true of no scene would give itself away
        rivals = grid(Claim(p, relation, q if relation else None))
        possible = all(c.object is None or twins.tellable((c.subject, c.object), touching) for c in rivals)
        if not (possible and twins.tellable(pair, touching)):
            continue
        extras = twins.distractors(rng, split, level, vocabulary, pair)
        if extras is None or not twins.fair(rng, pair[side], (pair[1 - side], *extras)):
            continue
        a, b = world.place_pair(rng, *pair, relation or rng.choice(list(OPPOSITES)))
        scenes = twins.stage(rng, level, extras, (b, a))
        if scenes is None:
            continue
        named = [[n for s, n in ((side, wide), (where, narrow)) if s == t and n != "relation"] for t in (0, 1)]
        p, q = (twins.phrase(rng, t, level, *n) for t, n in zip((a, b), named, strict=True))
        claim = Claim(p, relation, q if relation else None)
        claims = grid(claim)
        false = [c for c in claims if c != claim]
        if not (twins.definite(claim, scenes[0], a) and twins.legible((claim, *false), scenes[0])):
            continue
        if any(twins.referents(c, scenes[0]) for c in false):
            continue
        assert holds(claim, scenes[0])
        rng.shuffle(claims)
        tags = (*((novelty,) if novelty else ()), wide, narrow)
        texts = _say_alike(rng, claims, "the")
        return Drawn((scenes[0],), tuple(texts), tuple(claims), ((0, claims.index(claim)),), tags)
    return _refcocog(rng, split, level, novelty)


def _vqa_binary(rng: random.Random, split: Split, level: Level, novelty: Novelty | None, i: int) -> Drawn:
    if novelty == "novel-relation" or (novelty is None and i % 4 < 2):
        relation = world.NOVEL_RELATION if novelty else rng.choice(world.KNOWN_RELATIONS)
        make = twins.moved(rng, split, level, relation, unique=True)
    else:
        attribute = "fill" if novelty else rng.choice(("colour", "shape") if level == "easy" else tuple(VALUES))
        placing = rng.choice(list(OPPOSITES))
        make = twins.changed(rng, split, level, rng.randrange(2), placing, attribute, novel=bool(novelty), bare=True)
    both = twins.settle(rng, make)
    true = i % 2 == 0
    j = rng.randrange(2)
    claim = both.claims[j]
    answers = rng.sample((True, False), 2)
    texts = tuple(f"{ask(claim, 'truth')} {answer(claim, 'truth', a)}" for a in answers)
    tags = (*((novelty,) if novelty else ()), "binary", "truth")
    claims = tuple(claim if a else None for a in answers)
    return Drawn((both.scenes[j if true else 1 - j],), texts, claims, ((0, answers.index(true)),), tags)


def _vqa_other(rng: random.Random, split: Split, level: Level, i: int) -> Drawn:
    slots: tuple[Slot, ...] = ("colour", "shape", "colour", "shape", "count")
    slots = slots if level == "easy" else (*slots, "fill")
    slot = slots[i % len(slots)]
    scene, claim = (_counted if slot == "count" else _asked)(rng, split, level, slot)
    question, truth = ask(claim, slot), answer(claim, slot)
    values = NUMBERS[1:] if slot == "count" else VALUES[slot]
    claims: dict[str, Claim | None] = {
        v: _put(claim, 0, slot, v) if slot != "count" else replace(claim, subject=replace(claim.subject, count=n))
        for n, v in enumerate(values, 1)
    }
    # the words filled up with are true of nothing in the picture
    true = {scene.background} | {str(getattr(t, n)) for t in scene.things for n in VALUES}
    words = list(world.BACKGROUNDS) if slot == "colour" else [w for group in VALUES.values() for w in group]
    fillers = [w for w in words if w not in true and w not in claims and w not in question.split()]
    claims |= dict.fromkeys(rng.sample(fillers, 10 - len(claims)))
    answers = rng.sample(list(claims), 10)
    texts = tuple(f"{question} {a}" for a in answers)
    return Drawn((scene,), texts, tuple(claims[a] for a in answers), ((0, answers.index(truth)),), ("other", slot))


def _asked(rng: random.Random, split: Split, level: Level, slot: Slot) -> tuple[Scene, Claim]:
    """A scene and a claim about one of its things that is the only one of which ``slot`` can be asked."""
    before = {name: rng.choice(VALUES[name]) for name in ("colour", "shape", "fill")}
    # a thing inside another is never of its colour
    relation = rng.choice(list(OPPOSITES) if slot == "colour" else world.KNOWN_RELATIONS)
    tail = rng.random() < 0.5
    for _ in range(_PATIENCE):
        pair = twins.two(rng, before, {})
        if not twins.tellable(pair, relation):
            continue
        # two things that agree in what the question names differ in what it asks for, which would help a blind guess
        if (slot == "colour" and pair[0].shape == pair[1].shape) or (
            slot == "shape" and pair[0].colour == pair[1].colour
        ):
            continue
        extras = twins.distractors(rng, split, level, world.KNOWN, pair)
        if extras is None or not twins.fair(rng, pair[0], (pair[1], *extras)):
            continue
        a, b = world.place_pair(rng, *pair, relation)
        scenes = twins.stage(rng, level, extras, (b, a))
        if scenes is None:
            continue
        claim = Claim(twins.phrase(rng, a, level, slot))
        if tail:
            claim = replace(claim, relation=relation, object=twins.phrase(rng, b, level))
        asked = replace(claim, subject=twins.having(claim.subject, **{slot: None}))
        others = (_put(claim, 0, slot, value) for value in VALUES[slot])
        if twins.definite(asked, scenes[0], a) and twins.legible((claim, *others), scenes[0]):
            return scenes[0], claim
    return _asked(rng, split, level, slot)


def _counted(rng: random.Random, split: Split, level: Level, slot: Slot) -> tuple[Scene, Claim]:
    """A scene with one to four (at ``easy`` two) things of a colour, of a shape or of both, and how many they are."""
    easy = level == "easy"
    number = rng.randint(1, 2 if easy else 4)
    shared = rng.choice((("colour",), ("shape",)) if easy else (("colour",), ("shape",), ("colour", "shape")))
    for _ in range(_PATIENCE):
        first = world.sample_thing(rng, world.KNOWN)
        same = {name: str(getattr(first, name)) for name in shared}
        phrase = Phrase(**cast(dict[str, Any], same), count=number)
        if number > 2:
            same["size"] = "small"
        things = [twins.altered(rng, world.sample_thing(rng, world.KNOWN), same) for _ in range(number)]
        total = 2 if easy else rng.randint(max(3, number), world.MAX_THINGS)
        while len(things) < total:
            other = world.sample_thing(rng, world.KNOWN, like=first)
            if not phrase.matches(other):
                things.append(other)
        rng.shuffle(things)
        scenes = world.part_of(Scene(tuple(things))) == split and twins.stage(rng, level, things, ())
        if scenes:
            return scenes[0], Claim(phrase)
    raise AssertionError(f"no scene found for split {split!r}")
