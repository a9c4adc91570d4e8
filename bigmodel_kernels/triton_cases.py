"""What ``triton_build`` compiles of the linear, feed-forward, norm, embedding and cross-entropy kernels.

Sizes of real models, so that the launchers choose the tiles that they would choose there; every kernel and
every epilogue is in at least one case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops.cross_entropy import triton as cross_entropy
from .ops.embedding import triton as embedding
from .ops.feed_forward import triton as feed_forward
from .ops.linear import triton as linear
from .ops.norm import triton as norm

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _seed(dropout_p: float) -> Tensor | None:
    return torch.tensor(0) if dropout_p else None


def _linear(
    dtype: torch.dtype,
    rows: int,
    k: int,
    n: int,
    layout: str = "linear",
    training: bool = False,
    with_residual: bool = False,
    **options: Any,
) -> None:
    x, bias = torch.empty(rows, k, dtype=dtype), torch.empty(n, dtype=dtype)
    weight = torch.empty(n, k, dtype=dtype) if layout == "linear" else torch.empty(k, n, dtype=dtype)
    residual = torch.empty(rows, n, dtype=dtype) if with_residual else None
    run = linear.run_training if training else linear.run
    seed = _seed(options.get("dropout_p", 0.0))
    run(x, [weight], [bias], residual, None, None, seed, weight_layout=layout, **options)


def _linear_backward(
    dtype: torch.dtype, rows: int, k: int, n: int, layout: str = "linear", **options: Any
) -> None:
    x, grad = torch.empty(rows, k, dtype=dtype), torch.empty(rows, n, dtype=dtype)
    weight = torch.empty(n, k, dtype=dtype) if layout == "linear" else torch.empty(k, n, dtype=dtype)
    seed = _seed(options.get("dropout_p", 0.0))
    needs = [True, False, False, False, True, True]
    linear.run_backward(
        grad, x, [weight], [grad[0]], None, None, None, seed, grad, None, weight_layout=layout, needs=needs,
        **options,
    )  # fmt: skip


def _feed_forward(
    dtype: torch.dtype, width: int, hidden: int, gated: bool, backward: bool, **options: Any
) -> None:
    x, w_in = torch.empty(4096, width, dtype=dtype), torch.empty(hidden, width, dtype=dtype)
    w_out, wide = torch.empty(width, hidden, dtype=dtype), torch.empty(4096, hidden, dtype=dtype)
    b_in, b_out = (None, None) if gated else (wide[0], x[0])
    gate = w_in if gated else None
    arguments = (x, w_in, b_in, w_out, b_out, x, None, None, gate, None, None)
    if not backward:
        feed_forward.run_training(*arguments, **options)
        return
    needs = [True, True, not gated, True, not gated, False, False, False, gated, False]
    feed_forward.run_backward(x, *arguments, wide, wide if gated else None, None, **options, needs=needs)


def _norm(
    dtype: torch.dtype, columns: int, rms: bool = False, backward: bool = False, dropout_p: float = 0.0
) -> None:
    x, seed = torch.empty(4096, columns, dtype=dtype), _seed(dropout_p)
    if backward:
        norm.run_backward(
            x, x, x[0], None if rms else x[0], x, seed, kind="rms_norm" if rms else "layer_norm", eps=1e-5,
            dropout_p=dropout_p, needs=[True, True, True, not rms],
        )  # fmt: skip
    elif rms:
        norm.run_rms_norm(x, x[0], 1e-5, x, seed, dropout_p=dropout_p)
    else:
        norm.run(x, x[0], x[0], 1e-5, x, seed, dropout_p=dropout_p)


def _embedding(dtype: torch.dtype, columns: int, backward: bool = False) -> None:
    ids = torch.zeros(8, 512, dtype=torch.int64)
    table, seed = torch.empty(1024, columns, dtype=dtype), torch.tensor(0)
    arguments = (ids, table, ids[:1], table, ids, table, table[0], table[0])
    if backward:
        grad = torch.empty(8, 512, columns, dtype=dtype)
        embedding.run_backward(grad, *arguments, seed, norm_eps=1e-12, dropout_p=0.1, needs=[True] * 5)
    else:
        embedding.run(*arguments, 1e-12, seed, dropout_p=0.1)


def _cross_entropy(dtype: torch.dtype, features: int, classes: int) -> None:
    x, weight = torch.empty(1024, features, dtype=dtype), torch.empty(classes, features, dtype=dtype)
    target = torch.zeros(1024, dtype=torch.int64)
    cross_entropy.run_training(x, weight, target, None, label_smoothing=0.1, needs=[True, True, False])


CASES: dict[str, Callable[[], None]] = {
    "linear bf16 4096x768x3072 gelu": lambda: _linear(_BF16, 4096, 768, 3072, activation="gelu"),
    "linear bf16 4096x3072x768 residual": lambda: _linear(_BF16, 4096, 3072, 768, with_residual=True),
    "linear bf16 4096x3072x768 dropout": lambda: _linear(
        _BF16, 4096, 3072, 768, with_residual=True, dropout_p=0.1
    ),
    "linear bf16 8192x4096x4096 silu": lambda: _linear(_BF16, 8192, 4096, 4096, activation="silu"),
    "linear fp16 4096x768x3072 conv1d gelu_tanh": lambda: _linear(
        _FP16, 4096, 768, 3072, "conv1d", activation="gelu_tanh"
    ),
    "linear bf16 4096x768x3072 training": lambda: _linear(
        _BF16, 4096, 768, 3072, training=True, activation="gelu"
    ),
    "linear bf16 512x768x768": lambda: _linear(_BF16, 512, 768, 768),
    "linear bf16 8x768x3072": lambda: _linear(_BF16, 8, 768, 3072),
    "linear bf16 1000x770x770": lambda: _linear(_BF16, 1000, 770, 770),
    "linear fp32 4096x768x3072 gelu": lambda: _linear(_FP32, 4096, 768, 3072, activation="gelu"),
    "linear backward bf16 4096x768x768": lambda: _linear_backward(_BF16, 4096, 768, 768),
    "linear backward bf16 8192x4096x4096 conv1d": lambda: _linear_backward(_BF16, 8192, 4096, 4096, "conv1d"),
    "linear backward fp32 4096x768x768 dropout": lambda: _linear_backward(
        _FP32, 4096, 768, 768, dropout_p=0.1, activation="gelu"
    ),
    "feed_forward bf16 768x3072 gelu": lambda: _feed_forward(
        _BF16, 768, 3072, False, False, activation="gelu"
    ),
    "feed_forward bf16 4096x11008 silu gated": lambda: _feed_forward(
        _BF16, 4096, 11_008, True, False, activation="silu"
    ),
    "feed_forward fp32 768x3072 gelu gated": lambda: _feed_forward(
        _FP32, 768, 3072, True, False, activation="gelu"
    ),
    "feed_forward backward bf16 768x3072 gelu": lambda: _feed_forward(
        _BF16, 768, 3072, False, True, activation="gelu"
    ),
    "feed_forward backward fp32 768x3072 gelu": lambda: _feed_forward(
        _FP32, 768, 3072, False, True, activation="gelu"
    ),
    "feed_forward backward bf16 4096x11008 silu gated": lambda: _feed_forward(
        _BF16, 4096, 11_008, True, True, activation="silu"
    ),
    "norm bf16 384": lambda: _norm(_BF16, 384),
    "norm bf16 768 dropout": lambda: _norm(_BF16, 768, dropout_p=0.1),
    "norm fp32 4096": lambda: _norm(_FP32, 4096),
    "norm bf16 32768": lambda: _norm(_BF16, 32_768),
    "norm bf16 4096 rms": lambda: _norm(_BF16, 4096, rms=True),
    "norm backward bf16 768": lambda: _norm(_BF16, 768, backward=True),
    "norm backward bf16 1024 dropout": lambda: _norm(_BF16, 1024, backward=True, dropout_p=0.1),
    "norm backward bf16 4096 rms": lambda: _norm(_BF16, 4096, rms=True, backward=True),
    "norm backward fp32 8192": lambda: _norm(_FP32, 8192, backward=True),
    "norm backward bf16 8192 rms": lambda: _norm(_BF16, 8192, rms=True, backward=True),
    "embedding bf16 768": lambda: _embedding(_BF16, 768),
    "embedding fp32 384": lambda: _embedding(_FP32, 384),
    "embedding backward bf16 768": lambda: _embedding(_BF16, 768, backward=True),
    "embedding backward fp32 1024": lambda: _embedding(_FP32, 1024, backward=True),
    "cross_entropy bf16 768x50257": lambda: _cross_entropy(_BF16, 768, 50_257),
    "cross_entropy fp32 768x50257": lambda: _cross_entropy(_FP32, 768, 50_257),
}  # fmt: skip
