"""What every request passes: who may ask, how many at once, headers of every answer, and what is counted."""

from __future__ import annotations

import hmac
import json
import re
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsd.web.config import ServeConfig
from dsd.web.wire import HttpError

OPEN = ("/", "/docs", "/v1/health", "/v1/openapi.json")
"""Paths that ask for no token: they say nothing that the package does not."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Meters:
    """What is measured, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "dsd_requests", "Answers, by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "dsd_request_seconds",
            "From a request's arrival to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.active = Gauge("dsd_requests_active", "Requests in work", registry=self.registry)
        self.waiting = Gauge("dsd_pairs_waiting", "Pairs that wait for the model", registry=self.registry)
        self.pairs = Counter("dsd_pairs", "Pairs scored", registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
        self.batch_pairs = Histogram("dsd_batch_pairs", "Pairs of a batch", buckets=sizes, registry=self.registry)
        self.batch_requests = Histogram(
            "dsd_batch_requests", "Requests answered by a batch", buckets=sizes, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "dsd_batch_seconds", "Scoring of a batch", buckets=_SECONDS, registry=self.registry
        )

    def observe(self, pairs: int, requests: int, seconds: float) -> None:
        """Counts a batch."""
        self.pairs.inc(pairs)
        self.batch_seconds.observe(seconds)
        self.batch_pairs.observe(pairs)
        self.batch_requests.observe(requests)


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, config: ServeConfig, meters: Meters) -> None:
        self.app, self.config, self.meters = app, config, meters
        self._active = 0
        frames = " ".join(config.frame_ancestors) or "'none'"
        policy = (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
            f"base-uri 'none'; form-action 'none'; frame-ancestors {frames}"
        )
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = perf_counter()
        status = 500
        started = False

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                kept = [h for h in message.get("headers", []) if h[0].lower() != b"server"]
                own = {name for name, _ in kept}
                message = {**message, "headers": [*kept, *(h for h in self._headers if h[0] not in own)]}
            await send(message)

        self._active += 1
        self.meters.active.set(self._active)
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, answer)
            else:
                await _send(refusal, answer)
        except Exception:
            if not started:
                await _send(
                    HttpError(500, "fault", "the server is at fault, and its log says how; please report it"), answer
                )
            raise
        finally:
            self._active -= 1
            self.meters.active.set(self._active)
            route = getattr(scope.get("route"), "path", None) or "other"
            self.meters.requests.labels(route, str(status)).inc()
            self.meters.seconds.labels(route).observe(perf_counter() - began)

    def _refusal(self, scope: Scope) -> HttpError | None:
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        host = headers.get(b"host", b"").decode("latin-1").lower()
        allowed = self.config.allowed_hosts
        if allowed is not None and _name(host) not in allowed:
            return HttpError(
                421,
                "forbidden",
                f"got a request for the host {_name(host)[:80]!r}, expected one of {', '.join(allowed)}",
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:  # another site's page asks in its visitor's name
            return HttpError(403, "forbidden", "got a request from another site's page, expected one of this server's")
        path = scope["path"]
        if self.config.token is not None and path not in OPEN and not path.startswith("/static/"):
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            same = hmac.compare_digest(given.strip(), self.config.token.encode())
            if kind.lower() != b"bearer" or not same:
                return HttpError(
                    401,
                    "unauthorized",
                    "got no token, or another one, expected the server's; send it as Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
        if self._active > self.config.connections and path != "/v1/health":
            return HttpError(503, "busy", f"got more than {self.config.connections} requests at once; ask again later")
        return None


def _name(host: str) -> str:
    """The name in a Host header: without its port, and IPv6 without brackets."""
    found = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", host)
    return host if found is None else found[1] or found[2] or ""


async def _send(error: HttpError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # what is refused unread must not be taken for the next request
    headers += [(b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
