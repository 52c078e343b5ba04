"""Latents and token states on disk, so that no picture or caption is encoded twice by the same networks.

A file is named by a hash of all that decides what is in it: the picture's pixels or the caption, the weights, the
configuration, precision and kind of device of the networks that encode it. So files of many models share a folder, none
is ever out of date, and a folder can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import dsd
from dsd.backbone import Backbone, Latents, TextStates
from dsd.backbone.base import CaptionWords
from dsd.contracts import OptionError

LIMIT = 10 * 2**30
"""Bytes of a folder by default."""


class Folder:
    """Files by key, of bounded size together; those not used for longest make room.

    Several processes may share it: a file appears whole, by renaming, and two that write one write the same. Whoever
    finds it too large makes room; a file that another has deleted meanwhile is one that is not there.

    Args:
        path: Made if it is not there.
        limit: Bytes of all files together; passed by what a few writes add, until room is made.

    Raises:
        OptionError: If it cannot be made or written to, or the limit is not positive.
    """

    PART = 0.9
    """Of the limit, what is left after room was made."""
    EVERY = 64
    """Writes after which what others wrote is counted too."""

    def __init__(self, path: str | os.PathLike[str], limit: int = LIMIT) -> None:
        if limit < 1:
            raise OptionError(f"got a limit of {limit} bytes, expected 1 or more")
        self.path, self.limit = Path(path), limit
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{path}: got no folder ({error.strerror}), expected one to keep encodings in") from None
        self._size: int | None = None
        self._writes = 0

    def get(self, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors of a key and the text beside them; None if they are not there. A broken file is deleted."""
        file = self._file(key)
        try:
            with safe_open(str(file), framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
                beside = dict(opened.metadata() or {})
        except (FileNotFoundError, RuntimeError):  # torch, which opens it again, finds it deleted meanwhile
            return None
        except (SafetensorError, OSError):
            with suppress(OSError):
                file.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(file)  # used now
        return found, beside

    def put(self, key: str, tensors: Mapping[str, Tensor], beside: Mapping[str, str] | None = None) -> None:
        """Keeps tensors under a key. What cannot be written is not kept, as when the disk is full."""
        data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, dict(beside or {}))
        if len(data) > self.limit:
            return
        file = self._file(key)
        part = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}.part")
        try:
            file.parent.mkdir(exist_ok=True)
            part.write_bytes(data)
            part.replace(file)
        except OSError:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            return
        self._writes += 1
        if self._size is None or self._writes % self.EVERY == 0:
            self._size = sum(size for _, size, _ in self._files())
        else:
            self._size += len(data)
        if self._size > self.limit:
            self._make_room()

    def _file(self, key: str) -> Path:
        return self.path / key[:2] / f"{key}.safetensors"

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was used last, its size, and where it is."""
        found = []
        for file in self.path.glob("??/*"):
            with suppress(OSError):
                state = file.stat()
                found.append((state.st_mtime, state.st_size, file))
        return found

    def _make_room(self) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        # a part that a killed process left behind counts, and is as old as it is
        for _, size, file in files:
            if total <= self.limit * self.PART:
                break
            with suppress(OSError):
                file.unlink(missing_ok=True)
                total -= size
        self._size = total


class Encodings:
    """A backbone's encodings in a folder.

    Args:
        folder: Where.
        backbone: Whose networks encode.

    Raises:
        OptionError: If a network's weights cannot be read, because they are offloaded layer by layer or quantised.
    """

    def __init__(self, folder: Folder, backbone: Backbone) -> None:
        self._folder = folder
        self._backbone = backbone
        parts = {name: getattr(backbone, name, None) for name in (*backbone.components, *backbone.optional_components)}
        kind = {"family": type(backbone).__name__, "dsd": dsd.__version__, "device": backbone.device.type}
        self._images = _digest(kind, {n: p for n, p in parts.items() if n == "vae"})
        encoders = {n: p for n, p in parts.items() if n.startswith(("text_encoder", "tokenizer")) and p is not None}
        # what a class-conditional model is told is no encoding
        told = {**kind, "dtype": str(backbone.dtype), **backbone.caption_settings}
        self._texts = _digest(told, encoders) if encoders else None

    def latent(self, picture: str) -> Latents | None:
        """(c, h, w) of the picture with that content hash."""
        found = self._folder.get(self._key("latent", self._images, picture))
        latent = None if found is None else found[0].get("latent")
        return None if latent is None else latent.to(self._backbone.device)

    def keep_latent(self, picture: str, latent: Latents) -> None:
        self._folder.put(self._key("latent", self._images, picture), {"latent": latent})

    def text(self, text: str) -> TextStates | None:
        """Token states of a caption."""
        found = None if self._texts is None else self._folder.get(self._key("text", self._texts, text))
        if found is None:
            return None
        tensors, beside = found
        at = {name: tensor.to(self._backbone.device) for name, tensor in tensors.items()}
        try:
            words = tuple(
                CaptionWords(tuple(word["spelling"]), tuple(tuple(places) for places in word["tokens"]))
                for word in json.loads(beside["words"])
            )
            return TextStates(at["states"], at["own"], words, at.get("pooled"), at.get("mask"))
        except (KeyError, TypeError, ValueError):  # another's file
            return None

    def keep_text(self, text: str, states: TextStates) -> None:
        if self._texts is None:
            return
        named = {"states": states.states, "own": states.own, "pooled": states.pooled, "mask": states.mask}
        words = [{"spelling": w.spelling, "tokens": w.tokens} for w in states.words]
        tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
        self._folder.put(self._key("text", self._texts, text), tensors, {"words": json.dumps(words)})

    def _key(self, what: str, networks: str, content: str) -> str:
        said = json.dumps([what, networks, content])
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=20).hexdigest()


def _digest(kind: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """A hash of networks, all their weights and their configuration, and of tokenizers."""
    digest = hashlib.blake2b(json.dumps(kind, sort_keys=True).encode(), digest_size=20)
    for name, part in parts.items():
        told: Any
        if isinstance(part, nn.Module):
            told = {"config": _plain(part.config), "weights": _weights(name, part)}
        else:
            told = {"type": type(part).__name__, "vocabulary": part.get_vocab(), "length": part.model_max_length}
        digest.update(json.dumps([name, told], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's values, but for where it came from and what wrote it."""
    to_dict: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    values = dict(config) if to_dict is None else to_dict()
    return {k: v for k, v in values.items() if not k.startswith("_") and "version" not in k}


def _weights(name: str, module: nn.Module) -> dict[str, list[Any]]:
    """Of each tensor its shape, its type and a hash of its bytes."""
    found = {}
    for key, value in module.state_dict().items():
        if value.device.type == "meta" or value.dtype not in _READABLE:
            raise OptionError(
                f"got a {name} whose weights cannot be read to tell it from others, because they are offloaded layer "
                "by layer or quantised, expected weights in memory; leave the folder for encodings out"
            )
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[key] = [list(value.shape), str(value.dtype), hashlib.blake2b(plain, digest_size=16).hexdigest()]
    return found


_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
