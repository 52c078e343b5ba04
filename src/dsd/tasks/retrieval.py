"""Benchmarks whose wrong candidates are drawn: RefCOCOg, retrieval on Flickr30k and COCO, and folders of classes.

Example ``i`` depends on the files, the seed and its own id alone. Candidates come from the same split and from other
images, and none of them says, or shows, what is known to be right. Candidates are drawn before it is known which images
are there, so that every machine poses the same questions.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from dsd.contracts import OptionError
from dsd.tasks.files import Row, read_json, read_plain_pickle, row, rows
from dsd.tasks.manifest import Where, show
from dsd.tasks.reading import BLANK, MISSING, Reading, draw, plain

By = Literal["image", "text"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Caption:
    """A caption of an image, and where it stands; ``image`` names the image within the benchmark."""

    where: Where
    name: str
    image: str
    text: str
    tags: tuple[str, ...] = ()


def choose(
    reading: Reading, captions: Sequence[Caption], by: By, seed: int, candidates: int, once: bool = False
) -> None:
    """Adds an example for each caption: which of several images it belongs to, or which caption its image.

    Args:
        captions: Of the split.
        by: ``image`` asks for the image, ``text`` for the caption.
        seed: Of the wrong candidates.
        candidates: How many there are with the right one; 0 for a single example of all images and all captions.
        once: With ``text``, ask for the first caption of each image only.

    Raises:
        OptionError: A number of candidates below 2 that is not 0.
        ManifestError: There are no captions, or not enough for so many candidates.
    """
    if candidates < 0 or candidates == 1:
        raise OptionError(f"got {candidates} candidates, expected at least 2, or 0 for all of the split")
    if not captions:
        Where(str(reading.files[0])).fail(f"nothing of the split {reading.split!r}", "some", "check the file")
    whole: list[Caption] = []
    said, shows = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for caption in captions:
        if not caption.text.strip():
            reading.leave_out(caption.where, BLANK, caption.name)
            continue
        whole.append(caption)
        said[caption.image].add(plain(caption.text))
        shows[plain(caption.text)].add(caption.image)
    images = list(said)
    if not candidates:
        _all(reading, whole, images, shows)
        return
    once = by == "text" and once
    first: dict[str, Caption] = {}
    for caption in whole:
        first.setdefault(caption.image, caption)
    for caption in first.values() if once else whole:
        rng = random.Random(f"{reading.name} {reading.split} {seed} {caption.name}")
        asked, texts = [caption.image], [caption.text]
        if by == "image":
            asked += draw(rng, images, candidates - 1, str, shows[plain(caption.text)])
        else:
            wrong = draw(rng, whole, candidates - 1, lambda other: plain(other.text), said[caption.image])
            texts += [other.text for other in wrong]
        got = len(asked) * len(texts)
        if got < candidates:
            caption.where.fail(f"{got} candidates in the split", f"{candidates}", "ask for fewer candidates")
        pictures = [reading.image(caption.where, image) for image in asked]
        reading.add(caption.where, caption.image if once else caption.name, pictures, texts, [(0, 0)], caption.tags)


def _all(
    reading: Reading, captions: Sequence[Caption], images: Sequence[str], shows: Mapping[str, Collection[str]]
) -> None:
    """Adds one example of all images that are there and all their captions."""
    where = Where(str(reading.files[0]))
    paths = {image: reading.image(where, image) for image in images}
    there = [image for image in images if paths[image] is not None]
    for image in images:
        if paths[image] is None:
            reading.leave_out(where, MISSING, image)
    row_of = {image: i for i, image in enumerate(there)}
    texts = {plain(caption.text): caption.text for caption in captions if caption.image in row_of}
    right = [(row_of[image], t) for t, said in enumerate(texts) for image in shows[said] if image in row_of]
    if there:
        reading.add(where, reading.split, [paths[image] for image in there], list(texts.values()), sorted(right))


def refcocog(reading: Reading, by: By, seed: int, candidates: int) -> None:
    """A COCO image and expressions that refer to a thing in it, one of them right (Mao et al. 2016)."""
    refs, instances = reading.files
    content = row(Where(str(instances)), read_json(instances))
    files = {entry.whole("id"): entry.text("file_name") for entry in content.rows("images")}
    kinds = {entry.whole("id"): entry.text("name") for entry in content.rows("categories")}
    found: list[Caption] = []
    for ref in rows(Where(str(refs)), read_plain_pickle(refs) if refs.suffix == ".p" else read_json(refs)):
        if ref.text("split") != reading.split:
            continue
        image, kind = (_known(ref, key, names) for key, names in (("image_id", files), ("category_id", kinds)))
        for sentence in ref.rows("sentences"):
            found.append(Caption(sentence.where, sentence.label("sent_id"), image, sentence.text("raw"), (kind,)))
    choose(reading, found, by, seed, candidates)


def karpathy(reading: Reading, by: By, seed: int, candidates: int) -> None:
    """Images with five captions each, in the splits of Karpathy and Fei-Fei 2015."""
    (path,) = reading.files
    found: list[Caption] = []
    for entry in row(Where(str(path)), read_json(path)).rows("images"):
        if entry.text("split") != reading.split:
            continue
        # COCO's images stand in folders
        folder = entry.text("filepath") if "filepath" in entry.values else ""
        image = str(PurePosixPath(folder) / entry.text("filename"))
        for sentence in entry.rows("sentences"):
            found.append(Caption(sentence.where, sentence.label("sentid"), image, sentence.text("raw")))
    choose(reading, found, by, seed, candidates, once=True)


def image_folder(reading: Reading, templates: Sequence[str]) -> None:
    """Zero-shot classification of a folder of images for each class (Radford et al. 2021).

    Classes are called as their folders are, with spaces for underscores, or as ``classes.json`` calls them
    (``{"n01440764": "tench"}``).

    Args:
        templates: What is said of a class, ``{}`` for its name; several are all right, and the best of them counts.
    """
    if isinstance(templates, str) or not templates or not all("{}" in template for template in templates):
        raise OptionError(f"got templates {templates!r}, expected a list of texts with {{}} for the class")
    root = reading.root if reading.split == "all" else reading.root / reading.split
    where = Where(str(root))
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(folders) < 2:
        where.fail(f"{len(folders)} folders", "one for each of two or more classes", "see docs/benchmarks.md")
    listed = reading.root / "classes.json"
    names = row(Where(str(listed)), read_json(listed)) if listed.exists() else None
    classes = [names.text(path.name) if names else path.name.replace("_", " ") for path in folders]
    twice = next((name for i, name in enumerate(classes) if plain(name) in map(plain, classes[:i])), None)
    if twice is not None:
        where.fail(f"two classes called {show(twice)}", "a name for each", "rename one of them")
    texts = [template.replace("{}", name) for name in classes for template in templates]
    for k, (folder, name) in enumerate(zip(folders, classes, strict=True)):
        right = [(0, k * len(templates) + t) for t in range(len(templates))]
        for path in sorted(folder.iterdir()):
            place = Where(str(path))
            if path.suffix.lower() not in _SUFFIXES:
                reading.leave_out(place, "it is no image file", path.name)
                continue
            relative = path.relative_to(reading.root).as_posix()
            reading.add(place, relative, [reading.image(place, relative)], texts, right, [name])


def _known(ref: Row, key: str, names: dict[int, str]) -> str:
    number = ref.whole(key)
    if number not in names:
        ref.where.fail(f"{key} {number}", "one of instances.json", "take both files from the same download")
    return names[number]
