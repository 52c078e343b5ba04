"""The page and the picture of ``benchmarks/speed.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsd.report import table


def page(out: Path, values: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = values["machine"]
    lines = [
        "# What a score costs",
        "",
        f"{machine['cpu']}, {machine['threads']} threads. Made by `python benchmarks/speed.py --out {out}`; ratios are",
        "of runs side by side. Peak memory is that of the process of each part, Python and libraries included.",
        "",
        f"![What is saved]({out.name}.png)",
    ]
    parts = values["parts"]
    if "exact" in parts:
        p = parts["exact"]
        rows = [
            {"what": name, "seconds": s, "times faster": p["times faster"][name]} for name, s in p["seconds"].items()
        ]
        lines += [
            "",
            "## The same scores",
            "",
            f"The score of the paper, {p['pairs']} pairs at {p['timesteps']} timesteps, on a network of Stable",
            "Diffusion's layout with a quarter of its width at 256 pixels. `loop` is the authors' procedure: for each",
            "pair and timestep the picture and both captions are encoded and two passes of batch one are made. Below",
            f"it one saving after the other. Scores differ by at most {p['largest difference']:.1e}.",
            "",
            table(rows, list(rows[0])),
        ]
        passes = p["attention, seconds a pass of 4"]
        rows = [{"the attention score of four rows": name, "seconds": s} for name, s in passes.items()]
        lines += ["", table(rows, list(rows[0]))]
    if "equal" in parts:
        p = parts["equal"]
        lines += [
            "",
            "## The same accuracy with fewer passes",
            "",
            f"Choices of the embedded world, level standard. All candidates at {p['timesteps']} timesteps (Diffusion",
            "Classifier) against races at a stated error. Passes under the empty caption count. `plain loop` is one",
            "pass of batch one after the other, with an encoding each. `most telling`: of the 16 timesteps that tell",
            "most by labelled choices of another split, not of all 40. The two scores are not the same: Diffusion",
            "Classifier's is the mean squared error of the noise, ours its norm, under other draws of noise; so a",
            "difference that is there at every error is one of scores, not of racing.",
        ]
        for name, task in p["tasks"].items():
            whole = task["all candidates"]
            rows = [
                {
                    "error": error,
                    "accuracy": r["accuracy"],
                    "difference, points": "{mean:+.1f} [{low:+.1f}, {high:+.1f}]".format(
                        **r["less all candidates, points"]
                    ),
                    "times fewer passes": r["times fewer"],
                    "times faster": r["times faster than in our batches"],
                    "than a plain loop": r["times faster than a plain loop"],
                }
                for error, r in task["races"].items()
            ]
            lines += [
                "",
                f"{name}: {task['choices']} choices of {task['candidates']:g} candidates on average; all candidates:",
                f"accuracy {whole['accuracy']:.3f} with {whole['passes']:,} passes in {whole['seconds']:.0f} s.",
                "",
                table(rows, list(rows[0])),
            ]
    if "ranking" in parts:
        p = parts["ranking"]
        rows = [
            {
                "budget": name,
                "full scores": b["full-score equivalents"],
                "same first": b["same first"],
                "interval": "{:.3f} to {:.3f}".format(*b["interval"]),
                "same first, fresh": b.get("same first, fresh") or "",
                "right": b["right"],
            }
            for name, b in p["budgets"].items()
        ]
        lines += [
            "",
            "## The best of many captions",
            "",
            f"{p['images']} pictures, each against {p['captions']:,} captions; the whole score is the denoising score",
            f"at {p['timesteps']} timesteps, the embedded model in bfloat16. A full score is {p['timesteps']} passes.",
            "`same first`: the race has the first of the whole score, which is the picture's own caption in",
            f"{p['right by the whole score']:.3f} of the cases. `fresh`: of the pictures after the first 50, on which",
            "it was set how much more the early rounds of a race get.",
            "",
            table(rows, list(rows[0])),
        ]
    if "overhead" in parts:
        rows = [
            {"model": name, "rows": p["rows"], "score": score, "overhead": f"{100 * value:+.1f} %"}
            for name, p in parts["overhead"].items()
            for score, value in p["overhead"].items()
        ]
        lines += ["", "## What a score adds to a pass", "", table(rows, list(rows[0]))]
    if "scaling" in parts:
        p = parts["scaling"]
        a, b, c = p["a, b, c"]
        lines += [
            "",
            "## Scaling",
            "",
            f"`{p['model']}`, fitted: a {a:.4f}, b {b:.4f}, c {c:.4f} s;",
            f"off by at most {100 * p['largest relative error']:.0f} %.",
            "",
            table(p["rows"], list(p["rows"][0])),
        ]
    if "learning" in parts:
        rows = [{"task": name, **p} for name, p in parts["learning"].items() if isinstance(p, dict)]
        lines += ["", "## Learning prompts on the embedded model", "", table(rows, list(rows[0]))]
    if "taught" in parts:
        p = parts["taught"]
        many = p["timesteps of all candidates"]
        rows = [
            {
                "layers": name,
                "timesteps": found["timesteps"],
                "choices won": found["choices won"],
                f"less Diffusion Classifier at {many}, points": interval(found["less all candidates, points"]),
                "less all layers, points": interval(found["less all layers, points"]),
                "times fewer passes": found["times fewer passes"],
                "times faster": found["times faster than in our batches"],
                "than a plain loop": found["times faster than a plain loop"],
            }
            for name, found in p["ways"].items()
        ]
        costs = [
            {
                "layers": name,
                "ms a pass of a row": 1000 * found["seconds a pass of a row"],
                "processor seconds to learn": round(found["processor seconds to learn"]),
            }
            for name, found in p["ways"].items()
            if found["processor seconds to learn"] is not None
        ]
        lines += [
            "",
            "## The same accuracy with fewer passes, after learning",
            "",
            f"Winoground of the embedded world, level standard: attention alone, taught from {p['examples']} examples,",
            f"on {p['test']} test groups of four choices. Diffusion Classifier with {many} timesteps wins",
            f"{p['all candidates']:.3f} of them, attention before learning {p['before']:.3f}. `times faster`: than",
            "Diffusion Classifier in our batches, encodings included; `plain loop` as above.",
            "",
            table(rows, list(rows[0])),
            "",
            "Passes end after the last layer that is looked at, in learning too:",
            "",
            table(costs, list(costs[0])),
        ]
    if "start" in parts:
        rows = [{"what": name, "seconds": s} for name, s in parts["start"].items()]
        lines += ["", "## Starting", "", table(rows, list(rows[0]))]
    rows = [{"part": name, "peak, GB": value} for name, value in values["peak, GB"].items()]
    return "\n".join([*lines, "", "## Memory", "", table(rows, list(rows[0])), ""])


def interval(gap: dict[str, float]) -> str:
    """A difference in points and its interval."""
    return f"{gap['mean']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]"


def draw(path: Path, parts: dict[str, Any]) -> None:
    """Times faster, and accuracy against passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if "exact" in parts:
        p = parts["exact"]["times faster"]
        left.barh(list(p), list(p.values()), color="#4477aa")
        left.invert_yaxis()
        for i, value in enumerate(p.values()):
            left.text(value, i, f" {value:.1f}x", va="center")
        left.set_xlabel("times faster, at the same scores")
        left.set_xlim(0, 1.15 * max(p.values()))
        left.spines[["top", "right"]].set_visible(False)
    if "equal" in parts:
        for name, task in parts["equal"]["tasks"].items():
            races = [r for error, r in task["races"].items() if "telling" not in error]
            (line,) = right.plot(
                [r["times fewer"] for r in races],
                [r["less all candidates, points"]["mean"] for r in races],
                marker="o",
                label=name,
            )
            right.fill_between(
                [r["times fewer"] for r in races],
                [r["less all candidates, points"]["low"] for r in races],
                [r["less all candidates, points"]["high"] for r in races],
                alpha=0.15,
                color=line.get_color(),
            )
        right.axhline(0, color="grey", linewidth=0.8)
        right.set_xlabel("times fewer passes")
        right.set_ylabel("accuracy less that of all candidates, points")
        right.legend(frameon=False)
        right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
