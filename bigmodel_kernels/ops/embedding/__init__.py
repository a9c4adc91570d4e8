"""Embedding: word + position + token type + LayerNorm in one pass: `bigmodel::embedding` and its public
function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.norm import cast, check_norm, norm_backward
from bigmodel_kernels.ops.registration import (
    backward_formula,
    broadcasts,
    compute_dtype,
    define,
    require_device,
    require_float,
    require_like,
    shape,
)


def embedding(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
) -> Tensor:
    """LayerNorm(word_weight[input_ids] + position_weight[position_ids] + token_type_weight[token_type_ids]).

    input_ids (...,) int64 or int32; position_ids and token_type_ids broadcast to its shape, and come each
    with its table or not at all; tables (V, N), (P, N), (T, N); norm_weight and norm_bias (N,), or None for
    no LayerNorm. Returns (..., N), contiguous. float32, bfloat16, float16 (float64 in the reference), the
    same for all tables; the sum and the statistics are in float32 and the result is rounded once.
    Differentiable in all tables and the norm.

    Raises IndexError for an id out of range (on a GPU the device reports it), TypeError or ValueError
    otherwise, naming the argument, its value and what is allowed.

    Source: BERT (Devlin et al., 2018, arXiv:1810.04805).
    """
    args, _ = prepare(
        input_ids,
        word_weight,
        position_ids,
        position_weight,
        token_type_ids,
        token_type_weight,
        norm_weight,
        norm_bias,
        norm_eps,
    )
    return torch.ops.bigmodel.embedding.default(*args)


def prepare(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    tables = (input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
    return (*tables, norm_weight, norm_bias, norm_eps), {}


def check(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
) -> None:
    require_float("word_weight", word_weight)
    pairs = (
        ("input_ids", input_ids, "word_weight", word_weight),
        ("position_ids", position_ids, "position_weight", position_weight),
        ("token_type_ids", token_type_ids, "token_type_weight", token_type_weight),
    )
    for ids_name, ids, name, weight in pairs:
        if (ids is None) != (weight is None):
            given, missing = (name, ids_name) if ids is None else (ids_name, name)
            raise ValueError(f"{missing} is None and {given} is given; they must come together")
        if ids is None or weight is None:
            continue
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{ids_name} has dtype {ids.dtype}; allowed are torch.int64 and torch.int32")
        require_device(ids_name, ids, "word_weight", word_weight)
        if weight.dim() != 2 or weight.shape[1] != word_weight.shape[1]:
            raise ValueError(f"{name} has shape {shape(weight)}; it must be (rows, features of word_weight)")
        if weight is not word_weight:
            require_like(name, weight, "word_weight", word_weight)
        if ids is not input_ids:
            full, size = tuple(input_ids.shape), tuple(ids.shape)
            if not broadcasts(size, full):
                raise ValueError(
                    f"{ids_name} has shape {size}; it must broadcast to that of input_ids, {full}"
                )
    if norm_weight is not None or norm_bias is not None:
        check_norm(word_weight, word_weight.shape[1], norm_weight, norm_bias, norm_eps, prefix="norm_")


def _check_range(ids_name: str, ids: Tensor | None, weight: Tensor | None) -> None:
    """Out of range ids on the CPU; on a GPU reading them would wait for the device."""
    if ids is None or weight is None or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(ids))
    if low < 0 or high >= weight.shape[0]:
        wrong = low if low < 0 else high
        raise IndexError(f"{ids_name} holds {wrong}; allowed are 0 to {weight.shape[0] - 1}")


def _run(*args: Any) -> Tensor:
    check(*args)
    _check_range("input_ids", args[0], args[1])
    _check_range("position_ids", args[2], args[3])
    _check_range("token_type_ids", args[4], args[5])
    return backends.run("embedding", args[0].device.type, args, {})


def _fake(input_ids: Tensor, word_weight: Tensor, *args: Any) -> Tensor:
    check(input_ids, word_weight, *args)
    return word_weight.new_empty((*input_ids.shape, word_weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_eps = inputs
    ctx.save_for_backward(*tensors)


@backward_formula(9)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], upstream: Tensor
) -> tuple[Tensor | None, ...]:
    input_ids, word, position_ids, position, type_ids, token_type, norm_weight, norm_bias = saved
    _, need_word, _, need_position, _, need_type, need_norm_weight, need_norm_bias, _ = needs
    compute = compute_dtype(word.dtype)
    grad: Any = upstream.to(compute)
    dnorm_weight = dnorm_bias = None
    if norm_weight is not None:
        total = F.embedding(input_ids, word).to(compute)
        if position is not None:
            total = total + F.embedding(position_ids, position).to(compute)
        if token_type is not None:
            total = total + F.embedding(type_ids, token_type).to(compute)
        needs = (need_word or need_position or need_type, need_norm_weight, need_norm_bias)
        grad, dnorm_weight, dnorm_bias = norm_backward(
            grad, total, norm_weight, norm_bias, ctx.norm_eps, needs
        )
    return (
        None,
        _table_gradient(grad, input_ids, word) if need_word else None,
        None,
        _table_gradient(grad, position_ids, position) if need_position else None,
        None,
        _table_gradient(grad, type_ids, token_type) if need_type else None,
        cast(dnorm_weight, word) if need_norm_weight else None,
        cast(dnorm_bias, word) if need_norm_bias else None,
        None,
    )


def _table_gradient(grad: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of grad added up by id, in the type of computation; broadcast ids get the sum of what they were
    given to."""
    grad = grad.sum_to_size((*ids.shape, grad.shape[-1]))
    rows = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device)
    return rows.index_add(0, ids.reshape(-1), grad.reshape(-1, grad.shape[-1])).to(weight.dtype)


define(
    "embedding(Tensor input_ids, Tensor word_weight, Tensor? position_ids, Tensor? position_weight, "
    "Tensor? token_type_ids, Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias, "
    "float norm_eps) -> Tensor",
    _run,
    _fake,
)
torch.library.register_autograd("bigmodel::embedding", _backward, setup_context=_setup_context)
