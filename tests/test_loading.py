"""Models are found, checked and loaded as they are, or refused with what to do; no network, no code of others."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
import original
from dsd.backbone import Backbone, LoadConfig, cards, load_backbone
from dsd.backbone.folder import file_patterns, read_pipeline
from dsd.backbone.placement import map_devices, offload_networks, quantization_config, spread
from dsd.contracts import DsdError, ModelError, OptionError
from models import PIXELS, Spec, picture

Pipe = Callable[..., str]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(pipe: Pipe, tmp_path: Path) -> Path:
    """A pipeline folder to damage."""
    return Path(shutil.copytree(pipe(), tmp_path / "model"))


def refused(error: pytest.ExceptionInfo[DsdError], *words: str) -> str:
    """Checks a message: one line, what was expected, and these words."""
    text = str(error.value)
    assert "\n" not in text
    assert "expected" in text
    for word in words:
        assert word in text, text
    return text


def noise_seen(backbone: Backbone, caption: str = "a red circle left of a dog") -> Tensor:
    """What a backbone makes of a picture and a caption."""
    latents = backbone.encode_images([picture(0)])
    (text,) = backbone.encode_texts([caption])
    t = torch.tensor([300])
    with torch.no_grad():
        noised = backbone.add_noise(latents, torch.ones_like(latents), t)
        return backbone.predict_noise(noised.to(backbone.device), t.to(backbone.device), text)


def test_the_layout_in_memory_changes_nothing_else(pipe: Pipe) -> None:
    plain, last = load_backbone(pipe()), load_backbone(pipe(), channels_last=True)
    weights = [m.weight for m in last.denoiser.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert not any(w.is_contiguous() for w in weights)
    assert torch.allclose(noise_seen(plain), noise_seen(last), atol=1e-5)


def edit(file: Path, **values: Any) -> None:
    """Sets values of a JSON file; None takes one away."""
    listed = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in listed.items() if v is not None}))


# The hub and its cache


def cache(root: Path, hub: str, source: str | Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Lays a pipeline folder into a hub cache as the hub's client would: blobs, and links to them by commit."""
    home = root / f"models--{hub.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    for number, file in enumerate(sorted(p for p in Path(source).rglob("*") if p.is_file())):
        blob = home / "blobs" / f"{commit[:8]}-{number}"
        link = snapshot / file.relative_to(source)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref is not None:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(commit)
    return snapshot


def test_hub_name_is_loaded_from_the_cache(pipe: Pipe, tmp_path: Path) -> None:
    cache(tmp_path, "someone/model", pipe())
    found = load_backbone("someone/model", cache_dir=tmp_path)
    assert found.name == "someone/model"
    assert torch.equal(noise_seen(found), noise_seen(load_backbone(pipe())))


@pytest.mark.parametrize("revision", ["v2", COMMIT])
def test_revision_is_a_tag_or_a_commit(pipe: Pipe, tmp_path: Path, revision: str) -> None:
    cache(tmp_path, "someone/model", pipe(), ref="v2")
    cache(tmp_path, "someone/model", pipe(seed=1), commit=COMMIT[::-1])
    found = load_backbone("someone/model", cache_dir=tmp_path, revision=revision)
    assert torch.equal(noise_seen(found), noise_seen(load_backbone(pipe())))


def test_alias_is_loaded_at_the_revision_of_its_card(pipe: Pipe, tmp_path: Path) -> None:
    card = cards()["sd15"]
    assert card.hub is not None
    assert card.revision is not None
    cache(tmp_path, card.hub, pipe(seed=1))
    cache(tmp_path, card.hub, pipe(), commit=card.revision, ref=None)
    assert torch.equal(noise_seen(load_backbone("sd15", cache_dir=tmp_path)), noise_seen(load_backbone(pipe())))


def test_alias_that_is_not_in_the_cache_says_how_to_fetch_it(tmp_path: Path) -> None:
    card = cards()["sd15"]
    with pytest.raises(ModelError) as error:
        load_backbone("sd15", cache_dir=tmp_path)
    refused(error, f"hf download {card.hub} --revision {card.revision}", "HF_HUB_OFFLINE")


def test_hub_name_that_is_not_in_the_cache_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_backbone("someone/model", cache_dir=tmp_path)
    assert refused(error).endswith("hf download someone/model")


def test_another_revision_in_the_cache_is_named_but_not_taken(pipe: Pipe, tmp_path: Path) -> None:
    hub = cards()["sd15"].hub
    assert hub is not None
    cache(tmp_path, hub, pipe())
    with pytest.raises(ModelError) as error:
        load_backbone("sd15", cache_dir=tmp_path)
    refused(error, f"revision={COMMIT}")
    assert load_backbone("sd15", cache_dir=tmp_path, revision=COMMIT).name == "sd15"
    assert load_backbone("sd15", cache_dir=tmp_path, revision="main").name == "sd15"


@pytest.mark.parametrize("lost", ["unet", "tokenizer", "scheduler", UNET, "text_encoder/model.safetensors"])
def test_cache_with_files_missing(pipe: Pipe, tmp_path: Path, lost: str) -> None:
    place = cache(tmp_path, "someone/model", pipe()) / lost
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    with pytest.raises(ModelError) as error:
        load_backbone("someone/model", cache_dir=tmp_path)
    refused(error, lost.split("/")[0], "hf download someone/model")


def answer(kind: type[Exception], status: int = 403) -> Exception:
    """An error as the hub's client raises it."""
    if issubclass(kind, errors.HfHubHTTPError):
        response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
        return kind("The hub says no.\nSecond line.", response=response)
    return kind("The hub says no.\nSecond line.")


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (answer(errors.GatedRepoError), ["gated", "https://huggingface.co/black-forest-labs/FLUX.1-dev", "auth login"]),
        (answer(errors.RepositoryNotFoundError, 401), ["does not know", "hf auth login"]),
        (answer(errors.RevisionNotFoundError, 404), ["revision", "commits/main"]),
        (answer(errors.RemoteEntryNotFoundError, 404), ["model_index.json", "single-file"]),
        (answer(errors.LocalEntryNotFoundError), ["hf download black-forest-labs/FLUX.1-dev --revision"]),
        (errors.OfflineModeIsEnabled("offline"), ["hf download black-forest-labs/FLUX.1-dev --revision"]),
        (answer(errors.LocalTokenNotFoundError), ["token", "hf auth login"]),
        (answer(errors.HfHubHTTPError, 401), ["401", "hf auth login"]),
        (answer(errors.HfHubHTTPError, 503), ["The hub says no.", "try again"]),
        (ConnectionResetError("reset"), ["reset", "try again"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch, raised: Exception, words: list[str]) -> None:
    def ask(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", ask)
    with pytest.raises(ModelError, match=r"^flux-dev") as error:
        load_backbone("flux-dev")
    refused(error, *words)


def test_options_reach_the_hub(monkeypatch: pytest.MonkeyPatch, pipe: Pipe) -> None:
    asked: list[dict[str, Any]] = []

    def one(hub: str, name: str, **options: Any) -> str:
        asked.append({"hub": hub, **options})
        return f"{pipe()}/{name}"

    def many(hub: str, **options: Any) -> str:
        options.pop("allow_patterns")
        asked.append({"hub": hub, **options})
        return pipe()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", many)
    load_backbone("someone/model", revision="v2", token="secret", cache_dir="here")
    assert asked == [{"hub": "someone/model", "revision": "v2", "token": "secret", "cache_dir": "here"}] * 2


def test_only_what_is_needed_is_fetched(pipe: Pipe) -> None:
    """Of the files that Stable Diffusion 1.5 has on the hub: no safety checker, no pickles, no second copies."""
    networks = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    needed = {
        "model_index.json",
        *(f"{n}.safetensors" for n in networks),
        *(f"{n.split('/')[0]}/config.json" for n in networks),
        *(f"tokenizer/{n}" for n in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")),
        "scheduler/scheduler_config.json",
    }
    others = {
        *(f"{n}.{v}.safetensors" for n in networks for v in ("fp16", "non_ema")),
        *(f"{n}{v}.bin" for n in networks for v in ("", ".fp16")),
        "unet/diffusion_flax_model.msgpack",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "README.md",
    }

    def fetched(files: set[str], **options: Any) -> set[str]:
        patterns = file_patterns(read_pipeline("m", Path(pipe())), **options)
        return {f for f in files if any(fnmatch.fnmatch(f, p) for p in patterns)}

    assert fetched(needed | others, variant=None, pickles=False) == needed
    halves = {f"{n}.fp16.safetensors" for n in networks}
    assert fetched(needed | others, variant="fp16", pickles=False) == needed | halves
    pickles = {f"{n}.bin" for n in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model")}
    assert pickles < fetched(needed | others, variant=None, pickles=True)
    shards = {f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = {"unet/diffusion_pytorch_model.safetensors.index.json"}
    assert fetched(shards | index, variant=None, pickles=False) == shards | index


# Folders


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet", ["my_unet", "UNet2DConditionModel"]),
        ("unet", ["os", "system"]),
        ("safety_checker", ["my_checker", "Checker"]),
        ("_class_name", ["pipeline", "MyPipeline"]),
    ],
)
def test_index_that_names_modules_of_its_own_is_refused(folder: Path, name: str, value: list[str]) -> None:
    (folder / "my_unet.py").write_text("raise SystemExit")
    edit(folder / "model_index.json", **{name: value})
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, name, value[0], "no code of others is run")
    assert "my_unet" not in sys.modules


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_configuration_that_asks_for_code_of_its_own_is_refused(folder: Path, file: str) -> None:
    edit(folder / file, auto_map={"AutoModel": "modeling.Model"})
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, file, "auto_map")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (["diffusers", "NoSuchModel"], ["diffusers.NoSuchModel", "upgrade"]),
        (["diffusers", "DDIMScheduler"], []),
        (["transformers", "AutoModel"], ["transformers.AutoModel"]),
        (["diffusers", "__name__"], ["diffusers.__name__"]),
    ],
)
def test_component_of_a_strange_class(folder: Path, entry: list[str], words: list[str]) -> None:
    edit(folder / "model_index.json", unet=entry)
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, *words)


def test_pipeline_of_a_family_that_is_not_supported(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="AudioLDMPipeline")
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, "AudioLDMPipeline", "StableDiffusionPipeline", "bring-your-own-model")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), ["empty folder"]),
        (("adapter_config.json", "adapter_model.safetensors"), ["adapter", "--adapter"]),
        (("pytorch_lora_weights.safetensors",), ["adapter"]),
        (("config.json", "model.safetensors"), ["one network"]),
        (("v1-5-pruned.safetensors",), ["v1-5-pruned.safetensors", "name the file itself"]),
        (("picture.png",), ["without model_index.json"]),
    ],
)
def test_folders_of_other_kinds(tmp_path: Path, files: tuple[str, ...], words: list[str]) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path))
    refused(error, "save_pretrained", *words)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("a model")
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path / "model.txt"))
    refused(error, "'.txt'", ".safetensors")


def test_scheduler_of_another_process_is_refused(folder: Path) -> None:
    """Its betas are not those of the model, and must not be made up."""
    from diffusers import EDMEulerScheduler

    shutil.rmtree(folder / "scheduler")
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, "EDMEulerScheduler")


@pytest.mark.parametrize("kind", ["PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler", "UniPCMultistepScheduler"])
def test_any_scheduler_of_the_process_will_do(folder: Path, pipe: Pipe, kind: str) -> None:
    import diffusers

    listed = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, kind).from_config(listed).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    assert torch.equal(noise_seen(load_backbone(str(folder))), noise_seen(load_backbone(pipe())))


def test_safety_checker_is_never_loaded(folder: Path, pipe: Pipe) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert torch.equal(noise_seen(load_backbone(str(folder))), noise_seen(load_backbone(pipe())))


# Families


@pytest.mark.parametrize("kind", ["sd-lcm", "sdxl", "sd3", "sd3-without-t5", "flux-dev", "pixart-sigma", "dit"])
def test_every_family_is_loaded_from_its_folder(kind: str, tmp_path: Path) -> None:
    stock = models.pipeline(kind)
    stock.save_pretrained(tmp_path)
    expected, found = models.backbone_of(stock), load_backbone(str(tmp_path))
    assert type(found) is type(expected)
    assert noise_seen(found, "dog").isfinite().all()
    assert torch.allclose(noise_seen(found, "dog"), noise_seen(expected, "dog"), atol=1e-5)
    assert json.dumps(found.computation(), default=str) == json.dumps(expected.computation(), default=str)


def test_tokenizer_that_needs_sentencepiece_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PixArt's is on the hub."""
    models.pipeline("pixart-sigma").save_pretrained(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").rename(tmp_path / "tokenizer/spiece.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path))
    refused(error, "sentencepiece", "pip install sentencepiece protobuf")


# Weights


def test_pointer_of_git_lfs(folder: Path) -> None:
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167536\n")
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, UNET, "git lfs pull")


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_weights_that_were_cut_short(folder: Path, length: int) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[:length])
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, UNET, "download")
    assert length != -1 or f"{len(data):,}" in str(error.value)


def test_weights_with_something_behind_them(folder: Path) -> None:
    with (folder / UNET).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, UNET, "header")


def shard(folder: Path) -> Path:
    """Splits the U-Net's weights in two, as large models come."""
    tensors = load_file(folder / UNET)
    names = sorted(tensors)
    (folder / UNET).unlink()
    listed = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / "unet" / file, {"format": "pt"})
        listed |= dict.fromkeys(part, file)
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": listed}))
    return index


def test_weights_in_shards(folder: Path, pipe: Pipe) -> None:
    shard(folder)
    assert torch.equal(noise_seen(load_backbone(str(folder))), noise_seen(load_backbone(pipe())))


def test_shard_that_is_missing(folder: Path) -> None:
    shard(folder).with_name("diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, "1 of 2 shards", "00002-of-00002")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/secret.safetensors", "weights.bin", 7])
def test_shards_do_not_lead_out_of_the_folder(folder: Path, name: Any) -> None:
    index = shard(folder)
    listed = json.loads(index.read_text())["weight_map"]
    save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
    edit(index, weight_map={**dict.fromkeys(listed, name)})
    with pytest.raises(ModelError) as error:
        load_backbone(str(folder))
    refused(error, "shards")


def test_variant_is_taken_where_it_is(folder: Path, pipe: Pipe) -> None:
    """Only the U-Net has it, and there it is another one."""
    shutil.copy(Path(pipe(seed=1)) / UNET, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    plain, variant = load_backbone(str(folder)), load_backbone(str(folder), variant="fp16")
    other = load_backbone(pipe(seed=1))
    for name, tensor in other.denoiser.state_dict().items():
        assert torch.equal(variant.denoiser.state_dict()[name], tensor)
    assert not torch.equal(noise_seen(plain), noise_seen(variant))
    with pytest.raises(ModelError, match="variant 'bf16'") as error:
        load_backbone(str(folder), variant="bf16")
    refused(error)


class Trap:
    """What runs when it is unpickled, and leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def unsafe(folder: Path, mark: Path | None = None) -> None:
    """Replaces the weights by pickles, of the tensors, or of one that runs code."""
    for name, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "")):
        source = folder / name / f"{stem or 'model'}.safetensors"
        tensors: dict[str, Any] = load_file(source)
        if mark is not None and name == "unet":
            tensors["trap"] = Trap(mark)
        source.unlink()
        torch.save(tensors, folder / name / f"{stem or 'pytorch_model'}.bin")


def test_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_pickled_weights_are_read_only_if_allowed(folder: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    unsafe(folder)
    expected = noise_seen(load_backbone(pipe()))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
        with pytest.raises(ModelError) as error:
            load_backbone(str(folder))
        refused(error, "pickled", "--allow-pickle")
    assert torch.equal(noise_seen(load_backbone(str(folder), allow_pickle=True)), expected)


def test_pickled_weights_run_no_code_even_if_allowed(folder: Path, tmp_path: Path) -> None:
    unsafe(folder, tmp_path / "sprung")
    with pytest.raises(ModelError, match=re.escape(str(folder))) as error:
        load_backbone(str(folder), allow_pickle=True)
    refused(error)
    assert not (tmp_path / "sprung").exists()


def test_safetensors_are_taken_before_pickles(folder: Path, pipe: Pipe, tmp_path: Path) -> None:
    torch.save({"trap": Trap(tmp_path / "sprung")}, folder / "unet/diffusion_pytorch_model.bin")
    found = load_backbone(str(folder), allow_pickle=True)
    assert torch.equal(noise_seen(found), noise_seen(load_backbone(pipe())))
    assert not (tmp_path / "sprung").exists()


# Single files


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline ``pipe()`` in one file, named as the models were first published."""
    return original.save(models.parts(Spec()), tmp_path_factory.mktemp("single") / "model.safetensors")


def test_single_file_is_the_pipeline(pipe: Pipe, single: Path) -> None:
    found, expected = load_backbone(str(single), config=pipe()), load_backbone(pipe())
    assert found.name == str(single)
    for part in ("denoiser", "vae", "text_encoder"):
        ours, theirs = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.allclose(noise_seen(found), noise_seen(expected), atol=1e-5)
    assert not found.denoiser.training


def test_single_file_needs_no_weights_of_its_configuration(folder: Path, single: Path) -> None:
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    found: Any = load_backbone(str(single), config=str(folder), dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.schedule.prediction_type == "v_prediction"


def test_single_file_without_configuration_asks_for_that_of_its_model(pipe: Pipe, single: Path, tmp_path: Path) -> None:
    hub, revision = cards()["sd15"].hub, cards()["sd15"].revision
    assert hub is not None
    assert revision is not None
    with pytest.raises(ModelError) as error:
        load_backbone(str(single), cache_dir=tmp_path)
    refused(error, str(single), f"hf download {hub} --revision {revision}", "--config")
    cache(tmp_path, hub, pipe(), commit=revision)
    for options in ({}, {"revision": "main"}):
        found = load_backbone(str(single), cache_dir=tmp_path, **options)
        assert torch.allclose(noise_seen(found), noise_seen(load_backbone(pipe())), atol=1e-5)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (
            {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 1024)},
            ["sd21-base or sd21", "--config"],
        ),
        ({"v_pred": torch.zeros(0)}, ["velocity", "--config"]),
    ],
    ids=["SD 2", "velocity"],
)
def test_single_file_that_does_not_say_what_it_predicts(
    single: Path, tmp_path: Path, added: dict[str, Tensor], words: list[str]
) -> None:
    save_file({**load_file(single), **added}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path / "model.safetensors"))
    refused(error, *words)


def test_single_file_that_looks_like_nothing(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path / "model.safetensors"))
    refused(error, "1 tensors", "--config")


@pytest.mark.parametrize(
    ("start", "network"),
    [
        ("model.diffusion_model.middle_block.0", "unet"),
        ("first_stage_model.encoder.mid", "vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1", "text_encoder"),
        ("cond_stage_model.", "text_encoder"),
        ("first_stage_model.", "vae"),
        ("model.", "unet"),
    ],
)
def test_single_file_with_weights_missing(pipe: Pipe, single: Path, tmp_path: Path, start: str, network: str) -> None:
    """They are never filled in."""
    left = {n: t for n, t in load_file(single).items() if not n.startswith(start)}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path / "model.safetensors"), config=pipe())
    refused(error, str(tmp_path))


def test_single_file_of_another_configuration(pipe: Pipe, single: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_backbone(str(single), config=pipe(layers=2))
    refused(error, str(single))


def test_single_file_that_was_cut_short(pipe: Pipe, single: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(single.read_bytes()[:-1])
    with pytest.raises(ModelError) as error:
        load_backbone(str(tmp_path / "model.safetensors"), config=pipe())
    refused(error, "download it again")


def test_pickled_single_file(pipe: Pipe, single: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(single), "epoch": 3}, file)
    with pytest.raises(ModelError) as error:
        load_backbone(str(file), config=pipe())
    refused(error, "pickled", "--allow-pickle")
    found = load_backbone(str(file), config=pipe(), allow_pickle=True)
    assert torch.allclose(noise_seen(found), noise_seen(load_backbone(pipe())), atol=1e-5)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "cut short", "text"])
def test_pickled_single_file_runs_no_code(pipe: Pipe, tmp_path: Path, form: str) -> None:
    file, mark = tmp_path / "model.ckpt", tmp_path / "sprung"
    stream = io.BytesIO()
    if form == "pickle":
        pickle.dump({"state_dict": Trap(mark)}, stream)
    elif form == "text":
        stream.write(b"no model")
    else:
        torch.save({"state_dict": Trap(mark)}, stream, _use_new_zipfile_serialization=form != "legacy")
    file.write_bytes(stream.getvalue()[: 20 if form == "cut short" else None])
    for allowed in (False, True):
        with pytest.raises(ModelError) as error:
            load_backbone(str(file), config=pipe(), allow_pickle=allowed)
        refused(error, str(file))
    assert not mark.exists()


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.int8}, ["dtype"]),
        ({"dtype": "float16"}, ["dtype"]),
        ({"offload": "disk"}, ["offload", "sequential"]),
        ({"quantize_text_encoder": "2bit"}, ["quantize_text_encoder", "4bit"]),
        ({"device_map": "auto"}, ["device_map", "balanced"]),
        ({"device_map": "balanced", "device": "cpu"}, ["device_map with device"]),
        ({"device_map": {"unet": "cpu"}, "offload": "model"}, ["device_map with offload"]),
        ({"variant": "../fp16"}, ["variant"]),
        ({"variant": ""}, ["variant"]),
    ],
)
def test_options_outside_what_they_may_be(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        LoadConfig(**options)
    refused(error, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"revision": "main"}, ["revision with a local folder"]),
        ({"config": "sd15"}, ["config with a local folder"]),
        ({"offload": "model", "device": "cpu"}, ["offload", "GPU"]),
        ({"device": "cuda:77"}, ["cuda:77"]),
        ({"device": "toaster"}, ["toaster"]),
        ({"device_map": {"text_encoder_3": "cpu"}}, ["text_encoder_3", "text_encoder, unet, vae"]),
        ({"device_map": {"unet": "toaster"}}, ["toaster"]),
    ],
)
def test_options_that_cannot_be_met(pipe: Pipe, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        load_backbone(pipe(), **options)
    refused(error, *words)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"quantize_text_encoder": "8bit"}])
def test_options_that_mean_nothing_to_a_single_file(
    pipe: Pipe, single: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsd.backbone.loading.quantization_config", lambda *_: object())
    with pytest.raises(OptionError, match="single file"):
        load_backbone(str(single), config=pipe(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_what_needs_a_gpu_says_so(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="balanced") as error:
        load_backbone(pipe(), device_map="balanced")
    refused(error, "GPU")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "bitsandbytes" else None)
    with pytest.raises(OptionError, match="8bit") as error:
        load_backbone(pipe(), quantize_text_encoder="8bit")
    refused(error, "GPU")


def test_quantisation_needs_bitsandbytes(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(OptionError) as error:
        load_backbone(pipe(), quantize_text_encoder="4bit")
    refused(error, "pip install bitsandbytes")


@pytest.mark.parametrize(("bits", "field"), [("8bit", "load_in_8bit"), ("4bit", "load_in_4bit")])
def test_quantisation_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, bits: Any, field: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    made = quantization_config(bits, torch.bfloat16, torch.device("cuda"))
    assert getattr(made, field)
    assert bits == "8bit" or made.bnb_4bit_compute_dtype == torch.bfloat16


def test_text_encoders_alone_are_quantised(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    asked = {}
    for kind in (CLIPTextModel, AutoencoderKL, UNet2DConditionModel):

        def load(place: Any, kind: Any = kind, stock: Any = kind.from_pretrained, **options: Any) -> Any:
            asked[kind.__name__] = options.pop("quantization_config", None), options.pop("device_map", None)
            return stock(place, **options)

        monkeypatch.setattr(kind, "from_pretrained", load)
    config = object()
    monkeypatch.setattr("dsd.backbone.loading.quantization_config", lambda *_: config)
    load_backbone(pipe(), quantize_text_encoder="8bit")
    assert asked["CLIPTextModel"] == (config, {"": torch.device("cpu")})
    assert asked["AutoencoderKL"] == asked["UNet2DConditionModel"] == (None, None)


# Placement


@pytest.mark.parametrize(
    ("sizes", "free", "expected"),
    [
        ({"unet": 5, "vae": 1, "text_encoder": 2}, [10], {"unet": 0, "vae": 0, "text_encoder": 0}),
        ({"unet": 5, "vae": 1, "text_encoder": 2}, [10, 10], {"unet": 0, "vae": 0, "text_encoder": 1}),
        ({"unet": 5, "vae": 1, "text_encoder": 2}, [8, 10], {"unet": 1, "vae": 1, "text_encoder": 0}),
        (
            {"unet": 5, "vae": 1, "text_encoder": 2, "text_encoder_2": 3},
            [7, 4],
            {"unet": 0, "vae": 0, "text_encoder": "cpu", "text_encoder_2": 1},
        ),
        ({"unet": 20, "vae": 1, "text_encoder": 2}, [10], {"unet": 0, "vae": 0, "text_encoder": "cpu"}),
    ],
)
def test_networks_are_spread_whole(sizes: dict[str, int], free: list[int], expected: dict[str, Any]) -> None:
    assert spread(sizes, "unet", free) == expected


def test_device_map_names_devices(pipe: Pipe) -> None:
    sizes = {"unet": 1, "vae": 1, "text_encoder": 1}
    meta, cpu = torch.device("meta"), torch.device("cpu")
    assert map_devices({"text_encoder": "cpu", "unet": "cpu"}, sizes, "unet") == dict.fromkeys(sizes, cpu)
    with pytest.raises(OptionError, match="meta"):
        map_devices({"text_encoder": "meta"}, sizes, "unet")
    assert meta != cpu
    found = load_backbone(pipe(), device_map={"text_encoder": "cpu", "": "cpu"})
    assert torch.equal(noise_seen(found), noise_seen(load_backbone(pipe())))


class Recorder(nn.Module):
    """A network that notes where it is sent."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.name, self.log = name, log

    def to(self, device: Any, *_: Any, **__: Any) -> Recorder:  # type: ignore[override]
        self.log.append((self.name, str(device)))
        return self

    def forward(self, x: Tensor, more: Any = None) -> Tensor:
        self.log.append((self.name, "computes"))
        return x


class Encoder(Recorder):
    def encode(self, x: Tensor) -> Tensor:
        self.log.append((self.name, "encodes"))
        return x


def test_one_network_at_a_time_is_on_the_device() -> None:
    log: list[tuple[str, str]] = []
    unet, text, vae = Recorder("unet", log), Recorder("text", log), Encoder("vae", log)
    offload_networks({"unet": unet, "text_encoder": text, "vae": vae}, "model", torch.device("meta"))
    there: set[str] = set()
    for call, name, does in ((vae.encode, "vae", "encodes"), (text, "text", "computes"), (unet, "unet", "computes")):
        assert call(torch.ones(1)).device.type == "meta"
        for who, what in log:
            (there.add if what == "meta" else there.discard if what == "cpu" else len)(who)  # type: ignore[arg-type]
        assert there == {name}
        assert log[-1] == (name, does)
        log.clear()
    nested = {"a": [torch.ones(1)], "b": (torch.ones(1), "word")}
    unet.register_forward_pre_hook(lambda _m, _a, kwargs: log.append(kwargs["more"]), with_kwargs=True)
    unet(torch.ones(1), more=nested)
    moved: Any = next(entry for entry in log if isinstance(entry, dict))
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert moved["b"][1] == "word"


def networks(backbone: Any) -> dict[str, nn.Module]:
    return {"unet": backbone.denoiser, "vae": backbone.vae, "text_encoder": backbone.text_encoder}


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_changes_no_number(pipe: Pipe, how: Any) -> None:
    """On the CPU itself, for want of a GPU: the hooks are there, the journeys are short."""
    found = load_backbone(pipe())
    expected = noise_seen(found)
    offload_networks(networks(found), how, torch.device("cpu"))
    assert torch.equal(noise_seen(found), expected)
    assert torch.equal(noise_seen(found), expected)


def test_backbone_computes_where_it_is_brought_to(pipe: Pipe) -> None:
    found = load_backbone(pipe())
    offload_networks(networks(found), "model", torch.device("meta"))
    assert found.device == torch.device("meta")
    assert next(found.denoiser.parameters()).device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_on_a_gpu(pipe: Pipe, how: Any) -> None:
    found, plain = load_backbone(pipe(), offload=how), load_backbone(pipe(), device="cuda")
    assert found.device.type == "cuda"
    assert torch.allclose(noise_seen(found), noise_seen(plain), atol=1e-5)
    assert next(networks(found)["vae"].parameters()).device.type == "cpu"


def test_learning_with_layers_offloaded_is_refused(pipe: Pipe, tmp_path: Path) -> None:
    from dsd.contracts import AdapterError
    from dsd.matcher import Matcher

    backbone = load_backbone(pipe())
    backbone.offload = "sequential"
    with pytest.raises(OptionError, match="layer by layer") as error:
        Matcher(backbone).fit(models.toy(4))
    refused(error)
    adapter = models.save_adapter(tmp_path / "adapter", pipe())
    with pytest.raises(AdapterError, match="layer by layer"):
        Matcher(backbone, size=PIXELS).load_adapter(adapter)
