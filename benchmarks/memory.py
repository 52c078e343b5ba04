"""Memory of few-shot learning at full size: ``python benchmarks/memory.py --out docs/results/memory``.

Needs neither a GPU nor weights: Stable Diffusion 2.1-base learns on tensors that have shapes and types but no contents,
and the bytes that would be alive are added up. On a small network the same sums are compared with those of real steps.
Writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from dsd import prompts
from dsd.backbone.stable_diffusion import StableDiffusionBackbone
from dsd.evaluate import write_text
from dsd.learn import checkpointed
from dsd.prompts import PromptConfig
from dsd.report import table
from dsd.scores import Score, ScoreConfig, noised_pass
from gpu import sd21_base

TARGET = 12e9
"""Bytes that learning should stay below."""
PROMPTS = PromptConfig(rank=4, attention="all")
ROWS = (2, 4)
"""Candidates of the example: its own two, and with the two captions of other examples that join it by default."""
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


def without_contents(made: Any) -> Any:
    """A backbone on the meta device, where attention is never fused => one on the CPU; inside a ``FakeTensorMode``."""
    for module in (made.vae, made.text_encoder, made.denoiser):
        module._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
    backbone = StableDiffusionBackbone(
        made.name,
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=made.tokenizer,
        unet=made.denoiser,
        scheduler=DDPMScheduler(),
    )
    for parameter in prompts.parameters(backbone.denoiser).values():  # frozen with the rest, by the backbone
        parameter.requires_grad_()
    return backbone


def encoding(backbone: Any) -> int:
    """Bytes alive at most while a picture and a caption are encoded, which is done once, before learning."""
    pixels = backbone.image_size
    resident = tensors_of(backbone.vae, backbone.text_encoder, backbone.denoiser)
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


def results(small: bool, fake: bool, cases: Iterable[tuple[int, str, bool]]) -> dict[str, Any]:
    """What :func:`measure` finds in each case, and :func:`encoding`."""
    device = torch.device("meta" if fake else "cpu")
    with device:
        backbone = sd21_base(device, torch.float16, small)
    prompts.attach(backbone.denoiser, PROMPTS)
    with FakeTensorMode() if fake else nullcontext():
        if fake:
            backbone = without_contents(backbone)
        return {"rows": [measure(backbone, *case) for case in cases], "peak of encoding": encoding(backbone)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    options = parser.parse_args()
    cases = [(rows, kernel, on) for kernel in KERNELS for rows in ROWS for on in (False, True)]
    few = [case for case in cases if case[0] == ROWS[0]]
    if results(True, True, few) != results(True, False, few):
        raise SystemExit("got other sums on tensors without contents than on real ones, expected the same")
    found = results(False, True, cases)
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
    return f"""# Memory of few-shot learning at full size

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


if __name__ == "__main__":
    main()
