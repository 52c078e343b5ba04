"""The command line as a whole: the parser, and what becomes of errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from dsd.cli import embedded, learning, measuring, models, scoring, serve
from dsd.cli.options import Commands
from dsd.contracts import DsdError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 if done, 2 if the request cannot be met, 1 for a fault of ours."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except DsdError as error:
        print(f"dsd {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dsd {arguments.command}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("DSD_DEBUG"):
            raise
        kind, what = type(error).__name__, " ".join(str(error).split())
        print(
            f"dsd {arguments.command}: fault: {kind}: {what}; this is our mistake, please report it with what "
            "DSD_DEBUG=1 prints",
            file=sys.stderr,
        )
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsd", description="Match images and texts with a text-to-image diffusion model, zero-shot or taught."
    )
    commands = Commands(parser)
    for group in (scoring, learning, measuring, models, embedded, serve):
        group.add(commands)
    return parser
