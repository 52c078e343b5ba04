"""Scores equal those of the code of He et al. 2023, which the reference files beside the repository hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsd import Matcher
from dsd.cli import main

TOLERANCE = 2e-5
SIZE = 32
"""Pixels a side of the reference pictures; the model's own would be 128."""


@pytest.fixture(scope="module")
def parity(shared: Path) -> Path:
    folder = shared / "parity"
    if not folder.is_dir():
        pytest.skip("needs the reference files in ../shared/parity")
    return folder


def reference(path: Path, bias: bool, key: str = "score") -> tuple[tuple[int, ...], list[str], np.ndarray]:
    """Timesteps, captions, and the authors' scores (images, captions)."""
    values = json.loads(path.read_text())
    rows = [r for r in values["results"] if r["use_bias"] is bias]
    texts = list(dict.fromkeys(r["text"] for r in rows))
    table = np.full((3, len(texts)), np.nan)
    for row in rows:
        table[row["image"], texts.index(row["text"])] = row[key]
    assert np.isfinite(table).all()
    return tuple(int(t) for t in values["timesteps"]), texts, table


def images(parity: Path) -> list[str]:
    return [str(parity / f"image{i}.png") for i in range(3)]


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "adapter"])
@pytest.mark.parametrize(("kind", "bias"), [("paper", True), ("paper-attention", False)])
def test_scores_are_the_authors(parity: Path, kind: str, bias: bool, adapter: bool) -> None:
    timesteps, texts, expected = reference(parity / f"expected{'_adapter' * adapter}.json", bias)
    matcher = Matcher.from_pretrained(
        str(parity / "pipe"),
        adapter=parity / "adapter" if adapter else None,
        score=kind,
        timesteps=timesteps,
        size=SIZE,
        noise=np.load(parity / "noise.npy"),
    )
    table = matcher.score(images(parity), texts)
    assert np.abs(table.scores - expected).max() < TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
def test_adapter_changes_the_scores_that_it_should(parity: Path, bias: bool) -> None:
    """The two files of the authors are about the same pairs, so that equality above is no accident."""
    _, _, bare = reference(parity / "expected.json", bias)
    _, _, without = reference(parity / "expected_adapter.json", bias, "score_without_adapter")
    _, _, taught = reference(parity / "expected_adapter.json", bias)
    assert np.array_equal(bare, without)
    assert np.abs(taught - bare).min() > 100 * TOLERANCE


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "adapter"])
@pytest.mark.parametrize(("kind", "bias"), [("paper", True), ("paper-attention", False)])
def test_command_line_gives_the_authors_scores(
    parity: Path, capsys: pytest.CaptureFixture[str], kind: str, bias: bool, adapter: bool
) -> None:
    timesteps, texts, expected = reference(parity / f"expected{'_adapter' * adapter}.json", bias)
    argv = ["score", *images(parity), "--model", str(parity / "pipe"), "--score", kind, "--format", "json"]
    argv += ["--timesteps", ",".join(map(str, timesteps)), "--noise", str(parity / "noise.npy"), "--size", str(SIZE)]
    argv += [a for text in texts for a in ("--text", text)]
    argv += ["--adapter", str(parity / "adapter")] if adapter else []
    assert main(argv) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed["images"] == images(parity)
    assert printed["texts"] == texts
    assert np.abs(np.array(printed["scores"]) - expected).max() < TOLERANCE


def test_an_adapter_of_the_authors_brings_the_score_of_the_paper(parity: Path) -> None:
    """Kind and timesteps need not be given: they are those that the authors' adapters are made for."""
    _, texts, expected = reference(parity / "expected_adapter.json", True)
    matcher = Matcher.from_pretrained(
        str(parity / "pipe"), adapter=parity / "adapter", size=SIZE, noise=np.load(parity / "noise.npy")
    )
    assert np.abs(matcher.score(images(parity), texts).scores - expected).max() < TOLERANCE
