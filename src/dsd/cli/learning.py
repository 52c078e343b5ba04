"""Commands that learn from examples, or make them of captions: ``negatives``, ``fit``, ``export``, ``curve``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dsd.cli.options import (
    WORLD_TASKS,
    Commands,
    accelerator_of,
    integers,
    learning_options,
    lesson_of,
    matcher_of,
    model_options,
    settle_world,
    world_options,
)
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError

SHOTS = (0, 4, 16, 64, 256)


def add(commands: Commands) -> None:
    """Adds these commands."""
    negatives = commands.add(
        "negatives", _negatives, "Set captions among wrong ones that differ in a word or two: examples without labels."
    )
    negatives.add_argument("manifest", metavar="MANIFEST", help="JSONL or CSV of images and captions of them")
    negatives.add_argument("--out", required=True, metavar="DIR", help="folder of the new manifest")
    negatives.add_argument(
        "--count", type=int, default=3, metavar="N", help="wrong captions for each at most (default: %(default)s)"
    )
    negatives.add_argument("--seed", type=int, default=0)

    fit = commands.add("fit", _fit, "Learn from labelled examples; writes an adapter that --adapter reads.")
    fit.add_argument("manifest", metavar="MANIFEST", help="JSONL or CSV of examples")
    fit.add_argument("--out", required=True, metavar="DIR", help="folder of the adapter")
    fit.add_argument("--val", metavar="MANIFEST", help="examples to stop by; default: those to learn from, by turns")
    fit.add_argument("--resume", action="store_true", help="go on with a fit of the same request that was stopped")
    fit.add_argument("--log", metavar="FILE", help="loss by step: a .jsonl file, or a folder for TensorBoard")
    learning_options(fit)
    model_options(fit, adapter=False)

    export = commands.add("export", _export, "Write an adapter's prompts for stock diffusers pipelines.", form=False)
    export.add_argument("adapter", metavar="ADAPTER", help="what was learned, as --adapter takes it")
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("--format", choices=("lora",), default="lora", help="what is written (default: %(default)s)")

    curve = commands.add(
        "curve", _curve, "Measure accuracy against the number of labelled examples, over several draws."
    )
    curve.add_argument(
        "manifest",
        metavar="MANIFEST|TASK",
        help=f"JSONL or CSV of examples to draw from, or a task of the world: {', '.join(WORLD_TASKS)}",
    )
    curve.add_argument("--held-out", metavar="MANIFEST", help="examples to measure on; a task brings its own")
    curve.add_argument("--val", metavar="MANIFEST", help="examples to stop by; default: those drawn, by turns")
    curve.add_argument(
        "--out", required=True, metavar="DIR", help="folder of curve.json and curve.png; a curve that is there goes on"
    )
    curve.add_argument(
        "--shots",
        type=integers,
        default=SHOTS,
        metavar="N,N,...",
        help=f"numbers of examples (default: {','.join(map(str, SHOTS))})",
    )
    curve.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of each number (default: %(default)s)")
    learning_options(curve)
    world_options(curve, split=False)
    model_options(curve, adapter=False)


def _negatives(a: argparse.Namespace) -> None:
    from dsd.tasks import read_manifest, with_hard_negatives, write_manifest

    made, left_out = with_hard_negatives(read_manifest(a.manifest), a.count, a.seed)
    if not made:
        raise OptionError(
            f"got {len(left_out)} captions in which no word can be swapped or replaced, expected some that share words "
            "with others; give more captions"
        )
    out = write_manifest(made, a.out)
    if a.format == "json":
        print_json({"manifest": str(out), "examples": len(made), "left_out": left_out})
        return
    say(f"{out}: {len(made)} captions, each among wrong ones")
    if left_out:
        print(
            f"dsd negatives: {len(left_out)} were left out, in which no word can be swapped or replaced "
            f"({', '.join(left_out)[:200]})",
            file=sys.stderr,
        )


def _fit(a: argparse.Namespace) -> None:
    from dsd.adapters import check_out, judged_by_turns
    from dsd.jury import FEWEST
    from dsd.tasks import read_manifest

    examples = read_manifest(a.manifest)
    validation = None if a.val is None else read_manifest(a.val)
    out = check_out(a.out)  # not after hours of learning
    config, prompt = lesson_of(a)
    if validation is not None and (a.hold_out or (a.folds and "weights" not in config.pieces)):
        raise OptionError(
            f"got --{'hold-out' if a.hold_out else 'folds'} with --val, which says what is held out; leave one out"
        )
    accelerator = accelerator_of(a)
    leads = accelerator is None or accelerator.is_main_process
    matcher = matcher_of(a)
    checkpoint = Path(f"{out}.checkpoint")
    matcher.fit(
        examples,
        validation,
        config=config,
        prompt=prompt,
        start=a.start,
        progress=watched(),
        checkpoint=checkpoint,
        resume=a.resume,
        log=a.log,
        accelerator=accelerator,
    )
    if not leads:
        return
    matcher.save_pretrained(out)
    checkpoint.unlink(missing_ok=True)  # not before what was learned is on disk
    assert matcher.adapter is not None
    training = matcher.adapter.training
    if a.format == "json":
        print_json({"adapter": str(out), **training})
        return
    figures = training["validation"]
    first = "zero-shot" if a.start is None else "as it started"
    rows = [(first, figures["before"]), ("learned", figures["after"])]
    if "as_dear" in figures:
        rows.insert(1, ("zero-shot, in as many passes as learned", figures["as_dear"]))
    others = f"on {training['validation_examples']} others"
    judges = "on the same, held out by turns" if judged_by_turns(training) else others
    say(f"{out}: learned from {training['examples']} examples; {judges}:")
    print_table([{"": name, "accuracy": f"{value:.3f}"} for name, value in rows], ("", "accuracy"))
    if training["kept"]:
        return
    was_kept = "zero-shot was kept" if a.start is None else "the prompts it started from were kept"
    # weights are kept for their own examples, held out by turns; others may object, however few
    judging = training["examples"] if config.method == "weights" else training["validation_examples"]
    if judging < FEWEST:
        print(
            f"So few held-out examples cannot show that learning helps ({FEWEST} might); {was_kept}. Give more "
            "examples, or hold out more of them."
        )
        return
    worth = "zero-shot, or not worth its passes" if a.start is None else "that"
    print(f"Learning was not clearly better there than {worth}; {was_kept}.")


def _export(a: argparse.Namespace) -> None:
    from dsd.adapters import Adapter

    say(str(Adapter.load(a.adapter).export(a.out)))


def _curve(a: argparse.Namespace) -> None:
    from dsd.curve import PICTURE, learning_curve, world_sets
    from dsd.report import format_interval
    from dsd.tasks import read_manifest

    of_world = a.manifest in WORLD_TASKS and not os.path.exists(a.manifest)
    settle_world(a, of_world)
    if of_world:
        if a.held_out is not None:
            raise OptionError(
                f"got --held-out with the world's {a.manifest}, expected a manifest to draw from; the world draws its "
                "own held-out examples"
            )
        name = ", ".join((a.manifest, *(("novel",) if a.novel else ()), a.level))
        pool, held_out = world_sets(
            a.manifest, a.level, a.count, shots=a.shots, seeds=a.seeds, seed=a.seed or 0, novel=a.novel
        )
    else:
        pool = read_manifest(a.manifest)
        if a.held_out is None:
            raise OptionError(f"got {a.manifest} without --held-out, expected a manifest of examples to measure on too")
        held_out, name = read_manifest(a.held_out), os.path.basename(a.manifest)
    validation = None if a.val is None else read_manifest(a.val)
    config, prompt = lesson_of(a)
    curve = learning_curve(
        matcher_of(a),
        pool,
        held_out,
        a.out,
        shots=a.shots,
        seeds=a.seeds,
        validation=validation,
        config=config,
        prompt=prompt,
        start=a.start,
        name=name,
        announce=lambda text: print(f"dsd curve: {text}", file=sys.stderr, flush=True),
        progress=watched(),
    )
    if a.format == "json":
        values = curve.to_dict()
        for row in values["rows"]:
            del row["outcomes"]
        print_json({"out": a.out, **values})
        return
    gain = f"gain over {'zero-shot' if a.start is None else 'its start'} [95 %]"
    rows = [
        {
            "examples": point.shots,
            "accuracy [95 %]": format_interval(point.accuracy),
            gain: "" if point.gain is None else "{value:+.3f} [{low:+.2f}, {high:+.2f}]".format(**point.gain),
            "learning kept": f"{point.kept} of {point.fits} fits" if point.fits else "",
        }
        for point in curve.points
    ]
    print_table(rows, tuple(rows[0]))
    say(os.path.join(a.out, PICTURE))
