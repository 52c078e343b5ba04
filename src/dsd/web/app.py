"""The application: the API under ``/v1``, the playground at ``/``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dsd import __version__
from dsd.contracts import DsdError, MatcherProtocol, OptionError, Ranked
from dsd.images import content_hash
from dsd.race import Budget
from dsd.web import wire
from dsd.web.config import ServeConfig
from dsd.web.guard import Guard, Meters
from dsd.web.shelf import Shelf
from dsd.web.wire import HttpError
from dsd.web.worker import Worker

T = TypeVar("T")
R = TypeVar("R", bound=wire.Body)

log = logging.getLogger("dsd.web")

_ABOUT = """How well captions explain images, scored by a text-to-image diffusion model. Higher scores are better.

Images come in base64 or as files of a form; the server opens no addresses and no paths of its own. Errors are
`{"error": {"code", "message"}}`, and the message says what was got, what was expected and what to do. With a token,
send `Authorization: Bearer TOKEN`."""

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": wire.Error, "description": "A form that cannot be read"},
    401: {"model": wire.Error, "description": "No token, or another one"},
    403: {"model": wire.Error, "description": "Asked by another site's page"},
    404: {"model": wire.Error, "description": "A model that is not there"},
    408: {"model": wire.Error, "description": "The request took too long to arrive"},
    413: {"model": wire.Error, "description": "Beyond a limit of size or count"},
    415: {"model": wire.Error, "description": "Another content type"},
    421: {"model": wire.Error, "description": "Asked under a name that is not this server's"},
    422: {"model": wire.Error, "description": "An image, a text or an option that cannot be met"},
    429: {"model": wire.Error, "description": "The queue is full; Retry-After says when to ask again"},
    503: {
        "model": wire.Error,
        "description": "Busy, stopping, or too slow; Retry-After says when to ask again",
    },
}


class Service:
    """What the routes share: the worker, the names on its shelf, limits and meters."""

    def __init__(self, shelf: Shelf, config: ServeConfig) -> None:
        if not len(shelf):
            raise OptionError("got no model to serve, expected at least one")
        self.config, self.meters = config, Meters()
        self.taught: set[str] = set()
        """Names of what was learned in the playground."""
        self._shelf = shelf
        self._pictures: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()
        self.worker = Worker(shelf, config, self.meters.observe)
        self.meters.waiting.set_function(lambda: self.worker.waiting)

    def name_of(self, name: str | None) -> str:
        """A model that is on the shelf; None means the default."""
        if name is None:
            return self._shelf.default
        if name not in self._shelf:
            raise HttpError(
                404, "not_found", f"got model {name[:80]!r}, expected one of {', '.join(self._shelf)}; see /v1/models"
            )
        return name

    def peek(self, name: str) -> Any:
        """A matcher for its configuration alone."""
        return self._shelf.peek(name)

    def cards(self) -> list[wire.ModelCard]:
        """What is on the shelf, the default first."""
        found = []
        for name in list(self._shelf):
            matcher = self.peek(name)
            found.append(
                wire.ModelCard(
                    name=name,
                    default=name == self._shelf.default,
                    calibrated=scale_of(matcher) is not None,
                    scale=scale_of(matcher),
                    adapter=getattr(matcher, "adapter", None) is not None,
                    taught=name in self.taught,
                    explains=getattr(matcher, "explains", hasattr(matcher, "explain")),
                    size=matcher.config.get("size"),
                    config=_plain(dict(matcher.config)),
                )
            )
        return found

    async def read(self, request: Request, kind: type[R]) -> R:
        return await wire.read_request(request, kind, self.config)

    async def asked(self, request: Request, kind: type[R]) -> tuple[R, str, list[Image.Image]]:
        """A request for scores, the name of the model it is for, and its images."""
        with self.worker.coming():
            found = await self.read(request, kind)
            name = self.name_of(getattr(found, "model", None))
            return found, name, await self.images(getattr(found, "images", ()), name)

    async def images(self, texts: Sequence[str], name: str) -> list[Image.Image]:
        """Images of a request => RGB of the model's size, decoded beside the event loop.

        Pictures of the same pixels are one object for as long as any request needs them, whoever sent them: a matcher
        does once for an object what does not depend on its caption.
        """
        size = self.peek(name).config.get("size")

        def decode() -> list[tuple[str, Image.Image]]:
            found = [wire.read_image(text, f"image {i}", self.config, size) for i, text in enumerate(texts)]
            return [(content_hash(image), image) for image in found]

        return [self._pictures.setdefault(key, image) for key, image in await to_thread.run_sync(decode)]

    async def done(self, future: Future[T]) -> T:
        """What the worker makes of it, within the time that a request has."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.config.timeout)
        except TimeoutError:
            raise HttpError(
                503, "timeout", f"got no answer within {self.config.timeout:g} s; ask again later, or for less"
            ) from None

    async def scores(self, name: str, pairs: Sequence[tuple[Image.Image, str]]) -> np.ndarray:
        return await self.done(self.worker.score(name, pairs))

    async def race(
        self, name: str, images: Sequence[Image.Image], texts: Sequence[str], asked: int | str
    ) -> list[wire.Candidate]:
        """Texts for one image, or images for one text, best first, within a budget."""
        budget = Budget.of(asked)
        if not hasattr(self.peek(name), "race"):
            raise HttpError(422, "option", f"got a budget for {name}, which knows none, expected a request without one")
        if budget.seconds is not None and budget.seconds > self.config.timeout:
            raise HttpError(
                422, "option", f"got a budget of {budget.seconds:g} s, expected at most {self.config.timeout:g}"
            )
        one = len(images) == 1
        candidates: Sequence[Any] = texts if one else images

        def call(matcher: Any) -> list[Ranked]:
            with self._shelf.threads(name, len(candidates)):
                found: list[Ranked] = matcher.rank(images[0] if one else texts[0], candidates, budget=budget)
                return found

        names = texts if one else [f"image {i}" for i in range(len(images))]
        return [
            wire.Candidate(
                rank=k + 1,
                index=found.index,
                candidate=names[found.index],
                score=found.score,
                probability=None,
                interval=None if found.interval is None or not np.isfinite(found.interval).all() else found.interval,
                passes=found.passes,
            )
            for k, found in enumerate(await self.done(self.worker.run(name, call, size=len(candidates))))
        ]


def scale_of(matcher: Any) -> float | None:
    """What turns scores into log-odds; None if the matcher is not calibrated."""
    scale: float | None = getattr(matcher, "scale", None)
    return scale


def shares(scores: np.ndarray, scale: float) -> np.ndarray:
    """Scores of one choice a row => probabilities that sum to one, as :meth:`dsd.Matcher.probability` has them."""
    logits = scale * scores.astype(np.float64)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    found: np.ndarray = odds / odds.sum(-1, keepdims=True)
    return found


def create_app(
    matchers: MatcherProtocol | Mapping[str, MatcherProtocol] | Shelf, config: ServeConfig | None = None
) -> FastAPI:
    """The ASGI application.

    Args:
        matchers: One, several by name, or a shelf; it is the application's from now on.
        config: Limits and settings.

    Raises:
        OptionError: If there is nothing to serve.
    """
    config = config or ServeConfig()
    service = Service(matchers if isinstance(matchers, Shelf) else Shelf(matchers), config)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.open()  # an application can be started again
        try:
            yield
        finally:
            await to_thread.run_sync(service.worker.close, config.drain)

    app = FastAPI(
        title="dsd",
        summary="Match images and texts with text-to-image diffusion models",
        description=_ABOUT,
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # both of FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        lifespan=life,
    )
    app.state.service = service
    _handle_errors(app)
    _add_api(app, service)
    from dsd.web.playground import add_playground

    add_playground(app, service)
    app.add_middleware(Guard, config=config, meters=service.meters)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    def post(path: str, kind: type[wire.Body], answer: type[BaseModel], summary: str) -> Callable[..., Any]:
        return app.post(
            f"/v1/{path}",
            response_model=answer,
            responses=_ERRORS,
            summary=summary,
            description=kind.__doc__ or "",
            operation_id=path,
            openapi_extra={"requestBody": request_body(kind)},
            tags=["matching"],
        )

    def get(path: str, **options: Any) -> Callable[..., Any]:
        errors: dict[int | str, dict[str, Any]] = {status: _ERRORS[status] for status in (401, 403, 421, 503)}
        return app.get(f"/v1/{path}", operation_id=path, responses=errors, tags=["server"], **options)

    @get("health", summary="Whether the server answers", response_model=wire.Health)
    async def health(response: Response) -> dict[str, str]:
        if not service.worker.alive:
            response.status_code = 503
            return {"status": "stopping"}
        return {"status": "ok"}

    @get("models", summary="Models and adapters that requests may choose, and the limits", response_model=wire.Models)
    async def models() -> wire.Models:
        return wire.Models(
            models=service.cards(), limits=service.config.limits(), teaches=service.config.teach, version=__version__
        )

    @get("metrics", summary="What Prometheus scrapes", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.meters.registry), media_type=CONTENT_TYPE_LATEST)

    @post("score", wire.ScoreRequest, wire.Scores, "Score every image against every text")
    async def score(request: Request) -> wire.Scores:
        asked, name, images = await service.asked(request, wire.ScoreRequest)
        flat = await service.scores(name, [(image, text) for image in images for text in asked.texts])
        table = flat.reshape(len(images), len(asked.texts))
        scale = scale_of(service.peek(name))
        return wire.Scores(
            model=name,
            images=[f"image {i}" for i in range(len(images))],
            texts=asked.texts,
            scores=table.tolist(),
            probabilities=None if scale is None else shares(table, scale).tolist(),
        )

    @post("predict", wire.PredictRequest, wire.Predictions, "Score some pairs of images and texts")
    async def predict(request: Request) -> wire.Predictions:
        asked, name, images = await service.asked(request, wire.PredictRequest)
        scores = await service.scores(name, [(images[i], asked.texts[j]) for i, j in asked.pairs])
        return wire.Predictions(model=name, scores=scores.tolist())

    @post("rank", wire.RankRequest, wire.Ranking, "Rank texts for one image, or images for one text")
    async def rank(request: Request) -> wire.Ranking:
        asked, name, images = await service.asked(request, wire.RankRequest)
        if asked.budget is not None:
            return wire.Ranking(model=name, ranking=await service.race(name, images, asked.texts, asked.budget))
        flat = await service.scores(name, [(image, text) for image in images for text in asked.texts])
        scale = scale_of(service.peek(name))
        # probabilities are of texts given an image
        odds = None if scale is None or len(images) > 1 else shares(flat, scale)
        order = np.argsort(-flat, kind="stable").tolist()
        names = asked.texts if len(images) == 1 else [f"image {i}" for i in range(len(images))]
        return wire.Ranking(
            model=name,
            ranking=[
                wire.Candidate(
                    rank=k + 1,
                    index=i,
                    candidate=names[i],
                    score=float(flat[i]),
                    probability=None if odds is None else float(odds[i]),
                )
                for k, i in enumerate(order)
            ],
        )

    @post("explain", wire.ExplainRequest, wire.Explained, "Show where in an image each word is seen")
    async def explain(request: Request) -> dict[str, Any]:
        asked = await service.read(request, wire.ExplainRequest)
        name = explaining(asked.model)
        (image,) = await service.images([asked.image], name)
        found = await service.done(
            service.worker.run(
                name, lambda m: explained(m.explain(image, asked.text), asked.side), size=len(asked.text.split())
            )
        )
        return {"model": name, **found}

    @post("compare", wire.CompareRequest, wire.Compared, "Show where two captions, or two images, differ")
    async def compare(request: Request) -> dict[str, Any]:
        asked = await service.read(request, wire.CompareRequest)
        name = explaining(asked.model)
        images = await service.images(asked.images, name)

        def call(matcher: Any) -> dict[str, Any]:
            if len(images) == 1:
                return explained(matcher.compare_texts(images[0], *asked.texts), asked.side)
            return explained(matcher.compare_images(asked.texts[0], *images), asked.side)

        words = sum(len(text.split()) for text in asked.texts)
        return {"model": name, **await service.done(service.worker.run(name, call, size=words))}

    def explaining(asked: str | None) -> str:
        name = service.name_of(asked)
        if not hasattr(service.peek(name), "explain"):
            raise HttpError(422, "option", f"got model {name}, which cannot explain, expected another; see /v1/models")
        return name


def explained(explanation: Any, side: int) -> dict[str, Any]:
    """An explanation as plain values."""
    found: dict[str, Any] = _plain(explanation.to_dict(side=side))
    return found


def request_body(kind: type[wire.Body]) -> dict[str, Any]:
    """The body of a request in OpenAPI: JSON, or a form whose images are files."""
    schema = kind.model_json_schema()
    example = schema.pop("examples")[0]
    fields: dict[str, Any] = {}
    for name, value in schema["properties"].items():
        file = {"type": "string", "format": "binary"}
        if name == "pairs":
            value = {"type": "array", "items": {"type": "string", "example": "0,1"}}
        elif name in kind.files:
            value = {"type": "array", "items": file, "minItems": 1} if name == "images" else file
        fields[name] = value
    form = {**{k: v for k, v in schema.items() if k != "properties"}, "properties": fields}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema, "example": example},
            "multipart/form-data": {"schema": form},
        },
    }


def _plain(value: Any) -> Any:
    """Values that JSON has: whatever else a matcher of someone else's puts into its configuration becomes text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _handle_errors(app: FastAPI) -> None:
    def add(kind: type[Exception], make: Callable[[Any], HttpError]) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            found = make(error)
            return JSONResponse(found.body(), found.status, found.headers)

        handler: Callable[[Request, Exception], Awaitable[Response]] = handle
        app.add_exception_handler(kind, handler)

    def unrouted(error: HTTPException) -> HttpError:
        code = {404: "not_found", 405: "method"}.get(error.status_code, "option")
        message = {
            404: "got a path that is not here, expected one of those that /docs lists",
            405: "got a method that this path does not have; /docs lists what there is",
        }.get(error.status_code, str(error.detail))
        return HttpError(error.status_code, code, message, error.headers)

    add(HttpError, lambda error: error)
    add(DsdError, HttpError.of)
    add(HTTPException, unrouted)
    add(
        RequestValidationError,
        lambda error: HttpError(422, "option", f"got an option that is not understood: {error.errors()[0]['msg']}"),
    )
