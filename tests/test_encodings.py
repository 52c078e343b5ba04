"""What was encoded once comes from disk, the same; never what another model encoded; and a folder stays in bounds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import models
from dsd.backbone import Backbone, load_backbone
from dsd.contracts import OptionError
from dsd.encodings import Encodings, Folder
from dsd.matcher import Matcher
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig
from models import KINDS, PIXELS, picture
from sharing import share

Pipe = Callable[..., str]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def watched(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the encoders, each time one encodes."""
    ran: list[str] = []
    for name in ("encode_images", "encode_texts"):
        whole = getattr(backbone, name)

        def encode(inputs: object, name: str = name, whole: Callable[[object], object] = whole) -> object:
            ran.append(name)
            return whole(inputs)

        monkeypatch.setattr(backbone, name, encode)
    return ran


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_scores_from_disk_are_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = models.backbone_of(models.pipeline(kind))
    texts = ["dog", "cat"] if kind == "dit" else ["a red circle", "a dog above a cat"]
    config = ScoreConfig("denoising", (200, 700))
    pairs = [(picture(i), text) for i in range(2) for text in texts]
    folder = Folder(tmp_path)

    def scorer() -> Scorer:
        return Scorer(backbone, config, size=PIXELS, encodings=Encodings(folder, backbone))

    plain = Scorer(backbone, config, size=PIXELS).predict(pairs)
    first = scorer().predict(pairs)
    ran = watched(backbone, monkeypatch)
    again = scorer().predict(pairs)
    assert np.array_equal(first, again)
    assert np.allclose(first, plain, atol=1e-6)
    assert "encode_images" not in ran
    # the empty caption is never kept
    assert ran.count("encode_texts") == (1 if kind != "dit" else 3)


def test_another_model_takes_nothing(tmp_path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    one = load_backbone(pipe())
    Matcher(one, encodings=folder).score(picture(0), "a dog")
    kept = len(files(tmp_path))
    assert kept == 2
    for change in ("vae.encoder.conv_in", "text_encoder"):
        other = load_backbone(pipe())
        root, _, rest = change.partition(".")
        module = getattr(other, root).get_submodule(rest)
        weight = [p for p in module.parameters() if p.ndim > 1][-1]
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3  # one number of all
        ran = watched(other, monkeypatch)
        Matcher(other, encodings=folder).score(picture(0), "a dog")
        assert ("encode_images" in ran) == (root == "vae")
        assert ran.count("encode_texts") == (2 if root == "text_encoder" else 1)
    same = load_backbone(pipe())
    ran = watched(same, monkeypatch)
    Matcher(same, encodings=folder).score(picture(0), "a dog")
    assert ran == ["encode_texts"]
    assert len(files(tmp_path)) == kept + 2


@pytest.mark.parametrize("kind", ["flux-dev", "sdxl", "pixart-sigma"])
def test_what_a_family_decides_of_captions_counts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as how long T5's window is, which the same text encoder has in two members of a family."""
    one = models.backbone_of(models.pipeline(kind))
    assert one.caption_settings
    Matcher(one, size=PIXELS, encodings=tmp_path).score(picture(0), "a dog")
    other = models.backbone_of(models.pipeline(kind))
    monkeypatch.setattr(type(other), "caption_settings", {"of": "another"})
    ran = watched(other, monkeypatch)
    Matcher(other, size=PIXELS, encodings=tmp_path).score(picture(0), "a dog")
    assert ran.count("encode_texts") == 2


def test_files_that_others_put_there_are_not_taken(tmp_path: Path, pipe: Pipe) -> None:
    expected = Matcher(load_backbone(pipe())).score(picture(0), "a dog").scores
    matcher = Matcher(load_backbone(pipe()), encodings=tmp_path)
    matcher.score(picture(0), "a dog")
    for beside in ({}, {"words": "{"}, {"words": "[1]"}):
        for file in files(tmp_path):
            file.write_bytes(save({"states": torch.zeros(1)}, beside))
        found = Matcher(load_backbone(pipe()), encodings=tmp_path).score(picture(0), "a dog").scores
        assert np.allclose(found, expected, atol=1e-6)


def test_more_pictures_than_memory_keeps_are_told_apart(
    tmp_path: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(pipe())
    pictures = [picture(i) for i in range(6)]
    expected = Scorer(backbone, ScoreConfig("denoising")).latents(pictures)
    scorer = Scorer(backbone, ScoreConfig("denoising"), encodings=Encodings(Folder(tmp_path), backbone))
    monkeypatch.setattr(scorer._latents, "_size", 3)
    for order in (range(6), [5, 0, 1, 2, 3, 4, 5]):
        assert torch.allclose(scorer.latents([pictures[i] for i in order]), expected[list(order)], atol=1e-6)


def test_precision_is_another_encoding(tmp_path: Path, pipe: Pipe) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        Matcher(load_backbone(pipe(), dtype=dtype), encodings=tmp_path).score(picture(0), "a dog")
    assert len(files(tmp_path)) == 4


def test_weights_that_cannot_be_read_are_refused(tmp_path: Path, pipe: Pipe) -> None:
    backbone = load_backbone(pipe())
    backbone.vae.to("meta")
    with pytest.raises(OptionError, match="cannot be read"):
        Encodings(Folder(tmp_path), backbone)


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    one = torch.zeros(1000)  # 4 KB
    folder = Folder(tmp_path, limit=30_000)
    for i in range(7):
        folder.put(f"{i:040x}", {"x": one + i})
        os.utime(folder._file(f"{i:040x}"), (i + 1, i + 1))
    assert folder.get(f"{0:040x}") is not None  # used now
    for i in range(7, 12):
        folder.put(f"{i:040x}", {"x": one + i})
    assert sum(f.stat().st_size for f in files(tmp_path)) <= 30_000
    assert folder.get(f"{0:040x}") is not None
    assert folder.get(f"{1:040x}") is None
    found = folder.get(f"{11:040x}")
    assert found is not None
    assert torch.equal(found[0]["x"], one + 11)


def test_what_others_wrote_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "EVERY", 2)
    a, b = Folder(tmp_path, limit=30_000), Folder(tmp_path, limit=30_000)
    for i in range(40):
        (a, b)[i % 2].put(f"{i:040x}", {"x": torch.zeros(1000)})
    assert sum(f.stat().st_size for f in files(tmp_path)) <= 30_000 + 3 * 4200


def test_broken_files_and_full_disks_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path)
    key = f"{7:040x}"
    folder.put(key, {"x": torch.ones(3)}, {"said": "ä"})
    found = folder.get(key)
    assert found is not None
    assert found[1] == {"said": "ä"}
    for broken in (b"", b"nonsense", folder._file(key).read_bytes()[:-5]):
        folder._file(key).write_bytes(broken)
        assert folder.get(key) is None
        assert not folder._file(key).exists()

    def full(*_: object) -> int:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        folder.put(key, {"x": torch.ones(3)})
    assert folder.get(key) is None
    assert files(tmp_path) == []
    folder = Folder(tmp_path, limit=100)
    folder.put(key, {"x": torch.ones(1000)})  # larger than all
    assert folder.get(key) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="expected one to keep encodings in"):
        Folder(tmp_path / "file")
    with pytest.raises(OptionError, match="limit"):
        Folder(tmp_path, limit=0)


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    # spawned: a fork of a process with threads can wait for ever for a lock that one of them held
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=share, args=(str(tmp_path), seed)) for seed in range(3)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
    assert not [f for f in files(tmp_path) if f.suffix == ".part"]
    total = sum(f.stat().st_size for f in files(tmp_path))
    assert 0 < total <= 100_000 + 3 * Folder.EVERY * 4200  # without a limit it would be two million
