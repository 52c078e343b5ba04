"""One thread that owns the models: what clients ask for waits in a queue, and pairs of many are scored in one call."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from dsd.contracts import Pair, ServiceError
from dsd.web.config import ServeConfig
from dsd.web.shelf import Shelf

T = TypeVar("T")

_ARRIVAL = 0.002
"""Seconds that a batch waits for a request which is being read."""


class Busy(ServiceError):
    """More waits than the queue holds."""


class Stopping(ServiceError):
    """The server is about to stop, and takes nothing more."""


@dataclass(eq=False)
class _Job:
    name: str
    size: int
    """Pairs; what is no scoring counts as one."""
    pairs: Sequence[Pair] | None = None
    call: Callable[[Any], Any] | None = None
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=monotonic)


@dataclass(frozen=True)
class _Batch:
    """What was scored last."""

    name: str = ""
    requests: int = 0
    left: int = 0
    """Requests that waited for the same matcher when it was done."""
    seconds: float = 0.0
    end: float = 0.0


class Worker:
    """Answers in the order of arrival, except that scoring for the same matcher is joined into one batch.

    A score does not depend on its batch, so clients get what they would get alone. While a batch is scored, the next
    one gathers: the more clients, the larger the batches.

    Args:
        shelf: Is this worker's from now on.
        config: Queue, batch size, and how long a batch waits.
        observe: Is told the pairs of each batch, how many requests they are of, and the seconds that scoring took.
    """

    def __init__(
        self, shelf: Shelf, config: ServeConfig, observe: Callable[[int, int, float], None] | None = None
    ) -> None:
        self._shelf, self._config, self._observe = shelf, config, observe
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._coming = 0
        self._last = _Batch()
        self._changed = threading.Condition()
        self._stopping = True
        self._thread: threading.Thread | None = None
        self.open()

    def open(self) -> None:
        """Takes requests, again if it was closed; nothing if it does already."""
        if self._stopping and self._thread is not None:
            self._thread.join()  # never two that own the models
        with self._changed:
            if not self._stopping:
                return
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="dsd-model", daemon=True)
            self._thread.start()

    @property
    def waiting(self) -> int:
        """Pairs in the queue."""
        return self._waiting

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request is read that will ask for scores: a batch that is not full waits a little for it."""
        self._coming += 1  # by the event loop alone
        try:
            yield
        finally:
            self._coming -= 1

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def score(self, name: str, pairs: Sequence[Pair]) -> Future[np.ndarray]:
        """Scores pairs with the matcher of a name: (n,) float32.

        Raises:
            Busy, Stopping: If it does not take them. What scoring raises is in the future.
        """
        return self._put(_Job(name, len(pairs), pairs=pairs))

    def run(self, name: str, call: Callable[[Any], T], size: int = 1) -> Future[T]:
        """Calls a function with the matcher of a name, while nothing else uses its model.

        Args:
            size: Pairs that it counts as in the queue.
        """
        return self._put(_Job(name, size, call=call))

    def change(self, call: Callable[[Shelf], T]) -> Future[T]:
        """Calls a function with the shelf, while nothing is scored."""
        return self._put(_Job("", 1, call=lambda _: call(self._shelf)))

    def close(self, timeout: float) -> None:
        """Takes nothing more, finishes what it took, and ends; what is not done in time is refused."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)  # if it takes longer, it ends with what it is at
        with self._changed:
            left, self._jobs, self._waiting = list(self._jobs), deque(), 0
        for job in left:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Stopping("got a request that was not reached before the stop; ask again"))

    def _put(self, job: _Job) -> Future[Any]:
        with self._changed:
            if self._stopping:
                raise Stopping("got a request while stopping, expected it before; ask again when the server is back")
            # one request is always taken, however large
            if self._jobs and self._waiting + job.size > self._config.queue:
                raise Busy(
                    f"got {job.size} pairs while {self._waiting} wait, expected at most {self._config.queue} in all; "
                    "ask again later"
                )
            self._jobs.append(job)
            self._waiting += job.size
            self._changed.notify_all()
        return job.future

    def _loop(self) -> None:
        while True:
            batch = self._take()
            if batch is None:
                return
            batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)
            del batch  # for its pictures are large, and the next one may be long in coming

    def _take(self) -> list[_Job] | None:
        """The next jobs, which are answered together; None at the end."""
        with self._changed:
            while not self._jobs:
                if self._stopping:
                    return None
                self._changed.wait()
            first = self._jobs[0]
            if first.pairs is not None:
                while not self._stopping and (left := self._worth_waiting(first)) > 0:
                    self._changed.wait(left)
            batch = [self._jobs.popleft()]
            size = first.size
            if first.pairs is not None:
                rest: deque[_Job] = deque()
                for job in self._jobs:
                    fits = job.pairs is not None and job.name == first.name and size + job.size <= self._config.batch
                    (batch if fits else rest).append(job)
                    size += job.size if fits else 0
                self._jobs = rest
            self._waiting -= size
            return batch

    def _worth_waiting(self, first: _Job) -> float:
        """Seconds that a batch waits for more; 0 for a client that is alone.

        Larger batches cost less a pair, and clients that got their answers tend to ask again: those of the last batch
        are waited for, but not for longer than a quarter of what it took.
        """
        ready = [job.size for job in self._jobs if job.pairs is not None and job.name == first.name]
        if sum(ready) >= self._config.batch:
            return 0.0
        longest, last = self._config.batch_wait, self._last
        until = [first.since + min(longest, _ARRIVAL)] if self._coming else []
        if last.name == first.name and len(ready) < last.requests + last.left:
            until.append(last.end + min(longest, last.seconds / 4))
        return max(until, default=0.0) - monotonic()

    def _answer(self, batch: list[_Job]) -> None:
        first = batch[0]
        try:
            matcher = self._shelf.use(first.name) if first.name else None
            if first.call is not None:
                first.future.set_result(first.call(matcher))
                return
            assert matcher is not None
            pairs = [pair for job in batch for pair in job.pairs or ()]
            began = monotonic()
            with self._shelf.threads(first.name, len(pairs)):
                scores = np.asarray(matcher.predict(pairs), np.float32)
            seconds = monotonic() - began
            left = sum(job.pairs is not None and job.name == first.name for job in list(self._jobs))
            self._last = _Batch(first.name, len(batch), left, seconds, began + seconds)
            if self._observe is not None:
                self._observe(len(pairs), len(batch), seconds)
        except BaseException as error:
            if len(batch) == 1:
                first.future.set_exception(error)
                return
            for job in batch:  # one of them is at fault, and the others shall not suffer for it
                self._answer([job])
            return
        start = 0
        for job in batch:
            job.future.set_result(scores[start : start + job.size])
            start += job.size
