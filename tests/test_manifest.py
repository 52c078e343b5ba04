"""Manifests, CSV files and tables => Examples, and back."""

import json
import os
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dsd.contracts import Example, ManifestError
from dsd.tasks import read_manifest, read_table, world_task, write_manifest

ENTRY = {"id": "7", "images": ["a.png", "b.png"], "texts": ["a cat"], "positives": [[0, 0]], "tags": ["predicate"]}
property_test = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a.png, b.png and c.png, a link to a picture outside it, and one in a circle."""
    path = tmp_path_factory.mktemp("data")
    for shade, name in enumerate(("a.png", "b.png", "c.png", "../outside.png")):
        Image.new("RGB", (4, 4), (40 * shade,) * 3).save(path / name)
    (path / "link.png").symlink_to(path / "../outside.png")
    (path / "circle.png").symlink_to(path / "circle.png")
    return path


def write(folder, content, name="manifest.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def shape(examples):
    """Ids, names of images, texts and positives."""
    return [(e.id, [os.path.basename(i) for i in e.images], list(e.texts), list(e.positives)) for e in examples]


# JSONL


def test_reads_what_the_design_shows(folder):
    (example,) = read_manifest(write(folder, json.dumps(ENTRY)))
    assert example == Example(
        "7", (str(folder / "a.png"), str(folder / "b.png")), ("a cat",), ((0, 0),), ("predicate",)
    )


def test_ids_and_tags_may_be_missing_and_lines_blank(folder):
    bare = {key: ENTRY[key] for key in ("images", "texts", "positives")}
    text = "\ufeff\n" + json.dumps(bare) + "\r\n  \n" + json.dumps({**bare, "texts": ["a\u2028b"]}, ensure_ascii=False)
    examples = read_manifest(str(write(folder, text)))
    assert [(e.id, e.texts, e.tags) for e in examples] == [("2", ("a cat",), ()), ("4", ("a\u2028b",), ())]


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"images": "a.png"}, "images 'a.png'"),
        ({"images": []}, "images []"),
        ({"images": [1]}, "the entry of images 1"),
        ({"images": ["../outside.png"]}, "outside the manifest's folder"),
        ({"images": ["/etc/passwd"]}, "outside the manifest's folder"),
        ({"images": ["link.png"]}, "outside the manifest's folder"),
        ({"images": ["circle.png"]}, "no file"),
        ({"images": ["no.png"]}, "no file"),
        ({"images": ["."]}, "no file"),
        ({"images": ["a\0b.png"]}, "no file"),
        ({"images": ["x" * 5000]}, "no file"),
        ({"texts": [" "]}, "the entry of texts ' '"),
        ({"texts": ["\ud800"]}, "the entry of texts"),
        ({"texts": None}, "texts None"),
        ({"positives": []}, "positives []"),
        ({"positives": [0, 0]}, "the positive 0"),
        ({"positives": [[0, 0, 0]]}, "the positive [0, 0, 0]"),
        ({"positives": [[False, 0]]}, "the positive [False, 0]"),
        ({"positives": [[0.0, 0]]}, "the positive [0.0, 0]"),
        ({"positives": [["0", 0]]}, "the positive ['0', 0]"),
        ({"positives": [[2, 0]]}, "the positive [2, 0]"),
        ({"positives": [[0, 1]]}, "the positive [0, 1]"),
        ({"positives": [[-1, 0]]}, "the positive [-1, 0]"),
        ({"positives": [[10**4000, 0]]}, "the positive"),
        ({"positives": [[0, 0], [0, 0]]}, "[0, 0] twice"),
        ({"id": 7}, "the id 7"),
        ({"id": ""}, "the id ''"),
        ({"tags": "predicate"}, "tags 'predicate'"),
        ({"tags": [None]}, "the entry of tags None"),
        ({"label": 1}, "the key 'label'"),
    ],
)
def test_an_error_names_file_line_and_value(folder, change, got):
    path = write(folder, f"{json.dumps({**ENTRY, 'id': 'first'})}\n\n{json.dumps({**ENTRY, **change})}\n")
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    message = str(error.value)
    assert got in message
    assert re.fullmatch(r".*manifest\.jsonl:3: got .*, expected .*; .*", message), message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("content", "line", "got"),
    [
        (b"{", 1, "broken JSON"),
        (b"[1, 2]", 1, "got [1, 2]"),
        (b"\n\n\xff", 3, "the byte 0xff"),
        (b"\xef\xbb\xbf\n{\xff", 2, "the byte 0xff"),
        (b"\n" + b"[" * 100_000, 2, "too deep"),
        (b"9" * 5000, 1, "too large"),
        (b'{"id": "1", "id": "2"}', 1, "the key 'id' twice"),
        (b'{"images": ["a.png"], "texts": ["a"]}', 1, "no key 'positives'"),
        ((json.dumps(ENTRY) + "\n" + json.dumps(ENTRY)).encode(), 2, "the id '7' again"),
    ],
)
def test_broken_lines(folder, content, line, got):
    with pytest.raises(ManifestError, match=re.escape(f"manifest.jsonl:{line}: got ")) as error:
        read_manifest(write(folder, content))
    assert got in str(error.value)


def test_files_that_are_no_manifest(folder):
    with pytest.raises(ManifestError, match=r"nothing\.jsonl: got no such file"):
        read_manifest(folder / "nothing.jsonl")
    with pytest.raises(ManifestError, match="got a folder"):
        read_manifest(folder)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest("a\0b")
    for name in ("manifest.jsonl", "empty.csv"):
        for content in ("", "\ufeff", "\n \n"):
            with pytest.raises(ManifestError, match=rf"{name}: got an empty file"):
                read_manifest(write(folder, content, name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.png", "..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ENTRY, "x"]), inner, max_size=3),
    max_leaves=6,
)


@property_test
@given(st.dictionaries(st.sampled_from(list(ENTRY)), json_values), st.booleans())
def test_any_json_parses_or_is_an_error(folder, change, ascii_only):
    line = json.dumps({**ENTRY, **change}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path = write(folder, line, "any.jsonl")
    try:
        (example,) = read_manifest(path)
    except ManifestError as error:
        message = str(error)
    else:
        assert list(example.texts) == change.get("texts", ENTRY["texts"])
        return
    assert message.startswith(f"{path}:1: got ")
    assert "\n" not in message


@property_test
@given(
    st.binary(max_size=60) | st.text('{}[]":,0ae \n', max_size=60).map(str.encode), st.sampled_from(["jsonl", "csv"])
)
def test_any_bytes_parse_or_are_an_error(folder, content, suffix):
    with pytest.raises(ManifestError, match=rf"bytes\.{suffix}(:\d+)?: got "):
        read_manifest(write(folder, content, f"bytes.{suffix}"))


# CSV and tables


def read_csv(folder, *rows, header="image,text,label"):
    return shape(read_manifest(write(folder, "\n".join((header, *rows)), "manifest.csv")))


def test_rows_of_an_image_are_a_text_choice(folder):
    rows = ("a.png,a cat,1", 'a.png,"a dog, a cow",0', "", "b.png,a cat,FALSE", "b.png,a cow,true", "a.png,one cat,1")
    assert read_csv(folder, *rows) == [
        ("2", ["a.png"], ["a cat", "a dog, a cow", "one cat"], [(0, 0), (0, 2)]),
        ("5", ["b.png"], ["a cat", "a cow"], [(0, 1)]),
    ]


def test_rows_of_a_text_are_an_image_choice(folder):
    # b.png has a right and a wrong text, but the texts account for every row
    rows = ("1,a cat,a.png", "0,a cat,b.png", "1,a dog,b.png", "0,a dog,c.png")
    assert read_csv(folder, *rows, header="label,text,image") == [
        ("2", ["a.png", "b.png"], ["a cat"], [(0, 0)]),
        ("4", ["b.png", "c.png"], ["a dog"], [(0, 0)]),
    ]


def test_what_is_left_joins_its_text_or_stands_alone(folder):
    rows = ("a.png,a cat,1", "a.png,a dog,0", "b.png,a cat,0", "c.png,a cow,1")
    assert read_csv(folder, *rows) == [
        ("2", ["a.png"], ["a cat", "a dog"], [(0, 0)]),
        ("4", ["a.png", "b.png"], ["a cat"], [(0, 0)]),
        ("5", ["c.png"], ["a cow"], [(0, 0)]),
    ]


@pytest.mark.parametrize(
    ("rows", "line", "got"),
    [
        (("image,text", "a.png,a"), 1, "no column 'label'"),
        (("image,text,label,score", "a.png,a,1,2"), 1, "the column 'score'"),
        (("image,text,label,text", "a.png,a,1,a"), 1, "the column 'text' twice"),
        (("", "image,text,label", "a.png,a,2"), 3, "the label '2'"),
        (("image,text,label", "a.png,a"), 2, "2 cells"),
        (("image,text,label", 'a.png,"a\nb",1', "a.png,,0"), 4, "the text ''"),
        (("image,text,label", 'a.png,"a"b,1'), 2, "broken CSV"),
        (("image,text,label", "a.png,a,1", 'a.png,"b'), 3, "broken CSV"),
        (("image,text,label", "../outside.png,a,1"), 2, "outside"),
        (("image,text,label", "a.png,a,1", "a.png,a,0"), 3, "the pair of line 2 again"),
        (("image,text,label", "a.png,a,1", "b.png,b,0"), 3, "label 0 for an image and a text ('b')"),
        (("image,text,label", "a.png," + "a" * 200_000 + ",1"), 2, "field larger"),
    ],
)
def test_csv_errors(folder, rows, line, got):
    with pytest.raises(ManifestError, match=re.escape(f"manifest.csv:{line}: got ")) as error:
        read_manifest(write(folder, "\n".join(rows), "manifest.csv"))
    assert got in str(error.value)


pairs = st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"))


@property_test
@given(st.dictionaries(pairs, st.booleans(), min_size=1))
def test_no_row_is_dropped(folder, labels):
    rows = [f"{image}.png,{text},{int(label)}" for (image, text), label in labels.items()]
    try:
        examples = read_csv(folder, *rows)
    except ManifestError as error:
        number = int(re.search(r"manifest\.csv:(\d+)", str(error)).group(1))
        image, text = list(labels)[number - 2]
        # alone, with nothing right beside it
        assert not any(label for (i, t), label in labels.items() if image == i or text == t)
        return
    seen = {}
    for _, images, texts, positives in examples:
        assert len(images) == 1 or len(texts) == 1
        for i, image in enumerate(images):
            for j, text in enumerate(texts):
                assert seen.setdefault((image[0], text), (i, j) in positives) == ((i, j) in positives)
    assert seen == labels
    assert len({name for name, *_ in examples}) == len(examples)


def test_tables_have_the_columns_of_a_csv(folder):
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    rows = [
        {"image": red, "text": "red", "label": 1},
        {"image": red.copy(), "text": "blue", "label": np.int64(0)},  # decoded anew for each row
        {"image": np.asarray(blue), "text": "red", "label": False},
        {"image": np.asarray(blue), "text": "blue", "label": "true"},
    ]
    first, second = read_table(iter(rows))
    assert first == Example("1", (red,), ("red", "blue"), ((0, 0),))
    assert (second.id, second.texts, second.positives) == ("3", ("red", "blue"), ((0, 1),))
    (example,) = read_table([{"image": "a.png", "text": "red", "label": 1}], folder=folder)
    assert example.images == (str(folder / "a.png"),)
    assert read_table([{"image": folder / "a.png", "text": "red", "label": 1}])[0].images == example.images


@pytest.mark.parametrize(
    ("row", "got"),
    [
        ({"image": None}, "the image None"),
        ({"image": {"bytes": b"", "path": None}}, "the image {"),
        ({"image": np.zeros((4, 4))}, "an image array of float64"),
        ({"image": "../outside.png"}, "outside"),
        ({"text": 3}, "the text 3"),
        ({"label": 1.0}, "the label 1.0"),
        ({"label": 10**5000}, "the label"),
        ({"split": "x"}, "the column 'split'"),
    ],
)
def test_table_errors(folder, row, got):
    good = {"image": "a.png", "text": "red", "label": 1}
    with pytest.raises(ManifestError, match=r"^pets:2: got ") as error:
        read_table([good, {**good, **row}], "pets", folder)
    assert got in str(error.value)
    with pytest.raises(ManifestError, match="pets: got no rows"):
        read_table([], "pets")
    with pytest.raises(ManifestError, match="pets:1: got 3"):
        read_table([3], "pets")


# Writing


@pytest.mark.parametrize("task", ["comvg", "vqa"])
def test_what_is_written_is_read(tmp_path, task):
    examples = world_task(task, "test", "easy", 4, 0)
    path = write_manifest(examples, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "manifest.jsonl"
    for before, after in zip(examples, read_manifest(path), strict=True):
        assert (after.id, after.texts, after.positives, after.tags) == (
            before.id, before.texts, before.positives, before.tags,
        )  # fmt: skip
        for image, file in zip(before.images, after.images, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(file)))
    again = write_manifest(read_manifest(path), path.parent)
    assert read_manifest(again) == read_manifest(path)
    assert {p.name for p in path.parent.iterdir()} == {"images", "manifest.jsonl"}


def test_images_of_every_kind_are_saved(folder, tmp_path):
    images = (np.full((2, 3, 3), 9, np.uint8), Image.new("CMYK", (2, 2)), str(folder / "a.png"), folder / "link.png")
    read = read_manifest(write_manifest([Example("1", images, ("\u2028 é",), ((3, 0),))], tmp_path))[0]
    assert all(file.startswith(str(tmp_path / "images")) for file in read.images)
    assert np.array_equal(np.asarray(Image.open(read.images[0])), images[0])
    assert read.texts == ("\u2028 é",)


@pytest.mark.parametrize(
    ("example", "got"),
    [
        (Example("1", ("no.png",), ("a",), ((0, 0),)), "no file"),
        (Example("1", (np.zeros((2, 2)),), ("a",), ((0, 0),)), "an image array"),
        (Example("1", (3,), ("a",), ((0, 0),)), "the image 3"),
        (Example("1", (np.zeros((2, 2, 3), np.uint8),), ("\udc00",), ((0, 0),)), "the text"),
        (Example("0", (np.zeros((2, 2, 3), np.uint8),), ("a",), ((0, 0),)), "the id '0' again"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_manifest(tmp_path, example, got):
    good = Example("0", (np.zeros((2, 2, 3), np.uint8),), ("a",), ((0, 0),))
    before = write_manifest([good], tmp_path).read_bytes()
    with pytest.raises(ManifestError, match=r"manifest\.jsonl:2: got ") as error:
        write_manifest([good, example], tmp_path)
    assert got in str(error.value)
    assert (tmp_path / "manifest.jsonl").read_bytes() == before


def test_places_that_cannot_be_written_to(tmp_path):
    good = Example("0", (np.zeros((2, 2, 3), np.uint8),), ("a",), ((0, 0),))
    (tmp_path / "file").write_text("")
    with pytest.raises(ManifestError, match="cannot be written to"):
        write_manifest([good], tmp_path / "file")
    for name in ("../manifest.jsonl", "manifest.csv"):
        with pytest.raises(ManifestError, match="got the name"):
            write_manifest([good], tmp_path, name)
    with pytest.raises(ManifestError, match="got no examples"):
        write_manifest([], tmp_path)
