"""From a caption to a scene of the world for which it holds: the way back from :func:`dsd.tiny.captions.say`."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from dsd.contracts import TextError
from dsd.tiny import world
from dsd.tiny.captions import NUMBERS, PLACE_WORDS, PLURALS, RELATION_WORDS, Claim, Phrase, holds
from dsd.tiny.world import Scene, Thing

_TRIES = 400
_OPENINGS = ("there is ", "there are ", "a picture of ", "an image of ", "a photo of ")
_SAYS = "such as 'a red circle left of a blue square', 'two green stars' or 'a small striped heart at the top'"


def read(text: str) -> Claim:
    """What a caption of the world says.

    Raises:
        TextError: It says something else, or is put in other words.
    """
    words = re.sub(r"\s+", " ", re.sub(r"[.,!]", " ", text.lower())).strip()
    for opening in _OPENINGS:
        words = words.removeprefix(opening)
    background = None
    found = re.fullmatch(r"(.*?) on an? (\w+) background", words)
    if found is not None and found[2] in world.BACKGROUNDS:
        words, background = found[1], found[2]
    for relation, spellings in RELATION_WORDS.items():
        for spelling in sorted(spellings, key=len, reverse=True):
            parts = re.split(rf" (?:is |are )?{spelling} ", words)
            if len(parts) == 2:
                return Claim(_phrase(parts[0], text), relation, _phrase(parts[1], text), background=background)
    for place, spellings in PLACE_WORDS.items():
        for spelling in spellings:
            found = re.fullmatch(rf"(.*?)(?: is| are)? {spelling}", words)
            if found is not None:
                return Claim(_phrase(found[1], text), place=place, background=background)
    parts = words.split(" and ")
    if len(parts) == 2:
        return Claim(_phrase(parts[0], text), object=_phrase(parts[1], text), background=background)
    return Claim(_phrase(words, text), background=background)


def _phrase(words: str, text: str) -> Phrase:
    singular = {PLURALS.get(shape, shape + "s"): shape for shape in (*world.SHAPES, "shape")}
    values: dict[str, str] = {}
    count = 1
    first, *rest = words.split() or [""]
    if first in NUMBERS[1:]:
        count = NUMBERS.index(first)
    elif first not in ("a", "an", "the"):
        rest = [first, *rest]
    *attributes, noun = rest or [""]
    shape = singular.get(noun, noun)
    kinds = {"colour": world.COLOURS, "size": world.SIZES, "fill": world.FILLS}
    for word in attributes:
        kind = next((k for k, known in kinds.items() if word in known), None)
        if kind is None or kind in values:
            raise TextError(f"got the word {word!r} in the caption {text!r}, expected a caption of the world, {_SAYS}")
        values[kind] = word
    if shape not in (*world.SHAPES, "shape"):
        raise TextError(f"got the caption {text!r}, expected one of the world's, {_SAYS}")
    return Phrase(shape=None if shape == "shape" else shape, count=count, **values)


def stage(rng: random.Random, claim: Claim) -> Scene:
    """A scene of few things for which a claim holds.

    Raises:
        TextError: No such scene was found.
    """
    background = claim.background or rng.choice(list(world.BACKGROUNDS))
    for _ in range(_TRIES):
        things = _things(rng, claim)
        if things is None or len(things) > world.MAX_THINGS:
            continue
        scene = Scene(things, background, rng.choice(world.PATTERNS), seed=rng.getrandbits(31))
        if holds(claim, scene):
            return scene
    raise TextError("got a caption that no scene was found for, expected one that can be true; say it otherwise")


def _thing(rng: random.Random, phrase: Phrase, crowded: bool) -> Thing:
    drawn = world.sample_thing(rng, world.KNOWN)
    size = phrase.size or ("small" if crowded else "large")
    values = {k: v for k in ("colour", "shape") if (v := getattr(phrase, k)) is not None}
    return world.resize(replace(drawn, fill=phrase.fill or "solid", **values), size, rng)


def _things(rng: random.Random, claim: Claim) -> tuple[Thing, ...] | None:
    """Things from back to front, or None where no room was found."""
    others = 0 if claim.object is None else claim.object.count
    crowded = claim.subject.count + others > 3
    a = _thing(rng, claim.subject, crowded)
    if claim.object is not None and claim.relation is not None and claim.subject.count == others == 1:
        b = _thing(rng, claim.object, crowded)
        try:
            front, back = world.place_pair(rng, a, b, claim.relation)
        except AssertionError:
            return None
        return back, front
    loose = [a] * claim.subject.count
    if claim.object is not None:
        loose += [_thing(rng, claim.object, crowded)] * others
    if claim.place is not None and len(loose) == 1:
        r = a.radius
        return (replace(a, x=rng.uniform(r, 1 - r), y=rng.uniform(r, 1 - r)),)
    return world.scatter(rng, loose)
