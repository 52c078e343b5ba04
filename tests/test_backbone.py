"""Loading, encoding and one pass agree with what diffusers and transformers do; long captions lose nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dsd.backbone import Backbone, TextStates, cards, default_timesteps, load_backbone
from dsd.backbone.hub import resolve
from dsd.contracts import DsdError, ImageError, ModelError, TextError
from models import PIXELS, SCALE, picture

Pipe = Callable[..., str]
WINDOW = 24


@pytest.fixture(scope="module")
def backbone(pipe: Pipe) -> Backbone:
    return load_backbone(pipe())


def one_line(error: pytest.ExceptionInfo[DsdError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    return text


# Images


def test_latents_are_the_mean_of_the_posterior_of_pixels_in_minus_one_to_one(backbone: Backbone, pipe: Pipe) -> None:
    pictures = [picture(i) for i in range(3)]
    vae = AutoencoderKL.from_pretrained(pipe(), subfolder="vae")
    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * SCALE
    found = backbone.encode_images(pictures)
    assert found.dtype == torch.float32
    assert tuple(found.shape[1:]) == backbone.latent_shape(PIXELS) == (4, 8, 8)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found, backbone.encode_images(pictures))


def test_extreme_pixels_are_one_and_minus_one(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    encode = backbone.vae.encode
    monkeypatch.setattr(backbone.vae, "encode", lambda x: seen.append(x) or encode(x))
    black_to_white = np.zeros((PIXELS, PIXELS, 3), np.uint8)
    black_to_white[:, 8:] = 255
    black_to_white[..., 1] = 51
    from PIL import Image

    backbone.encode_images([Image.fromarray(black_to_white)])
    assert torch.allclose(seen[0][0, 0, 0, [0, -1]], torch.tensor([-1.0, 1.0]), atol=1e-6)
    assert torch.allclose(seen[0][0, 1], torch.tensor(-0.6), atol=1e-6)


@pytest.mark.parametrize("size", [8, 15, 16, 17, 33, 50])
def test_latent_shape_is_that_of_the_encoder(backbone: Backbone, size: int) -> None:
    assert tuple(backbone.encode_images([picture(0, size)]).shape[1:]) == backbone.latent_shape(size)


def test_pictures_of_several_sizes_are_refused(backbone: Backbone) -> None:
    with pytest.raises(ImageError, match="one size") as error:
        backbone.encode_images([picture(0), picture(1, 32)])
    one_line(error)


# Noise


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_noise_is_added_as_the_stock_scheduler_does(backbone: Backbone, pipe: Pipe, timestep: int) -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t = torch.tensor([timestep, 321])
    expected = DDPMScheduler.from_pretrained(pipe(), subfolder="scheduler").add_noise(latents, noise, t)
    assert torch.allclose(backbone.add_noise(latents, noise, t), expected, atol=1e-6)


def test_pass_is_the_stock_one(backbone: Backbone, pipe: Pipe) -> None:
    """Tokens padded by the tokenizer itself, the stock text encoder and U-Net."""
    texts = ["a red circle left of a dog", "cat"]
    words = CLIPTokenizer.from_pretrained(pipe(), subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(pipe(), subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(pipe(), subfolder="unet")
    noised, t = torch.randn(2, 4, 8, 8), torch.tensor([17, 801])
    ids = words(texts, padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids)[0]
        expected = unet(noised, t, encoder_hidden_states=states).sample
        text = TextStates.join(backbone.encode_texts(texts))
        found = backbone.predict_noise(noised, t, text)
    assert torch.allclose(text.states, states, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_whatever_is_predicted_becomes_the_noise(pipe: Pipe, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser that is right about its own target gives the noise that was added."""
    backbone = load_backbone(pipe(prediction=prediction))
    latents, noise, t = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 50, 400, 800, 999])
    stock = DDPMScheduler.from_pretrained(pipe(prediction=prediction), subfolder="scheduler")
    target = {"epsilon": noise, "v_prediction": stock.get_velocity(latents, noise, t), "sample": latents}[prediction]
    monkeypatch.setattr(backbone.denoiser, "forward", lambda *_: type("Output", (), {"sample": target}))
    text = TextStates.join(backbone.encode_texts(["cat"]) * 5)
    found = backbone.predict_noise(backbone.add_noise(latents, noise, t), t, text)
    # at t = 0 the noise is a thirtieth of what it is found in
    assert torch.allclose(found, noise, atol=1e-4)


def test_second_generation_of_stable_diffusion(pipe: Pipe) -> None:
    backbone = load_backbone(pipe(prediction="v_prediction", linear=True))
    assert backbone.denoiser.config.use_linear_projection
    with torch.no_grad():
        found = backbone.predict_noise(torch.randn(1, 4, 8, 8), torch.tensor([500]), backbone.encode_texts(["dog"])[0])
    assert found.shape == (1, 4, 8, 8)
    assert found.isfinite().all()


# Captions

SHORT = "a red circle left of a blue square"  # eight words, a token each
LONG = " ".join([SHORT] * 5)


def own_ids(backbone: Backbone, text: str) -> list[int]:
    """What the tokenizer makes of a caption that nothing cuts."""
    return backbone.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


@pytest.fixture
def fed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The token ids that the text encoder is given."""
    seen: list[Tensor] = []
    forward = backbone.text_encoder.forward
    monkeypatch.setattr(
        backbone.text_encoder, "forward", lambda ids, *a, **k: (seen.append(ids), forward(ids, *a, **k))[1]
    )
    return seen


CAPTIONS = {
    "one window": SHORT,
    "exactly one window": " ".join(["dog"] * (WINDOW - 2)),
    "one token over": " ".join(["dog"] * (WINDOW - 1)),
    "long": LONG,
    "words of many tokens": "zebra unicorn " * 9,
    "a word longer than a window": "cat " + "z" * 70 + " dog",
    "emoji": "a dog 🐕‍🦺 and a cat 🐈",
    "right to left": "قطة حمراء فوق كلب أزرق",
    "marks and digits": "don't: 12 cats, (two) dogs -- ok!",
    "accents": "un café à Zürich",
    "no letters": "!!! ??? ...",
}


@pytest.mark.parametrize("text", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_every_token_of_a_caption_is_seen_once_and_in_order(backbone: Backbone, fed: list[Tensor], text: str) -> None:
    (states,) = backbone.encode_texts([text])
    ids = own_ids(backbone, text)
    (rows,) = fed
    flat = rows.flatten()
    assert states.states.shape == (1, len(flat), 32)
    assert len(flat) % WINDOW == 0
    assert flat[states.own[0]].tolist() == ids
    begin, end = backbone.tokenizer.bos_token_id, backbone.tokenizer.eos_token_id
    for row, own in zip(rows, states.own[0].reshape(-1, WINDOW), strict=True):
        count = int(own.sum())
        assert own.tolist() == [False] + [True] * count + [False] * (WINDOW - 1 - count)
        assert row[0] == begin
        assert set(row[1 + count :].tolist()) == {end}  # CLIP pads with its end


@pytest.mark.parametrize("text", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_words_share_out_the_own_tokens(backbone: Backbone, text: str) -> None:
    (states,) = backbone.encode_texts([text])
    (words,) = states.words
    assert len(words.spelling) == len(words.tokens)
    assert all(words.spelling)
    assert all(words.tokens)
    flat = [t for tokens in words.tokens for t in tokens]
    assert flat == sorted(flat)
    assert flat == states.own[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("text", [CAPTIONS["long"], CAPTIONS["words of many tokens"]])
def test_no_word_that_fits_a_window_is_split(backbone: Backbone, text: str) -> None:
    (states,) = backbone.encode_texts([text])
    assert states.states.shape[1] > WINDOW
    for tokens in states.words[0].tokens:
        assert len({t // WINDOW for t in tokens}) == 1


def test_windows_are_encoded_as_captions_of_their_own(backbone: Backbone) -> None:
    """22 words fill a window; what follows is encoded as if it stood alone."""
    (states,) = backbone.encode_texts(["dog " * (WINDOW - 2) + "red cat"])
    first, second = backbone.encode_texts(["dog " * (WINDOW - 2), "red cat"])
    assert torch.allclose(states.states, torch.cat([first.states, second.states], 1), atol=1e-5)


def test_words_are_spelled_as_they_stand(backbone: Backbone) -> None:
    (states,) = backbone.encode_texts(["A red Zebra, don't 12"])
    words = states.words[0]
    assert words.spelling == ("a", "red", "zebra", ",", "don", "'t", "1", "2")
    ids = own_ids(backbone, "A red Zebra, don't 12")
    assert words.tokens[2] == tuple(range(3, 3 + len(own_ids(backbone, "zebra"))))
    assert sum(map(len, words.tokens)) == len(ids)


def test_empty_caption_has_no_own_tokens(backbone: Backbone) -> None:
    (states,) = backbone.encode_texts([""])
    assert states.states.shape[1] == WINDOW
    assert not states.own.any()
    assert states.words[0].spelling == ()


def test_three_thousand_words(backbone: Backbone) -> None:
    (states,) = backbone.encode_texts(["cat " * 3000])
    assert int(states.own.sum()) == 3000
    assert states.states.shape[1] == WINDOW * -(-3000 // (WINDOW - 2))


@pytest.mark.parametrize("text", ["a <|endoftext|> dog", "<|startoftext|>", "\x00\x01", "\u200b", "\ufeff"])
def test_odd_captions_are_encoded(backbone: Backbone, text: str) -> None:
    (states,) = backbone.encode_texts([text])
    assert states.states.isfinite().all()
    assert states.own.sum() == len(own_ids(backbone, text)) == sum(map(len, states.words[0].tokens)) > 0


@pytest.mark.parametrize("text", ["\udcff dog", "a \ud83d"])
def test_captions_that_are_no_unicode_are_refused(backbone: Backbone, text: str) -> None:
    with pytest.raises(TextError, match="Unicode") as error:
        backbone.encode_texts(["cat", text])
    one_line(error)


def test_select_and_join_keep_rows_together(backbone: Backbone) -> None:
    joined = TextStates.join(backbone.encode_texts(["a dog", "red", "left of"]))
    picked = joined.select([2, 0, 2])
    assert len(picked) == 3
    for row, source in enumerate([2, 0, 2]):
        assert torch.equal(picked.states[row], joined.states[source])
        assert torch.equal(picked.own[row], joined.own[source])
        assert picked.words[row] == joined.words[source]


# Loading


def test_folder_is_loaded_frozen(backbone: Backbone, pipe: Pipe) -> None:
    assert backbone.name == pipe()
    assert backbone.image_size == PIXELS
    assert backbone.num_train_timesteps == 1000
    assert backbone.dtype == torch.float32
    for part in (backbone.denoiser, backbone.vae, backbone.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


def test_half_precision(pipe: Pipe) -> None:
    backbone = load_backbone(pipe(), dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    latents = backbone.encode_images([picture(0)])
    (text,) = backbone.encode_texts(["cat"])
    with torch.no_grad():
        found = backbone.predict_noise(backbone.add_noise(latents, latents, torch.tensor([9])), torch.tensor([9]), text)
    assert latents.dtype == found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["nonesuch", "a/b/c", "/no/such/folder", "./here", "~/there", ""])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(repr(name))) as error:
        load_backbone(name)
    assert "tiny" in one_line(error)


def test_hub_name_that_is_not_in_the_cache() -> None:
    with pytest.raises(ModelError, match="hf download") as error:
        load_backbone("nobody/nothing-of-this-name")
    one_line(error)


def test_aliases_are_resolved() -> None:
    assert "tiny" in cards()
    assert isinstance(resolve("tiny"), Path)
    for name, card in cards().items():
        if name != "tiny":
            assert resolve(name) == card.hub
            assert str(resolve(name)).count("/") == 1
    assert all(0 <= t < 1000 for name in (*cards(), "unknown") for t in default_timesteps(name))


def drop(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def truncate(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])


def write(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)


def forget_tensor(folder: Path, file: str) -> None:
    """A file from which one tensor is missing."""
    tensors = load_file(folder / file)
    tensors.pop(sorted(tensors)[len(tensors) // 2])
    save_file(tensors, folder / file, {"format": "pt"})


def relist(folder: Path, part: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index.pop(part)
    write(folder, "model_index.json", json.dumps(index))


def configure(folder: Path, file: str, **values: object) -> None:
    config = json.loads((folder / file).read_text())
    write(folder, file, json.dumps({**config, **values}))


WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text": "text_encoder/model.safetensors",
}
BREAKS: dict[str, Callable[[Path], None]] = {
    "no index": lambda f: (f / "model_index.json").unlink(),
    "broken index": lambda f: truncate(f, "model_index.json"),
    "index is a list": lambda f: write(f, "model_index.json", "[]"),
    "index is a number": lambda f: write(f, "model_index.json", "7"),
    "index without text encoder": lambda f: relist(f, "text_encoder"),
    **{f"no {part}": lambda f, part=part: drop(f, part) for part in ("unet", "vae", "text_encoder", "tokenizer")},
    "no scheduler": lambda f: drop(f, "scheduler"),
    **{f"{name} truncated": lambda f, file=file: truncate(f, file) for name, file in WEIGHTS.items()},
    **{f"{name} lacks a tensor": lambda f, file=file: forget_tensor(f, file) for name, file in WEIGHTS.items()},
    "empty configuration": lambda f: write(f, "unet/config.json", ""),
    "other prediction": lambda f: configure(f, "scheduler/scheduler_config.json", prediction_type="flow_prediction"),
    "U-Net of another shape": lambda f: configure(f, "unet/config.json", block_out_channels=[16, 32]),
    "text of another width": lambda f: configure(f, "unet/config.json", cross_attention_dim=48),
}


@pytest.mark.parametrize("damage", BREAKS.values(), ids=BREAKS.keys())
def test_broken_folder(pipe: Pipe, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipe(), folder)
    damage(folder)
    with pytest.raises(ModelError, match=re.escape(str(folder))) as error:
        load_backbone(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"in_channels": 9}, "channels"), ({"cross_attention_dim": 48}, "width")],
    ids=["inpainting U-Net", "U-Net for another text encoder"],
)
def test_parts_that_do_not_fit_together(pipe: Pipe, tmp_path: Path, options: dict[str, int], reason: str) -> None:
    """Each part loads by itself, yet no pass could be made."""
    folder = tmp_path / "model"
    shutil.copytree(pipe(), folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config({**config, **options}).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=reason) as error:
        load_backbone(str(folder))
    one_line(error)
