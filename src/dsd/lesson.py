"""What is learned from: the choices that examples hold, further negatives, and parts that are held out."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

from dsd.contracts import Example, OptionError
from dsd.images import content_hash, load_image
from dsd.negatives import HardNegatives
from dsd.weights import Choice

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def choices_of(
    example: Example, images: Sequence[int] | None = None, texts: Sequence[int] | None = None
) -> list[Choice]:
    """Every image's choice among texts and every text's among images that has right and wrong candidates.

    Args:
        images, texts: Those that take part; by default all. Rows are counted through the table of these.
    """
    images = range(len(example.images)) if images is None else images
    texts = range(len(example.texts)) if texts is None else texts
    columns = len(texts)
    table = [[i * columns + j for j in range(columns)] for i in range(len(images))]
    lines = table + [list(column) for column in zip(*table, strict=True)]
    right = set(example.positives)
    positives = {k * columns + m for k, i in enumerate(images) for m, j in enumerate(texts) if (i, j) in right}
    made = [Choice(tuple(line), tuple(r in positives for r in line)) for line in lines]
    return [c for c in made if any(c.right) and not all(c.right)]


def check_choices(examples: Sequence[Example]) -> None:
    """Refuses examples that nothing can be learned from.

    Raises:
        OptionError: If nothing competes in some.
    """
    idle = [e.id for e in examples if not choices_of(e)]
    if idle:
        raise OptionError(
            f"got {len(idle)} examples in which nothing competes ({', '.join(idle)[:200]}), "
            "expected right and wrong candidates in each; add wrong ones, or let dsd negatives make them"
        )


@dataclass(frozen=True)
class Drawn:
    """The pairs of one example and of wrong ones that joined it, a row each.

    Attributes:
        images: Of each row the example (its place in the pool) and the image's place in it.
        texts: Captions.
        choices: Among the rows.
    """

    images: tuple[tuple[int, int], ...]
    texts: tuple[str, ...]
    choices: tuple[Choice, ...]


class Negatives:
    """Draws wrong captions and pictures for the right pairs of examples, from the examples themselves.

    Not from those that share a picture with it, whose captions may be right of that.

    Args:
        examples: The pool.
        texts: Captions of other examples for each right pair; None: one, but none for an example that has both wrong
            captions for a right picture and wrong pictures for a right caption.
        images: Pictures of other examples for each right pair; None: as for ``texts``.
        swaps: Captions made of its own by exchanging words, for each right pair (:class:`dsd.negatives.HardNegatives`).
        candidates: Images, and texts, of an example that take part at most: the right ones, and others drawn anew each
            time; None takes all.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        texts: int | None,
        images: int | None,
        swaps: int,
        candidates: int | None = None,
    ) -> None:
        self._examples = list(examples)
        self._most = candidates
        self._texts, self._images, self._swapped = texts, images, swaps
        self._captions = sorted({text for e in self._examples for text in e.texts})
        self._pictures = [(i, k) for i, e in enumerate(self._examples) for k in range(len(e.images))]
        self._with = _places(
            (text, i) for i, e in enumerate(self._examples) for text in e.texts
        )  # examples, by caption
        self._of = _places((i, place) for place, (i, _) in enumerate(self._pictures))  # places, by example
        self._akin = _akin(self._examples)
        self._swaps = HardNegatives(self._captions) if swaps else None

    def join(self, i: int, rng: random.Random) -> Drawn:
        """Example ``i``'s own pairs first, then each right one's wrong candidates, drawn anew each time."""
        example = self._examples[i]
        shown = self._some(len(example.images), {image for image, _ in example.positives}, rng)
        said = self._some(len(example.texts), {text for _, text in example.positives}, rng)
        images = [(i, k) for k in shown for _ in said]
        texts = [example.texts[j] for _ in shown for j in said]
        made = choices_of(example, shown, said)
        for image, text in example.positives:
            caption = example.texts[text]
            wrong = self._captions_for(i, rng)
            if self._swaps is not None:
                wrong += self._swaps.swapped(caption, self._swapped, rng, {*self._own_captions(i), *wrong})
            places = self._pictures_for(i, text, rng)
            for captions, pictures in ((wrong, [(i, image)] * len(wrong)), ([caption] * len(places), places)):
                own, first = shown.index(image) * len(said) + said.index(text), len(texts)
                images += pictures
                texts += captions
                rows = (own, *range(first, len(texts)))
                if len(rows) > 1:
                    made.append(Choice(rows, tuple(row == own for row in rows)))
        return Drawn(tuple(images), tuple(texts), tuple(made))

    def _own_captions(self, i: int) -> set[str]:
        """Those of the ``i``-th example, and of others that show a picture of it, of which they may be right."""
        return {text for k in self._akin[i] for text in self._examples[k].texts}

    def _captions_for(self, i: int, rng: random.Random) -> list[str]:
        """Of other examples than the ``i``-th, for a picture of it."""
        count = self._count(i, self._texts)
        if not count:
            return []
        others = _Without(self._captions, (bisect_left(self._captions, text) for text in self._own_captions(i)))
        return rng.sample(others, min(count, len(others)))

    def _pictures_for(self, i: int, text: int, rng: random.Random) -> list[tuple[int, int]]:
        """Of other examples than the ``i``-th, for a caption of it."""
        count = self._count(i, self._images)
        if not count:
            return []
        # not of examples that have this caption, in which it may be right
        near = {*self._akin[i], *self._with[self._examples[i].texts[text]]}
        apart = _Without(self._pictures, (place for k in near for place in self._of[k]))
        return rng.sample(apart, min(count, len(apart)))

    def _count(self, i: int, asked: int | None) -> int:
        """How many of a kind join each right pair of the ``i``-th example."""
        if asked is not None:
            return asked
        example = self._examples[i]
        images, texts = ({pair[side] for pair in example.positives} for side in (0, 1))
        wrong_text = any((k, j) not in example.positives for k in images for j in range(len(example.texts)))
        wrong_image = any((k, j) not in example.positives for j in texts for k in range(len(example.images)))
        return int(not (wrong_text and wrong_image))

    def _some(self, count: int, right: set[int], rng: random.Random) -> list[int]:
        """Which of ``count`` images or texts take part."""
        if self._most is None or count <= self._most:
            return list(range(count))
        wrong = [k for k in range(count) if k not in right]
        return sorted([*right, *rng.sample(wrong, min(len(wrong), max(1, self._most - len(right))))])


class _Without(Sequence[T]):
    """All but some places of a sequence, without a copy: pools are large, and drawn from for every pair."""

    def __init__(self, whole: Sequence[T], places: Iterable[int]) -> None:
        self._whole = whole
        self._places = sorted(set(places))

    def __len__(self) -> int:
        return len(self._whole) - len(self._places)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        for gone in self._places:
            if gone > place:
                break
            place += 1
        return self._whole[place]


def _places(pairs: Iterable[tuple[K, int]]) -> dict[K, list[int]]:
    found: dict[K, list[int]] = {}
    for key, place in pairs:
        found.setdefault(key, []).append(place)
    return found


def check_validation(examples: Sequence[Example], validation: Sequence[Example]) -> None:
    """Refuses validation examples that say nothing about others.

    Raises:
        OptionError: If they show pictures of the examples to learn from.
    """
    seen, shown = ([pictures_of(e) for e in part] for part in (examples, validation))
    known = frozenset[str]().union(*seen)
    leaked = [e.id for e, own in zip(validation, shown, strict=True) if not known.isdisjoint(own)]
    if leaked:
        raise OptionError(
            f"got {len(leaked)} validation examples with pictures that are learned from ({', '.join(leaked)[:200]}), "
            "expected pictures of their own; take them out of either"
        )


def pictures_of(example: Example) -> frozenset[str]:
    """Hashes of its pictures."""
    return frozenset(content_hash(load_image(image)) for image in example.images)


def _akin(examples: Sequence[Example]) -> list[frozenset[int]]:
    """Of each example the places of those that share a picture with it, itself among them."""
    pictures = [pictures_of(e) for e in examples]
    shown: dict[str, set[int]] = {}
    for i, own in enumerate(pictures):
        for picture in own:
            shown.setdefault(picture, set()).add(i)
    return [frozenset({i}.union(*(shown[picture] for picture in own))) for i, own in enumerate(pictures)]


def _apart(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """Groups of examples that share pictures, none with another group, in random order."""
    root = list(range(len(examples)))  # of each example, one that shares pictures with it, no later in the list

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i, akin in enumerate(_akin(examples)):
        for k in akin:
            a, b = find(i), find(k)
            root[max(a, b)] = min(a, b)
    groups: dict[str, list[Example]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(examples[find(i)].id, []).append(example)
    order = sorted(groups, key=str)
    random.Random(seed).shuffle(order)
    return [groups[name] for name in order]


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and to validate on; examples that share a picture stay on one side."""
    groups = _apart(examples, seed)
    held: list[Example] = []
    while groups and len(held) < round(share * len(examples)):
        held += groups.pop()
    kept = {id(e) for e in held}
    return [e for e in examples if id(e) not in kept], held


def folds(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """Of each example, which of at most ``count`` folds of like size it is in; those that share a picture in one.

    Raises:
        OptionError: If all examples share pictures.
    """
    groups = _apart(examples, seed)
    if len(groups) < 2:
        raise OptionError(
            f"got {len(examples)} examples of which none is free of the others' pictures, expected two or more that "
            "share none, to hold out by turns"
        )
    sizes = [0] * min(count, len(groups))
    fold: dict[int, int] = {}
    for group in groups:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(group)
        fold |= {id(e): smallest for e in group}
    return [fold[id(e)] for e in examples]


@dataclass(frozen=True)
class Turn:
    """Examples to learn from and others to look at."""

    examples: list[Example]
    held_out: list[Example]


def turns_of(
    examples: Sequence[Example], validation: Sequence[Example] | None, *, count: int, share: float | None, seed: int
) -> list[Turn]:
    """What is held out when: the examples given for it, a share of all, or all by turns.

    Args:
        count: Folds, at most, that are held out by turns.
        share: Of the examples, to hold out once instead.

    Raises:
        OptionError: If nothing is left to learn from or to look at.
    """
    if validation is None and share is None and len(examples) > 1:
        fold = folds(examples, count, seed)
        return [
            Turn(
                [e for e, f in zip(examples, fold, strict=True) if f != turn],
                [e for e, f in zip(examples, fold, strict=True) if f == turn],
            )
            for turn in range(max(fold) + 1)
        ]
    turn = Turn(*split(examples, share or 0.5, seed)) if validation is None else Turn(list(examples), list(validation))
    if not turn.examples or not turn.held_out:
        raise OptionError(
            f"got {len(turn.examples)} examples to learn from and {len(turn.held_out)} to validate, expected at least "
            "one of each"
        )
    return [turn]
