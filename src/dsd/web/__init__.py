"""The playground and the HTTP API: a matcher behind a web server.

from dsd.web import ServeConfig, create_app

app = create_app(matcher, ServeConfig())      # any ASGI server runs it; `dsd serve` does so with uvicorn
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsd.web.app import create_app
    from dsd.web.config import ServeConfig
    from dsd.web.shelf import Shelf

__all__ = ["ServeConfig", "Shelf", "create_app"]

_HOMES = {"ServeConfig": "dsd.web.config", "Shelf": "dsd.web.shelf", "create_app": "dsd.web.app"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
