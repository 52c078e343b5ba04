"""The pretraining recipe at a size of seconds: every stage, stopped and resumed, to a pipeline stock code loads."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsd.tiny import pretrain, world
from dsd.tiny.captions import Claim, Phrase, holds, vocabulary_words
from dsd.tiny.pretrain import LayoutHead, Recipe, Stage

CPU = torch.device("cpu")
SMALL = Recipe(
    scenes=24,
    vae_samples=48,
    vae_batch=8,
    text_samples=48,
    text_batch=8,
    unet_samples=48,
    unet_batch=8,
    easy_samples=16,
)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in this process: a pool is not worth its start for a few scenes."""

    class Here:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def map(self, function, items, chunksize):
            return map(function, items)

    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", Here)


def test_every_word_is_one_token_and_nothing_is_unknown():
    for tokenizer in (pretrain.build_tokenizer(), pretrain.learn_tokenizer()):
        _knows_every_word(tokenizer)


def _knows_every_word(tokenizer):
    assert [w for w in vocabulary_words() if len(tokenizer(w).input_ids) != 3] == []
    ids = tokenizer("zebra ÿ 🐶 42!", add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids


def test_pretraining_never_says_the_novel_words_and_never_shows_held_out_kinds():
    rng = random.Random(0)
    for index in range(400):
        scene = pretrain.scene_at(Recipe(), index)
        assert world.part_of(scene) == "pretraining"
        assert not {t.kind for t in scene.things} & world.HELD_OUT
        claim, text = pretrain.caption_of(rng, scene)
        assert holds(claim, scene)
        assert world.NOVEL_FILL not in text
        assert world.NOVEL_RELATION not in text
        assert len(text.split()) < pretrain.WINDOW - 2


def test_layout_targets_name_what_stands_where():
    red, blue = Phrase("red", "circle"), Phrase("blue", "square", size="large")
    fields, background = LayoutHead.targets([Claim(red, "left of", blue), Claim(blue, place="top", background="teal")])
    left, right, top = (LayoutHead.PLACES.index(p) for p in ("left", "right", "top"))
    colours, sizes = LayoutHead.FIELDS["colour"], LayoutHead.FIELDS["size"]
    assert colours[fields["colour"][0, left]] == "red"
    assert colours[fields["colour"][0, right]] == "blue"
    assert sizes[fields["size"][0, right]] == "large"
    assert colours[fields["colour"][1, top]] == "blue"
    assert fields["count"][1].sum() == 1
    assert background.tolist() == [0, 1 + list(world.BACKGROUNDS).index("teal")]


def test_the_recipe_runs_from_pictures_to_a_stock_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    pretrain.train_unet(SMALL, tmp_path, CPU, float("inf"), measure_minutes=float("inf"))
    pretrain.export(SMALL, tmp_path, tmp_path / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert picture.shape == (32, 32, 3)
    assert np.isfinite(picture).all()
    figures = pretrain.measure(tmp_path / "pipeline", 2, ("easy",))
    assert figures["easy"]["overall"]["n"] == 6

    # from the pipeline alone training goes on where it stopped, with the parts that are done as they are
    further = replace(SMALL, unet_samples=64)
    pretrain.adopt(tmp_path / "pipeline", tmp_path / "next")
    stage = pretrain.train_unet(further, tmp_path / "next", CPU, float("inf"), measure_minutes=float("inf"))
    assert (stage.began_at, stage.samples) == (48, 64)
    for name in ("vae", "text_encoder"):
        own, adopted = (getattr(pipeline, name).state_dict() for pipeline in (pipeline, _next(further, tmp_path)))
        assert all(torch.equal(own[k], adopted[k]) for k in own)
    pretrain.adopt(tmp_path / "pipeline", tmp_path / "next")  # what has been learned since is not thrown away
    assert Stage("unet", tmp_path / "next", pretrain.build_unet(), 0, 1, CPU, 0).samples == 64


def _next(recipe, folder):
    from diffusers import StableDiffusionPipeline

    pretrain.export(recipe, folder / "next", folder / "next" / "pipeline")
    return StableDiffusionPipeline.from_pretrained(folder / "next" / "pipeline", dtype=torch.float32)


def test_a_stopped_stage_ends_as_an_unbroken_one(tmp_path):
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = pretrain.train_vae(SMALL, tmp_path / "whole", CPU, float("inf"))
    steps = 0

    class Stopped(Exception):
        pass

    class Breaks(Stage):
        def step(self, loss, samples):
            nonlocal steps
            if steps == 3:
                self.save()
                raise Stopped
            steps += 1
            super().step(loss, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "Stage", Breaks)
        with pytest.raises(Stopped):
            pretrain.train_vae(SMALL, tmp_path / "broken", CPU, float("inf"))
    resumed = pretrain.train_vae(SMALL, tmp_path / "broken", CPU, float("inf"))
    assert resumed.samples == whole.samples == SMALL.vae_samples
    for name, value in whole.average.items():
        assert torch.equal(value, resumed.average[name]), name


def test_a_stage_stops_at_its_time(tmp_path):
    stage = pretrain.train_vae(SMALL, tmp_path, CPU, time.monotonic())
    assert stage.samples == 0


def test_every_leg_reads_words_as_the_model_that_ships_does():
    from importlib.resources import files

    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(str(files("dsd.tiny").joinpath("weights", "tokenizer")))
    for _ in range(3):
        assert pretrain.build_tokenizer().get_vocab() == shipped.get_vocab()
