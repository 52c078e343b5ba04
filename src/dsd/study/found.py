"""What a study found: outcomes of methods on held-out examples. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd.study.grid import StudyConfig

START = "denoising, 5 passes, as lessons start"
"""Zero-shot denoising under the noise that what is learned is measured under."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        method: Its name.
        task, level: Of the held-out examples.
        shots, seed: Of what it learned from; zero shots for none.
        outcomes: (examples,) of winoground whether the whole group is right, of others the share of choices won.
        passes: Of the denoiser, a pair.
        seconds: Of learning, on one core; None where nothing is learned, or where it went on after a stop.
        kept: Whether what was learned was kept over the score that it started from.
        calibration: Expected calibration error on held-out examples, where it was measured.
    """

    method: str
    task: str
    level: str
    shots: int
    seed: int
    outcomes: tuple[float, ...]
    passes: int
    seconds: float | None = None
    kept: bool | None = None
    calibration: float | None = None


@dataclass(frozen=True)
class Place:
    """A task at a level.

    Attributes:
        tags: Of each held-out example.
        chance: What a blind guess wins.
        zero: Cells of methods that learned nothing.
        ablations: By what is varied: of each of its values the outcomes.
    """

    task: str
    level: str
    tags: tuple[tuple[str, ...], ...]
    chance: float
    zero: tuple[Cell, ...]
    ablations: Mapping[str, Mapping[str, tuple[float, ...]]]


@dataclass(frozen=True)
class Failures:
    """Where a method fails on a task, with maps of what it saw.

    Attributes:
        method: Its name.
        task, level: Of the held-out examples.
        shots: Of what it learned from; zero for none.
        groups: Of :func:`dsd.pages.failure_groups`.
    """

    method: str
    task: str
    level: str
    shots: int
    groups: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Study:
    """What was measured.

    Attributes:
        config: The grid; lessons that the folder has besides make it larger than what was asked for.
        places: Every task at every level.
        cells: Of few-shot methods.
        seconds: Of processor time, for all measurements.
        missing: What of the grid that was asked for is not there, in words.
        failures: Of methods on tasks the worst and the closest examples.
        asked: The grid that was asked for; None for the same.
    """

    config: StudyConfig
    places: tuple[Place, ...]
    cells: tuple[Cell, ...]
    seconds: float
    missing: tuple[str, ...] = ()
    failures: tuple[Failures, ...] = ()
    asked: StudyConfig | None = None
