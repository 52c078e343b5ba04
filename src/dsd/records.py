"""What learning leaves on disk on its way: a checkpoint to go on from, and a log to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsd.contracts import OptionError


def save_checkpoint(path: Path, request: str, state: Mapping[str, Any]) -> None:
    """Writes a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    torch.save({"request": request, **state}, part)
    os.replace(part, path)


def load_checkpoint(path: Path, request: str) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote.

    Raises:
        OptionError: If it cannot be read, or is of another request.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        same = state.pop("request") == request
    except Exception as error:  # whatever the unpickler makes of it
        raise OptionError(f"{path}: got a checkpoint that cannot be read ({type(error).__name__}); delete it") from None
    if not same:
        raise OptionError(
            f"{path}: got a checkpoint of another request, expected the same examples, model and options; "
            "delete it to start anew"
        )
    return state


class Log:
    """The loss and what goes with it, step by step: a ``.jsonl`` file, or a folder for TensorBoard.

    Args:
        path: Of either.
        run: Counts from 1: a fit has one for each part that is held out, and one on all examples.
        step: After which this run goes on: what a stopped fit wrote beyond its checkpoint is dropped.

    Raises:
        OptionError: If it cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(self, path: str | os.PathLike[str], run: int, step: int) -> None:
        self._path, self._run = Path(path), run
        self._board: Any = None
        try:
            if self._path.suffix == ".jsonl":
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._drop_after(run, step)
                return
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._path / f"run-{run}"), purge_step=step + 1)
        except ImportError:
            raise OptionError(
                f"got the log {self._path}, which is for TensorBoard, without that; expected it to be installed "
                "(pip install tensorboard), or a file that ends in .jsonl"
            ) from None
        except (OSError, ValueError) as error:
            raise OptionError(f"{self._path}: got a log that cannot be written ({error}); choose another") from None

    def _drop_after(self, run: int, step: int) -> None:
        lines: list[str] = []
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else ():
            try:
                values = json.loads(line)
                if (values["run"], values["step"]) <= (run, step):
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # cut off when it was stopped
                break
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text("".join(lines), "utf-8")
        os.replace(part, self._path)

    def write(self, step: int, **values: float) -> None:
        if self._board is None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self._run, "step": step, **values}) + "\n")
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()
