"""What goes over the wire: requests under their limits, images, answers, errors."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Mapping
from io import BytesIO
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dsd.contracts import (
    AdapterError,
    DsdError,
    ImageError,
    ManifestError,
    ModelError,
    OptionError,
    ServiceError,
    TextError,
)
from dsd.images import decode_image, resize_crop
from dsd.web.config import ServeConfig
from dsd.web.worker import Busy, Stopping

CODES: dict[str, type[DsdError]] = {
    "image": ImageError,
    "text": TextError,
    "manifest": ManifestError,
    "model": ModelError,
    "adapter": AdapterError,
    "option": OptionError,
    "too_large": OptionError,
    "not_found": OptionError,
    "media": OptionError,
    "method": OptionError,
    "unauthorized": ServiceError,
    "forbidden": ServiceError,
    "busy": ServiceError,
    "stopping": ServiceError,
    "timeout": ServiceError,
    "slow": ServiceError,
    "fault": ServiceError,
}
"""Codes of errors, and what a client raises for them."""

_STATUS = {Busy: (429, "busy"), Stopping: (503, "stopping"), ServiceError: (503, "busy")}


class HttpError(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", "1")

    @classmethod
    def of(cls, error: DsdError) -> HttpError:
        """An error of the library as an answer: 422, but 500 if the model is at fault, 429 and 503 if busy."""
        for kind, (status, code) in _STATUS.items():
            if isinstance(error, kind):
                return cls(status, code, str(error))
        code = next((c for c, kind in CODES.items() if type(error) is kind), "option")
        return cls(500 if code == "model" else 422, code, str(error))

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message}}


# Requests

_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAGklEQVR4nGP8z4AdMOEQZ2BhYPiPVWKIAgA0gQEPmXyF3gAAAABJRU5ErkJggg=="
)
_RED = "a red circle left of a blue square"
_BLUE = "a blue square left of a red circle"

ImageText = Annotated[
    StrictStr,
    Field(
        min_length=1,
        description="An image file (PNG, JPEG, WebP, GIF, BMP, TIFF or PPM) in base64, or as a data: URL. Other "
        "addresses and paths are refused.",
    ),
]
Caption = Annotated[StrictStr, Field(min_length=1, description="A caption, with at least one word.")]
Model = Annotated[
    StrictStr | None, Field(default=None, description="A name that /v1/models lists; default: the first of them.")
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    files: ClassVar[tuple[str, ...]] = ()
    """Fields that a form may bring as files."""


class ScoreRequest(Body):
    """Every image against every text."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [_PNG], "texts": [_RED, _BLUE]}]})
    files = ("images",)

    images: list[ImageText] = Field(min_length=1)
    texts: list[Caption] = Field(min_length=1)
    model: Model


class PredictRequest(Body):
    """Some pairs of images and texts, by their indices."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": [_PNG], "texts": [_RED, _BLUE], "pairs": [[0, 0], [0, 1]]}]}
    )
    files = ("images",)

    images: list[ImageText] = Field(min_length=1)
    texts: list[Caption] = Field(min_length=1)
    pairs: list[Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=2, max_length=2)]] = Field(
        min_length=1, description="[image, text] indices, from 0."
    )
    model: Model


class RankRequest(Body):
    """Texts for one image, or images for one text, best first."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [_PNG], "texts": [_RED, _BLUE]}]})
    files = ("images",)

    images: list[ImageText] = Field(min_length=1, description="One, or with one text several.")
    texts: list[Caption] = Field(min_length=1, description="One, or with one image several.")
    model: Model
    budget: Annotated[StrictInt, Field(ge=1, lt=2**31)] | Annotated[StrictStr, Field(max_length=20)] | None = Field(
        default=None,
        examples=[2400],
        description="What it may cost: passes of the denoiser (2400), or seconds (10s). They go to candidates that can "
        "still come first. Default: all passes for all candidates.",
    )


class ExplainRequest(Body):
    """Where in an image each word of a text is seen."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"image": _PNG, "text": _RED}]})
    files = ("image",)

    image: ImageText
    text: Caption
    model: Model
    side: StrictInt = Field(default=64, ge=8, le=1024, description="Maps come with at most so many pixels a side.")


class CompareRequest(Body):
    """Where two captions of one image, or two images of one caption, disagree."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"images": [_PNG], "texts": [_RED, _BLUE]}]})
    files = ("images",)

    images: list[ImageText] = Field(min_length=1, max_length=2, description="One, or with one text two.")
    texts: list[Caption] = Field(min_length=1, max_length=2, description="Two, or with two images one.")
    model: Model
    side: StrictInt = Field(default=64, ge=8, le=1024, description="Maps come with at most so many pixels a side.")


# Answers


class Health(BaseModel):
    status: Literal["ok", "stopping"]


class ModelCard(BaseModel):
    name: str
    default: bool
    calibrated: bool = Field(description="Whether probabilities are given.")
    scale: float | None = Field(description="Turns scores into log-odds: probabilities are softmax(scale x scores).")
    adapter: bool = Field(description="Whether something was learned.")
    taught: bool = Field(description="Whether it was learned in the playground.")
    explains: bool
    size: int | None = Field(description="Pixels a side that images are resized and centre-cropped to.")
    config: dict[str, Any] = Field(description="Everything that decides the scores.")


class Models(BaseModel):
    models: list[ModelCard]
    limits: dict[str, int]
    teaches: bool = Field(description="Whether the playground learns from marks.")
    version: str


class Scores(BaseModel):
    """Scores (higher is better) and, where the model is calibrated, probabilities that sum to one for each image."""

    model: str
    images: list[str]
    texts: list[str]
    scores: list[list[float]]
    probabilities: list[list[float]] | None


class Predictions(BaseModel):
    model: str
    scores: list[float]


class Candidate(BaseModel):
    rank: int
    index: int
    candidate: str
    score: float = Field(description="Higher is a better match; with a budget and one image, up to a number.")
    probability: float | None
    interval: tuple[float, float] | None = Field(
        default=None,
        description="With a budget: 95 % interval of what the whole score would be; null after one pass.",
    )
    passes: int | None = Field(default=None, description="With a budget: passes that were spent on it.")


class Ranking(BaseModel):
    model: str
    ranking: list[Candidate]


class Explained(BaseModel):
    """Maps of words over the picture as the model saw it, and shares of the score."""

    model_config = ConfigDict(extra="allow")

    model: str
    image: str = Field(description="A PNG as a data URL; maps lie on its pixels.")
    text: str
    words: list[str]
    maps: list[list[list[float]]] = Field(description="A map a word, rows of values in 0..1.")


class Compared(BaseModel):
    """Both explanations and the difference of the scores, above zero where the first fits better."""

    model_config = ConfigDict(extra="allow")

    model: str
    difference: float


class ErrorDetail(BaseModel):
    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail


R = TypeVar("R", bound=Body)


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """The body, as long as it keeps to its limits in size and time."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > config.max_body:
        raise _too_large(f"a body of {int(length):,} bytes", config.max_body, "bytes")
    data = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout):
            async for part in request.stream():
                data += part
                if len(data) > config.max_body:
                    raise _too_large("a body of more bytes", config.max_body, "bytes")
    except TimeoutError:
        raise HttpError(
            408, "slow", f"got a body that took longer than {config.body_timeout:g} s, expected a faster one; ask again"
        ) from None
    return bytes(data)


async def read_request(request: Request, kind: type[R], config: ServeConfig) -> R:
    """A request in JSON or as a form, valid and within the limits on counts and lengths."""
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    data = await read_body(request, config)
    if media == "multipart/form-data":
        values: dict[str, Any] | bytes = await _form(request, data, kind, config)
    elif media in ("", "application/json"):
        values = data
    else:
        raise HttpError(
            415, "media", f"got the content type {media[:80]!r}, expected application/json or multipart/form-data"
        )
    try:
        found = kind.model_validate(values) if isinstance(values, dict) else kind.model_validate_json(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        got = "" if isinstance(first["input"], dict | bytes) else f"got {_short(first['input'])}, "
        raise HttpError(422, "option", f"{where}: {got}expected something else: {first['msg']}; see /docs") from None
    _check_counts(found, config)
    return found


async def _form(request: Request, data: bytes, kind: type[Body], config: ServeConfig) -> dict[str, Any]:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    parser = MultiPartParser(
        request.headers,
        stream(),  # type: ignore[arg-type]
        max_files=config.max_images + 1,
        max_fields=config.max_texts + config.max_pairs + config.max_images + 8,
        max_part_size=config.max_body,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HttpError(
            400, "option", f"got a form that cannot be read ({error.message}), expected a whole one"
        ) from None
    except Exception as error:  # the parser raises nearly anything on broken data
        raise HttpError(
            400, "option", f"got a form that cannot be read ({type(error).__name__}), expected a whole one"
        ) from None
    values: dict[str, Any] = {}
    many = {name for name, info in kind.model_fields.items() if getattr(info.annotation, "__origin__", None) is list}
    try:
        for name, value in form.multi_items():
            plain: Any = value
            if isinstance(value, UploadFile):
                if name not in kind.files:
                    raise HttpError(422, "option", f"{name[:80]}: got a file, expected text")
                plain = base64.b64encode(await value.read()).decode()
            elif name == "pairs":
                plain = [int(p) if p.isdecimal() and len(p) < 10 else p for p in value.split(",")]
            elif name == "side" and value.isdecimal() and len(value) < 10:
                plain = int(value)
            if name in many:
                values.setdefault(name, []).append(plain)
            elif name in values:
                raise HttpError(422, "option", f"{name[:80]}: got several values, expected one")
            else:
                values[name] = plain
    finally:
        await form.close()
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _too_large(got: str, limit: int, unit: str) -> HttpError:
    return HttpError(413, "too_large", f"got {got}, expected at most {limit:,} {unit}; send less at once")


def _check_counts(request: Body, config: ServeConfig) -> None:
    images, texts = (list(getattr(request, name, ())) for name in ("images", "texts"))
    texts += [text] if isinstance(text := getattr(request, "text", None), str) else []
    pairs = getattr(request, "pairs", None)
    for what, count, limit in (
        ("images", len(images), config.max_images),
        ("texts", len(texts), config.max_texts),
        ("pairs", len(images) * len(texts) if pairs is None else len(pairs), config.max_pairs),
    ):
        if count > limit:
            raise _too_large(f"{count:,} {what}", limit, what)
    longest = max(map(len, texts), default=0)
    if longest > config.max_caption:
        raise _too_large(f"a caption of {longest:,} characters", config.max_caption, "characters")
    for text in texts:
        if not text.strip():
            raise HttpError(422, "text", f"got the caption {text!r}, expected text with at least one word")
    for image, text in pairs or ():
        if image >= len(images) or text >= len(texts):
            raise HttpError(
                422,
                "option",
                f"pairs: got {[image, text]}, expected indices below {len(images)} images and {len(texts)} texts",
            )
    one_of_either = isinstance(request, RankRequest | CompareRequest)
    if one_of_either and len(images) > 1 and len(texts) > 1:
        raise HttpError(
            422,
            "option",
            f"got {len(images)} images and {len(texts)} texts, expected one of either; use /v1/score for all pairs",
        )
    if isinstance(request, CompareRequest) and len(images) + len(texts) != 3:
        raise HttpError(422, "option", "got one image and one text, expected two of either to compare")


# Images


def read_image(text: str, where: str, config: ServeConfig, size: int | None) -> Image.Image:
    """Base64 or a data URL => RGB, at the size that the model takes, so that what waits is small.

    Raises:
        HttpError, ImageError: It is no image, or beyond the limits.
    """
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = rest
    elif ":" in text[:16]:
        raise HttpError(
            422, "image", f"{where}: got an address, expected the image itself in base64; the server opens no addresses"
        )
    if len(text) * 3 // 4 > config.max_image + 2:
        raise _too_large(f"{where}, an image of {len(text) * 3 // 4:,} bytes", config.max_image, "bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HttpError(422, "image", f"{where}: got text that is not base64, expected an image file in it") from None
    if len(data) > config.max_image:
        raise _too_large(f"{where}, an image of {len(data):,} bytes", config.max_image, "bytes")
    picture = decode_image(data, name=where, max_pixels=config.max_pixels)
    return picture if size is None else resize_crop(picture, size)


def write_image(image: Image.Image) -> str:
    """A picture => PNG in base64."""
    file = BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
