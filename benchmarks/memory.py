"""Memory at full size: ``python benchmarks/memory.py --out docs/results/memory``.

Needs neither a GPU nor weights: models of every family score, and Stable Diffusion 2.1-base learns, on tensors that
have shapes and types but no contents, and the bytes that would be alive are added up. On small networks the same sums
are compared with those of real passes and steps. Writes a JSON file and a Markdown page.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from configurations import CONFIGURATIONS, networks
from dsd import prompts
from dsd.evaluate import write_text
from dsd.learn import checkpointed
from dsd.prompts import PromptConfig
from dsd.report import table
from dsd.scores import Score, ScoreConfig, noised_pass

TARGET = 12e9
"""Bytes that learning should stay below."""
PROMPTS = PromptConfig(rank=4, attention="all")
ROWS = (2, 4)
"""Candidates of the example: its own two, and with the two captions of other examples that join it by default."""
BATCHES = (1, 8)
"""Rows of a pass of scoring."""
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
CAPTION = "a red circle above a blue square"


class Memory(TorchDispatchMode):
    """Adds up the storages of tensors made inside it, for as long as they live.

    It sees what every operation returns, not what a kernel needs while it runs.

    Attributes:
        peak: Bytes alive at once, at most, since it was last set.
        kernels: How often each kernel of attention ran.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kernels: Counter[str] = Counter()
        self._known: Any = WeakIdKeyDictionary()
        for tensor in resident:
            self._meet(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._meet, out)
        name = func.name().removeprefix("aten::")
        if "dot_product" in name or "softmax" in name:
            self.kernels[name] += 1
        return out

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            weakref.finalize(storage, self._count, -storage.nbytes()).atexit = False
            self._count(storage.nbytes())

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def made(name: str, dtype: torch.dtype, small: bool, fake: bool, prompt: PromptConfig | None = None) -> Any:
    """A backbone on the CPU, with prompts if asked, and the mode to use it in if it is without contents.

    Parts are made on the meta device first, which is quick, but where attention is never fused.
    """
    family, make = CONFIGURATIONS[name]
    with torch.device("meta") if fake else nullcontext():
        torch.manual_seed(0)
        parts = make(small)
    for network in networks(parts):
        network.to(dtype)
    if prompt is not None:
        prompts.attach(parts.get("unet") or parts["transformer"], prompt)
    with FakeTensorMode() if fake else nullcontext() as mode:
        if fake:
            for network in networks(parts):
                network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
                if hasattr(network, "tie_weights"):  # T5 has its embedding under two names
                    network.tie_weights()
            if hasattr(parts["scheduler"], "alphas_cumprod"):  # of a flow, the configuration is enough
                parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
        kind: Any = family
        backbone = kind(name, **parts)
        for parameter in prompts.parameters(backbone.denoiser).values():  # frozen with the rest, by the backbone
            parameter.requires_grad_()
        return backbone, mode


def encoding(backbone: Any) -> int:
    """Bytes alive at most while a picture and a caption are encoded, which is done once, before learning."""
    pixels = backbone.image_size
    resident = tensors_of(*of(backbone).values())
    # the VAE's heads of 512 numbers are more than fused kernels take on some devices
    with sdpa_kernel(SDPBackend.MATH), Memory(resident) as memory:
        backbone.encode_images([Image.new("RGB", (pixels, pixels))])
        backbone.encode_texts([CAPTION])
    return memory.peak


def measure(backbone: Any, rows: int, kernel: str, checkpointing: bool) -> dict[str, Any]:
    """A step of learning from one example whose first candidate is right; bytes by what they are for."""
    denoiser = backbone.denoiser
    learned = list(prompts.parameters(denoiser).values())
    assert {p.dtype for p in learned} == {torch.float32}
    resident = tensors_of(backbone.vae, backbone.text_encoder, denoiser)
    frozen = {t.untyped_storage()._cdata for t in resident}
    score = Score(backbone, ScoreConfig("attention"))
    shape = backbone.latent_shape(backbone.image_size)
    positions = shape[1] * shape[2]
    # fused, because it needs no number out of its step count, which a tensor without contents cannot give
    optimizer = torch.optim.AdamW(learned, fused=True)
    saved: Any = WeakIdKeyDictionary()
    maps = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal maps
        if x.untyped_storage()._cdata not in frozen:
            saved[x.untyped_storage()] = True
            maps += x.shape[-2:] == (positions, positions)
        return x.detach()  # itself, it would keep alive the graph that keeps it

    def learn(hooks: Any) -> int:
        """One step; bytes that were saved for its backward pass, if the hooks see them."""
        optimizer.zero_grad()
        with hooks:
            made = noised_pass(backbone, latents, noise, timesteps, text, score.layers)
            scores = score(made, None)
            loss = scores.logsumexp(0) - scores[0]
        kept = sum(storage.nbytes() for storage in saved)
        loss.backward()
        optimizer.step()
        return kept

    with sdpa_kernel(KERNELS[kernel]), checkpointed(denoiser, checkpointing), Memory(resident) as memory:
        latents, noise = torch.zeros(rows, *shape), torch.zeros(rows, *shape)
        timesteps = torch.full((rows,), 389)
        text = backbone.encode_texts([CAPTION])[0].select([0] * rows)
        # makes the optimizer's state too, so that the peak is that of any step but the first
        kept = learn(saved_tensors_hooks(pack, lambda x: x))
        memory.peak = memory.now
        memory.kernels.clear()
        learn(nullcontext())
    found = {
        "rows": rows,
        "attention": kernel,
        "checkpointing": checkpointing,
        "U-Net": size(tensors_of(denoiser)) - size(learned),
        "VAE": size(tensors_of(backbone.vae)),
        "text encoder": size(tensors_of(backbone.text_encoder)),
        "prompts": size(learned),
        "gradients": size(p.grad for p in learned if p.grad is not None),
        "AdamW": size(v for state in optimizer.state.values() for v in state.values()),
        "saved for backward": kept,
        "peak": memory.peak,
        "saved maps of positions x positions": maps,
        "kernels": dict(memory.kernels),
    }
    optimizer.zero_grad()
    return found


def of(backbone: Any) -> dict[str, nn.Module]:
    """The networks of a backbone by what they are for."""
    encoders = {n: getattr(backbone, n, None) for n in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    return {"denoiser": backbone.denoiser, "vae": backbone.vae, **{n: e for n, e in encoders.items() if e is not None}}


@torch.no_grad()
def scoring(name: str, small: bool, fake: bool) -> dict[str, Any]:
    """What it takes to score at the model's own resolution, weights in 16 bits."""
    backbone, mode = made(name, torch.bfloat16, small, fake)
    pixels = backbone.image_size
    parts = of(backbone)
    weights = {part: size(tensors_of(network)) for part, network in parts.items()}
    found: dict[str, Any] = {"model": name, "pixels": pixels, "weights": weights}
    score = Score(backbone, ScoreConfig("attention"))
    with mode or nullcontext(), Memory(tensors_of(*parts.values())) as memory:

        def peak_of(run: Any) -> int:
            memory.peak = start = memory.now
            kept = run()
            del kept
            return memory.peak - start

        # the VAE's heads of 512 numbers are more than fused kernels take on some devices
        with sdpa_kernel(SDPBackend.MATH):
            found["encoding a picture"] = peak_of(lambda: backbone.encode_images([Image.new("RGB", (pixels, pixels))]))
            found["encoding a caption"] = peak_of(lambda: backbone.encode_texts([CAPTION]))
        shape = backbone.latent_shape(pixels)
        (text,) = backbone.encode_texts([CAPTION])
        for rows in BATCHES:
            latents, noise = torch.zeros(rows, *shape), torch.zeros(rows, *shape)
            timesteps, texts = torch.full((rows,), 389), text.select([0] * rows)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                for what, layers in (("bare", ()), ("probed", score.layers)):
                    given = (backbone, latents, noise, timesteps, texts, layers)
                    found[f"{what} pass of {rows}"] = peak_of(partial(noised_pass, *given))
            del latents, noise, timesteps, texts, given
    return found


def results(small: bool, fake: bool, cases: Iterable[tuple[int, str, bool]]) -> dict[str, Any]:
    """What :func:`measure` finds in each case, and :func:`encoding`."""
    backbone, mode = made("sd21-base", torch.float16, small, fake, PROMPTS)
    with mode or nullcontext():
        return {"rows": [measure(backbone, *case) for case in cases], "peak of encoding": encoding(backbone)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    cases = [(rows, kernel, on) for kernel in KERNELS for rows in ROWS for on in (False, True)]
    few = [case for case in cases if case[0] == ROWS[0]]
    if results(True, True, few) != results(True, False, few):
        raise SystemExit("got other sums on tensors without contents than on real ones, expected the same")
    for name in CONFIGURATIONS:
        if scoring(name, True, True) != scoring(name, True, False):
            raise SystemExit(f"{name}: got other sums on tensors without contents than on real ones, expected the same")
    found = results(False, True, cases)
    found["scoring"] = [scoring(name, False, True) for name in CONFIGURATIONS]
    for row in found["rows"]:
        row["below 12 GB"] = row["peak"] < TARGET
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    values = {"unit": "bytes", "versions": versions, "small network equals real steps": True, **found}
    write_text(options.out.with_suffix(".json"), json.dumps(values, indent=1) + "\n")
    write_text(options.out.with_suffix(".md"), page(options.out, values))


def page(out: Path, values: dict[str, Any]) -> str:
    """The results as Markdown."""
    kinds = {True: "yes", False: "no"}
    shown = [
        {
            "self-attention": r["attention"],
            "checkpointing": kinds[r["checkpointing"]],
            "candidates": r["rows"],
            "saved for backward": r["saved for backward"] / 1e9,
            "peak": r["peak"] / 1e9,
            "below 12 GB": kinds[r["below 12 GB"]],
        }
        for r in values["rows"]
    ]
    parts = ("U-Net", "VAE", "text encoder", "prompts", "gradients", "AdamW")
    resident = ", ".join(f"{name} {values['rows'][0][name] / 1e9:.3f}" for name in parts)
    # fused attention comes first: each number of candidates without and with checkpointing
    plain, again = ((shown[2 + i]["peak"] - shown[i]["peak"]) / (ROWS[1] - ROWS[0]) for i in (0, 1))
    maps = {r["attention"]: r["saved maps of positions x positions"] for r in values["rows"] if not r["checkpointing"]}
    versions = ", ".join(f"{name} {version}" for name, version in values["versions"].items())
    return f"""# Memory of scoring at full size

The attention score at each model's own resolution, in GB (1e9 bytes), weights in 16 bits (bfloat16). "With all" is the
peak with every part on the device, for one picture, one caption and passes of 1 or 8 rows; "without text encoders" is
that of the passes once captions are encoded and their encoders gone. "Probe" is what recording attention adds to the
peak of a pass.

{table(scored(values["scoring"]), list(scored(values["scoring"])[0]))}

- Encoding takes what it takes once for each picture and caption, before any pass. Peaks of encoding and passes do not
  add up; the larger counts.
- Records of attention are pooled in slices of at most 2^24 logits (64 MiB), so that what the probe adds does not grow
  with the picture or the batch beyond the queries and keys of one layer in 32 bits and a slice.
- By default a batch has as many rows as together have 2^14 latent positions: 4 at 512 pixels, 1 at 1024.

# Memory of few-shot learning at full size

A step of learning on Stable Diffusion 2.1-base at 512 x 512 pixels, in GB (1e9 bytes): weights in 16 bits, prompts of
rank {PROMPTS.rank} on all attention layers in 32 bits, AdamW, the attention score, one example in a pass. Counted on
tensors without contents; no GPU was involved. On a small network the same sums equalled those of real steps on the
CPU, byte for byte. {versions}. Made by `python benchmarks/memory.py --out {out}`.

{table(shown, list(shown[0]))}

The peak includes what is resident: {resident}.
Encoding the picture and a caption, before learning, peaks at {values["peak of encoding"] / 1e9:.3f}. Each further
candidate in a pass adds {plain:.2f}, with checkpointing {again:.2f}; `gradient_accumulation_steps` parts a batch.

- `fused`: `scaled_dot_product_attention` takes a flash kernel, as it does wherever there is one; it saved
  {maps["fused"]} maps of positions x positions. `math` makes such maps, for comparison; it saved {maps["math"]}
  without checkpointing.
- The kernels are those of the CPU; those of GPUs save tensors of the same shapes.
- Not counted: what a kernel needs while it runs, what the allocator rounds up or cannot use, the driver's own share.
"""


def scored(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table on scoring."""
    rows = []
    for r in found:
        weights, encoders = r["weights"], sum(b for part, b in r["weights"].items() if part.startswith("text"))
        total = sum(weights.values())
        first = max(r["encoding a picture"], r["encoding a caption"])
        row = {"model": r["model"], "pixels": r["pixels"], "denoiser": weights["denoiser"] / 1e9}
        row |= {"VAE": weights["vae"] / 1e9, "text encoders": encoders / 1e9}
        for count in BATCHES:
            row[f"with all, {count}"] = (total + max(first, r[f"probed pass of {count}"])) / 1e9
        for count in BATCHES:
            row[f"without text encoders, {count}"] = (total - encoders + r[f"probed pass of {count}"]) / 1e9
        for count in BATCHES:
            row[f"probe, {count}"] = (r[f"probed pass of {count}"] - r[f"bare pass of {count}"]) / 1e9
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
