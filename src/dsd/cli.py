"""The command line: parses arguments, calls the library, prints results to stdout and everything else to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dsd.contracts import DsdError, OptionError

if TYPE_CHECKING:
    import numpy as np

    from dsd.contracts import Example
    from dsd.learn import FitConfig
    from dsd.matcher import Matcher
    from dsd.prompts import PromptConfig
    from dsd.scores import ScoreConfig
    from dsd.work import Cost

# Written out, for the lists live in modules that import torch; a test keeps them equal.
SCORE_KINDS = ("attention", "attention-mass", "denoising", "paper", "paper-attention")
WORLD_TASKS = ("comvg", "refcocog", "vqa", "winoground")
LEVELS = ("easy", "standard", "hard")
SPLITS = ("few-shot", "val", "test")
SHOTS = (0, 4, 16, 64, 256)
BY_TAG = ("accuracy", "text", "image", "group", "soft-accuracy")
"""Metrics that tables have for each tag; JSON has all."""
GAIN = "B less A [95 %]"
LONG = 10
"""Seconds from which on an evaluation's cost is told before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 if done, 2 if the request cannot be met, 1 for a fault of ours."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except DsdError as error:
        print(f"dsd {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dsd {arguments.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("DSD_DEBUG"):
            raise
        kind, what = type(error).__name__, " ".join(str(error).split())
        print(
            f"dsd {arguments.command}: fault: {kind}: {what}; this is our mistake, please report it with what "
            "DSD_DEBUG=1 prints",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd", description="Match images and texts with a text-to-image diffusion model, zero-shot or taught."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str, form: bool = True) -> Any:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        if form:
            command.add_argument("--format", choices=("text", "json"), default="text", help="how results are printed")
        return command

    score = add("score", _score, "Score every image against every text; higher is a better match.")
    rank = add("rank", _rank, "Rank texts for one image, or images for one text, best first.")
    for command in (score, rank):
        command.add_argument("images", nargs="+", metavar="IMAGE")
        command.add_argument("--text", action="append", required=True, metavar="T", help="a caption; repeat for more")
        _model_options(command)

    fit = add("fit", _fit, "Learn from labelled examples; writes an adapter that --adapter reads.")
    fit.add_argument("manifest", metavar="MANIFEST", help="JSONL or CSV of examples")
    fit.add_argument("--out", required=True, metavar="DIR", help="folder of the adapter")
    fit.add_argument("--val", metavar="MANIFEST", help="examples to stop by; default: those to learn from, by turns")
    fit.add_argument("--resume", action="store_true", help="go on with a fit of the same request that was stopped")
    fit.add_argument("--log", metavar="FILE", help="loss by step: a .jsonl file, or a folder for TensorBoard")
    _learning_options(fit)
    _model_options(fit, adapter=False)

    export = add("export", _export, "Write an adapter's prompts for stock diffusers pipelines.", form=False)
    export.add_argument("adapter", metavar="ADAPTER", help="what was learned, as --adapter takes it")
    export.add_argument("--out", required=True, metavar="DIR")
    export.add_argument("--format", choices=("lora",), default="lora", help="what is written (default: %(default)s)")

    evaluate = add("eval", _eval, "Measure a matcher on labelled examples, with confidence intervals.")
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
    group = evaluate.add_argument_group("few-shot")
    group.add_argument("--shots", type=int, metavar="N", help="learn from N examples before measuring")
    group.add_argument(
        "--shot-seed", type=int, default=0, metavar="S", help="which examples, and how to learn (default: %(default)s)"
    )
    group.add_argument(
        "--train", metavar="MANIFEST", help="examples to draw from; default for the world: its few-shot split"
    )
    _learning_options(evaluate)
    _world_options(evaluate, benchmark=True)
    _model_options(evaluate)

    compare = add("compare", _compare, "Compare two results on the same examples, paired example by example.")
    for name in "ab":
        compare.add_argument(name, metavar=name.upper(), help="what eval --out saved: a .json file or a folder")

    curve = add("curve", _curve, "Measure accuracy against the number of labelled examples, over several draws.")
    curve.add_argument(
        "manifest",
        metavar="MANIFEST|TASK",
        help=f"JSONL or CSV of examples to draw from, or a task of the world: {', '.join(WORLD_TASKS)}",
    )
    curve.add_argument("--held-out", metavar="MANIFEST", help="examples to measure on; a task brings its own")
    curve.add_argument("--val", metavar="MANIFEST", help="examples to stop by; default: a share of those drawn")
    curve.add_argument(
        "--out", required=True, metavar="DIR", help="folder of curve.json and curve.png; a curve that is there goes on"
    )
    curve.add_argument(
        "--shots",
        type=_integers,
        default=SHOTS,
        metavar="N,N,...",
        help=f"numbers of examples (default: {','.join(map(str, SHOTS))})",
    )
    curve.add_argument("--seeds", type=int, default=3, metavar="N", help="draws of each number (default: %(default)s)")
    _learning_options(curve)
    _world_options(curve, split=False)
    _model_options(curve, adapter=False)

    world = add("world", _world, "Draw a task of the procedural world: images and a manifest.", form=False)
    world.add_argument("task", choices=WORLD_TASKS)
    world.add_argument("--out", required=True, metavar="DIR")
    _world_options(world)
    world.add_argument("--seed", type=int, default=0)

    explain = add("explain", _explain, "Draw where in an image each word of a text is seen.", form=False)
    explain.add_argument("images", nargs=1, metavar="IMAGE")
    explain.add_argument("--text", required=True, metavar="T")
    explain.add_argument("--out", required=True, metavar="FILE", help="a PNG")
    _model_options(explain)

    demo = add("demo", _demo, "The main job on the embedded model, start to end: score, teach, see.", form=False)
    demo.add_argument("--out", default="demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--shots", type=int, default=128, metavar="N", help="examples to learn from (default: %(default)s)"
    )
    demo.add_argument("--held-out", type=int, default=200, metavar="N", help="examples a task (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    return parser


def _learning_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("learning")
    group.add_argument(
        "--method",
        default="prompt",
        metavar="M",
        help="prompt, tokens, heads or weights, or several with + between them (default: %(default)s)",
    )
    group.add_argument(
        "--mix",
        metavar="S,S,...",
        help="scores taught along with the score, or none (default: attention with denoising, none with others)",
    )
    group.add_argument("--objective", choices=("softmax", "hinge"), default="softmax", help="default: %(default)s")
    group.add_argument("--rank", type=int, default=4, help="rank of the prompts (default: %(default)s)")
    group.add_argument("--prompt-scale", type=float, default=1.0, metavar="X", help="multiplies the prompts' change")
    group.add_argument(
        "--projections", metavar="P,P,...", help="what prompts change, of q,k,v,out (default: all of them)"
    )
    group.add_argument(
        "--attention",
        choices=("cross", "self", "all"),
        default="cross",
        help="attention layers that are prompted (default: %(default)s)",
    )
    group.add_argument("--prompt-layers", metavar="L,L,...", help="of the cross-attention layers, such as mid_block")
    group.add_argument("--tokens", type=int, default=0, metavar="N", help="soft tokens, where these are learned")
    group.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps at most")
    group.add_argument("--learning-rate", type=float, metavar="LR")
    group.add_argument("--negatives", type=int, metavar="N", help="captions of others for each right pair")
    group.add_argument(
        "--image-negatives", type=int, metavar="N", help="pictures of other examples for each right pair"
    )
    group.add_argument("--swaps", type=int, metavar="N", help="captions with two words exchanged for each right pair")
    held = group.add_mutually_exclusive_group()
    held.add_argument("--folds", type=int, metavar="N", help="parts that are held out by turns")
    held.add_argument("--hold-out", type=float, metavar="SHARE", help="hold out this share once instead: faster")
    group.add_argument("--gradient-accumulation-steps", type=int, metavar="N", help="parts of a batch, to save memory")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute again rather than keep in memory")


def _model_options(command: argparse.ArgumentParser, adapter: bool = True) -> None:
    group = command.add_argument_group("model and score")
    group.add_argument("--model", metavar="M", help="alias, hub name or folder (default: the adapter's base, or tiny)")
    if adapter:
        group.add_argument(
            "--adapter", metavar="DIR", help="what was learned: a folder of ours or of the authors' format, or a LoRA"
        )
    group.add_argument("--score", choices=SCORE_KINDS, help="default: the adapter's, or denoising")
    steps = group.add_mutually_exclusive_group()
    steps.add_argument("--timesteps", type=_integers, metavar="T,T,...", help="timesteps, such as 189,389")
    steps.add_argument("--steps", type=int, metavar="N", help="that many timesteps, evenly spread")
    group.add_argument("--layers", metavar="L,L,...", help="cross-attention layers to look at, such as mid_block")
    group.add_argument("--noise", metavar="FILE", help="a .npy file of shape (timesteps, channels, height, width)")
    group.add_argument("--seed", type=int, metavar="S", help="decides the noise (default: 0)")
    group.add_argument("--size", type=int, metavar="PX", help="pixels a side (default: the model's own)")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows a pass; halved when memory runs out")
    group.add_argument("--device", metavar="D", help="such as cpu or cuda (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def _world_options(command: argparse.ArgumentParser, split: bool = True, benchmark: bool = False) -> None:
    group = command.add_argument_group("world")
    if benchmark:
        default = f"test, of {', '.join(SPLITS)}; of a benchmark its first"
        group.add_argument("--split", metavar="S", help=f"default: {default}")
    elif split:
        group.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    group.add_argument("--level", choices=LEVELS, default="standard", help="default: %(default)s")
    what = "examples" if split else "held-out examples"
    group.add_argument("--count", type=int, default=300, metavar="N", help=f"{what} (default: %(default)s)")
    group.add_argument("--novel", action="store_true", help="ask about the words that pretraining never saw")


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers with commas between them") from None


# Commands


def _matcher(a: argparse.Namespace) -> Matcher:
    from zipfile import BadZipFile

    import numpy as np
    import torch

    from dsd.matcher import Matcher
    from dsd.scores import even_timesteps

    noise = None
    if a.noise is not None:
        try:
            with open(a.noise, "rb") as file:
                noise = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise OptionError(
                f"{a.noise}: got a file that cannot be read ({error}), expected an array saved by numpy.save"
            ) from None
        if not isinstance(noise, np.ndarray):
            raise OptionError(f"{a.noise}: got an archive, expected one array saved by numpy.save")
    if a.device is not None:
        try:
            torch.zeros(1, device=a.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise OptionError(
                f"got device {a.device!r} ({str(error).splitlines()[0]}), expected one that is there, such as cpu"
            ) from None
    return Matcher.from_pretrained(
        a.model,
        adapter=getattr(a, "adapter", None),
        score=a.score,
        timesteps=a.timesteps if a.steps is None else even_timesteps(a.steps),
        layers=None if a.layers is None else a.layers.split(","),
        seed=a.seed,
        size=a.size,
        batch_size=a.batch_size,
        noise=noise,
        device=a.device,
        dtype=getattr(torch, a.dtype),
    )


def _score(a: argparse.Namespace) -> None:
    table = _matcher(a).score(a.images, a.text, progress=_watched())
    if a.format == "json":
        _print_json(table.to_dict())
        return
    rows = [
        {"image": name, "score": f"{score:.4f}", "text": text}
        for name, line in zip(table.images, table.scores, strict=True)
        for text, score in zip(table.texts, line, strict=True)
    ]
    _print_table(rows, ("image", "score", "text"))


def _rank(a: argparse.Namespace) -> None:
    if len(a.images) > 1 and len(a.text) > 1:
        raise OptionError(
            f"got {len(a.images)} images and {len(a.text)} texts, expected one of either; use dsd score for all pairs"
        )
    matcher = _matcher(a)
    table = matcher.score(a.images, a.text, progress=_watched())
    what = "image" if len(a.images) > 1 else "text"
    names = table.images if what == "image" else table.texts
    flat = table.scores.reshape(-1)
    order = sorted(range(len(flat)), key=lambda i: -flat[i])
    ranked = [{"rank": k + 1, "index": i, what: names[i], "score": float(flat[i])} for k, i in enumerate(order)]
    if a.format == "json":
        _print_json({"ranking": ranked, **table.config})
        return
    _print_table([{**r, "score": f"{r['score']:.4f}"} for r in ranked], ("rank", "score", what))


def _fit(a: argparse.Namespace) -> None:
    from dsd.adapters import check_out
    from dsd.tasks import read_manifest

    examples = read_manifest(a.manifest)
    validation = None if a.val is None else read_manifest(a.val)
    check_out(a.out)  # not after hours of learning
    config, prompt = _lesson(a)
    accelerator = _accelerator(a)
    leads = accelerator is None or accelerator.is_main_process
    matcher = _matcher(a)
    matcher.fit(
        examples,
        validation,
        config=config,
        prompt=prompt,
        progress=_watched(),
        checkpoint=f"{a.out.rstrip('/')}.checkpoint",
        resume=a.resume,
        log=a.log,
        accelerator=accelerator,
    )
    if not leads:
        return
    out = matcher.save_pretrained(a.out)
    assert matcher.adapter is not None
    training = matcher.adapter.training
    if a.format == "json":
        _print_json({"adapter": str(out), **training})
        return
    before, after = training["validation"]["before"], training["validation"]["after"]
    judges = (
        "on the same, held out by turns" if training["turns"] > 1 else f"on {training['validation_examples']} others"
    )
    _print(f"{out}: learned from {training['examples']} examples; {judges}:")
    _print_table(
        [{"": "zero-shot", "accuracy": f"{before:.3f}"}, {"": "learned", "accuracy": f"{after:.3f}"}], ("", "accuracy")
    )
    if not training["kept"]:
        print("Learning was not clearly better than the zero-shot score there, so the zero-shot score was kept.")


def _accelerator(a: argparse.Namespace) -> Any:
    """What ``accelerate launch`` started this process for; None if it did not."""
    if not any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")):
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=a.device == "cpu")
    if a.device is None:
        a.device = str(accelerator.device)
    return accelerator


def _lesson(a: argparse.Namespace) -> tuple[FitConfig, PromptConfig]:
    from dsd.learn import FitConfig
    from dsd.prompts import PromptConfig

    given = {
        "steps": a.max_steps,
        "learning_rate": a.learning_rate,
        "seed": a.seed,
        "negatives": a.negatives,
        "image_negatives": a.image_negatives,
        "swaps": a.swaps,
        "folds": a.folds,
        "validation": a.hold_out,
        "gradient_accumulation_steps": a.gradient_accumulation_steps,
    }
    mix = None if a.mix is None else () if a.mix == "none" else tuple(a.mix.split(","))
    config = FitConfig(
        method=a.method,
        mix=mix,
        objective=a.objective,
        gradient_checkpointing=a.gradient_checkpointing,
        **{k: v for k, v in given.items() if v is not None},
    )
    where: dict[str, Any] = {}
    if a.projections is not None:
        names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
        unknown = [p for p in a.projections.split(",") if p not in names]
        if unknown:
            raise OptionError(f"got projections {', '.join(unknown)}, expected some of {', '.join(names)}")
        where["projections"] = tuple(names[p] for p in a.projections.split(","))
    if a.prompt_layers is not None:
        where["layers"] = tuple(a.prompt_layers.split(","))
    return config, PromptConfig(rank=a.rank, scale=a.prompt_scale, attention=a.attention, tokens=a.tokens, **where)


def _export(a: argparse.Namespace) -> None:
    from dsd.adapters import Adapter

    _print(str(Adapter.load(a.adapter).export(a.out)))


def _eval(a: argparse.Namespace) -> None:
    from dsd.evaluate import SCORES, check_parquet, claim, dataset_checksum, evaluate
    from dsd.report import format_interval

    folder = None if a.out is None or a.out.endswith(".json") else a.out
    if folder is not None:
        check_parquet()
        if os.path.isfile(folder):
            raise OptionError(f"got the file {folder} for --out, expected a folder, or a name that ends in .json")
    examples, credits, source = _examples(a)  # before the model, which may take long to load
    few = _few(a, examples)
    matcher = _matcher(a)
    request = _request(a, matcher, source, few)
    if few is not None:
        if folder is not None:
            claim(folder, dataset_checksum(examples, credits), request)  # not after hours of learning
        matcher = _taught(a, matcher, few, folder)
    result = evaluate(
        matcher,
        examples,
        progress=_watched(),
        credits=credits,
        scale=None if matcher.adapter is None else matcher.adapter.scale,
        out=folder,
        request=request,
        announce=lambda cost: _announce(cost, matcher.score_config),
    )
    if folder is not None:
        result.save_scores(os.path.join(folder, SCORES))
    elif a.out is not None:
        result.save(a.out)
    if a.format == "json":
        values = result.to_dict()
        values.pop("examples")
        _print_json(values)
        return
    rows = [{"metric": name, "value [95 %]": format_interval(m), "n": m["n"]} for name, m in result.metrics.items()]
    rows += [
        {"metric": f"{name}, {tag}", "value [95 %]": format_interval(m), "n": m["n"]}
        for tag, found in result.by_tag.items()
        for name, m in found.items()
        if name in BY_TAG
    ]
    _print_table(rows, ("metric", "value [95 %]", "n"))
    if result.ties or result.nans:
        print(f"{result.ties} choices with a shared best score (each counts 1/k), {result.nans} scores that are NaN")


def _examples(a: argparse.Namespace) -> tuple[list[Example], list[np.ndarray | None] | None, dict[str, Any]]:
    """Examples, their credits if they have some, and where they come from."""
    from dsd.evaluate import subset
    from dsd.tasks import BENCHMARKS, read_benchmark, read_manifest, world_task

    credit: dict[str, np.ndarray | None] = {}
    source: dict[str, Any]
    if os.path.isfile(a.manifest) or a.manifest not in (*WORLD_TASKS, *BENCHMARKS):
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


def _few(a: argparse.Namespace, examples: Sequence[Example]) -> list[Example] | None:
    """The examples to learn from before measuring on others; None if that is not asked for."""
    from dsd.evaluate import subset
    from dsd.tasks import check_leakage, read_manifest, world_task

    if a.shots is None:
        if a.train is not None:
            raise OptionError("got --train without --shots, expected how many examples to learn from")
        return None
    if a.adapter is not None:
        raise OptionError("got --shots with --adapter, expected one of them: learn now, or use what was learned")
    if a.shots == 0:
        return None
    if a.train is not None:
        few = subset(read_manifest(a.train), a.shots, a.shot_seed)
    elif a.manifest in WORLD_TASKS and a.data is None and not os.path.isfile(a.manifest):
        few = world_task(a.manifest, "few-shot", a.level, a.shots, a.shot_seed, a.novel)
    else:
        raise OptionError(f"got --shots with {a.manifest}, expected --train too, a manifest of examples to learn from")
    check_leakage(few, examples)
    return few


def _request(
    a: argparse.Namespace, matcher: Matcher, source: Mapping[str, Any], few: Sequence[Example] | None
) -> dict[str, Any]:
    """What decides the scores besides the examples, and where these come from."""
    from dsd.adapters import fingerprint
    from dsd.evaluate import dataset_checksum

    learned = None
    if few is not None:
        config, prompt = _lesson(a)
        learned = {
            "shots": len(few),
            "seed": a.shot_seed,
            "dataset": dataset_checksum(few),
            "fit": asdict(replace(config, seed=a.shot_seed)),
            "prompt": asdict(prompt),
        }
    return {
        "source": source,
        "config": dict(matcher.config),
        "base": fingerprint(matcher.backbone),
        "device": str(matcher.backbone.device),
        "adapter": None if a.adapter is None else _digest(a.adapter),
        "few_shot": learned,
    }


def _taught(a: argparse.Namespace, matcher: Matcher, few: Sequence[Example], folder: str | None) -> Matcher:
    """The matcher with what it learns from a few examples, which the folder may hold already."""
    out = None if folder is None else os.path.join(folder, "adapter")
    if out is not None and os.path.exists(out):
        bare = dict.fromkeys(("score", "timesteps", "steps", "layers", "seed", "size"))  # the adapter brings its own
        return _matcher(argparse.Namespace(**{**vars(a), **bare, "adapter": out}))
    config, prompt = _lesson(a)
    matcher.fit(
        few,
        config=replace(config, seed=a.shot_seed),
        prompt=prompt,
        checkpoint=None if out is None else f"{out}.checkpoint",
        resume=True,
        progress=_watched(),
    )
    if out is not None:
        matcher.save_pretrained(out)
    return matcher


def _digest(path: str) -> str:
    """32 hex digits over a file, or over the files of a folder."""
    from hashlib import blake2b
    from pathlib import Path

    digest = blake2b(digest_size=16)
    for file in sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _announce(cost: Cost, score: ScoreConfig) -> None:
    """Says what a long evaluation will cost."""
    from dsd.scores import SCORES, WEIGHTED

    if cost.seconds < LONG:
        return
    steps = len(score.timesteps)
    # the empty caption's passes are shared by all captions of an image
    empty = score.kind == WEIGHTED or any(SCORES[kind].empty for kind in score.weights or (score.kind,))
    passes = steps * (cost.pairs + (cost.images if empty else 0))
    unit, size = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if cost.seconds >= s), ("s", 1))
    time = f"{cost.seconds / size:,.{0 if cost.seconds >= 10 * size else 1}f} {unit}"
    done = f"{cost.done:,} of {cost.done + cost.pairs:,} pairs are done; left are "
    print(
        f"dsd eval: {done}{cost.images:,} images and {cost.texts:,} texts to encode and about {passes:,} denoiser "
        f"passes, about {time} judging by {cost.measured} pairs",
        file=sys.stderr,
        flush=True,
    )


def _compare(a: argparse.Namespace) -> None:
    from dsd.evaluate import Result, compare

    found = compare(Result.load(a.a), Result.load(a.b))
    if a.format == "json":
        _print_json({"a": a.a, "b": a.b, **found.to_dict()})
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
    _print_table(rows, ("metric", "A", "B", GAIN, "p"))
    print("\np: paired bootstrap. McNemar's exact test, where an example is right if all its choices are won:")
    _print(
        "\n".join(
            [f"- {verdict(found.mcnemar)}", *(f"- {tag}: {verdict(of['mcnemar'])}" for tag, of in found.by_tag.items())]
        )
    )
    if found.disagreements:
        print(f"\nThey differ on {found.disagreeing} examples, most on:")
        _print_table([{"id": d.id, "A": d.a, "B": d.b} for d in found.disagreements], ("id", "A", "B"))


def _curve(a: argparse.Namespace) -> None:
    from dsd.curve import PICTURE, learning_curve, world_sets
    from dsd.report import format_interval
    from dsd.tasks import read_manifest

    if a.manifest in WORLD_TASKS and not os.path.exists(a.manifest):
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
    config, prompt = _lesson(a)
    curve = learning_curve(
        _matcher(a),
        pool,
        held_out,
        a.out,
        shots=a.shots,
        seeds=a.seeds,
        validation=validation,
        config=config,
        prompt=prompt,
        name=name,
        announce=lambda text: print(f"dsd curve: {text}", file=sys.stderr, flush=True),
        progress=_watched(),
    )
    if a.format == "json":
        values = curve.to_dict()
        for row in values["rows"]:
            del row["outcomes"]
        _print_json({"out": a.out, **values})
        return
    gain = "gain over zero-shot [95 %]"
    rows = [
        {
            "examples": point.shots,
            "accuracy [95 %]": format_interval(point.accuracy),
            gain: "" if point.gain is None else "{value:+.3f} [{low:+.2f}, {high:+.2f}]".format(**point.gain),
            "learning kept": f"{point.kept} of {point.fits} fits" if point.fits else "",
        }
        for point in curve.points
    ]
    _print_table(rows, tuple(rows[0]))
    _print(os.path.join(a.out, PICTURE))


def _world(a: argparse.Namespace) -> None:
    from dsd.tasks import world_task, write_manifest

    examples = world_task(a.task, a.split, a.level, a.count, a.seed, a.novel)
    _print(str(write_manifest(examples, a.out)))


def _explain(a: argparse.Namespace) -> None:
    from dsd.report import word_sheet

    found = _matcher(a).explain(a.images[0], a.text)
    word_sheet(a.out, found.image, list(zip(found.words, found.maps, strict=True)))
    _print(a.out)


def _demo(a: argparse.Namespace) -> None:
    from dsd.demo import run

    run(a.out, shots=a.shots, held_out=a.held_out, seed=a.seed)


# Printing


def _watched() -> bool:
    """Whether somebody may look at stderr; logs of pipelines are spared the bars."""
    return sys.stderr.isatty() or os.environ.get("DSD_PROGRESS", "") == "1"


def _print_json(values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    _print(text if _printable(text) else json.dumps(values, indent=1, allow_nan=False, default=str))


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from dsd.report import table

    _print(table(rows, columns))


def _printable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # an odd terminal, or a file name that is no Unicode
        return False
    return True


def _print(text: str) -> None:
    """Prints, with escapes for what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text if _printable(text) else text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(main())
