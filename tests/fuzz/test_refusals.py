"""Calls of raw operators that once reached past their arguments, left results unwritten, or overflowed."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmodel_kernels import _native

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

native = torch.ops.bigmodel
MOST = 2**63 - 1


def attention_options(**given: Any) -> dict[str, Any]:
    call: dict[str, Any] = dict.fromkeys(
        ("key_padding_mask", "bias", "cu_seqlens_q", "cu_seqlens_k", "dropout_seed", "alibi_slopes", "sinks")
    )
    call |= {"max_seqlen_q": 0, "max_seqlen_k": 0, "softmax_scale": 1.0, "is_causal": False, "dropout_p": 0.0}
    call |= {"window_left": -1, "window_right": -1, "softcap": 0.0}
    return {**call, **given}


def attend(query: Tensor, **given: Any) -> Tensor:
    return native.cpu_attention(query, query, query, **attention_options(**given))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("isa", native.cpu_isas().split(", "))
def test_queries_without_any_key(isa: str) -> None:
    """The gradient's kernels went to the second head's rows of arrays that are nowhere."""
    ends = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 40, 40], [0, 0, 0])]
    options = attention_options(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=40)
    query, key = torch.ones(40, 6, 97), torch.ones(0, 2, 97)
    needs = {"bias_requires_grad": False, "sinks_require_grad": False, "side_by_side": False}
    before = native.cpu_isa()
    native.cpu_set_isa(isa)
    try:
        out, logsumexp = native.cpu_attention(query, key, key, **options)
        given = {**options, "out": out, "logsumexp": logsumexp, **needs}
        dq, dk, dv, *_ = native.cpu_attention_backward(out, None, query, key, key, **given)
    finally:
        native.cpu_set_isa(before)
    assert not out.any() and not dq.any() and dk.shape == dv.shape == key.shape


def layer_end(x: Tensor, query: Tensor) -> Tensor:
    hidden, heads = x.shape[-1] or 8, query.shape[1] * query.shape[3]
    weights = [
        native.cpu_pack_weight([torch.ones(*s, dtype=x.dtype)], "linear")
        for s in ((hidden, heads), (9, hidden), (hidden, 9))
    ]
    context, inner, outer = weights
    options = (None, None, None, 0, None, 1.0, False, -1, -1, 0.0)
    norms = ("gelu", "none", None, None, 1e-5, "layer_norm")
    block = (context, None, None, None, 1e-5, inner, None, outer, None, None, None)
    return native.cpu_layer_end(x, query, query, query, *options, *block, *norms)  # type: ignore[no-any-return]


def test_layer_end_writes_heads_in_the_dtype_of_x() -> None:
    query = torch.ones(2, 3, 5, 16)
    assert layer_end(torch.ones(2, 5, 24), query).shape == (2, 5, 24)
    with pytest.raises(RuntimeError, match="query: dtype"):
        layer_end(torch.ones(2, 5, 24, dtype=torch.bfloat16), query)


def test_layer_end_has_a_row_of_x_for_each_query() -> None:
    with pytest.raises(RuntimeError, match="x: shape"):
        layer_end(torch.ones(1, 0), torch.ones(2, 3, 500, 16))
    with pytest.raises(RuntimeError, match="query: shape"):
        layer_end(torch.ones(2, 4, 24), torch.ones(2, 3, 5, 16))


@pytest.mark.parametrize("left", [500, 2**62, MOST])
@pytest.mark.parametrize("right", [500, 2**62, MOST])
def test_wide_window_hides_nothing(left: int, right: int) -> None:
    query = torch.randn(1, 2, 19, 16)
    assert torch.equal(attend(query, window_left=left, window_right=right), attend(query))
    with pytest.raises(RuntimeError, match="window_left"):
        attend(query, window_left=-left)


def test_longest_beyond_what_is_there() -> None:
    lengths = torch.tensor([0, 7, 19], dtype=torch.int32)
    query = torch.randn(19, 2, 16)
    packed = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    expected = attend(query, **packed, max_seqlen_q=12, max_seqlen_k=12)
    assert torch.equal(attend(query, **packed, max_seqlen_q=MOST, max_seqlen_k=MOST), expected)


@pytest.mark.parametrize(
    "k, n", [(0, 5), (5, 0), (-1, 5), (2**32, 2**32), (2**61, 8), (MOST, MOST), (5, MOST)]
)
def test_forged_header(k: int, n: int) -> None:
    packed = native.cpu_pack_weight([torch.ones(16, 16)], "linear")
    packed[8:24] = torch.frombuffer(bytearray(struct.pack("=qq", k, n)), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="packed: is damaged"):
        native.cpu_linear(torch.ones(3, max(min(k, 64), 0)), packed, None, "none", None, None, None, 1e-5)


def test_weight_without_elements() -> None:
    for shape in ((3, 0), (0, 3)):
        with pytest.raises(RuntimeError, match="weights: shape"):
            native.cpu_pack_weight([torch.ones(shape)], "linear")


def test_fingerprint_of_a_weight_larger_than_memory() -> None:
    one = torch.ones(1)
    assert native.cpu_fingerprint([one.expand(2**31, 2**31)]) != native.cpu_fingerprint([one.expand(8, 8)])


def test_norm_bias_alone() -> None:
    x, weight, bias = torch.ones(3, 8), torch.ones(8, 8), torch.ones(8)
    needs = [True] * 5
    empty = (None, None, None, None)
    with pytest.raises(RuntimeError, match="norm_bias"):
        native.cpu_linear_backward(x, x, [weight], [], None, None, bias, *empty[:3], needs=needs)
    with pytest.raises(RuntimeError, match="norm_bias"):
        native.cpu_linear(x, native.cpu_pack_weight([weight], "linear"), None, "none", None, None, bias, 1e-5)
    with pytest.raises(RuntimeError, match="norm_bias"):
        native.cpu_embedding(torch.zeros(3, dtype=torch.long), weight, *empty, None, bias, 1e-5)
    with pytest.raises(RuntimeError, match="norm_bias"):
        native.cpu_layer_begin(
            x, None, bias, 1e-5, "layer_norm", native.cpu_pack_weight([weight], "linear"), None
        )


def test_dtypes_of_every_kind() -> None:
    """Those too that torch's interface for libraries does not know."""
    quantized = {
        torch.qint8,
        torch.quint8,
        torch.qint32,
        torch.quint4x2,
        torch.quint2x4,
    }  # torch's own to refuse
    every = {t for t in vars(torch).values() if isinstance(t, torch.dtype)} - {torch.float32} - quantized
    x, packed = torch.ones(4, 8), native.cpu_pack_weight([torch.ones(8, 8)], "linear")
    options = {"activation": "relu", "weight_layout": "linear", "norm_position": "none"}
    for dtype in every:
        other = torch.empty(8, 8, dtype=dtype)
        with pytest.raises(RuntimeError, match=r"\bw_in\b"):
            native.cpu_feed_forward_training(x, other, None, x, *[None] * 7, **options)
        with pytest.raises(RuntimeError, match=r"\bquery\b|\bkey\b"):
            native.cpu_attention(
                x[None, None],
                other[None, None],
                x[None, None],
                *[None] * 7,
                4,
                8,
                1.0,
                False,
                -1,
                -1,
                0.0,
                0.0,
            )
        with pytest.raises(RuntimeError, match=r"\bresidual\b"):
            native.cpu_linear(x, packed, None, "none", other[:4], None, None, 1e-5)


def test_misaligned() -> None:
    x = torch.frombuffer(bytearray(33), dtype=torch.float32, offset=1, count=8)
    with pytest.raises(RuntimeError, match="x: its address"):
        native.cpu_layer_norm(x, None, None, 1e-5, None)
    with pytest.raises(RuntimeError, match="weight: its address"):
        native.cpu_layer_norm(torch.ones(8), x, None, 1e-5, None)


def test_philox_sizes() -> None:
    for rows, columns, first in ((2**40, 2**40, 0), (3, 3, MOST)):
        with pytest.raises(RuntimeError, match="row"):
            native.cpu_philox(torch.tensor(1), rows, columns, "elements", first, 0, 0, 0.5)


def test_rotary_angles() -> None:
    query = torch.ones(1, 1, 0, 8)
    for cos in (torch.tensor(1.0), torch.ones(1, 0, 2**62), torch.ones(1, 0, 5)):
        with pytest.raises(RuntimeError, match="cos: shape"):
            native.cpu_rotary(query, query, cos, cos, False)


def test_norm_of_heads_of_another_dtype() -> None:
    x, weight = torch.ones(1, 1, 8), native.cpu_pack_weight([torch.ones(8, 8)], "linear")
    qkv = native.cpu_pack_weight([torch.ones(24, 8)], "linear")
    parts = [None, None, qkv, None, None, None, weight, None, torch.ones(8), None, weight, None, weight, None]
    norms = [None, None, torch.ones(8).half(), None]
    buffers = [torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8)]
    options = ([0], [], [], [], [], [], False, False, [], [], [], None, [1.0], 0.0, [], [], 1.0)
    options += ("rms_norm", 0.0, "pre", "relu")
    native.cpu_layers(x, parts + [None] * 4, [1e-5] * 3, buffers, *options)
    with pytest.raises(RuntimeError, match="q_norm_weight: dtype"):
        native.cpu_layers(x, parts + norms, [1e-5] * 3, buffers, *options)
