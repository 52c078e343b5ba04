"""What several processes do at once with a folder of encodings; by itself, so that they start quickly."""

from __future__ import annotations

import numpy as np
import torch

from dsd.encodings import Folder


def share(path: str, seed: int) -> None:
    """Reads and writes files of a folder that is too small for all of them; what is read was written so."""
    rng = np.random.default_rng(seed)
    folder = Folder(path, limit=100_000)
    for _ in range(400):
        i = int(rng.integers(600))
        found = folder.get(f"{i:040x}")
        if found is None:
            folder.put(f"{i:040x}", {"x": torch.full((1000,), float(i))})
        else:
            assert torch.equal(found[0]["x"], torch.full((1000,), float(i)))
