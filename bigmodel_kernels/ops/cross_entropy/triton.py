"""Linear and cross-entropy in one, in Triton: logits exist for a chunk of rows at a time.

    Hsu et al.: Liger Kernel: Efficient Triton Kernels for LLM Training, arXiv 2410.10989, section 3.2: the
    chunks. Wijmans et al.: Cut Your Losses in Large-Vocabulary Language Models, arXiv 2411.09009.

::

    rows of x that count     logits (rows, V), float32       d (rows, V), x's dtype
       +---------+            +--------------------+          +--------------------+
       | chunk 0 | -- @ W^T ->|                    | -------> |                    | -- @ W   -> dx[chunk]
       +---------+            +--------------------+  one row +--------------------+ -- ^T @ x[chunk] added
       | chunk 1 |              the same memory for   a program                         to dW, in float32
       +---------+              every chunk

For a row of logits, in two passes over it (maximum and sum of exponentials together, then the gradient):

    loss = logsumexp - (1 - s) * logits[target] - s * mean(logits)               s: label_smoothing
    d    = softmax(logits) - (1 - s) * onehot(target) - s / V

d is not divided by the number of rows, which in float16 would lose the small probabilities: the products'
epilogues do it. Rows with ignore_index are left out before the first product, which waits for the device
once; while a CUDA graph is captured they are computed, and count as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_runtime import cdiv, next_power_of_2, on_device, unsupported
from ..linear.triton_gemm import matmul
from ..reduce_triton import column_sums, sum_parts

CHUNK_BYTES = 256 << 20
"""Bytes of logits and of their gradient at a time."""
TILE = 4096
"""Logits of a row that a program holds at a time."""
LEAST_ROWS = 128
"""Each chunk reads all of the weight: fewer rows would wait for memory."""


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, upstream_ptr, loss_ptr, logsumexp_ptr, gradient_ptr,
    classes, stride, ignore_index, smoothing,
    SMOOTHED: tl.constexpr, HAS_UPSTREAM: tl.constexpr, NEED_LOSS: tl.constexpr,
    NEED_GRADIENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    column = tl.arange(0, TILE)
    target = tl.load(target_ptr + row)
    counts = target != ignore_index

    maximum = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    sums = tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, classes, TILE):
        inside = start + column < classes
        logits = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf"))
        if SMOOTHED:
            sums += tl.where(inside, logits, 0.0)
        larger = tl.maximum(maximum, logits)
        # A lane that has seen nothing but -inf: subtract 0, so that exp(-inf) is 0 and not NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(maximum - shift) + tl.exp(logits - shift)
        maximum = larger
    largest = tl.max(maximum, axis=0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total_of_row = tl.sum(tl.where(maximum == float("-inf"), 0.0, total * tl.exp(shift - largest)), axis=0)
    logsumexp = largest + tl.log(total_of_row)

    if NEED_LOSS:
        known = (target >= 0) & (target < classes)
        hit = tl.load(logits_ptr + target, mask=known, other=float("nan"))
        loss = (logsumexp - hit) * (1.0 - smoothing)
        if SMOOTHED:
            loss += smoothing * (logsumexp - tl.sum(sums, axis=0) / classes)
        tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
        tl.store(logsumexp_ptr + row, tl.where(counts, logsumexp, 0.0))
    if NEED_GRADIENT:
        upstream = tl.load(upstream_ptr + row).to(tl.float32) if HAS_UPSTREAM else 1.0
        upstream = tl.where(counts, upstream, 0.0)
        inverse = 1.0 / total_of_row
        for start in range(0, classes, TILE):
            inside = start + column < classes
            logits = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf"))
            gradient = tl.exp(logits - largest) * inverse
            if SMOOTHED:
                gradient -= smoothing / classes
            gradient -= tl.where(start + column == target, 1.0 - smoothing, 0.0)
            gradient = tl.where(counts, gradient * upstream, 0.0)
            # float32: in place. Every thread overwrites what it has read itself.
            place = gradient_ptr + row * stride + start + column
            tl.store(place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


def chunk_rows(classes: int, itemsize: int) -> int:
    """Rows whose logits are made at a time."""
    row = classes * (4 + (itemsize if itemsize < 4 else 0))
    return max(LEAST_ROWS, CHUNK_BYTES // row // LEAST_ROWS * LEAST_ROWS)


def _rows_that_count(target: Tensor, classes: int, ignore_index: int) -> Tensor | None:
    """Their numbers, or None for all. Raises IndexError for a target out of range."""
    if target.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    counting = target != ignore_index
    rows = counting.nonzero().squeeze(1)
    if target.device.type == "cuda":  # on the CPU the operator has looked
        wrong = target[counting & ((target < 0) | (target >= classes))]
        if wrong.numel():
            raise IndexError(
                f"target holds {int(wrong[0])}; allowed are 0 to {classes - 1} and "
                f"ignore_index={ignore_index}"
            )
    return None if rows.numel() == target.numel() else rows


def _work(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    upstream: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    need_loss: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Loss, logsumexp and the gradients of x, weight and bias (empty (0,) where not needed)."""
    need_x, need_weight, need_bias = needs
    need_gradient = any(needs)
    classes, device = weight.shape[0], x.device
    counting = _rows_that_count(target, classes, ignore_index)
    if counting is not None:
        x_all, x, target = x, x.index_select(0, counting), target.index_select(0, counting)
        upstream = None if upstream is None else upstream.index_select(0, counting)
    else:
        x_all = x
    target = target.contiguous()
    rows = x.shape[0]
    if counting is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        count = (target != ignore_index).sum()
    else:
        count = torch.full((), rows, device=device)
    scale = 1.0 / count.clamp(min=1).float() if reduction == "mean" else None

    losses = torch.empty(2, rows, dtype=torch.float32, device=device)
    dx = x.new_empty(x.shape if need_x else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    dbias = weight.new_empty(classes if need_bias else 0)
    step = min(chunk_rows(classes, x.element_size()), max(rows, 1))
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    # Rows start at multiples of 64 elements whatever the number of classes: products read them in vectors.
    width = cdiv(classes, 64) * 64
    logits = torch.empty(step, width, dtype=torch.float32, device=device)[:, :classes]
    gradient = logits
    if need_gradient and x.dtype != torch.float32:
        gradient = torch.empty(step, width, dtype=x.dtype, device=device)[:, :classes]
    total = dweight
    if need_weight and len(chunks) > 1 and x.dtype != torch.float32:
        total = torch.empty_like(dweight, dtype=torch.float32)
    bias_sums = torch.empty(len(chunks) if need_bias else 0, classes, dtype=torch.float32, device=device)

    bias = None if bias is None else bias.contiguous()
    for i, chunk in enumerate(chunks):
        some, size = x[chunk], chunk.stop - chunk.start
        matmul(some, weight.t(), logits[:size], bias=bias)
        with on_device(x):
            cross_entropy_kernel[(size,)](
                logits, target[chunk], None if upstream is None else upstream[chunk],
                losses[0, chunk], losses[1, chunk], gradient,
                classes, width, ignore_index, label_smoothing,
                SMOOTHED=label_smoothing > 0, HAS_UPSTREAM=upstream is not None, NEED_LOSS=need_loss,
                NEED_GRADIENT=need_gradient, TILE=min(TILE, max(32, next_power_of_2(classes))),
                num_warps=8 if classes > 1024 else 4, enable_fp_fusion=True,
            )  # fmt: skip
        d = gradient[:size]
        if need_x:
            matmul(d, weight, dx[chunk], scale=scale, split=True)
        if need_weight:
            out = dweight if i == len(chunks) - 1 else total
            matmul(d.t(), some, out, scale=scale, residual=total if i else None, split=not i)
        if need_bias:
            column_sums(d, bias_sums[i])
    if not chunks:
        dweight.zero_()
        dbias.zero_()
    elif need_bias:
        sum_parts(bias_sums, dbias, scale)

    if counting is not None:
        losses = torch.zeros(2, x_all.shape[0], dtype=torch.float32, device=device).index_copy_(
            1, counting, losses
        )
        if need_x:
            dx = torch.zeros_like(x_all, memory_format=torch.contiguous_format).index_copy_(0, counting, dx)
    if not need_loss:
        return None, None, [dx, dweight, dbias]
    loss = losses[0].clone()
    if reduction != "none":
        summed = losses[0].sum(dtype=torch.float64)
        loss = (summed / count if reduction == "mean" else summed).float()
    return loss, losses[1].clone(), [dx, dweight, dbias]


def run(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor | None]:
    """The loss and the logsumexp (N,) of each row's logits ``x @ weight^T + bias``, both float32."""
    loss, logsumexp, _ = _work(
        x, weight, target, bias, None, ignore_index, label_smoothing, reduction, True, [False] * 3
    )
    assert loss is not None
    return loss, logsumexp


def run_training(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As :func:`run`, with the gradients of x, weight and bias for a gradient of 1 of the loss."""
    loss, logsumexp, gradients = _work(
        x, weight, target, bias, None, ignore_index, label_smoothing, reduction, True, needs
    )
    return (loss, logsumexp, *gradients)


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias for a gradient (N,) of the losses of the rows.

    exp(logits - logsumexp) would carry the rounding of a large logsumexp: the softmax is made from its own
    maximum again.
    """
    upstream = grad.contiguous()
    _, _, gradients = _work(
        x, weight, target, bias, upstream, ignore_index, label_smoothing, "sum", False, needs
    )
    return gradients


def supports(x: Tensor, *rest: object, **options: object) -> str | None:
    """Why this call cannot run here, or None."""
    return unsupported("x", x)


supports_training = supports


def supports_backward(grad: Tensor, x: Tensor, *rest: object, **options: object) -> str | None:
    """Why this call cannot run here, or None."""
    return unsupported("x", x)
