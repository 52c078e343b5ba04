"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dsd.contracts import OptionError

if TYPE_CHECKING:
    from dsd.learn import FitConfig
    from dsd.matcher import Matcher
    from dsd.prompts import PromptConfig

# Written out, for the lists live in modules that import torch; a test keeps them equal.
SCORE_KINDS = ("attention", "attention-mass", "denoising", "paper", "paper-attention")
WORLD_TASKS = ("comvg", "refcocog", "vqa", "winoground")
MAPS = ("joint", "agreement", "evidence", "effect", "attention", "raw-attention")
LEVELS = ("easy", "standard", "hard")
SPLITS = ("few-shot", "val", "test")
DTYPES = ("float32", "float16", "bfloat16")
OFFLOADS = ("model", "sequential")
QUANTIZATIONS = ("8bit", "4bit")


WORLD: dict[str, Any] = {"level": "standard", "count": 300}
"""Which of the world's examples there are where nothing else is said."""


class Commands:
    """The commands of a parser, to add to."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(self, name: str, run: Callable[[argparse.Namespace], None], help: str, form: bool = True) -> Any:
        """A command's own parser.

        Args:
            run: Does it.
            form: Whether it takes ``--format``.
        """
        command = self._commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        if form:
            command.add_argument("--format", choices=("text", "json"), default="text", help="how results are printed")
        return command


def learning_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("learning")
    group.add_argument(
        "--method",
        default="prompt",
        metavar="M",
        help="prompt, tokens, words, heads or weights, or several in this order with + between, but not both of the "
        "last two (default: %(default)s)",
    )
    group.add_argument(
        "--mix",
        metavar="S,S,...",
        help="scores taught along with the score, or none (default: with --score denoising, attention is taught, for "
        "heads and weights along with denoising; with other scores, none)",
    )
    group.add_argument("--objective", choices=("softmax", "hinge"), default="softmax", help="default: %(default)s")
    group.add_argument(
        "--start",
        metavar="DIR",
        help="an adapter whose prompts are learned on from, such as tiny-captions; it says where they go, too",
    )
    group.add_argument("--rank", type=int, help="rank of the prompts (default: 4)")
    group.add_argument("--prompt-scale", type=float, metavar="X", help="multiplies the prompts' change (default: 1)")
    group.add_argument(
        "--projections", metavar="P,P,...", help="what prompts change, of q,k,v,out (default: all of them)"
    )
    group.add_argument(
        "--attention",
        choices=("cross", "self", "all"),
        help="attention layers that are prompted (default: all, or with --prompt-layers cross)",
    )
    group.add_argument("--prompt-layers", metavar="L,L,...", help="of the cross-attention layers, such as mid_block")
    group.add_argument("--tokens", type=int, metavar="N", help="soft tokens, where these are learned (default: 8)")
    group.add_argument("--words", metavar="W,W,...", help="words that the model does not know, where these are learned")
    group.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="optimizer steps at most (default: as many as go through the examples 25 times, but 100 to 400)",
    )
    group.add_argument("--batch", type=int, metavar="N", help="examples a step (default: 16)")
    group.add_argument("--learning-rate", type=float, metavar="LR", help="at its peak (default: 0.005)")
    group.add_argument("--weight-decay", type=float, metavar="X", help="of AdamW (default: 0.1)")
    group.add_argument(
        "--margin", type=float, metavar="X", help="of the hinge, in units of the spread of scores (default: 0.1)"
    )
    group.add_argument(
        "--temperature", type=float, metavar="X", help="of the softmax, in the same units (default: 1.0)"
    )
    group.add_argument(
        "--check-every",
        type=int,
        metavar="N",
        help="steps between looks at what is held out (default: an eighth of all)",
    )
    group.add_argument(
        "--patience", type=int, metavar="N", help="looks without improvement before it stops (default: 4)"
    )
    group.add_argument(
        "--jitter", type=int, metavar="N", help="timesteps are drawn so far from the score's at most (default: 50)"
    )
    group.add_argument("--draws", type=int, metavar="N", help="of noise, over which weights are learned (default: 4)")
    group.add_argument(
        "--negatives",
        type=int,
        metavar="N",
        help="captions of other examples that join each right pair as wrong ones (default: 1, or none for an example "
        "that asks in both directions)",
    )
    group.add_argument(
        "--image-negatives",
        type=int,
        metavar="N",
        help="pictures of other examples that do (default: as --negatives)",
    )
    group.add_argument("--swaps", type=int, metavar="N", help="captions with two words exchanged that do (default: 0)")
    group.add_argument(
        "--candidates", type=int, metavar="N", help="images, and texts, of an example at most in a step (default: 4)"
    )
    held = group.add_mutually_exclusive_group()
    held.add_argument("--folds", type=int, metavar="N", help="parts that are held out by turns (default: 3)")
    held.add_argument("--hold-out", type=float, metavar="SHARE", help="hold out this share once instead: faster")
    group.add_argument("--gradient-accumulation-steps", type=int, metavar="N", help="parts of a batch, to save memory")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute again rather than keep in memory")


def model_options(command: argparse.ArgumentParser, adapter: bool = True) -> None:
    group = command.add_argument_group("model and score")
    group.add_argument(
        "--model", metavar="M", help="alias, hub name, folder or single file (default: the adapter's base, or tiny)"
    )
    if adapter:
        group.add_argument(
            "--adapter",
            metavar="DIR",
            help="what was learned: a folder of ours or of the authors' format, a LoRA, or tiny-captions",
        )
    group.add_argument("--score", choices=SCORE_KINDS, help="default: the adapter's, or denoising")
    steps = group.add_mutually_exclusive_group()
    steps.add_argument("--timesteps", type=integers, metavar="T,T,...", help="timesteps, such as 189,389")
    steps.add_argument("--steps", type=int, metavar="N", help="that many timesteps, evenly spread")
    group.add_argument("--layers", metavar="L,L,...", help="cross-attention layers to look at, such as mid_block")
    group.add_argument(
        "--direction", choices=("image", "text"), help="whose queries attention is scored by (default: the image's)"
    )
    group.add_argument("--noise", metavar="FILE", help="a .npy file of shape (timesteps, channels, height, width)")
    group.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="decides the noise, the world's examples, how to learn (default: the adapter's, or 0)",
    )
    group.add_argument("--size", type=int, metavar="PX", help="pixels a side (default: the adapter's or model's)")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows a pass; halved when memory runs out")
    group.add_argument("--compile", action="store_true", help="compile the denoiser: slow to start, faster then")
    group.add_argument(
        "--encodings",
        metavar="DIR",
        help="keep encoded images and texts there, at most 10 GiB, and use what is there",
    )
    loading_options(command)


def loading_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("loading")
    group.add_argument("--device", metavar="D", help="such as cpu or cuda (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    group.add_argument(
        "--device-map",
        metavar="MAP",
        help="balanced: networks spread over the GPUs; or component=device,..., such as text_encoder_3=cpu",
    )
    group.add_argument(
        "--offload", choices=OFFLOADS, help="keep networks in the CPU's memory, bring one, or one layer, at a time"
    )
    group.add_argument("--quantize-text-encoder", choices=QUANTIZATIONS, help="with bitsandbytes, on a CUDA GPU")
    group.add_argument("--channels-last", action="store_true", help="lay images out pixel by pixel: for recent GPUs")
    group.add_argument("--variant", metavar="V", help="of the weights' files, such as fp16")
    group.add_argument(
        "--revision", metavar="R", help="commit, branch or tag on the hub (default: the card's, or main)"
    )
    group.add_argument("--config", metavar="M", help="for a single file: a model of which it has the configuration")
    group.add_argument(
        "--allow-pickle", action="store_true", help="read pickled weights where there are no safetensors, tensors alone"
    )


def world_options(command: argparse.ArgumentParser, split: bool = True, benchmark: bool = False) -> None:
    group = command.add_argument_group("world")
    if benchmark:
        default = f"test, of {', '.join(SPLITS)}; of a benchmark its first"
        group.add_argument("--split", metavar="S", help=f"default: {default}")
    elif split:
        group.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    group.add_argument("--level", choices=LEVELS, help=f"default: {WORLD['level']}")
    what = "examples" if split else "held-out examples"
    group.add_argument("--count", type=int, metavar="N", help=f"{what} (default: {WORLD['count']})")
    group.add_argument("--novel", action="store_true", help="ask about the words that pretraining never saw")


def settle_world(a: argparse.Namespace, asked: bool) -> None:
    """Fills in what was not said of the world's examples.

    Args:
        asked: Whether these are asked for.

    Raises:
        OptionError: If something was said of them, and they are not.
    """
    given = [name for name in ("level", "count", "novel") if getattr(a, name)]
    if given and not asked:
        raise OptionError(
            f"got {_flags(given)} with {a.manifest}, expected that with a task of the world alone "
            f"({', '.join(WORLD_TASKS)}); leave it out"
        )
    for name, value in WORLD.items():
        if getattr(a, name) is None:
            setattr(a, name, value)


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected integers with commas between them") from None


def matcher_of(a: argparse.Namespace) -> Matcher:
    from zipfile import BadZipFile

    import numpy as np

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
    matcher = Matcher.from_pretrained(
        a.model,
        adapter=getattr(a, "adapter", None),
        score=a.score,
        timesteps=a.timesteps if a.steps is None else even_timesteps(a.steps),
        layers=None if a.layers is None else a.layers.split(","),
        direction=a.direction,
        seed=a.seed,
        size=a.size,
        batch_size=a.batch_size,
        noise=noise,
        encodings=a.encodings,
        **loading_of(a),
    )
    return matcher.compile() if a.compile else matcher


def loading_of(a: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``dsd.backbone.LoadConfig`` that the options say."""
    import torch

    names = (
        "device",
        "offload",
        "quantize_text_encoder",
        "channels_last",
        "variant",
        "revision",
        "config",
        "allow_pickle",
    )
    return {**{n: getattr(a, n) for n in names}, "device_map": _device_map(a), "dtype": getattr(torch, a.dtype)}


def _device_map(a: argparse.Namespace) -> str | dict[str, str | int] | None:
    text: str | None = a.device_map
    if text is None or "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and device for name, _, device in pairs):
        raise OptionError(f"got --device-map {text!r}, expected balanced, or component=device with commas between them")
    return {name: int(device) if device.isdecimal() else device for name, _, device in pairs}


def accelerator_of(a: argparse.Namespace) -> Any:
    """What ``accelerate launch`` started this process for; None if it did not."""
    if not any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")):
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=a.device == "cpu")
    if a.device is None:
        a.device = str(accelerator.device)
    return accelerator


LEARNING = {
    "max_steps": "steps",
    "batch": "batch",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "margin": "margin",
    "temperature": "temperature",
    "check_every": "check_every",
    "patience": "patience",
    "jitter": "jitter",
    "draws": "draws",
    "seed": "seed",
    "negatives": "negatives",
    "image_negatives": "image_negatives",
    "swaps": "swaps",
    "candidates": "candidates",
    "folds": "folds",
    "hold_out": "validation",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Options of learning that have no default here, and their fields of :class:`dsd.learn.FitConfig`."""


def given_of(a: argparse.Namespace) -> dict[str, Any]:
    """Options of learning that were given and have no default here, by their fields."""
    given = {field: getattr(a, name) for name, field in LEARNING.items()}
    return {field: value for field, value in given.items() if value is not None}


_PLACING = ("rank", "prompt_scale", "projections", "attention", "prompt_layers", "tokens")
"""Options that say where prompts go."""


def refuse_idle(a: argparse.Namespace, heeded: Iterable[str], method: str) -> None:
    """Refuses options of learning that a method does not heed.

    Raises:
        OptionError: If some were given.
    """
    known = {"seed", *heeded}
    idle = [n for n in learning_given(a) if n != "method" and LEARNING.get(n, n) not in known]
    if idle:
        raise OptionError(f"got {_flags(idle)} with {method}, which has no use for that; leave it out")


def learning_given(a: argparse.Namespace) -> list[str]:
    """Options of learning that differ from what they are by default, by their names here."""
    usual = {"method": "prompt", "objective": "softmax", "gradient_checkpointing": False}
    names = (*usual, "mix", "start", "words", *_PLACING, *(name for name in LEARNING if name != "seed"))
    return [name for name in names if getattr(a, name) != usual.get(name)]


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _refuse_unheeded(a: argparse.Namespace) -> None:
    """Refuses options that others make of no use.

    Raises:
        OptionError: If some were given.
    """
    pieces = a.method.split("+")
    for name, heeded, where in (
        ("margin", a.objective == "hinge", "--objective softmax"),
        ("temperature", a.objective == "softmax", "--objective hinge"),
        ("tokens", "tokens" in pieces, f"--method {a.method}"),
        ("draws", "weights" in pieces, f"--method {a.method}"),
    ):
        if getattr(a, name) is not None and not heeded:
            raise OptionError(f"got --{name} with {where}, which has no use for that; leave it out")


def lesson_of(a: argparse.Namespace) -> tuple[FitConfig, PromptConfig | None]:
    """How to learn, and where prompts go; None where the adapter that is started from says so.

    Raises:
        OptionError: If options do not go together.
    """
    from dsd.learn import HEEDED_BY_WEIGHTS, FitConfig
    from dsd.prompts import PromptConfig

    if a.method == "weights":
        refuse_idle(a, (*HEEDED_BY_WEIGHTS, "start", "words"), "--method weights")  # of these two it is said why
    _refuse_unheeded(a)
    mix = None if a.mix is None else () if a.mix == "none" else tuple(a.mix.split(","))
    config = FitConfig(
        method=a.method,
        mix=mix,
        objective=a.objective,
        gradient_checkpointing=a.gradient_checkpointing,
        **given_of(a),
    )
    where: dict[str, Any] = {n: v for n in ("rank", "tokens") if (v := getattr(a, n)) is not None}
    if a.words is not None:
        where["words"] = tuple(word.strip().lower() for word in a.words.split(","))
    if a.start is not None:
        idle = [name for name in _PLACING if getattr(a, name) is not None]
        if idle:
            raise OptionError(f"got {_flags(idle)} with --start, whose prompts are as they are; leave it out")
        return config, PromptConfig(**where) if where else None
    if a.prompt_scale is not None:
        where["scale"] = a.prompt_scale
    if a.projections is not None:
        names = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
        unknown = [p for p in a.projections.split(",") if p not in names]
        if unknown:
            raise OptionError(f"got projections {', '.join(unknown)}, expected some of {', '.join(names)}")
        where["projections"] = tuple(names[p] for p in a.projections.split(","))
    if a.prompt_layers is not None:
        where["layers"] = tuple(a.prompt_layers.split(","))
    where["attention"] = a.attention or ("all" if a.prompt_layers is None else "cross")
    return config, PromptConfig(**where)
