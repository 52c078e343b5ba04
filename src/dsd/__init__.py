"""Match images and texts with text-to-image diffusion models.

    import dsd

    matcher = dsd.Matcher.from_pretrained("tiny")
    table = matcher.score(["a.png", "b.png"], ["a red circle left of a blue square"])
    table.scores                                   # (images, texts), higher is a better match

The names below are imported when they are first used, so that ``import dsd`` costs nothing. Evaluation lives in
:mod:`dsd.evaluate`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd.client import Client
    from dsd.contracts import DsdError, Example, ScoreTable
    from dsd.images import load_image
    from dsd.matcher import Matcher
    from dsd.tasks import read_manifest

    __version__: str

__all__ = ["Client", "DsdError", "Example", "Matcher", "ScoreTable", "__version__", "load_image", "read_manifest"]

# A name here must not be the name of a submodule too: importing that submodule would replace it.
_HOMES = {
    "Client": "dsd.client",
    "DsdError": "dsd.contracts",
    "Example": "dsd.contracts",
    "Matcher": "dsd.matcher",
    "ScoreTable": "dsd.contracts",
    "load_image": "dsd.images",
    "read_manifest": "dsd.tasks",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("discriminative-diffusion")
    except PackageNotFoundError:  # used from the source tree, not installed
        return "0+unknown"
