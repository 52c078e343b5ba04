"""Commands that score a few images and texts: ``score``, ``rank``, ``explain``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dsd.cli.options import MAPS, Commands, integers, matcher_of, model_options
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError

if TYPE_CHECKING:
    from dsd.pictures import Shown


def add(commands: Commands) -> None:
    """Adds these commands."""
    score = commands.add("score", _score, "Score every image against every text; higher is a better match.")
    rank = commands.add("rank", _rank, "Rank texts for one image, or images for one text, best first.")
    for command in (score, rank):
        command.add_argument("images", nargs="+", metavar="IMAGE")
        command.add_argument("--text", action="append", required=True, metavar="T", help="a caption; repeat for more")
        model_options(command)

    explain = commands.add(
        "explain",
        _explain,
        "Draw where in an image each word of a text is seen; of two texts or two images, why one fits better.",
        form=False,
    )
    explain.add_argument("images", nargs="+", metavar="IMAGE", help="one, or two for one text")
    explain.add_argument("--text", required=True, metavar="T")
    explain.add_argument("--text2", metavar="T", help="a second text for one image")
    explain.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="by its ending: .png, .pdf or .svg for papers, .html to hover over, .npz or .json for programs",
    )
    maps = explain.add_argument_group("maps")
    maps.add_argument("--phrase", action="append", metavar="P", help="words of the text to map as one; repeat for more")
    maps.add_argument("--maps", choices=MAPS, default=MAPS[0], help="what they show (default: %(default)s)")
    maps.add_argument("--draws", type=int, metavar="N", help="draws of noise a timestep: more are steadier")
    maps.add_argument("--map-timesteps", type=integers, metavar="T,T,...", help="default: six, not the score's")
    maps.add_argument("--map-layers", type=_names, metavar="L,L,...", help="layers of attention, such as up_blocks")
    maps.add_argument("--heads", type=integers, metavar="H,H,...", help="heads of each layer, from 0")
    model_options(explain)


def _score(a: argparse.Namespace) -> None:
    table = matcher_of(a).score(a.images, a.text, progress=watched())
    if a.format == "json":
        print_json(table.to_dict())
        return
    rows = [
        {"image": name, "score": f"{score:.4f}", "text": text}
        for name, line in zip(table.images, table.scores, strict=True)
        for text, score in zip(table.texts, line, strict=True)
    ]
    print_table(rows, ("image", "score", "text"))


def _rank(a: argparse.Namespace) -> None:
    if len(a.images) > 1 and len(a.text) > 1:
        raise OptionError(
            f"got {len(a.images)} images and {len(a.text)} texts, expected one of either; use dsd score for all pairs"
        )
    matcher = matcher_of(a)
    table = matcher.score(a.images, a.text, progress=watched())
    what = "image" if len(a.images) > 1 else "text"
    names = table.images if what == "image" else table.texts
    flat = table.scores.reshape(-1)
    order = sorted(range(len(flat)), key=lambda i: -flat[i])
    ranked = [{"rank": k + 1, "index": i, what: names[i], "score": float(flat[i])} for k, i in enumerate(order)]
    if a.format == "json":
        print_json({"ranking": ranked, **table.config})
        return
    print_table([{**r, "score": f"{r['score']:.4f}"} for r in ranked], ("rank", "score", what))


def _explain(a: argparse.Namespace) -> None:
    from dsd.explanation import ExplainConfig
    from dsd.pages import check_suffix, save

    if len(a.images) > 2 or (len(a.images) == 2 and a.text2 is not None):
        texts = 1 if a.text2 is None else 2
        raise OptionError(f"got {len(a.images)} images and {texts} texts, expected one of each, or two of one of them")
    if a.phrase and (len(a.images) == 2 or a.text2 is not None):
        raise OptionError("got --phrase with two images or two texts, expected one of each; explain them one by one")
    check_suffix(a.out)  # before the model, which may take long to load
    given = {"timesteps": a.map_timesteps, "draws": a.draws, "layers": a.map_layers, "heads": a.heads}
    config = ExplainConfig(a.maps, **{k: v for k, v in given.items() if v is not None})
    matcher = matcher_of(a)
    shown: Shown
    if a.text2 is not None:
        shown = matcher.compare_texts(a.images[0], a.text, a.text2, config=config)
    elif len(a.images) == 2:
        shown = matcher.compare_images(a.text, *a.images, config=config)
    else:
        shown = matcher.explain(a.images[0], a.text, config=config, phrases=a.phrase)
    save(shown, a.out)
    say(a.out)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
