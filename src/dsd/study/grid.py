"""The grid of a study: tasks, levels, methods with the lessons they teach, numbers of examples, draws of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from dsd.contracts import OptionError
from dsd.learn import FitConfig
from dsd.prompts import PromptConfig
from dsd.tasks import WORLD_TASKS

MODEL = "tiny"
NOVEL = "novel"
"""Choices as in ``comvg`` about the fill and the relation whose words pretraining never saw."""
TASKS = (*WORLD_TASKS, NOVEL)
MANY = 50
"""Passes a pair of the Diffusion Classifier; its evenly spaced timesteps are those of a sweep."""
FEW = (50, 150, 250, 350, 500)
"""Timesteps of attention that is taught: five passes a pair."""

Item = tuple[Any, ...]
"""A measurement: ``sweep``, ``blind`` or ``captions`` of a task at a level; ``lesson``, with method, shots and seed
besides; ``failures``, with method and shots; ``untaught``, with the kind of a zero-shot score, or ``captions``."""


@dataclass(frozen=True)
class Lesson:
    """A few-shot method of ours.

    Attributes:
        score: Where it starts from; ``denoising`` is joined by attention that is taught.
        config: How.
        timesteps: Of the score.
        prompt: Where prompts go.
        start: The adapter of the package that is learned on from, which then says where prompts go.
    """

    score: str
    config: FitConfig
    timesteps: tuple[int, ...] = FEW
    prompt: PromptConfig = field(default_factory=PromptConfig)
    start: str | None = None


_RUN = FitConfig(validation=0.25)
"""One run that is stopped by a quarter of the examples."""
CAPTIONS = "tiny-captions"
"""The adapter of the package that was learned from captioned pictures alone (:mod:`dsd.tiny.captioned`)."""
ONE = (100,)
"""Its timestep: further passes tell next to nothing more."""
_ON = replace(_RUN, learning_rate=2e-3)
"""A run that learns on: smaller steps, from where much is known."""

LESSONS: dict[str, Lesson] = {
    "dsd prompt and denoising": Lesson("denoising", _RUN, (150, 250, 350)),
    "dsd prompt": Lesson("attention", _RUN),
    "dsd tokens": Lesson("attention", replace(_RUN, method="tokens")),
    "dsd heads": Lesson("attention", replace(_RUN, method="heads")),
    "dsd weights": Lesson("denoising", replace(_RUN, method="weights", draws=2)),
    "dsd prompt + weights": Lesson("attention", replace(_RUN, method="prompt+weights", draws=2)),
    "dsd captions, prompt": Lesson("attention", _ON, ONE, start=CAPTIONS),
    "dsd captions, prompt and denoising": Lesson("denoising", _ON, (150, 250, 350, 500), start=CAPTIONS),
}
"""Ours, by name."""

RIVALS = {"CLIP linear probe": "clip-linear-probe", "CLIP CoOp": "clip-coop", "CLIP LoRA": "clip-lora"}
"""Few-shot baselines by name."""

BLIND = {"chance": "chance", "caption length": "caption-length", "CLIP": "clip"}
"""Zero-shot methods without a diffusion model."""
ZERO = {
    "sweep": "zero-shot scores and ablations",
    "blind": "CLIP and blind baselines",
    "captions": "what was learned from captions alone",
}
"""What a measurement without examples is of."""


@dataclass(frozen=True)
class StudyConfig:
    """The grid.

    The default takes less than an hour on two cores; :data:`QUICK` takes minutes, :data:`FULL` a day.

    Attributes:
        tasks, levels: Of the embedded world.
        methods: Few-shot methods, of :data:`LESSONS` and :data:`RIVALS`.
        shots: Numbers of examples.
        seeds: Draws of each number.
        held_out: Examples a task and level to measure on.
        passes: Of a sweep.
        max_steps: Optimizer steps of a lesson at most; None leaves them as they are.
        thorough: Whether methods of ours that learn by gradient, which take minutes a lesson, are measured as often as
            the others; otherwise at the first level, with the most examples, once.
    """

    tasks: tuple[str, ...] = TASKS
    levels: tuple[str, ...] = ("standard", "hard")
    methods: tuple[str, ...] = ("dsd prompt and denoising", "dsd weights", *RIVALS)
    shots: tuple[int, ...] = (16, 256)
    seeds: int = 1
    held_out: int = 200
    passes: int = MANY
    max_steps: int | None = None
    thorough: bool = False

    @property
    def places(self) -> list[tuple[str, str]]:
        """Every task at every level."""
        return [(task, level) for level in self.levels for task in self.tasks]

    def __post_init__(self) -> None:
        for name, got, known in (
            ("tasks", self.tasks, TASKS),
            ("levels", self.levels, ("easy", "standard", "hard")),
            ("methods", self.methods, (*LESSONS, *RIVALS)),
        ):
            if not got or not set(got) <= set(known):
                raise OptionError(f"got {name} {'; '.join(got) or 'none'}, expected some of {'; '.join(known)}")
        if not self.shots or min(self.shots) < 4:
            raise OptionError(f"got shots {self.shots}, expected numbers of at least 4 examples")
        for name in ("seeds", "held_out", "passes"):
            if getattr(self, name) < 1:
                raise OptionError(f"got {name} {getattr(self, name)}, expected 1 or more")


QUICK = StudyConfig(
    tasks=WORLD_TASKS,
    levels=("standard",),
    methods=("dsd prompt and denoising", "dsd weights", "CLIP LoRA"),
    shots=(64,),
    held_out=60,
    passes=20,
    max_steps=60,
)
"""A look at the whole in minutes."""
FULL = StudyConfig(methods=(*LESSONS, *RIVALS), shots=(16, 64, 256), seeds=3, thorough=True)
"""Everything: a day on two cores."""


def work(config: StudyConfig) -> list[Item]:
    """Every measurement of the grid: what of, and then as the functions that make it take it."""
    items: list[Item] = [(what, *place) for what in ZERO for place in config.places]
    items += [
        ("lesson", *place, method, shots, seed)
        for seed in range(config.seeds)
        for shots in sorted(config.shots, reverse=True)
        for method in config.methods
        for place in config.places
        if config.thorough
        or method not in LESSONS
        or LESSONS[method].config.method == "weights"
        or (place[1], shots, seed) == (config.levels[0], max(config.shots), 0)
    ]
    return items


def first_of(method: str) -> str | None:
    """The lesson that teaches what this one goes on from, if any: the same but for the weights that follow."""
    if method not in LESSONS:
        return None
    lesson = LESSONS[method]
    for name, other in LESSONS.items():
        config = replace(other.config, method=lesson.config.method, draws=lesson.config.draws)
        if other.config.pieces == lesson.config.pieces - {"weights"} and replace(other, config=config) == lesson:
            return name
    return None
