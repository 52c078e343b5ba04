"""Records the attention inside a denoiser; the only file that knows the attention internals of diffusers.

A :class:`Probe` listens to the queries and keys of named layers during a pass and keeps two numbers a head, pooled from
the logits. The layers' own computation, fused or not, is left alone.

Layers in which the image attends to the text are of three makes: cross-attention (U-Nets, PixArt), joint attention over
image and text with projections for each (SD 3, FLUX), and joint attention over both as one sequence (FLUX).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsd.contracts import ModelError, OptionError
from dsd.fused import Overheard

Direction = Literal["image", "text"]
"""Who asks: image positions what text they attend to, or the caption's tokens where in the image they are."""
Over = Literal["own", "all"]
"""Which log-sum-exps are taken: :attr:`LayerRecord.own` alone, or ``all`` as well, which costs more."""
Roles = Mapping[str, tuple[str, ...]]
"""What a projection is for (to_q, to_k, to_v, to_out.0) and the names of the modules that do it in one layer."""


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did in one pass, from the logits before the softmax. All float32 and differentiable.

    With direction ``image`` the logits are those of image queries and text keys, in joint attention the block of them;
    with ``text``, which joint attention alone has, those of text queries and image keys.

    Attributes:
        own: (n, heads). ``image``: the mean over image positions of the log-sum-exp over the caption's own tokens.
            ``text``: the mean over the caption's own tokens of the log-sum-exp over image positions.
        all: (n, heads). ``image``: the same as ``own`` over all text tokens that are attended to, start, end and what
            padding is not masked included; the image's own keys are not among them, since their logits are the whole of
            self-attention. ``text``: the same as ``own`` over all keys, image and text. None unless asked for.
        maps: (n, positions, tokens) attention probabilities averaged over heads, which sum to one over the text tokens
            (``image``) or over the image positions (``text``); None unless asked for.
    """

    own: Float[Tensor, "n heads"]
    all: Float[Tensor, "n heads"] | None
    maps: Float[Tensor, "n positions tokens"] | None


_MAKES = ("cross", "joint", "single")
"""Those in which the image attends to the text."""


def _make(module: nn.Module) -> Literal["cross", "joint", "single", "self"] | None:
    """How a module attends; None if it does not."""
    if isinstance(module, FluxAttention):
        return "single" if module.added_kv_proj_dim is None else "joint"
    if isinstance(module, Attention):
        # without queries of their own, added keys are not of a joint sequence
        joint = getattr(module, "add_q_proj", None) is not None
        return "cross" if module.is_cross_attention else "joint" if joint else "self"
    return None


def cross_attention_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The layers in which the image attends to the text, by name, in the order of the network.

    Raises:
        ModelError: If there are none.
    """
    found = _to_text(denoiser)
    if not found:
        raise ModelError(
            f"got a {type(denoiser).__name__} without cross-attention to text (it attends to the image alone, and is "
            "told what to draw in another way, so no attention can say how well a caption fits), expected a "
            "text-to-image denoiser; the denoising score needs none, so use --score denoising"
        )
    return found


def attends_to_text(denoiser: nn.Module) -> bool:
    """Whether there is attention to text; class-conditional models have none."""
    return bool(_to_text(denoiser))


def _to_text(denoiser: nn.Module) -> dict[str, Any]:
    """As :func:`cross_attention_layers`; nothing if there are none."""
    found = {name: module for name, module in denoiser.named_modules() if _make(module) in _MAKES}
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0].split(".")[0], 0)))


def _by_name(denoiser: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Of these names the layers, without looking through the whole network, for every pass asks for them."""
    found: dict[str, Any] = {}
    with suppress(AttributeError):
        found = {name: denoiser.get_submodule(name) for name in names}
    if not found or any(_make(module) not in _MAKES for module in found.values()):
        known = cross_attention_layers(denoiser)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise OptionError(f"got layers {unknown}, expected some of {list(known)}")
    return found


def unheard(denoiser: nn.Module) -> list[nn.Module]:
    """The largest parts of a denoiser in which no probe listens, single layers aside: what can be compiled apart.

    A compiled part is compiled anew whenever a listener comes or goes within it.
    """
    heard = set(_to_text(denoiser))
    found: list[nn.Module] = []

    def look(name: str, module: nn.Module) -> None:
        if name in heard:
            return
        inside = not name or any(other.startswith(f"{name}.") for other in heard)
        if not inside and not isinstance(module, nn.ModuleList):
            found.extend([module] if any(True for _ in module.children()) else [])
            return
        for child, part in module.named_children():
            look(f"{name}.{child}" if name else child, part)

    look("", denoiser)
    return found


def projections(denoiser: nn.Module) -> dict[str, tuple[bool, Roles]]:
    """Every attention layer by name: whether the image attends to the text in it, and its projections.

    Projections for text in joint attention have the role of those for the image. One that was fused has several roles.
    """
    found: dict[str, tuple[bool, Roles]] = {}
    for name, layer in denoiser.named_modules():
        make = _make(layer)
        if make is None:
            continue
        fused = bool(layer.fused_projections)
        image: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
        text: tuple[str, ...] = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        if fused:
            image = ("to_q", "to_kv", "to_kv", "to_out.0") if make == "cross" else (*["to_qkv"] * 3, "to_out.0")
            text = (*["to_added_qkv"] * 3, "to_add_out")
        roles = {}
        for role, *modules in zip(("to_q", "to_k", "to_v", "to_out.0"), image, text, strict=True):
            there = tuple(f"{name}.{m}" for m in modules if _part(layer, m) is not None)
            if there:
                roles[role] = there
        found[name] = make != "self", roles
    return found


def text_width(denoiser: nn.Module) -> int:
    """The width of the text states that a denoiser takes.

    Raises:
        ModelError: If it attends to no text.
    """
    first = next(iter(cross_attention_layers(denoiser).values()))
    for name in ("context_embedder", "caption_projection.linear_1"):  # what states go through before the layers
        module = _part(denoiser, name)
        if module is not None:
            return int(module.in_features)
    return int(first.to_k.in_features)


def _part(module: Any, name: str) -> Any:
    """A module within a module, or None."""
    for step in name.split("."):
        module = module[int(step)] if step.isdecimal() and module is not None else getattr(module, step, None)
    return module


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


def check_direction(denoiser: nn.Module, layers: Sequence[str], direction: Direction) -> None:
    """Refuses layers that have no logits in a direction.

    Raises:
        OptionError: If there are such.
    """
    if direction not in get_args(Direction):
        raise OptionError(f"got direction {direction!r}, expected one of {', '.join(get_args(Direction))}")
    if direction == "image":
        return
    known = cross_attention_layers(denoiser)
    without = [name for name in layers if _make(known[name]) == "cross"]
    if without:
        raise OptionError(
            f"got direction 'text' with layer {without[0]}, expected joint attention, as in SD 3 and FLUX: in "
            "cross-attention the text asks nothing; use direction 'image'"
        )


@contextmanager
def text_once(denoiser: nn.Module, captions: Sequence[int]) -> Iterator[None]:
    """Makes cross-attention project each caption of a batch once, in passes without gradients inside this context.

    Rows under the same caption have the same keys and values, whatever their image and timestep. In joint attention
    they do not, so that nothing is changed there. A :class:`Probe` must be entered within, to hear what all rows get.

    Args:
        denoiser: The network.
        captions: Of each row of the batch, the number of its caption.
    """
    rows = {caption: row for row, caption in reversed(list(enumerate(captions)))}  # of each the first
    if len(rows) == len(captions):
        yield
        return
    number = {caption: k for k, caption in enumerate(rows)}
    first, place = list(rows.values()), [number[caption] for caption in captions]
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def few(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][first], *inputs[1:])

    def every(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output[place]

    try:
        for layer in [m for m in _to_text(denoiser).values() if _make(m) == "cross"]:
            for module in (layer.to_kv,) if layer.fused_projections else (layer.to_k, layer.to_v):
                handles.append(module.register_forward_pre_hook(few))
                handles.append(module.register_forward_hook(every))
        yield
    finally:
        while handles:
            handles.pop().remove()


class _Stop(Exception):
    """All that was to be heard of a pass was heard."""


class Probe:
    """Records attention to the text during the passes made inside it.

        with Probe(backbone.denoiser, layers, text.own, text.mask) as probe:
            noise = backbone.predict_noise(noised, timesteps, text)
        probe.records["mid_block.attentions.0.transformer_blocks.0.attn2"].own

    Each pass replaces the records of the one before. On every exit, also by an exception, the model is as it was.
    Gradients of records reach into regions under gradient checkpointing as well.

    Logits are made for :attr:`SLICE` numbers at a time, so that of a large image-query x text-key block no more than
    that is ever there; where gradients are wanted, slices are made again in the backward pass.

    Args:
        denoiser: The network to listen to.
        layers: Names of :func:`cross_attention_layers`.
        own: (n, tokens), the caption's own tokens of each row of the batch.
        mask: (n, tokens), the tokens that the denoiser attends to; None: all.
        direction: Whose queries are looked at.
        maps: Keep attention maps too (positions x tokens a row and layer).
        over: ``own`` takes no log-sum-exp over all tokens, and makes no logits but those it needs.
        stop: End the pass, and this context, once every layer was heard, as what comes after does not change what was
            recorded: a probe of the middle never runs the way up. A pass under gradient checkpointing goes on to its
            end.
        heads: Which of each layer's heads the maps are averaged over; None takes all.

    Raises:
        ModelError: If the denoiser does not attend to text.
        OptionError: If a layer's name is unknown, or it has no such head, or no logits in this direction.

    A pass raises ModelError if a layer computes its attention in a way that cannot be followed.
    """

    SLICE = 2**24
    """Logits at once; 64 MiB, and twice that while they are pooled."""

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Sequence[str],
        own: Bool[Tensor, "n tokens"],
        mask: Bool[Tensor, "n tokens"] | None = None,
        *,
        direction: Direction = "image",
        maps: bool = False,
        heads: Sequence[int] | None = None,
        over: Over = "all",
        stop: bool = False,
    ) -> None:
        self._layers = _by_name(denoiser, layers)
        check_direction(denoiser, layers, direction)
        self._own = own
        self._mask = mask
        self._direction = direction
        self._maps = maps
        self._over = over
        self._stop = stop
        self._denoiser = denoiser
        few = min((layer.heads for layer in self._layers.values()), default=1)
        if heads is not None and not all(0 <= h < few for h in heads):
            raise OptionError(f"got heads {list(heads)}, expected some of 0 to {few - 1}, which every chosen layer has")
        self._heads = slice(None) if heads is None else list(heads)
        self._heard: dict[str, dict[str, Any]] = {}
        self._records: dict[str, LayerRecord] = {}
        self._overheard: Overheard | None = None
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
    ) -> bool:
        self._release()
        return isinstance(error, _Stop)

    def _release(self) -> None:
        self._end_overhearing()
        while self._handles:
            self._handles.pop().remove()

    def _checkpointed(self) -> bool:
        """Whether parts of the pass are computed again in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self._denoiser.modules())

    def _end_overhearing(self) -> None:
        if self._overheard is not None:
            self._overheard.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._overheard = None

    def _listen(self, name: str, layer: Any) -> None:
        heard: dict[str, Any] = {}
        # in cross-attention the layer's own kernel has the sums over all tokens at hand
        overhears = self._over == "all" and self._direction == "image" and _make(layer) == "cross"

        def keep(what: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                heard[what] = output

            return hook

        def begin(_module: nn.Module, _inputs: Any, named: Mapping[str, Any]) -> None:
            heard["rotary"] = named.get("image_rotary_emb")
            if overhears and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._overheard = Overheard()
                self._overheard.__enter__()  # type: ignore[no-untyped-call]

        def finish(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self._overheard is not None:
                heard["sums"] = self._overheard.sums
                self._end_overhearing()
            self._heard[name] = dict(heard)
            heard.clear()
            # With gradients, hooks must compute nothing: under gradient checkpointing the layer runs again in the
            # backward pass, without them, and has to save the same tensors. Without, queries are freed layer by layer.
            if not torch.is_grad_enabled():
                self._settle(name)
                if self._stop and len(self._records) == len(self._layers):
                    raise _Stop
            # what a checkpointed region is to compute again, it must have computed to its end
            elif self._stop and len(self._heard) == len(self._layers) and not self._checkpointed():
                raise _Stop

        self._handles.append(layer.register_forward_pre_hook(begin, with_kwargs=True))
        for what in self._wanted(layer):
            module, _ = _source(layer, what)
            self._handles.append(module.register_forward_hook(keep(what)))
        self._handles.append(layer.register_forward_hook(finish))

    def _wanted(self, layer: nn.Module) -> tuple[str, ...]:
        """Which queries and keys of the image and of the text are listened to."""
        make = _make(layer)
        if make == "single":
            return ("query", "key")
        if self._direction == "image":
            return ("query", "text key")
        return ("text query", "key", "text key")

    def _settle(self, name: str) -> None:
        """Turns what was heard of a layer into its record."""
        layer, heard = self._layers[name], self._heard.pop(name)
        if any(what not in heard for what in self._wanted(layer)):
            raise ModelError(
                f"{name}: got attention by {type(layer.processor).__name__}, which does not use the layer's own "
                "projections and norms, expected the stock processor; take custom processors and fusing away"
            )
        # mixed precision would make the products of halves again
        with torch.autocast(self._own.device.type, enabled=False):
            parts = {what: _by_head(layer, _source(layer, what)[1], heard[what]) for what in self._wanted(layer)}
            tokens = self._own.shape[1]
            if _make(layer) == "single":  # one sequence, the text first
                parts = {
                    "text query": parts["query"][:, :, :tokens],
                    "query": parts["query"][:, :, tokens:],
                    "text key": parts["key"][:, :, :tokens],
                    "key": parts["key"][:, :, tokens:],
                }
            if heard["rotary"] is not None:
                cosines, sines = heard["rotary"]
                for what, part in parts.items():
                    rows = slice(tokens) if what.startswith("text") else slice(tokens, None)
                    parts[what] = apply_rotary_emb(part, (cosines[rows], sines[rows]))
            scale = layer.scale if isinstance(layer, Attention) else layer.head_dim**-0.5
            # the text is shorter than the image
            text = "text query" if self._direction == "text" else "text key"
            parts[text] = parts[text] * scale
            if self._direction == "text":
                self._records[name] = self._of_text(parts)
            else:
                self._records[name] = self._of_image(parts, heard.get("sums"))

    def _of_image(self, parts: Mapping[str, Tensor], sums: Float[Tensor, "n heads queries"] | None) -> LayerRecord:
        query, key = parts["query"], parts["text key"]
        maps = None
        if self._maps:
            maps = self._seen(query @ key.transpose(-1, -2))[:, self._heads].softmax(-1).mean(1)
        own = self._own
        alone = self._over == "own" or sums is not None
        if alone:  # tokens that are no row's own are in no sum
            kept = own.any(0)
            kept[0] |= ~kept.any()
            key, own = key[:, :, kept], own[:, kept]
        others = ~own[:, None, :, None]
        away = None if alone or self._mask is None else ~self._mask[:, None, :, None]

        def pool(key: Tensor, query: Tensor) -> Tensor:
            # (n, heads, tokens, queries), so that sums over tokens run along whole rows of memory
            logits = key @ query.transpose(-1, -2)
            if alone and not logits.requires_grad:
                return logits.masked_fill_(others, float("-inf")).logsumexp(2).sum(-1)[None]
            sums = [logits.masked_fill(others, float("-inf")).logsumexp(2)]
            if not alone:
                sums.append((logits if away is None else logits.masked_fill(away, float("-inf"))).logsumexp(2))
            return torch.stack([values.sum(-1) for values in sums])

        found = self._in_slices(pool, 1 if alone else 2, key, query) / query.shape[2]
        if sums is not None:
            found = torch.cat([found, sums.mean(-1)[None]])
        return self._record(found, maps)

    def _of_text(self, parts: Mapping[str, Tensor]) -> LayerRecord:
        query, positions = parts["text query"], parts["key"].shape[2]
        keys = parts["key"] if self._over == "own" else torch.cat([parts["key"], parts["text key"]], 2)
        # the share of each token in the mean over the caption's own; an empty caption has none
        share = (self._own / self._own.sum(1, keepdim=True).clamp(min=1))[:, None]

        def pool(keys: Tensor, query: Tensor, share: Tensor) -> Tensor:
            logits = query @ keys.transpose(-1, -2)
            seen = [logits[..., :positions].logsumexp(-1)]
            if self._over == "all":
                seen.append(self._seen(logits).logsumexp(-1))
            return torch.stack([(values * share).sum(-1) for values in seen])

        maps = None
        if self._maps:
            maps = (query @ parts["key"].transpose(-1, -2))[:, self._heads].softmax(-1).mean(1).transpose(1, 2)
        return self._record(self._in_slices(pool, 1 if self._over == "own" else 2, keys, query, share), maps)

    def _record(self, sums: Tensor, maps: Tensor | None) -> LayerRecord:
        """(1 or 2, n, heads) => a record."""
        return LayerRecord(sums[0], sums[1] if self._over == "all" else None, maps)

    def _seen(self, logits: Float[Tensor, "n heads queries keys"]) -> Float[Tensor, "n heads queries keys"]:
        """Logits without those of text keys, the last ones, that are not attended to."""
        if self._mask is None:
            return logits
        away = torch.nn.functional.pad(~self._mask, (logits.shape[-1] - self._mask.shape[1], 0))
        return logits.masked_fill(away[:, None, None], float("-inf"))

    def _in_slices(self, pool: Callable[..., Tensor], count: int, key: Tensor, query: Tensor, *along: Tensor) -> Tensor:
        """The sum of ``pool(key, query, *along)``, ``count`` numbers a head, over slices of the queries, and of what
        goes along with them."""
        n, heads, length = query.shape[:3]
        size = max(1, self.SLICE // max(1, n * heads * key.shape[2]))
        if length <= size:
            return pool(key, query, *along)
        total = query.new_zeros(count, n, heads)
        for part in zip(*(x.split(size, 2) for x in (query, *along)), strict=True):
            if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
                total = total + checkpoint(pool, key, *part, use_reentrant=False)
            else:
                total = total + pool(key, *part)
        return total


def _source(layer: Any, what: str) -> tuple[nn.Module, int]:
    """The module whose output becomes these queries or keys, and which of the fused parts of that output they are."""
    text, letter = what.startswith("text"), what.removeprefix("text ")[0]
    make = _make(layer)
    if make == "cross":  # its keys are the text's, and go by the layer's own names
        text = False
    norm = getattr(layer, f"norm_added_{letter}" if text else f"norm_{letter}", None)
    if norm is not None:
        return norm, 0
    if not layer.fused_projections:
        return getattr(layer, f"add_{letter}_proj" if text else f"to_{letter}"), 0
    if make == "cross":
        return (layer.to_q if letter == "q" else layer.to_kv), 0
    return (layer.to_added_qkv if text else layer.to_qkv), ("q", "k").index(letter)


def _by_head(layer: Any, part: int, out: Tensor) -> Float[Tensor, "n heads length d"]:
    """What a projection, or a norm behind it, gives => float32 by head."""
    if out.ndim == 3:  # (n, length, parts * heads * d)
        out = out.narrow(-1, part * layer.inner_dim, layer.inner_dim).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    elif isinstance(layer, FluxAttention):  # (n, length, heads, d)
        out = out.transpose(1, 2)
    return out.float()
