"""Gradient of the feed-forward block with its first product by the CUDA library.

That product has the activation's derivative in it, and writes the hidden layer and sums of columns beside
(csrc/linear/epilogue.cuh). All else is as in triton.py: the other products by the vendor's library, and what
there is to a norm, dropout and sums over tokens by Triton's kernels. A file of its own, for only this one
needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.cuda_library import unmeasured
from bigmodel_kernels.ops.feed_forward import cuda, triton
from bigmodel_kernels.ops.linear.cuda import aligned
from bigmodel_kernels.ops.reduce_triton import sum_parts


def supports_backward(grad: Tensor, *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return cuda.supports(*args, **options) or triton.supports_backward(grad, *args, **options)


only_when_forced_backward = unmeasured


def hidden_backward(
    grad: Tensor,
    w_out: Tensor,
    saved: Tensor,
    gate_saved: None,
    activation: str,
    *,
    need_hidden: bool,
    need_sums: bool,
) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
    """As `hidden_backward` of triton_gemm.py, without a gate: grad (M, N), w_out (N, F), saved (M, F)."""
    # Which of its layouts w_out is a view of. A row or a column of weights is both.
    linear = w_out.is_contiguous()
    dup, hidden, parts = torch.ops.bigmodel.cuda_hidden_backward.default(
        aligned(grad),
        aligned(w_out if linear else w_out.t().contiguous()),
        aligned(saved),
        weight_layout="linear" if linear else "conv1d",
        activation=activation,
        need_hidden=need_hidden,
        need_sums=need_sums,
    )
    sums = sum_parts(parts, saved.new_empty(saved.shape[1])) if need_sums else None
    return dup, None, hidden if need_hidden else None, sums, None


def run_backward(*args: Any, **options: Any) -> list[Tensor]:
    """See `bigmodel::feed_forward_backward`.

    torch's product, with the rest in launches after it, was slower on an H200 for 8192 tokens of BERT-base.
    If it is faster for other shapes, the choice belongs here, as cuda_choice.py has it for the forward.
    """
    return triton.run_backward(*args, **options, hidden_backward=hidden_backward)
