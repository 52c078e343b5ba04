"""Few-shot splits that share no picture, and what spoils a comparison: leakage, and negatives that are right."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from dsd.contracts import Example, ImageInput, ManifestError, OptionError, image_name
from dsd.images import content_hash, load_image
from dsd.tasks.reading import Crop, clashes, plain

_SHOWN = 5
"""How many shared pictures an error names."""


@dataclass(frozen=True)
class FewShot:
    """Examples to learn from and examples to measure on, without a picture in common.

    Attributes:
        shots: To learn from.
        held_out: All others that share no picture with them.
        left_out: All others that do.
    """

    shots: list[Example]
    held_out: list[Example]
    left_out: list[Example]


@dataclass(frozen=True)
class FalseNegative:
    """A pair that counts as wrong and is right.

    Attributes:
        id: Of the example.
        pair: (image, text), as indices.
        why: In the same example, or in another, which is named.
    """

    id: str
    pair: tuple[int, int]
    why: str


def few_shot_split(examples: Sequence[Example], shots: int, seed: int, per_tag: bool = False) -> FewShot:
    """Draws examples to learn from; each side can be frozen by :func:`~dsd.tasks.write_manifest`.

    The draw depends on ids, the seed and ``shots`` alone, and fewer shots are among more of the same seed. Every image
    is opened, for pictures are the same whatever file they are in.

    Args:
        examples: At least one more than are drawn.
        shots: How many.
        seed: Any integer.
        per_tag: Draw so many of each first tag, as of each class of a classification.

    Raises:
        OptionError: ``shots`` is less than 1, or more than there are.
        ManifestError: No example is free of the pictures of those drawn.
    """
    if shots < 1:
        raise OptionError(f"got {shots} shots, expected at least 1")
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: random.Random(f"{seed} {e.id}").random()):
        groups.setdefault(example.tags[0] if per_tag and example.tags else "", []).append(example)
    for tag, members in groups.items():
        if len(members) < shots:
            of = f" of {tag!r}" if tag else ""
            raise OptionError(f"got {shots} shots, expected at most the {len(members)} examples{of} there are")
    drawn = {id(e) for members in groups.values() for e in members[:shots]}
    pixels = _Pictures()
    taken = {picture for e in examples if id(e) in drawn for picture in pixels.of(e)}
    split = FewShot([e for e in examples if id(e) in drawn], [], [])
    for e in examples:
        if id(e) not in drawn:
            (split.left_out if pixels.of(e) & taken else split.held_out).append(e)
    if not split.held_out:
        raise ManifestError(
            f"got {len(split.left_out)} other examples, all with pictures of the {len(split.shots)} drawn, expected "
            "one free of them; draw fewer"
        )
    return split


def check_leakage(a: Sequence[Example], b: Sequence[Example]) -> None:
    """Makes sure that no picture is on both sides, by its pixels; a part of a picture counts as the picture.

    Raises:
        ManifestError: One is; the message counts and names them.
        ImageError: An image cannot be read.
    """
    pixels = _Pictures()
    seen: dict[str, str] = {}
    for example in a:
        for picture in pixels.of(example):
            seen.setdefault(picture, example.id)
    shared: dict[str, str] = {}
    for example in b:
        for picture in sorted(pixels.of(example) & seen.keys()):
            shared.setdefault(picture, f"{pixels.names[picture]} in {seen[picture]!r} and {example.id!r}")
    if shared:
        shown = "; ".join(list(shared.values())[:_SHOWN]) + ("; ..." if len(shared) > _SHOWN else "")
        raise ManifestError(
            f"got {len(shared)} pictures on both sides ({shown}), expected none; draw the sides by few_shot_split, or "
            "leave these examples out of one"
        )


def find_false_negatives(examples: Sequence[Example]) -> list[FalseNegative]:
    """Pairs that count as wrong although the same image and text are right, in the same example or in another.

    That is all that files can tell: of RefCOCOg another expression for the same thing, of retrieval a caption that two
    images share, of ComVG a negative image that is the positive one of the same sentence elsewhere. Texts are the same
    whatever their capitals, spaces and final full stop; images by their path, or by their pixels if they have none.
    """
    pixels = _Pictures()
    shown = [[pixels.path_or_pixels(image) for image in example.images] for example in examples]
    right: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for example, keys in zip(examples, shown, strict=True):
        for i, t in example.positives:
            right[keys[i]].setdefault(plain(example.texts[t]), example.id)
    found: list[FalseNegative] = []
    for example, keys in zip(examples, shown, strict=True):
        true, here = set(example.positives), set(clashes(keys, example.texts, example.positives))
        said = defaultdict[str, list[int]](list)
        for t, text in enumerate(example.texts):
            said[plain(text)].append(t)
        for i, key in enumerate(keys):
            for text in right[key].keys() & said.keys():
                for t in said[text]:
                    if (i, t) in here:
                        found.append(FalseNegative(example.id, (i, t), "the same as a right pair of the example"))
                    elif (i, t) not in true:
                        found.append(FalseNegative(example.id, (i, t), f"right in {right[key][text]!r}"))
    return found


class _Pictures:
    """Hashes of pictures, each file read once."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self._known: dict[str, str] = {}

    def of(self, example: Example) -> set[str]:
        """The pictures of an example."""
        found = set()
        for i, image in enumerate(example.images):
            whole = image.source if isinstance(image, Crop) else image
            found.add(self._hash(whole, image_name(whole, i)))
        return found

    def path_or_pixels(self, image: ImageInput) -> str:
        """What images have in common that are the same, without opening files."""
        return str(image) if isinstance(image, str | PathLike) else self._hash(image, "")

    def _hash(self, image: ImageInput, name: str) -> str:
        key = str(image) if isinstance(image, str | PathLike) else ""
        if key and key in self._known:
            return self._known[key]
        digest = content_hash(load_image(image))
        self.names.setdefault(digest, name)
        if key:
            self._known[key] = digest
        return digest
