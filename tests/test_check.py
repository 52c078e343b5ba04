"""The self-check passes models that are right and catches others; ``dsd models`` and ``dsd models check``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import huggingface_hub
import pytest
import torch
from torch import Tensor

import models
from dsd import check as module
from dsd.backbone import Backbone, cards, load_backbone, local_copy
from dsd.backbone.placement import Offload, Quantization
from dsd.check import check_model
from dsd.cli import main, options
from dsd.cli.models import _STATES
from dsd.contracts import OptionError
from dsd.probe import Probe, cross_attention_layers
from test_loading import cache

Pipe = Callable[..., str]
FAMILIES = {"sd2": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd35": "StableDiffusion3", "flux-dev": "Flux"}
FAMILIES |= {"pixart-sigma": "PixArt", "dit": "DiT"}


def off(found: module.ModelCheck) -> list[str]:
    return [finding.name for finding in found.findings if not finding.passed]


def value(found: module.ModelCheck, name: str) -> float:
    (measured,) = [f.value for f in found.findings if f.name == name]
    assert measured is not None
    return measured


# The check


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_pass(kind: str) -> None:
    backbone = models.backbone_of(models.pipeline(kind))
    found = check_model(backbone)
    assert found.passed, found.findings
    assert off(found) == []
    assert found.family == FAMILIES[kind]
    assert found.latent_shape == backbone.latent_shape(backbone.image_size)
    if kind == "dit":
        assert found.layers == ()
        return
    assert tuple(layer.name for layer in found.layers) == tuple(cross_attention_layers(backbone.denoiser))
    tokens = backbone.encode_texts(["a dog"])[0].states.shape[1]
    assert {layer.tokens for layer in found.layers} == {tokens}
    assert 0 < value(found, "attention score") < 1e-5


def test_embedded_model_passes() -> None:
    found = check_model(load_backbone("tiny"))
    assert found.passed
    assert [layer.heads for layer in found.layers] == [4] * 7
    assert [layer.positions for layer in found.layers] == [64, 16, 16, 16, 16, 64, 64]
    assert sum(found.parameters.values()) == sum(cards()["tiny"].parameters.values())
    assert sum(found.bytes.values()) == 4 * sum(found.parameters.values())
    assert value(found, "noise unexplained") < 1
    assert value(found, "as its card says") == 0
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["passed"]


def test_half_precision_passes(pipe: Pipe) -> None:
    found = check_model(load_backbone(pipe(), dtype=torch.bfloat16))
    assert found.passed, found.findings
    assert found.dtype == "bfloat16"


def test_size_is_that_of_the_pictures(pipe: Pipe) -> None:
    found = check_model(load_backbone(pipe()), size=32)
    assert found.latent_shape == (4, 16, 16)
    assert found.layers[0].positions == 256


def test_a_model_that_predicts_something_else_than_it_says_explains_less(tmp_path: Path) -> None:
    from dsd.backbone.hub import resolve

    folder = Path(shutil.copytree(resolve("tiny"), tmp_path / "model"))
    right = check_model(load_backbone(str(folder)))
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    wrong = check_model(load_backbone(str(folder)))
    assert value(right, "noise unexplained") < 1 < value(wrong, "noise unexplained")


@pytest.mark.parametrize("what", ["own", "all"])
def test_a_probe_that_is_wrong_is_found(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    class Wrong(Probe):
        @property
        def records(self) -> Any:
            found = dict(super().records)
            name = list(found)[2]
            found[name] = replace(found[name], **{what: getattr(found[name], what) + 3e-4})
            return found

    monkeypatch.setattr(module, "Probe", Wrong)
    assert off(check_model(load_backbone(pipe()))) == ["attention score"]


def test_attention_that_the_model_scales_differently_is_found(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe believes the layer's own scale; fused attention is called with another."""
    backbone = load_backbone(pipe())
    layer: Any = next(iter(cross_attention_layers(backbone.denoiser).values()))
    monkeypatch.setattr(layer, "scale", layer.scale * 1.1)
    assert off(check_model(backbone)) == ["attention score"]


def changed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> Backbone:
    stock = backbone.predict_noise
    monkeypatch.setattr(backbone, "predict_noise", lambda *given: change(stock(*given)))
    return backbone


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x + 1e-3 * x.mean(0), ["batch independence"]),
        (lambda x: x + 1e-3 * torch.rand(1), ["same again", "batch independence"]),
        (lambda x: x * float("nan"), ["finite", "same again", "batch independence"]),
    ],
    ids=["neighbours", "chance", "not a number"],
)
def test_passes_that_are_wrong_are_found(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], found: list[str]
) -> None:
    checked = check_model(changed(load_backbone(pipe()), monkeypatch, change))
    assert off(checked) == found
    json.dumps(checked.to_dict(), allow_nan=False)


def test_pictures_that_are_not_finite_are_found(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(pipe())
    stock = backbone.encode_images
    monkeypatch.setattr(backbone, "encode_images", lambda x: stock(x) * float("inf"))
    assert "finite" in off(check_model(backbone))


def test_model_is_as_it_was(pipe: Pipe) -> None:
    backbone = load_backbone(pipe())
    check_model(backbone)
    for layer in backbone.denoiser.modules():
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_another_model_under_a_name_is_found(pipe: Pipe, tmp_path: Path) -> None:
    card = cards()["sd21"]
    assert card.hub is not None
    assert card.revision is not None
    cache(tmp_path, card.hub, pipe(), commit=card.revision)
    checked = check_model(load_backbone("sd21", cache_dir=tmp_path))
    assert off(checked) == ["as its card says"]
    (note,) = [f.note for f in checked.findings if f.name == "as its card says"]
    assert "resolution 16 not 768" in note
    assert "epsilon not v_prediction" in note


# What is on this machine


def test_copies_on_this_machine(pipe: Pipe, tmp_path: Path) -> None:
    card = cards()["sd15"]
    assert card.hub is not None
    assert card.revision is not None
    assert local_copy(cards()["tiny"], cache_dir=tmp_path).state == "whole"
    assert local_copy(card, cache_dir=tmp_path).state == "none"
    cache(tmp_path, card.hub, pipe(), commit="f" * 40)
    other = local_copy(card, cache_dir=tmp_path)
    assert other.state == "other"
    assert "f" * 40 in other.note
    snapshot = cache(tmp_path, card.hub, pipe(), commit=card.revision)
    whole = local_copy(card, cache_dir=tmp_path)
    assert (whole.state, whole.folder) == ("whole", snapshot)
    assert whole.bytes == sum(f.stat().st_size for f in Path(pipe()).rglob("*") if f.is_file())
    (snapshot / "vae/diffusion_pytorch_model.safetensors").unlink()
    part = local_copy(card, cache_dir=tmp_path)
    assert part.state == "part"
    assert "vae" in part.note
    shutil.rmtree(snapshot / "tokenizer")
    assert local_copy(card, cache_dir=tmp_path).state == "part"


# Commands


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(argv)
    return status, *capsys.readouterr()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_list_as_json(capsys: pytest.CaptureFixture[str], pipe: Pipe, hub_cache: Path) -> None:
    card = cards()["sd15"]
    assert card.hub is not None
    cache(hub_cache, card.hub, pipe(), commit=card.revision or "")
    status, out, err = run(capsys, "models", "--format", "json")
    assert (status, err) == (0, "")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert list(rows) == list(cards())
    assert {name: row["installed"] for name, row in rows.items() if row["installed"] != "none"} == {
        "tiny": "whole",
        "sd15": "whole",
    }
    assert rows["sd15"]["bytes_in_bf16"] == card.bytes_in_bf16
    assert rows["sd15"]["hub"] == card.hub
    assert rows["tiny"]["timesteps"] == [200, 350, 500]
    assert rows["flux-dev"]["gated"] is True


def test_list_as_text(capsys: pytest.CaptureFixture[str], hub_cache: Path) -> None:
    status, out, _ = run(capsys, "models")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 2 + len(cards())
    assert all(name in out for name in cards())
    assert _STATES["whole"] in lines[2]


def test_check_prints_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "models", "check", "tiny")
    assert status == 0
    for text in ("StableDiffusion", "epsilon", "mid_block.attentions.0", "batch independence", "954,567"):
        assert text in out
    assert "OFF" not in out


def test_check_fails_with_status_2(capsys: pytest.CaptureFixture[str], pipe: Pipe, hub_cache: Path) -> None:
    card = cards()["sd15"]
    cache(hub_cache, str(card.hub), pipe(), commit=card.revision or "")
    status, out, err = run(capsys, "models", "check", "sd15", "--format", "json")
    assert status == 2
    assert not json.loads(out)["passed"]
    assert err.startswith("dsd models check: error: sd15: got as its card says beyond the limits")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("nonesuch",), "nonesuch"),
        (("tiny", "--device-map", "everywhere"), "balanced"),
        (("tiny", "--device-map", "unet=,vae=cpu"), "component=device"),
        (("tiny", "--device-map", "text_encoder_9=cpu"), "text_encoder_9"),
        (("tiny", "--device", "toaster"), "toaster"),
        (("tiny", "--device", "cpu", "--offload", "model"), "offload"),
        (("tiny", "--revision", "main"), "revision"),
        (("tiny", "--size", "1"), "size 1"),
    ],
)
def test_check_of_what_cannot_be_met(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str, hub_cache: Path
) -> None:
    status, out, err = run(capsys, "models", "check", *argv)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_options_reach_the_loader(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}

    def load(model: str, **options: Any) -> Backbone:
        given.update(model=model, **options)
        raise OptionError("enough")

    monkeypatch.setattr("dsd.matcher.load_backbone", load)
    argv = [
        "score",
        "a.png",
        "--text",
        "a dog",
        "--model",
        "m",
        "--dtype",
        "bfloat16",
        "--device-map",
        "unet=0,vae=cpu",
    ]
    argv += ["--quantize-text-encoder", "4bit", "--variant", "fp16", "--revision", "v2", "--config", "sd15"]
    assert run(capsys, *argv, "--channels-last", "--allow-pickle")[0] == 2
    assert given == {
        "model": "m",
        "channels_last": True,
        "device": None,
        "dtype": torch.bfloat16,
        "device_map": {"unet": 0, "vae": "cpu"},
        "offload": None,
        "quantize_text_encoder": "4bit",
        "variant": "fp16",
        "revision": "v2",
        "config": "sd15",
        "allow_pickle": True,
    }


def test_lists_are_those_of_the_library() -> None:
    assert get_args(Offload) == options.OFFLOADS
    assert get_args(Quantization) == options.QUANTIZATIONS
    assert set(_STATES) == {"whole", "part", "other", "none"}
