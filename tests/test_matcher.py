"""The facade: shapes and orders of what it returns, what an adapter brings, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dsd
from dsd import prompts
from dsd.adapters import Adapter
from dsd.contracts import AdapterError, Example, ImageError, MatcherProtocol, ModelError, OptionError, TextError
from dsd.learn import FitConfig
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.scores import ScoreConfig
from looks import looks_as
from models import PIXELS, picture, save_adapter

Pipe = Callable[..., str]
IMAGES = [picture(i) for i in range(3)]
TEXTS = ["a red circle left of a dog", "cat", "a blue square", "the dog " * 13]


@pytest.fixture(scope="module")
def matcher(pipe: Pipe) -> Matcher:
    return Matcher.from_pretrained(pipe(), timesteps=(200, 700))


@pytest.fixture(scope="module")
def adapter(pipe: Pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapters") / "mine", pipe())


def gap(a: Matcher, b: Matcher) -> float:
    """The largest difference between two matchers' scores."""
    return float(np.abs(a.score(IMAGES, TEXTS).scores - b.score(IMAGES, TEXTS).scores).max())


# Scores


def test_matcher_keeps_the_protocol(matcher: Matcher) -> None:
    assert isinstance(matcher, MatcherProtocol)
    assert dsd.Matcher is Matcher


def test_table(matcher: Matcher, tmp_path: Path) -> None:
    IMAGES[1].save(tmp_path / "b.png")
    table = matcher.score([IMAGES[0], tmp_path / "b.png", np.array(IMAGES[2])], TEXTS)
    assert table.scores.shape == (3, 4)
    assert table.scores.dtype == np.float32
    assert table.images == ("image 0", str(tmp_path / "b.png"), "image 2")
    assert table.texts == tuple(TEXTS)
    for i in range(3):
        for j in range(4):
            assert table.scores[i, j] == pytest.approx(matcher.predict([(IMAGES[i], TEXTS[j])])[0], abs=1e-5)


def test_configuration_tells_what_made_the_scores(matcher: Matcher, pipe: Pipe) -> None:
    config = matcher.score([IMAGES[0]], ["cat"]).config
    assert config["model"] == pipe()
    assert config["score"] == {"kind": "denoising", "timesteps": [200, 700], "seed": 0}
    assert (config["size"], config["dtype"], config["adapter"]) == (PIXELS, "float32", None)
    assert matcher.score_config == ScoreConfig("denoising", (200, 700))


def test_one_image_and_one_text_need_no_list(matcher: Matcher, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "a.png")
    expected = matcher.score([IMAGES[0]], ["cat"]).scores
    for image in (IMAGES[0], np.array(IMAGES[0]), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(matcher.score(image, "cat").scores, expected)
    assert matcher.score(tuple(IMAGES), tuple(TEXTS)).scores.shape == (3, 4)


@pytest.mark.parametrize(
    ("images", "texts", "error"),
    [
        ([], ["cat"], OptionError),
        ([IMAGES[0]], [], OptionError),
        ([IMAGES[0]], [""], TextError),
        ([IMAGES[0]], "   ", TextError),
        ([IMAGES[0]], [None], TextError),
        (["none.png"], ["cat"], ImageError),
        ([7], ["cat"], ImageError),
        ([np.zeros((4, 4, 3))], ["cat"], ImageError),
        (None, "cat", ImageError),
    ],
)
def test_bad_input(matcher: Matcher, images: Any, texts: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected") as caught:
        matcher.score(images, texts)
    assert "\n" not in str(caught.value)


# Rankings


def test_texts_are_ranked_for_an_image(matcher: Matcher) -> None:
    scores = matcher.score(IMAGES[0], TEXTS).scores[0]
    found = matcher.rank(IMAGES[0], TEXTS)
    assert [r.index for r in found] == sorted(range(4), key=lambda i: -scores[i])
    assert [r.candidate for r in found] == [TEXTS[r.index] for r in found]
    assert [r.score for r in found] == pytest.approx([scores[r.index] for r in found])
    assert [r.score for r in found] == sorted((r.score for r in found), reverse=True)


def test_images_are_ranked_for_a_text(matcher: Matcher, tmp_path: Path) -> None:
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, name in zip(IMAGES, names, strict=True):
        image.save(name)
    scores = matcher.score(IMAGES, "cat").scores[:, 0]
    order = sorted(range(3), key=lambda i: -scores[i])
    assert [r.candidate for r in matcher.rank("cat", names)] == [names[i] for i in order]
    assert [r.candidate for r in matcher.rank("cat", IMAGES)] == [f"image {i}" for i in order]
    assert [r.index for r in matcher.rank("cat", tuple(IMAGES))] == order


def test_a_query_that_names_a_file_is_an_image(matcher: Matcher, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "a.png")
    expected = matcher.rank(IMAGES[0], TEXTS)
    for query in (str(tmp_path / "a.png"), tmp_path / "a.png", np.array(IMAGES[0])):
        assert matcher.rank(query, TEXTS) == expected


def test_equal_scores_keep_their_order(matcher: Matcher) -> None:
    found = matcher.rank(IMAGES[0], ["cat", "cat", "cat"])
    assert [r.index for r in found] == [0, 1, 2]


@pytest.mark.parametrize(
    ("query", "candidates", "error"),
    [
        (IMAGES[0], [], OptionError),
        ("cat", [], OptionError),
        ("cat", ["none.png"], ImageError),
        ("none.png", ["a cat", "a dog"], ImageError),
        (Path("none.png"), ["a cat"], ImageError),
        (IMAGES[0], [IMAGES[1]], TextError),
        (IMAGES[0], [""], TextError),
        ("", [IMAGES[0]], TextError),
        ("a\x00cat", ["none.png"], ImageError),
    ],
)
def test_rankings_that_cannot_be(matcher: Matcher, query: Any, candidates: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected") as caught:
        matcher.rank(query, candidates)
    assert "\n" not in str(caught.value)


def test_a_query_image_that_is_missing_is_named(matcher: Matcher) -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        matcher.rank("none.png", ["a cat", "a dog"])


# Probabilities


def test_probabilities_are_of_the_scaled_scores(pipe: Pipe, adapter: Path) -> None:
    taught = Matcher.from_pretrained(pipe(), adapter=adapter)
    found = taught.probability(IMAGES, TEXTS)
    odds = np.exp(2.5 * taught.score(IMAGES, TEXTS).scores.astype(np.float64))
    assert found.shape == (3, 4)
    assert np.allclose(found, odds / odds.sum(1, keepdims=True), atol=1e-9)
    assert np.allclose(found.sum(1), 1)
    assert [r.index for r in taught.rank(IMAGES[0], TEXTS)] == list(np.argsort(-found[0]))


def test_probabilities_of_far_scores_are_finite(pipe: Pipe, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "sure", pipe(), scale=1e6)
    found = Matcher.from_pretrained(pipe(), adapter=folder).probability(IMAGES[0], TEXTS)
    assert found.max() == pytest.approx(1)
    assert np.isfinite(found).all()


def test_probabilities_need_a_calibration(matcher: Matcher, pipe: Pipe, tmp_path: Path) -> None:
    uncalibrated = Matcher.from_pretrained(pipe(), adapter=save_adapter(tmp_path / "a", pipe(), scale=None))
    for one in (matcher, uncalibrated):
        with pytest.raises(AdapterError, match="calibration"):
            one.probability(IMAGES[0], TEXTS)


# Loading


def test_a_calibration_is_of_one_score(pipe: Pipe, adapter: Path) -> None:
    own = Matcher.from_pretrained(pipe(), adapter=adapter, seed=5)  # other noise, the same score
    assert own.scale is not None
    for options in ({"score": "paper"}, {"timesteps": (100, 900)}, {"layers": ("mid_block",)}):
        other = Matcher.from_pretrained(pipe(), adapter=adapter, **options)
        assert other.scale is None
        with pytest.raises(AdapterError, match="than were calibrated"):
            other.probability(IMAGES[0], TEXTS)


def test_an_adapter_brings_its_score_and_its_base(pipe: Pipe, adapter: Path) -> None:
    own = Matcher.from_pretrained(adapter=adapter)
    assert own.backbone.name == pipe()
    assert own.score_config == ScoreConfig("attention", (50, 450))
    named = Matcher.from_pretrained(pipe(), adapter=adapter, score="attention")
    assert named.score_config == own.score_config
    assert gap(own, named) < 1e-5
    assert gap(own, Matcher.from_pretrained(pipe(), score=own.score_config)) > 1e-3


def test_a_named_score_is_that_score_alone(pipe: Pipe, adapter: Path, tmp_path: Path) -> None:
    own = Adapter.load(adapter)
    mixed = replace(own, score=replace(own.score, bare=ScoreConfig("denoising", (100,)), bare_weight=3.0))
    mixed.save(tmp_path / "mixed")
    assert Matcher.from_pretrained(pipe(), adapter=tmp_path / "mixed").score_config == mixed.score
    alone = Matcher.from_pretrained(pipe(), adapter=tmp_path / "mixed", score="attention")
    assert alone.score_config == own.score
    assert alone.scale is None  # what was calibrated is the sum
    assert gap(alone, Matcher.from_pretrained(pipe(), adapter=adapter)) < 1e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"timesteps": [7]}, ScoreConfig("attention", (7,))),
        ({"seed": 3}, ScoreConfig("attention", (50, 450), seed=3)),
        ({"layers": ["mid_block"]}, ScoreConfig("attention", (50, 450), ("mid_block",))),
        ({"score": "paper"}, ScoreConfig("paper", (50, 450))),
        ({"score": ScoreConfig("denoising", (1, 2)), "seed": 5}, ScoreConfig("denoising", (1, 2), seed=5)),
    ],
    ids=["timesteps", "seed", "layers", "kind", "whole"],
)
def test_options_override_the_adapters_score(
    pipe: Pipe, adapter: Path, options: dict[str, Any], expected: ScoreConfig
) -> None:
    assert Matcher.from_pretrained(pipe(), adapter=adapter, **options).score_config == expected


def test_an_adapter_brings_its_size(pipe: Pipe, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "large", pipe(), size=24)
    assert Matcher.from_pretrained(pipe(), adapter=folder).config["size"] == 24
    assert Matcher.from_pretrained(pipe(), adapter=folder, size=32).config["size"] == 32
    with pytest.raises(OptionError, match="size 0"):
        Matcher.from_pretrained(pipe(), adapter=folder, size=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nonesuch"}, ModelError),
        ({"score": "nonesuch"}, OptionError),
        ({"timesteps": [1000]}, OptionError),
        ({"timesteps": []}, OptionError),
        ({"layers": ["nonesuch"], "score": "attention"}, OptionError),
        ({"seed": -1}, OptionError),
        ({"size": 4}, OptionError),
        ({"batch_size": 0}, OptionError),
        ({"noise": np.zeros((1, 4, 8, 8))}, OptionError),
        ({"adapter": "/nonesuch"}, AdapterError),
    ],
)
def test_bad_options(pipe: Pipe, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        Matcher.from_pretrained(**{"model": pipe(), **options})


def test_a_matcher_takes_on_what_was_learned_before(pipe: Pipe, adapter: Path, tmp_path: Path) -> None:
    bare, taught = Matcher.from_pretrained(pipe()), Matcher.from_pretrained(adapter=adapter)
    switched = Matcher.from_pretrained(pipe())
    assert gap(switched, taught) > 1e-2
    assert gap(switched.load_adapter(adapter), taught) == 0
    assert gap(switched.load_adapter(Adapter.load(adapter)), taught) == 0
    assert gap(switched.forget(), bare) == 0
    large = save_adapter(tmp_path / "large", pipe(), size=24)
    with pytest.raises(OptionError, match="24 pixels"):
        switched.load_adapter(large)
    assert gap(switched, bare) == 0


def test_adapter_for_another_base(pipe: Pipe, adapter: Path) -> None:
    with pytest.raises(AdapterError, match="adapter for"):
        Matcher.from_pretrained(pipe(seed=1), adapter=adapter)


def test_a_backbone_is_bare_again_after_a_refused_request(pipe: Pipe, adapter: Path, matcher: Matcher) -> None:
    loaded = Adapter.load(adapter)
    with pytest.raises(OptionError, match="size"):
        Matcher(matcher.backbone, adapter=loaded, size=4)
    assert not prompts.parameters(matcher.backbone.denoiser)


# Learning and saving


EXAMPLES = [Example(f"{i}", (IMAGES[i],), ("cat", "dog"), ((0, i % 2),)) for i in range(3)]
VALIDATION = [Example(f"v{i}", (picture(10 + i),), ("cat", "dog"), ((0, i % 2),)) for i in range(6)]
STEPS = FitConfig(steps=2, batch=2, check_every=1)


@pytest.fixture
def taught(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> Matcher:
    """A matcher after a lesson that is taken to be worth keeping."""
    losses = iter([0.9, 0.5, 0.4] * 2)
    looks_as(monkeypatch, lambda _: next(losses))
    matcher = Matcher.from_pretrained(pipe(), score="attention", timesteps=(100,))
    assert matcher.fit(EXAMPLES, VALIDATION, config=STEPS, prompt=PromptConfig(rank=2)) is matcher
    return matcher


def test_what_was_learned_survives_the_disk(taught: Matcher, pipe: Pipe, tmp_path: Path) -> None:
    folder = taught.save_pretrained(tmp_path / "mine")
    again = Matcher.from_pretrained(adapter=folder)
    assert again.backbone.name == pipe()
    assert gap(again, taught) < 1e-5
    assert np.allclose(again.probability(IMAGES, TEXTS), taught.probability(IMAGES, TEXTS), atol=1e-5)
    assert gap(Matcher.from_pretrained(pipe(), score=taught.score_config), taught) > 1e-4
    assert again.config["adapter"]["training"]["examples"] == 3


def test_a_new_lesson_replaces_the_old(taught: Matcher) -> None:
    assert taught.adapter is not None
    first = taught.adapter.state
    taught.fit(EXAMPLES, VALIDATION, config=replace(STEPS, seed=9), prompt=PromptConfig(rank=1))
    assert taught.adapter.prompts == PromptConfig(rank=1)
    assert len(prompts.parameters(taught.backbone.denoiser)) == len(first)


def test_a_failed_lesson_leaves_the_zero_shot_matcher(taught: Matcher, pipe: Pipe) -> None:
    with pytest.raises(OptionError, match="at least one"):
        taught.fit([], config=STEPS)
    assert taught.adapter is None
    assert gap(Matcher.from_pretrained(pipe(), score=taught.score_config), taught) < 1e-5


def test_nothing_learned_is_not_saved(matcher: Matcher, tmp_path: Path) -> None:
    for save in (lambda: matcher.save_pretrained(tmp_path / "a"), lambda: matcher.push_to_hub("me/mine")):
        with pytest.raises(AdapterError, match="use fit first"):
            save()
    assert not (tmp_path / "a").exists()


def test_push_to_hub(pipe: Pipe, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, name: str, **options: Any) -> None:
            calls.append(("create", name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> SimpleNamespace | str:
            files = sorted(p.name for p in Path(folder_path).iterdir())
            calls.append(("upload", repo_id, files, Adapter.load(folder_path).scale))
            return "https://example.org/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    taught = Matcher.from_pretrained(pipe(), adapter=adapter)
    assert taught.push_to_hub("me/mine", private=True, token="secret") == "https://example.org/me/mine"
    assert calls == [
        ("token", "secret"),
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", ["README.md", "adapter_config.json", "adapter_model.safetensors"], 2.5),
    ]
