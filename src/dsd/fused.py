"""Fused attention that gives away the log-sum-exp of its logits, which it has at hand and PyTorch throws away.

Within :class:`Overheard`, attention is computed by the same kernels, and what they know of the logits is kept. A kernel
is taken only where it agrees with plain logits on this device; elsewhere nothing is kept, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], tuple[Tensor, Tensor]]
"""Queries, keys, values (n, heads, length, d), what is added to logits, their scale => output, log-sum-exps."""


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=scale
    )
    return found


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    return out, sums[:, :, : q.shape[2]]  # filled up to a multiple


# with something to add, the kernel for CUDA needs rows that are aligned in memory: it is left to PyTorch
_KERNELS: dict[tuple[str, bool], Kernel] = {
    ("cpu", False): _on_cpu,
    ("cpu", True): _on_cpu,
    ("cuda", False): _on_cuda,
}
"""By type of device, and whether something is added to the logits."""


@cache
def kernel_of(device: str, dtype: torch.dtype, biased: bool = False) -> Kernel | None:
    """A kernel for a type of device and of numbers that agrees with plain logits; None if there is none.

    Args:
        biased: Whether something is to be added to the logits.
    """
    kernel = _KERNELS.get((device, biased))
    if kernel is None:
        return None
    with torch.no_grad(), torch.autocast(device, enabled=False):
        try:
            return kernel if _agrees(kernel, device, dtype, biased) else None
        except (AttributeError, RuntimeError, TypeError):  # not built, or not for these numbers
            return None


def _agrees(kernel: Kernel, device: str, dtype: torch.dtype, biased: bool) -> bool:
    """Whether a kernel does on small random values what attention is."""
    g = torch.Generator().manual_seed(0)
    q, k, v, bias = (
        torch.randn(s, generator=g).to(device, dtype) for s in [(2, 2, 40, 16), *[(2, 2, 9, 16)] * 2, (40, 9)]
    )
    bias = bias.expand(2, 2, 40, 9)
    out, sums = kernel(q, k, v, bias if biased else None, None)
    logits = q.float() @ k.float().transpose(-1, -2) / 4 + (bias.float() if biased else 0)
    expected = logits.logsumexp(-1)
    near = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    if sums.shape != expected.shape or not torch.allclose(sums.float(), expected, atol=near, rtol=near):
        return False
    return torch.allclose(out.float(), logits.softmax(-1) @ v.float(), atol=5 * near, rtol=5 * near)


class Overheard(TorchFunctionMode):
    """Keeps the log-sum-exp of the logits of the last fused attention inside this context.

    Attributes:
        sums: (n, heads, queries) float32 natural logarithms, of logits with what a mask adds to them; None if no
            attention was heard that has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: Float[Tensor, "n heads queries"] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.sums = None
        if _kernel_for(*args, **kwargs) is None:
            return func(*args, **kwargs)
        out, sums = attend(*args, **kwargs)
        self.sums = sums.float()
        return out


def _kernel_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Kernel | None:
    """A kernel for these arguments of PyTorch's fused attention; None where it must be left to PyTorch."""
    if dropout_p or is_causal or enable_gqa or query.ndim != 4 or torch.is_grad_enabled():
        return None
    if not query.dtype == key.dtype == value.dtype or (attn_mask is not None and attn_mask.dtype != query.dtype):
        return None
    return kernel_of(query.device.type, query.dtype, attn_mask is not None)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """Fused attention with its log-sum-exps, where there is a kernel.

    Other modes hear of it, as they would of PyTorch's own.
    """
    inputs = (query, key, value)
    if has_torch_function(inputs):
        made: tuple[Tensor, Tensor] = handle_torch_function(
            attend, inputs, *inputs, attn_mask=attn_mask, scale=scale, **rest
        )
        return made
    kernel = _kernel_for(query, key, value, attn_mask, scale=scale, **rest)
    assert kernel is not None
    return kernel(query, key, value, attn_mask, scale)
