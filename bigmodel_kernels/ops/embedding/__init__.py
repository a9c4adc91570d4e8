"""Embedding: word + position + token type + LayerNorm + dropout in one pass: `bigmodel::embedding`, its
gradient, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.norm import check_norm
from bigmodel_kernels.ops.registration import (
    backward_formula,
    broadcasts,
    call,
    define,
    differentiable,
    draw_seed,
    fake_gradients,
    given,
    gradients,
    no_second_derivative,
    public,
    register_gradient,
    require_device,
    require_dropout,
    require_float,
    require_like,
    require_needs,
    require_shape,
    shape,
)


@public
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
    *,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> Tensor:
    """dropout(LayerNorm(word_weight[input_ids] + position_weight[position_ids] +
    token_type_weight[token_type_ids])).

    input_ids (...,) int64 or int32; position_ids and token_type_ids broadcast to its shape, and come each
    with its table or not at all; tables (V, N), (P, N), (T, N); norm_weight and norm_bias (N,), or None for
    no LayerNorm. Returns (..., N), contiguous. dropout_p: elements are dropped with this chance and the
    others scaled by 1 / (1 - dropout_p). padding_idx: this row of word_weight gets no gradient, as in
    nn.Embedding. float32, bfloat16, float16 (float64 in the reference), the same for all tables; the sum and
    the statistics are in float32 and the result is rounded once; rows of a gradient are summed in float32.
    Differentiable once in all tables and the norm; a second derivative raises NotImplementedError.

    Raises IndexError for an id out of range (on a GPU the device reports it), TypeError or ValueError
    otherwise, naming the argument, its value and what is allowed.

    Source: BERT (Devlin et al., 2018, arXiv:1810.04805).
    """
    args, kwargs = prepare(
        input_ids,
        word_weight,
        position_ids,
        position_weight,
        token_type_ids,
        token_type_weight,
        norm_weight,
        norm_bias,
        norm_eps,
        dropout_p=dropout_p,
        padding_idx=padding_idx,
    )
    return differentiable("embedding", args, kwargs)  # type: ignore[no-any-return]


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
    *,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments for those of the public function."""
    tables = (input_ids, word_weight, position_ids, position_weight, token_type_ids, token_type_weight)
    args: tuple[Any, ...] = (*tables, norm_weight, norm_bias, norm_eps)
    if dropout_p:
        args = (*args, draw_seed(dropout_p, input_ids.device))
    index = -1
    if padding_idx is not None:
        rows = word_weight.shape[0] if word_weight.dim() else 0
        if not -rows <= padding_idx < rows:
            raise ValueError(
                f"padding_idx={padding_idx} is out of range; allowed are {-rows} to {rows - 1}, a row of "
                "word_weight, and None"
            )
        index = padding_idx % rows
    return args, given({"dropout_p": 0.0, "padding_idx": -1}, dropout_p=dropout_p, padding_idx=index)


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
    dropout_seed: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    padding_idx: int = -1,
) -> None:
    """Raises for what is wrong."""
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
    require_dropout(dropout_p, dropout_seed, "word_weight", word_weight)
    if padding_idx < -1 or padding_idx >= word_weight.shape[0]:
        raise ValueError(
            f"padding_idx={padding_idx} is out of range; allowed are the rows of word_weight, 0 to "
            f"{word_weight.shape[0] - 1}, and -1 for none"
        )


def _check_ranges(error: Exception, *args: Any) -> None:
    """IndexError, from `error`, for ids on the CPU that are out of range: each implementation looks, and says
    it in its own words."""
    names = ("input_ids", "position_ids", "token_type_ids")
    for name, ids, weight in zip(names, args[:6:2], args[1:6:2], strict=True):
        if ids is None or weight is None or ids.device.type != "cpu" or ids.numel() == 0:
            continue
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= weight.shape[0]:
            wrong = low if low < 0 else high
            raise IndexError(f"{name} holds {wrong}; allowed are 0 to {weight.shape[0] - 1}") from error


def _run(*args: Any, **options: Any) -> Tensor:
    check(*args, **options)
    try:
        return backends.run("embedding", args[0].device.type, args, options)  # type: ignore[no-any-return]
    except (IndexError, RuntimeError) as error:
        _check_ranges(error, *args)
        raise


def _fake(input_ids: Tensor, word_weight: Tensor, *args: Any, **options: Any) -> Tensor:
    check(input_ids, word_weight, *args, **options)
    return word_weight.new_empty((*input_ids.shape, word_weight.shape[1]))


_BACKWARD = ("word_weight", "position_weight", "token_type_weight", "norm_weight", "norm_bias")


def _check_backward(
    grad: Tensor, *args: Any, norm_eps: float, needs: Sequence[bool], **options: Any
) -> list[Any]:
    """Raises for what is wrong; returns the shapes of all gradients."""
    arguments: tuple[Any, ...] = (*args[:8], norm_eps, *args[8:])
    check(*arguments, **options)
    input_ids, word, _, position, _, token_type, norm_weight, norm_bias, *_rest = args
    require_shape("grad", grad, [*input_ids.shape, word.shape[1]], word)
    tensors = (word, position, token_type, norm_weight, norm_bias)
    require_needs(needs, _BACKWARD, [n for n, t in zip(_BACKWARD, tensors, strict=True) if t is None])
    return [(0,) if tensor is None else tensor.shape for tensor in tensors]


def _run_backward(*args: Any, **options: Any) -> list[Tensor]:
    _check_backward(*args, **options)
    return backends.run("embedding_backward", args[0].device.type, args, options)  # type: ignore[no-any-return]


def _fake_backward(grad: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    return fake_gradients(grad, _check_backward(grad, *args, **options), options["needs"])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    *tensors, ctx.norm_eps, seed = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*tensors, seed)


@backward_formula(10)
def _backward(
    ctx: Any, saved: tuple[Any, ...], needs: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    asked = [needs[1], needs[3], needs[5], needs[6], needs[7]]
    results = call("embedding_backward", grad, *saved, norm_eps=ctx.norm_eps, **ctx.options, needs=asked)
    word, position, token_type, norm_weight, norm_bias = gradients(results, asked)
    return None, word, None, position, None, token_type, norm_weight, norm_bias, None, None


_TABLES = (
    "Tensor input_ids, Tensor word_weight, Tensor? position_ids, Tensor? position_weight, "
    "Tensor? token_type_ids, Tensor? token_type_weight, Tensor? norm_weight, Tensor? norm_bias"
)
define(
    f"embedding({_TABLES}, float norm_eps, Tensor? dropout_seed=None, *, float dropout_p=0.0, "
    "int padding_idx=-1) -> Tensor",
    _run,
    _fake,
    rows=(0,),
)
define(
    f"embedding_backward(Tensor grad, {_TABLES}, Tensor? dropout_seed=None, *, float norm_eps, "
    "float dropout_p=0.0, int padding_idx=-1, bool[] needs) -> Tensor[]",
    _run_backward,
    _fake_backward,
    rows=(),
)
register_gradient("embedding", _backward, _setup_context)
no_second_derivative("embedding_backward", "torch.nn.functional.embedding")
