"""Model names => files on this machine: aliases, folders, single files, the hub and its cache.

Everything that the hub can answer is answered here: the rest of the package only ever reads local files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsd.backbone.catalog import TINY, Card, cards
from dsd.contracts import ModelError

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""How the names of files end that may hold a whole model."""


@dataclass(frozen=True)
class HubOptions:
    """How the hub is asked.

    Attributes:
        revision: A commit, branch or tag; None for the card's, else ``main``.
        token: An access token, True for the one that ``hf auth login`` saved; None decides by itself.
        cache_dir: The hub's cache; None for the usual one.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None


def resolve(model: str) -> Path | str:
    """An alias, folder, single file or hub name => the folder or file, or the hub name.

    Raises:
        ModelError: If it is none of these.
    """
    if model == TINY:
        return Path(str(files("dsd.tiny").joinpath("weights")))
    card = cards().get(model)
    if card is not None and card.hub is not None:
        return card.hub
    path = Path(os.path.expanduser(model))  # Path's own raises where there is no such user
    try:
        if model and (path.is_dir() or (path.is_file() and path.suffix.lower() in SINGLE_FILES)):
            return path
        is_there = bool(model) and path.exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        is_there = False
    if is_there:
        raise ModelError(
            f"{model}: got a file that ends in {path.suffix or 'nothing'!r}, expected a folder in the diffusers "
            f"pipeline format, or a checkpoint that ends in {', '.join(SINGLE_FILES)}"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or not all(model.split("/")):
        raise ModelError(
            f"got model {model!r}, expected an alias ({', '.join(cards())}), a folder in the diffusers pipeline "
            "format, a single-file checkpoint, or a hub name such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    return model


def card_of(model: str) -> Card | None:
    """The card of an alias, or of a hub name that has one."""
    return cards().get(model) or next((c for c in cards().values() if c.hub == model), None)


def revision_of(model: str, options: HubOptions) -> str | None:
    """The revision that is loaded of an alias or hub name: the one asked for, else that of the alias's card."""
    card = cards().get(model)
    return options.revision or (None if card is None else card.revision)


def download_command(hub: str, revision: str | None) -> str:
    """What to type to have a model in the cache."""
    return f"hf download {hub}" + ("" if revision is None else f" --revision {revision}")


def fetch_index(model: str, hub: str, options: HubOptions) -> Path:
    """The snapshot folder of a model on the hub, with its ``model_index.json``, from the cache where it is there.

    Raises:
        ModelError: If it cannot be had; says how to get it.
    """
    from huggingface_hub import hf_hub_download

    revision = revision_of(model, options)
    found = _ask(
        lambda: hf_hub_download(hub, INDEX, revision=revision, token=options.token, cache_dir=options.cache_dir),
        model,
        hub,
        options,
    )
    return Path(found).parent


def fetch_files(model: str, hub: str, patterns: Sequence[str], options: HubOptions) -> Path:
    """The snapshot folder with the files that match any of the patterns, where the repository has such.

    What cannot be reached is left to whoever needs the files to find missing.

    Raises:
        ModelError: If the hub refuses.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    def call() -> str:
        try:
            return str(
                snapshot_download(
                    hub,
                    revision=revision_of(model, options),
                    token=options.token,
                    cache_dir=options.cache_dir,
                    allow_patterns=list(patterns),
                )
            )
        except IncompleteSnapshotError as error:
            return error.snapshot_path

    return Path(_ask(call, model, hub, options))


def cached(hub: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """The snapshot folder of a model in the cache, whole or not; None if there is none. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, INDEX, cache_dir=cache_dir, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def cached_revisions(hub: str, cache_dir: str | Path | None = None) -> list[str]:
    """The commits of a model that the cache holds, as far as they have a ``model_index.json``."""
    from huggingface_hub import constants

    root = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{hub.replace('/', '--')}" / "snapshots"
    return sorted(index.parent.name for index in root.glob(f"*/{INDEX}"))


def _ask(call: Callable[[], Any], model: str, hub: str, options: HubOptions) -> Any:
    """Calls the hub's client, whose errors become ours."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = model if model == hub else f"{model} ({hub})"
    revision = revision_of(model, options)
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    try:
        return call()
    except GatedRepoError:
        raise ModelError(
            f"{name}: got a gated model that this account has no access to, expected access; ask for it at "
            f"https://huggingface.co/{hub}, then {log_in}"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: got a name that the hub does not know, or a private or gated model without being logged in; "
            f"expected an alias ({', '.join(cards())}), a folder, or a model that can be reached; check the name, or "
            + log_in
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{name}: got revision {revision!r}, which the hub does not know; expected a commit, branch or tag of "
            f"https://huggingface.co/{hub}/commits/main; leave it out for the latest"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ModelError(_not_here(name, hub, revision, options)) from None
    except EntryNotFoundError:
        raise ModelError(
            f"{name}: got a repository without {INDEX}, expected one in the diffusers pipeline format; if it holds "
            "single-file checkpoints, download one and name the file"
        ) from None
    except LocalTokenNotFoundError:
        raise ModelError(f"{name}: got token=True with no token saved, expected one; {log_in}") from None
    except HFValidationError:
        raise ModelError(
            f"got model {hub!r}, expected a hub name such as stabilityai/stable-diffusion-xl-base-1.0 "
            f"or an alias ({', '.join(cards())})"
        ) from None
    except (HfHubHTTPError, OSError) as error:  # server errors, connections that break off, a full disk
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ModelError(
                f"{name}: got no access ({status}), expected it; see https://huggingface.co/{hub}, then {log_in}"
            ) from None
        raise ModelError(
            f"{name}: got an error while it was fetched ({_first_line(error)}), expected the hub's answer; try "
            f"again, or fetch it with {download_command(hub, revision)}"
        ) from error


def _not_here(name: str, hub: str, revision: str | None, options: HubOptions) -> str:
    """What to say of a model that is not in the cache while the hub cannot be asked."""
    from huggingface_hub import constants

    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    others = [r for r in cached_revisions(hub, options.cache_dir) if r != revision]
    there = f"; another revision is there, revision={others[-1]} takes that" if others else ""
    at = "" if revision is None else f" at revision {revision}"
    return (
        f"{name}: got a model that is not in the hub's cache{at}, and {why}; expected its files there; where there is "
        f"a network, fetch it with: {download_command(hub, revision)}{there}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
