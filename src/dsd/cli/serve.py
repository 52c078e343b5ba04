"""The command that serves: ``serve``, the playground and the HTTP API."""

from __future__ import annotations

import argparse
import os
import sys

from dsd.cli.options import SCORE_KINDS, Commands
from dsd.contracts import OptionError


def add(commands: Commands) -> None:
    """Adds this command."""
    serve = commands.add("serve", _serve, "Open the playground in a browser, and answer the HTTP API.", form=False)
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=None, help="open a browser; default: at a terminal"
    )
    group = serve.add_argument_group("models")
    group.add_argument("--model", action="append", default=[], metavar="M", help="repeat for more (default: tiny)")
    group.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR", help="what was learned; repeat for more"
    )
    group.add_argument("--score", choices=SCORE_KINDS, help="of the models without adapter (default: denoising)")
    group.add_argument("--device", metavar="D", help="such as cpu or cuda (default: a GPU if there is one)")
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    group = serve.add_argument_group("who may ask, and how much")
    group.add_argument("--token-file", metavar="FILE", help="holds the token that clients must send; or set DSD_TOKEN")
    group.add_argument("--public", action="store_true", help="anyone who reaches --host may ask, without a token")
    group.add_argument(
        "--frame-ancestor", action="append", default=[], metavar="ORIGIN", help="may show the page in a frame"
    )
    group.add_argument("--no-teach", action="store_true", help="the playground does not learn")
    group.add_argument("--max-pairs", type=int, metavar="N", help="pairs a request")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds a request")
    group.add_argument("--queue", type=int, metavar="N", help="pairs that wait at most")
    group.add_argument("--batch", type=int, metavar="N", help="pairs scored at once")


def _serve(a: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise OptionError(
            "got an installation without the server, expected its packages; pip install "
            "'discriminative-diffusion[serve]'"
        ) from None
    from dsd.web.config import ServeConfig

    given = {"max_pairs": a.max_pairs, "timeout": a.timeout, "queue": a.queue, "batch": a.batch}
    config = ServeConfig(
        host=a.host,
        port=a.port,
        token=_token(a.token_file),
        public=a.public,
        frame_ancestors=tuple(a.frame_ancestor),
        teach=not a.no_teach,
        **{name: value for name, value in given.items() if value is not None},
    )
    adapters: dict[str, str] = {}
    for text in a.adapter:
        name, separator, folder = text.partition("=")
        name, folder = (name, folder) if separator else (os.path.basename(os.path.normpath(text)), text)
        if name in adapters or name in a.model:
            raise OptionError(f"got the name {name!r} twice, expected names that differ; use --adapter NAME=DIR")
        adapters[name] = folder

    from dsd.web.server import address, listen, run

    bound = listen(config)  # before the model, which may take long to load
    try:
        import torch

        from dsd.web.app import create_app
        from dsd.web.shelf import Shelf

        shelf = Shelf.load(a.model, adapters, score=a.score, device=a.device, dtype=getattr(torch, a.dtype))
        url = address(config, bound)

        def ready() -> None:
            print(f"dsd serve: {url}   (models: {', '.join(shelf)}; Ctrl-C stops)", flush=True)
            if a.open or (a.open is None and sys.stdout.isatty()):
                import threading
                import webbrowser

                threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

        run(create_app(shelf, config), config, bound, ready)
    finally:
        bound.close()


def _token(file: str | None) -> str | None:
    """From a file or the environment, never from the command line, which others on the machine can read."""
    if file is None:
        return os.environ.get("DSD_TOKEN") or None
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: got no token ({error}), expected a text file that holds it") from None
