"""Other methods for the same job, behind :class:`dsd.contracts.MatcherProtocol`; made by name with :func:`baseline`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.contracts import AdapterError, OptionError

if TYPE_CHECKING:
    from dsd.baselines.base import Baseline

__all__ = ["BASELINES", "Entry", "baseline", "load_baseline"]


@dataclass(frozen=True)
class Entry:
    """A baseline that can be made by name.

    Attributes:
        module, kind: Where its class is, imported when it is made.
        about: One line.
        few_shot: Whether it learns from examples (``fit``).
        model: The kind of model it takes: ``clip``, ``siglip``, ``blip``, ``diffusion``; None if none.
        options: What the name stands for besides the class.
    """

    module: str
    kind: str
    about: str
    few_shot: bool = False
    model: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


BASELINES: dict[str, Entry] = {
    "chance": Entry("trivial", "Chance", "a random score"),
    "caption-length": Entry("trivial", "CaptionLength", "the shorter caption, or as examples say", few_shot=True),
    "clip": Entry("towers", "Clip", "CLIP zero-shot", model="clip"),
    "siglip": Entry("towers", "Siglip", "SigLIP zero-shot", model="siglip"),
    "blip-itm": Entry("blip", "Blip", "BLIP's matching head", model="blip", options=(("head", "itm"),)),
    "blip-itc": Entry("blip", "Blip", "BLIP's contrast", model="blip", options=(("head", "itc"),)),
    "clip-linear-probe": Entry("few_shot_clip", "LinearProbe", "CLIP, a linear probe", True, "clip"),
    "clip-coop": Entry("few_shot_clip", "CoOp", "CLIP, learned context words", True, "clip"),
    "clip-lora": Entry("few_shot_clip", "Lora", "CLIP, low-rank weights in both towers", True, "clip"),
    "diffusion-classifier": Entry("diffusion", "DiffusionClassifier", "error of the noise", model="diffusion"),
    "diffusion-itm": Entry("diffusion", "DiffusionITM", "that less the error without a caption", model="diffusion"),
    "diffusion-itm-conditional": Entry(
        "diffusion", "DiffusionITM", "without that", model="diffusion", options=(("unconditional", False),)
    ),
}
"""All baselines by name."""


def baseline(name: str, **options: Any) -> Baseline:
    """Makes a baseline; one that is ``few_shot`` is zero-shot until its ``fit`` is called.

    Args:
        name: Of :data:`BASELINES`.
        options: Of its class, such as ``model`` and ``seed``.

    Raises:
        OptionError: If there is no such baseline, or it has no such option.
        ModelError: If its model cannot be loaded.
    """
    entry = BASELINES.get(name)
    if entry is None:
        raise OptionError(f"got baseline {name!r}, expected one of {', '.join(BASELINES)}")
    kind = getattr(import_module(f"dsd.baselines.{entry.module}"), entry.kind)
    try:
        made: Baseline = kind(**{**dict(entry.options), **options})
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise OptionError(f"{name}: {error}, expected options of {entry.kind} alone; leave it out") from None
    return made


def load_baseline(folder: str | Path, **options: Any) -> Baseline:
    """Loads a baseline that was taught and saved.

    Raises:
        AdapterError: If the folder cannot be read.
        ModelError: If its model cannot be loaded.
    """
    from dsd.baselines.few_shot_clip import FewShotClip, read_record

    name = str(read_record(folder)["baseline"])
    entry = BASELINES.get(name)
    kind = None if entry is None else getattr(import_module(f"dsd.baselines.{entry.module}"), entry.kind)
    if kind is None or not issubclass(kind, FewShotClip):
        learners = ", ".join(name for name, entry in BASELINES.items() if entry.few_shot and entry.model)
        raise AdapterError(f"{folder}: got baseline {name!r}, expected one of {learners}; fit and save again")
    made: Baseline = kind.load(folder, **options)
    return made
