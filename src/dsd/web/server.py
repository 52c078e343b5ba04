"""Runs the application until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from dsd.contracts import OptionError
from dsd.web.config import ServeConfig


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens where the configuration says.

    Raises:
        OptionError: The address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # with its protocol said, for otherwise asyncio leaves Nagle's algorithm on, and each answer waits 40 ms for an ACK
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((config.host, config.port))
    except OSError as error:
        found.close()
        raise OptionError(
            f"got {config.host} port {config.port}, which cannot be listened on ({error.strerror or error}); choose "
            "another --port, or 0 for a free one"
        ) from None
    return found


def address(config: ServeConfig, bound: socket.socket) -> str:
    """Where a browser finds the page, which asks for the token: commands and logs are read by others."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"http://{host}:{bound.getsockname()[1]}/"


def run(app: FastAPI, config: ServeConfig, bound: socket.socket, ready: Callable[[], None] | None = None) -> None:
    """Serves until SIGINT or SIGTERM, and then finishes what it took.

    Args:
        ready: Is called once requests are answered.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if ready is not None and self.started:
                ready()

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(max(1, config.drain)),
        ws="none",
        backlog=512,
    )
    Server(settings).run(sockets=[bound])
