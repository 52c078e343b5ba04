"""The page at ``/`` and what it asks for beyond the API: pictures to start from, and lessons."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr

from dsd.contracts import TextError
from dsd.images import resize_crop
from dsd.tiny import captions, sketch, world
from dsd.web import wire
from dsd.web.app import Service
from dsd.web.docs import api_page
from dsd.web.lessons import Lessons, Mark
from dsd.web.wire import HttpError

_SCENES = 24
_VIEW = 320
"""Pixels a side of a scene as people see it."""


class PictureRequest(wire.Body):
    """An image, to be seen as the model sees it."""

    files = ("image",)

    image: wire.ImageText
    model: wire.Model


class DrawRequest(wire.Body):
    """A scene from a caption."""

    text: wire.Caption
    seed: StrictInt = Field(default=0, ge=0, lt=2**31)
    model: wire.Model


class Pair(wire.Body):
    """A pair, and whether it is right."""

    image: wire.ImageText
    text: wire.Caption
    right: StrictBool


class LessonRequest(wire.Body):
    """What to learn from and how."""

    marks: list[Pair] = Field(default_factory=list)
    scenes: StrictInt = Field(default=0, ge=0, le=128, description="Labelled examples of the world to add.")
    method: StrictStr = Field(default="prompt", max_length=40)
    score: StrictStr | None = Field(default=None, max_length=40)
    model: wire.Model


class Picture(BaseModel):
    image: str
    """What the model sees."""
    view: str | None = None
    """The same for people, where there is more to see."""
    by: str
    caption: str | None = None


def add_playground(app: FastAPI, service: Service) -> None:
    """The page, its files and its routes."""
    static = files("dsd.web") / "static"
    page = (static / "index.html").read_text("utf-8")
    lessons = Lessons(service.worker, service.taught, service.config)
    app.state.lessons = lessons
    app.mount("/static", StaticFiles(directory=str(static)), name="static")

    def route(method: str, path: str, **options: Any) -> Callable[..., Any]:
        return getattr(app, method)(path, include_in_schema=False, **options)  # type: ignore[no-any-return]

    @route("get", "/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @route("get", "/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()))

    @route("post", "/playground/pictures")
    async def picture(request: Request) -> Picture:
        asked = await service.read(request, PictureRequest)
        (found,) = await service.images([asked.image], service.name_of(asked.model))
        return Picture(image=_data_url(found), by="you")

    @route("get", "/playground/scenes")
    async def scenes(seed: int = 0, count: int = 8) -> dict[str, Any]:
        if not (0 <= seed < 2**31 and 1 <= count <= _SCENES):
            raise HttpError(422, "option", f"got seed {seed} and count {count}, expected at most {_SCENES} scenes")
        return {"scenes": await to_thread.run_sync(_scenes, seed, count)}

    @route("post", "/playground/draw")
    async def draw(request: Request) -> Picture:
        asked = await service.read(request, DrawRequest)
        name = service.name_of(asked.model)
        size = service.peek(name).config.get("size") or world.IMAGE_SIZE
        try:
            scene = await to_thread.run_sync(lambda: sketch.stage(random.Random(asked.seed), sketch.read(asked.text)))
        except TextError:
            generate = getattr(service.peek(name), "generate", None)
            if generate is None:
                raise
            return Picture(
                image=_data_url(await service.done(service.worker.run(name, lambda m: m.generate(asked.text)))),
                by="model",
                caption=asked.text,
            )
        drawn = resize_crop(world.render(scene, max(world.IMAGE_SIZE, min(size, 512))), size)
        return Picture(
            image=_data_url(drawn), view=_data_url(world.render(scene, _VIEW)), by="world", caption=asked.text
        )

    @route("post", "/playground/lessons", status_code=202)
    async def start(request: Request) -> dict[str, Any]:
        lessons.check_free()  # before any picture is decoded
        asked = await service.read(request, LessonRequest)
        name = service.name_of(asked.model)
        if len(asked.marks) > service.config.max_marks:
            raise HttpError(413, "too_large", f"got {len(asked.marks)} marks, expected {service.config.max_marks}")
        for mark in asked.marks:
            if len(mark.text) > service.config.max_caption or not mark.text.strip():
                raise HttpError(422, "text", "got a caption that is empty or too long among the marks")
        texts = list({mark.image for mark in asked.marks})
        images = dict(zip(texts, await service.images(texts, name), strict=True))
        marks = [Mark(images[m.image], m.text, m.right) for m in asked.marks]
        lesson = await lessons.start(name, marks, asked.scenes, asked.method, asked.score, service.done)
        return {"id": lesson.id, "name": lesson.name}

    @route("get", "/playground/lessons/{lesson_id}")
    async def follow(lesson_id: str, after: int = 0) -> dict[str, Any]:
        return await lessons.follow(lesson_id, after)

    @route("delete", "/playground/lessons/{lesson_id}")
    async def stop(lesson_id: str) -> dict[str, Any]:
        lessons.find(lesson_id).stop()
        return {"id": lesson_id}

    @route("get", "/playground/lessons/{lesson_id}/adapter.zip")
    async def download(lesson_id: str) -> Response:
        lesson = lessons.find(lesson_id)
        if lesson.archive is None:
            raise HttpError(409, "option", "got a lesson that has nothing to download, expected one that is done")
        headers = {"Content-Disposition": f'attachment; filename="{lesson.name}.zip"'}
        return Response(lesson.archive, media_type="application/zip", headers=headers)


def _data_url(image: Any) -> str:
    return f"data:image/png;base64,{wire.write_image(image)}"


def _scenes(seed: int, count: int) -> list[dict[str, Any]]:
    """Held-out scenes of two things, each with a true caption and three false ones."""
    found = []
    for i in range(count):
        rng = random.Random(f"playground/{seed}/{i}")
        while True:
            scene = world.sample_scene(rng, "test", "easy", things=2)
            b, a = scene.things
            relation = next((r for r in world.KNOWN_RELATIONS[:4] if world.related(a, r, b)), None)
            if relation is not None and a.colour != b.colour and a.shape != b.shape:
                break
        first, second = captions.Phrase(a.colour, a.shape), captions.Phrase(b.colour, b.shape)
        other = rng.choice([c for c in world.COLOURS if c not in (a.colour, b.colour)])
        claims = [
            captions.Claim(first, relation, second),
            captions.Claim(second, relation, first),
            captions.Claim(captions.Phrase(b.colour, a.shape), relation, captions.Phrase(a.colour, b.shape)),
            captions.Claim(captions.Phrase(other, a.shape), relation, second),
        ]
        texts = [captions.say(random.Random(0), claim) for claim in claims]
        found.append(
            {
                "image": _data_url(world.render(scene)),
                "view": _data_url(world.render(scene, _VIEW)),
                "caption": texts[0],
                "texts": rng.sample(texts, 4),
            }
        )
    return found
