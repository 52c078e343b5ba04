"""What a folder in the diffusers pipeline format holds, found out before any of it is loaded.

Only configurations and the headers of weights are read here. What would run code of others, what is pickled, cut short
or missing is found by its name, so that messages can say what to do about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsd.backbone.base import Backbone
from dsd.backbone.families import FAMILIES
from dsd.backbone.hub import INDEX
from dsd.contracts import ModelError

_LIBRARIES = ("diffusers", "transformers")
_CONFIGS = ("config.json", "tokenizer_config.json", "scheduler_config.json")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline folder: the family that it is of, and what that takes of it.

    Attributes:
        folder: Where it is.
        kind: The name of its diffusers class.
        family: The family that serves it.
        components: Of each component that the family takes and the folder lists, (library, class name).
        settings: The plain values that the family takes.
        again: What to do about files that are missing or broken.
    """

    folder: Path
    kind: str
    family: type[Backbone]
    components: Mapping[str, tuple[str, str]]
    settings: Mapping[str, Any]
    again: str


@dataclass(frozen=True)
class Weights:
    """The files with one component's weights.

    Attributes:
        files: All of them; several where they are in shards.
        variant: That the files are of, such as ``fp16``; None for the plain ones.
        pickled: Whether they are pickles rather than safetensors.
    """

    files: tuple[Path, ...]
    variant: str | None
    pickled: bool


def read_pipeline(model: str, folder: Path, again: str = "download or export it again") -> Pipeline:
    """Reads ``model_index.json``.

    Args:
        model: Its name, for messages.
        folder: Where it is.
        again: What to do about files that are missing or broken.

    Raises:
        ModelError: If the folder is none in the pipeline format, asks for code of others, is of no family that is
            supported, or lacks components.
    """
    index = folder / INDEX
    try:
        listed = json.loads(index.read_text("utf-8"))
        if not isinstance(listed, dict):
            raise TypeError
    except FileNotFoundError:
        raise ModelError(f"{model}: got {_other_kind(folder)}") from None
    except (OSError, ValueError, TypeError):
        raise ModelError(
            f"{model}: got a folder without a readable {INDEX}, expected a pipeline saved by save_pretrained; {again}"
        ) from None
    kind = listed.get("_class_name")
    _refuse_code_of_others(model, kind, listed)
    family = next((f for f in FAMILIES if kind in f.pipelines), None)
    if family is None:
        known = ", ".join(sorted(p for f in FAMILIES for p in f.pipelines))
        raise ModelError(
            f"{model}: got a pipeline of class {kind or 'unknown'}, expected one of {known}; a further family is one "
            "file, see docs/bring-your-own-model.md"
        )
    components = {
        name: (str(listed[name][0]), str(listed[name][1]))
        for name in (*family.components, *family.optional_components)
        if isinstance(listed.get(name), list) and len(listed[name]) == 2 and listed[name][0] is not None
    }
    missing = [name for name in family.components if name not in components]
    if missing:
        raise ModelError(
            f"{model}: got a pipeline of class {kind} without {', '.join(missing)}, expected "
            f"{', '.join(family.components)}; {again}"
        )
    for name in components:
        if not (folder / name).is_dir():
            continue  # the weights say so, or the loader of what has none
        for config in _CONFIGS:
            if "auto_map" in _read_config(model, folder / name / config, again):
                raise ModelError(
                    f"{model}: got {name}/{config} with auto_map, which runs code that comes with the model; expected "
                    "components of diffusers and transformers alone, for no code of others is run; remove auto_map "
                    "if the stock class computes the same"
                )
    settings = {name: listed[name] for name in family.settings if name in listed}
    return Pipeline(folder, str(kind), family, components, settings, again)


def file_patterns(pipeline: Pipeline, *, variant: str | None, pickles: bool) -> list[str]:
    """Patterns of the files that have to be fetched to load a pipeline: configurations, vocabularies, weights."""
    ends = (".bin",) if pickles else (".safetensors",)
    found = [INDEX]
    for name in pipeline.components:
        found += [f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model"]
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            for form in {"", f".{variant}" if variant else ""}:
                found += [f"{name}/{stem}{form}{end}" for end in ends]
                found += [f"{name}/{stem}{form}-[0-9]*-of-[0-9]*[0-9]{end}" for end in ends]
    return found


def find_weights(model: str, pipeline: Pipeline, component: str, *, variant: str | None, allow_pickle: bool) -> Weights:
    """The files with a component's weights: those of the variant before plain ones, safetensors before pickles.

    Raises:
        ModelError: If there are none, only pickles that are not allowed, or files that were cut short.
    """
    place, again = pipeline.folder / component, pipeline.again
    forms = (variant, None) if variant else (None,)
    for form in forms:
        files = _listed_files(model, place, ("diffusion_pytorch_model", "model"), ".safetensors", form, again)
        if files:
            for file in files:
                check_safetensors(model, file, f"{component}/{file.name}", again)
            return Weights(files, form, pickled=False)
    for form in forms:
        files = _listed_files(model, place, ("diffusion_pytorch_model", "pytorch_model"), ".bin", form, again)
        if files and not allow_pickle:
            raise ModelError(
                f"{model}: got pickled weights alone for {component} ({files[0].name}), expected safetensors, which "
                "hold no code; look for a version with safetensors, or allow pickles with allow_pickle=True "
                "(--allow-pickle): then tensors are unpickled and nothing else"
            )
        if files:
            return Weights(files, form, pickled=True)
    wanted = f" of variant {variant!r}, or plain ones," if variant else ""
    raise ModelError(
        f"{model}: got no weights{wanted} for {component}, expected {component}/"
        f"diffusion_pytorch_model.safetensors or model.safetensors; {again}"
    )


def check_safetensors(model: str, file: Path, name: str, again: str = "download it again") -> dict[str, Any]:
    """Reads the header of a safetensors file.

    Returns:
        Of each tensor, its ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        ModelError: If it is no safetensors file, or shorter or longer than its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            first = stream.read(8)
            if _LFS.startswith(first) and len(first) == 8:
                raise ModelError(
                    f"{model}: got a pointer of git-lfs for {name}, expected the file itself; run `git lfs pull` in "
                    "the folder that was cloned"
                )
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(size - 8, 100_000_000):
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{model}: got {name}, which cannot be read ({type(error).__name__}), expected a safetensors file; {again}"
        ) from None
    if size != 8 + length + end:
        raise ModelError(
            f"{model}: got {name} with {size:,} bytes, expected {8 + length + end:,} as its header says; {again}"
        )
    return dict(header)


def _listed_files(
    model: str, place: Path, stems: tuple[str, ...], end: str, variant: str | None, again: str
) -> tuple[Path, ...] | None:
    """The file, or the shards that its index lists; None if there is neither."""
    form = f".{variant}" if variant else ""
    for stem in stems:
        whole = place / f"{stem}{form}{end}"
        if whole.is_file():
            return (whole,)
        index = place / f"{stem}{end}.index{form}.json"
        if not index.is_file():
            continue
        listed = _read_config(model, index, again).get("weight_map")
        shards = sorted(set(listed.values())) if isinstance(listed, dict) and listed else []
        # a shard's name could lead out of the folder
        if not shards or not all(isinstance(s, str) and s == os.path.basename(s) and s.endswith(end) for s in shards):
            raise ModelError(
                f"{model}: got {place.name}/{index.name} that lists no shards of the folder, expected names of "
                f"{end} files beside it; {again}"
            )
        missing = [s for s in shards if not (place / s).is_file()]
        if missing:
            raise ModelError(
                f"{model}: got {len(shards) - len(missing)} of {len(shards)} shards of {place.name}, expected all; "
                f"{missing[0]} is missing; {again}"
            )
        return tuple(place / s for s in shards)
    return None


def _refuse_code_of_others(model: str, kind: Any, listed: Mapping[str, Any]) -> None:
    """Refuses an index that names classes which are not those of diffusers and transformers."""
    import diffusers

    named = {"_class_name": kind} if isinstance(kind, list) else {}
    for name, value in listed.items():
        if name.startswith("_") or not (isinstance(value, list) and [type(v) for v in value] == [str, str]):
            continue
        # the safety checker and its like are of a module of diffusers' pipelines
        if value[0] not in _LIBRARIES and not hasattr(diffusers.pipelines, value[0]):
            named[name] = value
    if named:
        name, value = next(iter(named.items()))
        raise ModelError(
            f"{model}: got an index that takes {name} from the module {value[0]!r}, which comes with the model; "
            "expected classes of diffusers and transformers alone, for no code of others is run"
        )


def _read_config(model: str, file: Path, again: str) -> Mapping[str, Any]:
    """A JSON file of the folder; nothing if it is not there."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise ModelError(
            f"{model}: got {file.parent.name}/{file.name}, which cannot be read, expected a JSON object; {again}"
        ) from None
    return found


def _other_kind(folder: Path) -> str:
    """What a folder without ``model_index.json`` seems to be, and what to do."""
    expected = f"expected a pipeline saved by save_pretrained, with {INDEX}"
    if (folder / "adapter_config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file():
        return f"a folder with an adapter, {expected}; name it with adapter (--adapter)"
    files = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".ckpt"))
    if (folder / "config.json").is_file():
        return f"a folder with one network, {expected}; name the folder of the whole pipeline"
    if files:
        return f"a folder with {files[0]}, {expected}; if the file holds a whole model, name the file itself"
    if not any(folder.iterdir()):
        return f"an empty folder, {expected}"
    return f"a folder without {INDEX}, {expected}"
