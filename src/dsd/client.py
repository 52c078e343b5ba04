"""A matcher on a server: the same calls as on :class:`dsd.Matcher`, answered by ``dsd serve``.

    matcher = dsd.Client("http://127.0.0.1:8000")              # instead of dsd.Matcher.from_pretrained("tiny")
    table = matcher.score(["a.png"], ["a red circle left of a blue square"])

No torch is imported, so that a laptop, a notebook or an evaluation can use a model that runs elsewhere.
"""

from __future__ import annotations

import base64
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self

import httpx2
import numpy as np

from dsd.contracts import (
    AdapterError,
    DsdError,
    ImageError,
    ImageInput,
    ManifestError,
    ModelError,
    OptionError,
    Pair,
    Ranked,
    ScoreTable,
    ServiceError,
    TextError,
    choice_of,
    image_name,
)
from dsd.explanation import Change, Explanation, ImageDifference, Phrase, TextDifference
from dsd.images import content_hash, decode_image, load_image, resize_crop
from dsd.race import Budget

if TYPE_CHECKING:
    from PIL.Image import Image

_KINDS: dict[str, type[DsdError]] = {
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
}
_AGAIN = frozenset({429, 502, 503, 504})
"""Statuses that say "not now"; scoring changes nothing on a server, so it can be asked again."""
_SIDE = 1024
"""Pixels a side of maps at most."""
_LONGEST = 10.0
"""Seconds that a try waits for the next at most, whatever the server says."""


class Client:
    """A matcher that a server holds.

    Args:
        url: Where it is, such as ``http://127.0.0.1:8000``.
        token: What it asks for; None: the environment's ``DSD_TOKEN``, if that is set.
        model: Which of its models; None takes its default.
        timeout: Seconds that an answer may take.
        retries: How often a request is sent again that found the server busy, stopping or gone.
        transport: For tests: what carries the requests.

    Raises:
        OptionError: If the address is no http or https one.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        transport: Any = None,
    ) -> None:
        token = token or os.environ.get("DSD_TOKEN") or None
        try:
            parsed = httpx2.URL(url)
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise ValueError
        except Exception:
            raise OptionError(f"got {url!r}, expected a server's address such as http://127.0.0.1:8000") from None
        if retries < 0 or not timeout > 0:
            raise OptionError(f"got {retries} retries and timeout {timeout}, expected 0 or more, and more than 0")
        self._url, self._model, self._retries = url.rstrip("/"), model, retries
        self._http = httpx2.Client(
            base_url=self._url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
            transport=transport,
        )
        self._served: dict[str, Any] | None = None
        self._card: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the connections."""
        self._http.close()

    # What is there

    def models(self) -> list[dict[str, Any]]:
        """What the server has to choose from: ``name``, ``calibrated``, ``config`` and so on, asked anew."""
        self._served = self._ask("GET", "/v1/models")
        return list(self._served["models"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration of the matcher on the server, plain values."""
        found: Mapping[str, Any] = self._own["config"]
        return found

    @property
    def _own(self) -> dict[str, Any]:
        if self._card is None:
            found = self.models()
            card = next((m for m in found if m["name"] == self._model or (self._model is None and m["default"])), None)
            if card is None:
                raise OptionError(
                    f"got model {self._model!r}, expected one of those at {self._url}: "
                    f"{', '.join(m['name'] for m in found)}"
                )
            self._card = card
        return self._card

    @property
    def _limits(self) -> Mapping[str, int]:
        _ = self._own
        assert self._served is not None
        limits: Mapping[str, int] = self._served["limits"]
        return limits

    # Matching

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Scores (image, caption) pairs: (n,) float32, higher is a better match.

        Raises:
            ImageError, TextError: If an image or caption cannot be scored.
            ServiceError: If the server cannot be reached, or refuses.
        """
        from tqdm import tqdm

        _check_texts([text for _, text in pairs])
        scores = np.zeros(len(pairs), np.float32)
        sent = self._send([image for image, _ in pairs])
        with tqdm(total=len(pairs), desc="scoring", unit="pair", disable=not progress) as bar:
            for part in self._parts([(key, text) for key, (_, text) in zip(sent.keys, pairs, strict=True)], sent):
                images = list(dict.fromkeys(sent.keys[i] for i in part))
                texts = list(dict.fromkeys(pairs[i][1] for i in part))
                places, said = ({v: k for k, v in enumerate(values)} for values in (images, texts))
                found = self._post(
                    "predict",
                    images=[sent.files[key] for key in images],
                    texts=texts,
                    pairs=[[places[sent.keys[i]], said[pairs[i][1]]] for i in part],
                )
                scores[part] = found["scores"]
                bar.update(len(part))
        return scores

    def score(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str], *, progress: bool = False
    ) -> ScoreTable:
        """Scores every image against every caption; one image or one caption may be given by itself."""
        pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        captions = [texts] if isinstance(texts, str) else list(texts)
        if not pictures or not captions:
            raise OptionError(f"got {len(pictures)} images and {len(captions)} texts, expected at least one of each")
        flat = self.predict([(image, text) for image in pictures for text in captions], progress=progress)
        names = tuple(image_name(image, i) for i, image in enumerate(pictures))
        return ScoreTable(flat.reshape(len(pictures), len(captions)), names, tuple(captions), self.config)

    def rank(
        self,
        query: ImageInput,
        candidates: Sequence[Any],
        *,
        budget: Budget | int | str | None = None,
        progress: bool = False,
    ) -> list[Ranked]:
        """Candidates for an image (captions) or for a caption (images), best first; see :meth:`dsd.Matcher.rank`.

        Args:
            budget: Passes, or seconds such as ``10s``. All candidates then go in one request, which must be within the
                server's limits.
        """
        pairs, names = choice_of(query, candidates)
        if budget is not None:
            return self._race(pairs, names, Budget.of(budget))
        scores = self.predict(pairs, progress=progress)
        return [Ranked(int(i), names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]

    def _race(self, pairs: Sequence[Pair], names: Sequence[str], budget: Budget) -> list[Ranked]:
        """Candidates of one choice, ranked by the server within a budget."""
        if (budget.passes is None) == (budget.seconds is None) or budget != Budget(budget.passes, budget.seconds):
            raise OptionError(
                f"got the budget {budget.to_dict()}, expected passes or seconds alone; the server knows no other"
            )
        texts = list(dict.fromkeys(text for _, text in pairs))
        _check_texts(texts)
        sent = self._send([image for image, _ in pairs])
        if len(texts) > 1:  # captions of one image: of each its own, even if two are the same
            images, texts = [sent.files[sent.keys[0]]], [text for _, text in pairs]
        else:
            images = [sent.files[key] for key in sent.keys]
        asked = budget.passes if budget.seconds is None else f"{budget.seconds!r}s"
        found = self._post("rank", images=images, texts=texts, budget=asked)["ranking"]
        anything = (-math.inf, math.inf)
        return [
            Ranked(r["index"], names[r["index"]], r["score"], tuple(r["interval"] or anything), r["passes"])
            for r in found
        ]

    def probability(self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> np.ndarray:
        """How probable each caption is among those given, for each image: (n_images, n_texts), rows sum to one.

        Raises:
            AdapterError: If the matcher is not calibrated.
        """
        if not self._own["calibrated"]:
            raise AdapterError(
                f"got {self._own['name']}, which is not calibrated, expected an adapter that was fitted; serve one"
            )
        pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
        captions = [texts] if isinstance(texts, str) else list(texts)
        if not pictures or not captions:
            raise OptionError(f"got {len(pictures)} images and {len(captions)} texts, expected at least one of each")
        _check_texts(captions)
        sent = self._send(pictures)
        rows = [self._post("score", images=[sent.files[key]], texts=captions)["probabilities"][0] for key in sent.keys]
        return np.array(rows, np.float64)

    # Understanding

    def explain(self, image: ImageInput, text: str) -> Explanation:
        """Where in the image each word of a caption is seen; see :meth:`dsd.Matcher.explain`."""
        _check_texts([text])
        sent = self._send([image])
        return _explanation(self._post("explain", image=sent.files[sent.keys[0]], text=text, side=_SIDE))

    def compare_texts(self, image: ImageInput, text_a: str, text_b: str) -> TextDifference:
        """Where two captions of one image disagree; see :meth:`dsd.Matcher.compare_texts`."""
        _check_texts([text_a, text_b])
        sent = self._send([image])
        found = self._post("compare", images=[sent.files[sent.keys[0]]], texts=[text_a, text_b], side=_SIDE)
        a = _explanation(found["a"])
        return TextDifference(
            a,
            _explanation({**found["b"], "image": found["a"]["image"]}),
            found["difference"],
            np.array(found["map"], np.float32),
            found["strength"],
            tuple(
                Change(**{**change, "span_a": tuple(change["span_a"]), "span_b": tuple(change["span_b"])})
                for change in found["changes"]
            ),
            {int(t): v for t, v in found["by_timestep"].items()},
            found["by_layer"],
        )

    def compare_images(self, text: str, image_a: ImageInput, image_b: ImageInput) -> ImageDifference:
        """Why a caption fits one image better than another; see :meth:`dsd.Matcher.compare_images`."""
        _check_texts([text])
        sent = self._send([image_a, image_b])
        found = self._post("compare", images=[sent.files[key] for key in sent.keys], texts=[text], side=_SIDE)
        return ImageDifference(
            _explanation(found["a"]),
            _explanation(found["b"]),
            found["difference"],
            _by_word(found["by_word"]),
            {int(t): v for t, v in found["by_timestep"].items()},
            found["by_layer"],
        )

    # Over the wire

    def _send(self, images: Sequence[ImageInput]) -> _Sent:
        """Images as they go over the wire: each once, at the size that the model takes, without loss."""
        size = self._own["size"]
        names: dict[Any, str] = {}
        keys: list[str] = []
        files: dict[str, str] = {}
        for image in images:
            own = str(image) if isinstance(image, str | os.PathLike) else id(image)
            if own not in names:
                picture = load_image(image)
                picture = picture if size is None else resize_crop(picture, size)
                names[own] = content_hash(picture)
                files.setdefault(names[own], _png(picture))
            keys.append(names[own])
        return _Sent(keys, files)

    def _parts(self, pairs: Sequence[tuple[str, str]], sent: _Sent) -> Iterator[list[int]]:
        """Indices of pairs, in runs that keep to the server's limits."""
        limits = self._limits
        part: list[int] = []
        images: set[str] = set()
        texts: set[str] = set()
        size = 0
        for i, (key, text) in enumerate(pairs):
            more = (len(sent.files[key]) if key not in images else 0) + (6 * len(text) if text not in texts else 0) + 32
            if part and (
                len(part) >= limits["pairs"]
                or len(images | {key}) > limits["images"]
                or len(texts | {text}) > limits["texts"]
                or size + more > limits["body"] - 4096
            ):
                yield part
                part, images, texts, size = [], set(), set(), 0
                more = len(sent.files[key]) + 6 * len(text) + 32
            part.append(i)
            images.add(key)
            texts.add(text)
            size += more
        if part:
            yield part

    def _post(self, path: str, **values: Any) -> Any:
        return self._ask("POST", f"/v1/{path}", {**values, "model": self._own["name"]})

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        for tried in range(self._retries + 1):
            last = tried == self._retries
            # others that were refused at the same time do not come back at the same time
            pause = min(_LONGEST, 0.2 * 2**tried) * random.uniform(0.5, 1)
            try:
                answer = self._http.request(method, path, json=body)
            except httpx2.TransportError as error:
                if last or isinstance(error, httpx2.ReadTimeout):
                    what = str(error) or type(error).__name__
                    raise ServiceError(
                        f"got no answer from {self._url} ({what}), expected a server there; start one with dsd serve"
                    ) from None
                time.sleep(pause)
                continue
            if answer.status_code in _AGAIN and not last and _code(answer) != "timeout":  # nor would it be in time then
                given = answer.headers.get("retry-after", "")
                time.sleep(max(pause, min(_LONGEST, float(given)) if given.isdigit() else 0.0))
                continue
            return _content(answer, self._url)
        raise AssertionError  # the last try returns or raises


class _Sent:
    """Images by content: a key for each that was given, a file for each key."""

    def __init__(self, keys: list[str], files: dict[str, str]) -> None:
        self.keys, self.files = keys, files


def _code(answer: Any) -> str | None:
    """The code of an error of the server's own; None for another's."""
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return None


def _content(answer: Any, url: str) -> Any:
    try:
        values = answer.json()
        if answer.status_code < 400:
            return values
        code, message = values["error"]["code"], values["error"]["message"]
    except (ValueError, KeyError, TypeError):
        raise ServiceError(
            f"got status {answer.status_code} and no answer of dsd from {url}, expected a dsd server; check the address"
        ) from None
    raise _KINDS.get(code, ServiceError)(message)


def _explanation(values: Mapping[str, Any]) -> Explanation:
    """What :meth:`dsd.explanation.Explanation.to_dict` made plain; maps have its four decimals."""
    data = base64.b64decode(values["image"].partition(",")[2])
    phrases = [Phrase(p["text"], p["start"], p["stop"], np.array(p["map"], np.float32)) for p in values["phrases"]]
    left, top, right, bottom = values["crop"]
    return Explanation(
        image=decode_image(data, name="the server's picture"),
        text=values["text"],
        words=tuple(values["words"]),
        maps=np.array(values["maps"], np.float32),
        strength=np.array(values["strength"], np.float32),
        phrases=tuple(phrases),
        score=values["score"],
        by_timestep={int(t): v for t, v in values["by_timestep"].items()},
        by_layer=values["by_layer"],
        by_word=_by_word(values["by_word"]),
        crop=(left, top, right, bottom),
        config=values["config"],
    )


def _by_word(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float32)


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise TextError(f"got the caption {text!r}, expected text with at least one word")


def _png(image: Image) -> str:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()
