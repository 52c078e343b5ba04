"""From a name to a backbone: aliases, local folders, the hub and its cache."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from dsd.backbone.base import Backbone
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.contracts import ModelError

_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


@cache
def cards() -> dict[str, dict[str, Any]]:
    """What is known of each model that has a short name (``cards.yaml``)."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(files("dsd.backbone").joinpath("cards.yaml").read_text("utf-8"))
    return found


def default_timesteps(model: str) -> tuple[int, ...]:
    """The timesteps that a model's scores look at unless told otherwise."""
    return tuple(cards().get(model, {}).get("timesteps", (189, 389, 589, 789)))


def load_backbone(
    model: str, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Backbone:
    """Loads a pretrained text-to-image model.

    Args:
        model: An alias of ``cards.yaml``, a folder in the ``diffusers`` pipeline format, or a name on the hub.
        device: Default: the first GPU if there is one, else the CPU.
        dtype: The type of all weights; scores are reduced in float32 whatever it is.

    Raises:
        ModelError: If there is no such model, or it is of a family that is not supported.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = resolve(model)
    if isinstance(where, Path):
        _check_folder(model, where)
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # late: seconds of import
    from transformers import CLIPTextModel, CLIPTokenizer

    try:
        return StableDiffusionBackbone(
            name=model,
            vae=AutoencoderKL.from_pretrained(where, subfolder="vae", dtype=dtype).to(device),
            text_encoder=_whole(CLIPTextModel, where, "text_encoder", dtype).to(device),
            tokenizer=CLIPTokenizer.from_pretrained(where, subfolder="tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(where, subfolder="unet", dtype=dtype).to(device),
            # only the schedule is used, and every scheduler's configuration holds it
            scheduler=DDPMScheduler.from_pretrained(where, subfolder="scheduler"),
        )
    except ModelError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model}: {device} has too little memory for it; try a smaller dtype or device='cpu'"
        ) from error
    except Exception as error:  # diffusers, transformers and the hub raise a dozen kinds
        advice = (
            "the folder's files do not fit together; export the pipeline again with save_pretrained"
            if isinstance(where, Path)
            else f"expected an alias ({', '.join(cards())}), a folder, or a hub name that can be reached; "
            f"to fetch it: hf download {where}"
        )
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{model}: cannot be loaded ({line}); {advice}") from error


def _whole(kind: Any, where: Path | str, part: str, dtype: torch.dtype) -> Any:
    """A part of the pipeline from ``transformers``, which would fill in what a file lacks with random weights."""
    loaded, info = kind.from_pretrained(where, subfolder=part, dtype=dtype, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{part} lacks {len(info['missing_keys'])} weights")
    return loaded


def resolve(model: str) -> Path | str:
    """An alias, folder or hub name => the folder, or the hub name."""
    if model == "tiny":
        return Path(str(files("dsd.tiny").joinpath("weights")))
    if model in cards():
        return str(cards()[model]["hub"])
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if model.count("/") != 1 or path.exists() or model.startswith((".", "/", "~")):
        raise ModelError(
            f"got model {model!r}, expected an alias ({', '.join(cards())}), a folder in the diffusers pipeline "
            "format, or a hub name such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    return model


def _check_folder(model: str, folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        listed = json.loads(index.read_text("utf-8"))
        missing = [p for p in _PARTS if p not in listed]
    except (OSError, ValueError, TypeError):
        raise ModelError(
            f"{model}: got a folder without a readable model_index.json, expected a pipeline saved by save_pretrained"
        ) from None
    if missing:
        kind = listed.get("_class_name", "unknown") if isinstance(listed, dict) else "unknown"
        raise ModelError(
            f"{model}: got a pipeline of class {kind} without {', '.join(missing)}, "
            "expected a Stable Diffusion 1.x or 2.x pipeline"
        )
