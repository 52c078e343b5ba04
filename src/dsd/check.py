"""Whether a model that was loaded does what scores rely on: what it is made of, and tests of it on itself.

The oracle for attention is the model's own: the queries and keys that it hands to fused attention are taken as they
are, and all logits are made from them in double precision. The probe, which works from projections, has to agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dsd.backbone import Backbone, TextStates, cards
from dsd.contracts import ModelError, TextError
from dsd.fused import attend
from dsd.probe import LayerRecord, Probe, cross_attention_layers
from dsd.scores import over_all

_CAPTIONS = ("a red circle above a blue square", "a dog", "two cats on a sofa")
_CLASSES = ("0", "1", "2")
"""Captions of models that know classes alone."""


@dataclass(frozen=True)
class AttentionLayer:
    """A layer in which the image attends to the text: its heads, and the positions and tokens of one pass."""

    name: str
    heads: int
    positions: int
    tokens: int


@dataclass(frozen=True)
class Finding:
    """One test.

    Attributes:
        name: What was tested.
        value: What was measured; smaller is better. None if there was nothing to measure.
        limit: The most it may be. None if it decides nothing.
        note: What the value is, or why there is none.
    """

    name: str
    value: float | None
    limit: float | None
    note: str

    @property
    def passed(self) -> bool:
        """Whether it is not off; what is not finite is."""
        return self.value is None or self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class ModelCheck:
    """What was found of a model.

    Attributes:
        model: Where it was loaded from.
        family: The name of its class.
        denoiser: The name of its denoiser's class.
        prediction_type: What the denoiser predicts.
        image_size: Pixels a side it was trained on.
        latent_shape: (channels, height, width) at the size of the test.
        timesteps: What scores look at by default.
        dtype, device: Of the denoiser.
        parameters: Of each network.
        bytes: Of each network's weights in memory.
        layers: Where the image attends to the text.
        findings: The tests.
    """

    model: str
    family: str
    denoiser: str
    prediction_type: str
    image_size: int
    latent_shape: tuple[int, int, int]
    timesteps: tuple[int, ...]
    dtype: str
    device: str
    parameters: Mapping[str, int]
    bytes: Mapping[str, int]
    layers: tuple[AttentionLayer, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is off."""
        return all(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite as None."""
        values = asdict(self)
        for made, finding in zip(values["findings"], self.findings, strict=True):
            made["passed"] = finding.passed
            if made["value"] is not None and not np.isfinite(made["value"]):
                made["value"] = None
        return {**values, "passed": self.passed}


@torch.no_grad()
def check_model(backbone: Backbone, *, size: int | None = None) -> ModelCheck:
    """Looks a model through and tests it on a picture and three captions, in five passes.

    Args:
        backbone: A bare model.
        size: Pixels a side. Default: the model's own.

    Raises:
        OptionError: If the model cannot take pictures of this size.
    """
    size = backbone.image_size if size is None else size
    shape = backbone.latent_shape(size)
    latents = backbone.encode_images([_picture(size)]).expand(3, -1, -1, -1)
    text = _captions(backbone)
    device = backbone.device
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((3, *shape), generator=generator).to(device)
    timesteps = torch.full((3,), backbone.timesteps[len(backbone.timesteps) // 2], device=device)
    noised = backbone.add_noise(latents.to(device), noise, timesteps)

    def run(rows: Sequence[int]) -> Tensor:
        return backbone.predict_noise(noised[list(rows)], timesteps[list(rows)], text.select(rows))

    exact = backbone.dtype == torch.float32
    predicted, layers, attention = _attention(backbone, run, text, 1e-4 if exact else 0.1)
    alone = torch.cat([run([row]) for row in range(3)])
    again = run(range(3))
    findings = (
        _finite(latents, predicted),
        Finding("same again", _apart(predicted, again), 1e-6 if exact else 1e-2, "a pass repeated"),
        Finding(
            "batch independence",
            _apart(predicted, alone),
            1e-5 if exact else 3e-2,
            "rows at once, and one by one",
        ),
        attention,
        _as_its_card_says(backbone),
        Finding(
            "noise unexplained",
            _unexplained(predicted, noise, noised),
            None,
            "of the best guess without a model; over 1: random weights, or it predicts another thing than it says",
        ),
    )
    networks = _networks(backbone)
    return ModelCheck(
        model=backbone.name,
        family=type(backbone).__name__.removesuffix("Backbone"),
        denoiser=type(backbone.denoiser).__name__,
        prediction_type=_prediction_type(backbone),
        image_size=backbone.image_size,
        latent_shape=shape,
        timesteps=backbone.timesteps,
        dtype=str(backbone.dtype).removeprefix("torch."),
        device=str(device),
        parameters={n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()},
        bytes={n: sum(p.numel() * p.element_size() for p in m.parameters()) for n, m in networks.items()},
        layers=layers,
        findings=findings,
    )


def _attention(
    backbone: Backbone, run: Any, text: TextStates, limit: float
) -> tuple[Tensor, tuple[AttentionLayer, ...], Finding]:
    """One pass under the probe: its prediction, the layers, and how far the probe is from the full logits."""
    name = "attention score"
    try:
        known = cross_attention_layers(backbone.denoiser)
    except ModelError:
        return run(range(3)), (), Finding(name, None, limit, "the model attends to no text; use the denoising score")
    mask = torch.ones_like(text.own) if text.mask is None else text.mask
    with Probe(backbone.denoiser, list(known), text.own, text.mask) as probe, _heard(known) as heard:
        predicted = run(range(3))
    layers, worst = [], 0.0
    for layer, record in probe.records.items():
        if len(heard[layer]) != 1:
            return predicted, (), Finding(name, float("inf"), limit, f"{layer} calls fused attention not once")
        query, key, scale = heard[layer][0]
        query, key = _block(known[layer], query, key, text.states.shape[1])
        layers.append(AttentionLayer(layer, query.shape[1], query.shape[2], key.shape[2]))
        worst = max(worst, _distance(record, query, key, scale, text.own, mask))
    note = f"the probe against the full logits, {len(layers)} layers"
    return predicted, tuple(layers), Finding(name, worst, limit, note)


def _distance(record: LayerRecord, query: Tensor, key: Tensor, scale: float, own: Tensor, mask: Tensor) -> float:
    """The largest difference between a record and what the full logits say."""
    if query.device.type == "mps":  # which has no double precision
        query, key, own, mask = query.cpu(), key.cpu(), own.cpu(), mask.cpu()
    worst = 0.0
    for head in range(query.shape[1]):  # all heads at once would be too much of a large model
        logits = query[:, head].double() @ key[:, head].double().transpose(-1, -2) * scale
        for tokens, found in ((own, record.own), (mask, over_all(record))):
            expected = logits.masked_fill(~tokens[:, None], float("-inf")).logsumexp(-1).mean(-1)
            difference = (expected - found[:, head].to(expected)).abs().max()
            worst = max(worst, float(difference) if difference.isfinite() else float("inf"))
    return worst


def _block(layer: nn.Module, query: Tensor, key: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Image queries and text keys of what a layer attends with, (n, heads, length, d)."""
    if key.shape[2] == tokens and query.shape[2] != key.shape[2]:
        return query, key
    if "Flux" in type(layer).__name__:  # one sequence, the text first
        return query[:, :, tokens:], key[:, :, :tokens]
    if query.shape[2] == key.shape[2] > tokens:  # one sequence, the image first
        return query[:, :, :-tokens], key[:, :, -tokens:]
    return query, key


@contextmanager
def _heard(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor, float]]]]:
    """The queries, keys and scales that each layer hands to fused attention, during this context."""
    heard: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in layers}
    within: list[str] = []

    class Listen(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = kwargs or {}
            if within and func in (scaled_dot_product_attention, attend):
                query, key = (args[i] if len(args) > i else named[n] for i, n in enumerate(("query", "key")))
                scale = named.get("scale")
                heard[within[-1]].append((query, key, query.shape[-1] ** -0.5 if scale is None else float(scale)))
            return func(*args, **named)

    with ExitStack() as stack:
        for name, layer in layers.items():
            begin = layer.register_forward_pre_hook(lambda *_, name=name: within.append(name))
            end = layer.register_forward_hook(lambda *_: within.pop() and None, always_call=True)
            stack.callback(begin.remove)
            stack.callback(end.remove)
        stack.enter_context(Listen())
        yield heard


def _finite(latents: Tensor, predicted: Tensor) -> Finding:
    parts = {"the latents": latents, "the noise": predicted}
    wrong = [name for name, x in parts.items() if not x.isfinite().all()]
    note = f"not finite: {', '.join(wrong)}; try --dtype bfloat16 or float32" if wrong else "latents and noise"
    return Finding("finite", float(len(wrong)), 0.0, note)


def _as_its_card_says(backbone: Backbone) -> Finding:
    card = cards().get(backbone.name)
    if card is None:
        return Finding("as its card says", None, 0.0, "there is none")
    networks = {n: sum(p.numel() for p in m.parameters()) for n, m in _networks(backbone).items()}
    quantized = any(getattr(m, "is_quantized", False) for m in _networks(backbone).values())
    said = {
        "resolution": (backbone.image_size, card.resolution),
        "prediction type": (_prediction_type(backbone), card.prediction_type),
        **({} if quantized else {"parameters": (sum(networks.values()), sum(card.parameters.values()))}),
    }
    wrong = [
        f"{name} {found:,} not {expected:,}" if isinstance(found, int) else f"{name} {found} not {expected}"
        for name, (found, expected) in said.items()
        if found != expected
    ]
    return Finding("as its card says", float(len(wrong)), 0.0, ", ".join(wrong) or ", ".join(said))


def _networks(backbone: Backbone) -> dict[str, nn.Module]:
    """The backbone's networks by attribute."""
    return {name: part for name, part in vars(backbone).items() if isinstance(part, nn.Module)}


def _prediction_type(backbone: Backbone) -> str:
    return str(backbone.computation().get("prediction_type", "unknown"))


def _captions(backbone: Backbone) -> TextStates:
    try:
        return TextStates.join(backbone.encode_texts(_CAPTIONS))
    except TextError:
        return TextStates.join(backbone.encode_texts(_CLASSES))


def _picture(size: int) -> Image.Image:
    """A smooth picture with edges: a disc on a gradient."""
    y, x = np.mgrid[0:size, 0:size] / max(1, size - 1)
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.06
    pixels = np.stack([np.where(disc, 0.9, x), np.where(disc, 0.1, 0.6 * y + 0.2), np.where(disc, 0.1, 1 - x)], -1)
    return Image.fromarray((255 * pixels).astype(np.uint8))


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest value; infinite where a value is not finite."""
    share = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    return share if np.isfinite(share) else float("inf")


def _unexplained(predicted: Tensor, noise: Tensor, noised: Tensor) -> float:
    """Squared error of predicted noise, over that of the multiple of the noised latents that is nearest to it."""
    seen, true, blind = (x.double().cpu().flatten() for x in (predicted, noise, noised))
    guess = (blind @ true) / (blind @ blind) * blind
    return float((seen - true).square().sum() / (guess - true).square().sum().clamp(min=1e-12))
