"""The command line: parses arguments, calls the library, prints results to stdout and everything else to stderr."""

from dsd.cli.app import main

__all__ = ["main"]
