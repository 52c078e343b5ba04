"""What all tests share: no network, few threads, fixed seeds, and the reference files beside the repository.

The environment is set here, before any test module imports torch or huggingface_hub, because both read it at import.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# small models gain nothing from threads, and lose a factor of ten to them where another process holds a core
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("dsd", deadline=None, derandomize=True)
settings.load_profile("dsd")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference files (parity model, authors' scores, dataset samples) that may lie beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference files in ../shared")
    return folder


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folders of small random pipelines, each saved once: ``pipe(prediction="v_prediction")`` (see models.Spec)."""
    import models

    @cache
    def saved(**spec: Any) -> str:
        return str(models.save(models.Spec(**spec), tmp_path_factory.mktemp("pipe")))

    return saved
