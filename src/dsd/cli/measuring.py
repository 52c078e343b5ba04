"""Commands that measure matchers on labelled examples: ``eval``, ``compare``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.baselines import BASELINES, baseline, load_baseline
from dsd.cli.options import (
    WORLD_TASKS,
    Commands,
    given_of,
    learning_given,
    learning_options,
    lesson_of,
    matcher_of,
    model_options,
    refuse_idle,
    settle_world,
    world_options,
)
from dsd.cli.printing import print_json, print_table, say, watched
from dsd.contracts import OptionError

if TYPE_CHECKING:
    import numpy as np

    from dsd.contracts import Example, ImageInput
    from dsd.evaluate import Result
    from dsd.matcher import Matcher
    from dsd.scores import ScoreConfig
    from dsd.trial import Lesson
    from dsd.work import Cost

BY_TAG = ("accuracy", "text", "image", "group", "soft-accuracy")
"""Metrics that tables have for each tag; JSON has all."""
GAIN = "B less A [95 %]"
LONG = 10
"""Seconds from which on an evaluation's cost is told before."""


def add(commands: Commands) -> None:
    """Adds these commands."""
    evaluate = commands.add("eval", _eval, "Measure a matcher on labelled examples, with confidence intervals.")
    evaluate.add_argument(
        "manifest",
        metavar="MANIFEST|TASK",
        help=f"JSONL or CSV of examples, a task of the world ({', '.join(WORLD_TASKS)}), or with --data a benchmark",
    )
    evaluate.add_argument(
        "--data", metavar="DIR", help="folder that image paths are relative to (default: the manifest's); a benchmark's"
    )
    evaluate.add_argument("--limit", type=int, metavar="N", help="N of the examples, drawn at random, always the same")
    evaluate.add_argument(
        "--out",
        metavar="FILE.json|DIR",
        help="also save the whole result, scores included; into a folder with the scores as Parquet too, and part by "
        "part, so that the same command goes on where it was stopped",
    )
    evaluate.add_argument(
        "--report", metavar="FILE.html", help="also show the worst and the closest examples; a folder for --out has it"
    )
    evaluate.add_argument(
        "--failures", type=int, default=6, metavar="N", help="how many of each kind it shows (default: %(default)s)"
    )
    group = evaluate.add_argument_group("baselines")
    group.add_argument(
        "--baseline",
        choices=BASELINES,
        metavar="NAME",
        help=f"measure another method instead: {', '.join(BASELINES)}",
    )
    group.add_argument(
        "--baseline-model", metavar="M", help="its model: clip-tiny, tiny, a folder or a hub name (default: its own)"
    )
    group = evaluate.add_argument_group("few-shot")
    group.add_argument("--shots", type=int, metavar="N", help="learn from N examples before measuring")
    group.add_argument(
        "--shot-seed", type=int, default=0, metavar="S", help="which examples, and how to learn (default: %(default)s)"
    )
    group.add_argument(
        "--train", metavar="MANIFEST", help="examples to draw from; default for the world: its few-shot split"
    )
    learning_options(evaluate)
    world_options(evaluate, benchmark=True)
    model_options(evaluate)
    evaluate.set_defaults(ours={name: evaluate.get_default(name) for name in _OURS})

    compare = commands.add("compare", _compare, "Compare two results on the same examples, paired example by example.")
    for name in "ab":
        compare.add_argument(name, metavar=name.upper(), help="what eval --out saved: a .json file or a folder")


def _eval(a: argparse.Namespace) -> None:
    from dsd import trial
    from dsd.evaluate import check_parquet, claim, dataset_checksum, evaluate

    if a.failures < 0:
        raise OptionError(f"got --failures {a.failures}, expected 0 or more")
    if a.report is not None and not a.report.endswith((".html", ".htm")):
        raise OptionError(f"got --report {a.report}, expected a name that ends in .html")
    folder = None if a.out is None or a.out.endswith(".json") else a.out
    if folder is not None:
        check_parquet()
        if os.path.isfile(folder):
            raise OptionError(f"got the file {folder} for --out, expected a folder, or a name that ends in .json")
    examples, credits, source = _examples(a)  # before the model, which may take long to load
    lesson = _few_shot(a, examples)
    if a.baseline is not None:
        _finish(a, _eval_baseline(a, examples, credits, source, lesson, folder), examples, folder)
        return
    if a.baseline_model is not None:
        raise OptionError("got --baseline-model without --baseline, expected both; --model names ours")
    matcher = matcher_of(a)
    request = trial.request(matcher, source, adapter=a.adapter, lesson=lesson)
    if lesson is not None:
        if folder is not None:
            claim(folder, dataset_checksum(examples, credits), request)  # not after hours of learning
        trial.teach(matcher, lesson, folder, progress=watched())
    result = evaluate(
        matcher,
        examples,
        progress=watched(),
        credits=credits,
        scale=matcher.scale,
        out=folder,
        request=request,
        announce=lambda cost: _announce(cost, matcher.score_config),
    )
    _finish(a, result, examples, folder, matcher)


_OURS = (
    *("model", "adapter", "score", "timesteps", "layers", "direction", "noise", "encodings", "compile"),
    *("device_map", "offload", "quantize_text_encoder", "channels_last", "variant", "revision", "config"),
    *("allow_pickle", "method", "mix", "objective", "start", "rank", "prompt_scale", "projections", "attention"),
    *("prompt_layers", "tokens", "words", "gradient_accumulation_steps", "gradient_checkpointing"),
)
"""Options that say nothing to a baseline."""


def _eval_baseline(
    a: argparse.Namespace,
    examples: Sequence[Example],
    credits: Sequence[np.ndarray | None] | None,
    source: Mapping[str, Any],
    lesson: Lesson | None,
    folder: str | None,
) -> Result:
    """Measures another method, which learns before if it can and was asked to."""
    from dsd.evaluate import claim, dataset_checksum, evaluate

    entry = BASELINES[a.baseline]
    ours = [f"--{name.replace('_', '-')}" for name, default in a.ours.items() if getattr(a, name) != default]
    if ours:
        raise OptionError(
            f"got {', '.join(ours)} with --baseline, expected --baseline-model, and --steps for one of diffusion"
        )
    if lesson is not None and not entry.few_shot:
        learners = ", ".join(name for name, one in BASELINES.items() if one.few_shot)
        raise OptionError(f"got --shots with {a.baseline}, expected a baseline that learns: {learners}")
    given = {
        "model": a.baseline_model,
        "samples": a.steps,
        "size": a.size,
        "batch_size": a.batch_size,
        "device": a.device,
        # of the world's examples too
        "seed": a.seed if entry.model == "diffusion" or a.baseline == "chance" else None,
    }
    if a.dtype != "float32":
        import torch

        given["dtype"] = getattr(torch, a.dtype)
    made: Any = baseline(a.baseline, **{k: v for k, v in given.items() if v is not None})
    learning: dict[str, Any] | None = None
    if lesson is not None:
        options = {k: v for k, v in given_of(a).items() if k != "seed"}
        if options and not hasattr(made, "fit_config"):
            raise OptionError(f"got options of learning with {a.baseline}, which has none; leave them out")
        if options:
            refuse_idle(a, made.heeds, a.baseline)
            if "folds" in options:  # by turns, where the default is to hold out a share once
                options["validation"] = None
            made.fit_config = replace(made.fit_config, **options)
        learning = {"shots": len(lesson.examples), "seed": a.shot_seed, "dataset": dataset_checksum(lesson.examples)}
        learning["options"] = options
    request = {"source": source, "config": dict(made.config), "few_shot": learning}
    if folder is not None:
        claim(folder, dataset_checksum(examples, credits), request)  # not after hours of learning
    if lesson is not None:
        made = _taught(made, lesson, folder, a.shot_seed)
    return evaluate(
        made,
        examples,
        progress=watched(),
        credits=credits,
        out=folder,
        request=request,
        announce=lambda cost: _announce(cost, None),
    )


def _taught(made: Any, lesson: Lesson, folder: str | None, seed: int) -> Any:
    """A baseline that has learned; what was learned is kept in the folder, and taken from there."""
    kept = None if folder is None or not hasattr(made, "save") else Path(folder) / "baseline"
    if kept is not None and (kept / "baseline.json").exists():
        return load_baseline(kept)
    made.fit(lesson.examples, seed=seed, progress=watched())
    if kept is not None:
        made.save(kept)
    return made


def _finish(
    a: argparse.Namespace,
    result: Result,
    examples: Sequence[Example],
    folder: str | None,
    matcher: Matcher | None = None,
) -> None:
    """Saves a result where it was asked for, and prints it; a matcher of ours explains its failures."""
    from dsd.evaluate import SCORES
    from dsd.report import format_interval

    if folder is not None:
        result.save_scores(os.path.join(folder, SCORES))
    elif a.out is not None:
        result.save(a.out)
    _report(a, folder, matcher, result, examples)
    if a.format == "json":
        values = result.to_dict()
        values.pop("examples")
        print_json(values)
        return
    rows = [{"metric": name, "value [95 %]": format_interval(m), "n": m["n"]} for name, m in result.metrics.items()]
    rows += [
        {"metric": f"{name}, {tag}", "value [95 %]": format_interval(m), "n": m["n"]}
        for tag, found in result.by_tag.items()
        for name, m in found.items()
        if name in BY_TAG
    ]
    print_table(rows, ("metric", "value [95 %]", "n"))
    if result.ties or result.nans:
        print(f"{result.ties} choices with a shared best score (each counts 1/k), {result.nans} scores that are NaN")


def _report(
    a: argparse.Namespace, folder: str | None, matcher: Matcher | None, result: Result, examples: Sequence[Example]
) -> None:
    """Writes the page of failures to wherever it is wanted."""
    from dsd.evaluate import write_text
    from dsd.explanation import ExplainConfig, Explanation
    from dsd.pages import failure_page

    paths = [path for path in (a.report, folder and os.path.join(folder, "report.html")) if path]
    if not paths:
        return
    config = ExplainConfig(draws=2, words=False)

    def explain(image: ImageInput, text: str) -> Explanation:
        assert matcher is not None
        return matcher.explain(image, text, config=config)

    page = failure_page(
        result, examples, explain if matcher is not None and matcher.explains else None, count=a.failures
    )
    for path in paths:
        write_text(path, page)


def _examples(a: argparse.Namespace) -> tuple[list[Example], list[np.ndarray | None] | None, dict[str, Any]]:
    """Examples, their credits if they have some, and where they come from."""
    from dsd.evaluate import subset
    from dsd.tasks import BENCHMARKS, read_benchmark, read_manifest, world_task

    credit: dict[str, np.ndarray | None] = {}
    source: dict[str, Any]
    settle_world(a, _of_world(a))
    if os.path.isfile(a.manifest) or a.manifest not in (*WORLD_TASKS, *BENCHMARKS):
        if a.split is not None:
            raise OptionError(f"got --split with the manifest {a.manifest}, which has none; leave it out")
        examples = read_manifest(a.manifest, root=a.data)
        source = {"manifest": os.path.basename(a.manifest)}
    elif a.data is not None and a.manifest in BENCHMARKS:
        loaded = read_benchmark(a.manifest, a.data, a.split)
        if loaded.left_out:
            print(f"dsd eval: {loaded.report()}", file=sys.stderr)
        examples = loaded.examples
        credit = dict(zip((e.id for e in examples), loaded.credits or (), strict=False))
        source = {"benchmark": loaded.name, "split": loaded.split}
    elif a.manifest not in WORLD_TASKS:
        raise OptionError(f"got the benchmark {a.manifest} without --data, expected the folder with its files")
    elif a.data is not None:
        raise OptionError(
            f"got --data with the world's {a.manifest}, expected a manifest or a benchmark; the world draws its own "
            "images"
        )
    else:
        source = {"task": a.manifest, "split": a.split or "test", "level": a.level, "count": a.count}
        source |= {"seed": a.seed or 0, "novel": a.novel}
        examples = world_task(a.manifest, source["split"], a.level, a.count, source["seed"], a.novel)
    if a.limit is not None:
        examples, source["limit"] = subset(examples, a.limit), a.limit
    return examples, [credit[e.id] for e in examples] if credit else None, source


def _of_world(a: argparse.Namespace) -> bool:
    """Whether it is the world that draws the examples."""
    return a.manifest in WORLD_TASKS and a.data is None and not os.path.isfile(a.manifest)


def _few_shot(a: argparse.Namespace, examples: Sequence[Example]) -> Lesson | None:
    """What to learn before measuring on other examples; None if that is not asked for."""
    from dsd.evaluate import subset
    from dsd.tasks import check_leakage, read_manifest, world_task
    from dsd.trial import Lesson

    if a.shots is None:
        given = [*(() if a.train is None else ("train",)), *learning_given(a)]
        if given:
            raise OptionError(
                f"got --{given[0].replace('_', '-')} without --shots, expected both (how many examples to learn "
                "from) or neither"
            )
        return None
    if a.adapter is not None:
        raise OptionError("got --shots with --adapter, expected one of them: learn now, or use what was learned")
    if a.shots == 0:
        return None
    if a.train is not None:
        few = subset(read_manifest(a.train), a.shots, a.shot_seed)
    elif _of_world(a):
        few = world_task(a.manifest, "few-shot", a.level, a.shots, a.shot_seed, a.novel)
    else:
        raise OptionError(f"got --shots with {a.manifest}, expected --train too, a manifest of examples to learn from")
    check_leakage(few, examples)
    config, prompt = lesson_of(a)
    return Lesson(tuple(few), replace(config, seed=a.shot_seed), prompt, a.start)


def _announce(cost: Cost, score: ScoreConfig | None) -> None:
    """Says what a long evaluation will cost; a score of ours also in passes."""
    if cost.seconds < LONG:
        return
    passes = f"{cost.pairs:,} pairs to score"
    if score is not None:
        passes = f"about {score.passes * cost.pairs + score.empty_passes * cost.images:,} denoiser passes"
    unit, size = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if cost.seconds >= s), ("s", 1))
    time = f"{cost.seconds / size:,.{0 if cost.seconds >= 10 * size else 1}f} {unit}"
    done = f"{cost.done:,} of {cost.done + cost.pairs:,} pairs are done; left are "
    print(
        f"dsd eval: {done}{cost.images:,} images and {cost.texts:,} texts to encode and {passes}, "
        f"about {time} judging by {cost.measured} pairs",
        file=sys.stderr,
        flush=True,
    )


def _compare(a: argparse.Namespace) -> None:
    from dsd.evaluate import Result, compare

    found = compare(Result.load(a.a), Result.load(a.b))
    if a.format == "json":
        print_json({"a": a.a, "b": a.b, **found.to_dict()})
        return

    def row(name: str, of: Mapping[str, Any], tag: str) -> dict[str, Any]:
        change = of["difference"]
        told = {} if change is None else {"p": f"{change['p']:.3g}"}
        told |= {} if change is None else {GAIN: "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**change)}
        return {"metric": f"{name}, {tag}" if tag else name, "A": of["a"], "B": of["b"], **told}

    def verdict(of: Mapping[str, Any]) -> str:
        return "right in B alone {only_b}, in A alone {only_a}, of {n}; p = {p:.3g}, mid-p = {mid_p:.3g}".format(**of)

    print(f"A: {a.a}\nB: {a.b}\n")
    rows = [row(name, of, "") for name, of in found.metrics.items()]
    rows += [
        row(name, of, tag)
        for tag, inside in found.by_tag.items()
        for name, of in inside["metrics"].items()
        if name in BY_TAG
    ]
    print_table(rows, ("metric", "A", "B", GAIN, "p"))
    print("\np: paired bootstrap. McNemar's exact test, where an example is right if all its choices are won:")
    say(
        "\n".join(
            [f"- {verdict(found.mcnemar)}", *(f"- {tag}: {verdict(of['mcnemar'])}" for tag, of in found.by_tag.items())]
        )
    )
    if found.disagreements:
        print(f"\nThey differ on {found.disagreeing} examples, most on:")
        print_table([{"id": d.id, "A": d.a, "B": d.b} for d in found.disagreements], ("id", "A", "B"))
