"""Many clients against one server on the embedded model: errors, equal answers, throughput, latency.

    python benchmarks/serve.py [--seconds 60] [--clients 32] [--out docs/results/serve.json]

Every request scores one pair, drawn at random from a pool whose scores the local matcher gave before; an answer that
differs by more than 1e-5 counts as wrong. First one client asks for a third of the time, then all of them at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

import httpx2
import numpy as np

from dsd.client import Client
from dsd.evaluate import installed_versions, write_text
from dsd.matcher import Matcher
from dsd.tasks import world_task
from machine import cpu_name

TOLERANCE = 1e-5


def main() -> None:
    """Measures, prints a summary and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--score", default="denoising")
    parser.add_argument("--pool", type=int, default=16, help="images, and captions")
    parser.add_argument("--out", default=None)
    a = parser.parse_args()
    examples = world_task("comvg", "test", "easy", 2 * a.pool, 0)
    images = [e.images[0] for e in examples[: a.pool]]
    texts = list(dict.fromkeys(e.texts[0] for e in examples))[: a.pool]
    right = Matcher.from_pretrained("tiny", score=a.score).score(images, texts).scores
    command = [sys.executable, "-m", "dsd.cli", "serve", "--port", "0", "--no-open", "--score", a.score]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2]
            started = time.perf_counter() - began
            pool = (images, texts, right)
            load(url, 1, 2.0, pool)  # what is loaded when it is first used
            one = load(url, 1, a.seconds / 3, pool)
            many = load(url, a.clients, a.seconds, pool)
        finally:
            process.terminate()
    result = {
        "command": f"python benchmarks/serve.py --seconds {a.seconds:g} --clients {a.clients} --score {a.score}",
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "pool": {"images": len(images), "texts": len(texts)},
        "versions": dict(installed_versions()),
        "start_seconds": round(started, 2),
        "one_client": one,
        "many_clients": many,
        "speedup": round(many["requests_per_second"] / one["requests_per_second"], 2),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if a.out is not None:
        write_text(a.out, text)


def load(url: str, clients: int, seconds: float, pool: tuple[Any, Any, np.ndarray]) -> dict[str, Any]:
    """Asks with so many clients at once; each asks again as soon as it has its answer."""
    images, texts, right = pool
    until = time.perf_counter() + seconds
    took: list[float] = []
    errors: list[str] = []
    worst = [0.0]

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        with Client(url) as client:
            _ = client.config
            while time.perf_counter() < until:
                i, j = rng.randrange(len(images)), rng.randrange(len(texts))
                began = time.perf_counter()
                try:
                    (score,) = client.predict([(images[i], texts[j])])
                except Exception as error:
                    errors.append(f"{type(error).__name__}: {error}")
                    continue
                took.append(time.perf_counter() - began)
                worst[0] = max(worst[0], abs(float(score) - float(right[i, j])))

    before = _batches(url)
    began = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    requests, batches, scoring = np.subtract(_batches(url), before)
    return {
        "clients": clients,
        "seconds": round(wall, 1),
        "requests": len(took),
        "errors": len(errors),
        "first_errors": errors[:3],
        "largest_difference": worst[0],
        "wrong": worst[0] > TOLERANCE,
        "requests_per_second": round(len(took) / wall, 2),
        "latency_ms": {f"p{q}": round(1000 * float(np.percentile(took, q)), 1) for q in (50, 95, 99)},
        "requests_per_batch": round(requests / batches, 2),
        "scoring_ms_per_request": round(1000 * scoring / requests, 2),
        "share_of_time_scoring": round(scoring / wall, 3),
    }


def _batches(url: str) -> tuple[float, float, float]:
    """Requests answered, batches scored and seconds of scoring so far, as the server counts them."""
    text = httpx2.get(f"{url}v1/metrics").text
    found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    return found["dsd_batch_requests_sum"], found["dsd_batch_requests_count"], found["dsd_batch_seconds_sum"]


if __name__ == "__main__":
    main()
