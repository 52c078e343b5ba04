"""Adapters: what was learned from examples, on disk and on a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dsd import prompts
from dsd.backbone import Backbone, cards
from dsd.backbone.hub import resolve
from dsd.contracts import AdapterError, ModelError, OptionError
from dsd.exchange import LORA_FILE, read_authors, read_lora, write_lora
from dsd.prompts import PromptConfig
from dsd.report import reliability_diagram
from dsd.scores import WEIGHTED, Features, ScoreConfig


@dataclass(frozen=True)
class Adapter:
    """What was learned, and everything needed to use it again.

    Attributes:
        base: The fingerprint of the base model (see :func:`fingerprint`); None for adapters in the formats of others.
        score: The score that was taught.
        prompts: Where the prompts go; None if there are none.
        state: The prompts' tensors by name, float32.
        size: Pixels a side of the pictures it was taught on.
        training: Configuration, curve and figures of the training, plain values. Its ``calibration`` says how far
            probabilities can be taken at their word: ``{"error": float, "bins": [...], "held_out": examples}``, see
            :func:`dsd.metrics.reliability`.
        scale: Turns score differences into log-odds: probabilities are ``softmax(scale * scores)``.
        weights: (timesteps, features) float32 of a ``weighted`` score; None for others.
        features: What each column of the weights is of; see :class:`dsd.scores.Features`.
    """

    base: Mapping[str, Any] | None
    score: ScoreConfig
    prompts: PromptConfig | None
    state: Mapping[str, Tensor]
    size: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None
    weights: Tensor | None = None
    features: tuple[str, ...] | None = None

    def digest(self) -> str:
        """32 hex digits over what was learned and what it is for; of nothing that only tells how it came about."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        found = hashlib.blake2b(digest_size=16)
        where = None if self.prompts is None else self.prompts.to_dict()
        found.update(json.dumps([self.score.to_dict(), where, self.size], sort_keys=True).encode())
        tensors = dict(self.state) if self.weights is None else {**self.state, _LEARNED: self.weights}
        for name, values in sorted(tensors.items()):
            found.update(name.encode() + values.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder, which appears whole.

        Besides them a card, and a picture of the calibration if the training says how it is.
        """
        out = check_out(folder)
        config = {
            "format": _FORMAT,
            "base": self.base,
            "size": self.size,
            "score": self.score.to_dict(),
            "prompts": None if self.prompts is None else self.prompts.to_dict(),
            "scale": self.scale,
            "features": self.features,
            "training": self.training,
        }
        tensors = dict(self.state) if self.weights is None else {**self.state, _LEARNED: self.weights}
        part = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            (part / _WEIGHTS).write_bytes(save(tensors))  # save_file leaves it to its owner alone
            (part / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", "utf-8")
            (part / "README.md").write_text(_card(self, out.name), "utf-8")
            if "calibration" in self.training:
                found = self.training["calibration"]
                note = f"{found['held_out']:,} held-out examples; the larger a point, the more predictions"
                reliability_diagram(part / _RELIABILITY, found["bins"], title=out.name, note=note)
            part.chmod(0o755)
            if out.exists():
                old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
                os.replace(out, old)
                os.replace(part, out)
                shutil.rmtree(old)
            else:
                os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return out

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Adapter:
        """Reads a folder written by :meth:`save`, a LoRA that others trained, or the authors' format.

        Args:
            folder: With files of ours, a ``pytorch_lora_weights.safetensors`` or the authors' ``pytorch_model.bin``; or
                a safetensors file, which is taken for a LoRA. A LoRA brings no score, so it gets the default one.
                Or the name of an adapter that comes with the package, where there is no such path: ``tiny-captions``
                (:mod:`dsd.tiny.captioned`).

        Raises:
            AdapterError: If there is none of these, or files that do not fit together.
        """
        path = where_is(folder)
        lora = path / LORA_FILE if path.is_dir() else path
        if lora.suffix == ".safetensors" and lora.is_file() and not (path / _CONFIG).is_file():
            return cls(None, ScoreConfig(), *read_lora(lora))
        if not (path / _CONFIG).is_file():
            if (path / _AUTHORS).is_file():
                config, state = read_authors(path / _AUTHORS)
                return cls(None, ScoreConfig("paper", (189, 389, 589, 789, 989)), config, state)
            raise AdapterError(
                f"{path}: got no adapter, expected a folder with {_CONFIG}, {LORA_FILE} or {_AUTHORS}, "
                "or a safetensors file"
            )
        try:
            values = json.loads((path / _CONFIG).read_text("utf-8"))
            if values.get("format") != _FORMAT:
                raise AdapterError(f"{path}: got format {values.get('format')!r}, expected {_FORMAT!r}")
            where, base, size = values["prompts"], values["base"], values["size"]
            if base is not None and not (base["name"] and same_base(base, base)):
                raise ValueError("base is no fingerprint")
            score, tensors = ScoreConfig.from_dict(values["score"]), load_file(path / _WEIGHTS)
            weights, features = tensors.pop(_LEARNED, None), values.get("features")
            shape = None if features is None else (len(score.timesteps), len(features))
            if (None if weights is None else tuple(weights.shape)) != shape or (score.kind == WEIGHTED) != bool(shape):
                raise ValueError(
                    f"weights of shape {None if weights is None else tuple(weights.shape)} for the score "
                    f"{score.kind!r} of {len(score.timesteps)} timesteps and {len(features or ())} features"
                )
            return cls(
                base,
                score,
                None if where is None else PromptConfig.from_dict(where),
                tensors,
                None if size is None else int(size),
                dict(values["training"]),
                values["scale"],
                weights,
                None if features is None else tuple(features),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, OptionError) as error:
            raise AdapterError(
                f"{path}: got an adapter that cannot be read ({type(error).__name__}: {error}), "
                "expected the files as they were saved; copy the folder again"
            ) from None

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the prompts as a LoRA that ``StableDiffusionPipeline.load_lora_weights(folder)`` reads.

        Raises:
            AdapterError: If there are no prompts, or something else is in the folder.
        """
        if self.prompts is None:
            raise AdapterError(
                "got an adapter without prompts (the zero-shot score was kept, or only its weights were learned), "
                "expected one with prompts; a pipeline has nothing to load of it"
            )
        if self.prompts.tokens or self.prompts.words:
            raise AdapterError(
                f"got an adapter with {'soft tokens' if self.prompts.tokens else 'learned words'}, which a LoRA has no "
                "place for, expected one of prompts alone; learn it with --method prompt"
            )
        return write_lora(folder, self.prompts, self.state)

    def attach(self, backbone: Backbone) -> None:
        """Puts the prompts onto a bare model, and checks that it has what the weights are of.

        Raises:
            AdapterError: If it was made for another base model.
        """
        if self.base is not None:
            own = fingerprint(backbone)
            if not same_base(self.base, own):
                other = _difference(self.base, own)
                raise AdapterError(
                    f"got an adapter for {self.base['name']} ({self.base['parameters']:,} parameters{other}), expected "
                    f"one for {backbone.name}; load it with --model {self.base['name']}"
                )
        if self.prompts is not None and backbone.offload == "sequential":
            raise AdapterError(
                "got an adapter with prompts for a model that is offloaded layer by layer, expected offload 'model' "
                "or none; prompts are no layers of the model's own"
            )
        names = None if self.features is None else Features(backbone, self.score.layers, self.score.direction).names
        if self.features != names:
            raise AdapterError(
                f"got weights of {len(self.features or ())} features that {backbone.name} does not have in this order, "
                "expected those of its attention heads; load the adapter onto the base model that it was made for"
            )
        if self.prompts is not None:
            prompts.attach(backbone.denoiser, self.prompts)
            try:
                prompts.load_state(backbone.denoiser, self.state)
            except AdapterError:
                prompts.detach(backbone.denoiser)
                raise


_FORMAT = "dsd-adapter-1"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_LEARNED = "weights"
_AUTHORS = "pytorch_model.bin"
_RELIABILITY = "reliability.png"


EMBEDDED = {"tiny-captions": "adapter"}
"""Adapters that come with the package, by name: folders of ``dsd.tiny``."""


def where_is(adapter: str | os.PathLike[str]) -> Path:
    """The path of an adapter: one that comes with the package if there is no other of this name."""
    path = Path(adapter)
    if str(adapter) in EMBEDDED and not path.exists():
        return Path(str(files("dsd.tiny").joinpath(EMBEDDED[str(adapter)])))
    return path


def check_out(folder: str | os.PathLike[str]) -> Path:
    """Where an adapter is to be saved; makes the folders above it.

    Raises:
        AdapterError: If something else is there, or nothing can be written there.
    """
    out = Path(folder)
    try:
        if out.is_symlink():  # what is replaced in the end is the folder itself
            out = out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out if out.is_dir() else out.parent):
            pass  # what cannot be written is found out before hours of learning
        taken = out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _CONFIG).exists()))
        here = out.exists() and out.samefile(Path.cwd())
    except (OSError, RuntimeError) as error:  # the latter of links that lead to themselves
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"{out}: got a path that cannot be written ({reason}); choose another") from None
    if here:
        raise AdapterError(
            f"{folder}: got the working directory, expected a folder of its own for an adapter; name one"
        )
    if taken:
        raise AdapterError(f"{out}: got a path that holds something else, expected a new folder or an adapter's")
    return out


def fingerprint(backbone: Backbone) -> dict[str, Any]:
    """What tells one base model from another, whatever precision it is loaded in.

    Its size, some weights, and what it computes with them: configuration, schedule, what is predicted.
    """
    added = (".lora_", prompts.TOKENS, prompts.WORDS)
    named = backbone.denoiser.named_parameters()
    weights = [(n, p) for n, p in named if p.ndim > 1 and not any(part in n for part in added)]
    chosen = weights[:: max(1, len(weights) // 32)]
    sample = [round(float(p.detach().flatten()[p.numel() // 2]), 5) for _, p in chosen]
    return {
        "name": backbone.name,
        "parameters": sum(p.numel() for _, p in weights),
        "sample": sample,
        "computation": _plain(backbone.computation()),
    }


def same_base(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of one model, up to rounding to half precision.

    Values that only one of them has do not count: adapters of earlier versions know nothing of the computation, and
    later versions of diffusers add to configurations what changes nothing by default.
    """
    same_size = a["parameters"] == b["parameters"] and len(a["sample"]) == len(b["sample"])
    return same_size and np.allclose(a["sample"], b["sample"], rtol=1e-2, atol=1e-3) and not _difference(a, b)


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """In what two computations differ, in words, or nothing."""
    first, second = (_plain(x.get("computation", {})) for x in (a, b))
    found = [n for n in first if n in second and first[n] != second[n]]
    return f", with another {found[0]}" if found else ""


def _plain(values: Any) -> Any:
    """As they come back from JSON."""
    return json.loads(json.dumps(values, default=str))


def _card(adapter: Adapter, name: str) -> str:
    """What the hub shows of an adapter: its front matter first, which the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    base = "unknown" if adapter.base is None else str(adapter.base["name"])
    training, config = adapter.training, adapter.prompts
    low_rank = config is not None and bool(config.ranks or config.projections)
    head = ModelCardData(
        base_model=_hub_name(base),
        library_name="dsd",
        license=cards()[base].licence if base in cards() else None,
        tags=["image-text-matching", "few-shot", "diffusion", *(("lora",) if low_rank else ())],
    )
    lines = [
        f"# {name}",
        "",
        f"What `dsd` learned about `{base}` (He et al. 2023, arXiv 2305.10722)."
        if training
        else f"Prompts for `{base}`, in the format of `dsd`.",
        "",
        f"- Score: `{adapter.score.kind}` at timesteps {', '.join(map(str, adapter.score.timesteps))}",
    ]
    if (bare := adapter.score.bare) is not None:
        lines.append(
            f"- Added: {adapter.score.bare_weight:.3g} times `{bare.kind}` of the model without prompts at timesteps "
            f"{', '.join(map(str, bare.timesteps))}"
        )
    if config is not None:
        lines.append(f"- Learned prompts: {_prompts_in_words(config)}")
    if adapter.weights is not None:
        lines.append(f"- Learned weights: {len(adapter.features or ())} features at each timestep")
    if config is None and adapter.weights is None:
        lines.append("- Learned: nothing, the zero-shot score did as well")
    if "examples" in training:
        data = training.get("data", {})
        sums = [f" (checksum {data[part]})" if part in data else "" for part in ("examples", "validation")]
        validated = f"{training['validation_examples']} to validate{sums[1]}"
        if judged_by_turns(training):
            validated = "held out by turns to validate"
        lines.append(f"- Examples: {training['examples']} to learn from{sums[0]}, {validated}")
    if "validation" in training:
        figures = training["validation"]
        first = "as it started, from prompts that were learned before" if training.get("started") else "zero-shot"
        dear = f" ({figures['as_dear']:.3f} in as many passes)" if "as_dear" in figures else ""
        lines.append(
            f"- Validation accuracy: {figures['before']:.3f} {first}{dear}, {figures['after']:.3f} "
            f"[{figures['low']:.3f}, {figures['high']:.3f}] learned"
        )
        head.model_name = name
        head.eval_results = [
            EvalResult(
                task_type="image-text-matching",
                dataset_type="validation",
                dataset_name="validation examples",
                metric_type="accuracy",
                metric_name="Validation accuracy",
                metric_value=figures["after"],
            )
        ]
    if "calibration" in training:
        found = training["calibration"]
        lines += [
            f"- Expected calibration error: {found['error']:.3f} on {found['held_out']:,} held-out examples",
            "",
            f"![How often predictions are right against how sure they are]({_RELIABILITY})",
        ]
    call = f'matcher = dsd.Matcher.from_pretrained("{base}", adapter="{name}")'
    lines += ["", "```python", "import dsd", "", call, "```", ""]
    if config is not None and not (config.tokens or config.words):
        lines += [f"For stock diffusers pipelines, as a LoRA: `dsd export {name} --out {name}-lora`", ""]
    return f"---\n{head.to_yaml()}\n---\n" + "\n".join(lines)


def _hub_name(model: str) -> str | None:
    try:
        found = resolve(model)
    except ModelError:
        return None
    return None if isinstance(found, Path) else found


def _prompts_in_words(config: PromptConfig) -> str:
    parts = []
    if config.ranks is not None:
        parts.append(f"rank {', '.join(map(str, sorted(set(config.ranks.values()))))} on {len(config.ranks)} modules")
    elif config.projections:
        parts.append(f"rank {config.rank} on {', '.join(config.projections)}")
    if config.tokens:
        parts.append(f"{config.tokens} soft tokens")
    if config.words:
        parts.append(f"the meaning of {', '.join(config.words)}")
    return " and ".join(parts)


def judged_by_turns(training: Mapping[str, Any]) -> bool:
    """Whether what was learned is judged by the examples it was learned from, held out by turns."""
    data = training.get("data", {})
    return "validation" in data and data["validation"] == data.get("examples")
