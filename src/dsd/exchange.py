"""Prompts in the formats of others: LoRA files of diffusers and of kohya's trainers, and the paper authors' files.

A LoRA is what a prompt is, ``W + alpha / rank * up @ down``. That factor is worked into ``up``, in what is read and in
what is written, so that each layer may have its own and every reader finds the same change.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsd.contracts import AdapterError, OptionError
from dsd.prompts import PromptConfig, lora_options

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What ``load_lora_weights`` looks for in a folder."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_TRANSFORMER = ("transformer_blocks.", "single_transformer_blocks.")


def write_lora(folder: str | os.PathLike[str], config: PromptConfig, state: Mapping[str, Tensor]) -> Path:
    """Writes prompts as a LoRA that ``StableDiffusionPipeline.load_lora_weights(folder)`` reads.

    Raises:
        AdapterError: If the prompts are not of a U-Net, something else is in the folder, or it cannot be written to.
    """
    strange = next((name for name in state if name.startswith(_TRANSFORMER)), None)
    if strange is not None:
        raise AdapterError(
            f"got prompts on {strange.removesuffix(_DOWN).removesuffix(_UP)}, expected those of a U-Net, which "
            "alone can be exported; save_pretrained keeps those of any model"
        )
    out = Path(folder)
    part = f".{LORA_FILE}.part"
    ranks = {name.removesuffix(_DOWN): len(value) for name, value in state.items() if name.endswith(_DOWN)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        taken = any(path.name not in (LORA_FILE, part) for path in out.iterdir())
    except OSError as error:
        raise AdapterError(f"{out}: got a path that cannot be written ({error.strerror}); choose another") from None
    if taken:
        raise AdapterError(f"{out}: got a folder that holds something else, expected a new one; choose another")
    try:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            out,
            {name: value * config.scale if name.endswith(_UP) else value for name, value in state.items()},
            weight_name=part,
            unet_lora_adapter_metadata=lora_options(ranks),
        )
        data = (out / part).read_bytes()
        (out / part).unlink()  # it is written for its owner alone
        (out / part).write_bytes(data)
        os.replace(out / part, out / LORA_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{out}: got a folder that cannot be written ({error}); choose another") from None
    return out


def read_lora(path: Path) -> tuple[PromptConfig, dict[str, Tensor]]:
    """A LoRA for a U-Net from a safetensors file, in the naming of peft, of older diffusers or of kohya's trainers.

    Raises:
        AdapterError: If the file cannot be read, or holds anything that would not be put onto the U-Net.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            lora = _described(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(
            f"{path}: got a LoRA that cannot be read ({type(error).__name__}: {error}), expected a safetensors file as "
            "diffusers writes it; copy it again"
        ) from None
    _refuse(path, found, ("text_encoder", "lora_te"), "for the text encoder", "LoRA weights for the U-Net alone")
    _refuse(path, found, ("dora_scale", "lora_magnitude_vector"), "of DoRA", "plain LoRA weights")
    weights, alphas = _peft_names(path, found)
    values: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, down, up in _pairs(path, weights):
        rank = ranks[module] = len(down)
        factor = 1.0
        if lora is not None:
            alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern, module), lora.lora_alpha)
            factor = alpha / (rank**0.5 if lora.use_rslora else rank)
        elif module in alphas:
            factor = alphas.pop(module) / rank
        values[module + _DOWN], values[module + _UP] = down.float(), up.float() * factor
    if alphas:
        raise AdapterError(f"{path}: got an alpha for {next(iter(alphas))}, expected LoRA weights for it too")
    try:
        return PromptConfig(ranks=ranks), values
    except OptionError as error:
        raise AdapterError(f"{path}: {error}") from None


def _described(values: Mapping[str, Any]) -> Any:
    """The ``peft.LoraConfig`` that diffusers keeps beside the weights, or None."""
    options = {k.removeprefix("unet."): v for k, v in values.items() if k.startswith("unet.")}
    if not options:
        return None
    lora = LoraConfig(**options)
    if lora.use_dora or not all(isinstance(n, int | float) for n in (lora.lora_alpha, *lora.alpha_pattern.values())):
        raise ValueError("its metadata asks for DoRA, or for an alpha that is no number")
    for pattern in lora.alpha_pattern:
        re.compile(pattern)
    return lora


def _refuse(path: Path, found: Mapping[str, Any], marks: tuple[str, ...], what: str, expected: str) -> None:
    names = [name for name in found if any(mark in name for mark in marks)]
    if names:
        raise AdapterError(
            f"{path}: got {len(names)} of {len(found)} weights {what} (such as {names[0]}), expected {expected}; "
            "leaving them out would change what was learned, so train without them"
        )


def _peft_names(path: Path, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights by their names in peft, as ours are, and alphas by module where the file's own weights tell them."""
    weights: Mapping[str, Tensor] = found
    alphas: Mapping[str, float] = {}
    if found and all(name.startswith("lora_unet_") for name in found):
        try:
            weights, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(dict(found))
        except (ValueError, KeyError, RuntimeError) as error:
            line = str(error).strip().splitlines()[-1][:200]
            raise AdapterError(f"{path}: got a LoRA in kohya's naming with weights out of place ({line})") from None
    named: dict[str, Tensor] = convert_unet_state_dict_to_peft({n.removeprefix("unet."): w for n, w in weights.items()})
    if len(named) < len(found) - len(alphas):
        raise AdapterError(f"{path}: got weights of which some have the same name in peft, expected one name for each")
    of = convert_unet_state_dict_to_peft({n.removeprefix("unet.").removesuffix(".alpha"): a for n, a in alphas.items()})
    return named, {name.split(".lora_A")[0]: alpha for name, alpha in of.items()}


def _pairs(path: Path, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each module's name, and its weights down to the rank and up again."""
    for name in weights:
        if not name.endswith((_DOWN, _UP)):
            raise AdapterError(f"{path}: got {name!r}, expected LoRA weights named *{_DOWN} and *{_UP}")
    for module in dict.fromkeys(name.removesuffix(_DOWN).removesuffix(_UP) for name in weights):
        down, up = weights.get(module + _DOWN), weights.get(module + _UP)
        if down is None or up is None:
            raise AdapterError(
                f"{path}: got {module} without its weights down or up, expected both; copy the file again"
            )
        if not (down.ndim == up.ndim >= 2 and len(down) == up.shape[1] and len(down)):
            raise AdapterError(
                f"{path}: {module}: got weights of shapes {tuple(down.shape)} down and {tuple(up.shape)} up, "
                "expected (rank, inputs) and (outputs, rank), of rank 1 or more"
            )
        yield module, down, up


_AUTHORS = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


def read_authors(path: Path) -> tuple[PromptConfig, dict[str, Tensor]]:
    """Prompts in the format that the paper's authors publish: a torch file of attention-processor LoRA weights.

    Raises:
        AdapterError: If the file cannot be read, or holds anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler makes of it
        raise AdapterError(
            f"{path}: got a file that torch cannot load safely ({type(error).__name__}), expected tensors"
        ) from None
    values: dict[str, Tensor] = {}
    ranks = set()
    for name, tensor in found.items() if isinstance(found, dict) else ():
        match = _AUTHORS.fullmatch(str(name))
        if match is None or not isinstance(tensor, Tensor) or tensor.ndim != 2:
            raise AdapterError(
                f"{path}: got {name!r}, expected low-rank attention weights named *.to_q_lora.down.weight and so on"
            )
        layer, projection, side = match.groups()
        projection = "to_out.0" if projection == "to_out" else projection
        values[f"{layer}.{projection}{_DOWN if side == 'down' else _UP}"] = tensor.float()
        ranks.add(tensor.shape[0] if side == "down" else tensor.shape[1])
    if len(ranks) != 1:
        raise AdapterError(f"{path}: got low-rank weights of ranks {sorted(ranks)}, expected one rank")
    return PromptConfig(rank=ranks.pop(), attention="all"), values
