"""Benchmarks of right and wrong images and captions, each in its owners' format: ComVG, Winoground, VL-Checklist, ARO,
SugarCrepe, COLA and the CLEVR captions of GDBench.

How each is posed, and what the formats were checked against, is in ``docs/benchmarks.md``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from dsd.contracts import OptionError
from dsd.tasks.files import Row, at, items, read_csv, read_json, read_jsonl, row, rows, text
from dsd.tasks.manifest import Where, show
from dsd.tasks.reading import Reading

COMVG_KINDS = ("subject", "object", "verb")
SUGARCREPE_KINDS = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
CLEVR_KINDS = (
    "pair_binding_size",
    "pair_binding_color",
    "binding_color_shape",
    "binding_shape_color",
    "recognition_color",
    "recognition_shape",
    "spatial",
)

_GROUP = ((0, 0), (1, 1))
_SAME_WORDS = "no other order of its words differs"
_ORDER_WORDS = 30
"""What ARO's order tasks keep of a caption."""
_LIST_IMAGES = {"vg": "vg", "vaw": "vg", "hake": "hake", "swig": "swig"}
"""Of each source that VL-Checklist names in its paths, the folder of its images."""


def comvg(reading: Reading) -> None:
    """One sentence and two Visual Genome images that differ in its subject, object or verb (Jiang et al. 2022)."""
    (path,) = reading.files
    for entry in read_csv(path, ("id", "sentence", "pos_image_id", "neg_image_id", "neg_value")):
        kind = entry.text("neg_value")
        if kind not in COMVG_KINDS:
            entry.where.fail(f"neg_value {show(kind)}", f"one of {', '.join(COMVG_KINDS)}", "download the file again")
        images = [reading.image(entry.where, f"{entry.whole(key)}.jpg") for key in ("pos_image_id", "neg_image_id")]
        reading.add(entry.where, entry.label("id"), images, [entry.text("sentence")], [(0, 0)], [kind])


def winoground(reading: Reading) -> None:
    """Two images and two captions of the same words (Thrush et al. 2022)."""
    (path,) = reading.files
    columns = ("id", "image_0", "image_1", "caption_0", "caption_1")
    for entry in read_csv(path, columns) if path.suffix == ".csv" else read_jsonl(path):
        names = [entry.text(key) for key in ("image_0", "image_1")]
        # the owners name images without their suffix
        images = [reading.image(entry.where, name if Path(name).suffix else f"{name}.png") for name in names]
        captions = [entry.text(key) for key in ("caption_0", "caption_1")]
        groups = [entry.text(key) for key in ("collapsed_tag", "tag", "secondary_tag") if key in entry.values]
        if "num_main_preds" in entry.values:
            groups.append(f"predicates: {entry.whole('num_main_preds')}")
        reading.add(entry.where, entry.label("id"), images, captions, _GROUP, groups)


def vl_checklist(reading: Reading, limit: int) -> None:
    """An image, a caption and the same with an object, attribute or relation changed (Zhao et al. 2022).

    Args:
        limit: The first so many rows of each file; 0 for all.
    """
    if limit < 0:
        raise OptionError(f"got the limit {limit}, expected 0 or more rows of each file")
    (folder,) = reading.files
    paths = sorted(path for path in folder.rglob("*.json"))
    if not paths:
        Where(str(folder)).fail("no .json file", "the annotations", "see docs/benchmarks.md")
    for path in paths:
        parts = path.relative_to(folder).with_suffix("").parts
        words = [word for part in parts for word in part.lower().split("_")]
        source = next((word for word in words if word in _LIST_IMAGES), None)
        if source is None or len(parts) < 2:
            Where(str(path)).fail(
                "a path without its source", f"one of {', '.join(_LIST_IMAGES)} in it", "keep the owners' folders"
            )
        # Attribute/vg/color, Object/Location/vg_location/vg_subj_center, Relation/swig_action
        aspect = [parts[0].lower(), *([parts[1].lower()] if len(parts) > 3 else []), words[-1]]
        where = Where(str(path))
        content = items(where, read_json(path), "content")
        for i, value in enumerate(content[: limit or None]):
            place = at(where, i)
            name, captions = items(place, value, "entry", 2)
            entry = row(at(place, 1), captions)
            right, wrong = entry.texts("POS"), entry.texts("NEG")
            if not right or not wrong:
                entry.where.fail("no caption", "at least one of POS and of NEG", "download the file again")
            image = reading.image(place, text(place, name, "image"), (_LIST_IMAGES[source],))
            reading.add(
                place,
                f"{'/'.join(parts)}/{i}",
                [image],
                right + wrong,
                [(0, t) for t in range(len(right))],
                [aspect[0], "/".join(aspect), source],
            )


def aro_pairs(reading: Reading, tag: Callable[[Row], str]) -> None:
    """A part of a Visual Genome image, its caption, and the caption with two things swapped (Yuksekgonul et al. 2023).

    Args:
        tag: The group of an entry.
    """
    (path,) = reading.files
    for i, entry in enumerate(rows(Where(str(path)), read_json(path))):
        left, top, width, height = (entry.whole(f"bbox_{key}") for key in "xywh")
        if width < 1 or height < 1:
            entry.where.fail(f"a box of {width} x {height}", "at least 1 x 1 pixels", "download the file again")
        image = reading.image(entry.where, entry.text("image_path"))
        part = reading.crop(image, (left, top, left + width, top + height))
        captions = [entry.text("true_caption"), entry.text("false_caption")]
        reading.add(entry.where, str(i), [part], captions, [(0, 0)], [tag(entry)])


def relation(entry: Row) -> str:
    """The group of an entry of Visual Genome Relation."""
    return entry.text("relation_name")


def attributes(entry: Row) -> str:
    """The group of an entry of Visual Genome Attribution."""
    return "_".join(text(entry.where, value, "attribute") for value in entry.items("attributes", 2))


def aro_order(reading: Reading, seed: int) -> None:
    """An image, its caption, and the caption with its words in another order (Yuksekgonul et al. 2023).

    Two of the owners' four orders need a parser (spaCy) to find nouns and adjectives; they are used where the file
    brings them, as ``caption_options`` with the right one first. Else the two that need none are drawn: words shuffled
    within each three in a row, and the threes shuffled.
    """
    (path,) = reading.files
    for i, entry in enumerate(rows(Where(str(path)), read_json(path))):
        image = reading.image(entry.where, entry.text("image"))
        if "caption_options" in entry.values:
            options = entry.texts("caption_options")
            if len(options) < 2:
                entry.where.fail("one caption", "the right one and others", "add the others")
            reading.add(entry.where, str(i), [image], options, [(0, 0)], ["given"])
            continue
        for k, caption in enumerate(entry.texts("caption")):
            place = at(Where(f"{entry.where.file}.caption"), k)
            words = _order_words(caption)
            wrong = _disordered(words, random.Random(f"{reading.name} {reading.split} {seed} {i} {k}"))
            if words and not wrong:
                reading.leave_out(place, _SAME_WORDS, caption)
            else:
                reading.add(place, f"{i}-{k}", [image], [" ".join(words), *wrong], [(0, 0)])


def sugarcrepe(reading: Reading) -> None:
    """A COCO image, its caption, and a fluent wrong one, of seven kinds (Hsieh et al. 2023)."""
    for path, kind in zip(reading.files, SUGARCREPE_KINDS, strict=True):
        where = Where(str(path))
        for key, value in row(where, read_json(path)).values.items():
            entry = row(at(where, key), value)
            image = reading.image(entry.where, entry.text("filename"))
            captions = [entry.text("caption"), entry.text("negative_caption")]
            reading.add(entry.where, f"{kind}/{key}", [image], captions, [(0, 0)], [kind, kind.partition("_")[0]])


def cola_pairs(reading: Reading) -> None:
    """Two images and two captions whose attributes are swapped (Ray et al. 2023)."""
    (path,) = reading.files
    where = Where(str(path))
    for i, value in enumerate(items(where, read_json(path), "content")):
        place = at(where, i)
        first, caption, second, other = (text(place, part, "entry") for part in items(place, value, "entry", 4))
        # what is given is an address, of which the file's name counts
        images = [reading.image(place, PurePosixPath(name).name) for name in (first, second)]
        reading.add(place, str(i), images, [caption, other], _GROUP)


def cola_labels(reading: Reading) -> None:
    """An object with several attributes, and images that have it or share a word of it (Ray et al. 2023).

    Each label is an image choice among the images that the owners count as hard for it.
    """
    (path,) = reading.files
    where = Where(str(path))
    content = read_json(path)
    # the owners' description has an object of two keys, their code a list of two
    if isinstance(content, dict):
        content = [row(where, content).get(key) for key in ("labels", "data")]
    names, data = items(where, content, "content", 2)
    labels = [text(at(where, 0), name, "label") for name in items(at(where, 0), names, "labels")]
    hard: list[list[tuple[str | None, bool]]] = [[] for _ in labels]
    for i, value in enumerate(items(at(where, 1), data, "data")):
        place = at(at(where, 1), i)
        parts = items(place, value, "entry")
        if len(parts) not in (3, 4):
            place.fail(f"{len(parts)} values", "an image, annotations (or none), labels and hard ones", "check it")
        image = reading.image(place, PurePosixPath(text(place, parts[0], "image")).name)
        true, counted = (items(place, part, "list of labels", len(labels)) for part in parts[-2:])
        for k, (is_true, is_hard) in enumerate(zip(true, counted, strict=True)):
            if is_true not in (0, 1) or is_hard not in (0, 1):
                place.fail(f"the label {show((is_true, is_hard))}", "0 or 1", "download the file again")
            if is_hard:
                hard[k].append((image, bool(is_true)))
    for k, (label, found) in enumerate(zip(labels, hard, strict=True)):
        # the owners skip a label with no image of its own too
        right = [(i, 0) for i, (_, is_true) in enumerate(found) if is_true]
        if not right or len(right) == len(found):
            reading.leave_out(at(at(where, 0), k), "its images all show it, or none does", label)
        else:
            reading.add(at(at(where, 0), k), str(k), [image for image, _ in found], [label], right)


def clevr(reading: Reading) -> None:
    """A CLEVR image and two captions that differ in one word or in what goes with what (Krojer et al. 2023)."""
    for path, kind in zip(reading.files, CLEVR_KINDS, strict=True):
        where = Where(str(path))
        for name, value in row(where, read_json(path)).values.items():
            image = reading.image(at(where, name), name)
            for k, pair in enumerate(items(at(where, name), value, "entry")):
                place = at(at(where, name), k)
                captions = [text(place, caption, "caption") for caption in items(place, pair, "pair", 2)]
                reading.add(place, f"{kind}/{name}/{k}", [image], captions, [(0, 0)], [kind])


def _order_words(caption: str) -> list[str]:
    """A caption's words in small letters, at most 30 of them, as ARO's order tasks have it.

    All punctuation goes. The owners keep commas, which stand apart from the words in what they shuffle and next to them
    in what they do not, and so give the right caption away.
    """
    return re.findall(r"\w+(?:['’-]\w+)*", caption.lower())[:_ORDER_WORDS]


def _disordered(words: Sequence[str], rng: random.Random) -> list[str]:
    """Up to two other orders of words: shuffled within each three in a row, and the threes shuffled."""
    threes = [words[k : k + 3] for k in range(0, len(words), 3)]

    def within() -> list[Sequence[str]]:
        return [rng.sample(three, len(three)) for three in threes]

    def across() -> list[Sequence[str]]:
        return rng.sample(threes, len(threes))

    found = [" ".join(words)]
    for make in (within, across):
        # a shuffle of few words often changes nothing
        for _ in range(20):
            made = " ".join(word for three in make() for word in three)
            if made not in found:
                found.append(made)
                break
    return found[1:]
