"""The top-level package: cheap to import, and every public name resolves."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

import dsd


def test_import_is_cheap() -> None:
    code = "import sys, dsd; dir(dsd); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "dsd" in loaded
    assert not {"numpy", "PIL", "torch", "diffusers", "transformers"} & set(loaded)


def test_public_names_are_listed_once_and_everywhere() -> None:
    assert sorted(dsd.__all__) == sorted([*dsd._HOMES, "__version__"])
    assert set(dsd.__all__) <= set(dir(dsd))


@pytest.mark.parametrize(("name", "module"), dsd._HOMES.items())
def test_public_name_resolves(name: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    assert getattr(dsd, name) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", dsd._HOMES)
def test_public_name_is_no_submodule(name: str) -> None:
    """A submodule of the same name would replace the attribute once it is imported."""
    assert importlib.util.find_spec(f"dsd.{name}") is None


def test_version_is_that_of_the_distribution() -> None:
    assert dsd.__version__ == importlib.metadata.version("discriminative-diffusion")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = dsd.nonesuch
