"""The notebooks run, and what is kept in them is what they are written from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
nbformat = pytest.importorskip("nbformat")


def _build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", EXAMPLES / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def test_each_is_there() -> None:
    assert sorted(_build().NOTEBOOKS) == NAMES
    assert len(NAMES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_what_was_written(name: str) -> None:
    written = _build().cells(_build().NOTEBOOKS[name])
    assert [c.source for c in read(name).cells] == [c.source for c in written]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_and_no_errors_are_kept(name: str) -> None:
    outputs = [output for cell in read(name).cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(EXAMPLES.parent) not in str(outputs)
    assert str(Path.home()) not in str(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cell by cell in this process, which spares the start of a kernel."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    import logging

    try:
        for cell in read(name).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, name, "exec"), space)
    finally:
        logging.disable(logging.NOTSET)
