"""The command line: exit status, one line for whoever got something wrong, JSON that keeps its contract."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from dsd import adapt, prompts
from dsd.adapters import Adapter
from dsd.backbone import Backbone, load_backbone
from dsd.cli import main, options
from dsd.jury import FEWEST
from dsd.learn import FitConfig, Learner
from dsd.scores import SCORES, ScoreConfig
from dsd.tasks import read_manifest
from models import picture, save_adapter

Pipe = Callable[..., str]
FINITE = pytest.approx(0, abs=1e6)


class Command:
    """Runs ``dsd`` in this process on a small model."""

    def __init__(self, model: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.capsys = model, capsys

    def __call__(self, *argv: object) -> tuple[int, str, str]:
        """(exit status, stdout, stderr)."""
        self.capsys.readouterr()
        try:
            status = main([str(a) for a in argv])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        return status, *self.capsys.readouterr()

    def json(self, command: str, *argv: object) -> dict[str, Any]:
        status, out, err = self(command, *argv, "--model", self.model, "--format", "json")
        assert (status, err) == (0, "")
        found: dict[str, Any] = json.loads(out)
        return found

    def refused(self, command: str, *argv: object) -> str:
        """The one line of a request that cannot be met."""
        given = () if "--model" in argv or command in ("world", "negatives") else ("--model", self.model)
        status, out, err = self(command, *argv, *given)
        assert status == 2, err
        assert out == ""
        assert err.startswith(f"dsd {command}: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err


@cache
def loaded(model: str, **options: Any) -> Backbone:
    return load_backbone(model, **options)


def bare(model: str, **options: Any) -> Backbone:
    """The model, loaded once for all commands of this process; what one of them attached is gone."""
    backbone = loaded(model, **options)
    prompts.detach(backbone.denoiser)
    return backbone


@pytest.fixture
def dsd(pipe: Pipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setattr("dsd.matcher.load_backbone", bare)
    return Command(pipe(), capsys)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    picture(0, 20).save(path)
    return path


# Images


def saved(folder: Path, name: str, picture: Image.Image, **options: Any) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def rotated(folder: Path) -> Path:
    """Stored lying, with the note that it is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(folder, "e.png", picture(0, 20).transpose(Image.Transpose.ROTATE_90), exif=exif)


def deep(folder: Path) -> Path:
    return saved(folder, "16.png", Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)))


GOOD: dict[str, Callable[[Path], Path]] = {
    "one pixel": lambda f: saved(f, "1.png", Image.new("RGB", (1, 1), "red")),
    "one row": lambda f: saved(f, "row.png", picture(0, 40).crop((0, 0, 40, 1))),
    "16 bits": deep,
    "CMYK": lambda f: saved(f, "c.jpg", picture(0).convert("CMYK")),
    "palette": lambda f: saved(f, "p.gif", picture(0).quantize(8)),
    "transparency": lambda f: saved(f, "t.png", picture(0).convert("RGBA")),
    "two levels": lambda f: saved(f, "b.png", picture(0).convert("1")),
    "animation": lambda f: saved(f, "a.gif", picture(0), save_all=True, append_images=[picture(1)]),
    "WebP": lambda f: saved(f, "w.webp", picture(0)),
    "turned": rotated,
    "name with spaces and emoji": lambda f: saved(f, "ein Bild 🐕.png", picture(0)),
}


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD.keys())
def test_images_of_all_kinds_are_scored(dsd: Command, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    found = dsd.json("score", path, "--text", "a dog", "--timesteps", "300")
    assert found["images"] == [str(path)]
    assert found["scores"] == [[FINITE]]


def test_orientation_and_first_frame_are_heeded(dsd: Command, tmp_path: Path) -> None:
    paths = [
        saved(tmp_path, "upright.png", picture(0, 20)),
        rotated(tmp_path),
        saved(tmp_path, "still.png", picture(0).quantize(256).convert("RGB")),
        saved(tmp_path, "a.gif", picture(0).quantize(256), save_all=True, append_images=[picture(1)]),
        saved(tmp_path, "lying.png", picture(0, 20).transpose(Image.Transpose.ROTATE_90)),
    ]
    found = dsd.json("score", *paths, "--text", "a dog", "--timesteps", "300")["scores"]
    scores = [row[0] for row in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[2] == pytest.approx(scores[3], abs=1e-5)
    assert abs(scores[0] - scores[4]) > 1e-4


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def truncated(folder: Path) -> Path:
    path = saved(folder, "cut.png", picture(0, 64))
    return written(folder, "cut.png", path.read_bytes()[:-400])


def huge(folder: Path) -> Path:
    """The head of a PNG of 20,000 x 20,000 pixels; decoding would take 1.2 GB."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return written(folder, "huge.png", data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "none.png", "no such file"),
    "folder": (lambda f: f, "folder"),
    "truncated": (truncated, "broken"),
    "empty": (lambda f: written(f, "e.png", b""), "empty"),
    "text": (lambda f: written(f, "t.png", b"no picture at all"), "another kind"),
    "SVG": (lambda f: written(f, "s.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "another kind"),
    "huge": (huge, "pixels"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("command", ["score", "rank"])
def test_bad_images_are_refused(
    dsd: Command, image: Path, tmp_path: Path, command: str, make: Callable[[Path], Path], reason: str
) -> None:
    path = make(tmp_path)
    line = dsd.refused(command, image, path, "--text", "a dog")
    assert str(path) in line
    assert reason in line
    assert "expected" in line


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_file_names_that_are_no_unicode(dsd: Command, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.png")
    try:
        picture(0).save(path)
    except OSError:
        pytest.skip("the file system takes Unicode names only")
    assert dsd.json("score", path, "--text", "cat", "--timesteps", "300")["images"] == [str(path)]
    status, out, err = dsd("score", path, "--text", "cat", "--timesteps", "300", "--model", dsd.model)
    assert (status, err) == (0, "")
    assert "cat" in out


@pytest.mark.parametrize("form", ["json", "text"])
def test_output_that_takes_ascii_alone(pipe: Pipe, image: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    argv = ["score", image, "--text", "🐕 قطة", "--timesteps", "300", "--model", pipe(), "--format", form]
    assert main(list(map(str, argv))) == 0
    stdout.seek(0)
    printed = stdout.read()
    assert printed
    if form == "json":
        assert json.loads(printed)["texts"] == ["🐕 قطة"]


# Captions


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u3000"])
@pytest.mark.parametrize("command", ["score", "rank"])
def test_blank_captions_are_refused(dsd: Command, image: Path, command: str, text: str) -> None:
    assert "at least one word" in dsd.refused(command, image, "--text", "a dog", "--text", text)


def test_captions_that_are_no_unicode_are_refused(dsd: Command, image: Path) -> None:
    assert "Unicode" in dsd.refused("score", image, "--text", os.fsdecode(b"a \xff dog"))


CAPTIONS = {
    "3,000 words": "word " * 3000,
    "right to left": "قطة حمراء فوق كلب أزرق",
    "emoji": "🐕‍🦺 👩‍👩‍👧 ❤️",
    "accents": "naïve façade — “quoted”",
    "several lines": "a dog\nand a cat",
    "marks": "...!?",
    "tokens": "<|endoftext|> <|startoftext|>",
    "looks like an option": "-- a dog",
}


@pytest.mark.parametrize("text", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_captions_of_all_kinds_are_scored(dsd: Command, image: Path, text: str) -> None:
    found = dsd.json("score", image, f"--text={text}", "--text", "cat", "--timesteps", "300")
    assert found["texts"] == [text, "cat"]
    assert found["scores"] == [[FINITE, FINITE]]


# Results


def test_scores_keep_the_contract(dsd: Command, image: Path, tmp_path: Path) -> None:
    other = saved(tmp_path, "b.png", picture(1))
    argv = (image, other, "--text", "a dog", "--text", "cat", "--text", "a dog")
    found = dsd.json("score", *argv, "--score", "attention", "--steps", "2", "--seed", "4")
    assert found["images"] == [str(image), str(other)]
    assert found["texts"] == ["a dog", "cat", "a dog"]
    assert found["scores"] == [[FINITE] * 3] * 2
    assert found["score"] == {"kind": "attention", "timesteps": [250, 750], "seed": 4}
    assert found["model"] == dsd.model
    for row in found["scores"]:
        assert row[0] == pytest.approx(row[2], abs=1e-5)
        assert row[0] != row[1]
    status, out, err = dsd("score", *argv, "--model", dsd.model, "--score", "attention", "--steps", 2, "--seed", 4)
    assert (status, err) == (0, "")
    for row in found["scores"]:
        assert f"{row[1]:.4f}" in out


def test_rankings_are_the_scores_best_first(dsd: Command, image: Path, tmp_path: Path) -> None:
    texts = [a for t in ("a dog", "cat", "a blue square") for a in ("--text", t)]
    scores = dsd.json("score", image, *texts)["scores"][0]
    ranking = dsd.json("rank", image, *texts)["ranking"]
    assert [r["rank"] for r in ranking] == [1, 2, 3]
    assert [r["index"] for r in ranking] == sorted(range(3), key=lambda i: -scores[i])
    assert [r["text"] for r in ranking] == [texts[2 * r["index"] + 1] for r in ranking]
    assert [r["score"] for r in ranking] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)
    other = saved(tmp_path, "b.png", picture(1))
    images = dsd.json("rank", image, other, "--text", "cat")["ranking"]
    assert {r["image"] for r in images} == {str(image), str(other)}
    assert images[0]["score"] >= images[1]["score"]
    status, out, _ = dsd("rank", image, *texts, "--model", dsd.model)
    assert status == 0
    lines = out.splitlines()
    assert [next(t for t in texts[1::2] if t in line) for line in lines[-3:]] == [r["text"] for r in ranking]


def test_rankings_on_a_budget(dsd: Command, image: Path, tmp_path: Path) -> None:
    texts = tmp_path / "captions.txt"
    texts.write_text("a dog\n\n  a cat \na blue square\na red circle\n", "utf-8")
    whole = dsd.json("rank", image, "--texts", texts, "--timesteps", "100,300,500,700")
    assert {r["text"] for r in whole["ranking"]} == {"a dog", "a cat", "a blue square", "a red circle"}
    assert "budget" not in whole
    assert "passes" not in whole["ranking"][0]
    argv = ("rank", image, "--texts", texts, "--timesteps", "100,300,500,700")
    found = dsd.json(*argv, "--budget", "12", "--error", "0.2")
    assert found["budget"] == {"passes": 12, "error": 0.2}
    assert sum(r["passes"] for r in found["ranking"]) <= 12
    assert found["ranking"][-1]["interval"] is None or found["ranking"][-1]["passes"] > 1
    sure = dsd.json(*argv, "--error", "1e-300")
    assert [r["index"] for r in sure["ranking"]] == [r["index"] for r in whole["ranking"]]
    few = dsd.json(*argv, "--first-stage", "caption-length", "--keep", "2", "--budget", "60s")
    assert {r["text"] for r in few["ranking"]} == {"a dog", "a cat"}
    assert few["first_stage"]["keep"] == 2
    status, out, _ = dsd(*argv, "--first-stage", "caption-length", "--keep", "2", "--model", dsd.model)
    assert status == 0
    assert "kept 2 of 4" in out
    status, out, _ = dsd(*argv, "--budget", "12", "--model", dsd.model)
    assert "interval" in out.splitlines()[0]
    assert "one pass for each" in dsd.refused(*argv, "--budget", "3")
    assert "such as 10s" in dsd.refused(*argv, "--budget", "soon")
    assert "probability" in dsd.refused(*argv, "--error", "2")
    assert "--first-stage" in dsd.refused(*argv, "--first-model", "clip")
    assert "keep 0" in dsd.refused(*argv, "--first-stage", "chance", "--keep", "0")
    texts.write_text("\n")
    assert "no captions" in dsd.refused(*argv)
    assert "UTF-8" in dsd.refused("rank", image, "--texts", tmp_path / "nonesuch.txt")


def test_many_images_and_many_texts_have_no_ranking(dsd: Command, image: Path) -> None:
    assert "dsd score" in dsd.refused("rank", image, image, "--text", "a", "--text", "b")


def test_options_reach_the_score(dsd: Command, image: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=(2, 4, 12, 12)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    argv = (image, "--text", "a dog", "--timesteps", "100,800", "--size", "24", "--score", "paper-attention")
    found = dsd.json("score", *argv, "--noise", tmp_path / "noise.npy", "--layers", "mid_block", "--batch-size", "1")
    from dsd import Matcher

    expected = Matcher.from_pretrained(
        dsd.model, score="paper-attention", timesteps=(100, 800), layers=("mid_block",), size=24, noise=noise
    ).score(image, "a dog")
    assert found["scores"] == [[pytest.approx(float(expected.scores[0, 0]), abs=1e-5)]]
    assert found["size"] == 24
    assert len(found["layers"]) == 1
    assert found["scores"] != dsd.json("score", *argv)["scores"]


@pytest.mark.parametrize("kind", SCORES)
def test_every_kind_of_score(dsd: Command, image: Path, kind: str) -> None:
    found = dsd.json("score", image, "--text", "cat", "--score", kind, "--timesteps", "500")
    assert found["score"]["kind"] == kind
    assert found["scores"] == [[FINITE]]


# Options


def array(folder: Path, value: Any, name: str = "noise.npy") -> Path:
    np.save(folder / name, value, allow_pickle=True)
    return folder / name


NOISE: dict[str, Callable[[Path], Path]] = {
    "missing": lambda f: f / "none.npy",
    "folder": lambda f: f,
    "wrong shape": lambda f: array(f, np.zeros((4, 4, 64, 64), np.float32)),
    "too few": lambda f: array(f, np.zeros((3, 4, 8, 8), np.float32)),
    "integers": lambda f: array(f, np.zeros((4, 4, 8, 8), int)),
    "not a number": lambda f: array(f, np.full((4, 4, 8, 8), np.nan)),
    "pickle": lambda f: array(f, np.array([{"a": 1}], dtype=object)),
    "text": lambda f: written(f, "noise.npy", b"0.1 0.2 0.3"),
    "empty": lambda f: written(f, "noise.npy", b""),
    "cut": lambda f: written(f, "cut.npy", array(f, np.zeros((4, 4, 8, 8))).read_bytes()[:500]),
    "archive": lambda f: (np.savez(f / "a.npz", a=np.zeros(3)), f / "a.npz")[1],
    "broken archive": lambda f: written(f, "b.npy", b"PK\x03\x04 and no more"),
}


@pytest.mark.parametrize("make", NOISE.values(), ids=NOISE.keys())
def test_bad_noise(dsd: Command, image: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    line = dsd.refused("score", image, "--text", "cat", "--noise", path)
    assert "noise" in line or str(path) in line


OPTIONS = {
    "--model nonesuch": "nonesuch",
    "--model /nonesuch/folder": "/nonesuch/folder",
    "--adapter /nonesuch": "/nonesuch",
    "--device nonsense": "nonsense",
    "--device cpu:banana": "cpu:banana",
    "--device meta": "meta",
    "--size 0": "size 0",
    "--size 7": "size 7",
    "--size 8193": "8193",
    "--size -16": "-16",
    "--timesteps 1000": "1000",
    "--timesteps 5,-3": "-3",
    "--steps 0": "0 steps",
    "--steps 1001": "1001",
    "--steps -2": "-2",
    "--seed -1": "-1",
    "--seed 99999999999999999999": "99999999999999999999",
    "--batch-size 0": "batch size 0",
    "--score attention --layers nonesuch": "nonesuch",
    "--score attention --direction text": "direction 'text'",
    "--score attention --layers mid_block,": "''",
}


@pytest.mark.parametrize(("options", "named"), OPTIONS.items(), ids=OPTIONS.keys())
def test_options_out_of_range(dsd: Command, image: Path, options: str, named: str) -> None:
    line = dsd.refused("score", image, "--text", "cat", *options.split(" "))
    assert named in line
    assert "expected" in line


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "nonesuch",
        "score",
        "score a.png",
        "score --text cat",
        "score a.png --text cat --timesteps 1,two",
        "score a.png --text cat --timesteps=",
        "score a.png --text cat --timesteps 1 --steps 2",
        "score a.png --text cat --steps many",
        "score a.png --text cat --size big",
        "score a.png --text cat --score nonesuch",
        "score a.png --text cat --dtype int8",
        "score a.png --text cat --format xml",
        "score a.png --text cat --nonesuch",
        "rank a.png",
        "fit",
        "fit m.jsonl",
        "fit m.jsonl --out d --adapter x",
        "curve m.jsonl --held-out h.jsonl",
        "curve comvg --out d --shots few",
        "curve comvg --out d --adapter x",
        "eval",
        "compare a.json",
        "eval comvg --limit some",
        "eval comvg --level silly",
        "eval comvg --count many",
        "world comvg",
        "world nonesuch --out d",
        "explain a.png --text cat",
    ],
)
def test_arguments_that_make_no_command(dsd: Command, argv: str) -> None:
    status, out, err = dsd(*argv.split())
    assert status == 2
    assert out == ""
    assert "usage: dsd" in err
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    ["score", "rank", "negatives", "fit", "curve", "eval", "compare", "export", "models", "world", "explain", "demo"],
)
def test_every_command_has_help(dsd: Command, command: str) -> None:
    status, out, err = dsd(command, "--help")
    assert (status, err) == (0, "")
    assert f"usage: dsd {command}" in out


def test_help_says_how_learning_is_by_default() -> None:
    parser = argparse.ArgumentParser()
    options.learning_options(parser)
    said = {a.dest: re.search(r"\(default: (\d[\d.]*)", a.help or "") for a in parser._actions}
    learning, placing = FitConfig(), prompts.PromptConfig()
    known = {name: getattr(learning, field) for name, field in options.LEARNING.items() if name in said}
    known |= {"rank": placing.rank, "prompt_scale": placing.scale, "tokens": adapt.SOFT_TOKENS}
    told = {name: float(of[1]) for name, of in said.items() if of is not None}
    told.pop("negatives")  # that many, or none
    assert told == {name: value for name, value in known.items() if value is not None}


# Manifests


LETTERS = "abcdefghijkl"
LINE = {"images": ["a.png", "b.png"], "texts": ["cat", "dog"], "positives": [[0, 0], [1, 1]], "tags": ["pets"]}


def manifest(folder: Path, *lines: Any, name: str = "m.jsonl") -> Path:
    """A manifest, and the pictures that it is about."""
    for i, letter in enumerate(LETTERS):
        picture(i).save(folder / f"{letter}.png")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / name).write_text(text + "\n", "utf-8")
    return folder / name


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"images": ["a.png"', "JSON"),
    "a list": ("[1, 2]", "JSON object"),
    "wrong image": ({**LINE, "positives": [[2, 0]]}, "image below 2"),
    "wrong text": ({**LINE, "positives": [[0, -1]]}, "text below 2"),
    "no positives": ({**LINE, "positives": []}, "positives"),
    "missing key": ({"images": ["a.png"], "positives": [[0, 0]]}, "texts"),
    "unknown key": ({**LINE, "captions": []}, "captions"),
    "images no list": ({**LINE, "images": "a.png"}, "images"),
    "missing image": ({**LINE, "images": ["a.png", "none.png"]}, "none.png"),
    "path outside": ({**LINE, "images": ["a.png", "../b.png"]}, "outside"),
    "absolute path": ({**LINE, "images": ["a.png", "/etc/hostname"]}, "outside"),
    "blank caption": ({**LINE, "texts": ["cat", " "]}, "text"),
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("command", ["eval", "fit"])
def test_broken_manifest_is_told_by_file_and_line(
    dsd: Command, tmp_path: Path, command: str, line: Any, reason: str
) -> None:
    path = manifest(tmp_path, *[LINE] * 6, line, LINE)
    options = ("--out", tmp_path / "adapter") if command == "fit" else ()
    found = dsd.refused(command, path, *options)
    assert f"{path}:7: " in found
    assert reason in found


def test_broken_validation_manifest(dsd: Command, tmp_path: Path) -> None:
    good, bad = manifest(tmp_path, LINE), manifest(tmp_path, "{", name="v.jsonl")
    assert f"{bad}:1: " in dsd.refused("fit", good, "--val", bad, "--out", tmp_path / "adapter")


@pytest.mark.parametrize("name", ["none.jsonl", "", "none.csv"])
def test_missing_manifest(dsd: Command, tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in dsd.refused("eval", tmp_path / name)


def test_manifest_with_a_broken_image(dsd: Command, tmp_path: Path) -> None:
    path = manifest(tmp_path, LINE)
    written(tmp_path, "b.png", b"no picture")
    assert "b.png" in dsd.refused("eval", path)


def test_manifest_without_a_choice(dsd: Command, tmp_path: Path) -> None:
    single = {"images": ["a.png"], "texts": ["cat"], "positives": [[0, 0]]}
    path = manifest(tmp_path, single, {**single, "images": ["b.png"]})
    dsd.refused("eval", path)
    assert "nothing competes" in dsd.refused("fit", path, "--out", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Evaluation


def test_evaluation_keeps_the_contract(dsd: Command, tmp_path: Path) -> None:
    choice = {"images": ["c.png"], "texts": ["cat", "dog", "a blue square"], "positives": [[0, 2]], "tags": ["text"]}
    path = manifest(tmp_path, LINE, choice, {**LINE, "images": ["c.png", "d.png"]})
    argv = (path, "--score", "attention", "--timesteps", "300")
    found = dsd.json("eval", *argv, "--out", tmp_path / "sub" / "result.json")
    assert set(found["metrics"]["accuracy"]) == {"value", "low", "high", "n"}
    assert found["metrics"]["accuracy"]["n"] == 3
    for name, metric in found["metrics"].items():
        most = 3 if name == "mean-rank" else 1
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= most
    assert (found["ties"], found["nans"]) == (0, 0)
    assert found["request"]["source"] == {"manifest": "m.jsonl"}
    assert set(found["by_tag"]) == {"pets", "text"}
    assert found["by_tag"]["text"]["accuracy"]["n"] == 1
    assert found["config"]["score"]["kind"] == "attention"
    whole = json.loads((tmp_path / "sub" / "result.json").read_text())
    assert whole["metrics"] == found["metrics"]
    assert [len(e["scores"]) for e in whole["examples"]] == [2, 1, 2]
    status, out, err = dsd("eval", *argv, "--model", dsd.model)
    assert (status, err) == (0, "")
    assert "accuracy" in out
    assert "pets" in out


def test_evaluation_of_csv_with_images_elsewhere(dsd: Command, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    manifest(tmp_path / "pictures", LINE)
    table = tmp_path / "m.csv"
    table.write_text("image,text,label\na.png,cat,1\na.png,dog,0\n")
    argv = (table, "--timesteps", "300")
    assert "a.png" in dsd.refused("eval", *argv)
    assert dsd.json("eval", *argv, "--data", tmp_path / "pictures")["metrics"]["accuracy"]["n"] == 1


def test_evaluation_of_the_world(dsd: Command, tmp_path: Path) -> None:
    options = ("--level", "easy", "--count", "4", "--seed", "3")
    direct = dsd.json("eval", "comvg", *options, "--timesteps", "300")
    assert direct["metrics"]["accuracy"]["n"] == 4
    status, out, err = dsd("world", "comvg", *options, "--out", tmp_path / "world")
    assert (status, err) == (0, "")
    path = Path(out.strip())
    assert path == tmp_path / "world" / "manifest.jsonl"
    saved = dsd.json("eval", path, "--seed", "3", "--timesteps", "300")
    assert saved["metrics"] == direct["metrics"]
    assert saved["dataset"] == direct["dataset"]


def test_requests_to_the_world_that_cannot_be_met(dsd: Command, tmp_path: Path) -> None:
    assert "--data" in dsd.refused("eval", "vqa", "--data", tmp_path)
    assert "pretraining" in dsd.refused("eval", "comvg", "--split", "pretraining")
    assert "-1" in dsd.refused("eval", "comvg", "--count", "-1")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "sub"):
        assert "file" in dsd.refused("world", "comvg", "--count", "1", "--level", "easy", "--out", out)


def test_result_that_cannot_be_saved(dsd: Command, tmp_path: Path) -> None:
    path = manifest(tmp_path, LINE)
    (tmp_path / "file").touch()
    line = dsd.refused("eval", path, "--timesteps", "300", "--out", tmp_path / "file" / "result.json")
    assert "result.json" in line


def test_evaluation_of_a_benchmark(dsd: Command, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "images" / f"ex_{i}.png")
    rows = [
        {"id": i, "image_0": f"ex_{2 * i}", "image_1": f"ex_{2 * i + 1}", "caption_0": "a dog", "caption_1": "a cat"}
        | {"tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
        for i in range(2)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = dsd.json("eval", "winoground", "--data", tmp_path, "--timesteps", "300")
    assert found["metrics"]["group"]["n"] == 2
    assert found["by_tag"]["Object"]["group"]["n"] == 2
    assert found["request"]["source"] == {"benchmark": "winoground", "split": "test"}
    assert "val" in dsd.refused("eval", "winoground", "--data", tmp_path, "--split", "val")
    assert "--data" in dsd.refused("eval", "sugarcrepe")


def test_some_of_the_examples(dsd: Command, tmp_path: Path) -> None:
    choice = {"texts": ["cat", "dog"], "positives": [[0, 0]]}
    path = manifest(tmp_path, *[{**choice, "images": [f"{letter}.png"]} for letter in "abcd"])
    found = dsd.json("eval", path, "--limit", "2", "--timesteps", "300", "--out", tmp_path / "r.json")
    assert found["metrics"]["accuracy"]["n"] == 2
    assert found["request"]["source"]["limit"] == 2
    same = dsd.json("eval", path, "--limit", "2", "--timesteps", "500", "--seed", "7")
    assert same["dataset"] == found["dataset"]
    for limit in ("0", "5", "-1"):
        assert f"got {limit} examples" in dsd.refused("eval", path, "--limit", limit)


def test_evaluation_into_a_folder_goes_on(dsd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    task = ("comvg", "--level", "easy", "--count", "30", "--timesteps", "300")
    from dsd import Matcher

    scored, calls = Matcher.predict, []

    def predict(self: Matcher, pairs: Any, **options: Any) -> Any:
        calls.append(len(pairs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scored(self, pairs, **options)

    monkeypatch.setattr(Matcher, "predict", predict)
    status, _, err = dsd("eval", *task, "--out", tmp_path / "run", "--model", dsd.model)
    assert (status, err) == (130, "dsd eval: stopped\n")
    found = dsd.json("eval", *task, "--out", tmp_path / "run")
    assert sum(calls) > calls[0] + calls[1] == 8 + calls[1]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "report.html",
        "request.json",
        "result.json",
        "scores.parquet",
    ]
    direct = dsd.json("eval", *task, "--out", tmp_path / "direct.json")
    assert {**found, "seconds": 0} == {**direct, "seconds": 0}
    examples = json.loads((tmp_path / "direct.json").read_text())["examples"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["examples"] == examples
    table = parquet.read_table(tmp_path / "run" / "scores.parquet")
    assert table["score"].to_pylist() == [s for e in examples for row in e["scores"] for s in row]
    before = len(calls)
    assert dsd.json("eval", *task, "--out", tmp_path / "run") == found
    assert len(calls) == before
    assert "config" in dsd.refused("eval", *task[:-1], "500", "--out", tmp_path / "run")
    compared = dsd("compare", tmp_path / "run", tmp_path / "direct.json", "--format", "json")
    assert json.loads(compared[1])["mcnemar"]["p"] == 1


def test_folders_of_results_need_pyarrow(dsd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = manifest(tmp_path, LINE)
    with monkeypatch.context() as patch:
        patch.setattr("dsd.evaluate.find_spec", lambda name: None)
        assert "pip install" in dsd.refused("eval", path, "--out", tmp_path / "run")
        patch.setattr("dsd.evaluate.find_spec", lambda name: name)
        (tmp_path / "file").touch()
        assert ".json" in dsd.refused("eval", path, "--out", tmp_path / "file")
    assert not (tmp_path / "run").exists()


def test_the_cost_of_a_long_evaluation_is_told(dsd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.cli.measuring.LONG", 0)
    task = ("eval", "comvg", "--level", "easy", "--count", "30", "--timesteps", "300,500", "--model", dsd.model)
    for score, images in (("denoising", True), ("attention", False)):
        status, _, err = dsd(*task, "--score", score)
        assert status == 0
        (line,) = err.splitlines()
        words = line.replace(",", "").split()
        pairs = int(words[words.index("of") + 1]) - int(words[2])
        passes = 2 * (pairs + (int(words[words.index("images") - 1]) if images else 0))
        assert f"about {passes} denoiser passes" in line.replace(",", "")
        assert "judging by 24 pairs" in line


def test_learning_before_measuring(dsd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.evaluate.find_spec", lambda name: None)
    task = ("eval", "comvg", "--level", "easy", "--count", "6", "--timesteps", "300")
    how = ("--score", "attention", "--max-steps", "2", "--hold-out", "0.5", "--shots", "12", "--shot-seed", "3")
    found = dsd.json(*task, *how)
    few = found["request"]["few_shot"]
    assert (few["shots"], few["seed"], few["fit"]["seed"], few["fit"]["steps"]) == (12, 3, 3, 2)
    training = found["config"]["adapter"]["training"]
    assert (training["examples"], training["validation_examples"]) == (6, 6)
    assert "ece" in found["metrics"]
    assert dsd.json(*task, "--shots", "0")["config"]["adapter"] is None


def test_learning_before_measuring_goes_on(dsd: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    choice = {"texts": ["cat", "dog"], "positives": [[0, 0]]}
    (tmp_path / "train").mkdir()
    train = manifest(tmp_path / "train", *[{**choice, "images": [f"{letter}.png"]} for letter in LETTERS])
    task = ("comvg", "--level", "easy", "--count", "6", "--timesteps", "300", "--train", train, "--shots", "12")
    how = ("--score", "attention", "--max-steps", "2", "--hold-out", "0.5")
    whole = dsd.json("eval", *task, *how, "--out", tmp_path / "whole")
    assert (tmp_path / "whole" / "adapter" / "adapter_model.safetensors").is_file()
    fitted, calls = Learner.step, []

    def stopped(self: Learner) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fitted(self)

    monkeypatch.setattr(Learner, "step", stopped)
    status, _, _ = dsd("eval", *task, *how, "--out", tmp_path / "run", "--model", dsd.model)
    assert status == 130
    monkeypatch.setattr("dsd.matcher.Matcher.predict", lambda *_, **__: np.zeros(1))  # too few: stops after the fit
    status, _, _ = dsd("eval", *task, *how, "--out", tmp_path / "run", "--model", dsd.model)
    assert status == 2
    monkeypatch.undo()
    monkeypatch.setattr("dsd.matcher.load_backbone", bare)
    monkeypatch.setattr("dsd.matcher.Matcher.fit", lambda *_, **__: pytest.fail("it was fitted before"))
    found = dsd.json("eval", *task, *how, "--out", tmp_path / "run")
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}
    assert "few_shot" in dsd.refused("eval", *task[:-1], "2", *how, "--out", tmp_path / "run")


def test_requests_to_learn_first_that_cannot_be_met(dsd: Command, tmp_path: Path) -> None:
    path = manifest(tmp_path, LINE, {**LINE, "images": ["c.png", "d.png"]})
    adapter = save_adapter(tmp_path / "adapter", dsd.model)
    assert "--train" in dsd.refused("eval", path, "--shots", "1")
    assert "--shots" in dsd.refused("eval", path, "--train", path)
    assert "got 3 examples" in dsd.refused("eval", "comvg", "--train", path, "--shots", "3")
    assert "both sides" in dsd.refused("eval", path, "--train", path, "--shots", "1")
    assert "both sides" in dsd.refused("eval", "vqa", "--split", "few-shot", "--count", "2", "--shots", "2")
    assert "--adapter" in dsd.refused("eval", path, "--shots", "1", "--train", path, "--adapter", adapter)


# Learning


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    """As many choices among two texts as it takes for what was learned to be kept."""
    choice = {"texts": ["cat", "dog"], "positives": [[0, 0]]}
    return manifest(tmp_path, *[{**choice, "images": [f"{letter}.png"]} for letter in LETTERS[:FEWEST]])


FEW = ("--max-steps", "2", "--timesteps", "300", "--score", "attention", "--rank", "1")


def test_learning_makes_an_adapter(dsd: Command, lesson: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "adapter"
    found = dsd.json(
        "fit", lesson, "--out", out, *FEW, "--learning-rate", "0.01", "--objective", "hinge", "--seed", "2"
    )
    assert found["adapter"] == str(out)
    assert (found["examples"], found["validation_examples"], found["turns"]) == (6, 6, 3)
    assert {"before", "after", "low", "high"} == set(found["validation"])
    assert (found["config"]["steps"], found["config"]["objective"], found["config"]["seed"]) == (2, "hinge", 2)
    assert [p["step"] for p in found["curve"]] == [0, 1, 2]
    assert list(out.parent.iterdir()) == [out]
    scored = dsd.json("score", image, "--text", "cat", "--adapter", out)
    assert scored["score"] == {"kind": "attention", "timesteps": [300], "seed": 2}
    assert "are learned from" in dsd.refused("fit", lesson, "--val", lesson, "--out", out, *FEW)
    lines = lesson.read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:3]), ("others", lines[3:])):
        lesson.with_name(f"{name}.jsonl").write_text("".join(part))
    few, others = (lesson.with_name(f"{name}.jsonl") for name in ("few", "others"))
    status, printed, err = dsd("fit", few, "--val", others, "--out", out, *FEW, "--model", dsd.model)
    assert (status, err) == (0, "")
    assert "So few held-out examples cannot show that learning helps (6 might)" in printed


def test_what_was_learned_is_said_to_be_judged_by_what_judged_it(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    lines = lesson.read_text().splitlines(keepends=True)
    parts = [lesson.with_name(name) for name in ("some.jsonl", "val.jsonl")]
    for part, own in zip(parts, (lines[:4], lines[4:]), strict=True):
        part.write_text("".join(own))
    for out, given, told in (("a", (), "on the same, held out by turns"), ("b", ("--val", parts[1]), "on 2 others")):
        how = ("--method", "weights", "--timesteps", "300", "--model", dsd.model)
        status, printed, _ = dsd("fit", parts[0], *given, "--out", tmp_path / out, *how)
        assert status == 0
        assert f"learned from 4 examples; {told}:" in printed
        card = (tmp_path / out / "README.md").read_text()
        assert ("held out by turns to validate" in card) == (not given)
        assert ("2 to validate" in card) == bool(given)


def test_place_for_the_adapter_is_checked_before_learning(
    dsd: Command, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("learned for nothing"))
    assert "something else" in dsd.refused("fit", lesson, "--out", tmp_path, *FEW)
    assert str(lesson) in dsd.refused("fit", lesson, "--out", lesson / "adapter", *FEW)


def test_learning_that_is_stopped(dsd: Command, lesson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "step", stop)
    status, out, err = dsd("fit", lesson, "--out", tmp_path / "adapter", *FEW, "--model", dsd.model)
    assert (status, out) == (130, "")
    assert err == "dsd fit: stopped\n"
    assert not (tmp_path / "adapter").exists()


def test_checkpoint_of_another_request(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    written(tmp_path, "adapter.checkpoint", b"something else")
    assert "adapter.checkpoint" in dsd.refused("fit", lesson, "--out", tmp_path / "adapter", "--resume", *FEW)


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "0"),
        ("--max-steps", "0"),
        ("--learning-rate", "-1"),
        ("--learning-rate", "nan"),
        ("--method", "magic"),
        ("--temperature", "0"),
        ("--patience", "0"),
    ],
)
def test_bad_options_of_learning(dsd: Command, lesson: Path, tmp_path: Path, options: tuple[str, str]) -> None:
    assert "expected" in dsd.refused("fit", lesson, "--out", tmp_path / "adapter", *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "weights", "--mix", "attention", "--rank", "2"), "got --mix, --rank with --method weights"),
        (("--method", "weights", "--objective", "hinge"), "got --objective with --method weights"),
        (("--margin", "0.2"), "got --margin with --objective softmax"),
        (("--objective", "hinge", "--temperature", "2"), "got --temperature with --objective hinge"),
        (("--tokens", "4"), "got --tokens with --method prompt"),
        (("--draws", "4"), "got --draws with --method prompt"),
        (("--val", "LESSON", "--hold-out", "0.2"), "got --hold-out with --val"),
        (("--val", "LESSON", "--folds", "2"), "got --folds with --val"),
    ],
)
def test_options_of_learning_that_would_be_idle(
    dsd: Command, lesson: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    given = [str(lesson) if option == "LESSON" else option for option in options]
    assert said in dsd.refused("fit", lesson, "--out", tmp_path / "adapter", *given)


def test_options_that_would_be_idle(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    for given, said in (
        (("--start", "tiny-captions"), "got --start without --shots"),
        (("--method", "weights"), "got --method without --shots"),
        (("--gradient-checkpointing",), "got --gradient-checkpointing without --shots"),
        (("--count", "5", "--novel"), "got --count, --novel with"),
        (("--split", "val"), "got --split with the manifest"),
    ):
        assert said in dsd.refused("eval", lesson, *given)
    more = ("--held-out", lesson, "--out", tmp_path / "curve")
    assert "got --level with" in dsd.refused("curve", lesson, *more, "--level", "easy")
    (tmp_path / "a.png").write_bytes(b"")
    assert "got --keep 3, expected --first-stage" in dsd.refused(
        "rank", tmp_path / "a.png", "--text", "a", "--text", "b", "--keep", "3"
    )


def test_learning_words(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    how = ("--max-steps", "2", "--timesteps", "300", "--score", "attention", "--model", dsd.model)
    start, out = save_adapter(tmp_path / "start", dsd.model), tmp_path / "adapter"
    options = ("--method", "prompt+words", "--words", "Cat, dog", "--learning-rate", "1e-9")
    status, _, err = dsd("fit", lesson, "--out", out, *how, *options, "--start", start)
    assert (status, err) == (0, "")
    assert Adapter.load(out).training["config"]["method"] == "prompt+words"
    assert Adapter.load(out).prompts == Adapter.load(start).prompts  # for nothing was learned
    again = ("fit", lesson, "--out", tmp_path / "other", *how)
    assert "got mauve to learn, which no caption has" in dsd.refused(*again, "--method", "words", "--words", "mauve")
    assert "got method 'prompt' and cat to learn" in dsd.refused(*again, "--words", "cat")
    assert "lower-case letters alone" in dsd.refused(*again, "--method", "words", "--words", "two words")
    assert "got method 'tokens' and cat to learn" in dsd.refused(*again, "--method", "tokens", "--words", "cat")


def test_learning_on_from_an_adapter(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    start, out = save_adapter(tmp_path / "start", dsd.model), tmp_path / "adapter"
    how = ("--max-steps", "2", "--timesteps", "300", "--score", "attention", "--start", start)
    status, printed, err = dsd("fit", lesson, "--out", out, *how, "--learning-rate", "1e-9", "--model", dsd.model)
    assert (status, err) == (0, "")
    assert "as it started" in printed
    assert "the prompts it started from were kept" in printed
    assert "zero-shot" not in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "start" / "adapter_model.safetensors"
    ).read_bytes()
    assert "as it started, from prompts that were learned before" in (out / "README.md").read_text()
    again = ("fit", lesson, "--out", out)
    assert "got --rank, --attention with --start" in dsd.refused(*again, *how, "--rank", "2", "--attention", "cross")
    assert "'heads' and an adapter to start from" in dsd.refused(*again, *how, "--method", "heads")
    assert "got no adapter" in dsd.refused(*again, *how[:-1], tmp_path / "none")
    task = ("eval", "comvg", "--level", "easy", "--count", "6", "--shots", "12", "--hold-out", "0.5", *how)
    few = dsd.json(*task, "--out", tmp_path / "run")["request"]["few_shot"]
    assert (few["prompt"], len(few["start"])) == (None, 32)
    other = save_adapter(tmp_path / "other", dsd.model, score=ScoreConfig("attention", (60,)))
    assert "few_shot" in dsd.refused(*task[:-1], other, "--out", tmp_path / "run")


def test_captions_among_wrong_ones(dsd: Command, tmp_path: Path) -> None:
    captions = ("a red star", "a blue star", "a red moon", "hello")
    path = manifest(
        tmp_path,
        *[{"images": [f"{LETTERS[i]}.png"], "texts": [t], "positives": [[0, 0]]} for i, t in enumerate(captions)],
    )
    status, printed, err = dsd("negatives", path, "--out", tmp_path / "hard", "--count", "2")
    assert (status, printed) == (0, f"{tmp_path / 'hard' / 'manifest.jsonl'}: 3 captions, each among wrong ones\n")
    assert "1 were left out" in err
    made = read_manifest(tmp_path / "hard" / "manifest.jsonl")
    assert sorted(made[0].texts) == ["a blue star", "a red moon", "a red star"]
    found = json.loads(dsd("negatives", path, "--out", tmp_path / "again", "--format", "json")[1])
    assert (found["examples"], len(found["left_out"])) == (3, 1)
    alone = manifest(tmp_path, {"images": ["a.png"], "texts": ["hello"], "positives": [[0, 0]]}, name="alone.jsonl")
    assert "no word can be swapped or replaced" in dsd.refused("negatives", alone, "--out", tmp_path / "none")
    assert "count 0" in dsd.refused("negatives", path, "--out", tmp_path / "none", "--count", "0")


def test_options_that_weights_have_no_use_for(dsd: Command, lesson: Path, tmp_path: Path) -> None:
    idle = ("--hold-out", "0.5", "--patience", "2")
    said = dsd.refused("fit", lesson, "--out", tmp_path / "adapter", "--method", "weights", *idle)
    assert "got --patience, --hold-out with --method weights" in said


# Adapters


def test_an_adapter_brings_its_model_and_score(dsd: Command, image: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mine", dsd.model)
    status, out, err = dsd("score", image, "--text", "cat", "--adapter", folder, "--format", "json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == dsd.model
    assert found["score"]["kind"] == "attention"
    assert found["score"]["timesteps"] == [50, 450]
    bare = dsd.json("score", image, "--text", "cat", "--score", "attention", "--timesteps", "50,450")
    assert abs(found["scores"][0][0] - bare["scores"][0][0]) > 1e-3


def test_adapter_for_another_base(dsd: Command, pipe: Pipe, image: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mine", pipe(seed=1))
    line = dsd.refused("score", image, "--text", "cat", "--adapter", folder)
    assert pipe(seed=1) in line
    assert dsd.model in line


def test_broken_adapter(dsd: Command, image: Path, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "mine", dsd.model)
    written(folder, "adapter_model.safetensors", b"cut")
    assert str(folder) in dsd.refused("score", image, "--text", "cat", "--adapter", folder)


# Explanations


def test_explanation_is_drawn(dsd: Command, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.png"
    status, printed, err = dsd("explain", image, "--text", "a red dog 🐕", "--out", out, "--model", dsd.model)
    assert (status, printed.strip(), err) == (0, str(out), "")
    with Image.open(out) as drawn:
        drawn.load()
        assert min(drawn.size) > 16


@pytest.mark.parametrize("end", [".PNG", ".svg", ".pdf", ".html", ".npz", ".json"])
def test_explanations_are_files_by_their_ending(dsd: Command, image: Path, tmp_path: Path, end: str) -> None:
    out = tmp_path / f"map{end}"
    quick = (
        "--draws",
        "1",
        "--map-timesteps",
        "300",
        "--maps",
        "attention",
        "--map-layers",
        "mid_block",
        "--heads",
        "0,1",
    )
    both = (
        ("--text", "a red dog", "--text2", "a red cat") if end == ".pdf" else ("--text", "a red dog", "--phrase", "dog")
    )
    status, _, err = dsd("explain", image, *both, "--out", out, "--model", dsd.model, *quick)
    assert (status, err) == (0, "")
    begins = {".PNG": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF-1.4", ".html": b"<!DOCTYPE html>", ".npz": b"PK"}
    assert out.read_bytes().startswith(begins.get(end, b"{"))


def test_two_images_are_explained(dsd: Command, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.json"
    status, _, err = dsd("explain", image, image, "--text", "a dog", "--out", out, "--model", dsd.model, "--draws", "1")
    assert (status, err) == (0, "")
    assert json.loads(out.read_text())["difference"] == 0


def test_failures_are_shown(dsd: Command, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    task = ("comvg", "--level", "easy", "--count", "4", "--timesteps", "300", "--model", dsd.model)
    status, _, err = dsd("eval", *task, "--report", page, "--failures", "1")
    assert (status, err) == (0, "")
    assert page.read_text().count("<article") == 2
    assert "data-veil" in page.read_text()
    assert "html" in dsd.refused("eval", *task, "--report", tmp_path / "why.txt")
    assert "failures" in dsd.refused("eval", *task, "--failures", "-1")


def test_explanations_that_cannot_be(dsd: Command, image: Path, tmp_path: Path) -> None:
    assert "none.png" in dsd.refused("explain", tmp_path / "none.png", "--text", "cat", "--out", tmp_path / "m.png")
    assert "word" in dsd.refused("explain", image, "--text", " ", "--out", tmp_path / "m.png")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "m.png", tmp_path, tmp_path / "m.jpg"):
        assert "expected" in dsd.refused("explain", image, "--text", "cat", "--out", out)
    out = tmp_path / "m.png"
    assert "two" in dsd.refused("explain", image, image, "--text", "cat", "--text2", "dog", "--out", out)
    assert "phrase" in dsd.refused("explain", image, "--text", "cat", "--text2", "dog", "--phrase", "cat", "--out", out)
    assert "zebra" in dsd.refused("explain", image, "--text", "cat", "--phrase", "zebra", "--out", out)
    assert "heads" in dsd.refused("explain", image, "--text", "cat", "--heads", "99", "--out", out)
    assert not out.exists()


# Faults, and what is loaded


def test_a_fault_of_ours(dsd: Command, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("one line\nand another")

    monkeypatch.setattr("dsd.matcher.Matcher.score", fail)
    status, out, err = dsd("score", image, "--text", "cat", "--model", dsd.model)
    assert (status, out) == (1, "")
    assert "ZeroDivisionError" in err
    assert "DSD_DEBUG=1" in err
    assert err.count("\n") == 1
    monkeypatch.setenv("DSD_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        dsd("score", image, "--text", "cat", "--model", dsd.model)


def test_a_reader_that_has_had_enough(dsd: Command, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``dsd score ... | head``; the interpreter must not complain at exit."""
    code = (
        "import sys; from dsd.cli import app, embedded; embedded._world = lambda a: print('x' * 100_000); "
        "sys.exit(app.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "world", "comvg", "--out", "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


def test_constants_are_the_librarys() -> None:
    from dsd import explanation
    from dsd.tasks import WORLD_TASKS
    from dsd.tasks.twins import Split
    from dsd.tiny.world import Level

    assert tuple(SCORES) == options.SCORE_KINDS
    assert options.WORLD_TASKS == WORLD_TASKS
    assert get_args(Level) == options.LEVELS
    assert get_args(Split) == options.SPLITS
    assert explanation.METHODS == options.MAPS


HEAVY = {"torch", "numpy", "PIL", "diffusers", "transformers", "peft"}


@pytest.mark.parametrize("argv", [["--help"], ["score", "--help"], ["export", "--help"], ["score"], ["nonesuch"]])
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from dsd.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "print(status, *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    status, *modules = done.stderr.splitlines()[-1].split()
    assert status == ("0" if "--help" in argv else "2")
    assert not HEAVY & set(modules)


@pytest.mark.parametrize(
    ("argv", "loaded"),
    [
        (["eval", "none.jsonl"], False),
        (["score", "a.png", "--text", "cat", "--model", "nonesuch"], True),
    ],
    ids=["before a library is loaded", "after"],
)
def test_a_mistake_outside_of_tests(argv: list[str], loaded: bool) -> None:
    """In a process of its own, where nothing is set up and nothing is caught."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "TOKENIZERS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "dsd.cli", *argv], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"dsd {argv[0]}: error: ")
    assert done.stderr.count("\n") == 1
    assert ("nonesuch" if loaded else "none.jsonl") in done.stderr
