"""Explanations: maps of constructed attention and errors, shares that sum to the score, differences of two."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsd import explain as explaining
from dsd import probe
from dsd.contracts import DsdError, ImageError, OptionError, TextError
from dsd.explain import enlarged, leave_out, replaced, word_maps
from dsd.explanation import ExplainConfig, Explanation, find_phrase, noun_phrases
from dsd.matcher import Matcher
from dsd.scorer import Scorer
from dsd.scores import WEIGHTED, Features, ScoreConfig
from models import PIXELS, picture

Pipe = Callable[..., str]
IMAGES = [picture(i) for i in range(3)]
QUICK = ExplainConfig(timesteps=(300,), draws=1, words=False)
WORDS = replace(QUICK, words=True)
TEXT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def matcher(pipe: Pipe) -> Matcher:
    return Matcher.from_pretrained(pipe(), timesteps=(200, 700))


def check_maps(found: Explanation, words: tuple[str, ...], size: int = PIXELS) -> None:
    assert found.words == words
    assert found.maps.shape == (len(words), size, size)
    assert found.maps.dtype == np.float32
    assert found.maps.min() >= 0
    peaks = found.maps.max((1, 2))
    assert np.allclose(peaks, found.strength > 0)
    assert isinstance(found.image, Image.Image)
    assert found.image.size == (size, size)


# Maps


@pytest.mark.parametrize("method", ["joint", "agreement", "evidence", "effect", "attention", "raw-attention"])
def test_explanation_has_a_map_a_word(matcher: Matcher, method: Any) -> None:
    config = ExplainConfig(method, timesteps=(300, 600), draws=2, words=False)
    text = "a red circle, left of a Zebra"
    found = matcher.explain(IMAGES[0], text, config=config)
    check_maps(found, ("a", "red", "circle", ",", "left", "of", "a", "zebra"))
    assert [p.text for p in found.phrases] == ["red circle", "zebra"]
    assert not np.allclose(found.maps[1], found.maps[7], atol=0.01)
    again = matcher.explain(IMAGES[0], text, config=config)
    assert np.array_equal(found.maps, again.maps)
    assert np.isnan(found.by_word).all()


def test_maps_do_not_depend_on_the_batch(matcher: Matcher) -> None:
    config = ExplainConfig(timesteps=(300, 600), draws=2)
    drawn = [
        word_maps(
            Scorer(matcher.backbone, matcher.score_config, batch_size=n), IMAGES[0], TEXT, [(1, 3)], config=config
        )
        for n in (1, 3, 64)
    ]
    assert drawn[0].max() > 0
    for other in drawn[1:]:
        # roots of small numbers are far apart
        np.testing.assert_allclose(other**2, drawn[0] ** 2, atol=1e-4 * drawn[0].max() ** 2)


def test_maps_survive_a_lack_of_memory(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExplainConfig(timesteps=(300, 600), draws=2)
    whole = word_maps(Scorer(matcher.backbone, matcher.score_config), IMAGES[0], TEXT, [(1, 3)], config=config)
    predict, tried = type(matcher.backbone).predict_noise, []

    def small(self: Any, noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        tried.append(len(noised))
        out = predict(self, noised, *rest)
        if len(noised) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    monkeypatch.setattr(type(matcher.backbone), "predict_noise", small)
    scorer = Scorer(matcher.backbone, matcher.score_config)
    found = word_maps(scorer, IMAGES[0], TEXT, [(1, 3)], config=config)
    np.testing.assert_allclose(found**2, whole**2, atol=1e-4 * whole.max() ** 2)
    assert max(tried) > 1


@pytest.mark.parametrize("text", ["the dog " * 13, "قطة فوق كلب", "a 🐕 dog", "cat"])
def test_captions_of_all_kinds_are_explained(matcher: Matcher, text: str) -> None:
    (states,) = matcher.backbone.encode_texts([text])
    found = matcher.explain(IMAGES[0], text, config=QUICK)
    check_maps(found, states.words[0].spelling)


def test_explanation_of_other_sizes(pipe: Pipe) -> None:
    matcher = Matcher.from_pretrained(pipe(), size=27, timesteps=(300,))
    wide = picture(0, 90).resize((120, 90))
    found = matcher.explain(wide, "red cat", config=QUICK)
    check_maps(found, ("red", "cat"), 27)
    assert found.crop == (15, 0, 105, 90)


@torch.no_grad()
def test_start_end_and_padding_are_left_out(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up attention: nearly all of it on the start, and of the rest, "dog" left and "cat" right."""

    def record(self: Any, parts: dict[str, torch.Tensor], *_: Any) -> probe.LayerRecord:
        side = round(parts["query"].shape[2] ** 0.5)
        tokens = parts["text key"].shape[2]
        maps = torch.full((1, side, side, tokens), 1e-4)
        maps[..., 0] = 1.0
        maps[..., 4:] = torch.rand(1, side, side, tokens - 4)
        maps[..., 2] = 0.005
        maps[:, -side // 4 :, -side // 4 :, 2] = 0.007  # a little more in one corner than elsewhere
        maps[:, :, : side // 2, 1] = 0.02
        maps[:, :, side // 2 :, 3] = 0.02
        maps[:, : side // 2, :, 1:4] /= 10  # the rest goes to the start: the words' shares of what is left stay
        return probe.LayerRecord(torch.zeros(1, 1), torch.zeros(1, 1), maps.flatten(1, 2))

    monkeypatch.setattr(probe.Probe, "_of_image", record)
    config = ExplainConfig("attention", timesteps=(300,), draws=1)
    drawn = word_maps(matcher._scorer, IMAGES[0], "dog and cat", [(0, 1), (1, 2), (2, 3)], config=config)
    dog, and_, cat = drawn / drawn.max((1, 2), keepdims=True)
    half = PIXELS // 2
    assert dog[:, : half - 3].min() > 0.6
    assert cat[:, half + 3 :].min() > 0.6
    assert dog[:, half + 3 :].max() < 0.1
    assert cat[:, : half - 3].max() < 0.1
    # what a word gets everywhere stays dark
    assert and_[-2:, -2:].min() > 0.8
    assert and_[: half - 3].max() < 0.1


def test_errors_become_maps(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up errors of the noise, against the formulas written out."""
    rng = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}

    def errors(
        self: Any, latent: torch.Tensor, text: str, timesteps: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        assert timesteps.tolist() == [200, 200, 500, 500]
        assert noise.shape == (4, *latent.shape)
        return made.setdefault(text, torch.randn(noise.shape, generator=rng))

    monkeypatch.setattr(Scorer, "errors", errors)
    for method in ("effect", "evidence", "agreement"):
        config = ExplainConfig(method, timesteps=(200, 500), draws=2)  # type: ignore[arg-type]
        (found,) = word_maps(matcher._scorer, IMAGES[0], "a red cat", [(1, 2)], config=config)
        whole, without = made["a red cat"].numpy(), made["a cat"].numpy()
        total = np.zeros(whole.shape[-2:])
        for rows in (slice(2), slice(2, 4)):
            moved = ((whole - without)[rows] ** 2).mean((0, 1))
            helped = (without[rows] ** 2 - whole[rows] ** 2).mean((0, 1))
            value = {"effect": moved, "evidence": helped, "agreement": (moved + helped) / 2}[method]
            total += value / moved.mean() / 2
        wanted = enlarged(torch.from_numpy(total).float(), PIXELS).clamp(min=0).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_joint_maps_take_the_evidence_of_the_phrase(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    errors = Scorer.errors

    def listened(self: Any, latent: Any, text: str, *rest: Any) -> Any:
        asked.append(text)
        return errors(self, latent, text, *rest)

    monkeypatch.setattr(Scorer, "errors", listened)
    word_maps(matcher._scorer, IMAGES[0], TEXT, [(1, 2), (2, 3), (1, 3), (3, 4)], config=QUICK)
    assert asked == [TEXT, "a left of a blue square", "a red circle of a blue square"]


def test_joint_maps_are_made_of_their_parts(matcher: Matcher) -> None:
    def drawn(method: Any, *spans: tuple[int, int]) -> np.ndarray:
        config = ExplainConfig(method, timesteps=(300, 600), draws=2)
        return word_maps(matcher._scorer, IMAGES[0], TEXT, spans, config=config)

    word, phrase = drawn("attention", (2, 3), (1, 3))
    (agreement,) = drawn("agreement", (1, 3))
    for span, attention in (((2, 3), (word / word.max() + phrase / phrase.max()) / 2 * word.max()), ((1, 3), phrase)):
        np.testing.assert_allclose(drawn("joint", span)[0], np.sqrt(agreement * attention), atol=1e-5)


def test_layers_and_heads_can_be_chosen(matcher: Matcher) -> None:
    def drawn(**what: Any) -> np.ndarray:
        config = ExplainConfig("raw-attention", timesteps=(300,), draws=1, **what)
        return word_maps(matcher._scorer, IMAGES[0], "red cat", [(0, 1)], config=config)

    heads = probe.cross_attention_layers(matcher.backbone.denoiser)[
        "mid_block.attentions.0.transformer_blocks.0.attn2"
    ].heads
    each = [drawn(layers=("mid_block",), heads=(h,)) for h in range(heads)]
    assert not np.allclose(each[0], each[1], atol=1e-3)
    inside = np.min(each, 0) > 0  # where none of them falls below zero between the cells
    assert inside.mean() > 0.2
    np.testing.assert_allclose(np.mean(each, 0)[inside], drawn(layers=("mid_block",))[inside], atol=1e-5)
    assert not np.allclose(drawn(), drawn(layers=("mid_block",)), atol=1e-3)


@pytest.mark.parametrize("cells", [4, 5, 8])
def test_enlarging_keeps_the_mean_and_the_place(cells: int) -> None:
    rng = torch.Generator().manual_seed(cells)
    grid = torch.randn((3, cells, cells), generator=rng)
    large = enlarged(grid, 8 * cells)
    torch.testing.assert_close(large.mean((1, 2)), grid.mean((1, 2)))
    torch.testing.assert_close(enlarged(torch.ones(cells, cells), 37), torch.ones(37, 37))
    torch.testing.assert_close(enlarged(grid, cells), grid)
    one = torch.zeros(cells, cells)
    one[1, 2] = 1
    row, column = divmod(int(enlarged(one, 9 * cells).argmax()), 9 * cells)
    assert (row, column) == (9 + 4, 18 + 4)
    # not the nearest cell's value
    assert len(enlarged(one, 9 * cells).unique()) > 100


# Words


def test_noun_phrases() -> None:
    def of(text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[a:b]) for a, b in noun_phrases(words)]

    assert of("a small red circle is to the left of two blue squares") == ["small red circle", "two blue squares"]
    assert of("there is a picture of a dog , and a cat") == ["dog", "cat"]
    assert of("on the left") == []


def test_phrases_are_found_and_asked_for(matcher: Matcher) -> None:
    assert find_phrase(("a", "red", "t", "-", "shirt"), "Red T-shirt") == (1, 5)
    found = matcher.explain(IMAGES[0], TEXT, phrases=["left of", "blue"], config=QUICK)
    assert [(p.text, p.start, p.stop) for p in found.phrases] == [("left of", 3, 5), ("blue", 6, 7)]
    assert found.find("blue square") == (6, 8)
    with pytest.raises(TextError, match="zebra"):
        matcher.explain(IMAGES[0], TEXT, phrases=["zebra"])


def test_words_are_left_out_as_they_are_written() -> None:
    words = ("a", "red", "circle", ",", "left", "of", "a", "zebra")
    assert leave_out("A  Red circle, left of a Zebra", words, (1, 3)) == "A , left of a Zebra"
    # letters elsewhere as they were
    words = ("the", "year", "1", "9", "9", "8", ",", "a", "dog", "'s", "bowl", ".")
    assert leave_out("The year 1998, a  dog's bowl.", words, (1, 2)) == "The 1998, a dog's bowl."
    assert replaced("A dog's bowl.", ("a", "dog", "'s", "bowl", "."), {(1, 2): "cat", (4, 4): "here"}) == (
        "A cat 's bowl here ."
    )
    assert leave_out("cat", ("cat",), (0, 1)) == ""
    # a spelling that is not in the caption
    assert leave_out("İstanbul cat", ("i̇stanbul", "cat"), (0, 1)) == "cat"


# Shares


@pytest.mark.parametrize(
    "score",
    [
        ScoreConfig("denoising", (200, 700)),
        ScoreConfig("attention", (200, 700), layers=("up_blocks",)),
        ScoreConfig("attention-mass", (200, 700)),
        ScoreConfig("paper", (200, 700)),
        ScoreConfig("mixture", (200, 700), weights={"denoising": 2.0, "attention": -0.5, "paper": 1.0}),
    ],
    ids=lambda s: s.kind,
)
def test_shares_sum_to_the_score(pipe: Pipe, score: ScoreConfig) -> None:
    matcher = Matcher.from_pretrained(pipe(), score=score)
    found = matcher.explain(IMAGES[0], "a red cat", config=WORDS)
    assert found.score == pytest.approx(float(matcher.score(IMAGES[0], "a red cat").scores[0, 0]), abs=1e-5)
    assert sum(found.by_timestep.values()) == pytest.approx(found.score, abs=1e-4)
    assert sum(found.by_layer.values()) == pytest.approx(found.score, abs=1e-4)
    assert list(found.by_timestep) == [200, 700]
    assert ("denoising" in found.by_layer) == (score.kind not in ("attention", "attention-mass"))
    # each timestep by itself is a score
    for t, share in found.by_timestep.items():
        noise = matcher._scorer.noise[[score.timesteps.index(t)]].numpy()
        alone = Matcher(matcher.backbone, ScoreConfig(**{**score.__dict__, "timesteps": (t,)}), noise=noise)
        assert 2 * share == pytest.approx(float(alone.score(IMAGES[0], "a red cat").scores[0, 0]), abs=1e-4)
    without = matcher.score(IMAGES[0], ["red cat", "a cat", "a red"]).scores[0]
    np.testing.assert_allclose(found.by_word, found.score - without, atol=1e-5)


def test_shares_of_learned_weights_sum_to_the_score(matcher: Matcher) -> None:
    features = Features(matcher.backbone)
    weights = torch.randn((2, len(features.names)), generator=torch.Generator().manual_seed(0))
    scorer = Scorer(matcher.backbone, ScoreConfig(WEIGHTED, (200, 700)), weights=weights)
    shares = scorer.shares(IMAGES[0], "a red cat")
    assert set(shares) == {*features.layers, "denoising"}
    (score,) = scorer.predict([(IMAGES[0], "a red cat")])
    assert sum(v for share in shares.values() for v in share.values()) == pytest.approx(score, abs=1e-3)


def test_shares_of_a_score_with_that_of_the_bare_model(pipe: Pipe) -> None:
    bare = ScoreConfig("denoising", (200, 700))
    matcher = Matcher.from_pretrained(pipe(), score=ScoreConfig("attention", (200,), bare=bare, bare_weight=2.0))
    found = matcher.explain(IMAGES[0], "a red cat", config=WORDS)
    alone = Matcher(matcher.backbone, bare).score(IMAGES[0], "a red cat").scores[0, 0]
    assert found.by_layer["bare denoising"] == pytest.approx(2 * float(alone), abs=1e-4)
    assert list(found.by_timestep) == [200, 700]
    assert sum(found.by_timestep.values()) == pytest.approx(found.score, abs=1e-4)
    assert sum(found.by_layer.values()) == pytest.approx(found.score, abs=1e-4)


def test_a_caption_of_one_word(pipe: Pipe) -> None:
    """Without it nothing is left: the denoising score of that is 0, an attention score does not exist."""
    for kind, known in (("denoising", True), ("attention", False)):
        found = Matcher.from_pretrained(pipe(), score=kind, timesteps=(300,)).explain(IMAGES[0], "cat", config=WORDS)
        assert bool(np.isfinite(found.by_word[0])) == known
        assert found.by_word[0] == pytest.approx(found.score) or not known
        json.dumps(found.to_dict(), allow_nan=False)


# Differences


def test_captions_compared(matcher: Matcher) -> None:
    other = "a blue circle left of a red square"
    ab, ba = (
        matcher.compare_texts(IMAGES[0], TEXT, other, config=QUICK),
        matcher.compare_texts(IMAGES[0], other, TEXT, config=QUICK),
    )
    assert ab.difference == pytest.approx(ab.a.score - ab.b.score)
    assert ab.difference == -ba.difference
    np.testing.assert_allclose(ab.map, -ba.map, atol=1e-6)
    assert np.abs(ab.map).max() == pytest.approx(1)
    assert [(c.a, c.b) for c in ab.changes] == [("red", "blue"), ("blue", "red")]
    assert [c.share for c in ab.changes] == pytest.approx([-c.share for c in ba.changes], abs=1e-6)
    assert sum(c.share for c in ab.changes) == pytest.approx(ab.difference, abs=1e-6)
    for of, back in ((ab.by_timestep, ba.by_timestep), (ab.by_layer, ba.by_layer)):
        assert sum(of.values()) == pytest.approx(ab.difference, abs=1e-5)
        assert list(of.values()) == pytest.approx([-v for v in back.values()])
    json.dumps(ab.to_dict(), allow_nan=False)


def test_where_captions_disagree(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two captions, each right about one half of the picture, each has its half."""

    def errors(self: Any, latent: torch.Tensor, text: str, timesteps: Any, noise: torch.Tensor) -> torch.Tensor:
        wrong = torch.zeros_like(noise)
        half = noise.shape[-1] // 2
        wrong[..., half:] = 1.0 if "dog" in text else 0.0
        wrong[..., :half] = 1.0 if "cat" in text else 0.0
        return wrong

    monkeypatch.setattr(Scorer, "errors", errors)
    found = matcher.compare_texts(IMAGES[0], "a dog", "a cat", config=ExplainConfig("attention", (300,), 1))
    assert found.map[:, : PIXELS // 2 - 2].min() > 0.8
    assert found.map[:, PIXELS // 2 + 2 :].max() < -0.8
    assert found.strength == pytest.approx(1, abs=0.2)


def test_changes_have_their_shapley_share(pipe: Pipe) -> None:
    matcher = Matcher.from_pretrained(pipe(), timesteps=(300,))
    a, b = "a red circle left of a dog", "a blue square right of a dog"
    found = matcher.compare_texts(IMAGES[0], a, b, config=QUICK)
    assert [(c.a, c.b) for c in found.changes] == [("red circle left", "blue square right")]
    a, b = "a red dog left of a circle", "the red cat left of a square"
    found = matcher.compare_texts(IMAGES[0], a, b, config=QUICK)
    places = [0, 2, 6]
    assert [c.span_a for c in found.changes] == [(i, i + 1) for i in places]

    @cache
    def mixed(chosen: frozenset[int]) -> float:
        words = [(a if i in chosen else b).split()[i] for i in range(7)]
        return float(matcher.score(IMAGES[0], " ".join(words)).scores[0, 0])

    for i, change in zip(places, found.changes, strict=True):
        gains = []
        for order in itertools.permutations(places):
            before = frozenset(order[: order.index(i)])
            gains.append(mixed(before | {i}) - mixed(before))
        assert change.share == pytest.approx(np.mean(gains), abs=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "changes"),
    [
        ("a red dog", "a red dog", []),
        ("a dog", "a big dog", [("", "big")]),
        ("dog above cat", "cat above dog", [("dog", "cat"), ("cat", "dog")]),
        ("a b c d e f g h i j k l m n o p", "a B c D e F g H i J k L m N o P", None),
    ],
)
def test_places_where_captions_differ(a: str, b: str, changes: list[tuple[str, str]] | None) -> None:
    x, y = a.split(), b.split()
    found = explaining._differences(x, y)
    assert explaining._differences(y, x) == [(q, p) for p, q in found]
    if changes is None:
        assert len(found) == 6
        assert found[0][0][0] == 1
        assert found[-1][0][1] == 16
    else:
        assert [(" ".join(x[i:j]), " ".join(y[k:m])) for (i, j), (k, m) in found] == changes


def test_images_compared(matcher: Matcher) -> None:
    ab = matcher.compare_images("a red cat", IMAGES[0], IMAGES[1], config=WORDS)
    ba = matcher.compare_images("a red cat", IMAGES[1], IMAGES[0], config=WORDS)
    scores = matcher.score(IMAGES[:2], "a red cat").scores[:, 0]
    assert ab.difference == pytest.approx(float(scores[0] - scores[1]), abs=1e-5)
    assert ab.difference == -ba.difference
    np.testing.assert_allclose(ab.by_word, -ba.by_word)
    np.testing.assert_allclose(ab.a.maps, ba.b.maps)
    assert sum(ab.by_timestep.values()) == pytest.approx(ab.difference, abs=1e-5)
    json.dumps(ab.to_dict(), allow_nan=False)


# Care


def test_explanation_leaves_the_model_alone(matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    before = matcher.score(IMAGES[0], "cat").scores
    matcher.explain(IMAGES[0], "cat", config=QUICK)
    record = probe.Probe._of_image
    monkeypatch.setattr(probe.Probe, "_of_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        matcher.explain(IMAGES[0], "cat", config=QUICK)
    monkeypatch.setattr(probe.Probe, "_of_image", record)
    scorer = Scorer(matcher.backbone, matcher.score_config)
    assert scorer.predict([(IMAGES[0], "cat")]) == pytest.approx(before[0], abs=1e-5)
    hooks = [h for m in matcher.backbone.denoiser.modules() for h in m._forward_hooks]
    assert hooks == []


@pytest.mark.parametrize(("image", "text", "error"), [(IMAGES[0], " ", TextError), ("none.png", "cat", ImageError)])
def test_explanations_that_cannot_be(matcher: Matcher, image: Any, text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected"):
        matcher.explain(image, text)
    with pytest.raises(error, match="expected"):
        matcher.compare_texts(image, text, text)
    with pytest.raises(error, match="expected"):
        matcher.compare_images(text, image, image)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "magic"},
        {"draws": 0},
        {"draws": 1000},
        {"timesteps": ()},
        {"timesteps": (1000,)},
        {"timesteps": (-1,)},
        {"layers": ("nowhere",)},
        {"heads": (99,)},
        {"heads": (-1,)},
    ],
    ids=str,
)
def test_options_that_cannot_be(matcher: Matcher, config: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        matcher.explain(IMAGES[0], "cat", config=ExplainConfig(**config))


def test_runs_of_words_that_cannot_be(matcher: Matcher) -> None:
    for span in ((0, 0), (0, 3), (-1, 1), (2, 1)):
        with pytest.raises(DsdError, match="expected"):
            word_maps(matcher._scorer, IMAGES[0], "red cat", [span], config=QUICK)


def test_values_for_json(matcher: Matcher) -> None:
    found = matcher.explain(IMAGES[0], TEXT, config=QUICK)
    small = found.to_dict(side=5, image=False)
    assert np.shape(small["maps"]) == (len(found.words), 5, 5)
    assert "image" not in small
    whole = json.loads(json.dumps(found.to_dict(side=None), allow_nan=False))
    np.testing.assert_allclose(whole["maps"], found.maps, atol=1e-4)
    assert whole["image"].startswith("data:image/png;base64,")
