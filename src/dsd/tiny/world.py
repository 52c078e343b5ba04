"""The procedural world that the embedded model is pretrained on: what a scene is, how it is sampled and drawn.

A scene holds one to five coloured shapes on a background. Everything is decided by a seed, so that a dataset is
a few numbers. What a scene *says* in words lives in :mod:`dsd.tiny.captions`; the benchmark tasks made of both in
:mod:`dsd.tasks.world`.

Four parts are disjoint by construction (:func:`part_of`): the set of (colour, shape) kinds in a scene decides
which part it belongs to, and the kinds in :data:`HELD_OUT` never occur in pretraining.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageChops, ImageDraw

Part = Literal["pretraining", "few-shot", "val", "test"]
Level = Literal["easy", "standard", "hard"]
Style = Literal["plain", "sketch", "texture", "low light", "noise", "small"]

PARTS: tuple[Part, ...] = get_args(Part)
LEVELS: tuple[Level, ...] = get_args(Level)
SHIFTS: tuple[Style, ...] = get_args(Style)[1:]
"""The shifts of level ``hard``; none of them occurs in pretraining."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 50),
    "green": (40, 175, 65),
    "blue": (45, 95, 240),
    "purple": (150, 60, 200),
    "pink": (255, 140, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "heart", "moon")
SIZES = ("small", "large")
FILLS = ("solid", "striped", "hollow", "dotted")
NOVEL_FILL = "dotted"
"""A fill that pretraining shows but never names."""

RELATIONS = ("left of", "right of", "above", "below", "inside", "overlapping")
NOVEL_RELATION = "overlapping"
"""A relation that pretraining shows but never names."""

PLACES = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 14),
    "grey": (105, 108, 112),
    "brown": (84, 58, 38),
    "teal": (16, 82, 88),
}
PATTERNS = ("plain", "gradient", "grid")
"""Background patterns: seen, never named."""

KNOWN_FILLS = tuple(f for f in FILLS if f != NOVEL_FILL)
KNOWN_RELATIONS = tuple(r for r in RELATIONS if r != NOVEL_RELATION)
HELD_OUT = frozenset((c, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, c in enumerate(COLOURS))
"""(colour, shape) kinds absent from pretraining: each colour and each shape misses one partner."""

MAX_THINGS = 5
IMAGE_SIZE = 64
"""Pixels a side."""

_RADIUS = {"small": (0.1, 0.12), "large": (0.165, 0.195)}
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Thing:
    """One object of a scene; ``x``, ``y`` (its centre) and ``radius`` are shares of the picture's side."""

    shape: str
    colour: str
    size: str
    fill: str
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Things from back to front, on a background; ``seed`` decides only textures and noise."""

    things: tuple[Thing, ...]
    background: str = "black"
    pattern: str = "plain"
    style: Style = "plain"
    seed: int = 0


def part_of(scene: Scene) -> Part:
    """The one part that a scene belongs to, decided by the set of its (colour, shape) kinds alone."""
    kinds = sorted({t.kind for t in scene.things})
    draw = int.from_bytes(hashlib.blake2b(repr(kinds).encode(), digest_size=8).digest(), "big")
    if any(kind in HELD_OUT for kind in kinds):
        return PARTS[1 + draw % 3]
    if len(kinds) == 1:
        return "pretraining"
    bucket = draw % 20
    return "pretraining" if bucket < 14 else PARTS[1 + (bucket - 14) // 2]


def related(a: Thing, relation: str, b: Thing) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``; left, right, above and below ask for a dominant axis."""
    dx, dy = b.x - a.x, b.y - a.y
    distance = math.hypot(dx, dy)
    match relation:
        case "left of":
            return dx > 0.2 and dx > 1.3 * abs(dy)
        case "right of":
            return -dx > 0.2 and -dx > 1.3 * abs(dy)
        case "above":
            return dy > 0.2 and dy > 1.3 * abs(dx)
        case "below":
            return -dy > 0.2 and -dy > 1.3 * abs(dx)
        case "inside":
            return a.radius < 0.7 * b.radius and distance < 0.4 * b.radius
        case "overlapping":
            return 0.4 * max(a.radius, b.radius) <= distance < 0.75 * (a.radius + b.radius)
    raise ValueError(f"got relation {relation!r}, expected one of {RELATIONS}")


def placed(thing: Thing, place: str) -> bool:
    """Whether a thing is in the named place of the picture."""
    dx, dy = thing.x - 0.5, thing.y - 0.5
    match place:
        case "left":
            return dx < -0.15 and -dx > 1.3 * abs(dy)
        case "right":
            return dx > 0.15 and dx > 1.3 * abs(dy)
        case "top":
            return dy < -0.15 and -dy > 1.3 * abs(dx)
        case "bottom":
            return dy > 0.15 and dy > 1.3 * abs(dx)
        case "centre":
            return math.hypot(dx, dy) < 0.09
    raise ValueError(f"got place {place!r}, expected one of {PLACES}")


# Sampling


@dataclass(frozen=True)
class Vocabulary:
    """What may be drawn: pretraining sees all of it, tasks on known words leave the novel fill and relation out."""

    fills: tuple[str, ...] = KNOWN_FILLS
    relations: tuple[str, ...] = KNOWN_RELATIONS


KNOWN = Vocabulary()
ALL = Vocabulary(FILLS, RELATIONS)


def sample_thing(rng: random.Random, vocabulary: Vocabulary, like: Thing | None = None) -> Thing:
    """A thing at the centre; one ``like`` another shares its colour or its shape, never both."""
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    if like is not None:
        if rng.random() < 0.5:
            colour = like.colour
            shape = rng.choice([s for s in SHAPES if s != like.shape])
        else:
            shape = like.shape
            colour = rng.choice([c for c in COLOURS if c != like.colour])
    # the novel fill is rarer than the others, as unnamed things are in the wild
    fill = rng.choice([f for f in vocabulary.fills for _ in range(1 if f == NOVEL_FILL else 2)])
    size = rng.choice(SIZES)
    return Thing(shape, colour, size, fill, 0.5, 0.5, rng.uniform(*_RADIUS[size]))


def resize(thing: Thing, size: str, rng: random.Random) -> Thing:
    return replace(thing, size=size, radius=rng.uniform(*_RADIUS[size]))


def sample_pair(rng: random.Random, vocabulary: Vocabulary, relation: str) -> tuple[Thing, Thing]:
    """Two things of different kinds, the first standing in ``relation`` to the second."""
    a = sample_thing(rng, vocabulary)
    b = sample_thing(rng, vocabulary)
    while b.kind == a.kind or (relation in ("inside", "overlapping") and a.colour == b.colour):
        b = sample_thing(rng, vocabulary)
    return place_pair(rng, a, b, relation)


def place_pair(rng: random.Random, a: Thing, b: Thing, relation: str) -> tuple[Thing, Thing]:
    """Moves (and for ``inside`` resizes) two things until the first stands in ``relation`` to the second."""
    if relation == "inside":
        a, b = resize(a, "small", rng), resize(b, "large", rng)
        # the thing around is enlarged so that it shows, whatever its shape
        b = replace(b, radius=1.25 * b.radius)
    for _ in range(1000):
        x, y = rng.uniform(b.radius, 1 - b.radius), rng.uniform(b.radius, 1 - b.radius)
        if relation in ("inside", "overlapping"):
            far = 0.1 * b.radius if relation == "inside" else 0.6 * (a.radius + b.radius)
            angle = rng.uniform(0, 2 * math.pi)
            u, v = x + far * math.cos(angle), y + far * math.sin(angle)
        else:
            u, v = rng.uniform(a.radius, 1 - a.radius), rng.uniform(a.radius, 1 - a.radius)
        first, second = replace(a, x=u, y=v), replace(b, x=x, y=y)
        apart = math.hypot(u - x, v - y) > 1.05 * (a.radius + b.radius)
        fits = a.radius <= u <= 1 - a.radius and a.radius <= v <= 1 - a.radius
        if fits and related(first, relation, second) and (apart or relation in ("inside", "overlapping")):
            return first, second
    raise AssertionError(f"no placement found for {relation!r}")  # the ranges above always leave room


def scatter(rng: random.Random, things: Iterable[Thing], fixed: tuple[Thing, ...] = ()) -> tuple[Thing, ...] | None:
    """Gives each thing a place where it covers no other by much; None if no room was found."""
    done = list(fixed)
    for thing in things:
        for _ in range(60):
            r = thing.radius
            moved = replace(thing, x=rng.uniform(r, 1 - r), y=rng.uniform(r, 1 - r))
            if all(math.hypot(moved.x - o.x, moved.y - o.y) > 0.92 * (moved.radius + o.radius) for o in done):
                done.append(moved)
                break
        else:
            return None
    return tuple(done[len(fixed) :])


def sample_scene(
    rng: random.Random, part: Part, level: Level, vocabulary: Vocabulary = KNOWN, things: int = 0
) -> Scene:
    """A scene of a part and level; ``things`` fixes how many (0: as the level has it, two or more if above easy).

    ``easy`` has one or two things, ``standard`` three to five with distractors that share a colour or a shape, or
    counted copies; ``hard`` is ``standard`` under a shift of :data:`SHIFTS`.
    """
    while True:
        found = _sample_things(rng, level, vocabulary, things)
        if found is None:
            continue
        scene = Scene(
            found,
            rng.choice(list(BACKGROUNDS)),
            rng.choice(PATTERNS),
            rng.choice(SHIFTS) if level == "hard" else "plain",
            rng.getrandbits(31),
        )
        if part_of(scene) == part:
            return scene


def _sample_things(rng: random.Random, level: Level, vocabulary: Vocabulary, count: int) -> tuple[Thing, ...] | None:
    count = count or (rng.choice((1, 2)) if level == "easy" else rng.randint(3, MAX_THINGS))
    if count == 1:
        thing = sample_thing(rng, vocabulary)
        place = rng.choice(PLACES)
        for _ in range(1000):
            r = thing.radius
            moved = replace(thing, x=rng.uniform(r, 1 - r), y=rng.uniform(r, 1 - r))
            if placed(moved, place):
                return (moved,)
        return None
    if count == 2:
        a, b = sample_pair(rng, vocabulary, rng.choice(vocabulary.relations))
        return b, a  # what is inside or overlapping lies in front
    fixed: tuple[Thing, ...] = ()
    loose: list[Thing] = []
    if rng.random() < 0.25:  # counted copies
        first = sample_thing(rng, vocabulary)
        copies = rng.randint(2, min(4, count))
        loose = [resize(first, "small", rng) if copies > 2 else first for _ in range(copies)]
    else:  # a relation that scattering would rarely make; what is inside or overlapping lies in front
        fixed = sample_pair(rng, vocabulary, rng.choice(vocabulary.relations))[::-1]
    main = (*fixed, *loose)
    while len(fixed) + len(loose) < count:
        extra = sample_thing(rng, vocabulary, like=rng.choice(main) if rng.random() < 0.7 else None)
        if all(extra.kind != t.kind for t in main):
            loose.append(resize(extra, "small", rng) if rng.random() < 0.5 else extra)
    scattered = scatter(rng, loose, fixed)
    return None if scattered is None else fixed + scattered


# Drawing


@cache
def _outline(shape: str) -> np.ndarray:
    """Corners of a shape within the unit circle, (n, 2) float."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    match shape:
        case "circle":
            points = np.stack([np.cos(turn), np.sin(turn)], 1) * 0.95
        case "square":
            points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85
        case "triangle":
            points = np.array([[0, -1.0], [1, 0.8], [-1, 0.8]])
        case "diamond":
            points = np.array([[0, -1.05], [0.7, 0], [0, 1.05], [-0.7, 0]])
        case "cross":
            a, b = 0.34, 1.0
            arm = np.array([[-a, -b], [a, -b], [a, -a]])
            quarter = np.array([[0, 1], [-1, 0]])
            points = np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])
        case "star":
            spikes = -np.pi / 2 + np.arange(10) * np.pi / 5
            points = np.stack([np.cos(spikes), np.sin(spikes)], 1) * np.where(np.arange(10) % 2, 0.45, 1.08)[:, None]
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
            points = np.stack([x, y], 1) / 16.5
        case "moon":
            outer = np.linspace(0.3 * np.pi, 1.7 * np.pi, 24)
            inner = outer[::-1]
            points = np.concatenate(
                [
                    np.stack([np.cos(outer), np.sin(outer)], 1),
                    np.stack([0.42 + 0.84 * np.cos(inner) * 0.9, 0.98 * np.sin(inner) * 0.84], 1),
                ]
            )
        case _:
            raise ValueError(f"got shape {shape!r}, expected one of {SHAPES}")
    return points


def _mask(thing: Thing, fill: str, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of a thing in a picture of ``side`` pixels: a patch of mode L, and where its corner lies."""
    radius = thing.radius * side
    corner = (round(thing.x * side - 1.2 * radius), round(thing.y * side - 1.2 * radius))
    mask = Image.new("L", (math.ceil(2.4 * radius) + 1,) * 2)
    draw = ImageDraw.Draw(mask)
    centre = np.array([thing.x * side - corner[0], thing.y * side - corner[1]])
    points = _outline(thing.shape)
    draw.polygon([tuple(p) for p in centre + radius * points], fill=255)
    if fill == "hollow":
        middle = np.array([-0.62, 0.0]) if thing.shape == "moon" else np.array([0.0, 0.0])
        draw.polygon([tuple(p) for p in centre + radius * (middle + 0.55 * (points - middle))], fill=0)
        return mask, corner
    # stripes and dots let the shape shine through
    gaps = Image.new("L", mask.size, 255)
    draw = ImageDraw.Draw(gaps)
    if fill == "striped":
        step = max(radius / 1.8, side / 15)
        for i in range(-5, 5):
            y = centre[1] + (i + 0.25) * step
            draw.rectangle([0, y, mask.width, y + step / 2], fill=70)
    elif fill == "dotted":
        step, r = max(radius / 1.4, side / 13), max(radius / 4.5, side / 36)
        for i in range(-3, 4):
            for j in range(-3, 4):
                x, y = centre[0] + (i + 0.5 * (j % 2)) * step, centre[1] + j * step
                draw.ellipse([x - r, y - r, x + r, y + r], fill=0)
    return ImageChops.multiply(mask, gaps), corner


def regions(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """Where each thing is, what is in front of it taken away: (n_things, size, size) bool."""
    masks = np.zeros((len(scene.things), size, size), bool)
    for mask, thing in zip(masks, scene.things, strict=True):
        canvas = Image.new("L", (size, size))
        canvas.paste(*_mask(thing, "solid", size))
        mask[:] = np.asarray(canvas) > 127
    for i in range(len(masks) - 1):
        masks[i] &= ~masks[i + 1 :].any(0)
    return masks


def _ground(scene: Scene, size: int) -> np.ndarray:
    """The background, (size, size, 3) float in 0..255."""
    base = np.broadcast_to(np.array(BACKGROUNDS[scene.background], float), (size, size, 3)).copy()
    ramp = np.linspace(-1, 1, size)
    if scene.pattern == "gradient":
        base += 22 * (ramp[:, None, None] if scene.seed % 2 else ramp[None, :, None])
    elif scene.pattern == "grid":
        lines = np.arange(size) % (size // 8) == 0
        base[lines] += 12
        base[:, lines] += 12
    return base


def render(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """Draws a scene: an RGB image of ``size`` pixels a side."""
    side = size * _SUPERSAMPLING
    rng = np.random.default_rng(scene.seed)
    sketch = scene.style == "sketch"
    ground = np.full((size, size, 3), 232.0) if sketch else _ground(scene, size)
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    for thing in scene.things:
        if scene.style == "small":
            thing = replace(thing, radius=0.72 * thing.radius)
        colour = COLOURS[thing.colour]
        if sketch:
            pen = tuple(int(0.75 * c) for c in colour)
            points = [tuple(p) for p in side * (np.array([thing.x, thing.y]) + thing.radius * _outline(thing.shape))]
            ImageDraw.Draw(picture).line([*points, points[0]], fill=pen, width=side // 45)
            if thing.fill != "hollow":
                _paste(picture, replace(thing, radius=0.8 * thing.radius), tuple(int(0.5 * c + 116) for c in colour))
        else:
            _paste(picture, thing, colour)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BOX), float)
    shift: Callable[[np.ndarray], np.ndarray] = {
        "texture": lambda p: p * (0.72 + 0.56 * _blotches(rng, size)),
        "low light": lambda p: 0.38 * p + 4,
        "noise": lambda p: p + rng.normal(0, 26, p.shape),
    }.get(scene.style, lambda p: p)
    return Image.fromarray(shift(pixels).clip(0, 255).astype(np.uint8))


def _paste(picture: Image.Image, thing: Thing, colour: tuple[int, ...]) -> None:
    mask, (x, y) = _mask(thing, thing.fill, picture.width)
    picture.paste(colour, (x, y, x + mask.width, y + mask.height), mask)


def _blotches(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth random texture in 0..1, (size, size, 1)."""
    coarse = Image.fromarray((255 * rng.random((size // 4, size // 4))).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)[..., None] / 255
