"""Parts that lie side by side in the rows of one tensor, as Q, K and V of one projection do.

::

    rows of a product        |  Q: heads x head_dim  |  K   |  V   |
    rows of its gradient     |  dQ                   |  dK  |  dV  |     one tensor from the start
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.registration import nobody_listens, plain, wants_gradient


def cut(whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`whole.split(sizes, -1)`, whose gradient is no copy where the parts' gradients lie side by side."""
    if wants_gradient((whole,)) and nobody_listens(whole.device.type) and plain(whole):
        return _Cut.apply(whole, sizes)  # type: ignore[no-any-return, no-untyped-call]
    return whole.split(sizes, -1)  # type: ignore[no-any-return]


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.sizes = sizes
        return whole.split(sizes, -1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = None if torch.is_grad_enabled() else whole_of(grads)
        return torch.cat(grads, -1) if whole is None else whole, None


def whole_of(parts: Sequence[Tensor]) -> Tensor | None:
    """The contiguous tensor whose parts along the last dimension these are, or None; a view."""
    first = parts[0]
    storage, place = first.untyped_storage().data_ptr(), first.data_ptr()
    if first.numel() == 0:
        return None
    size = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
    strides = [1]
    for length in size[:0:-1]:
        strides.insert(0, strides[0] * length)
    for part in parts:
        if (
            part.dtype != first.dtype
            or part.shape[:-1] != first.shape[:-1]
            or part.data_ptr() != place
            or part.untyped_storage().data_ptr() != storage
            or any(n > 1 and a != b for n, a, b in zip(part.shape, part.stride(), strides, strict=True))
        ):
            return None
        place += part.shape[-1] * part.element_size()
    return first.as_strided(size, strides)


def heads_lie_side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether these, (B, H, S, D) or (total, H, D), are all that the rows of one contiguous tensor hold."""
    rows = [t.transpose(1, 2) if t.dim() == 4 else t for t in tensors]
    if any(t.stride(-1) != 1 or (t.shape[-2] > 1 and t.stride(-2) != t.shape[-1]) for t in rows):
        return False
    return whole_of([t.flatten(-2) for t in rows]) is not None


def empty_heads(like: Tensor, heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """So many heads, laid out as the next projection reads them: (B, S, H, D), seen as (B, H, S, D), or
    (total, H, D).
    """
    if like.dim() == 3:
        return like.new_empty((like.shape[0], heads, like.shape[2]), dtype=dtype)
    return like.new_empty((like.shape[0], like.shape[2], heads, like.shape[3]), dtype=dtype).transpose(1, 2)


def empty_key_gradient(key: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """For the gradient of keys or values: laid out as queries' on a GPU, and as its C++ does on the CPU."""
    on_cpu = key.device.type == "cpu"
    return key.new_empty(key.shape, dtype=dtype) if on_cpu else empty_heads(key, key.shape[1], dtype)


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, side_by_side: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradients of these, side by side in one tensor where that is wanted."""
    counts = [t.shape[1] for t in (query, key, value)]
    if side_by_side:
        dq, dk, dv = empty_heads(query, sum(counts)).split(counts, 1)
        return dq, dk, dv
    return empty_heads(query, counts[0]), empty_key_gradient(key), empty_key_gradient(value)
