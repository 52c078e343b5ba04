"""The recipe of the embedded CLIP at a size of seconds, and the weights that ship."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from dsd.tiny import clip, pretrain, world
from dsd.tiny.captions import Claim, Phrase, holds, sample_claim
from dsd.tiny.clip import ClipRecipe, altered, build_clip, captions, contrast, read, see

CPU = torch.device("cpu")
SMALL = ClipRecipe(scenes=30, samples=64, batch=8, easy_samples=16, width=32, layers=2, heads=2, dim=16, negatives=1)
WEIGHTS = Path(str(files("dsd.tiny").joinpath("clip_weights")))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pretraining pictures drawn in this process."""

    def here(recipe: pretrain.Recipe, folder: Path) -> np.ndarray:
        return np.stack([pretrain._draw(recipe, i) for i in range(recipe.scenes)])

    monkeypatch.setattr(clip, "pictures", here)


# Captions


def test_altered_claims_change_one_thing_in_known_words() -> None:
    rng = random.Random(0)
    kinds = set()
    for i in range(300):
        scene = pretrain.scene_at(pretrain.Recipe(), i)
        claim = sample_claim(rng, scene)
        wrong = altered(rng, claim)
        assert wrong != claim
        kinds.add((claim.relation != wrong.relation, claim.object != wrong.object, claim.subject != wrong.subject))
        for phrase in (wrong.subject, wrong.object):
            assert phrase is None or (phrase.colour, phrase.shape) not in world.HELD_OUT
        for pretrained in (wrong.relation != world.NOVEL_RELATION, wrong.subject.fill != world.NOVEL_FILL):
            assert pretrained
    assert {(True, False, False), (False, True, True), (False, False, True)} <= kinds


def test_phrases_and_attributes_change_places() -> None:
    red, blue = Phrase("red", "circle"), Phrase("blue", "triangle")
    claim = Claim(red, "above", blue)
    found = {altered(random.Random(i), claim) for i in range(300)}
    assert Claim(blue, "above", red) in found
    assert Claim(Phrase("blue", "circle"), "above", Phrase("red", "triangle")) in found
    assert Claim(red, "below", blue) in found


def test_negatives_are_false_and_worded_like_the_true_caption() -> None:
    rng = random.Random(1)
    for i in range(150):
        scene = pretrain.scene_at(pretrain.Recipe(), i)
        claims, texts = captions(rng, scene, 2)
        assert len(claims) == len(texts) == len(set(claims)) <= 3
        assert [holds(c, scene) for c in claims] == [True] + [False] * (len(claims) - 1)
        assert len({text.endswith("?") or "?" in text for text in texts}) == 1


def test_a_batch_says_which_captions_are_true_of_which_pictures(drawn: None, tmp_path: Path) -> None:
    recipe = replace(SMALL, batch=16)
    data = clip.Data(recipe, tmp_path)
    images, texts, true = data.draw(random.Random(0), 50)
    assert images.shape == (16, 32, 32, 3)
    assert len(texts) >= 16
    assert true.shape == (16, len(texts))
    assert true[range(16), range(16)].all()
    # neighbours show two of the same things
    again = data.draw(random.Random(0), 50)
    assert again[1] == texts
    assert torch.equal(again[2], true)


# Loss and model


def test_contrast_is_the_mean_of_two_cross_entropies_without_what_is_true() -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(3, 5, generator=g), dim=1)
    text = torch.nn.functional.normalize(torch.randn(5, 5, generator=g), dim=1)
    true = torch.eye(3, 5, dtype=torch.bool)
    true[0, 1] = true[2, 4] = True
    expected = 0.0
    for i in range(3):
        row = [math.exp(4 * float(image[i] @ text[j])) for j in range(5) if j == i or not true[i, j]]
        column = [math.exp(4 * float(image[k] @ text[i])) for k in range(3) if k == i or not true[k, i]]
        own = math.exp(4 * float(image[i] @ text[i]))
        expected -= (math.log(own / sum(row)) + math.log(own / sum(column))) / 6
    assert float(contrast(image, text, torch.tensor(4.0), true)) == pytest.approx(expected, rel=1e-5)


def test_towers_are_those_of_stock_clip_and_patches_of_the_background_go_first() -> None:
    model = build_clip(SMALL, pretrain.build_tokenizer()).eval()
    pixels = torch.full((2, 3, 32, 32), -0.5)
    pixels[0, :, 8:16, 4:12] = 1.0
    pixels[1, :, 20:28, 12:20] = 1.0
    ids = pretrain.build_tokenizer()(["a red circle", "a blue square"], return_tensors="pt").input_ids
    with torch.no_grad():
        stock = model(pixel_values=pixels, input_ids=ids)
        assert (see(model, pixels) - stock.image_embeds).abs().max() < 1e-6
        assert (read(model, ids) - stock.text_embeds).abs().max() < 1e-6
        # all that is left out is background: what it holds does not matter
        inside = see(model, pixels, keep=4)
        changed = pixels.clone()
        changed[:, :, :4, 28:] = -0.45
        assert (see(model, changed, keep=4) - inside).abs().max() < 1e-6
        assert (see(model, changed) - see(model, pixels)).abs().max() > 1e-6


def test_the_text_tower_starts_from_tinys() -> None:
    model = build_clip(SMALL, pretrain.build_tokenizer())
    other = build_clip(replace(SMALL, text="random"), pretrain.build_tokenizer())
    from transformers import CLIPTextModel

    known = CLIPTextModel.from_pretrained(clip.TEXT_ENCODER, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, known[name]) for name, value in model.text_model.state_dict().items())
    assert not all(torch.equal(value, known[name]) for name, value in other.text_model.state_dict().items())


# The recipe


def test_a_killed_run_ends_as_an_unbroken_one_and_exports_to_stock_clip(
    drawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    forever = (float("inf"), float("inf"))
    whole = clip.train(SMALL, tmp_path / "whole", CPU, *forever)

    class Killed(Exception):
        pass

    class Dies(clip.Stage):
        def step(self, loss, samples):
            if self.samples == 24:
                self.save()
            if self.samples == 40:
                raise Killed
            super().step(loss, samples)

    with monkeypatch.context() as patch:
        patch.setattr(clip, "Stage", Dies)
        with pytest.raises(Killed):
            clip.train(SMALL, tmp_path / "broken", CPU, *forever)
    resumed = clip.train(SMALL, tmp_path / "broken", CPU, *forever)
    assert resumed.samples == whole.samples == SMALL.samples
    for name, value in whole.average.items():
        if "k_proj.bias" not in name:  # has no gradient but rounding, which the optimizer makes steps of
            assert torch.allclose(value, resumed.average[name], atol=1e-4), name

    clip.export(SMALL, tmp_path / "whole", tmp_path / "out", look=2, hardware="a test")
    stock = CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kept = clip.averaged(SMALL, tmp_path / "whole")
    gaps = [(a - b).abs().max() for a, b in zip(stock.parameters(), kept.parameters(), strict=True)]
    assert max(gaps) < 2e-3  # half precision
    assert CLIPTokenizer.from_pretrained(tmp_path / "out")("a red circle").input_ids
    figures = json.loads((tmp_path / "out" / "held_out.json").read_text())
    assert set(figures) == set(world.LEVELS)
    assert 0 <= figures["hard"]["winoground"]["overall"] <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a test" in card
    assert "64" in card


def test_the_best_so_far_is_kept(drawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = clip.train(replace(SMALL, samples=8), tmp_path, CPU, float("inf"), float("inf"))
    for value, kept in ((0.5, 0.5), (0.4, 0.5), (0.6, 0.6)):
        monkeypatch.setattr(clip, "measure", lambda *_, v=value: {"easy": {"comvg": {"overall": v}}})
        clip.keep_best(SMALL, tmp_path, 1, stage)
        assert json.loads((tmp_path / "best.json").read_text())["value"] == kept
    assert (tmp_path / "best" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["held_out"]["easy"]["comvg"]["overall"] for line in lines if "held_out" in line] == [0.5, 0.4, 0.6]


def test_it_stops_at_its_time(drawn: None, tmp_path: Path) -> None:
    assert clip.train(SMALL, tmp_path, CPU, time.monotonic(), 1).samples == 0


# The weights that ship


def test_shipped_weights_are_small_safe_and_described() -> None:
    found = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in found) < 15e6
    assert {p.suffix for p in found} <= {".json", ".safetensors", ".txt", ".md"}
    model, info = CLIPModel.from_pretrained(WEIGHTS, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert model.config.vision_config.hidden_size == record["recipe"]["width"]
    card = (WEIGHTS / "README.md").read_text()
    for word in ("Data", "Hardware", f"{record['samples']:,}", "predicate"):
        assert word in card
