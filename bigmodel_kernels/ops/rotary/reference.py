"""Rotary position embedding in plain PyTorch: the definition of right."""

from __future__ import annotations

from torch import Tensor

from bigmodel_kernels.ops.registration import compute_dtype


def run(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.rotary`."""
    return _turned(query, cos, sin, interleaved), _turned(key, cos, sin, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    compute, half = compute_dtype(x.dtype), cos.shape[-1]
    cos, sin = cos[:, None].to(compute), sin[:, None].to(compute)
    batch, heads, rows, dim = x.shape
    out = x.new_empty((batch, rows, heads, dim)).transpose(1, 2)
    pairs = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (
            slice(0, half),
            slice(half, 2 * half),
        )
    )
    a, b = (x[..., part].to(compute) for part in pairs)
    out[..., pairs[0]] = a * cos - b * sin
    out[..., pairs[1]] = b * cos + a * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
