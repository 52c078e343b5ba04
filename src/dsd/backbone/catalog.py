"""What is known of each model that has a short name, before anything of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import yaml

from dsd.contracts import ModelError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
TINY = "tiny"
"""The model that is part of this package."""
_TIMESTEPS = (189, 389, 589, 789)


@dataclass(frozen=True)
class Card:
    """A model with a short name.

    Attributes:
        name: The short name.
        pipeline: Its diffusers pipeline class, which decides the family.
        licence: As the hub names it.
        resolution: Pixels a side that it was trained on.
        prediction_type: What its denoiser predicts.
        parameters: Of each network, counted on the published configuration.
        hub: Its name on the hub; None for the model that is part of this package.
        revision: The commit that is loaded unless another is asked for; None for the latest.
        gated: Whether the hub asks for an account and agreement to the licence.
        layers: Patterns of the attention layers that scores look at by default; None for all.
        timesteps: What scores look at by default; None for the family's own.

    Raises:
        ModelError: If a value cannot be right.
    """

    name: str
    pipeline: str
    licence: str
    resolution: int
    prediction_type: PredictionType
    parameters: Mapping[str, int]
    hub: str | None = None
    revision: str | None = None
    gated: bool = False
    layers: tuple[str, ...] | None = None
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        counts = self.parameters if isinstance(self.parameters, Mapping) else {}
        wrong = {
            "pipeline": not self.pipeline.endswith("Pipeline"),
            "licence": not self.licence,
            "resolution": not (isinstance(self.resolution, int) and 8 <= self.resolution <= 8192),
            "prediction_type": self.prediction_type not in get_args(PredictionType),
            "parameters": not counts or not all(isinstance(n, int) and n > 0 for n in counts.values()),
            "hub": (self.hub is None) != (self.name == TINY) or (self.hub is not None and self.hub.count("/") != 1),
            "revision": self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision),
            "gated": not isinstance(self.gated, bool),
            "layers": self.layers is not None and not self.layers,
            "timesteps": self.timesteps is not None
            and not (self.timesteps and all(isinstance(t, int) and 0 <= t < 1000 for t in self.timesteps)),
        }
        for field, is_wrong in wrong.items():
            if is_wrong:
                raise ModelError(
                    f"card {self.name!r}: got {field} {getattr(self, field)!r}, expected what the class documents; "
                    "correct cards.yaml"
                )

    @property
    def bytes_in_bf16(self) -> int:
        """Memory that the weights of all networks take in bfloat16: two bytes a parameter, and no activations."""
        return 2 * sum(self.parameters.values())

    @classmethod
    def from_dict(cls, name: str, values: Mapping[str, Any]) -> Card:
        """From plain values, as they come from YAML.

        Raises:
            ModelError: If there are unknown or missing ones, or one that cannot be right.
        """
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(name, **known)
        except (TypeError, AttributeError) as error:
            raise ModelError(
                f"card {name!r}: got {sorted(values)} ({error}), expected the fields of a card; correct cards.yaml"
            ) from None


@cache
def cards() -> Mapping[str, Card]:
    """The models that have short names, by these (``cards.yaml``)."""
    text = files("dsd.backbone").joinpath("cards.yaml").read_text("utf-8")
    return {name: Card.from_dict(name, values) for name, values in yaml.safe_load(text).items()}


def default_timesteps(model: str) -> tuple[int, ...]:
    """The timesteps that scores of a model with a short name look at unless told otherwise; see also ``Backbone``."""
    card = cards().get(model)
    return card.timesteps if card is not None and card.timesteps is not None else _TIMESTEPS
