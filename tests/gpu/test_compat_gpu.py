"""scaled_dot_product_attention and flash-attention's functions on a GPU, against the same on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.compat import flash_attn as fa

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    run = backends.run

    def spy(op: str, device: str, *args: Any) -> Any:
        if device == DEVICE:
            names.append(op)
        return run(op, device, *args)

    monkeypatch.setattr(backends, "run", spy)
    return names


def close(ours: Any, expected: Any, dtype: torch.dtype) -> None:
    bound = {torch.float32: 2e-3, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    for got, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), exact.double(), atol=bound, rtol=bound)


def inputs(dtype: torch.dtype, *sizes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves in the dtype on the GPU, and the same numbers in float64 on the CPU."""
    here = [torch.randn(size).to(dtype) for size in sizes]
    return [t.to(DEVICE).requires_grad_() for t in here], [t.double().requires_grad_() for t in here]


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(2, 1, 60, 60) < 0.7},
    "padding": {"attn_mask": (torch.arange(60) < torch.tensor([[60], [33]]))[:, None, None]},
    "grouped": {"enable_gqa": True, "is_causal": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SDPA)
def test_sdpa(name: str, dtype: torch.dtype, ran: list[str]) -> None:
    heads = 2 if name == "grouped" else 4
    ours, exact = inputs(dtype, (2, 4, 60, 64), (2, heads, 60, 64), (2, heads, 60, 64))
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in SDPA[name].items()}
    with bk.sdpa():
        assert bk.sdpa_reason(*ours, **options) is None
        out = scaled_dot_product_attention(*ours, **options)
    expected = scaled_dot_product_attention(*exact, **SDPA[name])
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(out, ours, grad.to(DEVICE, dtype))
    close((out.detach(), *grads), (expected.detach(), *torch.autograd.grad(expected, exact, grad)), dtype)
    assert ran == ["attention", "attention_backward"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_a_compiled_graph_follows_the_switch(kernel: str, causal: bool, ran: list[str]) -> None:
    """Whichever fused kernel of torch's the graph holds: on Hopper it prefers cuDNN's."""

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=causal) * 2

    torch._dynamo.reset()
    ours, exact = inputs(torch.bfloat16, *[(2, 4, 60, 64)] * 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = block(*exact)
    grad = torch.randn_like(expected)
    results = (expected.detach(), *torch.autograd.grad(expected, exact, grad))
    for on in (False, True, False):
        if on:
            bk.activate_sdpa()
        try:
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                out = compiled(*ours)
            grads = torch.autograd.grad(out, ours, grad.to(DEVICE, torch.bfloat16))
        finally:
            bk.deactivate_sdpa()
        close((out.detach(), *grads), results, torch.bfloat16)
        assert ran == (["attention", "attention_backward"] if on else [])
        ran.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn(dtype: torch.dtype) -> None:
    slopes = torch.rand(4) * 0.2
    options: dict[str, Any] = {
        "causal": True,
        "window_size": (20, -1),
        "softcap": 5.0,
        "return_attn_probs": True,
    }
    ours, exact = inputs(dtype, (2, 50, 4, 64), (2, 60, 2, 64), (2, 60, 2, 64))
    out, lse, _ = fa.flash_attn_func(*ours, alibi_slopes=slopes.to(DEVICE), **options)
    expected, sums, _ = fa.flash_attn_func(*exact, alibi_slopes=slopes, **options)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(out, ours, grad.to(DEVICE, dtype))
    results = (expected.detach(), *torch.autograd.grad(expected, exact, grad), sums.detach())
    close((out.detach(), *grads, lse.detach()), results, dtype)

    place = (torch.tensor([0, 50, 100]), torch.tensor([0, 60, 120]))
    cu = [t.to(DEVICE, torch.int32) for t in place]
    flat = [t.detach().flatten(0, 1) for t in ours]
    packed = fa.flash_attn_varlen_func(*flat, *cu, 50, 60, alibi_slopes=slopes.to(DEVICE), **options)[0]
    close([packed.view(2, 50, 4, 64)], [expected.detach()], dtype)


@pytest.mark.parametrize("form", ["plain", "indexed", "pages", "leftpad"])
def test_the_cache(form: str) -> None:
    dtype = torch.bfloat16
    q, k, v = torch.randn(2, 3, 4, 64), *torch.randn(2, 2, 3, 2, 64)
    cache = torch.randn(2, 6, 16, 2, 64)
    angles = torch.rand(64, 16) * 6
    kwargs: dict[str, Tensor] = {"cache_seqlens": torch.tensor([5, 11], dtype=torch.int32)}
    if form == "indexed":
        kwargs["cache_batch_idx"] = torch.tensor([4, 1], dtype=torch.int32)
    elif form == "pages":
        kwargs["block_table"] = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32)
    else:
        cache = cache[:, :2]
    if form == "leftpad":
        kwargs["cache_leftpad"] = torch.tensor([2, 0], dtype=torch.int32)
    kwargs.update(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    results = []
    for device, kind in ((DEVICE, dtype), ("cpu", torch.float64)):
        there = {n: t.to(device, kind if t.is_floating_point() else t.dtype) for n, t in kwargs.items()}
        rows = [t.to(dtype).to(device, kind) for t in (q, *cache.clone(), k, v)]
        out, lse = fa.flash_attn_with_kvcache(*rows, causal=True, return_softmax_lse=True, **there)
        results.append((out, lse, rows[1], rows[2]))
    close(*results, dtype)
