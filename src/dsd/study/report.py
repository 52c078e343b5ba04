"""A study => tables (Markdown, LaTeX, CSV), plots and one self-contained page."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from dsd.contracts import Example
from dsd.evaluate import Metric, installed_versions, write_bytes, write_text
from dsd.images import load_image
from dsd.metrics import average_difference, bootstrap_interval, crossed_interval, paired_difference
from dsd.pictures import HEAT
from dsd.report import format_interval, table
from dsd.study.found import START
from dsd.tiny.world import NOVEL_FILL, NOVEL_RELATION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dsd.study.found import Cell, Place, Study
    from dsd.study.grid import StudyConfig

NOVEL = "novel"
"""The task of :data:`dsd.study.grid.NOVEL`, whose module needs torch."""
CEILING = 0.95
"""A level on which a zero-shot method is above this carries no claim."""
OURS = "dsd "
"""How the names of our few-shot methods begin."""
CLIP = "CLIP "
"""How those of few-shot CLIP do."""
_COLOURS = ("#2f74bb", "#c2571a", "#3a8a4f", "#8a5fb0", "#b8860b", "#4a4f5a", "#c0487f", "#1f9e9e", "#7a7a2a")


@dataclass(frozen=True)
class Kind:
    """A compositional kind of question: the examples of one task that have a tag, or all of them."""

    name: str
    task: str
    tag: str | None = None


KINDS = (Kind("predicate", "comvg", "predicate"), Kind("winoground group", "winoground"))
"""The kinds that the claims are about."""


class Findings:
    """A study's outcomes, ready to be compared."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._places = {(p.task, p.level): p for p in study.places}
        self._cells: dict[tuple[str, str, str, int], list[Cell]] = {}
        for cell in (*(c for p in study.places for c in p.zero), *study.cells):
            self._cells.setdefault((cell.method, cell.task, cell.level, cell.shots), []).append(cell)

    @property
    def zero_shot(self) -> list[str]:
        """Methods that learn nothing, in order."""
        return list(dict.fromkeys(c.method for p in self.study.places for c in p.zero))

    @property
    def few_shot(self) -> list[str]:
        """Methods that learn, in order."""
        return list(dict.fromkeys(c.method for c in self.study.cells))

    def place(self, task: str, level: str) -> Place:
        return self._places[task, level]

    def cells(self, method: str, task: str, level: str, shots: int) -> list[Cell]:
        """One a seed; of a method that learns nothing one, whatever the number of shots. May be empty."""
        return self._cells.get((method, task, level, shots)) or self._cells.get((method, task, level, 0), [])

    def outcomes(self, method: str, task: str, level: str, shots: int, tag: str | None = None) -> np.ndarray:
        """(seeds, examples) of those with a tag; of no seeds where it was not measured."""
        rows = np.array([c.outcomes for c in self.cells(method, task, level, shots)], float)
        tags = self.place(task, level).tags
        chosen = [i for i, own in enumerate(tags) if tag is None or tag in own]
        return rows[:, chosen] if rows.size else rows.reshape(0, len(chosen))

    def metric(self, method: str, task: str, level: str, shots: int) -> Metric | None:
        """The mean outcome with its interval over examples and seeds."""
        rows = self.outcomes(method, task, level, shots)
        return _metric_of(rows) if len(rows) else None

    def difference(self, a: str, b: str, task: str, level: str, shots: int) -> Mapping[str, float] | None:
        """How much better ``a`` is than ``b`` on a task; outcomes are averaged over seeds first."""
        first, second = (self.outcomes(m, task, level, shots) for m in (a, b))
        return paired_difference(first.mean(0), second.mean(0)) if len(first) and len(second) else None

    def kinds(self, method: str, level: str, shots: int) -> list[np.ndarray]:
        """Outcomes of the compositional kinds, averaged over seeds; empty where one was not measured."""
        if not all((kind.task, level) in self._places for kind in KINDS):
            return []
        found = [self.outcomes(method, kind.task, level, shots, kind.tag) for kind in KINDS]
        return [rows.mean(0) for rows in found] if all(rows.size for rows in found) else []

    def compositional(self, a: str, b: str, level: str, shots: int) -> Mapping[str, float] | None:
        """How much better ``a`` is than ``b`` on the average of the compositional kinds."""
        first, second = self.kinds(a, level, shots), self.kinds(b, level, shots)
        return average_difference(list(zip(first, second, strict=True))) if first and second else None

    def best(self, names: Iterable[str], level: str, shots: int) -> str | None:
        """Which of the methods has the highest average of the compositional kinds."""
        scored = {n: float(np.mean([o.mean() for o in made])) for n in names if (made := self.kinds(n, level, shots))}
        return max(scored, key=lambda n: scored[n], default=None)


def write_report(study: Study, out: str | PathLike[str], examples: Mapping[str, Example] | None = None) -> list[Path]:
    """Writes ``study.md``, ``.tex``, ``.csv``, ``.json``, ``.html`` and the plots beside them.

    Args:
        study: What was measured.
        out: A folder.
        examples: To show on the page: one a task.

    Returns:
        What was written.
    """
    folder = Path(out)
    found = Findings(study)
    plots = dict(_plots(found))
    texts = {
        "study.md": _markdown(found, list(plots)),
        "study.tex": _latex(found),
        "study.csv": _csv(study),
        "study.json": json.dumps(summary(study), indent=1) + "\n",
        "study.html": _page(found, plots, examples or {}),
    }
    written = []
    for name, text in texts.items():
        write_text(folder / name, text)
        written.append(folder / name)
    for name, figure in plots.items():
        write_bytes(folder / f"{name}.png", _png(figure))
        written.append(folder / f"{name}.png")
    return written


# Tables


def _headline(place: Place) -> str:
    return f"{place.task}{' (group)' if place.task == 'winoground' else ''}"


def _main_rows(found: Findings, level: str) -> list[dict[str, Any]]:
    """A row a method, a column a task; those that learn with their most examples."""
    shots = max(found.study.config.shots)
    places = [p for p in found.study.places if p.level == level]
    rows = []
    for method in (*found.zero_shot, *found.few_shot):
        metrics = {_headline(p): found.metric(method, p.task, level, shots) for p in places}
        cells = [c for p in places for c in found.cells(method, p.task, level, shots)]
        if not cells:
            continue
        rows.append(
            {
                "method": method,
                "shots": shots if method in found.few_shot else 0,
                "passes": cells[0].passes,
                **metrics,
                "fit s": _mean([c.seconds for c in cells]),
            }
        )
    return rows


def _claim_rows(found: Findings, level: str) -> list[dict[str, Any]]:
    """Our methods against others on the compositional kinds, in points."""
    shots = max(found.study.config.shots)
    rivals = {
        "few-shot CLIP, the best of them": found.best((n for n in found.few_shot if n.startswith(CLIP)), level, shots),
        "Diffusion Classifier": found.best((n for n in found.zero_shot if n.startswith("Diffusion C")), level, shots),
        "DiffusionITM": found.best((n for n in found.zero_shot if n.startswith("DiffusionITM")), level, shots),
    }
    rows = []
    for method in (n for n in found.few_shot if n.startswith(OURS)):
        kinds = found.kinds(method, level, shots)
        if not kinds:
            continue
        row: dict[str, Any] = {"method": method}
        row |= {kind.name: f"{made.mean():.3f}" for kind, made in zip(KINDS, kinds, strict=True)}
        for name, rival in rivals.items():
            if rival is not None:
                gap = found.compositional(method, rival, level, shots)
                row[f"over {name}"] = "" if gap is None else _points(gap)
        rows.append(row)
    return rows


def _gap_rows(found: Findings, level: str, reference: str) -> list[dict[str, Any]]:
    """Each of our methods on each task against a zero-shot one."""
    shots = max(found.study.config.shots)
    rows = []
    for method in (n for n in found.few_shot if n.startswith(OURS)):
        gaps = {
            _headline(p): found.difference(method, reference, p.task, level, shots)
            for p in found.study.places
            if p.level == level and reference in found.zero_shot
        }
        if any(gaps.values()):
            rows.append({"method": method, **{k: "" if g is None else _points(g) for k, g in gaps.items()}})
    return rows


def _shot_rows(found: Findings, level: str) -> list[dict[str, Any]]:
    """A row a method and number of shots."""
    places = [p for p in found.study.places if p.level == level]
    rows = []
    for method in found.few_shot:
        for shots in found.study.config.shots:
            cells = [c for p in places for c in found.cells(method, p.task, level, shots)]
            if not cells:
                continue
            kept = [c.kept for c in cells if c.kept is not None]
            draws = [n for p in places if (n := len(found.cells(method, p.task, level, shots)))]
            row: dict[str, Any] = {"method": method, "shots": shots}
            row["draws"] = f"{min(draws)} to {max(draws)}" if min(draws) < max(draws) else draws[0]
            row |= {_headline(p): found.metric(method, p.task, level, shots) for p in places}
            row["fit s"] = _mean([c.seconds for c in cells])
            row["kept"] = f"{sum(kept)} of {len(kept)}" if kept else ""
            rows.append(row)
    return rows


def _novel_rows(found: Findings, level: str) -> list[dict[str, Any]]:
    """A row a method, a column a word that pretraining never saw."""
    place = next((p for p in found.study.places if (p.task, p.level) == (NOVEL, level)), None)
    if place is None:
        return []
    shots = max(found.study.config.shots)
    rows = []
    for method in (*found.zero_shot, *found.few_shot):
        row: dict[str, Any] = {"method": method, "shots": shots if method in found.few_shot else 0}
        for tag in sorted({tag for tags in place.tags for tag in tags if tag.startswith("novel-")}):
            outcomes = found.outcomes(method, NOVEL, level, shots, tag)
            if len(outcomes):
                row[tag.removeprefix("novel-")] = _metric_of(outcomes)
        if len(row) > 2:
            rows.append(row)
    return rows


def _ablation_rows(found: Findings, level: str, name: str) -> list[dict[str, Any]]:
    places = [p for p in found.study.places if p.level == level]
    values = dict.fromkeys(v for p in places for v in p.ablations.get(name, {}))
    return [
        {
            "": value,
            **{_headline(p): _metric(p.ablations[name][value]) for p in places if value in p.ablations.get(name, {})},
        }
        for value in values
    ]


def _mean(seconds: Sequence[float | None]) -> int | None:
    """Of those that are known."""
    known = [value for value in seconds if value is not None]
    return round(float(np.mean(known))) if known else None


def _metric(outcomes: Sequence[float]) -> Metric:
    return _metric_of(np.array([outcomes]))


def _metric_of(rows: np.ndarray) -> Metric:
    """The mean of (seeds, examples) with its interval over both."""
    value, low, high = crossed_interval(rows) if len(rows) > 1 else bootstrap_interval(rows[0])
    return {"value": value, "low": low, "high": high, "n": rows.shape[1]}


def _points(gap: Mapping[str, float]) -> str:
    """A difference in points with its interval."""
    return f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"


def _full(found: Findings, level: str) -> list[str]:
    """Zero-shot methods that leave no room on a task, in words."""
    said = []
    for place in (p for p in found.study.places if p.level == level):
        above = [(c.method, float(np.mean(c.outcomes))) for c in place.zero if float(np.mean(c.outcomes)) > CEILING]
        if above:
            name, value = max(above, key=lambda item: item[1])
            said.append(f"{_headline(place)}: {name} has {value:.3f} without learning, so it carries no claim")
    return said


def _sections(found: Findings) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(heading, a line about it, rows) of every table."""
    config = found.study.config
    for level in config.levels:
        note = f"{config.held_out} held-out examples a task; learned from {max(config.shots)}; 95 % intervals."
        full = _full(found, level)
        yield f"Every method, {level}", " ".join([note, *(f"{line}." for line in full)]), _main_rows(found, level)
        yield (
            f"Compositional kinds, {level}",
            "Predicates (comvg) and groups (winoground), which count the same; differences in points, paired.",
            _claim_rows(found, level),
        )
        yield (
            f"Five passes against {config.passes}, {level}",
            "Points over the zero-shot denoising score with so many passes, paired.",
            _gap_rows(found, level, f"denoising, {config.passes} passes"),
        )
        yield (
            f"What learning adds to five passes, {level}",
            "Points over the zero-shot denoising score with as many passes, under the same noise, paired.",
            _gap_rows(found, level, START),
        )
        yield (
            f"Number of examples, {level}",
            "The mean over draws of the examples, with its interval over draws and held-out examples. Fit seconds: "
            "processor time of one core, the mean over tasks and draws. Kept: lessons beyond doubt better than the "
            "score that they started from; of others that score is measured.",
            _shot_rows(found, level),
        )
        yield (
            f"Words that pretraining never saw, {level}",
            f"Choices of two that hinge on the fill “{NOVEL_FILL}” or the relation “{NOVEL_RELATION}”.",
            _novel_rows(found, level),
        )
        for name in dict.fromkeys(n for p in found.study.places for n in p.ablations):
            yield f"{name[0].upper()}{name[1:]}, {level}", "Zero-shot.", _ablation_rows(found, level, name)


def command(config: StudyConfig) -> str:
    """What makes the study of a grid."""
    base = type(config)()
    given = {
        "tasks": ",".join(config.tasks) if config.tasks != base.tasks else "",
        "levels": ",".join(config.levels) if config.levels != base.levels else "",
        "methods": f"'{';'.join(config.methods)}'" if config.thorough or config.methods != base.methods else "",
        "shots": ",".join(map(str, config.shots)) if config.shots != base.shots else "",
        "seeds": str(config.seeds) if config.seeds != base.seeds else "",
        "held-out": str(config.held_out) if config.held_out != base.held_out else "",
    }
    size = [] if config.max_steps is None else ["--quick"]
    return " ".join(["dsd study", *size, *(f"--{name} {value}" for name, value in given.items() if value)])


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _markdown(found: Findings, plots: Sequence[str]) -> str:
    study = found.study
    parts = [
        "# The study on the embedded model",
        f"Every method on every task of the procedural world; {study.seconds / 60:.0f} minutes of one core in all. "
        f"Made by `{command(study.asked or study.config)}`; the settings are in `study.json`.",
        *([f"Not measured yet: {'; '.join(study.missing)}."] if study.missing else []),
        *(f"![{name.replace('_', ' ')}]({name}.png)" for name in plots),
    ]
    for heading, note, rows in _sections(found):
        if rows:
            parts += [f"## {heading}", *([note] if note else []), table(rows, _columns(rows))]
    return "\n\n".join(parts) + "\n"


def _latex(found: Findings) -> str:
    """The main table of each level, for ``booktabs``."""
    parts = ["% made by dsd study; needs \\usepackage{booktabs}"]
    for level in found.study.config.levels:
        rows = _main_rows(found, level)
        columns = [c for c in _columns(rows) if c != "fit s"]
        best = {c: max((r[c]["value"] for r in rows if isinstance(r.get(c), Mapping)), default=None) for c in columns}
        lines = [
            "\\begin{tabular}{l" + "r" * (len(columns) - 1) + "}",
            "\\toprule",
            " & ".join(map(_tex, columns)) + " \\\\",
            "\\midrule",
        ]
        for row in rows:
            cells = []
            for c in columns:
                value = row.get(c)
                if isinstance(value, Mapping):
                    half = 50 * (value["high"] - value["low"])
                    shown = f"{100 * value['value']:.1f}"
                    bold = f"\\textbf{{{shown}}}" if value["value"] == best[c] else shown
                    cells.append(f"{bold} $\\pm$ {half:.1f}")
                else:
                    cells.append("" if value is None else _tex(str(value)))
            lines.append(" & ".join(cells) + " \\\\")
        parts.append("\n".join([f"% {level}", *lines, "\\bottomrule", "\\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    return "".join({"&": "\\&", "%": "\\%", "_": "\\_", "#": "\\#"}.get(c, c) for c in text)


def _csv(study: Study) -> str:
    """A row a measurement."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("method", "task", "level", "shots", "seed", "passes", "value", "low", "high", "n", "fit seconds"))
    for cell in (*(c for p in study.places for c in p.zero), *study.cells):
        m = _metric(cell.outcomes)
        numbers = [f"{m[k]:.4f}" for k in ("value", "low", "high")]
        seconds = "" if cell.seconds is None else f"{cell.seconds:.1f}"
        writer.writerow(
            (cell.method, cell.task, cell.level, cell.shots, cell.seed, cell.passes, *numbers, m["n"], seconds)
        )
    return buffer.getvalue()


def summary(study: Study) -> dict[str, Any]:
    """Everything in the tables as plain values, for JSON."""
    found = Findings(study)
    return {
        "config": asdict(study.config),
        "versions": installed_versions(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "core_seconds": round(study.seconds),
        "tables": {
            heading: [{k: dict(v) if isinstance(v, Mapping) else v for k, v in row.items()} for row in rows]
            for heading, _, rows in _sections(found)
        },
    }


# Plots


def _plots(found: Findings) -> Iterator[tuple[str, Figure]]:
    for level in found.study.config.levels:
        yield f"passes_{level}", _passes_plot(found, level)
        if len(found.study.config.shots) > 1:
            yield f"shots_{level}", _shots_plot(found, level)


def _grid(found: Findings, level: str, title: str) -> tuple[Figure, list[tuple[Place, Any]]]:
    """A figure with a plot a task."""
    from matplotlib.figure import Figure

    places = [p for p in found.study.places if p.level == level]
    figure = Figure(figsize=(3.1 * len(places) + 0.6, 4.1), layout="constrained")
    axes = figure.subplots(1, len(places), squeeze=False)[0]
    figure.suptitle(title, fontsize=12)
    for place, ax in zip(places, axes, strict=True):
        ax.set_title(_headline(place), fontsize=11)
        ax.axhline(place.chance, color="#8a8f99", linestyle=":", linewidth=1, label="chance")
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.set_ylim(0, 1.02)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("group score or accuracy")
    return figure, list(zip(places, axes, strict=True))


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    known: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=min(4, len(known)),
        frameon=False,
        fontsize=8.5,
    )


def _whisker(ax: Any, x: float, metric: Metric, colour: str, label: str, marker: str = "o") -> None:
    error = [[metric["value"] - metric["low"]], [metric["high"] - metric["value"]]]
    ax.errorbar(
        [x],
        [metric["value"]],
        yerr=error,
        fmt=marker,
        color=colour,
        markersize=5.5,
        linewidth=1.2,
        capsize=2,
        label=label,
    )


def _passes_plot(found: Findings, level: str) -> Figure:
    """What denoiser passes buy, zero-shot and taught."""
    shots = max(found.study.config.shots)
    figure, places = _grid(
        found, level, f"Accuracy against denoiser passes a pair, {level}; taught with {shots} examples"
    )
    ours = [n for n in found.few_shot if n.startswith(OURS)]
    most = found.study.config.passes
    for place, ax in places:
        curve = place.ablations.get("denoising by number of timesteps", {})
        counts = [int(n) for n in curve]
        ax.plot(
            counts,
            [float(np.mean(v)) for v in curve.values()],
            color="#4a4f5a",
            marker=".",
            label="denoising, zero-shot",
        )
        for k, method in enumerate(ours):
            metric = found.metric(method, place.task, level, shots)
            if metric is not None:
                spread = 1.09 ** (k - (len(ours) - 1) / 2)
                passes = found.cells(method, place.task, level, shots)[0].passes
                _whisker(ax, passes * spread, metric, _COLOURS[k % len(_COLOURS)], method)
        classifier = [c for c in place.zero if c.method.startswith("Diffusion Classifier, L2")]
        for cell in classifier:
            _whisker(ax, cell.passes * 1.12, _metric(cell.outcomes), "#111111", "Diffusion Classifier", "s")
        best = [m for n in found.few_shot if n.startswith(CLIP) and (m := found.metric(n, place.task, level, shots))]
        if best:
            top = max(best, key=lambda m: m["value"])
            ax.axhline(top["value"], color="#c0487f", linestyle="--", linewidth=1.2, label="few-shot CLIP, best")
        ax.set_xscale("log")
        ticks = [n for n in (1, 2, 5, 10, 20, 50) if n <= most]
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.set_xlabel("passes a pair")
    _legend(figure, [ax for _, ax in places])
    return figure


def _shots_plot(found: Findings, level: str) -> Figure:
    """What examples buy."""
    figure, places = _grid(found, level, f"Accuracy against labelled examples, {level}")
    for place, ax in places:
        for k, method in enumerate(found.few_shot):
            points = [
                (n, m)
                for n in found.study.config.shots
                if (m := found.metric(method, place.task, level, n)) is not None
            ]
            if points:
                colour = _COLOURS[k % len(_COLOURS)]
                style = "-" if method.startswith(OURS) else "--"
                values = [m["value"] for _, m in points]
                ax.plot([n for n, _ in points], values, style, color=colour, marker="o", markersize=4, label=method)
        for cell in place.zero:
            if cell.method.startswith("denoising") and cell.passes == found.study.config.passes:
                ax.axhline(np.mean(cell.outcomes), color="#4a4f5a", linewidth=1, label=f"{cell.method}, zero-shot")
        ax.set_xscale("log", base=2)
        ax.set_xticks(found.study.config.shots, [str(n) for n in found.study.config.shots])
        ax.minorticks_off()
        ax.set_xlabel("labelled examples")
    _legend(figure, [ax for _, ax in places])
    return figure


def _png(figure: Figure) -> bytes:
    """Few colours, so that a plot is small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    buffer.seek(0)
    small = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue()


# The page


def _page(found: Findings, plots: Mapping[str, Figure], examples: Mapping[str, Example]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("dsd"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {
            "heading": heading,
            "note": note,
            "columns": _columns(rows),
            "rows": [[_shown(row.get(c)) for c in _columns(rows)] for row in rows],
            "best": _best(rows),
        }
        for heading, note, rows in _sections(found)
        if rows
    ]
    return page.get_template("study.html").render(
        config=found.study.config,
        minutes=round(found.study.seconds / 60),
        command=command(found.study.asked or found.study.config),
        missing=found.study.missing,
        failures=[
            {"task": task, "level": of[0].level, "methods": of}
            for task in dict.fromkeys(f.task for f in found.study.failures)
            if (of := [f for f in found.study.failures if f.task == task])
        ],
        heat=", ".join(HEAT),
        plots=[
            {"name": name.replace("_", ", "), "src": f"data:image/png;base64,{base64.b64encode(_png(figure)).decode()}"}
            for name, figure in plots.items()
        ],
        examples=[_example(task, example) for task, example in examples.items()],
        sections=sections,
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return format_interval(value) if isinstance(value, Mapping) else str(value)


def _best(rows: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Which cells hold the best value of their column."""
    columns = _columns(rows)
    values = [[r[c]["value"] if isinstance(r.get(c), Mapping) else None for c in columns] for r in rows]
    tops = [max((v for v in column if v is not None), default=None) for column in zip(*values, strict=True)]
    return [[v is not None and v == top for v, top in zip(line, tops, strict=True)] for line in values]


def _example(task: str, example: Example) -> dict[str, Any]:
    pictures = []
    for image in example.images:
        buffer = io.BytesIO()
        load_image(image).save(buffer, "PNG", optimize=True)
        pictures.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    right = {j: i for i, j in example.positives}
    texts = [{"text": text, "right": k in right, "image": right.get(k)} for k, text in enumerate(example.texts)]
    return {"task": task, "pictures": pictures, "texts": texts}
