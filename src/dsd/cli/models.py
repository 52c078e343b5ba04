"""Commands about models: ``models`` lists those with short names, ``models check`` looks one through."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsd.cli.options import Commands, loading_of, loading_options
from dsd.cli.printing import print_json, print_table, say
from dsd.contracts import ModelError

if TYPE_CHECKING:
    from dsd.check import ModelCheck

_STATES = {"whole": "yes", "part": "in part", "other": "another revision", "none": "no"}


def add(commands: Commands) -> None:
    """Adds these commands."""
    models = commands.add("models", _list, "List the models with short names, and what of them is on this machine.")
    actions = models.add_subparsers(dest="action", metavar="check")
    text = (
        "Load a model, say what it is made of, and test on it what scores rely on; exit status 2 if something is off."
    )
    check = actions.add_parser("check", help=text, description=text)
    check.set_defaults(run=_check, command="models check")
    check.add_argument("model", metavar="M", help="alias, hub name, folder or single file")
    check.add_argument("--size", type=int, metavar="PX", help="pixels a side (default: the model's own)")
    check.add_argument(
        "--format", choices=("text", "json"), default=argparse.SUPPRESS, help="how results are printed"
    )  # that before the action holds
    loading_options(check)


def _list(a: argparse.Namespace) -> None:
    from dsd.backbone import FAMILIES, cards, local_copy

    rows: list[dict[str, Any]] = []
    for card in cards().values():
        found = local_copy(card)
        family = next(f for f in FAMILIES if card.pipeline in f.pipelines)
        rows.append(
            {
                "name": card.name,
                "family": family.__name__.removesuffix("Backbone"),
                "hub": card.hub,
                "revision": card.revision,
                "resolution": card.resolution,
                "prediction_type": card.prediction_type,
                "parameters": sum(card.parameters.values()),
                "bytes_in_bf16": card.bytes_in_bf16,
                "layers": card.layers,
                "timesteps": card.timesteps or family.timesteps,
                "licence": card.licence,
                "gated": card.gated,
                "installed": found.state,
                "folder": found.folder,
                "bytes_on_disk": found.bytes,
                "note": found.note,
            }
        )
    if a.format == "json":
        print_json({"models": rows})
        return
    shown = [
        {
            **row,
            "pixels": row["resolution"],
            "predicts": row["prediction_type"],
            "bf16": _gigabytes(row["bytes_in_bf16"]),
            "licence": f"{row['licence']}{' (gated)' if row['gated'] else ''}",
            "here": _STATES[str(row["installed"])],
            "hub": row["hub"] or "part of this package",
        }
        for row in rows
    ]
    print_table(shown, ("name", "here", "family", "pixels", "predicts", "bf16", "licence", "hub"))


def _check(a: argparse.Namespace) -> None:
    from dsd.backbone import load_backbone
    from dsd.check import check_model

    found = check_model(load_backbone(a.model, **loading_of(a)), size=a.size)
    if a.format == "json":
        print_json(found.to_dict())
    else:
        _print(found)
    if not found.passed:
        off = ", ".join(f.name for f in found.findings if not f.passed)
        raise ModelError(
            f"{a.model}: got {off} beyond the limits, expected all within them; scores of it are not to be trusted as "
            "it was loaded"
        )


def _print(found: ModelCheck) -> None:
    latent = " x ".join(map(str, found.latent_shape))
    heads = sum(layer.heads for layer in found.layers)
    tokens = sorted({layer.tokens for layer in found.layers})
    facts: Mapping[str, Any] = {
        "family": f"{found.family} ({found.denoiser})",
        "predicts": found.prediction_type,
        "resolution": f"{found.image_size} pixels, latents {latent}",
        "timesteps": ", ".join(map(str, found.timesteps)),
        "attention": f"{len(found.layers)} layers, {heads} heads, {' or '.join(map(str, tokens)) or 'no'} tokens",
        "parameters": ", ".join(f"{name} {count:,}" for name, count in found.parameters.items()),
        "memory": f"{_gigabytes(sum(found.bytes.values()))} in {found.dtype} on {found.device}",
    }
    print_table([{"": name, found.model: value} for name, value in facts.items()], ("", found.model))
    if found.layers:
        say("")
        rows = [{"layer": x.name, "heads": x.heads, "positions": x.positions, "tokens": x.tokens} for x in found.layers]
        print_table(rows, ("layer", "heads", "positions", "tokens"))
    say("")
    tests = [
        {
            "test": finding.name,
            "": "" if finding.limit is None else "ok" if finding.passed else "OFF",
            "found": "" if finding.value is None else f"{finding.value:.2g}",
            "limit": "" if finding.limit is None else f"{finding.limit:.2g}",
            "what": finding.note,
        }
        for finding in found.findings
    ]
    print_table(tests, ("test", "", "found", "limit", "what"))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
