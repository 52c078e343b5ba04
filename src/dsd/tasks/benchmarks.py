"""The field's benchmarks by name: what each needs, how it is split and measured, and its reader.

``docs/benchmarks.md`` says what to download, how each is posed, and what its reader was checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from dsd.contracts import Example, ManifestError, OptionError
from dsd.tasks import pairs, retrieval, vqa
from dsd.tasks.files import Row, text
from dsd.tasks.manifest import Where, show
from dsd.tasks.reading import Loaded, Reading

_CANDIDATES = {"seed": 0, "candidates": 10}


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark before its files are read.

    Attributes:
        name: As :func:`read_benchmark` takes it.
        files: Needed in the data folder, ``a|b`` where either will do; ``{split}`` stands for the split.
        folders: Of the data folder, where images are looked for, in this order.
        splits: The owners'; the first is read unless another is named.
        metric: What the field reports, as results call it (``docs/benchmarks.md`` where it is no metric of theirs).
        tags: What the tags of its examples say.
        read: The reader, called with the :class:`Reading` and the options.
        options: What may be passed on to the reader, with defaults.
    """

    name: str
    files: tuple[str, ...]
    folders: tuple[str, ...]
    splits: tuple[str, ...]
    metric: str
    tags: str
    read: Callable[..., None]
    options: Mapping[str, Any] = field(default_factory=dict)


def _refcocog(partition: str, splits: tuple[str, ...], by: retrieval.By) -> Benchmark:
    return Benchmark(
        f"refcocog-{partition}" + ("-image" if by == "image" else ""),
        (f"refs({partition}).p|refs({partition}).json", "instances.json"),
        ("train2014", "images/train2014", "images"),
        splits,
        "accuracy",
        "the category of the thing",
        partial(retrieval.refcocog, by=by),
        _CANDIDATES,
    )


def _karpathy(name: str, folders: tuple[str, ...], splits: tuple[str, ...], by: retrieval.By) -> Benchmark:
    return Benchmark(
        f"{name}-{by}",
        (f"dataset_{name}.json",),
        folders,
        splits,
        "recall@1",
        "none",
        partial(retrieval.karpathy, by=by),
        _CANDIDATES,
    )


def _cola_labels(source: str) -> Benchmark:
    return Benchmark(
        f"cola-single-{source.lower()}",
        (f"COLA_singleobjects_benchmark_{source}.json",),
        ("vg_gqa_images", "VG_100K", "VG_100K_2", "images"),
        ("val",),
        "mean average precision",
        "none",
        pairs.cola_labels,
    )


_LISTED = (
    Benchmark(
        "comvg",
        ("compositional_visual_genome.csv|ComVG.csv",),
        ("vg_concept", "VG_100K", "VG_100K_2", "comvg_images", "images"),
        ("test",),
        "accuracy",
        "what the negative differs in: subject, object or verb",
        pairs.comvg,
    ),
    _refcocog("google", ("val", "train"), "text"),
    _refcocog("google", ("val", "train"), "image"),
    _refcocog("umd", ("test", "val", "train"), "text"),
    _refcocog("umd", ("test", "val", "train"), "image"),
    Benchmark(
        "vqa-other",
        ("vqa_text_{split}.csv",),
        ("val2014", "train2014", "images"),
        ("test", "val", "train"),
        "accuracy",
        "what the right answer is: yes/no, number or other",
        vqa.vqa_other,
    ),
    Benchmark(
        "vqa-binary",
        ("test.txt",),
        ("val2014", "images"),
        ("test",),
        "accuracy",
        "none",
        vqa.vqa_binary,
        _CANDIDATES,
    ),
    Benchmark(
        "vqav2",
        ("v2_OpenEnded_mscoco_{split}2014_questions.json", "v2_mscoco_{split}2014_annotations.json"),
        ("{split}2014", "images/{split}2014", "images"),
        ("val", "train"),
        "soft-accuracy",
        "answer type; how the question begins",
        vqa.vqa_v2,
        _CANDIDATES,
    ),
    Benchmark(
        "winoground",
        ("examples.jsonl|examples.csv",),
        ("images",),
        ("test",),
        "group",
        "what is swapped (collapsed tag, tag, secondary tag); number of main predicates",
        pairs.winoground,
    ),
    Benchmark(
        "vl-checklist",
        ("data",),
        (".",),
        ("test",),
        "accuracy",
        "attribute, object or relation; its kind; the source",
        pairs.vl_checklist,
        {"limit": 0},
    ),
    Benchmark(
        "aro-relation",
        ("visual_genome_relation.json",),
        ("images",),
        ("test",),
        "accuracy",
        "the relation",
        partial(pairs.aro_pairs, tag=pairs.relation),
    ),
    Benchmark(
        "aro-attribution",
        ("visual_genome_attribution.json",),
        ("images",),
        ("test",),
        "accuracy",
        "the two attributes",
        partial(pairs.aro_pairs, tag=pairs.attributes),
    ),
    *(
        Benchmark(
            f"aro-{source}-order",
            (file,),
            (".", "images"),
            ("test", "val"),
            "accuracy",
            "given, where the file brings the other orders",
            pairs.aro_order,
            {"seed": 0},
        )
        for source, file in (("coco", "coco_karpathy_{split}.json"), ("flickr30k", "flickr30k_{split}.json"))
    ),
    Benchmark(
        "sugarcrepe",
        tuple(f"{kind}.json" for kind in pairs.SUGARCREPE_KINDS),
        ("val2017", "images/val2017", "coco/images/val2017", "images"),
        ("test",),
        "accuracy",
        "one of seven kinds; add, replace or swap",
        pairs.sugarcrepe,
    ),
    Benchmark(
        "cola-multi",
        ("COLA_multiobjects_matching_benchmark.json",),
        ("vg_gqa_images", "VG_100K", "VG_100K_2", "images"),
        ("val",),
        "image",
        "none",
        pairs.cola_pairs,
    ),
    _cola_labels("GQA"),
    _cola_labels("CLEVR"),
    _cola_labels("PACO"),
    Benchmark(
        "gdbench-clevr",
        tuple(f"captions/{kind}.json" for kind in pairs.CLEVR_KINDS),
        ("images",),
        ("test",),
        "accuracy",
        "one of seven kinds",
        pairs.clevr,
    ),
    *(
        _karpathy(name, folders, splits, by)
        for name, folders, splits in (
            ("flickr30k", ("flickr30k-images", "flickr30k_images", "images"), ("test", "val", "train")),
            ("coco", (".", "images"), ("test", "val", "train", "restval")),
        )
        for by in ("image", "text")
    ),
    Benchmark(
        "image-folder",
        (),
        (".",),
        ("all", "test", "val", "train"),
        "accuracy",
        "the class",
        retrieval.image_folder,
        {"templates": ("a photo of a {}.",)},
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _LISTED}
"""All that :func:`read_benchmark` reads, by name."""


def read_benchmark(
    name: str,
    data_dir: str | PathLike[str],
    split: str | None = None,
    *,
    on_missing: str = "error",
    **options: Any,
) -> Loaded:
    """A split of a benchmark, from its owners' files.

    Args:
        name: One of :data:`BENCHMARKS`.
        data_dir: The folder with its files and its folders of images; archives must be unpacked.
        split: One of its splits; without it the first.
        on_missing: Whether missing images are an ``error``, or ``leave-out`` leaves out, and reports, their examples.
        options: Those of its reader, such as ``seed`` and ``candidates`` where wrong candidates are drawn.

    Raises:
        OptionError: There is no such benchmark, split or option.
        ManifestError: Files or images are missing, or a file breaks its format.
    """
    if name not in BENCHMARKS:
        raise OptionError(f"got benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    split = benchmark.splits[0] if split is None else split
    for what, got, known in (
        ("split", split, benchmark.splits),
        ("on_missing", on_missing, ("error", "leave-out")),
        *(("option", option, tuple(benchmark.options) or ("none",)) for option in options),
    ):
        if got not in known:
            raise OptionError(f"{name}: got {what} {got!r}, expected one of {', '.join(known)}")
    for option, value in options.items():
        if type(benchmark.options[option]) is int and type(value) is not int:
            raise OptionError(f"{name}: got {option} {value!r}, expected an integer")
    files = [file.replace("{split}", split) for file in benchmark.files]
    folders = [folder.replace("{split}", split) for folder in benchmark.folders]
    reading = Reading(name, split, Path(data_dir), files, folders)
    benchmark.read(reading, **{**benchmark.options, **options})
    return reading.done(leave_out_missing=on_missing == "leave-out")


def read_rows(
    rows: Iterable[Mapping[str, Any]],
    images: Sequence[str] = ("image",),
    texts: Sequence[str] = ("text",),
    positives: Sequence[tuple[int, int]] = ((0, 0),),
    tags: Sequence[str] = (),
    name: str = "table",
) -> list[Example]:
    """An example of each row, such as of a ``datasets`` dataset, by the names of its columns.

    ``read_rows(dataset, texts=("caption", "negative_caption"))`` makes text choices, ``read_rows(dataset, ("image_0",
    "image_1"), ("caption_0", "caption_1"), ((0, 0), (1, 1)))`` Winoground groups. For a pair of image and text a row,
    with a label, there is :func:`~dsd.tasks.read_table`.

    Args:
        rows: Images are PIL images, uint8 arrays (h, w, 3) or paths. Ids and errors number rows from 1.
        images: Columns of images.
        texts: Columns of texts; a column may hold a list of them.
        positives: The right pairs, as indices of images and texts.
        tags: Columns whose values are tags.
        name: What errors call the table.

    Raises:
        ManifestError: A column is missing or holds something else, or there are no rows.
    """
    examples: list[Example] = []
    for number, values in enumerate(rows, 1):
        entry = Row(Where(name, number), values)
        said: list[str] = []
        for column in texts:
            value = entry.get(column)
            said += [
                text(entry.where, one, f"text in {column!r}") for one in (value if isinstance(value, list) else [value])
            ]
        if not all(one.strip() for one in said):
            entry.where.fail("a blank text", "texts that are not", "remove the row")
        shown = tuple(entry.get(column) for column in images)
        for column, image in zip(images, shown, strict=True):
            # a dataset that was not told to decode has dictionaries of bytes
            if image is None or isinstance(image, bytes | Mapping | int | float | list):
                entry.where.fail(f"the image {show(image)} in {column!r}", "a picture or a path", "decode the column")
        groups = tuple(entry.label(column) for column in tags)
        examples.append(Example(str(number), shown, tuple(said), tuple(positives), groups))
    if not examples:
        raise ManifestError(f"{name}: got no rows, expected at least one; check the split or filter")
    return examples
