"""Records the attention inside a denoiser; the only file that knows the attention internals of diffusers.

A :class:`Probe` listens to the query and key projections of named cross-attention layers during a pass and keeps
two numbers a head: the log-sum-exp of the logits over the caption's own tokens, and over all tokens, each averaged
over the image's positions. The layers' own computation, fused or not, is left alone.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from diffusers.models.attention_processor import Attention
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsd.contracts import ModelError, OptionError


@dataclass(frozen=True)
class LayerRecord:
    """What one cross-attention layer did in one pass. All float32 and differentiable.

    Attributes:
        own: (n, heads) mean over positions of the log-sum-exp over the caption's own tokens.
        all: (n, heads) the same over all tokens, start, end and padding included.
        maps: (n, positions, tokens) attention probabilities averaged over heads; None unless asked for.
    """

    own: Float[Tensor, "n heads"]
    all: Float[Tensor, "n heads"]
    maps: Float[Tensor, "n positions tokens"] | None


def cross_attention_layers(denoiser: nn.Module) -> dict[str, Attention]:
    """The layers in which the image attends to the text, by name, in the order of the network.

    Raises:
        ModelError: If there are none.
    """
    found = {n: m for n, m in denoiser.named_modules() if isinstance(m, Attention) and m.is_cross_attention}
    if not found:
        raise ModelError(
            f"got a {type(denoiser).__name__} without cross-attention to text, expected a text-to-image denoiser; "
            "the denoising score needs none, so use --score denoising"
        )
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".")[0], 0)))


def select_layers(denoiser: nn.Module, patterns: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of cross-attention layers that match any of the patterns (``*`` as in file names); None takes all.

    A pattern also takes every layer below it: ``mid_block`` means all layers of the mid block.

    Raises:
        OptionError: If a pattern matches no layer.
    """
    names = tuple(cross_attention_layers(denoiser))
    if patterns is None:
        return names
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, pattern + ".*")}
        if not hits:
            raise OptionError(
                f"got layer {pattern!r}, expected a cross-attention layer or a part of one: {', '.join(names)}"
            )
        chosen |= hits
    return tuple(n for n in names if n in chosen)


def paper_layers(denoiser: nn.Module) -> tuple[str, ...]:
    """The layers that He et al. 2023 average over, as their code has it.

    Of the last down block, the mid block and the last up block with cross-attention: every attention module, in each
    its last transformer block.
    """
    pattern = re.compile(
        r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)\."
    )
    parsed = {n: m.groups(default="0") for n in cross_attention_layers(denoiser) if (m := pattern.match(n))}
    if not parsed:
        raise ModelError(
            "got a denoiser without down, mid and up blocks, which the paper's score is defined on; use attention"
        )
    last_block: dict[str, int] = {}
    last_transformer: dict[tuple[str, str, str], int] = {}
    for side, block, module, transformer in parsed.values():
        last_block[side] = max(last_block.get(side, 0), int(block))
        key = (side, block, module)
        last_transformer[key] = max(last_transformer.get(key, 0), int(transformer))
    return tuple(
        name
        for name, (side, block, module, transformer) in parsed.items()
        if int(block) == last_block[side] and int(transformer) == last_transformer[side, block, module]
    )


class Probe:
    """Records cross-attention during the passes made inside it.

        with Probe(backbone.denoiser, layers, text.own) as probe:
            noise = backbone.predict_noise(noised, timesteps, text)
        probe.records["mid_block.attentions.0.transformer_blocks.0.attn2"].own

    Each pass replaces the records of the one before. On every exit, also by an exception, the model is as it was.
    Gradients of records reach into regions under gradient checkpointing as well.

    Args:
        denoiser: The network to listen to.
        layers: Names of :func:`cross_attention_layers`.
        own: (n, tokens), the caption's own tokens of each row of the batch.
        maps: Keep attention maps too (positions x tokens a row and layer).
        heads: Which of each layer's heads the maps are averaged over; None takes all.

    Raises:
        ModelError: If the denoiser has no cross-attention.
        OptionError: If a layer's name is unknown, or it has no such head.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Sequence[str],
        own: Bool[Tensor, "n tokens"],
        *,
        maps: bool = False,
        heads: Sequence[int] | None = None,
    ) -> None:
        known = cross_attention_layers(denoiser)
        unknown = [name for name in layers if name not in known]
        if unknown:
            raise OptionError(f"got layers {unknown}, expected some of {list(known)}")
        self._layers = {name: known[name] for name in layers}
        self._own = own
        self._maps = maps
        few = min((layer.heads for layer in self._layers.values()), default=1)
        if heads is not None and not all(0 <= h < few for h in heads):
            raise OptionError(f"got heads {list(heads)}, expected some of 0 to {few - 1}, which every chosen layer has")
        self._heads = slice(None) if heads is None else list(heads)
        self._heard: dict[str, tuple[Tensor, Tensor]] = {}
        self._records: dict[str, LayerRecord] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def records(self) -> dict[str, LayerRecord]:
        """What each layer did in the last pass, by name; differentiable if that pass was."""
        with torch.enable_grad():
            for name in list(self._heard):
                self._settle(name)
        return self._records

    def __enter__(self) -> Self:
        try:
            for name, layer in self._layers.items():
                self._listen(name, layer)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _listen(self, name: str, layer: Attention) -> None:
        heard: dict[str, Tensor] = {}

        def keep(what: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                heard[what] = output

            return hook

        def finish(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._heard[name] = heard.pop("query"), heard.pop("key")
            # With gradients, hooks must compute nothing: under gradient checkpointing the layer runs again in the
            # backward pass, without them, and has to save the same tensors. Without, queries are freed layer by layer.
            if not torch.is_grad_enabled():
                self._settle(name)

        for module, hook in ((layer.to_q, keep("query")), (layer.to_k, keep("key")), (layer, finish)):
            self._handles.append(module.register_forward_hook(hook))

    def _settle(self, name: str) -> None:
        """Turns what was heard of a layer into its record."""
        self._records[name] = self._record(self._layers[name], *self._heard.pop(name))

    def _record(self, layer: Attention, query: Tensor, key: Tensor) -> LayerRecord:
        # mixed precision would make the products of halves again
        with torch.autocast(query.device.type, enabled=False):
            # (n, length, heads * d) => (n, heads, length, d)
            query, key = (x.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x in (query, key))
            logits = query @ key.transpose(-1, -2) * layer.scale
            own = self._own[:, None, None, :]
            return LayerRecord(
                own=logits.masked_fill(~own, float("-inf")).logsumexp(-1).mean(-1),
                all=logits.logsumexp(-1).mean(-1),
                maps=logits[:, self._heads].softmax(-1).mean(1) if self._maps else None,
            )
