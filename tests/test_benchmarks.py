"""Readers of the field's benchmarks, on small copies of their owners' formats and on the owners' own files."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsd.contracts import DsdError, Example, ImageError, ManifestError, OptionError
from dsd.images import load_image
from dsd.metrics import evaluate_scores
from dsd.tasks import BENCHMARKS, Loaded, read_benchmark, read_manifest, read_rows, write_manifest
from dsd.tasks.files import read_plain_pickle
from dsd.tasks.pairs import CLEVR_KINDS, SUGARCREPE_KINDS
from dsd.tasks.reading import BLANK, CLASH, MISSING, Crop
from dsd.tasks.vqa import normalise, soft_accuracy

COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown", "orange", "purple", "yellow", "cyan")


def picture(path: Path, k: int = 0, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (k % 256, k // 256, 7)).save(path, "PNG")


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def table(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([header.split(","), *rows])
    path.write_text(stream.getvalue(), newline="")


def coco(part: str, number: int) -> str:
    return f"COCO_{part}2014_{number:012d}.jpg"


# One writer for each format: n rows of it, and their images, in a folder.


def comvg(folder: Path, n: int) -> None:
    rows = []
    for k in range(n):
        kind = ("subject", "object", "verb")[k % 3]
        rows.append((k + 1, f"a man sits at table {k}", "man,sit,table", "('dog', 'sit', 'table')", k, n + k, kind))
        picture(folder / "VG_100K" / f"{k}.jpg", k)
        picture(folder / "VG_100K_2" / f"{n + k}.jpg", n + k)
    header = "id,sentence,pos_triplet,neg_triplet,pos_image_id,neg_image_id,neg_value"
    table(folder / "compositional_visual_genome.csv", header, rows)


def refs(folder: Path, n: int, partition: str) -> None:
    splits = ("train", "val", "test")
    content = [
        {
            "ref_id": k,
            "ann_id": k,
            "image_id": k,
            "category_id": 1 + k % 2,
            "split": splits[k % 3],
            "file_name": f"{coco('train', k)[:-4]}_{k}.jpg",
            "sent_ids": [2 * k, 2 * k + 1],
            "sentences": [
                {"tokens": ["the"], "raw": f"the {side} thing {k}", "sent_id": 2 * k + s, "sent": f"the {side} thing"}
                for s, side in enumerate(("left", "other"))
            ],
        }
        for k in range(3 * n)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # protocol 0 is what the owners' files are in
    (folder / f"refs({partition}).p").write_bytes(pickle.dumps(content, protocol=0))
    images = [{"id": k, "file_name": coco("train", k), "height": 4, "width": 6} for k in range(3 * n)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    dump(folder / "instances.json", {"images": images, "annotations": [], "categories": categories})
    for k in range(3 * n):
        picture(folder / "train2014" / coco("train", k), k)


def vqa_other(folder: Path, n: int) -> None:
    rows = []
    for k in range(n):
        answers = [("yes", "3", "red car")[k % 3], *(f"{colour} {k}" for colour in COLOURS[:9])]
        said = [f"What is that?? {answer}" for answer in answers]
        rows.append((said[0], k, *said[1:]))
        picture(folder / "val2014" / coco("val", k), k)
    header = "sentence,pos_image_id," + ",".join(f"neg_sentence_{k}" for k in range(1, 10))
    table(folder / "vqa_text_test.csv", header, rows)


def vqa_binary(folder: Path, n: int) -> None:
    lines = []
    for k in range(n):
        lines.append(
            f"{coco('val', k)}*The question is asking about yes or no: is it cow {k}? it is not cow {k}\n"
            f"{coco('val', k)}*The question is asking about others: what is it? it is a cow.\n"
        )
        picture(folder / "val2014" / coco("val", k), k)
    (folder / "test.txt").write_text("".join(lines))


def vqav2(folder: Path, n: int) -> None:
    questions, annotations = [], []
    for k in range(3 * n):
        kind = ("yes/no", "number", "other")[k % 3]
        pool = {"yes/no": ("yes", "no"), "number": ("7",), "other": (COLOURS[k // 3 % 12],)}[kind]
        people = [pool[0]] * 7 + [pool[-1]] * 2 + ["some"]
        if kind == "number":
            people = [str(k)] * 7 + ["many"] * 3
        questions.append({"image_id": k, "question": f"what is it {k}?", "question_id": 100 + k})
        annotations.append(
            {
                "question_type": "what is" if kind == "other" else "how many",
                "multiple_choice_answer": people[0],
                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(people)],
                "image_id": k,
                "answer_type": kind,
                "question_id": 100 + k,
            }
        )
        picture(folder / "val2014" / coco("val", k), k)
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    dump(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})


def winoground(folder: Path, n: int) -> None:
    lines = []
    for k in range(n):
        entry: dict[str, Any] = {"id": k, "tag": "Noun", "secondary_tag": "", "num_main_preds": 1 + k % 2}
        entry |= {f"image_{i}": f"ex_{k}_img_{i}" for i in range(2)}
        entry |= {"caption_0": f"cat {k} bites a dog", "caption_1": f"a dog bites cat {k}", "collapsed_tag": "Object"}
        lines.append(json.dumps(entry))
        for i in range(2):
            picture(folder / "images" / f"ex_{k}_img_{i}.png", 2 * k + i)
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


CHECKLIST = {
    "Attribute/vaw/color": "vg",
    "Object/Location/vg_location/vg_subj_center": "vg",
    "Object/Size/swig_size/swig_agent/swig_agent_large": "swig",
    "Relation/hake_action": "hake",
}


def vl_checklist(folder: Path, n: int) -> None:
    for path, source in CHECKLIST.items():
        content = [[f"part/{k}.jpg", {"POS": [f"red cup {k}"], "NEG": [f"blue cup {k}"]}] for k in range(n)]
        dump(folder / "data" / f"{path}.json", content)
        for k in range(n):
            picture(folder / source / "part" / f"{k}.jpg", k)


def aro(name: str, **more: Any) -> Callable[[Path, int], None]:
    def write(folder: Path, n: int) -> None:
        box = {"bbox_x": 1, "bbox_y": 0, "bbox_w": 3, "bbox_h": 2}
        content = [
            {"image_id": k, "image_path": f"{k}.jpg", "true_caption": f"man {k} on bus", **box, **more}
            | {"false_caption": f"bus on man {k}"}
            for k in range(n)
        ]
        dump(folder / name, content)
        for k in range(n):
            picture(folder / "images" / f"{k}.jpg", k)

    return write


def order(name: str, subfolder: str) -> Callable[[Path, int], None]:
    def write(folder: Path, n: int) -> None:
        captions = ["Two young, white men look at hands.", "(A man's hand) in a big garden with {} trees!"]
        content = [
            {"image": f"{subfolder}/{k}.jpg", "caption": [caption.format(k) for caption in captions]} for k in range(n)
        ]
        dump(folder / name, content)
        for k in range(n):
            picture(folder / subfolder / f"{k}.jpg", k)

    return write


def sugarcrepe(folder: Path, n: int) -> None:
    for kind in SUGARCREPE_KINDS:
        content = {
            str(k): {"filename": f"{k:012d}.jpg", "caption": f"A cat {k}.", "negative_caption": f"A dog {k}."}
            for k in range(n)
        }
        dump(folder / f"{kind}.json", content)
    for k in range(n):
        picture(folder / "val2017" / f"{k:012d}.jpg", k)


def cola_multi(folder: Path, n: int) -> None:
    link = "https://example.org/data/vg_gqa_images/{}.jpg"
    content = [
        [link.format(k), f"white sign {k} on red wall", link.format(n + k), f"red sign on white wall {k}"]
        for k in range(n)
    ]
    dump(folder / "COLA_multiobjects_matching_benchmark.json", content)
    for k in range(2 * n):
        picture(folder / "vg_gqa_images" / f"{k}.jpg", k)


def cola_single(source: str, keys: bool, annotated: bool) -> Callable[[Path, int], None]:
    def write(folder: Path, n: int) -> None:
        labels = [f"square white plate {k}" for k in range(n)]
        data = []
        for i in range(n + 3):
            true = [int(i == k) for k in range(n)]
            hard = [int(i in (k, k + 1, k + 2, k + 3)) for k in range(n)]
            data.append([f"images/{i}.jpg", *([{"plate": ["white"]}] if annotated else []), true, hard])
            picture(folder / "images" / f"{i}.jpg", i)
        content = {"labels": labels, "data": data} if keys else [labels, data]
        dump(folder / f"COLA_singleobjects_benchmark_{source}.json", content)

    return write


def clevr(folder: Path, n: int) -> None:
    for kind in CLEVR_KINDS:
        pairs = [["A red cube.", "A blue cube."], ["A blue ball.", "A red ball."]]
        dump(folder / "captions" / f"{kind}.json", {f"CLEVR_val0_{k:06d}.png": pairs for k in range(n)})
    for k in range(n):
        picture(folder / "images" / f"CLEVR_val0_{k:06d}.png", k)


def karpathy(name: str, subfolder: str) -> Callable[[Path, int], None]:
    def write(folder: Path, n: int) -> None:
        images = []
        for k in range(3 * n):
            sentences = [
                {"raw": f"Caption {s} of {k}.", "tokens": ["caption"], "imgid": k, "sentid": 5 * k + s}
                for s in range(5)
            ]
            entry = {"sentids": [5 * k], "imgid": k, "split": ("train", "val", "test")[k % 3], "sentences": sentences}
            where = {"filepath": "val2014", "cocoid": k} if name == "coco" else {}
            images.append(entry | where | {"filename": f"{k}.jpg"})
            picture(folder / subfolder / f"{k}.jpg", k)
        dump(folder / f"dataset_{name}.json", {"images": images, "dataset": name})

    return write


def image_folder(folder: Path, n: int) -> None:
    for k in range(n):
        picture(folder / ("tabby_cat", "dog", "horse")[k % 3] / f"{k}.png", k)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "comvg": comvg,
    **{
        f"refcocog-{partition}{by}": lambda folder, n, partition=partition: refs(folder, n, partition)
        for partition in ("google", "umd")
        for by in ("", "-image")
    },
    "vqa-other": vqa_other,
    "vqa-binary": vqa_binary,
    "vqav2": vqav2,
    "winoground": winoground,
    "vl-checklist": vl_checklist,
    "aro-relation": aro("visual_genome_relation.json", relation_name="on"),
    "aro-attribution": aro("visual_genome_attribution.json", attributes=["old", "red"]),
    "aro-coco-order": order("coco_karpathy_test.json", "val2014"),
    "aro-flickr30k-order": order("flickr30k_test.json", "flickr30k-images"),
    "sugarcrepe": sugarcrepe,
    "cola-multi": cola_multi,
    "cola-single-gqa": cola_single("GQA", keys=True, annotated=True),
    "cola-single-clevr": cola_single("CLEVR", keys=False, annotated=True),
    "cola-single-paco": cola_single("PACO", keys=True, annotated=False),
    "gdbench-clevr": clevr,
    "flickr30k-image": karpathy("flickr30k", "flickr30k-images"),
    "flickr30k-text": karpathy("flickr30k", "flickr30k-images"),
    "coco-image": karpathy("coco", "val2014"),
    "coco-text": karpathy("coco", "val2014"),
    "image-folder": image_folder,
}
SIZE = 14
"""Rows of each small copy: more than the ten candidates that some draw."""
OF_FILES = [name for name in BENCHMARKS if name != "image-folder"]
"""Those whose images are listed in a file."""


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """A folder with n rows of a benchmark."""

    def write(name: str, n: int = SIZE) -> Path:
        WRITERS[name](tmp_path / name, n)
        return tmp_path / name

    return write


def shape(example: Example) -> tuple[Any, ...]:
    return [Path(str(image)).name for image in example.images], list(example.texts), list(example.positives)


def jsons(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes what a JSON file holds; what a change returns takes its place."""
    content = json.loads(path.read_text())
    made = change(content)
    dump(path, content if made is None else made)


def test_every_benchmark_has_a_small_copy() -> None:
    assert set(WRITERS) == set(BENCHMARKS)


# What becomes of a row


FIRST = {
    "comvg": (14, (["0.jpg", "14.jpg"], ["a man sits at table 0"], [(0, 0)]), ("subject",)),
    "vqa-other": (14, None, ("yes/no",)),
    "vqa-binary": (14, None, ()),
    "vqav2": (
        42,
        (["COCO_val2014_000000000000.jpg"], ["what is it 0? yes", "what is it 0? no"], [(0, 0)]),
        ("yes/no", "how many"),
    ),
    "winoground": (
        14,
        (["ex_0_img_0.png", "ex_0_img_1.png"], ["cat 0 bites a dog", "a dog bites cat 0"], [(0, 0), (1, 1)]),
        ("Object", "Noun", "predicates: 1"),
    ),
    "vl-checklist": (
        56,
        (["0.jpg"], ["red cup 0", "blue cup 0"], [(0, 0)]),
        ("attribute", "attribute/color", "vaw"),
    ),
    "aro-relation": (14, (["0.jpg[1, 0, 4, 2]"], ["man 0 on bus", "bus on man 0"], [(0, 0)]), ("on",)),
    "aro-attribution": (14, (["0.jpg[1, 0, 4, 2]"], ["man 0 on bus", "bus on man 0"], [(0, 0)]), ("old_red",)),
    "sugarcrepe": (98, (["000000000000.jpg"], ["A cat 0.", "A dog 0."], [(0, 0)]), ("add_obj", "add")),
    "cola-multi": (
        14,
        (["0.jpg", "14.jpg"], ["white sign 0 on red wall", "red sign on white wall 0"], [(0, 0), (1, 1)]),
        (),
    ),
    **{
        f"cola-single-{source}": (14, ([f"{i}.jpg" for i in range(4)], ["square white plate 0"], [(0, 0)]), ())
        for source in ("gqa", "clevr", "paco")
    },
    "gdbench-clevr": (
        196,
        (["CLEVR_val0_000000.png"], ["A red cube.", "A blue cube."], [(0, 0)]),
        ("pair_binding_size",),
    ),
    "image-folder": (
        14,
        (["1.png"], ["a photo of a dog.", "a photo of a horse.", "a photo of a tabby cat."], [(0, 0)]),
        ("dog",),
    ),
    "aro-coco-order": (28, None, ()),
    "aro-flickr30k-order": (28, None, ()),
    "refcocog-google": (28, None, ("dog",)),
    "refcocog-google-image": (28, None, ("dog",)),
    "refcocog-umd": (28, None, ("person",)),
    "refcocog-umd-image": (28, None, ("person",)),
    "flickr30k-image": (70, None, ()),
    "flickr30k-text": (14, None, ()),
    "coco-image": (70, None, ()),
    "coco-text": (14, None, ()),
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_rows_become_examples(data: Callable[..., Path], name: str) -> None:
    loaded = read_benchmark(name, data(name))
    count, first, tags = FIRST[name]
    assert (loaded.name, loaded.split, loaded.left_out) == (name, BENCHMARKS[name].splits[0], ())
    assert len(loaded.examples) == len({example.id for example in loaded.examples}) == count
    assert first is None or shape(loaded.examples[0]) == first
    assert loaded.examples[0].tags == tags
    for example in loaded.examples:
        assert all(Path(image).is_absolute() and Path(image).is_file() for image in example.images)
    assert loaded.report() == f"{name}, {loaded.split}: {count} examples, 0 rows left out"


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_scores_by_chance_get_chance(data: Callable[..., Path], name: str) -> None:
    loaded = read_benchmark(name, data(name, 30))
    rng = np.random.default_rng(0)
    scores = [rng.random((len(e.images), len(e.texts))) for e in loaded.examples]
    found = evaluate_scores(loaded.examples, scores)["metrics"]["accuracy"]
    # the chance of a choice that has as many right candidates as every other
    first = loaded.examples[0]
    wide = max(len(first.images), len(first.texts)) if 1 in (len(first.images), len(first.texts)) else 2
    if name == "vqav2":
        # a third of the choices is among two, the others are among ten
        two = sum(len(e.texts) == 2 for e in loaded.examples) / len(loaded.examples)
        chance = two / 2 + (1 - two) / 10
    else:
        chance = 1 / wide
    # four standard errors, for there are many benchmarks
    assert abs(found["value"] - chance) < 4 * (chance * (1 - chance) / found["n"]) ** 0.5


@pytest.mark.parametrize("name", ["refcocog-umd", "refcocog-umd-image", "vqa-binary", "coco-image", "flickr30k-text"])
def test_wrong_candidates_are_drawn_by_seed_from_other_images(data: Callable[..., Path], name: str) -> None:
    folder = data(name)
    drawn = [read_benchmark(name, folder, seed=seed).examples for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [e.id for e in drawn[0]] == [e.id for e in drawn[2]]
    own: dict[str, set[str]] = {}
    for example in drawn[0]:
        own.setdefault(str(example.images[0]), set()).add(example.texts[0])
    for example in drawn[0]:
        assert len(set(map(str, example.images))) * len(set(example.texts)) == 10
        assert example.positives == ((0, 0),)
        assert not own[str(example.images[0])] & set(example.texts[1:])
    few = read_benchmark(name, folder, candidates=3).examples
    assert {len(e.images) * len(e.texts) for e in few} == {3}


@pytest.mark.parametrize("name", ["refcocog-google", "coco-image", "coco-text"])
def test_all_candidates_are_one_set(data: Callable[..., Path], name: str) -> None:
    folder = data(name, 3)
    (example,) = read_benchmark(name, folder, "val", candidates=0).examples
    captions = 2 if name.startswith("ref") else 5
    assert (example.id, len(example.images), len(example.texts)) == ("val", 3, 3 * captions)
    assert sorted(example.positives) == [(t // captions, t) for t in range(3 * captions)]
    scores = np.zeros((3, 3 * captions))
    for pair in example.positives:
        scores[pair] = 1
    metrics = evaluate_scores([example], [scores])["metrics"]
    assert metrics["text-recall@1"]["value"] == metrics["image-recall@1"]["value"] == 1


def test_a_caption_of_two_images_is_right_for_both(data: Callable[..., Path]) -> None:
    folder = data("flickr30k-image", 12)

    def same(content: Any) -> None:
        tests = [image for image in content["images"] if image["split"] == "test"]
        tests[0]["sentences"][0]["raw"], tests[1]["sentences"][0]["raw"] = "A man on a wave.", "a man on a  wave"

    edit(folder / "dataset_flickr30k.json", same)
    (example,) = read_benchmark("flickr30k-image", folder, candidates=0).examples
    assert len(example.texts) == 12 * 5 - 1
    assert sum(t == [*example.texts].index("a man on a  wave") for _, t in example.positives) == 2
    for seed in range(5):
        by_image = read_benchmark("flickr30k-image", folder, seed=seed).examples[0]
        assert by_image.texts == ("A man on a wave.",)
        assert example.images[1] not in by_image.images
        by_text = read_benchmark("flickr30k-text", folder, seed=seed).examples[0]
        assert "a man on a  wave" not in by_text.texts


@pytest.mark.parametrize("name", ["refcocog-google", "flickr30k-text", "vqa-other", "coco-image"])
def test_splits_are_the_owners(data: Callable[..., Path], name: str) -> None:
    folder = data(name)
    if name == "vqa-other":
        shutil.copy(folder / "vqa_text_test.csv", folder / "vqa_text_train.csv")
        for image in list((folder / "val2014").iterdir()):
            picture(folder / "train2014" / image.name.replace("val", "train"))
        (example, *_) = read_benchmark(name, folder, "train").examples
        assert Path(str(example.images[0])).name == coco("train", 0)
        return
    sides = [read_benchmark(name, folder, split).examples for split in ("train", "val")]
    images = [{str(image) for e in side for image in e.images} for side in sides]
    assert all(images)
    assert not images[0] & images[1]
    nothing = "restval" if name == "coco-image" else "test"
    if name == "coco-image":
        with pytest.raises(ManifestError, match=f"nothing of the split '{nothing}'"):
            read_benchmark(name, folder, nothing)


def test_names_splits_and_options_that_are_not(data: Callable[..., Path]) -> None:
    folder = data("comvg")
    with pytest.raises(OptionError, match=r"got benchmark 'imagenet', expected one of comvg, .*image-folder"):
        read_benchmark("imagenet", folder)
    with pytest.raises(OptionError, match=r"comvg: got split 'train', expected one of test"):
        read_benchmark("comvg", folder, "train")
    with pytest.raises(OptionError, match=r"comvg: got option 'seed', expected one of none"):
        read_benchmark("comvg", folder, seed=1)
    with pytest.raises(OptionError, match=r"got on_missing 'skip'"):
        read_benchmark("comvg", folder, on_missing="skip")
    with pytest.raises(OptionError, match=r"got seed '1', expected an integer"):
        read_benchmark("vqa-binary", folder, seed="1")
    folder = data("coco-text")
    for candidates in (1, -2):
        with pytest.raises(OptionError, match=f"got {candidates} candidates, expected at least 2, or 0"):
            read_benchmark("coco-text", folder, candidates=candidates)
    for name, most in (("coco-image", 14), ("coco-text", 5 * 13 + 1)):
        assert {len(e.images) * len(e.texts) for e in read_benchmark(name, folder, candidates=most).examples} == {most}
        with pytest.raises(ManifestError, match=f"got {most} candidates in the split, expected {most + 1}; ask for"):
            read_benchmark(name, folder, candidates=most + 1)


# What goes missing or breaks


@pytest.mark.parametrize("name", OF_FILES)
def test_missing_images_are_counted_and_named(data: Callable[..., Path], name: str) -> None:
    folder = data(name)
    examples = read_benchmark(name, folder).examples
    everything = len(examples)
    needed = {str(i.source if isinstance(i, Crop) else i) for e in examples for i in e.images}
    gone = sorted(needed)[:2]
    for path in gone:
        os.remove(path)
    with pytest.raises(ManifestError) as error:
        read_benchmark(name, folder)
    message = str(error.value)
    assert re.match(rf"{name}: got 2 of {len(needed)} images missing \('.*', '.*'\), expected them in ", message)
    assert all(Path(path).name in message for path in gone)
    assert "on_missing='leave-out'" in message
    assert "\n" not in message
    loaded = read_benchmark(name, folder, on_missing="leave-out")
    assert {row.why for row in loaded.left_out} == {MISSING}
    assert len(loaded.examples) + len(loaded.left_out) == everything
    assert f"{len(loaded.left_out)} because an image is missing" in loaded.report()
    assert loaded.examples == [e for e in examples if not any(str(i).startswith(tuple(gone)) for i in e.images)]


def test_no_images_at_all_leave_no_examples(data: Callable[..., Path]) -> None:
    folder = data("comvg", 7)
    for part in ("VG_100K", "VG_100K_2"):
        shutil.rmtree(folder / part)
    with pytest.raises(ManifestError, match=r"got 14 of 14 images missing \(('\d+\.jpg', ){5}\.\.\.\)"):
        read_benchmark("comvg", folder)
    with pytest.raises(ManifestError, match=r"comvg, test: 0 examples, 7 rows left out.*; expected at least one"):
        read_benchmark("comvg", folder, on_missing="leave-out")


def files(name: str, folder: Path) -> list[Path]:
    benchmark = BENCHMARKS[name]
    names = [file.split("|")[0].replace("{split}", benchmark.splits[0]) for file in benchmark.files]
    return [jsons(folder / file)[0] if (folder / file).is_dir() else folder / file for file in names]


@pytest.mark.parametrize("name", OF_FILES)
def test_files_that_are_missing_empty_or_broken(data: Callable[..., Path], name: str) -> None:
    folder = data(name, 11)
    for path in files(name, folder):
        kept = path.read_bytes()
        path.unlink()
        if name != "vl-checklist":  # whose files are what is there
            with pytest.raises(ManifestError, match="got no such file, expected data of"):
                read_benchmark(name, folder)
        for content, got in ((b"", "an empty file"), (b"\n\n\xff", "0xff"), (b'\n{"id": \n', "")):
            if path.suffix == ".p" and got:
                continue
            path.write_bytes(content)
            with pytest.raises(ManifestError) as error:
                read_benchmark(name, folder)
            message = str(error.value)
            assert message.startswith(str(path))
            assert re.search(rf"{re.escape(path.name)}(:\d+)?: got .*{got}.*, expected .*; .*", message), message
            if path.suffix == ".json":
                assert got or ".json:3: got broken JSON (" in message
        path.write_bytes(kept)
    with pytest.raises(ManifestError, match="nowhere: got no folder"):
        read_benchmark(name, folder / "nowhere")


def cells(change: Callable[[list[list[str]]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        rows = list(csv.reader(io.StringIO(path.read_text(), newline="")))
        change(rows)
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows(rows)
        path.write_text(stream.getvalue(), newline="")

    return write


def content(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: edit(path, change)


def lines(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        change(entries)
        path.write_text("\n".join(map(json.dumps, entries)))

    return write


def put(*keys: Any, value: Any = None) -> Callable[[Any], None]:
    """Sets what the keys lead to."""

    def change(thing: Any) -> None:
        for key in keys[:-1]:
            thing = thing[key]
        thing[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    """Removes what the keys lead to."""

    def change(thing: Any) -> None:
        for key in keys[:-1]:
            thing = thing[key]
        del thing[keys[-1]]

    return change


BROKEN = [
    ("comvg", 0, cells(put(0, 1, value="text")), ":1: got no column 'sentence'"),
    ("comvg", 0, cells(put(0, 2, value="id")), ":1: got the column 'id' twice"),
    ("comvg", 0, cells(put(2, 6, value="colour")), ":3: got neg_value 'colour'"),
    ("comvg", 0, cells(put(2, 4, value="../1")), ":3: got pos_image_id '../1', expected a whole number"),
    ("comvg", 0, cells(put(2, 0, value="1")), ":3: got the id '1' again"),
    ("comvg", 0, cells(drop(2, 6)), ":3: got 6 cells, expected 7"),
    ("comvg", 0, lambda p: p.write_text('id\n"a"b'), ":1: got no column 'sentence'"),
    ("comvg", 0, lambda p: p.write_text(p.read_text() + '"'), ":16: got broken CSV"),
    ("comvg", 0, lambda p: p.write_text(p.read_text().split("\n")[0]), "got no rows"),
    ("vqa-other", 0, cells(put(0, 10, value="x")), ":1: got no column 'neg_sentence_9'"),
    ("vqa-binary", 0, lambda p: p.write_text("a.jpg: is it?\n"), ":1: got 'a.jpg: is it?', expected IMAGE*The"),
    ("vqa-binary", 0, lambda p: p.write_text(p.read_text().replace("COCO", "../x", 1)), "outside its folder"),
    ("winoground", 0, lines(drop(1, "caption_0")), ":2: got no 'caption_0' among"),
    ("winoground", 0, lines(put(1, "image_1", value="../../x")), ":2: got the image '../../x.png', outside"),
    ("winoground", 0, lines(put(1, "image_1", value="/etc/passwd")), ":2: got the image '/etc/passwd.png', outside"),
    ("winoground", 0, lines(put(1, "image_1", value=" ")), "outside|missing|blank"),
    ("winoground", 0, lines(put(1, "id", value=0)), ":2: got the id '0' again"),
    ("winoground", 0, lines(put(1, "id", value=None)), ":2: got id None"),
    ("winoground", 0, lines(put(1, "caption_0", value=["a"])), ":2: got caption_0 ['a'], expected a string"),
    ("winoground", 0, lines(put(1, value=3)), ":2: got 3, expected an object"),
    ("winoground", 0, lambda p: p.write_text(p.read_text() + '{"id": 1, "id": 2}'), ":15: got the key 'id' twice"),
    ("vl-checklist", 0, content(put(2, 1, value={"POS": ["a"]})), "color.json[2][1]: got no 'NEG' among POS"),
    ("vl-checklist", 0, content(put(2, 1, "POS", value=[])), "color.json[2][1]: got no caption"),
    ("vl-checklist", 0, content(put(2, value=["a.jpg"])), "color.json[2]: got entry ['a.jpg'], expected a list of 2"),
    ("vl-checklist", 0, content(put(2, 0, value="../../x.jpg")), "color.json[2]: got the image '../../x.jpg', outside"),
    ("aro-relation", 0, content(drop(3, "relation_name")), "relation.json[3]: got no 'relation_name' among"),
    ("aro-relation", 0, content(put(3, "bbox_w", value=0)), "relation.json[3]: got a box of 0 x 2"),
    ("aro-relation", 0, content(put(3, "bbox_w", value=1.5)), "relation.json[3]: got bbox_w 1.5"),
    ("aro-relation", 0, content(lambda c: []), "relation.json: got an empty list"),
    ("aro-relation", 0, content(lambda c: {"a": 1}), "relation.json: got content {'a': 1}, expected a list"),
    ("aro-attribution", 0, content(put(3, "attributes", value=["a"])), "[3]: got attributes ['a'], expected a list"),
    ("aro-coco-order", 0, content(drop(3, "caption")), "test.json[3]: got no 'caption' among image"),
    ("aro-coco-order", 0, content(put(3, "caption", 1, value=7)), "test.json[3]: got entry of caption 7"),
    ("aro-coco-order", 0, content(put(3, "caption_options", value=["a"])), "test.json[3]: got one caption"),
    ("sugarcrepe", 2, content(drop("3", "negative_caption")), "replace_obj.json['3']: got no 'negative_caption'"),
    ("sugarcrepe", 2, content(put("3", "filename", value="../x.jpg")), "replace_obj.json['3']: got the image"),
    ("sugarcrepe", 2, lambda p: p.write_text('{"0": {}, "0": {}}'), "got the key '0' twice"),
    ("cola-multi", 0, content(put(1, value=["a", "b", "c"])), "benchmark.json[1]: got entry ['a', 'b', 'c'], expected"),
    ("cola-multi", 0, content(put(1, 1, value=None)), "benchmark.json[1]: got entry None, expected a string"),
    ("cola-single-gqa", 0, content(drop("data")), "GQA.json: got no 'data' among labels"),
    ("cola-single-gqa", 0, content(put("data", 1, 2, value=[1])), "[1][1]: got list of labels [1], expected"),
    ("cola-single-gqa", 0, content(put("data", 1, 2, 0, value=2)), "[1][1]: got the label (2, 1), expected 0 or 1"),
    ("cola-single-gqa", 0, content(put("data", 1, value=["a"])), "[1][1]: got 1 values"),
    ("gdbench-clevr", 4, content(put("CLEVR_val0_000001.png", 1, value=["a"])), "expected a list of 2"),
    ("gdbench-clevr", 4, content(put("../x.png", value=[["a", "b"]])), "color.json['../x.png']: got the image"),
    ("coco-image", 0, content(drop("images", 2, "sentences", 3, "raw")), "images[2].sentences[3]: got no 'raw' among"),
    ("coco-image", 0, content(put("images", 2, "filename", value="/x")), "got the image '/x', outside"),
    ("coco-image", 0, content(put("images", 5, "sentences", 0, "sentid", value=10)), "got the id '10' again"),
    ("coco-image", 0, content(put("images", 5, "split", value=None)), "images[5]: got split None"),
    ("vqav2", 0, content(put("questions", 1, "question_id", value=100)), "questions[1]: got question_id 100 again"),
    ("vqav2", 0, content(put("questions", 1, "image_id", value=5)), "annotations[1]: got another image"),
    ("vqav2", 1, content(put("annotations", 1, "question_id", value=7)), "annotations[1]: got question_id 7, expected"),
    ("vqav2", 1, content(drop("annotations", 1, "answers", 9)), "annotations[1]: got 9 answers, expected 10"),
    ("vqav2", 1, content(put("annotations", 1, "question_id", value=True)), "annotations[1]: got question_id True"),
    ("refcocog-umd", 1, content(drop("images", 2)), "refs(umd).p[2]: got image_id 2, expected one of instances.json"),
    ("refcocog-umd", 1, content(drop("categories", 0)), "got category_id 1, expected one of instances.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "breaks", "got"), BROKEN)
def test_broken_rows_are_errors_of_one_line(
    data: Callable[..., Path], name: str, file: int, breaks: Callable[[Path], Any], got: str
) -> None:
    folder = data(name)
    breaks(files(name, folder)[file])
    with pytest.raises(ManifestError) as error:
        read_benchmark(name, folder)
    message = str(error.value)
    if got == "outside|missing|blank":
        assert re.search(got, message)
    else:
        assert got in message
    assert "\n" not in message
    assert len(message) < 900


@pytest.mark.parametrize(
    ("name", "file", "change", "why"),
    [
        ("comvg", 0, cells(put(2, 5, value="1")), CLASH),
        ("comvg", 0, cells(put(2, 1, value="  ")), BLANK),
        ("vqa-other", 0, cells(put(2, 6, value="What is  that?? 3")), CLASH),
        ("winoground", 0, lines(put(1, "caption_0", value="A dog bites cat 1.")), CLASH),
        ("vl-checklist", 0, content(put(1, 1, "NEG", value=["red CUP 1"])), CLASH),
        ("aro-relation", 0, content(put(1, "false_caption", value="man 1 on bus")), CLASH),
        ("sugarcrepe", 0, content(put("1", "negative_caption", value="a cat 1")), CLASH),
        ("gdbench-clevr", 0, content(put("CLEVR_val0_000001.png", 0, value=["a", "a"])), CLASH),
        ("coco-image", 0, content(put("images", 2, "sentences", 0, "raw", value=" ")), BLANK),
        ("aro-coco-order", 0, content(put(0, "caption", 0, value="Dogs!")), "no other order of its words differs"),
        ("aro-coco-order", 0, content(put(0, "caption", 0, value="...")), BLANK),
        ("cola-single-gqa", 0, content(put("data", 1, -2, 1, value=0)), "its images all show it, or none does"),
        ("vqav2", 1, content(put("annotations", 2, "multiple_choice_answer", value="none")), "none of its cand"),
        ("image-folder", None, lambda p: (p / "dog" / "notes.txt").write_text("x"), "it is no image file"),
    ],
)  # fmt: skip
def test_rows_that_say_nothing_are_left_out_and_reported(
    data: Callable[..., Path], name: str, file: int | None, change: Callable[[Path], Any], why: str
) -> None:
    folder = data(name)
    before = len(read_benchmark(name, folder).examples)
    change(folder if file is None else files(name, folder)[file])
    loaded = read_benchmark(name, folder)
    (row,) = loaded.left_out
    assert row.why.startswith(why)
    assert row.where.startswith(str(folder))
    assert f"1 rows left out: 1 because {why}" in loaded.report()
    assert len(loaded.examples) == before - (name != "image-folder")


VALUES = (None, True, -1, 10**30, 2.5, "", " ", "\ud800", "../x", "a\0b", "x" * 5000, [], [1], ["a"], {}, {"a": 1})


def changed(rng: random.Random, thing: Any) -> Any:
    """A copy with one value, somewhere within, replaced or removed."""
    if rng.random() < 0.15 or not isinstance(thing, dict | list) or not thing:
        return rng.choice(VALUES)
    copy: Any = thing.copy()
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = changed(rng, copy[key])
    return copy


@pytest.mark.parametrize("name", OF_FILES)
def test_any_change_is_read_or_an_error_of_one_line(data: Callable[..., Path], name: str) -> None:
    folder = data(name, 11)
    rng = random.Random(name)
    for path in files(name, folder)[:2]:
        before = path.read_bytes()
        for _ in range(15):
            if path.suffix == ".json":
                path.write_text(json.dumps(changed(rng, json.loads(before))))
            else:
                at = rng.randrange(len(before))
                path.write_bytes(before[:at] + rng.choice((b"", b"\xff", b'"', b"\n", b"7,")) + before[at + 1 :])
            message = ""
            try:
                read_benchmark(name, folder)
            except DsdError as error:
                message = str(error)
            assert "\n" not in message
        path.write_bytes(before)


# Pickles


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made",)


def test_pickles_hold_plain_values_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "refs(umd).p"
    plain = [{"a": [1, 2.5, None, True, "é", b"x", (1,), {"b"}]}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        # sets and bytes of the oldest protocols are asked for by name
        value = plain if protocol > 3 else [{"a": [1, 2.5, None, True, "é", (1,), {"b": 2}]}]
        path.write_bytes(pickle.dumps(value, protocol))
        assert read_plain_pickle(path) == value
        path.write_bytes(pickle.dumps([Evil()], protocol))
        with pytest.raises(ManifestError, match=r"refs\(umd\)\.p: got a pickle that asks for '(posix|nt)\.mkdir'"):
            read_plain_pickle(path)
    # byte strings of Python 2, where text is meant
    path.write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")
    assert read_plain_pickle(path) == ["café"]
    persistent = io.BytesIO()
    pickler = pickle.Pickler(persistent)
    pickler.persistent_id = lambda thing: "7" if thing == "x" else None  # type: ignore[method-assign]
    pickler.dump(["x"])
    for data in (b"", b"(lp0\n", b"no pickle", pickle.dumps([1])[:-1], b"S'\\xff'\n.", persistent.getvalue()):
        path.write_bytes(data)
        with pytest.raises(ManifestError, match=r"refs\(umd\)\.p: got a (broken )?pickle"):
            read_plain_pickle(path)
    assert not (tmp_path / "made").exists()


def test_refs_may_be_json_too(data: Callable[..., Path]) -> None:
    folder = data("refcocog-google")
    before = read_benchmark("refcocog-google", folder).examples
    dump(folder / "refs(google).json", pickle.loads((folder / "refs(google).p").read_bytes()))
    (folder / "refs(google).p").unlink()
    assert read_benchmark("refcocog-google", folder).examples == before


# Single benchmarks


def test_winoground_as_csv(data: Callable[..., Path]) -> None:
    folder = data("winoground")
    before = read_benchmark("winoground", folder).examples
    entries = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    table(folder / "examples.csv", ",".join(entries[0]), [tuple(entry.values()) for entry in entries])
    (folder / "examples.jsonl").unlink()
    assert read_benchmark("winoground", folder).examples == before


def test_checklist_reads_no_more_than_the_limit(data: Callable[..., Path]) -> None:
    loaded = read_benchmark("vl-checklist", data("vl-checklist"), limit=2)
    assert [e.id for e in loaded.examples] == [f"{path}/{k}" for path in sorted(CHECKLIST) for k in range(2)]
    assert {tag for e in loaded.examples for tag in e.tags} == {
        *("attribute", "attribute/color", "vaw", "object", "object/location/center", "vg"),
        *("object/size/large", "swig", "relation", "relation/action", "hake"),
    }
    folder = data("vl-checklist")
    shutil.move(folder / "data" / "Relation" / "hake_action.json", folder / "data" / "action.json")
    with pytest.raises(ManifestError, match=r"action\.json: got a path without its source"):
        read_benchmark("vl-checklist", folder)
    shutil.rmtree(folder / "data")
    (folder / "data").mkdir()
    with pytest.raises(ManifestError, match=r"data: got no \.json file"):
        read_benchmark("vl-checklist", folder)


def test_aro_looks_at_parts_that_are_cut_when_used(data: Callable[..., Path], tmp_path: Path) -> None:
    folder = data("aro-relation")
    stripes = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(stripes).save(folder / "images" / "0.jpg", "PNG")
    example, *others = read_benchmark("aro-relation", folder).examples
    (part,) = example.images
    assert isinstance(part, Crop)
    assert not (folder / "crops").exists()
    for _ in range(2):
        assert np.array_equal(np.asarray(load_image(part)), stripes[0:2, 1:4])
    (cut,) = (folder / "crops").iterdir()
    assert cut.name.startswith("0-1-0-4-2-")
    written = read_manifest(write_manifest([example, others[0]], tmp_path / "frozen"))
    assert np.array_equal(np.asarray(load_image(written[0].images[0])), stripes[0:2, 1:4])
    with pytest.raises(ImageError, match=r"0\.jpg\[9, 0, 12, 2\]': got a box outside the picture of 6 x 4 pixels"):
        os.fspath(Crop(part.source, (9, 0, 12, 2), part.folder))
    Image.fromarray(stripes[::-1]).save(folder / "images" / "0.jpg", "PNG")
    os.utime(folder / "images" / "0.jpg", ns=(1, 1))
    assert np.array_equal(np.asarray(load_image(part)), stripes[::-1][0:2, 1:4])  # of the picture that is there now
    with pytest.raises(ImageError):
        os.fspath(Crop(f"{part.source}.gone", part.box, part.folder))
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="file': got a folder that cannot be written to"):
        os.fspath(Crop(part.source, part.box, str(tmp_path / "file")))


def test_aro_orders_are_the_same_words_in_another_order(data: Callable[..., Path]) -> None:
    folder = data("aro-coco-order")
    examples = read_benchmark("aro-coco-order", folder).examples
    assert examples[0].texts[0] == "two young white men look at hands"
    assert examples[1].texts[0] == "a man's hand in a big garden with 0 trees"
    for example in examples:
        assert len(set(example.texts)) == 3
        assert len({tuple(sorted(text.split())) for text in example.texts}) == 1
        within = example.texts[1].split()
        threes = [example.texts[0].split()[k : k + 3] for k in range(0, len(within), 3)]
        assert [sorted(within[3 * k : 3 * k + 3]) for k in range(len(threes))] == [sorted(three) for three in threes]
    assert examples == read_benchmark("aro-coco-order", folder).examples
    assert examples != read_benchmark("aro-coco-order", folder, seed=1).examples
    long = " ".join(f"w{k}" for k in range(50))
    edit(folder / "coco_karpathy_test.json", put(0, "caption", value=[long]))
    assert {len(text.split()) for text in read_benchmark("aro-coco-order", folder).examples[0].texts} == {30}
    edit(folder / "coco_karpathy_test.json", put(0, "caption_options", value=["a b", "b a", "B, a"]))
    given = read_benchmark("aro-coco-order", folder).examples[0]
    assert (given.texts, given.positives, given.tags) == (("a b", "b a", "B, a"), ((0, 0),), ("given",))


def test_classes_are_called_as_their_file_says(data: Callable[..., Path]) -> None:
    folder = data("image-folder")
    dump(folder / "classes.json", {"tabby_cat": "tabby", "dog": "hound", "horse": "mare"})
    loaded = read_benchmark("image-folder", folder, templates=("a {}.", "one {} and {}"))
    example = loaded.examples[0]
    said = "a hound.|one hound and hound|a mare.|one mare and mare|a tabby.|one tabby and tabby"
    assert example.texts == tuple(said.split("|"))
    assert example.positives == ((0, 0), (0, 1))
    assert Counter(e.tags[0] for e in loaded.examples) == {"tabby": 5, "hound": 5, "mare": 4}
    for templates in ("a {}", (), ("a photo",)):
        with pytest.raises(OptionError, match="got templates"):
            read_benchmark("image-folder", folder, templates=templates)
    dump(folder / "classes.json", {"tabby_cat": "Dog", "dog": "dog", "horse": "mare"})
    with pytest.raises(ManifestError, match="two classes called 'Dog'"):
        read_benchmark("image-folder", folder)
    dump(folder / "classes.json", {"dog": "dog"})
    with pytest.raises(ManifestError, match=r"classes\.json: got no 'horse' among dog"):
        read_benchmark("image-folder", folder)
    with pytest.raises(ManifestError, match=r"test: got 0 folders"):
        read_benchmark("image-folder", folder, "test")
    shutil.copytree(folder / "dog", folder / "val" / "dog")
    shutil.copytree(folder / "horse", folder / "val" / "horse")
    (folder / "classes.json").unlink()
    assert len(read_benchmark("image-folder", folder, "val").examples) == 9


def test_folders_of_images_may_be_links_but_names_may_not_leave_them(data: Callable[..., Path], tmp_path: Path) -> None:
    folder = data("winoground")
    shutil.move(folder / "images", tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    assert len(read_benchmark("winoground", folder).examples) == SIZE
    picture(tmp_path / "secret.png")
    (tmp_path / "elsewhere" / "ex_0_img_0.png").unlink()
    (tmp_path / "elsewhere" / "ex_0_img_0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ManifestError, match="outside its folder"):
        read_benchmark("winoground", folder)
    (folder / "images").unlink()
    (folder / "images").symlink_to(folder / "images")
    with pytest.raises(ManifestError, match="28 of 28 images missing"):
        read_benchmark("winoground", folder)


# VQAv2's soft accuracy


@pytest.mark.parametrize(
    ("answer", "means"),
    [
        ("The  Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well -known", "well known"),
        ("1,000", "1000"),
        ("3.5 ft.", "3.5 ft"),
        ("what? no", "what no"),
        ("a an the", ""),
        ("no\n", "no"),
    ],
)
def test_answers_are_normalised_as_the_owners_do(answer: str, means: str) -> None:
    assert normalise(answer) == means


def test_soft_accuracy_is_the_mean_over_leaving_one_out() -> None:
    for same, worth in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        assert soft_accuracy("dog", ["dog"] * same + ["cat"] * (10 - same)) == pytest.approx(worth)
    assert soft_accuracy("a Dog.", ["dog"] * 5 + ["The dog"] * 5) == 1
    # where people agree, nothing is normalised
    assert soft_accuracy("a dog", ["dog"] * 10) == 0
    assert soft_accuracy("dog\n", ["dog"] * 10) == 1


def test_answers_of_vqav2_have_credits(data: Callable[..., Path]) -> None:
    loaded = read_benchmark("vqav2", data("vqav2"))
    yes_no, number, other = loaded.examples[:3]
    assert loaded.credit[yes_no.id] == pytest.approx((1, 0.6))
    assert loaded.credit[number.id] == pytest.approx((1, *[0] * 9))
    assert number.texts[0] == "what is it 1? 1"
    assert len(set(other.texts)) == 10
    assert all(text.removeprefix("what is it 2? ") in COLOURS for text in other.texts[:4])
    credits = loaded.credits
    assert credits is not None
    scores = [np.zeros((1, len(e.texts))) for e in loaded.examples]
    for table in scores:
        table[0, 1] = 1
    metrics = evaluate_scores(loaded.examples, scores, credits=credits)["metrics"]
    assert metrics["soft-accuracy"]["value"] == pytest.approx(0.6 / 3)
    assert metrics["accuracy"]["value"] == 0
    with pytest.raises(ManifestError, match=r"annotations\[2\]: got 12 candidates, expected 13"):
        read_benchmark("vqav2", data("vqav2"), candidates=13)
    with pytest.raises(OptionError, match="got 1 candidates"):
        read_benchmark("vqav2", data("vqav2"), candidates=1)


def test_only_some_benchmarks_have_credits() -> None:
    assert Loaded("x", "test", []).credits is None


# Tables by column names


def test_rows_by_the_names_of_columns() -> None:
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    rows = [{"a": red, "b": blue, "x": "red", "y": ["blue", "sky"], "kind": 3, "more": None}]
    (example,) = read_rows(rows, ("a", "b"), ("x", "y"), ((0, 0), (1, 1), (1, 2)), ("kind",))
    assert example == Example("1", (red, blue), ("red", "blue", "sky"), ((0, 0), (1, 1), (1, 2)), ("3",))
    (pair,) = read_rows(iter([{"image": "a.png", "caption": "x", "negative": "y"}]), texts=("caption", "negative"))
    assert pair == Example("1", ("a.png",), ("x", "y"), ((0, 0),))


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"image": "a.png"}, "pets:2: got no 'text' among image"),
        ({"image": "a.png", "text": 3}, "pets:2: got text in 'text' 3, expected a string"),
        ({"image": "a.png", "text": ["a", " "]}, "pets:2: got a blank text"),
        ({"image": {"bytes": b"", "path": None}, "text": "a"}, "pets:2: got the image {"),
        ({"image": None, "text": "a"}, "pets:2: got the image None"),
        ({"image": "a.png", "text": []}, "example '2': got 1 images, 0 texts"),
    ],
)
def test_rows_with_broken_columns(row: dict[str, Any], got: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(got)):
        read_rows([{"image": "a.png", "text": "a"}, row], name="pets")
    with pytest.raises(ManifestError, match="pets: got no rows"):
        read_rows([], name="pets")


# The owners' files


def with_images(folder: Path, names: set[str]) -> None:
    """Empty files stand for images, which are not opened."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()


@pytest.fixture(scope="module")
def comvg_files(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comvg")
    path = shared / "official" / "compositional_visual_genome.csv"
    shutil.copy(path, folder)
    with path.open() as file:
        ids = {row[key] for row in csv.DictReader(file) for key in ("pos_image_id", "neg_image_id")}
    assert len(ids) == 524
    with_images(folder / "VG_100K", {f"{name}.jpg" for name in ids})
    return folder


def test_comvg_as_published(comvg_files: Path) -> None:
    loaded = read_benchmark("comvg", comvg_files)
    assert len(loaded.examples) == 5400
    assert Counter(e.tags for e in loaded.examples) == {("object",): 2584, ("subject",): 1536, ("verb",): 1280}
    assert loaded.left_out == ()
    assert shape(loaded.examples[0]) == (["2358258.jpg", "2357994.jpg"], ["a man is sitting at a table"], [(0, 0)])
    (comvg_files / "VG_100K" / "2358258.jpg").unlink()
    with pytest.raises(ManifestError, match=r"got 1 of 524 images missing \('2358258\.jpg'\)"):
        read_benchmark("comvg", comvg_files)
    with_images(comvg_files / "VG_100K_2", {"2358258.jpg"})
    assert len(read_benchmark("comvg", comvg_files).examples) == 5400


def test_vqa_as_the_authors_pose_it(shared: Path, tmp_path: Path) -> None:
    official = shared / "official"
    shutil.copy(official / "vqa_text_test.csv", tmp_path)
    shutil.copy(official / "vqa_test_head.txt", tmp_path / "test.txt")
    with (tmp_path / "vqa_text_test.csv").open() as file:
        names = {coco("val", int(row["pos_image_id"])) for row in csv.DictReader(file)}
    names |= {line.split("*")[0] for line in (tmp_path / "test.txt").read_text().splitlines()}
    with_images(tmp_path / "val2014", names)
    other = read_benchmark("vqa-other", tmp_path)
    assert len(other.examples) == 999
    (row,) = other.left_out
    assert (row.why, row.what) == (CLASH, "What is in the glass at the table? orange juice")
    assert row.where.endswith("vqa_text_test.csv:684")
    assert {len(e.texts) for e in other.examples} == {10}
    assert Counter(e.tags for e in other.examples) == {("other",): 482, ("yes/no",): 386, ("number",): 131}
    # what docs/benchmarks.md warns of
    assert not [e for e in other.examples for text in e.texts[1:] if text.endswith(("? yes", "? no"))]
    binary = read_benchmark("vqa-binary", tmp_path)
    assert len(binary.examples) == 815
    assert {(len(e.images), len(e.texts)) for e in binary.examples} == {(10, 1)}
    assert binary.examples[0].texts == ("are the suitcases for sale? the suitcases are not for sale",)


def test_clevr_captions_as_published(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "official" / "clevr_captions", tmp_path / "captions")
    with_images(tmp_path / "images", set(json.loads((tmp_path / "captions" / "spatial.json").read_text())))
    loaded = read_benchmark("gdbench-clevr", tmp_path)
    assert Counter(e.tags for e in loaded.examples) == {(kind,): 1148 for kind in CLEVR_KINDS}
    assert loaded.left_out == ()
    assert shape(next(e for e in loaded.examples if e.tags == ("spatial",))) == (
        ["CLEVR_val2_000138.png"], ["On the right is a gray cylinder.", "On the left is a gray cylinder."], [(0, 0)],
    )  # fmt: skip
