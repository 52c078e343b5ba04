"""The learning curve: accuracy against the number of labelled examples.

:func:`learning_curve` fits on random draws from a pool of examples, several seeds for each size, and measures every fit
on the same held-out examples. The smaller draws of a seed are parts of its larger ones, so that a curve shows what more
examples do, not what other examples do. Each finished row is written at once; a curve that was stopped goes on.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsd.adapt import planned
from dsd.adapters import Adapter, fingerprint
from dsd.contracts import Example, ManifestError, OptionError
from dsd.evaluate import Metric, dataset_checksum, evaluate, installed_versions, write_text
from dsd.learn import FitConfig
from dsd.lesson import check_choices, check_validation, pictures_of
from dsd.matcher import Matcher
from dsd.metrics import crossed_interval, outcomes, paired_difference
from dsd.prompts import PromptConfig
from dsd.report import CurvePoint, learning_curve_chart
from dsd.tasks import world_task

SHOTS = (0, 4, 16, 64, 256)
FILE = "curve.json"
PICTURE = "curve.png"


@dataclass(frozen=True)
class Row:
    """One fit, or the zero-shot score, on the held-out examples.

    Attributes:
        shots: Labelled examples that were spent, those that the fit held out to stop by among them; 0 is zero-shot.
        seed: Of the draw and the fit; None for zero-shot, which has none.
        metrics: As :func:`dsd.evaluate.evaluate` gives them; always ``accuracy``.
        gain: In accuracy over zero-shot, paired by example: ``value``, ``low``, ``high`` and ``p``; None for zero-shot.
        kept: Whether learning was clearly better on the examples to stop by; if not, nothing learned is in this.
        seconds: Spent on learning; None where it went on after a stop.
        outcomes: The share of choices won in each held-out example.
    """

    shots: int
    seed: int | None
    metrics: Mapping[str, Metric]
    gain: Metric | None
    kept: bool
    seconds: float | None
    outcomes: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """All seeds at one number of examples.

    Attributes:
        shots: Labelled examples.
        accuracy: The mean over seeds, with an interval that covers both seeds and held-out examples.
        gain: The same of the gain over zero-shot; None for zero-shot itself.
        fits: How many seeds there are.
        kept: In how many of them learning was kept.
    """

    shots: int
    accuracy: Metric
    gain: Metric | None
    fits: int
    kept: int


@dataclass(frozen=True)
class Curve:
    """Accuracy against the number of examples.

    Attributes:
        config: Everything that decides the rows: examples, draws, learning, matcher and base model.
        versions: Of Python and the packages that were installed.
        chance: The accuracy of a blind guess.
        rows: Those finished so far.
    """

    config: Mapping[str, Any]
    versions: Mapping[str, str]
    chance: float
    rows: tuple[Row, ...] = ()

    @property
    def points(self) -> tuple[Point, ...]:
        """One for each number of examples, the fewest first."""
        found = []
        for shots in sorted({row.shots for row in self.rows}):
            rows = [row for row in self.rows if row.shots == shots]
            won = np.array([row.outcomes for row in rows])
            gain = None if shots == 0 else _metric(won - np.array(self._zero.outcomes))
            found.append(Point(shots, _metric(won), gain, len(rows) if shots else 0, sum(row.kept for row in rows)))
        return tuple(found)

    @property
    def _zero(self) -> Row:
        """The zero-shot row, always the first to be made."""
        return self.rows[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": dict(self.config),
            "versions": dict(self.versions),
            "chance": self.chance,
            "points": [asdict(point) for point in self.points],
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON whole or not at all, making folders as needed.

        Raises:
            OptionError: The path cannot be written.
        """
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Curve:
        """Reads what :meth:`save` wrote.

        Raises:
            ManifestError: The file is missing or is no saved curve.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"))
            rows = tuple(Row(**{**row, "outcomes": tuple(row["outcomes"])}) for row in data["rows"])
            if rows and rows[0].seed is not None:
                raise ValueError("the first row is not zero-shot")
            return cls(dict(data["config"]), dict(data["versions"]), float(data["chance"]), rows)
        except OSError as error:
            reason = error.strerror or "unreadable"
            raise ManifestError(f"{path}: got no curve ({reason}), expected a file saved by dsd curve") from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ManifestError(
                f"{path}: got another format ({reason}), expected a file saved by dsd curve; delete it"
            ) from None

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws the curve as a PNG.

        Raises:
            OptionError: The path cannot be written.
        """
        score, method = self.config["matcher"]["score"]["kind"], self.config["fit"]["method"]
        count = len(self._zero.outcomes)
        seeds = self.config["seeds"]
        over = f"mean of {seeds} seeds (pale) and its" if seeds > 1 else "one seed;"
        points = [
            CurvePoint(
                point.shots,
                point.accuracy,
                [row.metrics["accuracy"]["value"] for row in self.rows if row.shots == point.shots and point.fits > 1],
            )
            for point in self.points
        ]
        learning_curve_chart(
            path,
            points,
            chance=self.chance,
            title=f"{self.config['name']}: {score} score, {method} learned",
            note=f"{count:,} held-out examples; {over} 95 % interval over {'seeds and ' * (seeds > 1)}examples",
        )


def learning_curve(
    matcher: Matcher,
    pool: Sequence[Example],
    held_out: Sequence[Example],
    out: str | os.PathLike[str] | None = None,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    validation: Sequence[Example] | None = None,
    config: FitConfig | None = None,
    prompt: PromptConfig | None = None,
    start: Adapter | str | os.PathLike[str] | None = None,
    name: str = "learning curve",
    announce: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Curve:
    """Measures the zero-shot score, then a fit for every seed and number of examples; the matcher is bare afterwards.

    Args:
        matcher: Decides base model and score; must not have been taught.
        pool: Examples to draw from, without replacement.
        held_out: Examples to measure on, whose pictures are not in the pool.
        out: A folder that rows are kept in as they are finished (``curve.json``), and the picture (``curve.png``); a
            curve of the same request that is there already goes on.
        shots: Numbers of examples; zero-shot is always measured.
        seeds: How many draws of each; the first has the seed of ``config``.
        validation: Examples that every fit stops by. None lets each hold out its own by turns (:func:`dsd.adapt.fit`).
        config, prompt: How to learn, see :func:`dsd.adapt.fit`.
        start: An adapter, or where one is, that every fit learns on from; zero-shot is then that as it is, with its
            own score.
        name: What the curve is of.
        announce: Is told how much work there is, before it starts.
        progress: Whether to show progress bars, on stderr.

    Raises:
        OptionError: If the examples cannot give such a curve, or ``out`` holds one of another request.
        ManifestError: If no held-out example holds a choice, or ``out`` holds a broken file.
    """
    sizes = check_plan(shots, seeds)
    config = config or FitConfig()
    if start is None:
        prompt = prompt or PromptConfig()
    elif not isinstance(start, Adapter):
        start = Adapter.load(start)
    if matcher.adapter is not None:
        raise OptionError("got a matcher that was taught, expected a bare one; load it without an adapter")
    draws = {seed: _draw(pool, seed) for seed in range(config.seed, config.seed + seeds)}
    if config.method == "weights" and matcher.score_config.kind != "denoising":
        raise OptionError(
            f"got the score {matcher.score_config.kind} with weights, expected denoising, which they are learned from; "
            "leave the score out"
        )
    chance = _check_examples(pool, held_out, validation, sizes[-1])
    for draw_seed, drawn in draws.items():
        seeded = replace(config, seed=draw_seed)
        _check_fewest(drawn[: sizes[1]], validation, seeded)
        planned(drawn[: sizes[1]], validation, seeded, prompt, start, matcher.config["size"])
    request = {
        "name": name,
        "shots": sizes,
        "seeds": seeds,
        "pool": _described(pool),
        "held_out": _described(held_out),
        "validation": None if validation is None else _described(validation),
        "fit": asdict(config),
        "prompt": None if prompt is None else prompt.to_dict(),
        "matcher": matcher.config,
        "base": fingerprint(matcher.backbone),
        **({} if start is None else {"start": start.digest()}),
    }
    # as it comes back from JSON, to be compared with what is there
    curve = Curve(json.loads(json.dumps(request)), installed_versions(), chance)
    folder = None if out is None else Path(out)
    if folder is not None:
        curve = _resumed(curve, folder / FILE)
        curve.save(folder / FILE)  # what cannot be written is found out before hours of learning
    plan = [(0, None), *((size, seed) for seed in draws for size in sizes[1:])]
    done = {(row.shots, row.seed) for row in curve.rows}
    left = [step for step in plan if step not in done]
    if announce is not None:
        announce(_work(left, seeds, len(held_out), len(done)))
    with tqdm(total=len(plan), initial=len(done), desc="curve", unit="fit", disable=not progress) as bar:
        for size, seed in left:
            bar.set_postfix(shots=size, seed=seed)
            began, kept = time.perf_counter(), False
            checkpoint = None if folder is None else folder / f"fit-{size}-{seed}.checkpoint"
            anew = checkpoint is None or not checkpoint.exists()
            try:
                if seed is not None:
                    matcher.fit(
                        draws[seed][:size],
                        validation,
                        config=replace(config, seed=seed),
                        prompt=prompt,
                        start=start,
                        checkpoint=checkpoint,
                        resume=True,
                        progress=progress,
                    )
                    assert matcher.adapter is not None
                    kept = bool(matcher.adapter.training["kept"])
                elif start is not None:
                    matcher.load_adapter(start)
                seconds = time.perf_counter() - began if anew else None
                result = evaluate(matcher, held_out, progress=progress)
            finally:
                matcher.forget()
            won = outcomes(held_out, result.scores)
            won = won[~np.isnan(won)]
            gain = None if seed is None else paired_difference(won, curve.rows[0].outcomes)
            row = Row(size, seed, result.metrics, gain, kept, seconds if size else 0.0, tuple(won.tolist()))
            curve = replace(curve, rows=(*curve.rows, row))
            if folder is not None:
                curve.save(folder / FILE)
            if checkpoint is not None:
                checkpoint.unlink(missing_ok=True)
            bar.update()
    if folder is not None:
        curve.draw(folder / PICTURE)
    return curve


def world_sets(
    task: str,
    level: str,
    count: int,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    seed: int = 0,
    novel: bool = False,
) -> tuple[list[Example], list[Example]]:
    """A pool and ``count`` held-out examples of a task of the world (:func:`dsd.tasks.world_task`).

    The pool, of the few-shot split, is large enough that different seeds draw mostly different examples; the held-out
    examples are of the test split.

    Raises:
        OptionError: An argument outside what it may be.
    """
    size = seeds * check_plan(shots, seeds)[-1]
    return (
        world_task(task, "few-shot", level, size, seed, novel),
        world_task(task, "test", level, count, seed, novel),
    )


def check_plan(shots: Sequence[int], seeds: int) -> list[int]:
    """The numbers of examples in order, 0 among them.

    Raises:
        OptionError: There is nothing to learn from, or a number is negative.
    """
    sizes = sorted({0, *shots})
    if sizes[0] < 0 or len(sizes) < 2:
        given = ", ".join(map(str, shots)) or "none"
        raise OptionError(f"got shots {given}, expected numbers of examples, at least one of them more than 0")
    if seeds < 1:
        raise OptionError(f"got {seeds} seeds, expected at least 1")
    return sizes


def _draw(pool: Sequence[Example], seed: int) -> list[Example]:
    """The pool in random order: its first n examples are a draw of n, a part of every larger draw."""
    drawn = list(pool)
    random.Random(f"curve/{seed}").shuffle(drawn)
    return drawn


def _check_examples(
    pool: Sequence[Example], held_out: Sequence[Example], validation: Sequence[Example] | None, most: int
) -> float:
    """The accuracy of a blind guess on the held-out examples."""
    if most > len(pool):
        raise OptionError(
            f"got {most} shots, expected at most {len(pool)}, as many as there are examples to draw from; ask for fewer"
        )
    learned = [*pool, *(validation or ())]
    check_choices(learned)
    check_validation(pool, validation or ())
    seen = {picture for e in learned for picture in pictures_of(e)}
    leaked = [e.id for e in held_out if not seen.isdisjoint(pictures_of(e))]
    if leaked:
        raise OptionError(
            f"got {len(leaked)} held-out examples with pictures that may be learned from ({', '.join(leaked)[:200]}), "
            "expected pictures of their own; take them out of either"
        )
    won = _blind(held_out)
    if np.isnan(won).all():
        raise ManifestError(
            f"got {len(held_out)} held-out examples, none with a choice, expected images or texts of which only some "
            "match; add candidates that do not match"
        )
    return float(np.nanmean(won))


def _check_fewest(drawn: Sequence[Example], validation: Sequence[Example] | None, config: FitConfig) -> None:
    """Says of too few shots what would else be said of examples."""
    if config.method != "weights" and validation is None:
        try:
            config.turns(drawn, None)
        except OptionError:
            raise OptionError(
                f"got {len(drawn)} shots, expected enough to learn from some and hold out others with pictures of "
                "their own; ask for more, or give validation examples"
            ) from None


def _blind(examples: Sequence[Example]) -> np.ndarray:
    """What a blind guess wins of each example, NaN where there is nothing to guess: (n,) float."""
    return outcomes(examples, [np.zeros((len(e.images), len(e.texts))) for e in examples])


def _described(examples: Sequence[Example]) -> dict[str, Any]:
    return {"examples": len(examples), "checksum": dataset_checksum(examples)}


def _resumed(curve: Curve, path: Path) -> Curve:
    """The curve with the rows that are there already."""
    if not path.exists():
        return curve
    found = Curve.load(path)
    if not found.rows:  # stopped before anything was done
        return curve
    other = [k for k in curve.config if curve.config[k] != found.config.get(k)]
    other += ["versions"] if curve.versions != found.versions else []
    if other:
        raise OptionError(
            f"{path}: got a curve of another request (other: {', '.join(other)}), expected one of this; "
            "choose another folder, or delete that file to start anew"
        )
    return found


def _work(left: Sequence[tuple[int, int | None]], seeds: int, held_out: int, done: int) -> str:
    """What is left to do, in words."""
    there = f"; {_count(done, 'row')} of it done before" if done else ""
    if not left:
        return f"nothing to do{there}"
    fits = [size for size, seed in left if seed is not None]
    sizes = ", ".join(f"{size:,}" for size in sorted(set(fits)))
    work = f"{_count(len(fits), 'fit')} ({sizes} examples; {_count(seeds, 'seed')}), " if fits else ""
    return f"{work}{_count(len(left), 'measurement')} on {_count(held_out, 'held-out example')} to do{there}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _metric(won: np.ndarray) -> Metric:
    """The mean of outcomes (seeds, examples) with its interval."""
    value, low, high = crossed_interval(won)
    return {"value": value, "low": low, "high": high, "n": won.shape[1]}
