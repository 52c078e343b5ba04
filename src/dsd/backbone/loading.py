"""From a name to a backbone: finds the files, loads the components that the family takes, puts them in their places."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dsd.backbone import hub, single_file
from dsd.backbone.base import Backbone
from dsd.backbone.catalog import Card, cards
from dsd.backbone.folder import Pipeline, file_patterns, find_weights, read_pipeline
from dsd.backbone.placement import (
    DeviceMap,
    Offload,
    Quantization,
    check_offload,
    map_devices,
    offload_networks,
    pick_device,
    quantization_config,
)
from dsd.contracts import DsdError, ModelError, OptionError

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class LoadConfig:
    """How a model is loaded; names as in diffusers.

    Attributes:
        device: Where it computes. Default: the first GPU if there is one, else the CPU.
        dtype: Of all weights: float32, float16 or bfloat16; scores are reduced in float32 whatever it is.
        device_map: ``balanced`` spreads whole networks over the GPUs; or a mapping from components, such as
            ``{"text_encoder_3": "cpu"}``, to devices.
        offload: ``model`` keeps networks in the CPU's memory and brings one at a time to the GPU, ``sequential`` one
            layer at a time. Learning works with the first alone.
        quantize_text_encoder: ``8bit`` or ``4bit`` text encoders, by bitsandbytes. Scores change with it.
        channels_last: Whether images and latents lie in memory pixel by pixel, which is faster for convolutions on
            recent GPUs in half precision.
        variant: Of the weights' files, such as ``fp16``; components without that variant use the plain files.
        revision: A commit, branch or tag on the hub. Default: that of the card, else ``main``.
        token: For the hub: an access token, or True for the saved one.
        cache_dir: The hub's cache. Default: the usual one.
        config: For a single file: the alias, hub name or pipeline folder of the model that it is of.
        allow_pickle: Whether weights may be read from pickles (``.bin``, ``.ckpt``) where there are no safetensors;
            tensors are unpickled and nothing else (``weights_only``).

    Raises:
        OptionError: If a value is not among those, or two of them exclude each other.
    """

    device: str | torch.device | None = None
    dtype: torch.dtype = torch.float32
    device_map: DeviceMap | None = None
    offload: Offload | None = None
    quantize_text_encoder: Quantization | None = None
    channels_last: bool = False
    variant: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    config: str | os.PathLike[str] | None = None
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise OptionError(f"got dtype {self.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
        for name, kinds in (("offload", Offload), ("quantize_text_encoder", Quantization)):
            if getattr(self, name) not in (None, *get_args(kinds)):
                raise OptionError(
                    f"got {name} {getattr(self, name)!r}, expected one of {', '.join(get_args(kinds))}, or None"
                )
        if isinstance(self.device_map, str) and self.device_map != "balanced":
            raise OptionError(
                f"got device_map {self.device_map!r}, expected 'balanced', or a mapping from components to devices; "
                "device names one device for all"
            )
        if self.device_map is not None and (self.device is not None or self.offload is not None):
            other = "device" if self.device is not None else "offload"
            raise OptionError(f"got device_map with {other}, expected one of them; leave the other out")
        # part of file names
        if self.variant is not None and not re.fullmatch(r"[\w-]+", self.variant):
            raise OptionError(f"got variant {self.variant!r}, expected a word such as fp16")

    @property
    def for_hub(self) -> hub.HubOptions:
        """How the hub is asked."""
        return hub.HubOptions(self.revision, self.token, self.cache_dir)


def load_backbone(model: str, **options: Any) -> Backbone:
    """Loads a pretrained text-to-image model.

    Args:
        model: An alias of ``cards.yaml``, a folder in the ``diffusers`` pipeline format, a single-file checkpoint, or
            a name on the hub.
        **options: Fields of :class:`LoadConfig`.

    Raises:
        ModelError: If there is no such model, it cannot be had or read, lacks weights, would run code of others, or
            is of a family that is not supported.
        OptionError: If an option cannot be met, here or at all.
    """
    config = LoadConfig(**options)
    mapped = config.device_map if isinstance(config.device_map, Mapping) else {}
    device = pick_device(config.device if config.device is not None else _denoiser_device(mapped))
    check_offload(config.offload, device)
    quantize = None
    if config.quantize_text_encoder is not None:
        quantize = quantization_config(config.quantize_text_encoder, config.dtype, device)
    where = hub.resolve(model)
    _check_options(model, where, config)
    try:
        if isinstance(where, Path) and where.is_file():
            pipeline, components = _from_single_file(model, where, config)
        else:
            pipeline = _find_pipeline(model, where, config)
            components = _from_folder(model, pipeline, config, device, quantize)
        _place(components, config, device)
        if config.channels_last:
            for name in ("vae", *_DENOISERS):
                if name in components:
                    components[name].to(memory_format=torch.channels_last)
        family: Any = pipeline.family
        backbone: Backbone = family(model, **components, **pipeline.settings)
    except DsdError:
        raise
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{model}: got {device} with too little memory for it, expected more; try dtype=bfloat16, "
            "offload='model', or device='cpu'"
        ) from error
    except Exception as error:  # diffusers, transformers and torch raise a dozen kinds
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model}: cannot be loaded ({line}); expected files that fit together; "
            + ("export the pipeline again with save_pretrained" if isinstance(where, Path) else "fetch it again")
        ) from error
    backbone.offload = config.offload
    card = cards().get(model)
    if card is not None and card.timesteps is not None:
        backbone.timesteps = card.timesteps
    return backbone


@dataclass(frozen=True)
class LocalCopy:
    """What of a model lies on this machine.

    Attributes:
        state: ``whole``, ``part`` (files are missing or broken), ``other`` (only other revisions) or ``none``.
        folder: Where it is, if it is.
        bytes: Of the files in that folder.
        note: What is missing, or which revisions there are.
    """

    state: Literal["whole", "part", "other", "none"]
    folder: Path | None = None
    bytes: int = 0
    note: str = ""


def local_copy(card: Card, *, cache_dir: str | Path | None = None) -> LocalCopy:
    """What of a model with a card lies on this machine: in the package, or in the hub's cache. Asks nobody."""
    if card.hub is None:
        folder: Path | None = Path(str(hub.resolve(card.name)))
    else:
        folder = hub.cached(card.hub, card.revision, cache_dir)
    if folder is None:
        others = hub.cached_revisions(str(card.hub), cache_dir)
        return LocalCopy("other", note=f"revision {', '.join(others)}") if others else LocalCopy("none")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        pipeline = read_pipeline(card.name, folder)
        for name in pipeline.components:
            if _is_network(name):
                find_weights(card.name, pipeline, name, variant=None, allow_pickle=True)
            elif not (folder / name).is_dir():
                return LocalCopy("part", folder, size, f"{name} is missing")
    except ModelError as error:
        return LocalCopy("part", folder, size, str(error))
    return LocalCopy("whole", folder, size)


def _check_options(model: str, where: Path | str, config: LoadConfig) -> None:
    """Refuses options that would be left unused: whoever gave them believes that they count."""
    local, single = isinstance(where, Path), isinstance(where, Path) and where.is_file()
    unused = {
        "revision": local and not single and config.revision is not None,
        "variant": single and config.variant is not None,
        "quantize_text_encoder": single and config.quantize_text_encoder is not None,
        "config": not single and config.config is not None,
    }
    for name, is_unused in unused.items():
        if is_unused:
            what = "a single file" if single else "a local folder" if local else "a pipeline"
            raise OptionError(f"got {name} with {what} ({model}), expected none, for it has no meaning there")


def _find_pipeline(model: str, where: Path | str, config: LoadConfig) -> Pipeline:
    """The folder of a pipeline, fetched first if it is on the hub."""
    if isinstance(where, Path):
        return read_pipeline(model, where)
    options = config.for_hub
    again = f"fetch it with: {hub.download_command(where, hub.revision_of(model, options))}"
    pipeline = read_pipeline(model, hub.fetch_index(model, where, options), again)
    hub.fetch_files(model, where, file_patterns(pipeline, variant=config.variant, pickles=False), options)
    networks = [n for n in pipeline.components if _is_network(n)]
    if config.allow_pickle and any(not any((pipeline.folder / n).glob("*.safetensors")) for n in networks):
        hub.fetch_files(model, where, file_patterns(pipeline, variant=config.variant, pickles=True), options)
    return pipeline


def _from_folder(
    model: str, pipeline: Pipeline, config: LoadConfig, device: torch.device, quantize: Any
) -> dict[str, Any]:
    """The components of a pipeline folder, one by one, so that at most one is in memory twice."""
    # all files are looked at before the first is loaded, which may take minutes
    weights = {
        name: find_weights(model, pipeline, name, variant=config.variant, allow_pickle=config.allow_pickle)
        for name in pipeline.components
        if _is_network(name)
    }
    if config.variant is not None and all(w.variant is None for w in weights.values()):
        raise ModelError(
            f"{model}: got no weights of variant {config.variant!r}, expected them in at least one component; leave "
            "variant out"
        )
    components: dict[str, Any] = {}
    for name, found in weights.items():
        kind = _class(model, name, pipeline.components[name])
        extra: dict[str, Any] = {}
        quantized = quantize is not None and name.startswith("text_encoder")
        if quantized:
            extra = {"quantization_config": quantize, "device_map": {"": device}}
        network, info = kind.from_pretrained(
            pipeline.folder,
            subfolder=name,
            dtype=config.dtype,
            variant=found.variant,
            use_safetensors=not found.pickled,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
        # transformers would fill in what a file lacks with random weights
        lacking = [*info["missing_keys"], *(str(k) for k in info["mismatched_keys"])]
        if lacking:
            raise ModelError(
                f"{model}: got {name} without {len(lacking)} of its weights (such as {lacking[0]}), expected all; "
                + pipeline.again
            )
        if config.device_map is None and config.offload is None and not quantized:
            network.to(device)
        components[name] = network
    return {**components, **_without_weights(model, pipeline)}


def _from_single_file(model: str, file: Path, config: LoadConfig) -> tuple[Pipeline, dict[str, Any]]:
    header = single_file.read_header(model, file, allow_pickle=config.allow_pickle)
    source = single_file.default_config(model, header) if config.config is None else os.fspath(config.config)
    try:
        pipeline = _find_configuration(source, config)
    except ModelError as error:
        raise ModelError(
            f"{model}: got a single file, whose configuration could not be had; {error}; or name another with config "
            "(--config)"
        ) from None
    given = _without_weights(model, pipeline)
    return pipeline, {**single_file.load_networks(model, file, pipeline, given, config.dtype), **given}


def _find_configuration(source: str, config: LoadConfig) -> Pipeline:
    """The pipeline folder that says what the weights in a single file mean; its own weights are not fetched."""
    where = hub.resolve(source)
    if isinstance(where, Path):
        return read_pipeline(source, where)
    options = config.for_hub
    again = f"fetch it with: {hub.download_command(where, hub.revision_of(source, options))}"
    pipeline = read_pipeline(source, hub.fetch_index(source, where, options), again)
    patterns = [p for p in file_patterns(pipeline, variant=None, pickles=False) if not p.endswith(".safetensors")]
    hub.fetch_files(source, where, patterns, options)
    return pipeline


def _without_weights(model: str, pipeline: Pipeline) -> dict[str, Any]:
    """Tokenizers and the scheduler."""
    found: dict[str, Any] = {}
    for name, entry in pipeline.components.items():
        if _is_network(name):
            continue
        place = pipeline.folder / name
        if not place.is_dir() or not any(place.iterdir()):
            raise ModelError(
                f"{model}: got a pipeline whose index lists {name} but without a folder of that name, expected it; "
                + pipeline.again
            )
        if name == "scheduler":
            found[name] = _scheduler(model, entry, place)
            continue
        if (place / "spiece.model").is_file() and not (place / "tokenizer.json").is_file():
            _check_sentencepiece(model, name)
        found[name] = _class(model, name, entry).from_pretrained(place, local_files_only=True)
    return found


def _scheduler(model: str, entry: tuple[str, str], place: Path) -> Any:
    """A scheduler of the pipeline's process; only the schedule is used, which every scheduler's configuration holds."""
    import diffusers

    stock = _class(model, "scheduler", entry)
    listed = stock.load_config(place)
    if entry[1].startswith("FlowMatch"):
        kind = diffusers.FlowMatchEulerDiscreteScheduler
    else:
        # one that lists no betas is of another process, which the family refuses
        kind = diffusers.DDPMScheduler if {"beta_schedule", "trained_betas"} & listed.keys() else stock
    return kind.from_pretrained(place)


def _class(model: str, name: str, entry: tuple[str, str]) -> Any:
    """The class of a component, of diffusers or transformers."""
    import diffusers
    import transformers

    library, kind = entry
    modules: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    bases = {
        "diffusers": (diffusers.ModelMixin, diffusers.SchedulerMixin),
        "transformers": (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase),
    }
    found = getattr(modules.get(library), kind, None) if not kind.startswith("_") else None
    if not (isinstance(found, type) and issubclass(found, bases[library])):
        raise ModelError(
            f"{model}: got {name} of class {library}.{kind}, expected a class of diffusers or transformers that is "
            "there; upgrade them, or use another model"
        )
    return found


def _check_sentencepiece(model: str, name: str) -> None:
    from importlib.util import find_spec

    missing = [p for p in ("sentencepiece", "google.protobuf") if not _is_installed(find_spec, p)]
    if missing:
        raise ModelError(
            f"{model}: got a {name} in sentencepiece's format, expected {' and '.join(missing)} to read it; "
            "pip install sentencepiece protobuf"
        )


def _is_installed(find_spec: Any, package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _place(components: Mapping[str, Any], config: LoadConfig, device: torch.device) -> None:
    networks = {n: c for n, c in components.items() if isinstance(c, torch.nn.Module)}
    if config.offload is not None:
        offload_networks(networks, config.offload, device)
        return
    if config.device_map is None:
        places = dict.fromkeys(networks, device)
    else:
        sizes = {n: sum(p.numel() * p.element_size() for p in m.parameters()) for n, m in networks.items()}
        places = map_devices(config.device_map, sizes, next(n for n in networks if n in _DENOISERS))
    for name, network in networks.items():
        if not getattr(network, "is_quantized", False):
            network.to(places[name])


def _denoiser_device(device_map: Mapping[str, str | int]) -> str | None:
    named = next((device_map[n] for n in (*_DENOISERS, "") if n in device_map), None)
    return f"cuda:{named}" if isinstance(named, int) else named


def _is_network(component: str) -> bool:
    return component != "scheduler" and not component.startswith("tokenizer")
