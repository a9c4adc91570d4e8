"""Attention: `bigmodel::attention`, its gradient `bigmodel::attention_backward`, and the public function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.attention import vmap
from bigmodel_kernels.ops.attention.checks import check, check_values, window_sides
from bigmodel_kernels.ops.registration import (
    LIBRARY,
    _cast,
    backward_formula,
    compute_dtype,
    define,
    draw_seed,
    no_second_derivative,
    nobody_listens,
    plain,
    public,
    register_gradient,
    require_device,
)
from bigmodel_kernels.ops.side_by_side import empty_heads, empty_key_gradient, heads_lie_side_by_side

_INPUTS = "Tensor query, Tensor key, Tensor value"
_OPTIONAL = (
    "Tensor? key_padding_mask=None, Tensor? bias=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? dropout_seed=None, Tensor? alibi_slopes=None, Tensor? sinks=None"
)
_OPTIONS = (
    "SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, float softmax_scale, bool is_causal=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, float dropout_p=0.0"
)


@public
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, exact and without an Sq x Sk tensor.

    logits = softmax_scale * query @ key^T, then softcap * tanh(logits / softcap), then + bias and ALiBi, then
    masks; the result is softmax(logits) @ value. A query with no visible key gets zeros, and a logsumexp of
    -inf (of its head's sink, where there are sinks).

    Two forms:
      dense:  query (B, H, Sq, D), key and value (B, Hkv, Sk, D). The result is (B, H, Sq, D), laid out in
              memory as (B, Sq, H, D), so that `.transpose(1, 2).reshape(B, Sq, H * D)` copies nothing.
      packed: query (total_q, H, D), key and value (total_k, Hkv, D), with `cu_seqlens_q` and `cu_seqlens_k`,
              int32 (B + 1,), where the sequences begin and end. The result is (total_q, H, D).
    H is a multiple of Hkv: query head h reads key head h // (H // Hkv). D is 1 to 256. Any strides will do as
    long as the last dimension is contiguous (if not, it is copied).

    Args:
      is_causal: key j is visible to query i when j <= i + Sk - Sq: the last query sees the last key
        (bottom-right; torch's own is_causal is top-left).
      softmax_scale: 1 / sqrt(D) when None.
      window: (left, right): key j is visible to query i when i + Sk - Sq - left <= j <= i + Sk - Sq + right;
        None on a side is no limit.
      key_padding_mask: bool (B, Sk), True is visible; dense form only. bias: added to the logits; broadcasts
        to (B, H, Sq, Sk); in the dtype of query or float32; dense form only. softcap: 0 for none (Gemma 2).
      max_seqlen_q, max_seqlen_k: at least the longest sequence; read from cu_seqlens when None, which waits
        for a GPU. Pass them under torch.compile, whose graphs hold no number read from a tensor.
      dropout_p: probabilities are dropped with this chance and the others scaled by 1 / (1 - dropout_p).
      dropout_seed: int64, one element, on query's device: what is dropped depends on it and on the place of
        the probability alone (bigmodel_kernels/ops/philox.py). Drawn from torch's generator when None.
      alibi_slopes: float32 (H,) or (B, H): logits -= slope * |i + Sk - Sq - j| (Press et al., 2021,
        arXiv:2108.12409), with no tensor of logits' shape; in both forms. It gets no gradient.
      sinks: (H,), in the dtype of query or float32: one more logit of each head in the softmax's denominator,
        which has no value (gpt-oss; Xiao et al., 2023, arXiv:2309.17453).
      deterministic: gradients of this call are the same bits from run to run, as they are for all calls under
        torch.use_deterministic_algorithms. It takes longer where blocks of a GPU add to one sum otherwise.
      return_logsumexp: also return the natural log of the sum of exp(logits), float32 (float64 for float64):
        (B, H, Sq), or packed (H, total_q). It has a gradient.

    dtypes float32, bfloat16 and float16 (float64 in the reference), the same for query, key and value; sums
    and the softmax are in float32 with one rounding of the result. Under autocast they and the bias are cast
    to its dtype.

    Training: differentiable once in query, key, value, bias and sinks; a second derivative raises. Besides
    its arguments the forward keeps the result and the logsumexp for the backward, which computes the
    probabilities again, dropped ones and all. torch.vmap maps it: dense calls without dropout become one call
    of a larger batch, others one call after another.

    Raises TypeError or ValueError naming the argument, its value and what is allowed.

    Source: FlashAttention-2 (Dao, 2023, arXiv:2307.08691).
    """
    args, kwargs = prepare(
        query,
        key,
        value,
        is_causal=is_causal,
        softmax_scale=softmax_scale,
        window=window,
        key_padding_mask=key_padding_mask,
        bias=bias,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    out, logsumexp = torch.ops.bigmodel.attention.default(*args, **kwargs, deterministic=deterministic)
    return (out, logsumexp) if return_logsumexp else out


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    softmax_scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_logsumexp: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(1, query.shape[-1])) if query.dim() else 1.0
    left, right = window_sides(window)
    if cu_seqlens_q is not None and max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q)
    if cu_seqlens_k is not None and max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if cu_seqlens_k is cu_seqlens_q else _longest(cu_seqlens_k)
    if dropout_seed is None:
        dropout_seed = draw_seed(dropout_p, query.device)
    seed = dropout_seed if dropout_p else None
    inputs = (
        query,
        key,
        value,
        key_padding_mask,
        bias,
        cu_seqlens_q,
        cu_seqlens_k,
        seed,
        alibi_slopes,
        sinks,
    )
    return inputs, {
        "max_seqlen_q": max_seqlen_q or 0,
        "max_seqlen_k": max_seqlen_k or 0,
        "softmax_scale": softmax_scale,
        "is_causal": is_causal,
        "window_left": left,
        "window_right": right,
        "softcap": softcap,
        "dropout_p": dropout_p,
    }


def _longest(cu_seqlens: Tensor) -> int:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        return 0  # the check of the operator says what is wrong
    return int(cu_seqlens.diff().max())


def _run(*args: Any, deterministic: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    args = _ready(args)  # deterministic: the backward's alone
    check(*args, **options)
    check_values(args, options)
    return backends.run("attention", args[0].device.type, args, options)


def _ready(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Queries, keys and values with a last dimension that is not contiguous are copied; kernels count on
    it."""
    return (*(a if a.dim() == 0 or a.stride(-1) == 1 else a.contiguous() for a in args[:3]), *args[3:])


def _fake(query: Tensor, *args: Any, deterministic: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    check(query, *args, **options)
    rows = (query.shape[1], query.shape[0]) if query.dim() == 3 else query.shape[:3]
    logsumexp = query.new_empty(rows, dtype=compute_dtype(query.dtype))
    return empty_heads(query, query.shape[1]), logsumexp


def _run_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *args: Any,
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    side_by_side: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`side_by_side`: the gradients of query, key and value may lie so in one tensor. The operator never says
    so: its results share no memory.
    """
    forward = _ready((query, key, value, *args))
    _check_backward(grad_out, grad_logsumexp, out, logsumexp, forward, options)
    check_values(forward, options)
    return backends.run(
        "attention_backward",
        query.device.type,
        (*_ready((grad_out,)), grad_logsumexp, *forward[:3], *_ready((out,)), logsumexp, *forward[3:]),
        {
            **options,
            "bias_requires_grad": bias_requires_grad,
            "sinks_require_grad": sinks_require_grad,
            "deterministic": deterministic,
            **({"side_by_side": True} if side_by_side else {}),
        },
    )


def _check_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    forward: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    check(*forward, **options)
    query = forward[0]
    rows = (query.shape[1], query.shape[0]) if query.dim() == 3 else tuple(query.shape[:3])
    sums = compute_dtype(query.dtype)
    for name, tensor, size, dtype in (
        ("grad_out", grad_out, query.shape, query.dtype),
        ("out", out, query.shape, query.dtype),
        ("logsumexp", logsumexp, rows, sums),
        ("grad_logsumexp", grad_logsumexp, rows, sums),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != tuple(size):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(size)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
        require_device(name, tensor, "query", query)


def _fake_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *args: Any,
    bias_requires_grad: bool = False,
    sinks_require_grad: bool = False,
    deterministic: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(grad_out, grad_logsumexp, out, logsumexp, (query, key, value, *args), options)
    bias = args[1] if len(args) > 1 else None
    dq = empty_heads(query, query.shape[1])
    dk, dv = (empty_key_gradient(t) for t in (key, value))
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else query.new_empty(0)
    sinks = args[6] if len(args) > 6 else None
    dsinks = sinks.new_empty(sinks.shape) if sinks is not None and sinks_require_grad else query.new_empty(0)
    return dq, dk, dv, dbias, dsinks


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    slopes = inputs[8]
    if slopes is not None and slopes.requires_grad:
        raise ValueError("alibi_slopes requires grad, and has no gradient; pass alibi_slopes.detach()")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    ctx.options = dict(keyword_only_inputs)
    ctx.deterministic = ctx.options.pop("deterministic")


@backward_formula(10)
def _backward(
    ctx: Any,
    saved: tuple[Any, ...],
    needs: tuple[Any, ...],
    grad_out: Tensor | None,
    grad_logsumexp: Tensor | None,
) -> tuple[Tensor | None, ...]:
    *inputs, out, logsumexp = saved
    if grad_out is None and grad_logsumexp is None:
        return (None,) * len(inputs)
    function: Callable[..., Any] = torch.ops.bigmodel.attention_backward.default
    if (
        not torch.is_grad_enabled()
        and nobody_listens(out.device.type)
        and all(map(plain, (grad_out, *saved)))
        and heads_lie_side_by_side(inputs[:3])
    ):
        function = functools.partial(_run_backward, side_by_side=True)
    dq, dk, dv, dbias, dsinks = function(
        torch.zeros_like(out) if grad_out is None else grad_out,
        *(grad_logsumexp, *inputs[:3], out, logsumexp, *inputs[3:]),
        **ctx.options,
        bias_requires_grad=needs[4],
        sinks_require_grad=needs[9],
        deterministic=ctx.deterministic or torch.are_deterministic_algorithms_enabled(),
    )
    gradients = (dq, dk, dv, None, dbias, None, None, None, None, dsinks)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _autocast(device: str) -> Callable[..., Any]:
    """Casts as torch's scaled_dot_product_attention does; slopes, and sinks in float32, are taken as they
    are.
    """

    def kernel(*args: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        sinks = args[9:]
        if sinks and sinks[0] is not None and sinks[0].dtype != torch.float32:
            sinks = (_cast(sinks[0], dtype),)
        cast = (*(_cast(a, dtype) for a in args[:8]), *args[8:9], *sinks)
        with torch.autocast(device, enabled=False):
            return torch.ops.bigmodel.attention.default(*cast, **options)

    return kernel


define(
    f"attention({_INPUTS}, {_OPTIONAL}, *, {_OPTIONS}, bool deterministic=False) -> (Tensor, Tensor)",
    _run,
    _fake,
)
define(
    f"attention_backward(Tensor grad_out, Tensor? grad_logsumexp, {_INPUTS}, Tensor out, Tensor logsumexp, "
    f"{_OPTIONAL}, *, {_OPTIONS}, bool bias_requires_grad=False, bool sinks_require_grad=False, "
    "bool deterministic=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
for _device in ("cpu", "cuda"):
    LIBRARY.impl("attention", _autocast(_device), f"Autocast{_device.upper()}")
register_gradient("attention", _backward, _setup_context)
no_second_derivative(
    "attention_backward",
    "torch.nn.functional.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(MATH)",
)
torch.library.register_vmap("bigmodel::attention", vmap.forward)
torch.library.register_vmap("bigmodel::attention_backward", vmap.backward)
