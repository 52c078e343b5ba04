"""The four tasks of the procedural world: scenes of a split and captions about them => Examples.

Nothing but looking helps. Examples of ``comvg``, ``winoground`` and the yes-no questions of ``vqa`` are made of *twins*:
two scenes that differ in one thing and two claims, each true of one of them; which of the two is asked for is a coin
toss, so that the captions alone, or the images alone, give chance exactly. The ten captions of ``refcocog`` form a
2 x 5 grid of attribute values, in which the true one is no nearer to the rest than any other. What is asked for is
drawn before any rejection sampling, which therefore cannot favour an answer. Open questions of ``vqa`` keep the share
that a blind guess has: one in eight for a colour or a shape, in three for a fill, in two (easy) or four for a count.

A claim that is true must hold (:func:`dsd.tiny.captions.holds`); one that is false must be so in a lenient reading too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from dsd.contracts import Example, OptionError
from dsd.tiny import world
from dsd.tiny.captions import NUMBERS, Claim, Phrase, Slot, answer, ask, describe, holds, say
from dsd.tiny.world import Level, Scene, Style, Thing, Vocabulary

Task = Literal["comvg", "refcocog", "vqa", "winoground"]
Split = Literal["few-shot", "val", "test"]
Novelty = Literal["novel-fill", "novel-relation"]
Pair = tuple[Thing, Thing]

WORLD_TASKS: tuple[Task, ...] = get_args(Task)
SPLITS: tuple[Split, ...] = get_args(Split)
_NOVELTIES: tuple[Novelty, ...] = get_args(Novelty)

_VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(world.COLOURS),
    "shape": world.SHAPES,
    "size": world.SIZES,
    "fill": world.KNOWN_FILLS,
}
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_TOUCHING = ("inside", "overlapping")
_TRIES = 100_000
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


@dataclass(frozen=True)
class _Twins:
    """Two scenes and two claims; each claim holds for the scene of its index alone."""

    scenes: tuple[Scene, Scene]
    claims: tuple[Claim, Claim]


_Maker = Callable[[], _Twins | None]


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


# Truth


def _nearly(a: Thing, relation: str | None, b: Thing) -> bool:
    """Whether a lenient reader might grant that ``a`` stands in the relation to ``b``."""
    dx, dy = b.x - a.x, b.y - a.y
    distance = math.hypot(dx, dy)
    match relation:
        case "left of":
            return dx > 0.05
        case "right of":
            return dx < -0.05
        case "above":
            return dy > 0.05
        case "below":
            return dy < -0.05
        case "inside":
            return distance < b.radius and a.radius < b.radius
        case "overlapping":
            return distance < a.radius + b.radius
    return relation is None


def _referents(claim: Claim, scene: Scene) -> list[Thing]:
    """The things that a lenient reader might take for the claim's subject."""
    return [
        a
        for a in scene.things
        if claim.subject.matches(a)
        and (
            claim.object is None
            or any(claim.object.matches(b) and _nearly(a, claim.relation, b) for b in scene.things if b is not a)
        )
    ]


def _definite(claim: Claim, scene: Scene, subject: Thing) -> bool:
    """Whether "the" is right: the claim's subject can only be this thing, and its object only one."""
    objects = 1 if claim.object is None else sum(map(claim.object.matches, scene.things))
    return objects == 1 and [id(t) for t in _referents(claim, scene)] == [id(subject)]


def _fair(rng: random.Random, asked: Thing, rest: Iterable[Thing]) -> bool:
    """Thins out scenes so that the kind of the thing asked about is independent of the rest of the scene.

    A scene with a kind held out of pretraining is in a split with probability 1/3, any other with 1/10: the held-out
    partner of a shape would be the best blind guess at its colour.
    """
    held = any(t.kind in world.HELD_OUT for t in rest)
    return asked.kind not in world.HELD_OUT or held or rng.random() < 0.3


# Scenes


def _distractors(
    rng: random.Random, split: Split, level: Level, vocabulary: Vocabulary, *casts: Sequence[Thing]
) -> list[Thing] | None:
    """Things, not placed yet, to stand beside each of the casts of main things; none at ``easy``.

    At least one shares its colour or its shape with a main thing, and none is of a kind that is in every cast. None if
    the scenes would not all be of the split; tried before anything is placed, which takes far longer.
    """
    extras: list[Thing] = []
    if level != "easy":
        main = list(dict.fromkeys(t for cast_ in casts for t in cast_))
        everywhere = set.intersection(*({t.kind for t in cast_} for cast_ in casts))
        total = rng.randint(max(3, len(casts[0])), world.MAX_THINGS)
        while len(casts[0]) + len(extras) < total:
            akin = not extras or rng.random() < 0.7
            extra = world.sample_thing(rng, vocabulary, like=rng.choice(main) if akin else None)
            if extra.kind not in everywhere:
                extras.append(world.resize(extra, "small", rng) if rng.random() < 0.5 else extra)
    return extras if all(world.part_of(Scene((*cast_, *extras))) == split for cast_ in casts) else None


def _stage(rng: random.Random, level: Level, extras: Iterable[Thing], *casts: Sequence[Thing]) -> list[Scene] | None:
    """A scene for each cast of placed things (back to front), all with one backdrop and the same distractors.

    None if there is no room for the distractors.
    """
    scattered = world.scatter(rng, extras, tuple(dict.fromkeys(t for cast_ in casts for t in cast_)))
    if scattered is None:
        return None
    background, pattern = rng.choice(list(world.BACKGROUNDS)), rng.choice(world.PATTERNS)
    style: Style = rng.choice(world.SHIFTS) if level == "hard" else "plain"
    seed = rng.getrandbits(31)
    return [Scene((*cast_, *scattered), background, pattern, style, seed) for cast_ in casts]


def _with(rng: random.Random, thing: Thing, values: dict[str, str]) -> Thing:
    """The thing with other attributes; a new size brings a new radius."""
    if "size" in values:
        thing = world.resize(thing, values["size"], rng)
    return replace(thing, **cast(dict[str, Any], values))


def _two(rng: random.Random, *values: dict[str, str]) -> Pair:
    """Two things, not placed yet, with the attributes asked for."""
    a, b = (_with(rng, world.sample_thing(rng, world.KNOWN), v) for v in values or ({}, {}))
    return a, b


def _tellable(pair: Iterable[Thing | Phrase], relation: str | None) -> bool:
    """Whether two things can stand in a relation and be told apart."""
    a, b = pair
    if relation in _TOUCHING:
        return a.colour != b.colour
    return (a.colour, a.shape) != (b.colour, b.shape)


def _exchange_places(pair: Pair) -> Pair | None:
    a, b = pair
    a, b = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    fit = all(t.radius <= p <= 1 - t.radius for t in (a, b) for p in (t.x, t.y))
    return (a, b) if fit else None


def _phrase(rng: random.Random, thing: Thing, level: Level, *named: str) -> Phrase:
    """A phrase true of a thing, with the attributes named and, above easy, others now and then."""
    phrase = describe(rng, thing, world.KNOWN, 0.0 if level == "easy" else 0.3)
    return replace(phrase, **{name: getattr(thing, name) for name in named})


def _say_alike(rng: random.Random, claims: Sequence[Claim], article: Literal["a", "the"] = "a") -> list[str]:
    """Captions in the same paraphrase, so that wording gives nothing away."""
    while True:
        k = rng.getrandbits(32)
        texts = [say(random.Random(k), claim, article) for claim in claims]
        # "overlapping", which has no synonym, puts the generator into another state than the other relations do
        if len({(t.startswith("there "), t.startswith("a picture "), " is " in t) for t in texts}) == 1:
            return texts


# Twins


def _settle(rng: random.Random, make: _Maker) -> _Twins:
    """The first twins that are what twins must be, in random order."""
    for _ in range(_TRIES):
        twins = make()
        if twins is None:
            continue
        (p, q), (s, t) = twins.claims, twins.scenes
        if holds(p, s) and holds(q, t) and not _referents(p, t) and not _referents(q, s):
            return twins if rng.random() < 0.5 else _Twins((t, s), (q, p))
    raise AssertionError("no twins found")


def _changed(
    rng: random.Random,
    split: Split,
    level: Level,
    side: int,
    relation: str,
    attribute: str,
    novel: bool = False,
    bare: bool = False,
) -> _Maker:
    """Twins of which one of two related things (``side`` 0 or 1) differs in one attribute.

    With ``novel`` one of the two values is the novel fill; ``bare`` claims speak of the thing that changes alone.
    """
    before: list[dict[str, str]] = [{}, {}]
    if attribute == "size":
        before[side]["size"] = "large"  # what shrinks still fits
    if novel:
        before[side] |= {"fill": world.NOVEL_FILL, "size": "large"}

    def change(pair: Pair, value: str, radius: float) -> Pair:
        new = replace(pair[side], **{attribute: value})
        new = replace(new, radius=radius) if attribute == "size" else new
        return (new, pair[1]) if side == 0 else (pair[0], new)

    def make() -> _Twins | None:
        pair = _two(rng, *before)
        value = rng.choice([v for v in _VALUES[attribute] if v != getattr(pair[side], attribute)])
        radius = world.resize(pair[side], "small", rng).radius
        changed = change(pair, value, radius)
        if not (_tellable(pair, relation) and _tellable(changed, relation)):
            return None
        extras = _distractors(rng, split, level, world.ALL if novel else world.KNOWN, pair, changed)
        if extras is None:
            return None
        first = world.place_pair(rng, *pair, relation)
        scenes = _stage(rng, level, extras, first[::-1], change(first, value, radius)[::-1])
        if scenes is None:
            return None
        old = [_phrase(rng, t, level, *((attribute,) if i == side else ())) for i, t in enumerate(first)]
        new = list(old)
        new[side] = replace(old[side], **{attribute: value})
        p, q = (Claim(c[side]) if bare else Claim(c[0], relation, c[1]) for c in (old, new))
        return _Twins((scenes[0], scenes[1]), (p, q))

    return make


def _moved(rng: random.Random, split: Split, level: Level, relation: str, definite: bool = False) -> _Maker:
    """Twins of which two things stand in another relation; ``definite``: each phrase fits one thing only."""

    def make() -> _Twins | None:
        pair = _two(rng)
        extras = _distractors(rng, split, level, world.KNOWN, pair)
        if extras is None or not _tellable(pair, relation):
            return None
        first = world.place_pair(rng, *pair, relation)
        other = _OPPOSITES.get(relation) or rng.choice(list(_OPPOSITES))
        second = _exchange_places(first) if relation in _OPPOSITES else world.place_pair(rng, *first, other)
        scenes = second and _stage(rng, level, extras, first[::-1], second[::-1])
        if not scenes:
            return None
        a, b = (_phrase(rng, t, level) for t in first)
        if definite and any(sum(map(p.matches, scenes[0].things)) != 1 for p in (a, b)):
            return None
        return _Twins((scenes[0], scenes[1]), (Claim(a, relation, b), Claim(a, other, b)))

    return make


def _reversed(rng: random.Random, split: Split, level: Level, relation: str) -> _Maker:
    """Twins of which two things change places in their relation."""

    def make() -> _Twins | None:
        pair = _two(rng)
        extras = _distractors(rng, split, level, world.KNOWN, pair)
        if extras is None or not _tellable(pair, relation):
            return None
        first = world.place_pair(rng, *pair, relation)
        if relation == "inside":  # and what is inside lies in front
            back = world.place_pair(rng, *first[::-1], relation)[::-1]
        else:
            exchanged = _exchange_places(first)
            if exchanged is None:
                return None
            back = exchanged[::-1]
        scenes = _stage(rng, level, extras, first[::-1], back)
        if scenes is None:
            return None
        a, b = (_phrase(rng, t, level) for t in first)
        return _Twins((scenes[0], scenes[1]), (Claim(a, relation, b), Claim(b, relation, a)))

    return make


def _swapped(rng: random.Random, split: Split, level: Level, attribute: str, novel: bool = False) -> _Maker:
    """Twins of which two listed things exchange an attribute; with ``novel`` one has the novel fill."""
    names = (attribute, "radius") if attribute == "size" else (attribute,)
    before: dict[str, str] = {"size": "large"} if novel else {}

    def swap(pair: Pair) -> Pair:
        a, b = pair
        c, d = (replace(t, **{n: getattr(o, n) for n in names}) for t, o in ((a, b), (b, a)))
        return c, d

    def make() -> _Twins | None:
        pair = _two(rng, before | {"fill": world.NOVEL_FILL} if novel else before, before)
        if getattr(pair[0], attribute) == getattr(pair[1], attribute):
            return None
        if not (_tellable(pair, None) and _tellable(swap(pair), None)):
            return None
        extras = _distractors(rng, split, level, world.ALL if novel else world.KNOWN, pair, swap(pair))
        if extras is None:
            return None
        first = world.place_pair(rng, *pair, rng.choice(list(_OPPOSITES)))
        scenes = _stage(rng, level, extras, first, swap(first))
        if scenes is None:
            return None
        p, q = (_phrase(rng, t, level, attribute) for t in first)
        r, s = (replace(x, **{attribute: getattr(y, attribute)}) for x, y in ((p, q), (q, p)))
        claims = (Claim(p, object=q), Claim(r, object=s))
        words = [sorted(say(random.Random(0), claim).split()) for claim in claims]
        # "a small orange circle and a red star": the articles differ once the colours are exchanged
        return _Twins((scenes[0], scenes[1]), claims) if words[0] == words[1] else None

    return make


def _crossed(rng: random.Random, split: Split, level: Level) -> _Maker:
    """Twins of the same four kinds of things, two colours of two shapes, of which two others overlap."""

    def swap(things: Sequence[Thing]) -> tuple[Thing, ...]:
        colours = {things[0].colour: things[1].colour, things[1].colour: things[0].colour}
        return tuple(replace(t, colour=colours[t.colour]) for t in things)

    def make() -> _Twins | None:
        pair = _two(rng, {"size": "large"}, {"size": "large"})
        if pair[0].colour == pair[1].colour or pair[0].shape == pair[1].shape:
            return None
        loose = [world.resize(t, "small", rng) for t in swap(pair)]
        extras = _distractors(rng, split, level, world.KNOWN, (*pair, *loose))
        if extras is None:
            return None
        a, b = world.place_pair(rng, *pair, world.NOVEL_RELATION)
        apart = world.scatter(rng, loose, (b, a))
        scenes = apart and _stage(rng, level, extras, (b, a, *apart), swap((b, a, *apart)))
        if not scenes:
            return None
        p, q = (
            Claim(Phrase(t.colour, t.shape), world.NOVEL_RELATION, Phrase(o.colour, o.shape))
            for o, t in (scene.things[:2] for scene in scenes)
        )
        return _Twins((scenes[0], scenes[1]), (p, q))

    return make


# Tasks


def _comvg(rng: random.Random, split: Split, level: Level, novelty: Novelty | None, i: int) -> Drawn:
    mode = ("image-choice", "text-choice")[i // (2 if novelty else 3) % 2]
    kind: str = novelty or ("subject", "predicate", "object")[i % 3]
    if kind == "novel-relation":
        make = _moved(rng, split, level, world.NOVEL_RELATION)
    elif kind == "predicate":
        make = _moved(rng, split, level, rng.choice(world.KNOWN_RELATIONS))
    else:
        attributes = ("colour", "shape") if level == "easy" else tuple(_VALUES)
        attribute = "fill" if novelty else rng.choice(attributes)
        # what is inside is small, what is around it large
        relations = tuple(_OPPOSITES) if novelty or attribute == "size" else world.KNOWN_RELATIONS
        side = rng.randrange(2) if novelty else ("subject", "object").index(kind)
        make = _changed(rng, split, level, side, rng.choice(relations), attribute, novel=bool(novelty))
    twins = _settle(rng, make)
    texts = _say_alike(rng, twins.claims)
    j = rng.randrange(2)
    if mode == "image-choice":
        return Drawn(twins.scenes, (texts[j],), (twins.claims[j],), ((j, 0),), (kind, mode))
    return Drawn((twins.scenes[j],), tuple(texts), twins.claims, ((0, j),), (kind, mode))


def _winoground(rng: random.Random, split: Split, level: Level, novelty: Novelty | None, i: int) -> Drawn:
    kinds = ("relation", "colour") if level == "easy" else ("relation", "colour", "fill", "size")
    kind: str = novelty or kinds[i % len(kinds)]
    if kind == "novel-relation":
        make = _crossed(rng, split, level)
    elif kind == "relation":
        make = _reversed(rng, split, level, rng.choice(world.KNOWN_RELATIONS))
    else:
        make = _swapped(rng, split, level, "fill" if novelty else kind, novel=bool(novelty))
    twins = _settle(rng, make)
    return Drawn(twins.scenes, tuple(_say_alike(rng, twins.claims)), twins.claims, ((0, 0), (1, 1)), (kind,))


def _put(claim: Claim, side: int, attribute: str, value: str) -> Claim:
    """The claim with another relation, or another attribute of its subject (``side`` 0) or object (1)."""
    if attribute == "relation":
        return replace(claim, relation=value)
    phrase = claim.object if side else claim.subject
    assert phrase is not None
    return replace(claim, **{"object" if side else "subject": replace(phrase, **{attribute: value})})


def _refcocog(rng: random.Random, split: Split, level: Level, novelty: Novelty | None) -> Drawn:
    relation: str | None = rng.choice((*world.KNOWN_RELATIONS, None, None))
    if novelty == "novel-relation":
        relation = rng.choice((world.NOVEL_RELATION, rng.choice(list(_OPPOSITES))))
    side = rng.randrange(2) if relation else 0
    wide, kin = rng.sample(("colour", "shape"), 2)
    five = rng.sample(_VALUES[wide], 5)
    # the other two values: of the relation, of either thing's size or fill, or of the varied thing itself
    options = [(side, kin)]
    if relation in _OPPOSITES:
        options.append((0, "relation"))
    if level != "easy":
        sides = (0, 1) if relation else (0,)
        options += [(s, a) for s in sides for a in ("size", "fill") if a == "fill" or relation not in _TOUCHING]
    where, narrow = rng.choice(options)
    before: list[dict[str, str]] = [{}, {}]
    if novelty == "novel-relation":
        assert relation is not None
        where, narrow = 0, "relation"
        two = [relation, rng.choice(list(_OPPOSITES)) if relation == world.NOVEL_RELATION else world.NOVEL_RELATION]
    elif novelty == "novel-fill":
        where, narrow = rng.randrange(2) if relation else 0, "fill"
        two = rng.sample((world.NOVEL_FILL, rng.choice(world.KNOWN_FILLS)), 2)
        before[where]["size"] = "large"
    elif narrow == "relation":
        assert relation is not None
        two = [relation, _OPPOSITES[relation]]
    else:
        two = rng.sample(_VALUES[narrow], 2)
    before[side][wide] = five[0]
    if narrow != "relation":
        before[where][narrow] = two[0]
    vocabulary = world.ALL if novelty == "novel-fill" else world.KNOWN

    def grid(claim: Claim) -> list[Claim]:
        return [_put(_put(claim, side, wide, w), where, narrow, n) for w in five for n in two]

    touching = next((r for r in (relation, *two) if r in _TOUCHING), None)
    for _ in range(_PATIENCE):
        pair = _two(rng, *before)
        kinds = [Phrase(*t.kind) for t in pair]
        # a caption that could be true of no scene would give itself away
        possible = not relation or all(
            _tellable((c.subject, c.object), touching) for c in grid(Claim(kinds[0], relation, kinds[1])) if c.object
        )
        if not (possible and _tellable(pair, touching)):
            continue
        extras = _distractors(rng, split, level, vocabulary, pair)
        if extras is None or not _fair(rng, pair[side], (pair[1 - side], *extras)):
            continue
        a, b = world.place_pair(rng, *pair, relation or rng.choice(list(_OPPOSITES)))
        scenes = _stage(rng, level, extras, (b, a))
        if scenes is None:
            continue
        named = [[n for s, n in ((side, wide), (where, narrow)) if s == t and n != "relation"] for t in (0, 1)]
        p, q = (_phrase(rng, t, level, *n) for t, n in zip((a, b), named, strict=True))
        claim = Claim(p, relation, q if relation else None)
        claims = grid(claim)
        false = [c for c in claims if c != claim]
        if not _definite(claim, scenes[0], a) or any(_referents(c, scenes[0]) for c in false):
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
        make = _moved(rng, split, level, relation, definite=True)
    else:
        attribute = "fill" if novelty else rng.choice(("colour", "shape") if level == "easy" else tuple(_VALUES))
        placing = rng.choice(list(_OPPOSITES))
        make = _changed(rng, split, level, rng.randrange(2), placing, attribute, novel=bool(novelty), bare=True)
    twins = _settle(rng, make)
    true = i % 2 == 0
    j = rng.randrange(2)
    claim = twins.claims[j]
    answers = rng.sample((True, False), 2)
    texts = tuple(f"{ask(claim, 'truth')} {answer(claim, 'truth', a)}" for a in answers)
    tags = (*((novelty,) if novelty else ()), "binary", "truth")
    claims = tuple(claim if a else None for a in answers)
    return Drawn((twins.scenes[j if true else 1 - j],), texts, claims, ((0, answers.index(true)),), tags)


def _vqa_other(rng: random.Random, split: Split, level: Level, i: int) -> Drawn:
    slots: tuple[Slot, ...] = ("colour", "shape", "colour", "shape", "count")
    slots = slots if level == "easy" else (*slots, "fill")
    slot = slots[i % len(slots)]
    scene, claim = (_counted if slot == "count" else _asked)(rng, split, level, slot)
    question, truth = ask(claim, slot), answer(claim, slot)
    values = NUMBERS[1:] if slot == "count" else _VALUES[slot]
    claims: dict[str, Claim | None] = {
        v: _put(claim, 0, slot, v) if slot != "count" else replace(claim, subject=replace(claim.subject, count=n))
        for n, v in enumerate(values, 1)
    }
    # the words filled up with are true of nothing in the picture
    true = {scene.background} | {str(getattr(t, n)) for t in scene.things for n in _VALUES}
    words = list(world.BACKGROUNDS) if slot == "colour" else [w for group in _VALUES.values() for w in group]
    fillers = [w for w in words if w not in true and w not in claims and w not in question.split()]
    claims |= dict.fromkeys(rng.sample(fillers, 10 - len(claims)))
    answers = rng.sample(list(claims), 10)
    texts = tuple(f"{question} {a}" for a in answers)
    return Drawn((scene,), texts, tuple(claims[a] for a in answers), ((0, answers.index(truth)),), ("other", slot))


def _asked(rng: random.Random, split: Split, level: Level, slot: Slot) -> tuple[Scene, Claim]:
    """A scene and a claim about one of its things that is the only one of which ``slot`` can be asked."""
    before = {name: rng.choice(_VALUES[name]) for name in ("colour", "shape", "fill")}
    # a thing inside another is never of its colour
    relation = rng.choice(list(_OPPOSITES) if slot == "colour" else world.KNOWN_RELATIONS)
    tail = rng.random() < 0.5
    for _ in range(_PATIENCE):
        pair = _two(rng, before, {})
        if not _tellable(pair, relation):
            continue
        # things agree in nothing that the question names, or the answer could not be the other's
        if (slot == "colour" and pair[0].shape == pair[1].shape) or (slot == "shape" and pair[0].colour == pair[1].colour):
            continue
        extras = _distractors(rng, split, level, world.KNOWN, pair)
        if extras is None or not _fair(rng, pair[0], (pair[1], *extras)):
            continue
        a, b = world.place_pair(rng, *pair, relation)
        scenes = _stage(rng, level, extras, (b, a))
        if scenes is None:
            continue
        claim = Claim(_phrase(rng, a, level, slot))
        if tail:
            claim = replace(claim, relation=relation, object=_phrase(rng, b, level))
        if _definite(replace(claim, subject=replace(claim.subject, **{slot: None})), scenes[0], a):
            return scenes[0], claim
    return _asked(rng, split, level, slot)


def _counted(rng: random.Random, split: Split, level: Level, slot: Slot) -> tuple[Scene, Claim]:
    """A scene with one to four (at ``easy`` two) things of a colour, of a shape or of both, and how many they are."""
    easy = level == "easy"
    number = rng.randint(1, 2 if easy else 4)
    shared = rng.choice((("colour",), ("shape",)) if easy else (("colour",), ("shape",), ("colour", "shape")))
    for _ in range(_TRIES):
        first = world.sample_thing(rng, world.KNOWN)
        same = {name: str(getattr(first, name)) for name in shared}
        phrase = Phrase(**cast(dict[str, Any], same), count=number)
        if number > 2:
            same["size"] = "small"
        things = [_with(rng, world.sample_thing(rng, world.KNOWN), same) for _ in range(number)]
        total = 2 if easy else rng.randint(max(3, number), world.MAX_THINGS)
        while len(things) < total:
            other = world.sample_thing(rng, world.KNOWN, like=first)
            if not phrase.matches(other):
                things.append(other)
        rng.shuffle(things)
        scenes = world.part_of(Scene(tuple(things))) == split and _stage(rng, level, things, ())
        if scenes:
            return scenes[0], Claim(phrase)
    raise AssertionError(f"no scene found for split {split!r}")
