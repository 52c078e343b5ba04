"""Lessons of the playground: labelled pairs => an adapter, learned on a copy while the model goes on serving."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import zipfile
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from dsd.contracts import DsdError, Example, OptionError
from dsd.jury import FEWEST
from dsd.tasks import world_task
from dsd.tasks.manifest import read_table
from dsd.web.config import ServeConfig
from dsd.web.shelf import Shelf
from dsd.web.wire import HttpError
from dsd.web.worker import Worker

METHODS = ("prompt", "weights", "heads")
SCORES = (None, "attention", "denoising")
_FOLLOW = 2.0
"""Seconds that a question for news waits for some."""


@dataclass(frozen=True, eq=False)
class Mark:
    """A pair, and whether it is right."""

    image: Image.Image
    text: str
    right: bool


class _Stopped(Exception):
    pass


@dataclass(eq=False)
class Lesson:
    """One lesson; ``events`` only grows, and tells all there is to tell of it."""

    id: str
    name: str
    events: list[dict[str, Any]] = field(default_factory=list)
    archive: bytes | None = None
    over: bool = False
    stopped: bool = False

    def say(self, event: str, **values: Any) -> None:
        self.events.append({"event": event, **values})

    def stop(self) -> None:
        """Ends it at the model's next pass."""
        self.stopped = True


class Lessons:
    """Starts lessons, one at a time, and keeps the last of them."""

    def __init__(self, worker: Worker, taught: set[str], config: ServeConfig) -> None:
        self._worker, self._taught, self._config = worker, taught, config
        self._lessons: dict[str, Lesson] = {}
        self._count = 0

    def find(self, lesson_id: str) -> Lesson:
        """A lesson that is kept.

        Raises:
            HttpError: There is none of this id.
        """
        try:
            return self._lessons[lesson_id]
        except KeyError:
            raise HttpError(404, "not_found", "got a lesson that is not here, expected a recent one") from None

    def close(self) -> None:
        """Stops whatever is being learned."""
        for lesson in self._lessons.values():
            lesson.stop()

    def check_free(self) -> None:
        """Refuses a lesson that could not begin.

        Raises:
            HttpError: If nothing is taught here, or another lesson goes on.
        """
        if not self._config.teach:
            raise HttpError(403, "forbidden", "got a lesson, expected none: this server was started with --no-teach")
        if any(not lesson.over for lesson in self._lessons.values()):
            raise HttpError(429, "busy", "got a lesson during another, expected one at a time; wait or stop it")

    async def follow(self, lesson_id: str, after: int) -> dict[str, Any]:
        """What happened after so many events, as soon as there is something, or nothing after a while."""
        lesson = self.find(lesson_id)
        for _ in range(int(_FOLLOW / 0.1)):
            if len(lesson.events) > max(after, 0) or lesson.over or not self._worker.alive:
                break
            await asyncio.sleep(0.1)
        over = lesson.over  # before the events, so that none is missed
        return {"id": lesson.id, "name": lesson.name, "events": lesson.events[max(after, 0) :], "over": over}

    async def start(
        self,
        base: str,
        marks: Sequence[Mark],
        scenes: int,
        method: str,
        score: str | None,
        done: Callable[[Future[Any]], Awaitable[Any]],
    ) -> Lesson:
        """Begins to learn from marks and further scenes of the world.

        Args:
            base: The matcher whose model is taught, from bare on; its own adapter is not built upon.
            marks: Labelled pairs.
            scenes: How many labelled examples of the world join them.
            method: One of :data:`METHODS`.
            score: One of :data:`SCORES`; None is the matcher's own, or of an adapter ``denoising``.
            done: Waits for the worker.

        Raises:
            HttpError, OptionError, ManifestError: If it cannot begin.
        """
        self.check_free()
        if method not in METHODS or score not in SCORES:
            raise OptionError(f"got method {method!r} and score {score!r}, expected one of {METHODS} and {SCORES}")
        examples = _examples(marks, scenes, self._count)
        self._count += 1
        lesson = Lesson(token_hex(8), f"taught-{self._count}")
        self._lessons[lesson.id] = lesson
        try:
            matcher, original = await done(self._worker.change(lambda shelf: _copy(shelf, base, score)))
        except BaseException:
            lesson.over = True
            raise
        run = threading.Thread(
            target=self._learn, args=(lesson, matcher, original, examples, method), name=lesson.name, daemon=True
        )
        run.start()
        return lesson

    def _learn(self, lesson: Lesson, matcher: Any, original: Any, examples: list[Example], method: str) -> None:
        try:
            with TemporaryDirectory(prefix="dsd-lesson-") as folder:
                self._fit(lesson, matcher, examples, method, Path(folder))
                training = matcher.adapter.training
                matcher.save_pretrained(Path(folder) / lesson.name)
                lesson.archive = _zip(Path(folder) / lesson.name)
            adapter = matcher.adapter
            self._worker.change(lambda shelf: self._shelve(shelf, lesson.name, original, adapter)).result()
            lesson.say(
                "done",
                name=lesson.name,
                kept=bool(training["kept"]) if "kept" in training else True,
                before=training["validation"]["before"],
                after=training["validation"]["after"],
                low=training["validation"]["low"],
                high=training["validation"]["high"],
                held_out=training["validation_examples"],
                fewest=FEWEST,
                curve=[{k: point[k] for k in ("step", "accuracy") if k in point} for point in training["curve"]]
                if "curve" in training
                else [],
            )
        except _Stopped:
            lesson.say("stopped")
        except DsdError as error:
            lesson.say("failed", message=str(error))
        except Exception as error:
            lesson.say("failed", message=f"the server is at fault ({type(error).__name__}); please report it")
            raise
        finally:
            lesson.over = True

    def _fit(self, lesson: Lesson, matcher: Any, examples: list[Example], method: str, folder: Path) -> None:
        from dsd.learn import FitConfig

        def check(*_: Any) -> None:
            if lesson.stopped or not self._worker.alive:
                raise _Stopped

        matcher.backbone.denoiser.register_forward_pre_hook(check)
        # by turns where there are few examples, which costs one run a turn and one more; else once
        share = None if len(examples) < 24 else 0.33
        config = FitConfig(
            method=method,
            steps=self._config.lesson_steps,
            validation=share,
            check_every=max(1, min(20, self._config.lesson_steps // 4)),
        )
        runs = 4 if share is None else 1
        lesson.say("start", examples=len(examples), steps=config.steps, runs=runs, method=method)
        log = folder / "log.jsonl"
        finished = threading.Event()
        reader = threading.Thread(target=_tell, args=(lesson, log, finished), daemon=True)
        reader.start()
        try:
            matcher.fit(examples, config=config, log=log)
        finally:
            finished.set()
            reader.join()

    def _shelve(self, shelf: Shelf, name: str, original: Any, adapter: Any) -> None:
        from dsd.matcher import Matcher

        shelf.clear(original)
        shelf.add(name, Matcher(original, adapter=adapter))
        self._taught.add(name)
        kept = [lesson for lesson in self._lessons.values() if lesson.name in self._taught]
        for old in kept[: max(0, len(kept) - self._config.max_lessons)]:
            shelf.remove(old.name)
            self._taught.discard(old.name)
            del self._lessons[old.id]


def _copy(shelf: Shelf, base: str, score: str | None) -> tuple[Any, Any]:
    """A bare matcher on a copy of a model, and the model itself."""
    from dataclasses import replace

    from dsd.matcher import Matcher

    matcher = shelf.peek(base)
    original = getattr(matcher, "backbone", None)
    if original is None:
        raise OptionError(f"got model {base}, which cannot learn here, expected one of diffusion")
    shelf.clear(original)
    config = matcher.score_config
    if matcher.adapter is not None:
        own = matcher.adapter.score
        config = replace(own.bare or own, kind=score or "denoising", weights=None, layers=None)
    elif score is not None:
        config = replace(config, kind=score, layers=None)
    return Matcher(copy.deepcopy(original), config), original


def _examples(marks: Sequence[Mark], scenes: int, seed: int) -> list[Example]:
    """Choices between right and wrong pairs.

    Raises:
        OptionError: If nothing competes, or there is too little of it.
    """
    seen: dict[tuple[int, str], Mark] = {(id(m.image), m.text): m for m in marks}  # the last word on a pair counts
    rows = [{"image": m.image, "text": m.text, "label": int(m.right)} for m in seen.values()]
    found = list(read_table(rows, "marks")) if rows else []
    if scenes:
        found += world_task("winoground", "few-shot", "standard", scenes, seed)
    found = [e for e in found if len(e.positives) < len(e.pairs)]
    if len(found) < 4:
        raise OptionError(
            f"got {len(found)} pictures or captions with both right and wrong marks, expected 4 or more; mark more, or "
            "add scenes of the world"
        )
    return found


def _tell(lesson: Lesson, log: Path, finished: threading.Event) -> None:
    """Passes the log's lines on as they are written."""
    done = 0
    while True:
        last = finished.wait(0.2)
        try:
            lines = log.read_text("utf-8").splitlines(keepends=True)
        except OSError:
            lines = []
        for line in lines[done:]:
            if not line.endswith("\n"):
                break
            values = json.loads(line)
            lesson.say("step", run=values["run"], step=values["step"], loss=values.get("loss"))
            done += 1
        if last:
            return


def _zip(folder: Path) -> bytes:
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(folder.name) / path.relative_to(folder))
    return data.getvalue()
