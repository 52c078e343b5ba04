"""What can be said of a scene: claims, whether they hold, and how they read in English.

A :class:`Claim` is a caption's meaning; :func:`holds` decides whether it is true of a scene, so that every
positive and negative of every task is checked, not assumed. :func:`say` and :func:`ask` turn claims into
grammatical captions and questions, with paraphrases.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from typing import Literal

from dsd.tiny import world
from dsd.tiny.world import Scene, Thing, placed, related

Slot = Literal["colour", "shape", "fill", "size", "relation", "count", "truth"]

NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {"cross": "crosses"}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "within"),
    "overlapping": ("overlapping",),
}
PLACE_WORDS = {
    "left": ("on the left",),
    "right": ("on the right",),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "centre": ("in the centre", "in the middle"),
}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase; None leaves an attribute open. ``count`` above one asks for exactly that many."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    fill: str | None = None
    count: int = 1

    def matches(self, thing: Thing) -> bool:
        pairs = ((getattr(self, f.name), getattr(thing, f.name)) for f in fields(self) if f.name != "count")
        return all(want is None or want == got for want, got in pairs)

    def words(self, article: Literal["a", "the", "", "number"] = "a") -> str:
        noun = self.shape or "shape"
        if self.count != 1:
            noun = PLURALS.get(noun, noun + "s")
        body = " ".join(w for w in (self.size, self.fill, self.colour, noun) if w)
        if article == "number" or (self.count != 1 and article):
            return f"{NUMBERS[self.count]} {body}"
        if article == "a":
            article = "an" if body[0] in "aeiou" else "a"  # type: ignore[assignment]
        return f"{article} {body}".strip()


@dataclass(frozen=True)
class Claim:
    """``subject`` stands in ``relation`` to ``object``, or is at a ``place``; an object without relation is listed."""

    subject: Phrase
    relation: str | None = None
    object: Phrase | None = None
    place: str | None = None
    background: str | None = None


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether a claim is true of a scene."""
    if claim.background is not None and claim.background != scene.background:
        return False
    subjects = [t for t in scene.things if claim.subject.matches(t)]
    if claim.subject.count != 1 and len(subjects) != claim.subject.count:
        return False
    if claim.place is not None and not any(placed(t, claim.place) for t in subjects):
        return False
    if claim.object is None:
        return bool(subjects)
    objects = [t for t in scene.things if claim.object.matches(t)]
    if claim.object.count != 1 and len(objects) != claim.object.count:
        return False
    pairs = ((a, b) for a in subjects for b in objects if a is not b)
    return any(claim.relation is None or related(a, claim.relation, b) for a, b in pairs)


# Sampling

DETAIL = 0.3
"""How probable it is that a phrase tells a thing's size, and its fill, while pretraining."""


def describe(rng: random.Random, thing: Thing, vocabulary: world.Vocabulary, detail: float = DETAIL) -> Phrase:
    """A phrase true of a thing: colour and shape, size and fill each with probability ``detail``."""
    return Phrase(
        thing.colour,
        thing.shape,
        thing.size if rng.random() < detail else None,
        thing.fill if rng.random() < detail and thing.fill in vocabulary.fills else None,
    )


def sample_claim(
    rng: random.Random, scene: Scene, vocabulary: world.Vocabulary = world.KNOWN, detail: float = DETAIL
) -> Claim:
    """A claim that holds for a scene, in words of the vocabulary: a place, a count, a relation or a list."""
    background = scene.background if rng.random() < 0.15 else None
    things = list(scene.things)
    groups: dict[tuple[str, str], list[Thing]] = {}
    for thing in things:
        groups.setdefault(thing.kind, []).append(thing)
    copies = [g for g in groups.values() if len(g) > 1]
    if copies and rng.random() < 0.7:
        group = rng.choice(copies)
        subject = Phrase(group[0].colour, group[0].shape, count=len(group))
        others = [t for t in things if t.kind != group[0].kind]
        other = describe(rng, rng.choice(others), vocabulary, detail) if others and rng.random() < 0.4 else None
        return Claim(subject, object=other, background=background)
    a = rng.choice(things)
    subject = describe(rng, a, vocabulary, detail)
    if len(things) == 1 or rng.random() < 0.12:
        places = [p for p in world.PLACES if placed(a, p)]
        place = places[0] if places and rng.random() < 0.75 else None
        return Claim(subject, place=place, background=background)
    pairs = [(a, r, b) for a in things for b in things for r in vocabulary.relations if a is not b and related(a, r, b)]
    if pairs and rng.random() < 0.85:
        a, relation, b = rng.choice(pairs)
        return Claim(
            describe(rng, a, vocabulary, detail), relation, describe(rng, b, vocabulary, detail), background=background
        )
    b = rng.choice([t for t in things if t is not a])
    return Claim(subject, object=describe(rng, b, vocabulary, detail), background=background)


# Words


def say(rng: random.Random, claim: Claim, article: Literal["a", "the"] = "a") -> str:
    """A caption for a claim, one of its paraphrases."""
    subject = claim.subject.words(article)
    verb = "are" if claim.subject.count != 1 else "is"
    if claim.relation is not None:
        assert claim.object is not None
        relation = rng.choice(RELATION_WORDS[claim.relation])
        text = f"{subject} {rng.choice(('', 'is '))}{relation} {claim.object.words(article)}"
    elif claim.object is not None:
        text = f"{subject} and {claim.object.words(article)}"
    elif claim.place is not None:
        text = f"{subject} {rng.choice(('', 'is '))}{rng.choice(PLACE_WORDS[claim.place])}"
    else:
        text = subject
    if article == "a" and " is " not in text and rng.random() < 0.25:
        text = rng.choice((f"there {verb} {text}", f"a picture of {text}"))
    return text if claim.background is None else f"{text} on a {claim.background} background"


def ask(claim: Claim, slot: Slot) -> str:
    """A question about one slot of a claim; :func:`answer` gives its answer."""
    subject = claim.subject
    tail = ""
    if claim.relation is not None and slot != "relation":
        assert claim.object is not None
        tail = f" {claim.relation} {claim.object.words('the')}"
    match slot:
        case "colour":
            return f"what colour is {replace(subject, colour=None).words('the')}{tail}?"
        case "shape":
            return f"what is {replace(subject, shape=None).words('the')}{tail}?"
        case "fill":
            return f"how is {replace(subject, fill=None).words('the')}{tail} filled?"
        case "size":
            return f"what size is {replace(subject, size=None).words('the')}{tail}?"
        case "relation":
            assert claim.object is not None
            return f"where is {subject.words('the')} from {claim.object.words('the')}?"
        case "count":
            return f"how many {replace(subject, count=2).words('')} are there?"
        case "truth":
            if claim.relation is None:
                verb = "are" if subject.count != 1 else "is"
                return f"{verb} there {subject.words()}?"
            return f"is {subject.words('the')}{tail}?"


def answer(claim: Claim, slot: Slot, true: bool = True) -> str:
    """The answer to :func:`ask`: the slot's value, or yes and no."""
    match slot:
        case "truth":
            return "yes" if true else "no"
        case "count":
            return NUMBERS[claim.subject.count]
        case "relation":
            return str(claim.relation)
        case _:
            return str(getattr(claim.subject, slot))


def vocabulary_words() -> list[str]:
    """Every word that captions and questions are made of, sorted; the tokenizer keeps each whole."""
    shapes = [*world.SHAPES, "shape"]
    words = {*world.COLOURS, *shapes, *(PLURALS.get(s, s + "s") for s in shapes), *world.SIZES, *world.FILLS}
    words |= {*NUMBERS, *world.BACKGROUNDS}
    for group in (RELATION_WORDS, PLACE_WORDS):
        words |= {w for phrases in group.values() for phrase in phrases for w in phrase.split()}
    words |= set(
        "a an the and is are there picture of on background from filled what where how many size colour".split()
    )
    words |= {"yes", "?"}
    return sorted(words)
