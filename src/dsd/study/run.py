"""Goes through the grid of a study, in one process or several, and gathers what there is of it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from dsd.contracts import OptionError
from dsd.study import measure
from dsd.study.found import Cell, Failures, Place, Study
from dsd.study.grid import LESSONS, RIVALS, ZERO, Item, StudyConfig, work
from dsd.study.store import Store


def run(
    out: str | os.PathLike[str],
    config: StudyConfig,
    *,
    jobs: int = 1,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Study:
    """Makes the study in a folder, or goes on with one that was stopped there.

    A grid that grew (more methods, shots, seeds, tasks or levels) goes on too; what is there is not made again. Lessons
    of earlier grids in the folder, on the same tasks and levels, are part of the study.

    Args:
        out: The folder; measurements are kept in ``cells/`` of it.
        jobs: Processes, with one thread each.
        announce: Told what is left to do, before it is done.
        progress: Whether to show a progress bar, on stderr.

    Raises:
        OptionError: If the folder holds a study of other held-out examples, passes or steps, or cannot be written.
    """
    store = Store(out, config)
    store.claim()
    grid = work(config)
    left = [item for item in grid if store.get(item) is None]
    if left:
        announce(f"{len(grid) - len(left)} of {len(grid)} measurements are there, {len(left)} are left")
    with tqdm(total=len(grid), initial=len(grid) - len(left), desc="study", disable=not progress) as bar:
        _share(store, left, jobs, bar)
        shown = _shown(config, gather(out, config).cells)
        left = [item for item in shown if store.get(item) is None]
        bar.total += len(left)
        _share(store, left, jobs, bar)
    return gather(out, config)


def gather(out: str | os.PathLike[str], config: StudyConfig) -> Study:
    """What of a study is there, without measuring anything.

    Raises:
        OptionError: If the folder holds no measurement of the grid, or a study of other held-out examples, passes or
            steps.
    """
    store = Store(out, config)
    if store.is_empty:
        raise OptionError(f"got {str(out)!r} without measurements, expected the folder of a study; make one first")
    store.claim()
    found = store.found()
    cells = [_cell(values["cell"]) for item, values in found.items() if item[0] == "lesson"]
    order = (*LESSONS, *RIVALS)
    cells.sort(key=lambda c: (order.index(c.method), c.shots, c.seed))
    whole = replace(
        config,
        methods=tuple(m for m in order if m in (*config.methods, *(c.method for c in cells))),
        shots=tuple(sorted({*config.shots, *(c.shots for c in cells)})),
        seeds=max([config.seeds, *(1 + c.seed for c in cells)]),
    )
    shown = {item: values for item in _shown(config, cells) if (values := store.get(item)) is not None}
    return Study(
        whole,
        tuple(
            _place(config, *place, {what: found[what, *place] for what in ZERO if (what, *place) in found})
            for place in config.places
        ),
        tuple(cells),
        sum(values["took"] for values in (*found.values(), *shown.values())),
        tuple(_counted(work(config), found)),
        tuple(
            Failures(method, task, level, shots, tuple(values["groups"]))
            for (_, task, level, method, shots), values in shown.items()
        ),
        config,
    )


def _counted(grid: Sequence[Item], found: Container[Item]) -> Iterator[str]:
    """What of the grid was not found, in words: how many lessons of each method, and places without others."""
    for what, name in ZERO.items():
        places = [f"{item[1]} {item[2]}" for item in grid if item[0] == what and item not in found]
        if places:
            yield f"{name} of {', '.join(places)}"
    for method in dict.fromkeys(item[3] for item in grid if item[0] == "lesson"):
        lessons = [item in found for item in grid if item[3:4] == (method,)]
        if not all(lessons):
            yield f"{lessons.count(False)} of {len(lessons)} lessons of {method}"


def _shown(config: StudyConfig, cells: Sequence[Cell]) -> list[Item]:
    """Whose failures are shown: at the first level, of each task, zero-shot and the best of ours that learned."""
    level = config.levels[0]
    items: list[Item] = []
    for task in config.tasks:
        items.append(("failures", task, level, "denoising", 0))
        ours = [c for c in cells if (c.task, c.level, c.seed) == (task, level, 0) and c.method in LESSONS and c.kept]
        best = max(ours, key=lambda c: (c.shots, np.mean(c.outcomes)), default=None)
        if best is not None:
            items.append(("failures", task, level, best.method, best.shots))
    return items


def _share(store: Store, left: Sequence[Item], jobs: int, bar: Any) -> None:
    """Does what is left, in this process or in several."""
    if jobs == 1:
        for item in left:
            measure.do(store, item)
            bar.update()
        return
    # the threads of torch do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _leave_with, (os.getpid(),)) as pool:
        try:
            waiting = {pool.submit(measure.do, store, item) for item in left}
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # lessons take minutes, and go on where they were
                worker.terminate()
            raise


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, killed perhaps: what it works on would be nobody's."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cell(values: Mapping[str, Any]) -> Cell:
    return Cell(**{**values, "outcomes": tuple(values["outcomes"])})


def _place(config: StudyConfig, task: str, level: str, found: Mapping[str, Mapping[str, Any]]) -> Place:
    """A place as far as it was measured; ``found`` is what of :data:`ZERO` was."""
    swept = found.get("sweep")
    if swept is None:
        examples = measure.held_out(config, task, level)
        swept = {"tags": [e.tags for e in examples], "chance": measure.chance_of(task, examples), "ablations": {}}
    return Place(
        task,
        level,
        tuple(tuple(tags) for tags in swept["tags"]),
        swept["chance"],
        tuple(_cell(cell) for values in found.values() for cell in values["zero"]),
        {name: {k: tuple(v) for k, v in found.items()} for name, found in swept["ablations"].items()},
    )
