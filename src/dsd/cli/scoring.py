"""Commands that score a few images and texts: ``score``, ``rank``, ``explain``."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.cli.options import MAPS, Commands, integers, matcher_of, model_options
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError

if TYPE_CHECKING:
    from dsd.contracts import Ranked
    from dsd.pictures import Shown
    from dsd.race import Budget


def add(commands: Commands) -> None:
    """Adds these commands."""
    score = commands.add("score", _score, "Score every image against every text; higher is a better match.")
    rank = commands.add("rank", _rank, "Rank texts for one image, or images for one text, best first.")
    for command in (score, rank):
        command.add_argument("images", nargs="+", metavar="IMAGE")
        texts = command.add_mutually_exclusive_group(required=True)
        texts.add_argument("--text", action="append", metavar="T", help="a caption; repeat for more")
        texts.add_argument("--texts", metavar="FILE", help="a file of captions, one a line")
        model_options(command)
    few = rank.add_argument_group("many candidates", "a pass of the denoiser for each takes long")
    few.add_argument(
        "--budget",
        metavar="N|Ns",
        help="passes of the denoiser at most, or seconds (10s); they go to candidates that can still come first",
    )
    few.add_argument(
        "--error",
        type=float,
        metavar="P",
        help="the risk, at most, of dropping the candidate that all passes would put first, while the budget lasts "
        "(default with a budget: 0.01; alone, it is what ends the race)",
    )
    few.add_argument("--first-stage", metavar="B", help="a baseline that sees all candidates first, such as clip")
    few.add_argument("--first-model", metavar="M", help="its model (default: its own)")
    few.add_argument("--keep", type=int, metavar="N", help="how many go on from it (default: 100)")

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
    texts = _texts(a)
    table = matcher_of(a).score(a.images, texts, progress=watched())
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
    texts = _texts(a)
    if len(a.images) > 1 and len(texts) > 1:
        raise OptionError(
            f"got {len(a.images)} images and {len(texts)} texts, expected one of either; use dsd score for all pairs"
        )
    what = "image" if len(a.images) > 1 else "text"
    budget = _budget(a)
    first = None
    if a.first_stage is not None:
        from dsd.baselines import baseline

        first = baseline(a.first_stage, **({} if a.first_model is None else {"model": a.first_model}))
    elif a.first_model is not None:
        raise OptionError(f"got --first-model {a.first_model}, expected --first-stage too")
    elif a.keep is not None:
        raise OptionError(f"got --keep {a.keep}, expected --first-stage too")
    keep = 100 if a.keep is None else a.keep
    matcher = matcher_of(a)
    query, candidates = (Path(a.images[0]), texts) if what == "text" else (texts[0], [Path(i) for i in a.images])
    ranking = matcher.rank(query, candidates, budget=budget, first_stage=first, keep=keep, progress=watched())
    if a.format == "json":
        rows = [
            {"rank": k + 1, "index": r.index, what: r.candidate, "score": r.score, **_spent(r)}
            for k, r in enumerate(ranking)
        ]
        told = {} if budget is None else {"budget": budget.to_dict()}
        if first is not None:
            told["first_stage"] = {"keep": keep, **first.config}
        print_json({"ranking": rows, **matcher.config, **told})
        return
    if len(ranking) < len(candidates):
        say(f"the first stage kept {len(ranking)} of {len(candidates)}")
    shown = [
        {
            "rank": k + 1,
            "score": f"{r.score:.4f}",
            "passes": r.passes,
            "interval": "" if r.interval is None else "{:.4f} to {:.4f}".format(*r.interval),
            what: r.candidate,
        }
        for k, r in enumerate(ranking)
    ]
    print_table(shown, ("rank", "score", what) if budget is None else ("rank", "score", "interval", "passes", what))


def _spent(ranked: Ranked) -> dict[str, Any]:
    """What JSON says of a candidate's part in a race; an interval that is not known is left out."""
    if ranked.interval is None:
        return {}
    known = all(math.isfinite(end) for end in ranked.interval)
    return {"passes": ranked.passes, "interval": list(ranked.interval) if known else None}


def _budget(a: argparse.Namespace) -> Budget | None:
    from dsd.race import Budget

    if a.budget is None and a.error is None:
        return None
    budget = Budget() if a.budget is None else Budget.of(a.budget)
    return budget if a.error is None else replace(budget, error=a.error)


def _texts(a: argparse.Namespace) -> list[str]:
    """The captions, as they were given or from a file."""
    if a.texts is None:
        return list(a.text)
    try:
        lines = Path(a.texts).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"{a.texts}: got {error}, expected a text file in UTF-8 with a caption a line") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise OptionError(f"{a.texts}: got no captions, expected one a line")
    return texts


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
