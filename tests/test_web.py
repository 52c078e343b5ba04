"""The HTTP API and its client: answers as the local matcher gives them, limits, errors, stopping."""

from __future__ import annotations

import base64
import gc
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import dsd
from dsd.cli import main
from dsd.client import Client
from dsd.contracts import (
    AdapterError,
    DsdError,
    ImageError,
    MatcherProtocol,
    OptionError,
    ServiceError,
    TextError,
)
from dsd.evaluate import evaluate
from dsd.matcher import Matcher
from dsd.race import Budget
from dsd.scores import ScoreConfig
from dsd.web import ServeConfig, Shelf, create_app, lessons
from dsd.web.server import listen
from dsd.web.worker import Busy, Stopping, Worker, _Batch
from models import picture, pipeline, save_adapter, toy

sys.path.insert(0, str(Path(__file__).parent / "browser"))
import looking

URL = "http://127.0.0.1"
CAPTIONS = ["a red circle", "a blue square left of a green dog", "the cat"]
SCORE = ScoreConfig("denoising", (50, 450))


@pytest.fixture(scope="module")
def folder(pipe: Callable[..., str]) -> str:
    return pipe()


@pytest.fixture(scope="module")
def local(folder: str) -> Matcher:
    return Matcher.from_pretrained(folder, score=SCORE)


@pytest.fixture(scope="module")
def shelf(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    adapter = save_adapter(tmp_path_factory.mktemp("adapters") / "taught", folder)
    found = Shelf.load([folder], {"taught": str(adapter), "again": str(adapter)})
    found.remove(folder)
    zero = Matcher(found.peek("taught").backbone, SCORE)
    both = Shelf()
    both.clear(zero.backbone)
    both.add("zero", zero)
    for name in ("taught", "again"):
        both._matchers[name] = found.peek(name)
    return both


@pytest.fixture(scope="module")
def http(shelf: Shelf) -> Iterator[TestClient]:
    config = ServeConfig(max_image=20_000, max_images=8, max_texts=8, max_pairs=40, max_caption=200, lesson_steps=8)
    with TestClient(create_app(shelf, config), base_url=URL) as found:
        yield found


@pytest.fixture
def remote(http: TestClient) -> Client:
    return Client(URL, transport=http._transport)


def png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGE = png(picture(0))


class Gate:
    """A matcher that scores when it is let, and says what it was asked together."""

    config: dict[str, Any] = {"model": "gate"}  # noqa: RUF012

    def __init__(self, opened: bool = False) -> None:
        self.open, self.asked, self.batches = threading.Event(), threading.Event(), []
        if opened:
            self.open.set()

    def predict(self, pairs: Any, *, progress: bool = False) -> np.ndarray:
        self.asked.set()
        assert self.open.wait(10)
        self.batches.append(len(pairs))
        if any(text == "bad" for _, text in pairs):
            raise TextError("got bad, expected good")
        return np.array([len(text) for _, text in pairs], np.float32)

    def score(self, images: Any, texts: Any) -> Any:
        raise NotImplementedError


# Answers


def test_the_client_is_a_matcher_and_answers_as_the_local_one(remote: Client, local: Matcher) -> None:
    assert isinstance(remote, MatcherProtocol)
    images = [picture(i, size) for i, size in enumerate((16, 40, 16))]
    images.append(np.asarray(picture(9, 24)))  # type: ignore[arg-type]
    ours, theirs = local.score(images, CAPTIONS), remote.score(images, CAPTIONS)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-5)
    assert (theirs.images, theirs.texts, theirs.scores.dtype) == (ours.images, ours.texts, np.float32)
    assert {k: v for k, v in remote.config.items() if k != "noise"} == {
        k: v for k, v in local.config.items() if k != "noise"
    }
    assert remote.rank(images[0], CAPTIONS) == remote.rank(images[0], CAPTIONS)
    assert [r.index for r in remote.rank(images[0], CAPTIONS)] == [r.index for r in local.rank(images[0], CAPTIONS)]
    assert [r.index for r in remote.rank(CAPTIONS[0], images)] == [r.index for r in local.rank(CAPTIONS[0], images)]


@pytest.mark.parametrize("budget", [40, "20s", Budget(passes=40)])
def test_a_budget_holds_on_the_server_as_it_does_here(remote: Client, local: Matcher, budget: Any) -> None:
    captions = [f"{caption} {i}" for i in range(2) for caption in CAPTIONS]
    images = [picture(i) for i in range(5)]
    for query, candidates in ((picture(0), captions), (captions[0], images)):
        theirs = remote.rank(query, candidates, budget=budget)
        ours = local.rank(query, candidates, budget=budget)
        assert [(r.index, r.candidate, r.passes) for r in theirs] == [(r.index, r.candidate, r.passes) for r in ours]
        np.testing.assert_allclose([r.score for r in theirs], [r.score for r in ours], atol=1e-4)
        np.testing.assert_allclose([r.interval for r in theirs], [r.interval for r in ours], atol=1e-4)  # type: ignore[arg-type, misc]
    with pytest.raises(OptionError, match="budget"):
        remote.rank(picture(0), captions, budget=1)
    with pytest.raises(OptionError, match="knows no other"):
        remote.rank(picture(0), captions, budget=Budget(passes=40, error=0.2))
    with pytest.raises(OptionError, match="expected at most"):
        remote.rank(picture(0), captions, budget="3000s")


def test_one_pass_each_tells_no_interval(http: TestClient, remote: Client, local: Matcher) -> None:
    captions = [*CAPTIONS, "a dog"]
    theirs = remote.rank(picture(0), captions, budget=len(captions))
    assert [r.interval for r in theirs] == [r.interval for r in local.rank(picture(0), captions, budget=len(captions))]
    body = {"images": [IMAGE], "texts": captions, "budget": len(captions)}
    assert [r["interval"] for r in http.post("/v1/rank", json=body).json()["ranking"]] == [None] * 4


def test_a_caption_that_names_a_file_is_a_caption(http: TestClient) -> None:
    """A server opens no path that it was sent."""
    body = {"images": [IMAGE, png(picture(1))], "texts": [__file__], "budget": 100}
    answer = http.post("/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["ranking"]) == 2


def test_an_evaluation_moves_to_a_server_by_one_line(remote: Client, local: Matcher) -> None:
    examples = toy(12)
    ours, theirs = evaluate(local, examples), evaluate(remote, examples)
    assert theirs.metrics == ours.metrics
    assert theirs.dataset == ours.dataset


def test_more_pairs_than_a_request_may_have_go_in_several(remote: Client, local: Matcher) -> None:
    images = [picture(i) for i in range(11)]
    texts = [f"{c} {i}" for i, c in enumerate(CAPTIONS * 4)]
    np.testing.assert_allclose(remote.score(images, texts).scores, local.score(images, texts).scores, atol=1e-5)


def test_an_upload_and_base64_and_a_data_url_are_the_same(http: TestClient) -> None:
    file = base64.b64decode(IMAGE)
    plain = http.post("/v1/score", json={"images": [IMAGE], "texts": CAPTIONS}).json()
    url = http.post("/v1/score", json={"images": [f"data:image/png;base64,{IMAGE}"], "texts": CAPTIONS}).json()
    form = http.post("/v1/score", data={"texts": CAPTIONS}, files=[("images", ("a.png", file))]).json()
    assert plain["scores"] == url["scores"] == form["scores"]
    assert plain["probabilities"] is None
    pairs = http.post(
        "/v1/predict", data={"texts": CAPTIONS, "pairs": ["0,2", "0,0"]}, files=[("images", ("a.png", file))]
    ).json()
    np.testing.assert_allclose(pairs["scores"], [plain["scores"][0][2], plain["scores"][0][0]], atol=1e-5)


def test_adapters_take_turns_on_one_model(http: TestClient, folder: str, shelf: Shelf) -> None:
    """Each answers as if it were alone, whoever was asked before."""
    taught = Matcher.from_pretrained(folder)
    taught.load_adapter(shelf.peek("taught").adapter)
    zero = Matcher.from_pretrained(folder, score=SCORE)
    image = picture(3)
    for name, alone in (("zero", zero), ("taught", taught), ("again", taught), ("zero", zero), ("taught", taught)):
        remote = Client(URL, model=name, transport=http._transport)
        pair = [(image, CAPTIONS[1])]
        np.testing.assert_allclose(remote.predict(pair), alone.predict(pair), atol=1e-5)
    backbones = {id(shelf.peek(name).backbone) for name in ("zero", "taught", "again")}
    assert len(backbones) == 1
    calibrated = Client(URL, model="taught", transport=http._transport)
    np.testing.assert_allclose(calibrated.probability(image, CAPTIONS), taught.probability(image, CAPTIONS), atol=1e-5)
    body = {"images": [png(image)], "texts": CAPTIONS, "model": "taught"}
    ranking = http.post("/v1/rank", json=body).json()["ranking"]
    assert sum(r["probability"] for r in ranking) == pytest.approx(1)
    with pytest.raises(AdapterError, match="not calibrated"):
        Client(URL, model="zero", transport=http._transport).probability(image, CAPTIONS)


def test_explanations_are_the_local_ones(remote: Client, local: Matcher) -> None:
    image = picture(1)
    ours, theirs = local.explain(image, CAPTIONS[0]), remote.explain(image, CAPTIONS[0])
    assert (theirs.words, theirs.text, theirs.image.size) == (ours.words, ours.text, ours.image.size)
    np.testing.assert_allclose(theirs.maps, ours.maps, atol=1e-3)
    np.testing.assert_allclose(theirs.by_word, ours.by_word, atol=1e-5)
    assert theirs.by_timestep == pytest.approx(ours.by_timestep, abs=1e-5)
    a, b = (m.compare_texts(image, "a circle", "the cat") for m in (local, remote))
    assert b.difference == pytest.approx(a.difference, abs=1e-5)
    assert [c.span_a for c in b.changes] == [c.span_a for c in a.changes]
    c, d = (m.compare_images("the cat", image, picture(2)) for m in (local, remote))
    assert d.difference == pytest.approx(c.difference, abs=1e-5)


def test_what_can_be_chosen_is_listed_and_documented(http: TestClient) -> None:
    models = http.get("/v1/models").json()["models"]
    assert [(m["name"], m["default"], m["calibrated"]) for m in models][:3] == [
        ("zero", True, False),
        ("taught", False, True),
        ("again", False, True),
    ]
    assert http.get("/v1/health").json() == {"status": "ok"}
    metrics = http.get("/v1/metrics").text
    assert 'dsd_requests_total{route="/v1/models",status="200"}' in metrics
    assert "dsd_batch_pairs_bucket" in metrics
    schema = http.get("/v1/openapi.json").json()
    for path in ("score", "predict", "rank", "explain", "compare"):
        content = schema["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]
        example = content["application/json"]["example"]
        assert http.post(f"/v1/{path}", json=example).status_code == 200
        assert "multipart/form-data" in content
    page = http.get("/docs").text
    assert "curl http://127.0.0.1:8000/v1/score" in page
    assert "https://" not in page


# Refusals


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        ({"images": [IMAGE], "texts": [" "]}, 422, "text", "at least one word"),
        ({"images": [IMAGE], "texts": [""]}, 422, "option", "texts.0"),
        ({"images": [], "texts": ["a"]}, 422, "option", "images"),
        ({"images": [IMAGE], "texts": "a"}, 422, "option", "texts"),
        ({"images": [IMAGE], "texts": [1]}, 422, "option", "got 1"),
        ({"images": [IMAGE], "texts": ["a"], "extra": 1}, 422, "option", "extra"),
        ({"images": [IMAGE], "texts": ["a"], "model": "nonesuch"}, 404, "not_found", "expected one of zero"),
        ({"images": [IMAGE], "texts": ["a"], "model": "../../etc"}, 404, "not_found", "expected one of zero"),
        ({"images": ["%%%"], "texts": ["a"]}, 422, "image", "not base64"),
        ({"images": ["YWJj"], "texts": ["a"]}, 422, "image", "image 0"),
        ({"images": ["http://127.0.0.1/a.png"], "texts": ["a"]}, 422, "image", "opens no addresses"),
        ({"images": ["file:///etc/passwd"], "texts": ["a"]}, 422, "image", "opens no addresses"),
        ({"images": ["/etc/passwd"], "texts": ["a"]}, 422, "image", ""),
        ({"images": [IMAGE] * 9, "texts": ["a"]}, 413, "too_large", "9 images"),
        ({"images": [IMAGE], "texts": ["a"] * 9}, 413, "too_large", "9 texts"),
        ({"images": [IMAGE] * 8, "texts": ["a"] * 8}, 413, "too_large", "64 pairs"),
        ({"images": [IMAGE], "texts": ["a" * 201]}, 413, "too_large", "201 characters"),
        ({"images": ["A" * 40_000], "texts": ["a"]}, 413, "too_large", "expected at most 20,000 bytes"),
    ],
)
def test_what_cannot_be_met_is_refused_in_words(
    http: TestClient, body: dict[str, Any], status: int, code: str, says: str
) -> None:
    answer = http.post("/v1/score", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert "expected" in error["message"]
    assert says in error["message"]


def test_other_refusals(http: TestClient) -> None:
    def refused(status: int, **options: Any) -> str:
        answer = http.request(**{"method": "POST", "url": "/v1/score", **options})
        assert answer.status_code == status, answer.text
        return str(answer.json()["error"]["message"])

    assert "media" in http.post("/v1/score", content=b"x", headers={"content-type": "text/csv"}).json()["error"]["code"]
    json = {"content-type": "application/json"}
    refused(422, content=b"{", headers=json)
    refused(422, content=b"[" * 100_000, headers=json)
    refused(422, content=b'{"images": ["\\ud800"], "texts": ["a"]}', headers=json)
    refused(422, content=b"--x\r\nnothing", headers={"content-type": "multipart/form-data; boundary=x"})
    refused(400, content=b"--x\r\n\x00:a\r\n", headers={"content-type": "multipart/form-data; boundary=x"})
    refused(400, content=b"--x", headers={"content-type": "multipart/form-data"})
    refused(415, data={"texts": ["a"]})
    refused(422, data={"images": IMAGE, "model": ["zero", "taught"], "texts": "a"}, files={"images": b""})
    refused(404, method="GET", url="/nowhere")
    refused(405, method="GET")
    pair = {"images": [IMAGE], "texts": ["a"]}
    assert "indices" in refused(422, url="/v1/predict", json={**pair, "pairs": [[0, 1]]})
    both = {"images": [IMAGE] * 2, "texts": ["a", "b"]}
    assert "one of either" in refused(422, url="/v1/rank", json=both)
    for budget in (0, -1, "fast", "-1s", "nans", 10**30, 2.5, True, "9" * 10_000):
        assert "budget" in refused(422, url="/v1/rank", json={**pair, "budget": budget})
    refused(422, url="/v1/compare", json=pair)
    # another site's page, and a name that leads here by another's doing
    refused(403, json=pair, headers={"origin": "http://evil.example"})
    refused(421, json=pair, headers={"host": "evil.example"})
    assert http.post("/v1/score", json=pair, headers={"origin": URL}).status_code == 200


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(local: Matcher) -> None:
    with TestClient(create_app(local, ServeConfig(max_pixels=1000)), base_url=URL) as http:
        answer = http.post("/v1/score", json={"images": [png(picture(0, 40))], "texts": ["a"]})
        assert answer.status_code == 422
        assert "1,000" in answer.json()["error"]["message"]


def test_bodies_are_limited_in_size_and_time(local: Matcher) -> None:
    config = ServeConfig(max_body=2000, body_timeout=0.2)
    with TestClient(create_app(local, config), base_url=URL) as http:
        answer = http.post("/v1/score", json={"images": ["A" * 3000], "texts": ["a"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")

        def parts() -> Iterator[bytes]:  # without a length, as chunks
            for _ in range(5):
                yield b"A" * 1000

        answer = http.post("/v1/score", content=parts(), headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_an_origin_that_is_none_is_another_sites(http: TestClient) -> None:
    for origin in ("http://[", "null", "http://elsewhere", "://"):
        answer = http.get("/v1/models", headers={"origin": origin})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert http.get("/v1/models", headers={"origin": URL}).status_code == 200


def test_names_of_hosts_are_the_same_in_capitals() -> None:
    assert ServeConfig(hosts=("Example.org",)).allowed_hosts == ("example.org",)


def test_a_token_is_asked_for(local: Matcher) -> None:
    with TestClient(create_app(local, ServeConfig(token="a-long-secret")), base_url=URL) as http:
        for headers in ({}, {"authorization": "Bearer another"}, {"authorization": "Basic a-long-secret"}):
            answer = http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get("/v1/metrics").status_code == 401
        assert http.get("/playground/scenes").status_code == 401
        assert http.get("/v1/health").status_code == 200
        assert http.get("/").status_code == 200
        with pytest.raises(ServiceError, match="token"):
            Client(URL, transport=http._transport).models()
        assert Client(URL, token="a-long-secret", transport=http._transport).models()


def test_the_page_may_load_nothing_from_elsewhere(http: TestClient) -> None:
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    static = Path(dsd.__file__).parent / "web" / "static"
    for file in static.iterdir():
        text = file.read_text("utf-8")
        assert "innerHTML" not in text
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        assert http.get(f"/static/{file.name}").status_code == 200
    assert "style=" not in answer.text
    assert http.get("/static/../app.py").status_code == 404


@pytest.mark.parametrize(
    "values",
    [
        {"port": 70000},
        {"max_pairs": 0},
        {"timeout": -1.0},
        {"token": "short"},
        {"token": "with a space"},
        {"host": "0.0.0.0"},
        {"batch_wait": -1.0},
        {"frame_ancestors": ("a; script-src *",)},
    ],
)
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        ServeConfig(**values)


def test_others_are_let_in_only_with_a_token_or_if_said() -> None:
    assert ServeConfig(host="0.0.0.0", token="a-long-secret").allowed_hosts is None
    assert ServeConfig(host="0.0.0.0", public=True).token is None
    assert ServeConfig().allowed_hosts is not None


# Batches, queues, stopping


def test_requests_of_several_clients_become_one_batch() -> None:
    gate = Gate()
    worker = Worker(Shelf({"gate": gate}), ServeConfig(batch=8))
    first = worker.score("gate", [("x", "a")])
    assert gate.asked.wait(5)
    others = [worker.score("gate", [("x", "a" * n)] * 2) for n in range(2, 7)]
    gate.open.set()
    assert first.result(5).tolist() == [1]
    assert [f.result(5).tolist() for f in others] == [[n, n] for n in range(2, 7)]
    assert gate.batches == [1, 8, 2]  # no more than a batch holds
    worker.close(5)


def test_a_batch_waits_for_those_who_were_answered_last_and_a_client_alone_for_nobody() -> None:
    gate = Gate(opened=True)
    worker = Worker(Shelf({"gate": gate}), ServeConfig(batch_wait=60))
    worker._last = _Batch("gate", requests=1, left=1, seconds=400, end=time.monotonic())
    first = worker.score("gate", [("x", "a")])
    assert not gate.asked.wait(0.1)
    second = worker.score("gate", [("x", "bb")])  # now all are back
    assert (first.result(5).tolist(), second.result(5).tolist(), gate.batches) == ([1], [2], [2])

    for last in (
        _Batch("gate", requests=1, left=0, seconds=400, end=time.monotonic()),
        _Batch("another", requests=9, left=0, seconds=400, end=time.monotonic()),
        _Batch("gate", requests=9, left=0, seconds=400, end=time.monotonic() - 101),  # they will not come back
    ):
        worker._last = last
        assert worker.score("gate", [("x", "ccc")]).result(5).tolist() == [3]
    with worker.coming():  # but not for long
        assert worker.score("gate", [("x", "dddd")]).result(5).tolist() == [4]
    worker.close(5)


def test_pictures_of_the_same_pixels_are_one_object_for_a_matcher() -> None:
    class Objects(Gate):
        def predict(self, pairs: Any, *, progress: bool = False) -> np.ndarray:
            self.seen = [image for image, _ in pairs]
            return super().predict(pairs)

    gate = Objects()
    with TestClient(create_app(gate), base_url=URL) as http, ThreadPoolExecutor(4) as pool:
        body = {"images": [IMAGE], "texts": ["abc"]}
        first = pool.submit(http.post, "/v1/score", json=body)
        assert gate.asked.wait(5)
        bmp = io.BytesIO()
        picture(0).save(bmp, "BMP")
        others = [
            pool.submit(http.post, "/v1/score", json={"images": [text], "texts": ["abcd"]})
            for text in (IMAGE, base64.b64encode(bmp.getvalue()).decode(), png(picture(1)))
        ]
        service = http.app.state.service  # type: ignore[attr-defined]
        while service.worker.waiting < 3:
            time.sleep(0.01)
        gate.open.set()
        assert all(f.result(5).status_code == 200 for f in (first, *others))
        assert len({id(image) for image in gate.seen}) == 2
        del gate.seen
        deadline = time.monotonic() + 5
        while len(service._pictures) and time.monotonic() < deadline:  # nothing is kept
            gc.collect()
            time.sleep(0.01)
        assert len(service._pictures) == 0


def test_small_batches_use_one_thread_and_what_was_set_comes_back(local: Matcher) -> None:
    shelf = Shelf({"local": local, "lengths": Gate()})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, pairs, threads in (("local", 1, 1), ("local", 1000, 2), ("lengths", 1, 2)):
            with shelf.threads(name, pairs):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_bad_request_spoils_no_other() -> None:
    gate = Gate()
    worker = Worker(Shelf({"gate": gate}), ServeConfig())
    worker.score("gate", [("x", "a")])
    assert gate.asked.wait(5)
    good, bad, last = (worker.score("gate", [("x", text)]) for text in ("good", "bad", "other"))
    gate.open.set()
    assert good.result(5).tolist() == [4]
    assert last.result(5).tolist() == [5]
    with pytest.raises(TextError):
        bad.result(5)
    worker.close(5)


def test_a_full_queue_refuses_and_a_stop_finishes_what_was_taken() -> None:
    gate = Gate()
    worker = Worker(Shelf({"gate": gate}), ServeConfig(queue=4))
    taken = [worker.score("gate", [("x", "a")])]
    assert gate.asked.wait(5)
    taken += [worker.score("gate", [("x", "ab")] * 2) for _ in range(2)]
    with pytest.raises(Busy, match="expected at most 4"):
        worker.score("gate", [("x", "a")])
    stop = threading.Thread(target=worker.close, args=(10,))
    stop.start()
    while worker.alive:
        time.sleep(0.01)
    with pytest.raises(Stopping):
        worker.score("gate", [("x", "a")])
    gate.open.set()
    stop.join(10)
    assert [f.result(0).tolist() for f in taken] == [[1], [2, 2], [2, 2]]


def test_who_gave_up_is_not_scored() -> None:
    gate = Gate()
    worker = Worker(Shelf({"gate": gate}), ServeConfig())
    worker.score("gate", [("x", "a")])
    assert gate.asked.wait(5)
    assert worker.score("gate", [("x", "bb")]).cancel()
    gate.open.set()
    worker.close(5)
    assert gate.batches == [1]


def test_a_busy_server_answers_429_and_the_client_asks_again() -> None:
    gate = Gate()
    app = create_app(gate, ServeConfig(queue=1, timeout=5))
    with TestClient(app, base_url=URL) as http, ThreadPoolExecutor(3) as pool:
        body = {"images": [IMAGE], "texts": ["abc"]}
        first = pool.submit(http.post, "/v1/score", json=body)
        assert gate.asked.wait(5)
        second = pool.submit(http.post, "/v1/score", json=body)
        service = http.app.state.service  # type: ignore[attr-defined]
        while not service.worker.waiting:
            time.sleep(0.01)
        refused = http.post("/v1/score", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert refused.headers["retry-after"] == "1"
        again = pool.submit(Client(URL, transport=http._transport).predict, [(picture(0), "abcd")])
        time.sleep(0.1)
        gate.open.set()
        assert first.result(5).json()["scores"] == [[3.0]]
        assert second.result(5).status_code == 200
        assert again.result(10).tolist() == [4]


def test_what_takes_too_long_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with TestClient(create_app(gate, ServeConfig(timeout=0.2)), base_url=URL) as http:
        client = Client(URL, transport=http._transport)
        asked: list[str] = []
        send = client._http.request
        monkeypatch.setattr(client._http, "request", lambda *to, **body: asked.append(to[0]) or send(*to, **body))
        with pytest.raises(ServiceError, match=r"within 0\.2 s"):
            client.predict([(picture(0), "cat")])
        gate.open.set()
    assert asked.count("POST") == 1


def test_what_takes_too_long_is_503() -> None:
    gate = Gate()
    with TestClient(create_app(gate, ServeConfig(timeout=0.1)), base_url=URL) as http:
        answer = http.post("/v1/score", json={"images": [IMAGE], "texts": ["a"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        gate.open.set()


def test_a_fault_of_ours_is_500_without_its_insides() -> None:
    class Broken(Gate):
        def predict(self, pairs: Any, *, progress: bool = False) -> np.ndarray:
            raise RuntimeError("a secret")

    with TestClient(create_app(Broken(), ServeConfig()), base_url=URL, raise_server_exceptions=False) as http:
        answer = http.post("/v1/score", json={"images": [IMAGE], "texts": ["a"]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "fault")
        assert "secret" not in answer.text


def test_any_matcher_can_be_served() -> None:
    with TestClient(create_app({"lengths": Gate(opened=True)}), base_url=URL) as http:
        assert Client(URL, transport=http._transport).predict([(picture(0), "abc")]).tolist() == [3]
        answer = http.post("/v1/explain", json={"image": IMAGE, "text": "a"})
        assert answer.status_code == 422
        assert "cannot explain" in answer.json()["error"]["message"]
    with pytest.raises(OptionError, match="at least one"):
        create_app({})


# The client


def test_the_client_refuses_what_the_matcher_refuses(remote: Client, tmp_path: Path) -> None:
    cases: list[tuple[type[DsdError], Callable[[], Any]]] = [
        (ImageError, lambda: remote.score([tmp_path / "no.png"], ["a"])),
        (TextError, lambda: remote.score([picture(0)], [" "])),
        (OptionError, lambda: remote.score([], ["a"])),
        (OptionError, lambda: remote.rank(picture(0), [])),
        (ImageError, lambda: remote.rank("a red circle", ["a"])),
        (OptionError, lambda: remote.score([picture(0)], ["a" * 500])),
        (OptionError, lambda: Client("ftp://x")),
        (OptionError, lambda: Client(URL, retries=-1)),
    ]
    for kind, call in cases:
        with pytest.raises(kind, match="got"):
            call()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ServiceError, match="dsd serve"):
        Client("http://127.0.0.1:9", retries=0).models()


def test_a_model_that_is_not_there(http: TestClient) -> None:
    with pytest.raises(OptionError, match="expected one of those"):
        _ = Client(URL, model="nonesuch", transport=http._transport).config


def test_importing_the_client_loads_no_torch() -> None:
    code = "import sys, dsd; dsd.Client; import dsd.web.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "diffusers", "transformers", "fastapi"} & set(loaded)


# The playground


def test_pictures_to_start_from(http: TestClient) -> None:
    scenes = http.get("/playground/scenes?seed=3&count=2").json()["scenes"]
    assert len(scenes) == 2
    assert all(scene["caption"] in scene["texts"] and len(set(scene["texts"])) == 4 for scene in scenes)
    assert http.get("/playground/scenes?seed=-1").status_code == 422
    assert http.get("/playground/scenes?count=x").json()["error"]["code"] == "option"
    seen = http.post("/playground/pictures", json={"image": png(picture(0, 50))}).json()["image"]
    assert Image.open(io.BytesIO(base64.b64decode(seen.partition(",")[2]))).size == (16, 16)
    drawn = http.post("/playground/draw", json={"text": "two green stars"})
    assert drawn.json()["by"] == "world"
    answer = http.post("/playground/draw", json={"text": "democracy"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "text")


def test_a_lesson_gives_a_model_and_an_adapter(http: TestClient, tmp_path: Path) -> None:
    marks = [
        {"image": png(e.images[0]), "text": text, "right": (0, j) in e.positives}
        for e in toy(8)
        for j, text in enumerate(e.texts)
    ]
    body = {"marks": marks, "method": "prompt", "score": "attention"}
    started = http.post("/playground/lessons", json=body)
    assert started.status_code == 202, started.text
    lesson = started.json()["id"]
    assert http.post("/playground/lessons", json=body).status_code == 429
    events: list[dict[str, Any]] = []
    while True:
        news = http.get(f"/playground/lessons/{lesson}?after={len(events)}").json()
        events += news["events"]
        if news["over"] and not news["events"]:
            break
    assert events[0]["event"] == "start"
    assert sum(e["event"] == "step" for e in events) >= 8
    last = events[-1]
    assert last["event"] == "done", last
    assert last["curve"][0]["step"] == 0
    card = next(m for m in http.get("/v1/models").json()["models"] if m["name"] == last["name"])
    assert (card["taught"], card["calibrated"]) == (True, True)
    archive = http.get(f"/playground/lessons/{lesson}/adapter.zip")
    with zipfile.ZipFile(io.BytesIO(archive.content)) as found:
        found.extractall(tmp_path)
    again = Matcher.from_pretrained(card["config"]["model"], adapter=tmp_path / last["name"])
    image = toy(2)[0].images[0]
    theirs = Client(URL, model=last["name"], transport=http._transport).predict([(image, "a red square")])
    np.testing.assert_allclose(theirs, again.predict([(image, "a red square")]), atol=1e-5)


def test_a_lesson_starts_from_the_score_that_was_asked_for(folder: str, tmp_path: Path) -> None:
    """On a model whose adapter adds the denoising score to attention."""
    score = ScoreConfig("attention", (50,), bare=ScoreConfig("denoising", (50, 450)), bare_weight=2.0)
    adapter = save_adapter(tmp_path / "mixed", folder, score=score)
    shelf = Shelf.load([folder], {"mixed": str(adapter)})
    assert lessons._copy(shelf, "mixed", "attention")[0].score_config == ScoreConfig("attention", (50, 450))
    assert lessons._copy(shelf, "mixed", None)[0].score_config == ScoreConfig("denoising", (50, 450))


def test_a_shelf_scores_as_the_matcher_does(tmp_path: Path) -> None:
    """At timesteps of the model's family."""
    pipeline("sd3").save_pretrained(tmp_path / "flow")
    name = str(tmp_path / "flow")
    own = Matcher.from_pretrained(name, score="attention").score_config
    assert Shelf.load([name], score="attention").peek(name).score_config == own
    assert own.timesteps != ScoreConfig("attention").timesteps


def test_lessons_are_refused_in_words(http: TestClient, local: Matcher) -> None:
    def refused(**body: Any) -> tuple[int, str]:
        answer = http.post("/playground/lessons", json=body)
        return answer.status_code, answer.json()["error"]["message"]

    assert refused() == (422, refused()[1])
    assert "4 or more" in refused()[1]
    assert refused(scenes=1000)[0] == 422
    assert refused(scenes=8, method="magic")[0] == 422
    assert refused(marks=[{"image": IMAGE, "text": " ", "right": True}])[0] == 422
    assert http.get("/playground/lessons/nonesuch").status_code == 404
    with TestClient(create_app(local, ServeConfig(teach=False)), base_url=URL) as other:
        assert other.post("/playground/lessons", json={"scenes": 8}).status_code == 403


# The process


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for options in (
        ("--host", "0.0.0.0"),
        ("--port", "70000"),
        ("--host", "192.0.2.1", "--public"),
        ("--token-file", str(tmp_path / "no")),
        ("--adapter", "a=x", "--adapter", "a=y"),
    ):
        assert main(["serve", *options]) == 2
        said = capsys.readouterr().err
        assert "expected" in said or "choose another" in said


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """asyncio turns Nagle's algorithm off for sockets that say they are TCP, and for no others."""
    with listen(ServeConfig(port=0)) as bound:
        bound.listen()
        with socket.create_connection(bound.getsockname()):
            taken, _ = bound.accept()
            with taken:
                assert taken.proto == socket.IPPROTO_TCP


@pytest.mark.slow
def test_sigterm_finishes_what_was_taken_and_a_kill_answers_nothing_wrong() -> None:
    matcher = Matcher.from_pretrained("tiny")
    image = picture(0, 32)
    texts = [f"a red circle {i}" for i in range(24)]
    right = matcher.score([image], texts).scores
    for how in (signal.SIGTERM, signal.SIGKILL):
        with looking.serving(OMP_NUM_THREADS="1") as (process, url):
            with Client(url, retries=0) as client, ThreadPoolExecutor(4) as pool:
                assert client.config["model"] == "tiny"
                asked = [pool.submit(client.score, [image], texts) for _ in range(4)]
                time.sleep(0.4)
                os.kill(process.pid, how)
                outcomes = [f.exception(60) for f in asked]
            process.wait(60)
        # whoever got an answer got the right one; the others were told that there is none
        for future, error in zip(asked, outcomes, strict=True):
            if error is None:
                np.testing.assert_allclose(future.result().scores, right, atol=1e-5)
            else:
                assert isinstance(error, ServiceError)
        if how == signal.SIGTERM:
            assert process.returncode in (0, -signal.SIGTERM)
    with looking.served(OMP_NUM_THREADS="1") as url, Client(url) as client:
        np.testing.assert_allclose(client.score([image], texts[:2]).scores, right[:, :2], atol=1e-5)
