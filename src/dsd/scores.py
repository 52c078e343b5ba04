"""Turns what one noised pass did into one number a pair: higher is a better match.

Every score is differentiable, is computed for each row of a batch by itself, and is reduced in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsd.backbone import Backbone, Latents, TextStates
from dsd.contracts import OptionError
from dsd.probe import (
    Direction,
    LayerRecord,
    Over,
    Probe,
    check_direction,
    cross_attention_layers,
    paper_layers,
    select_layers,
    text_once,
)
from dsd.prompts import prompted


@dataclass(frozen=True)
class Pass:
    """One denoiser pass over n rows.

    Attributes:
        noise: (n, c, h, w) what was added to the latents.
        predicted: (n, c, h, w) what the denoiser took for it; None if the pass ended once attention was recorded.
        records: What the probed cross-attention layers did; empty where no score asked.
    """

    noise: Latents
    predicted: Latents | None
    records: Mapping[str, LayerRecord]

    def rows(self, index: Sequence[int]) -> Pass:
        """The rows at ``index``, in that order, repeats allowed."""
        rows = torch.as_tensor(index, device=self.noise.device)
        records = {
            name: LayerRecord(r.own[rows], None if r.all is None else r.all[rows], None)
            for name, r in self.records.items()
        }
        return Pass(self.noise[rows], None if self.predicted is None else self.predicted[rows], records)

    def only(self, layers: Sequence[str]) -> Pass:
        """The passes with the records of some layers."""
        return Pass(self.noise, self.predicted, {n: self.records[n] for n in layers if n in self.records})

    def nothing(self) -> Pass:
        """Passes of these rows that add nothing to any score: without error, without attention."""
        records = {
            name: LayerRecord(torch.zeros_like(r.own), None if r.all is None else torch.zeros_like(r.all), None)
            for name, r in self.records.items()
        }
        return Pass(self.noise, self.noise, records)

    @staticmethod
    def join(parts: Sequence[Pass]) -> Pass:
        """One pass over the rows of many."""

        def of(name: str) -> LayerRecord:
            records = [p.records[name] for p in parts]
            every = [r.all for r in records if r.all is not None]
            return LayerRecord(torch.cat([r.own for r in records]), torch.cat(every) if every else None, None)

        predicted = [p.predicted for p in parts if p.predicted is not None]
        return Pass(
            torch.cat([p.noise for p in parts]),
            torch.cat(predicted) if predicted else None,
            {name: of(name) for name in parts[0].records},
        )


def noised_pass(
    backbone: Backbone,
    latents: Latents,
    noise: Latents,
    timesteps: Int[Tensor, " n"],
    text: TextStates,
    layers: Sequence[str] = (),
    direction: Direction = "image",
    *,
    captions: Sequence[int] | None = None,
    over: Over = "all",
    predict: bool = True,
) -> Pass:
    """Noises the latents, lets the denoiser predict the noise given the captions, and probes ``layers``.

    Args:
        backbone: The model.
        latents, noise: (n, c, h, w).
        timesteps: (n,) integers.
        text: The rows' captions; or, with ``captions``, those that the rows are numbers of, each of which is then
            projected once, however many rows are under it.
        layers: To probe.
        direction, over: As for :class:`dsd.probe.Probe`.
        captions: (n,) of each row the number of its caption in ``text``.
        predict: False lets a pass end once ``layers`` were heard, unless it is under gradient checkpointing:
            ``predicted`` is None then.
    """
    noised = backbone.add_noise(latents, noise, timesteps)
    with ExitStack() as stack:
        if captions is not None:
            text = text.select(captions)
            stack.enter_context(text_once(backbone.denoiser, captions))
        text = prompted(backbone.denoiser, text)
        if not layers:
            return Pass(noise, backbone.predict_noise(noised, timesteps, text), {})
        predicted = None
        with Probe(
            backbone.denoiser, layers, text.own, text.mask, direction=direction, over=over, stop=not predict
        ) as probe:
            predicted = backbone.predict_noise(noised, timesteps, text)
        return Pass(noise, predicted, dict(probe.records))


def _mean_over_layers(records: Mapping[str, LayerRecord], what: Callable[[LayerRecord], Tensor]) -> Float[Tensor, " n"]:
    return torch.stack([what(record).mean(1) for record in records.values()]).mean(0)


def attention(caption: Pass, empty: Pass | None = None) -> Float[Tensor, " n"]:
    """Mean over layers, heads and positions of the log-sum-exp over the caption's own tokens.

    With direction ``text``: over layers, heads and own tokens of the log-sum-exp over positions.

    He et al. 2023, without its pooling of start, end and padding tokens, which lets caption length
    leak into the score.
    """
    return _mean_over_layers(caption.records, lambda r: r.own)


def attention_mass(caption: Pass, empty: Pass | None = None) -> Float[Tensor, " n"]:
    """Log share of the attention that falls on the caption's own tokens, averaged as in :func:`attention`; <= 0.

    In joint attention: of that which falls on text. With direction ``text``: log share of the attention of the
    caption's own tokens that falls on the image.
    """
    return _mean_over_layers(caption.records, lambda r: r.own - over_all(r))


def over_all(record: LayerRecord) -> Float[Tensor, "n heads"]:
    """The log-sum-exp over all tokens, where it was asked for."""
    assert record.all is not None
    return record.all


def _error(made: Pass) -> Float[Tensor, " n"]:
    assert made.predicted is not None
    length: Tensor = torch.linalg.vector_norm((made.noise - made.predicted).float().flatten(1), dim=1)
    return length


def denoising(caption: Pass, empty: Pass | None) -> Float[Tensor, " n"]:
    """How much the caption helps to predict the noise: ``|e - eps(z, t, "")| - |e - eps(z, t, c)|``, L2 norms.

    Li et al. 2023 (Diffusion Classifier) and Krojer et al. 2023 (DiffusionITM).
    """
    assert empty is not None
    return _error(empty) - _error(caption)


def paper_attention(caption: Pass, empty: Pass | None) -> Float[Tensor, " n"]:
    """The attention score as the code of He et al. 2023 computes it: both halves of [empty, caption], all tokens."""
    assert empty is not None
    return (_mean_over_layers(empty.records, over_all) + _mean_over_layers(caption.records, over_all)) / 2


def paper(caption: Pass, empty: Pass | None) -> Float[Tensor, " n"]:
    """The whole score of He et al. 2023 as their code computes it: :func:`paper_attention` + :func:`denoising`."""
    return paper_attention(caption, empty) + denoising(caption, empty)


@dataclass(frozen=True)
class ScoreKind:
    """A score and what it must be given."""

    function: Callable[[Pass, Pass | None], Tensor]
    attention: bool
    """Whether cross-attention is probed."""
    empty: bool
    """Whether it compares with a pass under the empty caption."""
    layers: Callable[[torch.nn.Module], tuple[str, ...]] = select_layers
    """The layers it looks at by default."""
    over: Over = "all"
    """Which log-sum-exps it looks at."""
    noise: bool = False
    """Whether it looks at the predicted noise; a pass for another ends after the last layer it looks at."""


SCORES: dict[str, ScoreKind] = {
    "attention": ScoreKind(attention, attention=True, empty=False, over="own"),
    "attention-mass": ScoreKind(attention_mass, attention=True, empty=False),
    "denoising": ScoreKind(denoising, attention=False, empty=True, noise=True),
    "paper": ScoreKind(paper, attention=True, empty=True, layers=paper_layers, noise=True),
    "paper-attention": ScoreKind(paper_attention, attention=True, empty=True, layers=paper_layers),
}
"""All scores by name. ``mixture`` is a weighted sum of some of them, ``weighted`` one of :class:`Features`."""

MIXTURE = "mixture"
WEIGHTED = "weighted"


@dataclass(frozen=True)
class ScoreConfig:
    """What to compute for a pair.

    Attributes:
        kind: A name of :data:`SCORES`, ``mixture``, or ``weighted``, whose weights are learned (:mod:`dsd.adapt`).
        timesteps: Integers on the model's training grid; the score is the mean over them.
        layers: Patterns of cross-attention layers (see :func:`dsd.probe.select_layers`); None: the kind's own.
        weights: For ``mixture``: the weight of each score in the sum.
        seed: Decides the noise, which is the same for all candidates.
        direction: Whose queries attention is scored by: ``image`` positions, or the ``text``, which asks in joint
            attention alone (SD 3, FLUX); see :class:`dsd.probe.LayerRecord`.
        bare: A score of the model without its prompts that is added, in passes of its own; None: nothing is.
        bare_weight: What it is multiplied by.
    """

    kind: str = "denoising"
    timesteps: tuple[int, ...] = (189, 389, 589, 789)
    layers: tuple[str, ...] | None = None
    weights: Mapping[str, float] | None = None
    seed: int = 0
    direction: Direction = "image"
    bare: ScoreConfig | None = None
    bare_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.bare is not None and (self.bare.bare is not None or self.bare.kind == WEIGHTED):
            raise OptionError(f"got {self.bare.kind!r} to add as it is without prompts, expected a zero-shot score")
        if self.direction not in get_args(Direction):
            raise OptionError(f"got direction {self.direction!r}, expected one of {', '.join(get_args(Direction))}")
        if self.kind not in (*SCORES, MIXTURE, WEIGHTED):
            raise OptionError(f"got score {self.kind!r}, expected one of {', '.join((*SCORES, MIXTURE, WEIGHTED))}")
        if (self.kind == MIXTURE) != bool(self.weights):
            raise OptionError(
                f"got score {self.kind!r} with weights {self.weights}, expected weights for mixture alone"
            )
        if any(name not in SCORES for name in self.weights or ()):
            raise OptionError(f"got weights for {list(self.weights or ())}, expected some of {', '.join(SCORES)}")
        if not self.timesteps:
            raise OptionError("got no timesteps, expected at least one")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"got seed {self.seed}, expected 0 or more, and less than 2 to the power of 63")

    @property
    def terms(self) -> dict[str, float]:
        """The scores that it is the sum of, and their weights."""
        return dict(self.weights or {self.kind: 1.0})

    @property
    def passes(self) -> int:
        """Of the denoiser a pair, less those under the empty caption, which all captions of an image share."""
        return len(self.timesteps) + (0 if self.bare is None else self.bare.passes)

    @property
    def empty_passes(self) -> int:
        """Those under the empty caption, an image."""
        own = self.kind == WEIGHTED or any(SCORES[kind].empty for kind in self.terms)
        return own * len(self.timesteps) + (0 if self.bare is None else self.bare.empty_passes)

    def to_dict(self) -> dict[str, Any]:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}
        if self.direction == "image":  # what it was before there was a choice, and is in files of that time
            del values["direction"]
        if self.bare is None:
            del values["bare_weight"]
        else:
            values["bare"] = self.bare.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreConfig:
        known = dict(values)
        if known.get("bare") is not None:
            known["bare"] = cls.from_dict(known["bare"])
        for name in ("timesteps", "layers"):
            if known.get(name) is not None:
                known[name] = tuple(known[name])
        return cls(**known)


def even_timesteps(steps: int, low: int = 0, high: int = 1000) -> tuple[int, ...]:
    """``steps`` timesteps at the middles of equal parts of [low, high)."""
    if not 1 <= steps <= high - low:
        raise OptionError(f"got {steps} steps, expected 1 to {high - low}")
    return tuple(int(low + (i + 0.5) * (high - low) / steps) for i in range(steps))


class Measured(Protocol):
    """Numbers that are taken of passes; ``names`` of them a pass."""

    names: tuple[str, ...]
    layers: tuple[str, ...]
    """Layers to probe in a pass."""
    empty_layers: tuple[str, ...]
    """Layers to probe under the empty caption."""
    needs_empty: bool
    direction: Direction
    """Whose queries attention is measured by."""
    over: Over
    """Which log-sum-exps are looked at."""
    sees_noise: bool
    """Whether the predicted noise is looked at."""

    def __call__(self, caption: Pass, empty: Pass | None) -> Float[Tensor, "n features"]:
        """Passes over n rows => their numbers, in the order of ``names``."""
        ...


class Features:
    """What a ``weighted`` score weighs, resolved over one backbone.

    Of each probed layer and head ``own`` (the log-sum-exp over the caption's own tokens) and ``mass`` (the same less
    that over all tokens), and the denoising score.

    Args:
        backbone: The model.
        layers: Patterns of cross-attention layers; None takes all.
        direction: As in :class:`ScoreConfig`.

    Raises:
        OptionError, ModelError: If a layer is unknown, or there is no cross-attention.
    """

    needs_empty = True
    empty_layers: tuple[str, ...] = ()
    over: Over = "all"
    sees_noise = True

    def __init__(self, backbone: Backbone, layers: Sequence[str] | None = None, direction: Direction = "image") -> None:
        self.layers = select_layers(backbone.denoiser, layers)
        self.direction = direction
        check_direction(backbone.denoiser, self.layers, direction)
        known = cross_attention_layers(backbone.denoiser)
        self._heads = [int(known[name].heads) for name in self.layers]
        heads = [f"{name}.{h}" for name, count in zip(self.layers, self._heads, strict=True) for h in range(count)]
        self.names = (*(f"own {head}" for head in heads), *(f"mass {head}" for head in heads), "denoising")

    def __call__(self, caption: Pass, empty: Pass | None) -> Float[Tensor, "n features"]:
        """Passes over n rows => their features, in the order of ``names``."""
        records = [caption.records[name] for name in self.layers]
        own, all_ = torch.cat([r.own for r in records], 1), torch.cat([over_all(r) for r in records], 1)
        return torch.cat([own, own - all_, denoising(caption, empty)[:, None]], 1)

    def by_layer(self, values: Float[Tensor, "n features"]) -> dict[str, Float[Tensor, " n"]]:
        """Sums of weighted features over the heads of each layer, and ``denoising``."""
        heads = sum(self._heads)
        own, mass, rest = values.split([heads, heads, 1], 1)
        of = (own + mass).split(self._heads, 1)
        return {**{name: part.sum(1) for name, part in zip(self.layers, of, strict=True)}, "denoising": rest[:, 0]}

    def weights_of(self, terms: Mapping[str, float]) -> Float[Tensor, " features"]:
        """The weights that make a sum of scores, over the same layers.

        Args:
            terms: Of each kind of score its weight.

        Raises:
            OptionError: If a kind is no sum of these features.
        """
        # every layer counts the same, whatever its number of heads
        mean = torch.cat([torch.full((count,), 1 / (len(self._heads) * count)) for count in self._heads])
        heads = len(mean)
        places = {"attention": slice(heads), "attention-mass": slice(heads, -1), "denoising": slice(-1, None)}
        found = torch.zeros(len(self.names))
        for kind, weight in terms.items():
            if kind not in places:
                raise OptionError(
                    f"got score {kind!r}, expected attention, attention-mass or denoising, which heads have a share in"
                )
            found[places[kind]] += weight * (torch.ones(1) if kind == "denoising" else mean)
        return found


class Score:
    """A resolved score over one backbone: what to probe, and the number that comes of it.

    Args:
        backbone: The model.
        config: The score.
        weights: For ``weighted`` alone: (timesteps, features) of :class:`Features`; may be learned.

    Raises:
        OptionError: If a layer or timestep does not fit the backbone, or the weights do not fit the score.
        ModelError: If the score needs cross-attention and the backbone has none.
    """

    def __init__(self, backbone: Backbone, config: ScoreConfig, weights: Tensor | None = None) -> None:
        outside = [t for t in config.timesteps if not 0 <= t < backbone.num_train_timesteps]
        if outside:
            raise OptionError(
                f"got timesteps {outside}, expected integers from 0 to {backbone.num_train_timesteps - 1}"
            )
        if (config.kind == WEIGHTED) != (weights is not None):
            raise OptionError(
                f"got score {config.kind!r} {'without' if weights is None else 'with'} learned weights, expected them "
                f"for {WEIGHTED} alone; load the adapter that they were learned for"
            )
        self.config = config
        self.direction = config.direction
        self.terms = config.terms
        self.weights: Tensor | None = None
        self.layers: tuple[str, ...]
        """All layers to probe in a pass."""
        self.empty_layers: tuple[str, ...]
        """Layers to probe under the empty caption."""
        self.over: Over
        """Which log-sum-exps to take."""
        self.sees_noise: bool
        """Whether it depends on how well the noise is predicted, and not on attention alone."""
        self._features: Features | None = None
        if weights is not None:
            self._features = Features(backbone, config.layers, config.direction)
            shape = (len(config.timesteps), len(self._features.names))
            if tuple(weights.shape) != shape:
                raise OptionError(
                    f"got weights of shape {tuple(weights.shape)}, expected {shape} (timesteps, features); use the "
                    "timesteps, layers and model that they were learned for"
                )
            self.weights = weights.to(backbone.device, torch.float32)
            self.layers, self.empty_layers, self.needs_empty = self._features.layers, Features.empty_layers, True
            self.over, self.sees_noise = Features.over, True
            return
        self.needs_empty = any(SCORES[kind].empty for kind in self.terms)
        self.over = "all" if any(SCORES[kind].over == "all" for kind in self.terms) else "own"
        self.sees_noise = any(SCORES[kind].noise for kind in self.terms)
        self._layers: dict[str, tuple[str, ...]] = {}
        for kind in self.terms:
            if SCORES[kind].attention:
                chosen = config.layers
                self._layers[kind] = (
                    SCORES[kind].layers(backbone.denoiser)
                    if chosen is None
                    else select_layers(backbone.denoiser, chosen)
                )
        self.layers = tuple(dict.fromkeys(name for names in self._layers.values() for name in names))
        self.empty_layers = self.layers if any(SCORES[k].empty for k in self._layers) else ()
        if self.layers:
            check_direction(backbone.denoiser, self.layers, config.direction)

    def parts(
        self, caption: Pass, empty: Pass | None, steps: Int[Tensor, " n"] | None = None
    ) -> dict[str, Float[Tensor, " n"]]:
        """Each term by itself, unweighted: (n,) a name."""
        if self._features is not None and self.weights is not None:
            assert steps is not None
            return {WEIGHTED: (self._features(caption, empty) * self.weights[steps]).sum(1)}
        return {kind: SCORES[kind].function(self._view(kind, caption), self._view(kind, empty)) for kind in self.terms}

    def __call__(
        self, caption: Pass, empty: Pass | None, steps: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n"]:
        """Passes over n rows under their captions, and under the empty one if needed => (n,) float32 scores.

        Args:
            steps: Of each row, which of the score's timesteps it is at; ``weighted`` needs to know.
        """
        parts = self.parts(caption, empty, steps)
        return torch.stack([self.terms[kind] * value for kind, value in parts.items()]).sum(0)

    def by_layer(
        self, caption: Pass, empty: Pass | None, steps: Int[Tensor, " n"] | None = None
    ) -> dict[str, Float[Tensor, " n"]]:
        """The score split by what it looks at: of each probed layer its share, and of ``denoising``; they sum to it.

        The attention scores are means over layers, so that a layer's share is its own mean over their number.
        """
        if self._features is not None and self.weights is not None:
            assert steps is not None
            return self._features.by_layer(self._features(caption, empty) * self.weights[steps])
        shares: dict[str, Tensor] = {}
        for kind, weight in self.terms.items():
            for part in ("paper-attention", "denoising") if kind == "paper" else (kind,):
                if part == "denoising":
                    shares[part] = shares.get(part, 0) + weight * denoising(caption, empty)
                    continue
                names = self._layers[kind]
                for name in names:
                    alone = [None if p is None else p.only([name]) for p in (caption, empty)]
                    assert alone[0] is not None
                    value = SCORES[part].function(alone[0], alone[1]) / len(names)
                    shares[name] = shares.get(name, 0) + weight * value
        return shares

    def _view(self, kind: str, made: Pass | None) -> Any:
        """The pass with only the layers that a term looks at."""
        if made is None or kind not in self._layers or not made.records:
            return made
        return made.only(self._layers[kind])
