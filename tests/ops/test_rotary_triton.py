"""The Triton rotary kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops.rotary import reference
from bigmodel_kernels.ops.rotary import triton as kernel
from bigmodel_kernels.triton_runtime import AMPERE, INTERPRETED
from bigmodel_kernels.verify import compare, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned():
        yield


def _angles(batch: int, positions: int, pairs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = 10 * torch.randn(batch, positions, pairs, device=DEVICE)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As models write it: repeated halves or pairs, and the dtype of x throughout."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = (t.to(x.dtype)[:, None] for t in (cos, sin))
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        swapped = torch.stack([-turning[..., 1::2], turning[..., ::2]], -1).flatten(-2)
    else:
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
        swapped = torch.cat([-turning[..., half:], turning[..., :half]], -1)
    return torch.cat([turning * cos + swapped * sin, rest], -1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (20, 4)]),
    positions=st.sampled_from([1, 5, 33]),
    dims=st.sampled_from([(2, 2), (32, 32), (80, 32), (17, 6), (128, 128)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exact_angles=st.booleans(),
    shared=st.booleans(),
    interleaved=st.booleans(),
)
def test_any(
    batch: int, heads: tuple[int, int], positions: int, dims: tuple[int, int], dtype: torch.dtype,
    exact_angles: bool, shared: bool, interleaved: bool,
) -> None:  # fmt: skip
    dim, turning = dims
    query = torch.randn(batch, heads[0], positions, dim, device=DEVICE).to(dtype)
    key = torch.randn(batch, positions, heads[1], dim, device=DEVICE).to(dtype).transpose(1, 2)
    cos, sin = _angles(
        1 if shared else batch, positions, turning // 2, torch.float32 if exact_angles else dtype
    )
    assert kernel.supports(query, key, cos, sin, interleaved=interleaved) is None
    results = kernel.run(query, key, cos, sin, interleaved=interleaved)
    for x, out in zip((query, key), results, strict=True):
        exact = _eager(x.double(), cos.double(), sin.double(), interleaved)
        verdict = compare(out, _eager(x, cos, sin, interleaved), exact)
        assert verdict.ok, verdict
        assert out.transpose(1, 2).is_contiguous()
        assert torch.equal(out[..., turning:], x[..., turning:])


def test_several_heads_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that end with the last queries, go on with keys, or have keys alone."""
    monkeypatch.setattr(kernel, "target_of", lambda _: AMPERE._replace(processors=1))
    query, key = torch.randn(1, 5, 9, 16, device=DEVICE), torch.randn(1, 6, 9, 16, device=DEVICE)
    cos, sin = _angles(1, 9, 8, torch.float32)
    for out, expected in zip(
        kernel.run(query, key, cos, sin), reference.run(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(out, expected)


def test_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the operator: the turn by the negative angles, which is the transpose."""
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    query, key = torch.randn(2, 3, 5, 20, device=DEVICE), torch.randn(2, 1, 5, 20, device=DEVICE)
    cos, sin = _angles(2, 5, 8, torch.float32)
    leaves = [t.requires_grad_() for t in (query, key)]
    outs = bk.rotary(*leaves, cos, sin, rotary_dim=16, interleaved=True)
    grads = [torch.randn_like(o) for o in outs]
    found = torch.autograd.grad(outs, leaves, grads)
    expected = torch.autograd.grad([_eager(t, cos, sin, True) for t in leaves], leaves, grads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_reasons() -> None:
    x = torch.randn(1, 1, 4, 4, device=DEVICE)
    cos, sin = _angles(1, 4, 2, torch.float32)
    assert "float64" in str(kernel.supports(x.double(), x.double(), cos, sin))
    assert "stride" in str(kernel.supports(x.transpose(2, 3), x, cos, sin))
    assert "sin" in str(kernel.supports(x, x, cos.repeat(1, 2, 1)[:, ::2], sin))
