"""A pair's score depends on nothing but the pair: not on its batch, its order, its neighbours or the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsd import prompts
from dsd.backbone import Backbone, TextStates, load_backbone
from dsd.contracts import ImageError, ModelError, OptionError, TextError
from dsd.scorer import Cache, Scorer, common_noise
from dsd.scores import MIXTURE, SCORES, Pass, ScoreConfig, noised_pass
from models import PIXELS, picture

Pipe = Callable[..., str]
TIMESTEPS = (200, 800)
IMAGES = [picture(i) for i in range(3)]
TEXTS = ["a red circle left of a dog", "cat", "a blue square", "the dog " * 13, "a zebra, and a unicorn; " * 3]
"""Of one, one, one, two and three windows."""
CONFIGS = {kind: ScoreConfig(kind, TIMESTEPS) for kind in SCORES}
CONFIGS[MIXTURE] = ScoreConfig(MIXTURE, TIMESTEPS, weights={"attention": 1.0, "paper": 0.5, "denoising": 2.0})


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


@pytest.fixture(scope="module")
def tables(backbone: Backbone) -> dict[str, np.ndarray]:
    """(images, texts) of every kind, each pair scored alone."""
    scorer = Scorer(backbone, CONFIGS["attention"])

    def table(config: ScoreConfig) -> np.ndarray:
        scorer.use(config)
        return np.array([[scorer.predict([(i, t)])[0] for t in TEXTS] for i in IMAGES])

    return {kind: table(config) for kind, config in CONFIGS.items()}


kinds = pytest.mark.parametrize("kind", CONFIGS)


# Independence


@kinds
@torch.no_grad()
def test_scores_are_means_over_timesteps_of_single_passes(
    backbone: Backbone, tables: dict[str, np.ndarray], kind: str
) -> None:
    """The scorer's bookkeeping against one pass after another."""
    scorer = Scorer(backbone, CONFIGS[kind])
    noise = common_noise((4, 8, 8), len(TIMESTEPS), 0)
    (blank,) = backbone.encode_texts([""])
    for i, j in ((0, 0), (1, 3), (2, 4)):
        latent, (text,) = backbone.encode_images([IMAGES[i]]), backbone.encode_texts([TEXTS[j]])
        values = []
        for step, t in enumerate(TIMESTEPS):
            one = (backbone, latent, noise[step : step + 1], torch.tensor([t]))
            made = noised_pass(*one, text, scorer.score.layers)
            values.append(float(scorer.score(made, noised_pass(*one, blank, scorer.score.layers))))
        assert tables[kind][i, j] == pytest.approx(sum(values) / len(values), abs=1e-5)


@kinds
def test_alone_in_a_batch_and_in_a_matrix(backbone: Backbone, tables: dict[str, np.ndarray], kind: str) -> None:
    scorer = Scorer(backbone, CONFIGS[kind])
    matrix = scorer.predict([(i, t) for i in IMAGES for t in TEXTS]).reshape(3, 5)
    assert matrix.dtype == np.float32
    assert np.abs(matrix - tables[kind]).max() < 1e-5
    some = [(2, 4), (0, 0), (1, 3), (2, 0), (0, 1), (1, 1), (0, 4)]
    batch = Scorer(backbone, CONFIGS[kind], batch_size=7).predict([(IMAGES[i], TEXTS[t]) for i, t in some])
    assert np.abs(batch - [tables[kind][p] for p in some]).max() < 1e-5


@kinds
def test_order_and_repeats_do_not_matter(backbone: Backbone, tables: dict[str, np.ndarray], kind: str) -> None:
    pairs = [(i, t) for i in range(3) for t in range(5)] + [(1, 1), (1, 3), (1, 1)]
    order = np.random.default_rng(0).permutation(len(pairs))
    found = Scorer(backbone, CONFIGS[kind]).predict([(IMAGES[pairs[k][0]], TEXTS[pairs[k][1]]) for k in order])
    assert np.abs(found - [tables[kind][pairs[k]] for k in order]).max() < 1e-5


def test_kinds_differ_and_pairs_differ(tables: dict[str, np.ndarray]) -> None:
    """Else the comparisons above would hold for a constant."""
    for kind, table in tables.items():
        assert len(set(table.ravel().tolist())) == 15, kind
        assert min(table.std(0).min(), table.std(1).min()) > 1e-4, kind


def test_terms_are_given_beside_the_score(backbone: Backbone, tables: dict[str, np.ndarray]) -> None:
    weights = CONFIGS[MIXTURE].weights
    assert weights is not None
    total, parts = Scorer(backbone, CONFIGS[MIXTURE]).predict_parts([(IMAGES[0], t) for t in TEXTS])
    assert parts.keys() == weights.keys()
    for kind, values in parts.items():
        assert np.abs(values - tables[kind][0]).max() < 1e-5
    assert np.allclose(total, sum(w * parts[k] for k, w in weights.items()), atol=1e-5)


def test_nothing_to_score(backbone: Backbone) -> None:
    found = Scorer(backbone, CONFIGS["paper"]).predict([])
    assert found.shape == (0,)
    assert found.dtype == np.float32


def test_more_pairs_than_are_held_at_once(
    backbone: Backbone, tables: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "CHUNK", 4)
    found = Scorer(backbone, CONFIGS["denoising"]).predict([(i, t) for i in IMAGES for t in TEXTS])
    assert np.abs(found.reshape(3, 5) - tables["denoising"]).max() < 1e-5


def test_any_form_of_an_image_scores_the_same(backbone: Backbone, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "a.png")
    forms = [IMAGES[0], np.array(IMAGES[0]), tmp_path / "a.png", str(tmp_path / "a.png")]
    found = Scorer(backbone, CONFIGS["denoising"]).predict([(form, "cat") for form in forms])
    assert len(set(found.tolist())) == 1


# Seeds and noise


def test_given_noise_is_of_one_score(pipe: Pipe) -> None:
    backbone = load_backbone(pipe())
    score = ScoreConfig("attention", (100,), bare=ScoreConfig("denoising", (100, 500)))
    for rows in (1, 2, 3):
        noise = np.zeros((rows, *backbone.latent_shape(backbone.image_size)), np.float32)
        with pytest.raises(OptionError, match="leave the noise out"):
            Scorer(backbone, score, noise=noise)


@kinds
def test_a_seed_decides_everything(backbone: Backbone, kind: str) -> None:
    def run(seed: int) -> np.ndarray:
        torch.manual_seed(int(np.random.default_rng().integers(1000)))  # the surroundings' state is of no account
        config = ScoreConfig(kind, TIMESTEPS, weights=CONFIGS[kind].weights, seed=seed)
        return Scorer(backbone, config).predict([(IMAGES[0], t) for t in TEXTS[:2]])

    assert np.array_equal(run(0), run(0))
    assert (run(0) != run(1)).all()


@pytest.fixture
def passes(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """(timestep, noise) of each row that is noised."""
    seen: list[tuple[Tensor, Tensor]] = []
    add = backbone.add_noise

    def spy(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        seen.extend(zip(timesteps, noise, strict=True))
        return add(latents, noise, timesteps)

    monkeypatch.setattr(backbone, "add_noise", spy)
    return seen


def test_all_candidates_and_the_empty_caption_have_one_noise(
    backbone: Backbone, passes: list[tuple[Tensor, Tensor]]
) -> None:
    Scorer(backbone, CONFIGS["paper"], batch_size=4).predict([(i, t) for i in IMAGES for t in TEXTS])
    by_timestep: dict[int, list[Tensor]] = {}
    for t, noise in passes:
        by_timestep.setdefault(int(t), []).append(noise)
    assert sorted(by_timestep) == sorted(TIMESTEPS)
    for rows in by_timestep.values():
        assert len(rows) == 3 * 5 + 3  # and the empty caption once for each image
        assert all(torch.equal(row, rows[0]) for row in rows)
    a, b = (rows[0] for rows in by_timestep.values())
    assert not torch.equal(a, b)


def test_given_noise_is_used_in_the_order_of_the_timesteps(
    backbone: Backbone, passes: list[tuple[Tensor, Tensor]]
) -> None:
    given = np.random.default_rng(1).normal(size=(2, 4, 8, 8))
    Scorer(backbone, CONFIGS["attention"], noise=given).predict([(IMAGES[0], "cat")])
    for t, noise in passes:
        assert np.allclose(noise, given[TIMESTEPS.index(int(t))], atol=1e-6)


BAD_NOISE = {
    "too few timesteps": np.zeros((1, 4, 8, 8)),
    "another size": np.zeros((2, 4, 64, 64)),
    "one noise": np.zeros((4, 8, 8)),
    "integers": np.zeros((2, 4, 8, 8), int),
    "objects": np.full((2, 4, 8, 8), None),
    "not a number": np.full((2, 4, 8, 8), np.nan),
    "infinite": np.full((2, 4, 8, 8), -np.inf),
    "text": np.array("noise"),
}


@pytest.mark.parametrize("noise", BAD_NOISE.values(), ids=BAD_NOISE.keys())
def test_bad_noise_is_refused(backbone: Backbone, noise: np.ndarray) -> None:
    with pytest.raises(OptionError, match=r"expected finite floats of shape \(2, 4, 8, 8\)"):
        Scorer(backbone, CONFIGS["attention"], noise=noise)


def test_common_noise_is_standard_normal() -> None:
    noise = common_noise((4, 64, 64), 4, 0)
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 7}, {"size": 8193}, {"size": -5}, {"batch_size": 0}])
def test_bad_options_are_refused(backbone: Backbone, options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=str(next(iter(options.values())))):
        Scorer(backbone, CONFIGS["attention"], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 15, 17, 24, 33])
def test_sizes_of_all_kinds(backbone: Backbone, size: int) -> None:
    """Odd sizes too, of which some block halves a rest."""
    found = Scorer(backbone, CONFIGS["paper"], size=size).predict([(IMAGES[0], "cat"), (IMAGES[1], "a dog")])
    assert np.isfinite(found).all()
    assert found[0] != found[1]


# Work that is done once


@pytest.fixture
def counted(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images and texts are encoded, and rows predicted."""
    count = {"images": 0, "texts": 0, "rows": 0}
    images, texts, predict = backbone.encode_images, backbone.encode_texts, backbone.predict_noise

    def spy_images(given: Sequence[Any]) -> Tensor:
        count["images"] += len(given)
        return images(given)

    def spy_texts(given: Sequence[str]) -> list[TextStates]:
        count["texts"] += len(given)
        return texts(given)

    def spy_predict(noised: Tensor, t: Tensor, text: TextStates) -> Tensor:
        count["rows"] += len(noised)
        return predict(noised, t, text)

    monkeypatch.setattr(backbone, "encode_images", spy_images)
    monkeypatch.setattr(backbone, "encode_texts", spy_texts)
    monkeypatch.setattr(backbone, "predict_noise", spy_predict)
    return count


def test_each_image_and_caption_is_encoded_once(backbone: Backbone, counted: dict[str, int], tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "same-as-the-first.png")
    images = [*IMAGES, tmp_path / "same-as-the-first.png", np.array(IMAGES[1])]
    scorer = Scorer(backbone, CONFIGS["attention"], batch_size=2)
    pairs = [(i, t) for i in images for t in TEXTS]
    first = scorer.predict(pairs)
    assert counted == {"images": 3, "texts": 5, "rows": 25 * len(TIMESTEPS)}
    assert np.array_equal(scorer.predict(pairs), first)
    assert (counted["images"], counted["texts"]) == (3, 5)


def test_empty_caption_takes_one_pass_an_image_and_timestep(backbone: Backbone, counted: dict[str, int]) -> None:
    Scorer(backbone, CONFIGS["denoising"]).predict([(i, t) for i in IMAGES for t in TEXTS])
    assert counted["rows"] == (15 + 3) * len(TIMESTEPS)
    assert counted["texts"] == 6


def test_cache_forgets_the_oldest() -> None:
    cache: Cache[int] = Cache(2)
    for key in (1, 2):
        cache.put(key, 10 * key)
    assert cache.get(1) == 10  # now 2 is the oldest
    cache.put(3, 30)
    assert [cache.get(k) for k in (1, 2, 3)] == [10, None, 30]


# Memory and numbers that run out


def limit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception, method: str) -> list[int]:
    """Lets a step of the backbone fail on more than ``rows`` rows; returns the batches that were tried."""
    tried: list[int] = []
    work = getattr(backbone, method)

    def limited(given: Any, *rest: Any) -> Any:
        tried.append(len(given))
        if len(given) > rows:
            raise error
        return work(given, *rest)

    monkeypatch.setattr(backbone, method, limited)
    return tried


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "CPU"])
@pytest.mark.parametrize("kind", ["paper", "attention", MIXTURE])
def test_batch_is_halved_until_it_fits(
    backbone: Backbone,
    tables: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    error: Exception,
) -> None:
    tried = limit(backbone, monkeypatch, 3, error, "predict_noise")
    scorer = Scorer(backbone, CONFIGS[kind], batch_size=16)
    found = scorer.predict([(i, t) for i in IMAGES for t in TEXTS])
    assert np.abs(found.reshape(3, 5) - tables[kind]).max() < 1e-5
    assert scorer.batch_size == 2
    assert max(tried) > 3
    assert all(rows <= 2 for rows in tried[3:])


@pytest.mark.parametrize("where", ["join", "rows", "score"])
def test_nothing_is_lost_where_memory_runs_out_after_a_pass(
    backbone: Backbone, tables: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    scorer = Scorer(backbone, CONFIGS["paper"], batch_size=4)
    of, name = (type(scorer.score), "parts") if where == "score" else (Pass, where)
    honest, calls = getattr(of, name), 0

    def scarce(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ERRORS[0]
        return honest(*given)

    monkeypatch.setattr(of, name, staticmethod(scarce) if where == "join" else scarce)
    found = scorer.predict([(i, t) for i in IMAGES for t in TEXTS])
    assert calls > 1
    assert np.abs(found.reshape(3, 5) - tables["paper"]).max() < 1e-5


def test_encoding_is_halved_too(
    backbone: Backbone, tables: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit(backbone, monkeypatch, 1, ERRORS[0], "encode_images")
    found = Scorer(backbone, CONFIGS["attention"], batch_size=4).predict([(i, TEXTS[0]) for i in IMAGES])
    assert np.abs(found - tables["attention"][:, 0]).max() < 1e-5
    assert tried == [3, 2, 1, 1, 1]


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "CPU"])
def test_too_little_memory_for_one_row(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    limit(backbone, monkeypatch, 0, error, "predict_noise")
    with pytest.raises(ModelError, match="one row") as caught:
        Scorer(backbone, CONFIGS["attention"]).predict([(IMAGES[0], "cat")])
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_mistaken_for_memory(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(backbone, monkeypatch, 0, RuntimeError("shapes do not fit"), "predict_noise")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Scorer(backbone, CONFIGS["attention"]).predict([(IMAGES[0], "cat")])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    predict = backbone.predict_noise

    def overflow(noised: Tensor, t: Tensor, text: TextStates) -> Tensor:
        found = predict(noised, t, text)
        return torch.where((text.own.sum(1) == 1)[:, None, None, None], value, found)  # for one caption of many

    monkeypatch.setattr(backbone, "predict_noise", overflow)
    with pytest.raises(ModelError, match="not finite for the caption 'cat'"):
        Scorer(backbone, CONFIGS["denoising"]).predict([(IMAGES[0], t) for t in TEXTS])


# Inputs


@pytest.mark.parametrize("text", ["", "  ", "\n\t", None, 7, b"a dog", "\u2003"])
def test_blank_captions_are_refused(backbone: Backbone, text: Any) -> None:
    with pytest.raises(TextError, match="at least one word"):
        Scorer(backbone, CONFIGS["attention"]).predict([(IMAGES[0], "cat"), (IMAGES[0], text)])


def test_broken_image_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        Scorer(backbone, CONFIGS["attention"]).predict([(tmp_path / "none.png", "cat")])


def test_change_of_score_keeps_what_is_encoded(
    backbone: Backbone, tables: dict[str, np.ndarray], counted: dict[str, int]
) -> None:
    scorer = Scorer(backbone, CONFIGS["attention"])
    pairs = [(IMAGES[0], t) for t in TEXTS]
    scorer.predict(pairs)
    scorer.use(CONFIGS["attention-mass"])
    assert np.abs(scorer.predict(pairs) - tables["attention-mass"][0]).max() < 1e-5
    assert (counted["images"], counted["texts"]) == (1, 5)
    assert scorer.size == PIXELS


# Compiling


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what compilers warn of is not ours
def test_a_denoiser_that_is_compiled_whole_gives_the_same(pipe: Pipe, tables: dict[str, np.ndarray]) -> None:
    compiled = load_backbone(pipe())
    compiled.denoiser.compile(backend="eager")
    for kind in ("attention-mass", "denoising"):
        found = Scorer(compiled, CONFIGS[kind]).predict([(IMAGES[0], TEXTS[0]), (IMAGES[1], TEXTS[1])])
        assert found == pytest.approx([tables[kind][0, 0], tables[kind][1, 1]], abs=1e-5)


def test_a_compiled_denoiser_sees_few_shapes(
    pipe: Pipe, tables: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(pipe())
    shapes: list[int] = []
    honest = backbone.predict_noise

    def counted(noised: Tensor, *args: Any) -> Tensor:
        shapes.append(len(noised))
        return honest(noised, *args)

    monkeypatch.setattr(backbone, "predict_noise", counted)
    scorer = Scorer(backbone, CONFIGS["attention"], batch_size=7)
    scorer.compile(backend="eager")
    for kind in ("attention", "denoising", "paper"):
        scorer.use(CONFIGS[kind])
        for n in range(1, 4):
            pairs = [(image, text) for image in IMAGES[:n] for text in TEXTS]
            assert scorer.predict(pairs) == pytest.approx(tables[kind][:n].ravel(), abs=1e-5)
    assert set(shapes) <= {1, 2, 4, 7}
    assert any(n == 7 for n in shapes)


def test_what_was_learned_of_words_is_not_compiled(pipe: Pipe) -> None:
    """It is handed other captions each time, and would be compiled for each."""
    backbone = load_backbone(pipe())
    prompts.attach(backbone.denoiser, prompts.PromptConfig(tokens=2, words=("red", "dog")))
    scorer = Scorer(backbone, CONFIGS["attention"])
    scorer.compile(backend="eager")
    added = [getattr(backbone.denoiser, name) for name in (prompts.TOKENS, prompts.WORDS)]
    assert all(module._compiled_call_impl is None for module in added)
    assert any(module._compiled_call_impl is not None for module in backbone.denoiser.modules())


def test_a_score_that_is_refused_changes_nothing(backbone: Backbone) -> None:
    config = ScoreConfig("attention", (100, 500))
    noise = np.random.default_rng(0).standard_normal((2, *backbone.latent_shape(PIXELS))).astype(np.float32)
    scorer = Scorer(backbone, config, noise=noise)
    before = scorer.predict([(IMAGES[0], TEXTS[0])])
    with pytest.raises(OptionError, match="got noise of shape"):
        scorer.use(ScoreConfig("denoising", (100, 300, 500)))
    assert scorer.score.config == config
    assert np.array_equal(scorer.predict([(IMAGES[0], TEXTS[0])]), before)


def test_a_cache_is_bounded_in_bytes_too() -> None:
    cache: Cache[str] = Cache(3, 6, len)
    for key, value in (("a", "1"), ("b", "22"), ("c", "333")):
        cache.put(key, value)
    cache.put("b", "4444")  # in place of what it had
    assert [cache.get(key) for key in "abc"] == [None, "4444", None]
    cache.put("d", "5" * 9)  # one is always kept
    assert [cache.get(key) for key in "bd"] == [None, "5" * 9]


def test_layers_offloaded_one_by_one_are_not_compiled(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "offload", "sequential")
    with pytest.raises(OptionError, match="sequential"):
        Scorer(backbone, CONFIGS["attention"]).compile()
