"""Low-rank attention prompts: what few-shot learning adds to a frozen denoiser.

He et al. 2023, learn a low-rank change of the query, key, value and output projections of the
attention layers; ``peft`` puts it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dsd.contracts import AdapterError, OptionError
from dsd.probe import select_layers

Projection = Literal["to_q", "to_k", "to_v", "to_out.0"]
_ADAPTER = "dsd"


@dataclass(frozen=True)
class PromptConfig:
    """Where prompts go, and how large they are.

    Attributes:
        rank: Of each low-rank change.
        scale: Multiplies the change; the paper's is 1.
        projections: Which of a layer's projections are prompted.
        attention: ``cross`` for image-to-text layers, ``self`` for image-to-image ones, or ``all``.
        layers: Patterns of cross-attention layers, as in :class:`dsd.scores.ScoreConfig`; for ``cross`` alone.
    """

    rank: int = 4
    scale: float = 1.0
    projections: tuple[Projection, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    attention: Literal["cross", "self", "all"] = "cross"
    layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise OptionError(f"got rank {self.rank}, expected 1 to 1024")
        if not self.projections or not set(self.projections) <= set(get_args(Projection)):
            raise OptionError(f"got projections {self.projections}, expected some of {get_args(Projection)}")
        if self.attention not in ("cross", "self", "all"):
            raise OptionError(f"got attention {self.attention!r}, expected cross, self or all")
        if self.layers is not None and self.attention != "cross":
            raise OptionError(f"got layers with attention {self.attention!r}, expected them with attention 'cross'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptConfig:
        """From plain values, as they come from JSON."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


def targets(denoiser: nn.Module, config: PromptConfig) -> list[str]:
    """Names of the linear maps that the prompts change."""
    cross = set(select_layers(denoiser, config.layers))
    layers = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention)
        and (name in cross if module.is_cross_attention else config.attention != "cross")
        and not (module.is_cross_attention and config.attention == "self")
    ]
    return [f"{layer}.{projection}" for layer in layers for projection in config.projections]


def attach(denoiser: nn.Module, config: PromptConfig, seed: int = 0) -> None:
    """Adds prompts that change nothing yet; :func:`parameters` are then ready to learn.

    Raises:
        AdapterError: If the denoiser already carries prompts.
    """
    if any(_layers(denoiser)):
        raise AdapterError("got a model that already carries prompts, expected a bare one; load the model anew")
    names = targets(denoiser, config)
    lora = LoraConfig(r=config.rank, lora_alpha=round(config.rank * config.scale, 6), target_modules=names)
    inject_adapter_in_model(lora, denoiser, adapter_name=_ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in _layers(denoiser):
            down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            bound = 1 / math.sqrt(down.shape[1])
            down.copy_((2 * torch.rand(down.shape, generator=generator) - 1) * bound)
            up.zero_()
            # learned in float32 even where the model is in half precision
            layer.lora_A[_ADAPTER].float()
            layer.lora_B[_ADAPTER].float()


def detach(denoiser: nn.Module) -> None:
    """Takes all prompts away again; a bare model is left as it is."""
    for name, layer in list(_layers(denoiser)):
        parent, _, child = name.rpartition(".")
        owner = denoiser.get_submodule(parent)
        if isinstance(owner, nn.ModuleList):
            owner[int(child)] = layer.get_base_layer()
        else:
            setattr(owner, child, layer.get_base_layer())
    if hasattr(denoiser, "peft_config"):
        del denoiser.peft_config


def parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The prompts' own parameters by name."""
    found = {}
    for name, layer in _layers(denoiser):
        found[f"{name}.lora_A.weight"] = layer.lora_A[_ADAPTER].weight
        found[f"{name}.lora_B.weight"] = layer.lora_B[_ADAPTER].weight
    return found


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """A copy of the prompts, float32 on the CPU."""
    return {name: p.detach().float().cpu().clone() for name, p in parameters(denoiser).items()}


@torch.no_grad()
def load_state(denoiser: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Sets attached prompts.

    Raises:
        AdapterError: If a tensor is missing, left over, or of another shape.
    """
    own = parameters(denoiser)
    missing, extra = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    if missing or extra:
        raise AdapterError(
            f"got an adapter with {len(extra)} tensors that this model has no place for and without {len(missing)} "
            f"that it needs (such as {(missing + extra)[0]}); load it onto the base model that it was made for"
        )
    for name, parameter in own.items():
        if parameter.shape != values[name].shape:
            raise AdapterError(
                f"{name}: got shape {tuple(values[name].shape)}, expected {tuple(parameter.shape)}; "
                "load the adapter onto the base model that it was made for"
            )
        parameter.copy_(values[name])


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """The model without its prompts, inside this context."""
    layers = [layer for _, layer in _layers(denoiser)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, LoraLayer) and _ADAPTER in m.lora_A)


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
        values[f"{layer}.{projection}.lora_{'A' if side == 'down' else 'B'}.weight"] = tensor.float()
        ranks.add(tensor.shape[0] if side == "down" else tensor.shape[1])
    if len(ranks) != 1:
        raise AdapterError(f"{path}: got low-rank weights of ranks {sorted(ranks)}, expected one rank")
    return PromptConfig(rank=ranks.pop(), attention="all"), values
