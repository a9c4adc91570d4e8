"""What ``triton_build`` compiles: calls of every operation's launchers.

Sizes of real models, so that the launchers choose the tiles that they would choose there; every kernel and
every epilogue is in at least one case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .ops.attention import triton as attention
from .ops.cross_entropy import triton as cross_entropy
from .ops.embedding import triton as embedding
from .ops.feed_forward import triton as feed_forward
from .ops.linear import triton as linear
from .ops.norm import triton as norm
from .ops.rotary import triton as rotary

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _seed(dropout_p: float) -> Tensor | None:
    return torch.tensor(0) if dropout_p else None


def _attention(
    dtype: torch.dtype,
    rows: int,
    head_dim: int,
    kv_heads: int = 16,
    backward: bool = False,
    padding: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    bias_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> None:
    batch, heads, keys = 8, 16, max(rows, 512)
    query = torch.empty(batch, heads, rows, head_dim, dtype=dtype)
    key, value = torch.empty(2, batch, kv_heads, keys, head_dim, dtype=dtype)
    arguments = (
        torch.empty(batch, keys, dtype=torch.bool) if padding else None,
        None if bias_shape is None else torch.empty(bias_shape, dtype=dtype),
        None,
        None,
        _seed(options.get("dropout_p", 0.0)),
        torch.empty(heads) if alibi else None,
        torch.empty(heads, dtype=dtype) if sinks else None,
    )
    options["softmax_scale"] = head_dim**-0.5
    if not backward:
        attention.run(query, key, value, *arguments, **options)
        return
    out, logsumexp = query.new_empty(query.shape), torch.empty(batch, heads, rows)
    attention.run_backward(
        out, None, query, key, value, out, logsumexp, *arguments, **options,
        bias_requires_grad=bias_shape is not None, sinks_require_grad=sinks,
    )  # fmt: skip


def _everything(dtype: torch.dtype, head_dim: int) -> None:
    """The gradient with every feature that can go together."""
    _attention(
        dtype, 1024, head_dim, kv_heads=4, backward=True, padding=True, alibi=True, sinks=True,
        bias_shape=(1, 16, 1024, 1024), is_causal=True, window_left=256, softcap=50.0, dropout_p=0.1,
    )  # fmt: skip


def _packed_attention(dtype: torch.dtype, head_dim: int, backward: bool = False) -> None:
    """Slices of a fused QKV projection."""
    query, key, value = torch.empty(4096, 3, 12, head_dim, dtype=dtype).unbind(1)
    ends = torch.tensor([0, 4096], dtype=torch.int32)
    arguments = (None, None, ends, ends)
    options: dict[str, Any] = {"max_seqlen_q": 512, "max_seqlen_k": 512, "softmax_scale": head_dim**-0.5}
    if backward:
        out = torch.empty(query.shape, dtype=dtype)
        logsumexp = torch.empty(12, 4096)
        attention.run_backward(out, None, query, key, value, out, logsumexp, *arguments, **options)
    else:
        attention.run(query, key, value, *arguments, **options)


def _decode(
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    rows: int = 1,
    batch: int = 8,
    paged: bool = False,
    alibi: bool = False,
    sinks: bool = False,
    **options: Any,
) -> None:
    heads = 32
    query = torch.empty(batch, heads, rows, head_dim, dtype=dtype)
    pages, page_size = (batch * 64, 64) if paged else (batch, 4096)
    key, value = torch.empty(2, pages, kv_heads, page_size, head_dim, dtype=dtype)
    attention.run_decode(
        query, key, value, torch.empty(batch, dtype=torch.int32),
        torch.empty(batch, 64, dtype=torch.int32) if paged else None,
        torch.empty(heads) if alibi else None, torch.empty(heads, dtype=dtype) if sinks else None,
        softmax_scale=head_dim**-0.5, **options,
    )  # fmt: skip


def _rotary(dtype: torch.dtype, head_dim: int, pairs: int, interleaved: bool = False) -> None:
    query, key = (torch.empty(8, 1024, heads, head_dim, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    cos, sin = torch.empty(2, 1, 1024, pairs)
    rotary.run(query, key, cos, sin, interleaved=interleaved)


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
    dtype: torch.dtype, columns: int, rms: bool = False, backward: bool = False, dropout_p: float = 0.0,
    summed: bool = False,
) -> None:  # fmt: skip
    x, seed = torch.empty(4096, columns, dtype=dtype), _seed(dropout_p)
    if backward:
        norm.run_backward(
            x, x, x[0], None if rms else x[0], None if summed else x, seed,
            kind="rms_norm" if rms else "layer_norm", eps=1e-5, dropout_p=dropout_p, summed=summed,
            needs=[True, True, True, not rms, summed],
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
    "attention bf16 d32": lambda: _attention(_BF16, 512, 32),
    "attention bf16 d64": lambda: _attention(_BF16, 512, 64),
    "attention bf16 d64 causal": lambda: _attention(_BF16, 1024, 64, is_causal=True),
    "attention bf16 d64 padding": lambda: _attention(_BF16, 512, 64, padding=True),
    "attention bf16 d64 bias": lambda: _attention(_BF16, 512, 64, bias_shape=(1, 16, 512, 512)),
    "attention bf16 d64 dropout": lambda: _attention(_BF16, 512, 64, dropout_p=0.1),
    "attention bf16 d64 packed": lambda: _packed_attention(_BF16, 64),
    "attention fp16 d64 causal": lambda: _attention(_FP16, 1024, 64, is_causal=True),
    "attention bf16 d96 causal": lambda: _attention(_BF16, 1024, 96, is_causal=True),
    "attention bf16 d128": lambda: _attention(_BF16, 1024, 128),
    "attention bf16 d128 causal gqa": lambda: _attention(_BF16, 1024, 128, kv_heads=4, is_causal=True),
    "attention bf16 d128 window softcap": lambda: _attention(
        _BF16, 1024, 128, is_causal=True, window_left=256, softcap=50.0
    ),
    "attention bf16 d256 causal": lambda: _attention(_BF16, 1024, 256, is_causal=True),
    "attention bf16 d128 decode": lambda: _attention(_BF16, 1, 128, kv_heads=4, is_causal=True),
    "attention fp32 d64": lambda: _attention(_FP32, 512, 64),
    "attention fp32 d128 causal": lambda: _attention(_FP32, 512, 128, is_causal=True),
    "attention fp32 d256": lambda: _attention(_FP32, 512, 256),
    "attention backward bf16 d32": lambda: _attention(_BF16, 512, 32, backward=True),
    "attention backward bf16 d64 padding": lambda: _attention(_BF16, 512, 64, backward=True, padding=True),
    "attention backward bf16 d64 bias": lambda: _attention(
        _BF16, 512, 64, backward=True, bias_shape=(1, 16, 512, 512)
    ),
    "attention backward bf16 d64 dropout": lambda: _attention(_BF16, 512, 64, backward=True, dropout_p=0.1),
    "attention backward bf16 d64 packed": lambda: _packed_attention(_BF16, 64, backward=True),
    "attention backward fp16 d64 causal": lambda: _attention(_FP16, 1024, 64, backward=True, is_causal=True),
    "attention backward bf16 d96 causal alibi": lambda: _attention(
        _BF16, 1024, 96, backward=True, is_causal=True, alibi=True
    ),
    "attention backward bf16 d128": lambda: _attention(_BF16, 1024, 128, backward=True),
    "attention backward bf16 d128 causal gqa": lambda: _attention(
        _BF16, 1024, 128, kv_heads=4, backward=True, is_causal=True
    ),
    "attention backward bf16 d128 window softcap sinks": lambda: _attention(
        _BF16, 1024, 128, backward=True, is_causal=True, window_left=256, softcap=50.0, sinks=True
    ),
    "attention backward fp16 d128 bias of a row dropout": lambda: _attention(
        _FP16, 1024, 128, backward=True, bias_shape=(8, 1, 1, 1024), dropout_p=0.1
    ),
    "attention backward bf16 d256 causal": lambda: _attention(
        _BF16, 1024, 256, backward=True, is_causal=True
    ),
    "attention backward fp16 d256 bias of a column softcap": lambda: _attention(
        _FP16, 1024, 256, backward=True, bias_shape=(16, 1024, 1), softcap=50.0
    ),
    "attention backward bf16 d64 everything": lambda: _everything(_BF16, 64),
    "attention backward fp16 d80 causal": lambda: _attention(_FP16, 1024, 80, backward=True, is_causal=True),
    "attention backward bf16 d128 everything": lambda: _everything(_BF16, 128),
    "attention backward bf16 d256 everything": lambda: _everything(_BF16, 256),
    "attention backward fp32 d32": lambda: _attention(_FP32, 512, 32, backward=True),
    "attention backward fp32 d64 everything": lambda: _everything(_FP32, 64),
    "attention backward fp32 d128 everything": lambda: _everything(_FP32, 128),
    "attention backward fp32 d256 everything": lambda: _everything(_FP32, 256),
    "attention backward fp32 d64": lambda: _attention(_FP32, 512, 64, backward=True),
    "attention backward fp32 d64 bias dropout": lambda: _attention(
        _FP32, 512, 64, backward=True, bias_shape=(1, 16, 512, 512), dropout_p=0.1
    ),
    "attention backward fp32 d128 causal": lambda: _attention(
        _FP32, 512, 128, backward=True, is_causal=True
    ),
    "attention backward fp32 d128 bias of a row softcap": lambda: _attention(
        _FP32, 512, 128, backward=True, bias_shape=(8, 1, 1, 512), softcap=50.0
    ),
    "attention backward fp32 d256": lambda: _attention(_FP32, 512, 256, backward=True),
    "attention backward fp32 d256 bias sinks": lambda: _attention(
        _FP32, 512, 256, backward=True, bias_shape=(1, 16, 512, 512), sinks=True
    ),
    "decode bf16 d64": lambda: _decode(_BF16, 64, 32),
    "decode bf16 d128 gqa paged": lambda: _decode(_BF16, 128, 8, paged=True),
    "decode bf16 d128 window softcap alibi": lambda: _decode(
        _BF16, 128, 8, rows=4, window_left=256, softcap=50.0, alibi=True
    ),
    "decode fp16 d128 many rows": lambda: _decode(_FP16, 128, 4, rows=8, batch=256, sinks=True),
    "decode bf16 d256 gqa sinks": lambda: _decode(_BF16, 256, 4, sinks=True),
    "decode fp32 d64": lambda: _decode(_FP32, 64, 32),
    "decode fp32 d256 gqa paged": lambda: _decode(_FP32, 256, 4, paged=True),
    "rotary bf16 128": lambda: _rotary(_BF16, 128, 64),
    "rotary bf16 128 interleaved": lambda: _rotary(_BF16, 128, 64, interleaved=True),
    "rotary fp32 80 of which 32": lambda: _rotary(_FP32, 80, 16),
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
    "norm backward bf16 768 of a sum": lambda: _norm(
        _BF16, 768, backward=True, dropout_p=0.1, summed=True
    ),
    "norm backward fp32 4096 of a sum": lambda: _norm(
        _FP32, 4096, backward=True, dropout_p=0.1, summed=True
    ),
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
