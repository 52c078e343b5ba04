"""Prompts: what few-shot learning adds to a frozen denoiser.

He et al. 2023 learn a low-rank change of the query, key, value and output projections of the attention layers;
``peft`` puts it there. Soft tokens (Lester et al. 2021) are learned token states that join every caption's. What a word
means is learned as an offset to the states of its tokens, of which its caption's other states know nothing (textual
inversion, Gal et al. 2023, learns the word's embedding, before the text encoder).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dsd.backbone import TextStates
from dsd.contracts import AdapterError, OptionError
from dsd.probe import projections, select_layers, text_width

Projection = Literal["to_q", "to_k", "to_v", "to_out.0"]
_ADAPTER = "dsd"
TOKENS = "soft_tokens"
"""The name of the soft tokens among what was learned."""
WORDS = "soft_words"
"""What names of the offsets of words begin with among what was learned, such as ``soft_words.dotted``."""


@dataclass(frozen=True)
class PromptConfig:
    """Where prompts go, and how large they are.

    Attributes:
        rank: Of each low-rank change.
        scale: Multiplies the change; the paper's is 1.
        projections: Which of a layer's projections are prompted; in joint attention, those for image and text alike.
            One that was fused is prompted as a whole.
        attention: ``cross`` for layers in which the image attends to the text, joint ones among them, ``self`` for the
            others, or ``all``, as in the paper: what goes with what is worked out where the image attends to itself.
        layers: Patterns of cross-attention layers, as in :class:`dsd.scores.ScoreConfig`; for ``cross`` alone.
        tokens: How many soft tokens join every caption; they count among its own.
        words: Words of captions, in lower case, whose meaning is learned: such that the model has never seen.
        ranks: Names of modules of the denoiser and the rank of each, for prompts that others placed; rank, projections,
            attention and layers then count for nothing.
    """

    rank: int = 4
    scale: float = 1.0
    projections: tuple[Projection, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    attention: Literal["cross", "self", "all"] = "all"
    layers: tuple[str, ...] | None = None
    tokens: int = 0
    words: tuple[str, ...] = ()
    ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for rank in (self.rank, *(self.ranks or {}).values()):
            if not 1 <= rank <= 1024:
                raise OptionError(f"got rank {rank}, expected 1 to 1024")
        if not 0 <= self.tokens <= 1024:
            raise OptionError(f"got {self.tokens} soft tokens, expected 0 to 1024")
        strange = [w for w in self.words if not (w.isalpha() and w == w.lower())]
        if strange or len(set(self.words)) < len(self.words):
            raise OptionError(f"got words {self.words}, expected different ones, of lower-case letters alone")
        learned = self.projections or self.tokens or self.words
        if not set(self.projections) <= set(get_args(Projection)) or not learned:
            raise OptionError(f"got projections {self.projections}, expected some of {get_args(Projection)}")
        if self.attention not in ("cross", "self", "all"):
            raise OptionError(f"got attention {self.attention!r}, expected cross, self or all")
        if self.layers is not None and self.attention != "cross":
            raise OptionError(f"got layers with attention {self.attention!r}, expected them with attention 'cross'")
        if self.ranks is not None and not self.ranks:
            raise OptionError("got ranks of no module, expected at least one")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of words only where there are some: configurations from before they came are as they were."""
        values = asdict(self)
        if not self.words:
            del values["words"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptConfig:
        """From plain values, as they come from JSON."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**known)


def targets(denoiser: nn.Module, config: PromptConfig) -> list[str]:
    """Names of the modules that the prompts change.

    Raises:
        AdapterError: If ``config`` names modules that the denoiser lacks, or that cannot be prompted.
    """
    if config.ranks is not None:
        modules = dict(denoiser.named_modules())
        strange = [name for name in config.ranks if not isinstance(modules.get(name), nn.Linear | nn.Conv2d)]
        if strange:
            raise AdapterError(
                f"got prompts for {len(strange)} of {len(config.ranks)} modules that this model has no place for (such "
                f"as {strange[0]}), expected linear maps and convolutions of it; load the adapter onto the base model "
                "that it was made for"
            )
        return list(config.ranks)
    chosen = set(select_layers(denoiser, config.layers)) if config.attention == "cross" else set()
    names = [
        module
        for name, (to_text, roles) in projections(denoiser).items()
        if (name in chosen if config.attention == "cross" else config.attention == "all" or not to_text)
        for projection in config.projections
        for module in roles.get(projection, ())
    ]
    return list(dict.fromkeys(names))


def lora_options(ranks: Mapping[str, int], scale: float = 1.0) -> dict[str, Any]:
    """The options of ``peft.LoraConfig`` that put a change of each rank, times ``scale``, onto each named module."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{name}": rank for name, rank in ranks.items() if rank != common}  # ^: not at the end of longer names
    return {
        "r": common,
        "lora_alpha": round(common * scale, 6),
        "target_modules": list(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: round(rank * scale, 6) for name, rank in other.items()},
    }


def check_bare(denoiser: nn.Module) -> None:
    """Refuses a denoiser that carries prompts.

    Raises:
        AdapterError: If it does.
    """
    if parameters(denoiser):
        raise AdapterError("got a model that already carries prompts, expected a bare one; load the model anew")


def attach(denoiser: nn.Module, config: PromptConfig, seed: int = 0) -> None:
    """Adds prompts and offsets of words, which change nothing yet, and soft tokens; :func:`parameters` are then ready
    to learn.

    Raises:
        AdapterError: If the denoiser already carries prompts, or lacks modules that ``config`` names.
    """
    check_bare(denoiser)
    names = targets(denoiser, config)
    ranks = config.ranks or dict.fromkeys(names, config.rank)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn((config.tokens, text_width(denoiser)), generator=generator) if config.tokens else None
    if ranks:
        inject_adapter_in_model(LoraConfig(**lora_options(ranks, config.scale)), denoiser, adapter_name=_ADAPTER)
        with torch.no_grad():
            for _, layer in _layers(denoiser):
                down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
                bound = 1 / math.sqrt(down.shape[1])
                down.copy_((2 * torch.rand(down.shape, generator=generator) - 1) * bound)
                up.zero_()
                # learned in float32 even where the model is in half precision
                layer.lora_A[_ADAPTER].float()
                layer.lora_B[_ADAPTER].float()
    # last, because peft freezes what is not its own
    device = next(denoiser.parameters()).device
    if states is not None:
        denoiser.add_module(TOKENS, _SoftTokens(states.to(device)))
    if config.words:
        denoiser.add_module(WORDS, _SoftWords(config.words, text_width(denoiser), device))


def detach(denoiser: nn.Module) -> None:
    """Takes all prompts away again; a bare model is left as it is."""
    for name, layer in list(_layers(denoiser)):
        parent, _, child = name.rpartition(".")
        owner = denoiser.get_submodule(parent)
        if isinstance(owner, nn.ModuleList):
            owner[int(child)] = layer.get_base_layer()
        else:
            setattr(owner, child, layer.get_base_layer())
    if hasattr(denoiser, "peft_config"):
        del denoiser.peft_config
    for name in (TOKENS, WORDS):
        if _in_text(denoiser, name) is not None:
            delattr(denoiser, name)


def parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The prompts' own parameters by name."""
    found = {}
    if isinstance(tokens := _in_text(denoiser, TOKENS), _SoftTokens):
        found[TOKENS] = tokens.states
    if isinstance(words := _in_text(denoiser, WORDS), _SoftWords):
        found |= {f"{WORDS}.{word}": offset for word, offset in words.offsets().items()}
    for name, layer in _layers(denoiser):
        found[f"{name}.lora_A.weight"] = layer.lora_A[_ADAPTER].weight
        found[f"{name}.lora_B.weight"] = layer.lora_B[_ADAPTER].weight
    return found


def piece_of(name: str) -> str:
    """The piece of a method that learns the parameter of this name: ``prompt``, ``tokens`` or ``words``."""
    return "tokens" if name == TOKENS else "words" if name.startswith(f"{WORDS}.") else "prompt"


def state(denoiser: nn.Module) -> dict[str, Tensor]:
    """A copy of the prompts, float32 on the CPU."""
    return {name: p.detach().float().cpu().clone() for name, p in parameters(denoiser).items()}


@torch.no_grad()
def load_state(denoiser: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Sets attached prompts.

    Raises:
        AdapterError: If a tensor is missing, left over, or of another shape.
    """
    own = parameters(denoiser)
    missing, extra = sorted(own.keys() - values.keys()), sorted(values.keys() - own.keys())
    if missing or extra:
        raise AdapterError(
            f"got an adapter with {len(extra)} tensors that this model has no place for and without {len(missing)} "
            f"that it needs (such as {(missing + extra)[0]}); load it onto the base model that it was made for"
        )
    for name, parameter in own.items():
        if parameter.shape != values[name].shape:
            raise AdapterError(
                f"{name}: got shape {tuple(values[name].shape)}, expected {tuple(parameter.shape)}; "
                "load the adapter onto the base model that it was made for"
            )
        parameter.copy_(values[name])


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """The model without its prompts, inside this context."""
    layers: list[Any] = [layer for _, layer in _layers(denoiser)]
    layers += [added for name in (TOKENS, WORDS) if (added := _in_text(denoiser, name)) is not None]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def prompted(denoiser: nn.Module, text: TextStates) -> TextStates:
    """Captions as the denoiser's prompts have them: with what was learned of words, and soft tokens behind them, as own
    tokens of no word; as they are if there is neither."""
    for name in (WORDS, TOKENS):
        added = _in_text(denoiser, name)
        if added is not None and added.enabled:
            # an offloaded denoiser is brought to the captions' device only when it is called
            text = added.to(text.states.device)(text)
    return text


class _InText(nn.Module):
    """What is added to captions, unless it is disabled."""

    enabled = True

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled


class _SoftTokens(_InText):
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = nn.Parameter(states)

    def forward(self, text: TextStates) -> TextStates:
        return text.with_tokens(self.states)


class _SoftWords(_InText):
    def __init__(self, words: Sequence[str], width: int, device: torch.device) -> None:
        super().__init__()
        self._words = tuple(words)
        # one for each word: one that no caption of a batch has must be left without a gradient
        for word in words:
            self.register_parameter(f"of_{word}", nn.Parameter(torch.zeros(width, device=device)))

    def offsets(self) -> dict[str, nn.Parameter]:
        return {word: self.get_parameter(f"of_{word}") for word in self._words}

    def forward(self, text: TextStates) -> TextStates:
        return text.with_words(self.offsets())


def _in_text(denoiser: nn.Module, name: str) -> _InText | None:
    found = getattr(denoiser, name, None)
    return found if isinstance(found, _InText) else None


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((n, m) for n, m in denoiser.named_modules() if isinstance(m, LoraLayer) and _ADAPTER in m.lora_A)
