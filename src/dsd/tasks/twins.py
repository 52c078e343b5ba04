"""Scenes that answer a question, and twins: two scenes that differ in one thing, with a claim true of each alone.

The tasks of :mod:`dsd.tasks.world` are made of them. A claim that is true must hold (:func:`dsd.tiny.captions.holds`);
one that is false must be so in a lenient reading too (:func:`referents`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from dsd.tiny import world
from dsd.tiny.captions import Claim, Phrase, describe, holds, say
from dsd.tiny.world import Level, Scene, Style, Thing, Vocabulary

Split = Literal["few-shot", "val", "test"]
Pair = tuple[Thing, Thing]

VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(world.COLOURS),
    "shape": world.SHAPES,
    "size": world.SIZES,
    "fill": world.KNOWN_FILLS,
}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TOUCHING = ("inside", "overlapping")
_TRIES = 100_000
_T = TypeVar("_T", Thing, Phrase, Claim)


@dataclass(frozen=True)
class Twins:
    """Two scenes and two claims; each claim holds for the scene of its index alone."""

    scenes: tuple[Scene, Scene]
    claims: tuple[Claim, Claim]


Maker = Callable[[], Twins | None]
"""Draws candidates for twins; None where a draw led nowhere."""


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


def referents(claim: Claim, scene: Scene) -> list[Thing]:
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


def definite(claim: Claim, scene: Scene, subject: Thing) -> bool:
    """Whether "the" is right: the claim's subject can only be this thing, and its object only one."""
    objects = 1 if claim.object is None else sum(map(claim.object.matches, scene.things))
    return objects == 1 and [id(t) for t in referents(claim, scene)] == [id(subject)]


def legible(claims: Sequence[Claim], scene: Scene) -> bool:
    """Whether the scene's style lets what the claims name be seen; the first is true of it, of its first two things."""
    phrases = [p for claim in claims for p in (claim.subject, claim.object) if p is not None]
    if scene.style == "sketch" and any(p.fill and p.colour == "white" for p in phrases):
        return False  # white on white paper
    if scene.style == "small" and any(p.size for p in phrases):
        return False
    if claims[0].relation != world.NOVEL_RELATION:
        return True
    shrink = 0.72 if scene.style == "small" else 1.0
    a, b = (world.regions(Scene((replace(t, radius=shrink * t.radius),)))[0] for t in scene.things[:2])
    return int((a & b).sum()) >= 12


def fair(rng: random.Random, asked: Thing, rest: Iterable[Thing]) -> bool:
    """Thins out scenes so that the kind of the thing asked about is independent of the rest of the scene.

    A scene with a kind held out of pretraining is in a split with probability 1/3, any other with 1/10: the held-out
    partner of a shape would be the best blind guess at its colour.
    """
    held = any(t.kind in world.HELD_OUT for t in rest)
    return asked.kind not in world.HELD_OUT or held or rng.random() < 0.3


# Scenes


def distractors(
    rng: random.Random, split: Split, level: Level, vocabulary: Vocabulary, *casts: Sequence[Thing]
) -> list[Thing] | None:
    """Things, not placed yet, to stand beside each of the casts of main things; none at ``easy``.

    At least one shares its colour or its shape with a main thing, and none is of a kind that is in every cast. None if
    the scenes would not all be of the split; tried before anything is placed, which takes far longer.
    """
    extras: list[Thing] = []
    if level != "easy":
        main = list(dict.fromkeys(t for cast in casts for t in cast))
        everywhere = set.intersection(*({t.kind for t in cast} for cast in casts))
        total = rng.randint(max(3, len(casts[0])), world.MAX_THINGS)
        while len(casts[0]) + len(extras) < total:
            akin = not extras or rng.random() < 0.7
            extra = world.sample_thing(rng, vocabulary, like=rng.choice(main) if akin else None)
            if extra.kind not in everywhere:
                extras.append(world.resize(extra, "small", rng) if rng.random() < 0.5 else extra)
    return extras if all(world.part_of(Scene((*cast, *extras))) == split for cast in casts) else None


def stage(rng: random.Random, level: Level, extras: Iterable[Thing], *casts: Sequence[Thing]) -> list[Scene] | None:
    """A scene for each cast of placed things (back to front), all with one backdrop and the same distractors.

    None if there is no room for the distractors.
    """
    scattered = world.scatter(rng, extras, tuple(dict.fromkeys(t for cast in casts for t in cast)))
    if scattered is None:
        return None
    background, pattern = rng.choice(list(world.BACKGROUNDS)), rng.choice(world.PATTERNS)
    style: Style = rng.choice(world.SHIFTS) if level == "hard" else "plain"
    seed = rng.getrandbits(31)
    return [Scene((*cast, *scattered), background, pattern, style, seed) for cast in casts]


def having(whole: _T, **values: Any) -> _T:
    """The thing, phrase or claim with other values."""
    return replace(whole, **values)


def altered(rng: random.Random, thing: Thing, values: dict[str, str]) -> Thing:
    """The thing with other attributes; a new size brings a new radius."""
    if "size" in values:
        thing = world.resize(thing, values["size"], rng)
    return having(thing, **values)


def two(rng: random.Random, *values: dict[str, str]) -> Pair:
    """Two things, not placed yet, with the attributes asked for."""
    a, b = (altered(rng, world.sample_thing(rng, world.KNOWN), v) for v in values or ({}, {}))
    return a, b


def tellable(pair: Iterable[Thing | Phrase], relation: str | None) -> bool:
    """Whether two things can stand in a relation and be told apart."""
    a, b = pair
    if relation in TOUCHING:
        return a.colour != b.colour
    return (a.colour, a.shape) != (b.colour, b.shape)


def _exchange(pair: Pair, *names: str) -> Pair | None:
    """The pair with attributes exchanged; None if one then stands out of the picture."""
    a, b = (having(t, **{n: getattr(o, n) for n in names}) for t, o in (pair, pair[::-1]))
    fit = all(t.radius <= p <= 1 - t.radius for t in (a, b) for p in (t.x, t.y))
    return (a, b) if fit else None


def phrase(rng: random.Random, thing: Thing, level: Level, *named: str) -> Phrase:
    """A phrase true of a thing, with the attributes named and, above easy, others now and then."""
    described = describe(rng, thing, world.KNOWN, 0.0 if level == "easy" else 0.3)
    return having(described, **{name: getattr(thing, name) for name in named})


# Twins


def settle(rng: random.Random, make: Maker) -> Twins:
    """The first twins that are what twins must be, in random order."""
    for _ in range(_TRIES):
        twins = make()
        if twins is None:
            continue
        (p, q), (s, t) = twins.claims, twins.scenes
        true = holds(p, s) and holds(q, t) and not referents(p, t) and not referents(q, s)
        if true and legible((p, q), s) and legible((q, p), t):
            return twins if rng.random() < 0.5 else Twins((t, s), (q, p))
    raise AssertionError("no twins found")


def changed(
    rng: random.Random,
    split: Split,
    level: Level,
    side: int,
    relation: str,
    attribute: str,
    novel: bool = False,
    bare: bool = False,
) -> Maker:
    """Twins of which one of two related things (``side`` 0 or 1) differs in one attribute.

    With ``novel`` one of the two values is the novel fill; ``bare`` claims speak of the thing that changes alone.
    """
    before: list[dict[str, str]] = [{}, {}]
    if attribute == "size":
        before[side]["size"] = "large"  # what shrinks still fits
    if novel:
        before[side] |= {"fill": world.NOVEL_FILL, "size": "large"}

    def change(pair: Pair, value: str, radius: float) -> Pair:
        new = having(pair[side], **{attribute: value})
        new = replace(new, radius=radius) if attribute == "size" else new
        return (new, pair[1]) if side == 0 else (pair[0], new)

    def make() -> Twins | None:
        pair = two(rng, *before)
        value = rng.choice([v for v in VALUES[attribute] if v != getattr(pair[side], attribute)])
        radius = world.resize(pair[side], "small", rng).radius
        after = change(pair, value, radius)
        if not (tellable(pair, relation) and tellable(after, relation)):
            return None
        extras = distractors(rng, split, level, world.ALL if novel else world.KNOWN, pair, after)
        if extras is None:
            return None
        first = world.place_pair(rng, *pair, relation)
        scenes = stage(rng, level, extras, first[::-1], change(first, value, radius)[::-1])
        if scenes is None:
            return None
        old = [phrase(rng, t, level, *((attribute,) if i == side else ())) for i, t in enumerate(first)]
        new = list(old)
        new[side] = having(old[side], **{attribute: value})
        p, q = (Claim(c[side]) if bare else Claim(c[0], relation, c[1]) for c in (old, new))
        return Twins((scenes[0], scenes[1]), (p, q))

    return make


def moved(
    rng: random.Random, split: Split, level: Level, relation: str, reverse: bool = False, unique: bool = False
) -> Maker:
    """Twins of which two things stand in another relation.

    With ``reverse`` it is the same the other way round; ``unique``: each phrase fits only one thing.
    """

    def make() -> Twins | None:
        pair = two(rng)
        extras = distractors(rng, split, level, world.KNOWN, pair)
        if extras is None or not tellable(pair, relation):
            return None
        first = world.place_pair(rng, *pair, relation)
        other = OPPOSITES.get(relation) or rng.choice(list(OPPOSITES))
        if relation in OPPOSITES:
            second = _exchange(first, "x", "y")
        elif reverse:
            inner, outer = world.place_pair(rng, first[1], first[0], relation)
            second = outer, inner
        else:
            second = world.place_pair(rng, *first, other)
        if second is None:
            return None
        # what is inside lies in front
        scenes = stage(rng, level, extras, first[::-1], second if reverse and relation == "inside" else second[::-1])
        if scenes is None:
            return None
        a, b = (phrase(rng, t, level) for t in first)
        if unique and any(sum(map(p.matches, scenes[0].things)) != 1 for p in (a, b)):
            return None
        claims = Claim(a, relation, b), Claim(b, relation, a) if reverse else Claim(a, other, b)
        return Twins((scenes[0], scenes[1]), claims)

    return make


def swapped(rng: random.Random, split: Split, level: Level, attribute: str, novel: bool = False) -> Maker:
    """Twins of which two listed things exchange an attribute; with ``novel`` one has the novel fill."""
    names = (attribute, "radius") if attribute == "size" else (attribute,)
    before: dict[str, str] = {"size": "large"} if novel else {}

    def make() -> Twins | None:
        pair = two(rng, before | {"fill": world.NOVEL_FILL} if novel else before, before)
        if getattr(pair[0], attribute) == getattr(pair[1], attribute):
            return None
        after = _exchange(pair, *names)
        if after is None or not (tellable(pair, None) and tellable(after, None)):
            return None
        extras = distractors(rng, split, level, world.ALL if novel else world.KNOWN, pair, after)
        if extras is None:
            return None
        first = world.place_pair(rng, *pair, rng.choice(list(OPPOSITES)))
        second = _exchange(first, *names)
        if second is None:
            return None
        scenes = stage(rng, level, extras, first, second)
        if scenes is None:
            return None
        p, q = (phrase(rng, t, level, attribute) for t in first)
        r, s = (having(x, **{attribute: getattr(y, attribute)}) for x, y in ((p, q), (q, p)))
        claims = (Claim(p, object=q), Claim(r, object=s))
        words = [sorted(say(random.Random(0), claim).split()) for claim in claims]
        # "a small orange circle and a red star": the articles differ once the colours are exchanged
        return Twins((scenes[0], scenes[1]), claims) if words[0] == words[1] else None

    return make


def crossed(rng: random.Random, split: Split, level: Level) -> Maker:
    """Twins of the same four kinds of things, two colours of two shapes, of which two others overlap."""

    def swap(things: Sequence[Thing]) -> tuple[Thing, ...]:
        colours = {things[0].colour: things[1].colour, things[1].colour: things[0].colour}
        return tuple(replace(t, colour=colours[t.colour]) for t in things)

    def make() -> Twins | None:
        pair = two(rng, {"size": "large"}, {"size": "large"})
        if pair[0].colour == pair[1].colour or pair[0].shape == pair[1].shape:
            return None
        loose = [world.resize(t, "small", rng) for t in swap(pair)]
        extras = distractors(rng, split, level, world.KNOWN, (*pair, *loose))
        if extras is None:
            return None
        a, b = world.place_pair(rng, *pair, world.NOVEL_RELATION)
        apart = world.scatter(rng, loose, (b, a))
        if apart is None:
            return None
        scenes = stage(rng, level, extras, (b, a, *apart), swap((b, a, *apart)))
        if scenes is None:
            return None
        p, q = (
            Claim(Phrase(t.colour, t.shape), world.NOVEL_RELATION, Phrase(o.colour, o.shape))
            for o, t in (scene.things[:2] for scene in scenes)
        )
        return Twins((scenes[0], scenes[1]), (p, q))

    return make
