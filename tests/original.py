"""A small Stable Diffusion pipeline in one file, named as the models were first published.

The names are those of the latent-diffusion code of 2022: blocks are numbered through, from input to output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def tensors(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of a pipeline's networks by their original names."""
    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
    found = {f"model.diffusion_model.{n}": t for n, t in _unet(unet.state_dict(), unet.config.layers_per_block)}
    blocks = len(vae.config.block_out_channels)
    found |= {f"first_stage_model.{n}": t for n, t in _vae(vae.state_dict(), blocks)}
    for name, tensor in text.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {n: t.contiguous().clone() for n, t in found.items()}


def save(parts: Mapping[str, Any], file: Path) -> Path:
    """Writes the file."""
    save_file(tensors(parts), file, {"format": "pt"})
    return file


def _unet(state: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        around = next((a for a in _AROUND if name.startswith(f"{a}.")), None)
        if around:
            yield name.replace(around, _AROUND[around], 1), tensor
            continue
        if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
            number = 1 if m[1] == "attentions" else 2 * int(m[2])
            place, rest = f"middle_block.{number}", m[3]
        elif m := re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.+)", name):
            block = int(m[1]) * (layers + 1) + 1
            if m[2] == "downsamplers":
                place, rest = f"input_blocks.{block + layers}.0", m[4].replace("conv", "op")
            else:
                place, rest = f"input_blocks.{block + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
        elif m := re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.+)", name):
            block = int(m[1]) * (layers + 1)
            if m[2] == "upsamplers":
                place, rest = f"output_blocks.{block + layers}.2", m[4]  # all blocks here have attention
            else:
                place, rest = f"output_blocks.{block + int(m[3])}.{int(m[2] == 'attentions')}", m[4]
        else:
            raise AssertionError(name)
        head, _, tail = rest.partition(".")
        yield f"{place}.{_RESNET.get(head, head)}.{tail}", tensor


def _vae(state: Mapping[str, Tensor], blocks: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", new)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        if m := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", new):
            new = f"{m[1]}mid.attn_1.{_VAE_ATTENTION[m[2]]}.{m[3]}"
            if m[2] != "group_norm" and m[3] == "weight":
                tensor = tensor[:, :, None, None]  # it was a convolution of one pixel
        yield new, tensor
