"""The fused kernels' own log-sum-exps: those of plain logits, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dsd import fused
from dsd.backbone import Backbone, load_backbone
from dsd.fused import Overheard, kernel_of
from dsd.probe import Probe, cross_attention_layers


@pytest.fixture(scope="module")
def backbone(pipe: Callable[..., str]) -> Backbone:
    return load_backbone(pipe())


def drawn(dtype: torch.dtype, *lengths: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, length, 8, generator=g).to(dtype) for length in lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_sums_are_those_of_plain_logits(dtype: torch.dtype, masked: bool) -> None:
    q, k, v = drawn(dtype, 37, 11, 11)
    bias = torch.where(torch.arange(11) < 7, 0.0, -10000.0).to(dtype).expand(2, 1, 37, 11) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    with Overheard() as heard:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert torch.equal(out, expected)
    kept = k[:, :, :7] if masked else k
    logits = q.double() @ kept.double().transpose(-1, -2) / 8**0.5
    assert heard.sums is not None
    assert heard.sums.dtype == torch.float32
    assert heard.sums.double() == pytest.approx(logits.logsumexp(-1), abs=1e-5 if dtype.itemsize > 2 else 1e-2)


def test_nothing_is_heard_where_it_would_be_wrong() -> None:
    q, k, v = drawn(torch.float32, 5, 5, 5)
    options: list[dict[str, Any]] = [
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        {"dropout_p": 0.5},
    ]
    with torch.no_grad():
        for option in options:
            with Overheard() as heard, torch.random.fork_rng():
                torch.manual_seed(0)
                out = F.scaled_dot_product_attention(q, k, v, **option)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **option))
            assert heard.sums is None
    with Overheard() as heard:  # the sums of a kernel have no gradient
        assert F.scaled_dot_product_attention(q.requires_grad_(), k, v).requires_grad
    assert heard.sums is None


def test_a_kernel_that_is_wrong_or_missing_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused._on_cpu

    def wrong_sums(*values: Any) -> Any:
        out, sums = right(*values)
        return out, sums / 0.693  # of base two, say

    def wrong_output(*values: Any) -> Any:
        out, sums = right(*values)
        return out + 0.1, sums

    def missing(*values: Any) -> Any:
        raise NotImplementedError

    for kernel in (wrong_sums, wrong_output, missing):
        monkeypatch.setitem(fused._KERNELS, ("cpu", False), kernel)
        assert kernel_of.__wrapped__("cpu", torch.float32) is None
    monkeypatch.setitem(fused._KERNELS, ("cpu", False), right)
    assert kernel_of.__wrapped__("cpu", torch.float32) is right
    assert kernel_of.__wrapped__("meta", torch.float32) is None


@torch.no_grad()
def test_records_are_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    """And the probe makes no logits but those of a caption's own tokens."""
    (text,) = backbone.encode_texts(["a red circle left of a dog"])
    latents = torch.randn(1, *backbone.latent_shape(backbone.image_size), generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([300])
    layers = list(cross_attention_layers(backbone.denoiser))
    widths: list[int] = []
    slices = Probe._in_slices

    def counted(self: Probe, pool: Any, count: int, key: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        widths.append(key.shape[2])
        return slices(self, pool, count, key, *rest)

    def records() -> dict[str, Any]:
        widths.clear()
        with Probe(backbone.denoiser, layers, text.own, text.mask) as probe:
            backbone.predict_noise(latents, steps, text)
        return dict(probe.records)

    monkeypatch.setattr(Probe, "_in_slices", counted)
    heard = records()
    assert set(widths) == {int(text.own.sum())}
    monkeypatch.setattr(fused, "kernel_of", lambda *_: None)
    plain = records()
    assert set(widths) == {text.own.shape[1]}
    for name in layers:
        assert torch.allclose(heard[name].own, plain[name].own, atol=1e-5)
        assert torch.allclose(heard[name].all, plain[name].all, atol=1e-5)


@torch.no_grad()
def test_other_modes_hear_of_it_once() -> None:
    class Listen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.heard = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.heard += func in (fused.attend, F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    q, k, v = drawn(torch.float32, 5, 7, 7)
    for mask in (None, torch.ones(5, 7, dtype=torch.bool)):  # by the kernel, and left to PyTorch
        with Listen() as listen, Overheard() as heard:
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert listen.heard == 1
        assert (heard.sums is None) == (mask is not None)


@torch.no_grad()
def test_an_error_in_a_layer_ends_the_overhearing(backbone: Backbone) -> None:
    (text,) = backbone.encode_texts(["dog"])
    name, layer = next(iter(cross_attention_layers(backbone.denoiser).items()))
    latents = torch.zeros(1, *backbone.latent_shape(backbone.image_size))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.to_out[0].register_forward_hook(fail)
    before = torch.overrides._len_torch_function_stack()
    with pytest.raises(KeyboardInterrupt), Probe(backbone.denoiser, [name], text.own, text.mask):
        backbone.predict_noise(latents, torch.tensor([300]), text)
    handle.remove()
    assert torch.overrides._len_torch_function_stack() == before
