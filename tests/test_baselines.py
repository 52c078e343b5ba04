"""Every baseline keeps the protocol, agrees with a plain computation, and learns what can be learned and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsd.backbone import Backbone, load_backbone
from dsd.baselines import BASELINES, baseline, load_baseline
from dsd.baselines.blip import Blip
from dsd.baselines.diffusion import DiffusionClassifier, DiffusionITM, spaced_timesteps
from dsd.baselines.few_shot_clip import CoOp, FewShotClip, LinearProbe, Lora
from dsd.baselines.towers import Clip, Siglip
from dsd.baselines.trivial import CaptionLength, Chance
from dsd.cli import main
from dsd.contracts import (
    AdapterError,
    Example,
    ImageError,
    MatcherProtocol,
    ModelError,
    OptionError,
    ScoreTable,
    TextError,
)
from dsd.evaluate import evaluate
from dsd.images import resize_crop
from dsd.learn import FitConfig
from dsd.metrics import wins
from dsd.scores import noised_pass
from dsd.tasks import world_task
from models import COLOURS, picture, toy
from towers import save_blip, save_clip, save_siglip

Pipe = Callable[..., str]
IMAGES = [picture(i, 20) for i in range(3)]
TEXTS = ["a red circle left of a dog", "cat", "a blue square", "the green circle above the cat"]
FAST = FitConfig(steps=30, batch=8, learning_rate=2e-2, weight_decay=0.0, check_every=10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, pipe: Pipe) -> dict[str, str]:
    """A model of each kind."""
    root = tmp_path_factory.mktemp("towers")
    return {
        "clip": save_clip(root / "clip"),
        "siglip": save_siglip(root / "siglip"),
        "blip": save_blip(root / "blip"),
        "diffusion": pipe(),
    }


@pytest.fixture(scope="module")
def methods(folders: dict[str, str]) -> dict[str, Any]:
    """Every baseline, with a small random model."""
    made = {}
    for name, entry in BASELINES.items():
        options: dict[str, Any] = {} if entry.model is None else {"model": folders[entry.model]}
        made[name] = baseline(name, **options, **({"samples": 4} if entry.model == "diffusion" else {}))
    return made


@pytest.fixture(params=BASELINES)
def method(request: pytest.FixtureRequest, methods: dict[str, Any]) -> Any:
    return methods[request.param]


# The protocol


def test_it_keeps_the_protocol(method: Any) -> None:
    assert isinstance(method, MatcherProtocol)
    table = method.score(IMAGES, TEXTS)
    assert isinstance(table, ScoreTable)
    assert (table.scores.shape, table.scores.dtype) == ((3, 4), np.float32)
    assert table.texts == tuple(TEXTS)
    assert np.isfinite(table.scores).all()
    assert table.config == method.config
    assert method.predict([]).shape == (0,)
    assert method.score(IMAGES[0], "cat").scores.shape == (1, 1)


def test_its_configuration_is_plain_and_names_it(method: Any) -> None:
    config = dict(method.config)
    assert json.loads(json.dumps(config)) == config
    assert config["baseline"] in BASELINES or config["baseline"] in ("blip",)


def test_scores_do_not_depend_on_order_or_company(method: Any) -> None:
    table = method.score(IMAGES, TEXTS).scores
    pairs = [(image, text) for image in IMAGES for text in TEXTS]
    alone = np.concatenate([method.predict([pair]) for pair in pairs[::-1]])[::-1]
    assert np.abs(alone - table.ravel()).max() <= 1e-5 * max(1.0, np.abs(table).max())
    order = np.random.default_rng(0).permutation(len(pairs))
    mixed = method.predict([pairs[i] for i in order])
    assert np.abs(mixed - table.ravel()[order]).max() <= 1e-5 * max(1.0, np.abs(table).max())


def test_a_picture_is_the_same_from_a_file_and_an_array(method: Any, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "a.png")
    scores = method.predict([(i, TEXTS[0]) for i in (IMAGES[0], tmp_path / "a.png", np.array(IMAGES[0]))])
    assert np.ptp(scores) <= 1e-5 * max(1.0, np.abs(scores).max())


def test_it_is_made_again_the_same(method: Any, methods: dict[str, Any], folders: dict[str, str]) -> None:
    name = next(n for n, m in methods.items() if m is method)
    entry = BASELINES[name]
    options: dict[str, Any] = {} if entry.model is None else {"model": folders[entry.model]}
    again = baseline(name, **options, **({"samples": 4} if entry.model == "diffusion" else {}))
    assert again.config == method.config
    assert np.array_equal(again.score(IMAGES, TEXTS).scores, method.score(IMAGES, TEXTS).scores)


def test_bad_input_is_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="at least one word"):
        method.predict([(IMAGES[0], "  ")])
    with pytest.raises(ImageError, match=r"nothing\.png"):
        method.predict([(tmp_path / "nothing.png", "cat")])
    with pytest.raises(OptionError, match="at least one of each"):
        method.score([], ["cat"])
    with pytest.raises(OptionError, match="at least one of each"):
        method.score(IMAGES, [])


def test_what_learns_nothing_says_so(method: Any, methods: dict[str, Any]) -> None:
    name = next(n for n, m in methods.items() if m is method)
    if not BASELINES[name].few_shot:
        with pytest.raises(OptionError, match="a baseline that learns"):
            method.fit(toy(4))


def test_names_and_options_are_checked() -> None:
    with pytest.raises(OptionError, match="expected one of chance"):
        baseline("clap")
    with pytest.raises(OptionError, match="colour"):
        baseline("chance", colour="red")
    with pytest.raises(OptionError, match="seed"):
        baseline("chance", seed=1.5)


# Methods that do not look


@pytest.mark.parametrize("task", ["comvg", "winoground", "refcocog", "vqa"])
def test_chance_has_chance_on_every_task_of_the_world(task: str) -> None:
    examples = world_task(task, "val", "easy", 120, 3)
    result = evaluate(Chance(), examples)
    chance = np.mean([np.mean(list(_chances(e))) for e in examples])
    figure = result.metrics["accuracy"]
    assert figure["low"] <= chance <= figure["high"]
    assert result.ties == 0


def _chances(example: Example) -> Iterator[float]:
    """The chance of each choice of an example."""
    right = np.zeros((len(example.images), len(example.texts)), bool)
    for i, j in example.positives:
        right[i, j] = True
    for lines in (right, right.T):
        for line in lines:
            if line.any() and not line.all():
                yield float(line.mean())


def test_chance_follows_its_seed() -> None:
    pairs = [(image, text) for image in IMAGES for text in TEXTS]
    draws = Chance(0).predict(pairs)
    assert len(set(draws)) == len(pairs)
    assert ((draws >= 0) & (draws < 1)).all()
    assert not np.array_equal(draws, Chance(1).predict(pairs))
    assert abs(np.mean([Chance(s).predict(pairs[:1])[0] for s in range(400)]) - 0.5) < 0.06


def test_caption_length_prefers_the_shorter_or_what_examples_say() -> None:
    method = CaptionLength()
    assert np.argsort(-method.score(IMAGES[0], TEXTS).scores[0]).tolist() == [1, 2, 3, 0]
    longer = [Example(str(i), (IMAGES[0],), ("cat", "a red cat", "a cat"), ((0, 1),)) for i in range(3)]
    assert method.fit(longer) is method
    assert method.better == "long"
    assert np.argmax(method.score(IMAGES[0], TEXTS).scores[0]) == 0
    with pytest.raises(OptionError, match="short, long"):
        CaptionLength("fat")  # type: ignore[arg-type]


# Towers


def test_clip_is_what_transformers_says(folders: dict[str, str]) -> None:
    method = Clip(folders["clip"])
    pixels = method.pixels(IMAGES)
    made = method.tokens.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = method.model(**made, pixel_values=pixels).logits_per_image
    assert np.abs(method.score(IMAGES, TEXTS).scores - logits.numpy()).max() < 1e-4
    assert logits.std() > 0.1


def test_siglip_is_what_transformers_says(folders: dict[str, str]) -> None:
    method = Siglip(folders["siglip"])
    made = method.tokens.tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        logits = method.model(input_ids=made.input_ids, pixel_values=method.pixels(IMAGES)).logits_per_image
    assert np.abs(method.score(IMAGES, TEXTS).scores - logits.numpy()).max() < 1e-4


@pytest.mark.parametrize("head", ["itm", "itc"])
def test_blip_is_what_transformers_says(folders: dict[str, str], head: Any) -> None:
    method = Blip(folders["blip"], head=head)
    table = method.score(IMAGES, TEXTS).scores
    for i, image in enumerate(IMAGES):
        for j, text in enumerate(TEXTS):
            made = method.tokens.tokenizer([text], return_tensors="pt")
            made.pop("token_type_ids", None)
            with torch.no_grad():
                pixels = method._pixels([image])
                found = method.model(**made, pixel_values=pixels, use_itm_head=head == "itm").itm_score
            expected = (found[0, 1] - found[0, 0]) if head == "itm" else found[0, 0]
            assert abs(float(expected) - table[i, j]) < 1e-4
    assert table.std() > 1e-3


def test_long_captions_are_refused_unless_they_may_be_cut(folders: dict[str, str]) -> None:
    long = "the dog " * 20
    for name in ("clip", "siglip", "blip"):
        kind = {"clip": Clip, "siglip": Siglip, "blip": Blip}[name]
        with pytest.raises(TextError, match=r"at most 24.*truncate"):
            kind(folders[name]).predict([(IMAGES[0], long)])
        cut = kind(folders[name], truncate=True)
        assert np.isfinite(cut.predict([(IMAGES[0], long)])).all()
        assert cut.config["truncate"] is True


def test_models_that_are_none_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="type siglip, expected clip"):
        Clip(folders["siglip"])
    with pytest.raises(ModelError, match="expected an alias"):
        Clip("nowhere")
    with pytest.raises(ModelError, match="expected an alias"):
        Clip("../no/folder")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Clip(str(tmp_path))
    with pytest.raises(ModelError, match="hf download"):
        Clip("someone/no-such-clip")
    pickled = tmp_path / "pickled"
    save_clip(pickled)
    weights = (pickled / "model.safetensors").read_bytes()
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        Clip(str(pickled))
    (pickled / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Clip(str(pickled))


# Taught CLIP


def taught(kind: type[FewShotClip], model: str, config: FitConfig = FAST) -> FewShotClip:
    return kind(model, fit_config=config)


def opposite(count: int, seed: int = 0) -> list[Example]:
    """Red pictures are called blue and blue ones red, which a model with random weights happens to get wrong."""
    return [replace(e, positives=((0, 1 - e.positives[0][1]),)) for e in toy(count, seed)]


def accuracy(method: Any, examples: list[Example]) -> float:
    return float(np.mean([wins(method.score(e.images, e.texts).scores, e.positives).mean() for e in examples]))


@pytest.mark.parametrize("kind", [LinearProbe, CoOp, Lora])
def test_it_learns_what_can_be_learned_and_keeps_it(kind: type[FewShotClip], folders: dict[str, str], tmp_path: Path):
    method = taught(kind, folders["clip"])
    plain = method.score(IMAGES, TEXTS).scores
    fresh = opposite(40, seed=9)
    assert accuracy(method, fresh) < 0.5
    assert method.fit(opposite(24), seed=1) is method
    assert method.training["kept"]
    assert method.training["validation"]["after"] > 0.9
    assert accuracy(method, fresh) > 0.95
    assert json.loads(json.dumps(dict(method.config))) == method.config

    # kept, loaded, and forgotten by the next lesson
    pairs = [pair for e in fresh[:4] for pair in e.pairs]
    loaded = load_baseline(method.save(tmp_path / "kept"))
    assert type(loaded) is kind
    assert loaded.config == method.config
    assert np.abs(loaded.predict(pairs) - method.predict(pairs)).max() < 1e-5
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {"baseline.json", "learned.safetensors"}
    method._use({})
    method.learned = {}
    assert np.array_equal(method.score(IMAGES, TEXTS).scores, plain)


@pytest.mark.parametrize("kind", [LinearProbe, CoOp, Lora])
def test_shuffled_labels_teach_nothing(kind: type[FewShotClip], folders: dict[str, str]):
    method = taught(kind, folders["clip"], replace(FAST, steps=10))
    before = method.score(IMAGES, TEXTS).scores
    method.fit(toy(24, shuffled=True))
    assert not method.training["kept"]
    assert np.array_equal(method.score(IMAGES, TEXTS).scores, before)
    # whatever was learned would have nothing to do with the labels of others
    assert 0.2 < accuracy(method, toy(40, seed=5, shuffled=True)) < 0.8


@pytest.mark.parametrize("kind", [LinearProbe, CoOp, Lora])
def test_lessons_repeat_and_follow_the_seed(kind: type[FewShotClip], folders: dict[str, str]):
    def learned(seed: int) -> dict[str, torch.Tensor]:
        method = taught(kind, folders["clip"], replace(FAST, steps=20))
        return method.fit(opposite(12), opposite(12, 3), seed=seed).learned

    first, again, other = learned(1), learned(1), learned(2)
    assert first
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert kind is LinearProbe or any(not torch.equal(value, other[name]) for name, value in first.items())


def test_scores_of_a_taught_clip_do_not_depend_on_company(folders: dict[str, str]) -> None:
    for kind in (LinearProbe, CoOp, Lora):
        method = taught(kind, folders["clip"], replace(FAST, steps=20)).fit(opposite(16), opposite(8, 3))
        assert method.learned
        table = method.score(IMAGES, TEXTS).scores
        alone = [[method.predict([(image, text)])[0] for text in TEXTS] for image in IMAGES]
        assert np.abs(table - np.array(alone)).max() <= 1e-5 * max(1.0, np.abs(table).max())


def test_what_cannot_be_learned_from_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    method = LinearProbe(folders["clip"])
    with pytest.raises(OptionError, match="without a choice"):
        method.fit([Example("a", (IMAGES[0],), ("cat",), ((0, 0),))])
    with pytest.raises(OptionError, match="got 0 examples"):
        method.fit([])
    with pytest.raises(OptionError, match="context tokens"):
        CoOp(folders["clip"], tokens=23)
    with pytest.raises(OptionError, match="rank"):
        Lora(folders["clip"], rank=0)
    with pytest.raises(TextError, match="at most 20"):
        CoOp(folders["clip"]).fit([Example("a", (IMAGES[0],), ("dog " * 20, "cat"), ((0, 1),))])
    with pytest.raises(AdapterError, match=r"baseline\.json"):
        load_baseline(tmp_path)
    kept = LinearProbe(folders["clip"]).save(tmp_path / "kept")
    with pytest.raises(AdapterError, match="expected 'clip-coop'"):
        CoOp.load(kept)
    (kept / "learned.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match=r"learned\.safetensors"):
        load_baseline(kept)
    record = json.loads((kept / "baseline.json").read_text())
    (kept / "baseline.json").write_text(json.dumps({**record, "baseline": "chance"}))
    with pytest.raises(AdapterError, match="'chance'"):
        load_baseline(kept)
    (kept / "baseline.json").write_text(json.dumps({**record, "format": 9}))
    with pytest.raises(AdapterError, match="format 9"):
        load_baseline(kept)


def test_another_models_lesson_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for kind in (LinearProbe, CoOp, Lora):
        out = kind(folders["clip"]).save(tmp_path / kind.name)
        save_file({"weights": torch.zeros(3), "context": torch.zeros(2, 3)}, out / "learned.safetensors")
        with pytest.raises(AdapterError, match="does not fit"):
            load_baseline(out)


# Diffusion


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


def brute_force(backbone: Backbone, method: Any, text: str, image: Image.Image, loss: str) -> float:
    """The mean error of the predicted noise, one pass after the other."""
    latent = backbone.encode_images([resize_crop(image, backbone.image_size)])
    (states,) = backbone.encode_texts([text])
    found = []
    for t, noise in zip(method._errors.score.config.timesteps, method._errors.noise, strict=True):
        with torch.no_grad():
            made = noised_pass(backbone, latent, noise[None], torch.tensor([t]), states)
        d = made.predicted - noise
        huber = torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5)
        found.append(float({"l1": d.abs(), "l2": d**2, "huber": huber}[loss].mean()))
    return float(np.mean(found))


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
def test_diffusion_classifier_is_a_plain_loop(backbone: Backbone, loss: Any) -> None:
    method = DiffusionClassifier(backbone, samples=3, trials=2, loss=loss, seed=4)
    table = method.score(IMAGES[:2], TEXTS[:2]).scores
    expected = [[-brute_force(backbone, method, t, i, loss) for t in TEXTS[:2]] for i in IMAGES[:2]]
    assert np.abs(table - np.array(expected)).max() < 1e-5
    assert method.passes == 2 * 2 * 3 * 2


def test_diffusion_itm_subtracts_the_error_without_a_caption(backbone: Backbone) -> None:
    plain = DiffusionITM(backbone, samples=3, unconditional=False)
    method = DiffusionITM(backbone, samples=3)
    table = plain.score(IMAGES, TEXTS).scores
    assert np.allclose(table, DiffusionClassifier(backbone, samples=3).score(IMAGES, TEXTS).scores)
    gap = method.score(IMAGES, TEXTS).scores - table
    blank = [brute_force(backbone, method, "", image, "l2") for image in IMAGES]
    assert np.abs(gap - np.array(blank)[:, None]).max() < 1e-5
    assert method.passes == 3 * (3 * 4 + 3)  # the pass without a caption is shared by a picture's captions
    assert plain.passes == 3 * 3 * 4


def test_timesteps_are_evenly_spaced() -> None:
    assert spaced_timesteps(4) == (125, 375, 625, 875)
    assert spaced_timesteps(50) == tuple(range(10, 1000, 20))
    assert len(spaced_timesteps(3)) == 3
    for bad in (0, 1001):
        with pytest.raises(OptionError, match="timesteps"):
            spaced_timesteps(bad)


class Planned(DiffusionClassifier):
    """With errors made up: ``table[caption]`` at each draw."""

    table: dict[str, list[float]]

    def __init__(self, backbone: Backbone, table: dict[str, list[float]], **options: Any) -> None:
        super().__init__(backbone, **options)
        self.table = table
        self._errors.mean_errors = self._made_up  # type: ignore[method-assign]

    def _made_up(self, pairs: Any, latents: Any, draws: Any, loss: Any, bar: Any) -> np.ndarray:
        self._errors.passes += len(pairs) * len(draws)
        return np.array([[self.table[text][d] for d in draws] for _, text in pairs])


def test_stages_leave_out_what_does_badly_and_keep_the_order(backbone: Backbone) -> None:
    table = {"a": [1, 1, 1, 1], "b": [2, 2, 2, 2], "c": [3, 3, 3, 3], "d": [4, 4, 4, 4]}
    full = Planned(backbone, table, samples=4)
    method = Planned(backbone, table, samples=4, stages=((1, 2), (2, 2), (4, 1)))
    whole, staged = (m.score(IMAGES[0], list("dbca")).scores[0] for m in (full, method))
    assert np.array_equal(whole, staged)
    assert (full.passes, method.passes) == (16, 4 + 2 + 4)


def test_what_was_left_out_lies_below_what_went_on(backbone: Backbone) -> None:
    # c looks worst at the first draw tried (place 2 of 4), and would be best of all in the end
    table = {"a": [9, 9, 1, 9], "b": [9, 9, 2, 9], "c": [0, 0, 3, 0], "d": [0, 0, 4, 0]}
    method = Planned(backbone, table, samples=4, stages=((1, 2), (4, 1)))
    a, b, c, d = method.score(IMAGES[0], list("abcd")).scores[0]
    assert a == -7  # as predict has it
    assert a > b > c > d
    assert b - c < 1e-5
    # in a table where every row and column is a choice of its own, all go to the end
    both = method.score(IMAGES[:2], list("abcd")).scores
    assert both.argmax(1).tolist() == [2, 2]


def test_stages_are_right_on_real_errors_and_cost_less(backbone: Backbone) -> None:
    full = DiffusionClassifier(backbone, samples=8)
    method = DiffusionClassifier(backbone, samples=8, stages=((2, 2), (8, 1)))
    for image in IMAGES:
        whole, staged = full.score(image, TEXTS).scores[0], method.score(image, TEXTS).scores[0]
        kept = np.argsort(-staged)[:2]
        assert np.abs(whole[kept] - staged[kept]).max() < 1e-6
        assert whole[kept[0]] >= whole[kept[1]]
    assert full.passes == 3 * 4 * 8
    assert method.passes == 3 * (4 * 2 + 2 * 6)
    # one caption, many pictures
    assert method.score(IMAGES, TEXTS[0]).scores.shape == (3, 1)


@pytest.mark.parametrize(
    "stages", [(), ((4, 1),), ((3, 2), (8, 1)), ((8, 2), (8, 1)), ((2, 1), (8, 2)), ((2, 2), (8, 0)), ((0, 2), (8, 1))]
)
def test_stages_that_make_no_sense_are_refused(backbone: Backbone, stages: Any) -> None:
    with pytest.raises(OptionError, match="stages"):
        DiffusionClassifier(backbone, samples=8, stages=stages)


def test_options_of_diffusion_are_checked(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="l1, l2, huber"):
        DiffusionClassifier(backbone, loss="l3")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="trials"):
        DiffusionClassifier(backbone, trials=0)
    with pytest.raises(OptionError, match="timesteps"):
        DiffusionITM(backbone, samples=0)
    assert DiffusionITM(backbone).samples == 10
    assert DiffusionClassifier(backbone).samples == 50


def test_scores_that_are_not_finite_are_refused(folders: dict[str, str]) -> None:
    method = Clip(folders["clip"])
    with torch.no_grad():
        method.model.logit_scale.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        method.predict([(IMAGES[0], "cat")])


def test_higher_is_better_on_what_is_known(backbone: Backbone) -> None:
    """A caption under which the noise is predicted better scores higher; so does one whose embedding is nearer."""
    method = DiffusionClassifier(backbone, samples=4)
    scores = method.score(IMAGES[0], TEXTS).scores[0]
    errors = [brute_force(backbone, method, text, IMAGES[0], "l2") for text in TEXTS]
    assert np.array_equal(np.argsort(-scores), np.argsort(errors))


def test_a_colour_is_told_by_a_taught_clip_in_the_right_direction(folders: dict[str, str]) -> None:
    method = taught(LinearProbe, folders["clip"]).fit(opposite(24))
    red, blue = toy(2, seed=7)
    assert method.score(red.images, COLOURS).scores[0].argmax() == 1
    assert method.score(blue.images, COLOURS).scores[0].argmax() == 0


# The command


@pytest.fixture
def dsd(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: its status, output and errors."""

    def run(*argv: object) -> tuple[int, str, str]:
        status = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return run


WORLD = ("comvg", "--level", "easy", "--count", "12", "--split", "val", "--format", "json")


def test_eval_measures_a_baseline(dsd: Callable[..., Any], folders: dict[str, str]) -> None:
    status, out, err = dsd("eval", *WORLD, "--baseline", "clip", "--baseline-model", "clip-tiny")
    assert (status, err) == (0, "")
    found = json.loads(out)
    direct = evaluate(Clip("clip-tiny"), world_task("comvg", "val", "easy", 12, 0))
    assert found["metrics"]["accuracy"] == direct.metrics["accuracy"]
    assert found["config"]["baseline"] == "clip"
    # the seed is the world's, and that of methods that have one
    status, out, _ = dsd("eval", *WORLD, "--baseline", "chance", "--seed", "5")
    assert (status, json.loads(out)["config"]["seed"]) == (0, 5)
    args = (
        "--baseline",
        "diffusion-itm",
        "--baseline-model",
        folders["diffusion"],
        "--steps",
        "2",
        "--dtype",
        "float32",
    )
    status, out, _ = dsd("eval", *WORLD, *args)
    assert (status, json.loads(out)["config"]["samples"]) == (0, 2)


def test_eval_teaches_a_baseline_and_goes_on(dsd: Callable[..., Any], tmp_path: Path) -> None:
    args = ("--baseline", "clip-linear-probe", "--shots", "8", "--folds", "2")
    status, out, _ = dsd("eval", *WORLD, *args, "--out", tmp_path / "run")
    assert status == 0
    found = json.loads(out)
    training = found["config"]["training"]
    assert (training["examples"], training["config"]["folds"]) == (8, 2)
    assert (tmp_path / "run" / "baseline" / "baseline.json").exists()
    (tmp_path / "run" / "result.json").unlink()
    with pytest.MonkeyPatch.context() as patch:  # what was learned is taken from the folder
        patch.setattr(LinearProbe, "fit", None)
        status, out, _ = dsd("eval", *WORLD, *args, "--out", tmp_path / "run")
    assert (status, json.loads(out)["metrics"]) == (0, found["metrics"])
    status, out, _ = dsd("eval", *WORLD, "--baseline", "caption-length", "--shots", "6")
    assert (status, json.loads(out)["config"]["baseline"]) == (0, "caption-length")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--baseline clip --model tiny", "--model with --baseline"),
        ("--baseline clip --score attention", "--score with --baseline"),
        ("--baseline clip-lora --shots 4 --rank 8 --gradient-checkpointing", "--rank, --gradient-checkpointing with"),
        ("--baseline clip-linear-probe --shots 4 --hold-out 0.5", "--hold-out with clip-linear-probe"),
        ("--baseline clip --shots 4", "a baseline that learns: caption-length, clip-linear-probe"),
        ("--baseline chance --baseline-model tiny", "model"),
        ("--baseline clip --baseline-model nowhere", "clip-tiny"),
        ("--baseline caption-length --shots 4 --folds 2", "options of learning"),
        ("--baseline-model clip-tiny", "without --baseline"),
    ],
)
def test_eval_refuses_what_does_not_go_together(dsd: Callable[..., Any], args: str, words: str) -> None:
    status, out, err = dsd("eval", *WORLD, *args.split())
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_names_of_baselines_need_no_torch() -> None:
    code = "import sys, dsd.baselines; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
