"""Where a model's networks are kept, and where they compute.

Three ways: all on one device; spread over several (``device_map``); or kept in the CPU's memory and brought to the
device when they compute (``offload``). Encoders and denoiser take turns here: texts and pictures are encoded once, and
then the denoiser makes many passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from dsd.backbone.base import EXECUTION_DEVICE
from dsd.contracts import OptionError

Offload = Literal["model", "sequential"]
Quantization = Literal["8bit", "4bit"]
DeviceMap = str | Mapping[str, str | int]


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on: the one that is named, else the first GPU if there is one, else the CPU.

    Raises:
        OptionError: If it is not there.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        mps = torch.backends.mps.is_available()
        return torch.device("mps" if mps else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (RuntimeError, AssertionError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(f"got device {str(device)!r} ({line}), expected one that is there, such as cpu") from None
    return found


def check_offload(offload: Offload | None, device: torch.device) -> None:
    """Refuses offloading where there is nothing to offload from.

    Raises:
        OptionError: If the device is the CPU.
    """
    if offload is not None and device.type == "cpu":
        raise OptionError(
            f"got offload {offload!r} with device 'cpu', expected a GPU to bring networks to; leave offload out"
        )


def spread(sizes: Mapping[str, int], denoiser: str, free: Sequence[int]) -> dict[str, int | str]:
    """Which GPU keeps which network, whole; the denoiser's and the VAE's is the roomiest.

    The others go, the largest first, to where most room is left, and to the CPU if they fit nowhere.

    Args:
        sizes: Bytes of each network's weights.
        denoiser: The name of the denoiser.
        free: Free bytes on each GPU.

    Returns:
        The number of a GPU, or ``cpu``, by network.
    """
    left = list(free)
    first = max(range(len(left)), key=lambda i: left[i])
    placed: dict[str, int | str] = {}
    for name in sorted(sizes, key=lambda n: (n not in (denoiser, "vae"), -sizes[n])):
        gpu = first if name in (denoiser, "vae") else max(range(len(left)), key=lambda i: left[i])
        if name not in (denoiser, "vae") and sizes[name] > left[gpu]:
            placed[name] = "cpu"
            continue
        placed[name] = gpu
        left[gpu] -= sizes[name]
    return placed


def map_devices(device_map: DeviceMap, sizes: Mapping[str, int], denoiser: str) -> dict[str, torch.device]:
    """The device of each network as a ``device_map`` has it.

    Args:
        device_map: ``balanced`` spreads whole networks over the GPUs; a mapping names the device of networks by
            component, all others go where its ``""`` says, else to the denoiser's.
        sizes: Bytes of each network's weights.
        denoiser: The name of the denoiser.

    Raises:
        OptionError: If it names components or devices that are not there.
    """
    if isinstance(device_map, str):
        if not torch.cuda.is_available():
            raise OptionError(
                f"got device_map {device_map!r} without a GPU, expected at least one; leave device_map out"
            )
        free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
        placed: dict[str, int | str] = spread(sizes, denoiser, free)
        return {n: torch.device("cpu" if d == "cpu" else f"cuda:{d}") for n, d in placed.items()}
    unknown = sorted(device_map.keys() - sizes.keys() - {""})
    if unknown:
        raise OptionError(
            f"got device_map for {', '.join(unknown)}, expected components of this model: {', '.join(sorted(sizes))}"
        )
    rest = device_map.get("", device_map.get(denoiser))
    named = {n: device_map.get(n, rest) for n in sizes}
    return {n: pick_device(f"cuda:{d}" if isinstance(d, int) else d) for n, d in named.items()}


def quantization_config(bits: Quantization, dtype: torch.dtype, device: torch.device) -> Any:
    """How ``transformers`` quantises a text encoder with bitsandbytes.

    Raises:
        OptionError: If bitsandbytes or a GPU is missing.
    """
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise OptionError(
            f"got quantize_text_encoder {bits!r} without bitsandbytes, expected it; pip install bitsandbytes"
        )
    if device.type != "cuda":
        raise OptionError(
            f"got quantize_text_encoder {bits!r} with device {str(device)!r}, expected a CUDA GPU, which bitsandbytes "
            "computes on; leave it out"
        )
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def offload_networks(networks: Mapping[str, nn.Module], how: Offload, device: torch.device) -> None:
    """Keeps networks in the CPU's memory and brings them to a device to compute.

    Args:
        networks: By component. Those that are quantised stay where they are.
        how: ``model`` brings one whole network at a time, which stays until another is needed; ``sequential`` one
            layer at a time, which takes least memory and is slow.
        device: Where to compute.
    """
    movable = {n: m for n, m in networks.items() if not getattr(m, "is_quantized", False)}
    for module in movable.values():
        setattr(module, EXECUTION_DEVICE, device)
    if how == "model":
        _Turns(list(movable.values()), device)
        return
    from diffusers.hooks import apply_group_offloading

    for module in movable.values():
        apply_group_offloading(
            module, onload_device=device, offload_device=torch.device("cpu"), offload_type="leaf_level"
        )


class _Turns:
    """Networks of which one at a time is on the device: the one that computed last."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules = modules
        self._device = device
        for module in modules:
            module.register_forward_pre_hook(self._before, with_kwargs=True)
            vae: Any = module
            if hasattr(vae, "encode"):  # a VAE's pictures do not go through forward
                vae.encode = self._bringing(module, vae.encode)

    def _bring(self, module: nn.Module) -> None:
        for other in self._modules:
            if other is not module:
                other.to("cpu")
        module.to(self._device)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._bring(module)
        return self._moved(args), self._moved(kwargs)

    def _bringing(self, module: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
        def encode(*args: Any, **kwargs: Any) -> Any:
            self._bring(module)
            return call(*self._moved(args), **self._moved(kwargs))

        return encode

    def _moved(self, value: Any) -> Any:
        """Tensors in arguments, at any depth, on the device."""
        if isinstance(value, torch.Tensor):
            return value.to(self._device)
        if isinstance(value, tuple | list):
            return type(value)(self._moved(v) for v in value)
        if isinstance(value, dict):
            return {k: self._moved(v) for k, v in value.items()}
        return value
