"""Commands that score a few images and texts: ``score``, ``rank``, ``explain``."""

from __future__ import annotations

import argparse

from dsd.cli.options import Commands, matcher_of, model_options
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError


def add(commands: Commands) -> None:
    """Adds these commands."""
    score = commands.add("score", _score, "Score every image against every text; higher is a better match.")
    rank = commands.add("rank", _rank, "Rank texts for one image, or images for one text, best first.")
    for command in (score, rank):
        command.add_argument("images", nargs="+", metavar="IMAGE")
        command.add_argument("--text", action="append", required=True, metavar="T", help="a caption; repeat for more")
        model_options(command)

    explain = commands.add("explain", _explain, "Draw where in an image each word of a text is seen.", form=False)
    explain.add_argument("images", nargs=1, metavar="IMAGE")
    explain.add_argument("--text", required=True, metavar="T")
    explain.add_argument("--out", required=True, metavar="FILE", help="a PNG")
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
    from dsd.report import word_sheet

    found = matcher_of(a).explain(a.images[0], a.text)
    word_sheet(a.out, found.image, list(zip(found.words, found.maps, strict=True)))
    say(a.out)
