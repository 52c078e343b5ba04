"""Few-shot splits, leakage and negatives that are right."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dsd.contracts import Example, ManifestError, OptionError
from dsd.tasks import check_leakage, few_shot_split, find_false_negatives, read_benchmark, read_manifest, write_manifest
from dsd.tasks.reading import Crop


def picture(k: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (k % 256, k // 256, 9))


def choices(count: int, shared: int = 0) -> list[Example]:
    """Image choices of three tags; the first ``shared`` have one negative in common."""
    return [
        Example(
            str(k), (picture(k), picture(1000 if k < shared else 500 + k)), (f"text {k}",), ((0, 0),), ("abc"[k % 3],)
        )
        for k in range(count)
    ]


def test_shots_are_drawn_by_seed_and_nested() -> None:
    examples = choices(30)
    split = few_shot_split(examples, 8, 0)
    assert (len(split.shots), len(split.held_out), split.left_out) == (8, 22, [])
    assert {e.id for e in split.shots}.isdisjoint(e.id for e in split.held_out)
    ids = [{e.id for e in few_shot_split(list(reversed(examples)), n, 0).shots} for n in (4, 8, 16)]
    assert ids[0] < ids[1] < ids[2]
    assert ids[1] == {e.id for e in split.shots} != {e.id for e in few_shot_split(examples, 8, 1).shots}


def test_as_many_of_each_tag() -> None:
    split = few_shot_split(choices(30), 2, 3, per_tag=True)
    assert sorted(e.tags[0] for e in split.shots) == ["a", "a", "b", "b", "c", "c"]


def test_examples_that_share_a_picture_with_shots_are_on_neither_side() -> None:
    split = few_shot_split(choices(30, shared=20), 6, 0)
    assert len(split.shots) + len(split.held_out) + len(split.left_out) == 30
    assert 0 < len(split.left_out) < 20
    check_leakage(split.shots, split.held_out)
    with pytest.raises(
        ManifestError, match=r"got 1 pictures on both sides \(image 1 in '\d+' and '\d+'\), expected none"
    ):
        check_leakage(split.shots, split.left_out)


def test_splits_that_cannot_be_drawn() -> None:
    with pytest.raises(OptionError, match="got 0 shots"):
        few_shot_split(choices(3), 0, 0)
    with pytest.raises(OptionError, match="got 4 shots, expected at most the 3 examples there are"):
        few_shot_split(choices(3), 4, 0)
    with pytest.raises(OptionError, match=r"got 2 shots, expected at most the 1 examples of '[abc]'"):
        few_shot_split(choices(3), 2, 0, per_tag=True)
    with pytest.raises(ManifestError, match="got 9 other examples, all with pictures of the 1 drawn"):
        few_shot_split(choices(10, shared=10), 1, 0)


def test_splits_are_frozen_as_manifests(tmp_path: Path) -> None:
    split = few_shot_split(choices(12, shared=6), 3, 0)
    sides = []
    for name, side in (("shots", split.shots), ("held_out", split.held_out)):
        write_manifest(side, tmp_path / name)
        sides.append(read_manifest(tmp_path / name / "manifest.jsonl"))
        assert [e.id for e in sides[-1]] == [e.id for e in side]
    check_leakage(*sides)


def test_leakage_is_of_pixels_whatever_the_file(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.bmp")
    a = [Example("1", (str(tmp_path / "a.png"),), ("x",), ((0, 0),))]
    part = Crop(str(tmp_path / "a.png"), (0, 0, 2, 2), str(tmp_path / "crops"))
    for image in (str(tmp_path / "b.bmp"), np.asarray(picture(1)), part):
        with pytest.raises(
            ManifestError, match=r"got 1 pictures on both sides \(.*\.(png|bmp) in '1' and '2'\)|image 0"
        ):
            check_leakage(a, [Example("2", (image,), ("y",), ((0, 0),))])
    assert not (tmp_path / "crops").exists()
    check_leakage(a, [Example("2", (picture(2),), ("y",), ((0, 0),))])
    many = [Example(str(k), (picture(k),), ("x",), ((0, 0),)) for k in range(7)]
    with pytest.raises(ManifestError, match=re.escape("got 7 pictures on both sides (")) as error:
        check_leakage(many, many)
    assert str(error.value).count(" in '") == 5


def test_false_negatives_are_found_within_and_across_examples() -> None:
    a, b, c = "a.png", "b.png", picture(3)
    examples = [
        Example("same text", (a,), ("A cat.", "a  cat", "a dog"), ((0, 0),)),
        Example("same image", (a, a, b), ("one",), ((0, 0),)),
        Example("elsewhere", (b, a), ("A CAT",), ((0, 0),)),
        Example("in memory", (c, b), ("a fox",), ((0, 0),)),
        Example("its copy", (b, c.copy()), ("a fox",), ((0, 0),)),
        Example("both right", (a,), ("a cat", "a cat."), ((0, 0), (0, 1))),
    ]
    found = {(one.id, one.pair, one.why) for one in find_false_negatives(examples)}
    assert found == {
        ("same text", (0, 1), "the same as a right pair of the example"),
        ("same image", (1, 0), "the same as a right pair of the example"),
        ("elsewhere", (1, 0), "right in 'same text'"),
        ("in memory", (1, 0), "right in 'its copy'"),
        ("its copy", (1, 0), "right in 'in memory'"),
    }
    assert find_false_negatives(choices(5)) == []


def test_comvg_has_negatives_that_are_right_elsewhere(shared: Path, tmp_path: Path) -> None:
    path = shared / "official" / "compositional_visual_genome.csv"
    shutil.copy(path, tmp_path)
    (tmp_path / "images").mkdir()
    with path.open() as file:
        for row in csv.DictReader(file):
            for key in ("pos_image_id", "neg_image_id"):
                (tmp_path / "images" / f"{row[key]}.jpg").touch()
    found = find_false_negatives(read_benchmark("comvg", tmp_path).examples)
    assert len(found) == 14
    assert all(one.pair == (1, 0) and one.why.startswith("right in ") for one in found)
