"""A whole model in one file, as it was first published: which model it is of, and its networks.

The file holds weights alone. What they mean (configurations, tokenizers, the noise schedule) comes from a pipeline
folder of the same model, its configuration, whose own weights are not needed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsd.backbone.folder import Pipeline, check_safetensors
from dsd.backbone.hub import card_of
from dsd.contracts import ModelError

_NOT_TOLD = {"v2": "sd21-base or sd21"}
"""Kinds of files that do not say what their denoiser predicts, and what they may be."""


def read_header(model: str, file: Path, *, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The names and shapes of a checkpoint's tensors, as tensors without memory.

    Raises:
        ModelError: If it is a pickle and these are not allowed, or cannot be read.
    """
    if file.suffix.lower() == ".safetensors":
        header = check_safetensors(model, file, file.name)
        return {name: torch.empty(tensor["shape"], device="meta") for name, tensor in header.items()}
    if not allow_pickle:
        raise ModelError(
            f"{model}: got a pickled checkpoint, expected safetensors, which hold no code; look for a version with "
            "safetensors, or allow pickles with allow_pickle=True (--allow-pickle): then tensors are unpickled and "
            "nothing else"
        )
    try:
        found = torch.load(file, map_location="meta", weights_only=True, mmap=_is_zip(file) or None)
        while "state_dict" in found:
            found = found["state_dict"]
        return {str(n): t for n, t in found.items() if isinstance(t, torch.Tensor)}
    except Exception as error:  # pickle, zip and torch raise a dozen kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model}: got a checkpoint that cannot be read as tensors alone ({line}), expected one saved by "
            "torch.save of a state dict; it may be cut short, or hold code, which is not run"
        ) from None


def default_config(model: str, header: Mapping[str, torch.Tensor]) -> str:
    """The alias or hub name of the model that a checkpoint looks like.

    Raises:
        ModelError: If it looks like none that is known, or what it predicts cannot be told from the file.
    """
    from diffusers.loaders import single_file_utils as stock

    advice = "say which with config (--config): an alias, a hub name, or the folder of a pipeline of that model"
    kind = stock.infer_diffusers_model_type(header)
    # without any sign of another, a file is taken for version 1
    if kind == "v1" and not any(name.startswith("model.diffusion_model.input_blocks.") for name in header):
        raise ModelError(
            f"{model}: got a checkpoint of {len(header)} tensors that looks like no model that is known, expected a "
            f"whole model as it was first published; if it is one, {advice}"
        )
    if kind in _NOT_TOLD:
        raise ModelError(
            f"{model}: got a checkpoint of {_NOT_TOLD[kind]}, which does not say what its denoiser predicts, expected "
            f"its configuration; {advice}"
        )
    if "v_pred" in header:
        raise ModelError(
            f"{model}: got a checkpoint that predicts velocity (v_pred), expected its configuration; {advice}"
        )
    name = str(stock.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])
    card = card_of(name)
    return name if card is None else card.name


def load_networks(
    model: str, file: Path, pipeline: Pipeline, given: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """The networks in a checkpoint, by component, on the CPU.

    Args:
        model: Its name, for messages.
        file: The checkpoint.
        pipeline: The configuration.
        given: Components that are not in the file: tokenizers, the scheduler.
        dtype: Of the weights.

    Raises:
        ModelError: If networks or weights of theirs are missing, or the file is of another model.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging

    stock = getattr(diffusers, pipeline.kind)
    if not hasattr(stock, "from_single_file"):
        raise ModelError(
            f"{model}: got a single file of a {pipeline.kind}, for which diffusers has no reader; expected a folder in "
            "the diffusers pipeline format"
        )
    left_out = {n: None for n in stock._optional_components if n not in pipeline.components}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # about the stock scheduler, which is not used
            warnings.simplefilter("ignore", FutureWarning)
            loaded = stock.from_single_file(
                str(file), config=str(pipeline.folder), local_files_only=True, dtype=dtype, **given, **left_out
            )
    except SingleFileComponentError as error:
        raise ModelError(
            f"{model}: got a checkpoint without all of {', '.join(pipeline.components)} "
            f"({str(error).strip().splitlines()[0]}), expected a whole model; use the folder of the pipeline"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    networks = {n: loaded.components[n] for n in pipeline.components if n not in given}
    for name, network in networks.items():
        lacking = [n for n, t in (*network.named_parameters(), *network.named_buffers()) if t.is_meta]
        if lacking:
            raise ModelError(
                f"{model}: got a checkpoint without {len(lacking)} weights of {name} (such as {lacking[0]}), expected "
                "all; download it again, or name its configuration with config (--config)"
            )
    return networks


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"
