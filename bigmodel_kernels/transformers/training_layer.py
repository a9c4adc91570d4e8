"""A layer that is trained on a GPU, as two nodes of autograd: to query, key and value, and from them on.

Each node is one call of the compiled CUDA library forward and one backward (csrc/register_cuda_layer.cpp). In
steps, as `blocks` makes them, a layer is some ten nodes and as many launches from Python again, for which
short sequences leave a GPU waiting. Seeds are drawn as there, so that dropout drops the same.

The two nodes are `whole_layer`'s two calls: what stands between them, `attend`, may be another attention, to
which the layer goes on in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigmodel_kernels.ops.linear import cuda as cuda_linear
from bigmodel_kernels.ops.norm.cuda import MAX_COLUMNS_BACKWARD
from bigmodel_kernels.ops.registration import draw_seed, gradients, wants_gradient
from bigmodel_kernels.ops.side_by_side import whole_of

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.blocks import LayerParts, Terms
    from bigmodel_kernels.transformers.whole_layer import HeldOnGpu

_Tensors = tuple[Tensor | None, ...]

#: With dropout of probabilities Triton's attention is faster than the library's. With more keys than these
#: that is taken to be worth its launches from Python.
MOST_KEYS_WITH_DROPOUT = 1024


def takes_layer(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a layer of this input and these parameters may run so, all else allowing it."""
    return (
        x.shape[-1] <= MAX_COLUMNS_BACKWARD
        and wants_gradient((x, *tensors))
        and forward_ad._current_level < 0
        and not torch.are_deterministic_algorithms_enabled()
    )


def takes_attention(terms: Terms, dropout_p: float) -> bool:
    """Whether `end` has this attention, if the library has it without dropout."""
    keys = terms.key.shape[2] if terms.lengths is None else terms.longest
    return terms.sinks is None and (not dropout_p or keys <= MOST_KEYS_WITH_DROPOUT)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """Query, key and value, each (..., heads, head_dim), of as many heads, that lie side by side."""
    return qkv.view(*qkv.shape[:-1], 3, -1, head_dim).unbind(-3)


def begin(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    held: HeldOnGpu,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Query, key and value of norm(x), each (..., heads, head_dim), side by side in one tensor."""
    told = _Begin(len(held.qkv), eps, held.layout, head_dim)
    return _recorded(_BeginNode, told, x, norm_weight, norm_bias, *held.qkv, *held.qkv_biases)  # type: ignore[no-any-return]


def end(
    x: Tensor, terms: Terms, w: LayerParts, held: HeldOnGpu, position: str, by_torch: Sequence[bool]
) -> Tensor:
    """The layer's result; `by_torch` as `cuda_layer_end` has it, without dropout."""
    ffn = w.ffn
    assert ffn is not None
    dropouts = (w.attention_p, w.context_p, w.ffn_p)
    told = _End(
        (terms.longest, terms.scale, terms.is_causal, terms.window_left, terms.window_right),
        *(dropouts, w.attention_eps, w.ffn_eps, held.layout, ffn.activation, position),
        [chosen and not p for chosen, p in zip(by_torch, dropouts[1:], strict=True)],
        ffn.recompute,
    )
    seeds = [draw_seed(p, x.device) for p in dropouts]
    norm: Any = w.attention_norm if position == "post" else (None, None)
    parameters: Any = (w.attention_out, norm, ffn.w_in, ffn.w_out, w.ffn_norm)
    return _recorded(  # type: ignore[no-any-return]
        *(_EndNode, told, x, terms.query, terms.key, terms.value, terms.lengths, *seeds),
        *(tensor for part in parameters for tensor in part),
    )


def _recorded(node: Any, *args: Any) -> Any:
    """`node.apply(*args)`, but for its look at each argument for what function transforms have left."""
    return super(torch.autograd.Function, node).apply(*args)


class _Begin(NamedTuple):
    """What the first node is told beside its tensors."""

    weights: int  # so many, side by side
    eps: float
    layout: str
    head_dim: int


class _End(NamedTuple):
    """What the second node is told beside its tensors."""

    attention: tuple[int, float, bool, int, int]  # longest, scale, is_causal, window to the left and right
    dropouts: tuple[float, float, float]
    attention_eps: float
    ffn_eps: float
    layout: str
    activation: str
    position: str
    by_torch: list[bool]
    recompute: bool


def _by_library(formula: Callable[..., _Tensors]) -> Callable[..., _Tensors]:
    """Decorates `formula(ctx, saved, *grads) -> gradients` for a node, which has no second derivative.

    What is saved is read once, which is as often as checkpointing lets it be.
    """

    def backward(ctx: Any, *grads: Tensor) -> _Tensors:
        saved, device = ctx.saved_tensors, grads[0].device.type
        again = torch.is_grad_enabled()
        if not again and not torch.is_autocast_enabled(device):
            return formula(ctx, saved, *grads)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            results = formula(ctx, saved, *grads)
        witness = next((t for t in (*grads, *saved) if t is not None and t.requires_grad), None)
        return _Refused.apply(witness, *results) if again and witness is not None else results  # type: ignore[no-any-return, no-untyped-call]

    return backward


class _Refused(torch.autograd.Function):
    """Gradients that depend on `witness` by no formula."""

    @staticmethod
    def forward(ctx: Any, witness: Tensor, *results: Tensor | None) -> _Tensors:
        return tuple(None if r is None else r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            "a patched layer has no second derivative (create_graph=True and then backward again); use the "
            "model as it was before bigmodel_kernels.patch for that"
        )


class _BeginNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, told: _Begin, x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, *qkv: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = list(qkv[: told.weights]), list(qkv[told.weights :])
        rows = states = cuda_linear.rows_of(x)
        if norm_weight is not None:
            states, _ = cuda_linear.normalise(rows, norm_weight, norm_bias, told.eps, "layer_norm")
        out = torch.ops.bigmodel.cuda_layer_begin.default(
            states, None, None, 0.0, weights, biases, told.layout
        )
        ctx.told, ctx.size = told, x.shape
        weights_are_trained = any(ctx.needs_input_grad[4 : 4 + told.weights])
        ctx.save_for_backward(
            None if norm_weight is None else rows,
            states if weights_are_trained else None,
            *(norm_weight, *weights),
        )
        return split_heads(out.view(*x.shape[:-1], out.shape[1]), told.head_dim)

    @staticmethod
    @_by_library
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> _Tensors:
        rows, states, norm_weight, *weights = saved
        told = ctx.told
        parts = [grad.flatten(-2) for grad in grads]
        whole = whole_of(parts)
        if whole is None:
            whole = torch.cat(parts, -1)
        needs = ctx.needs_input_grad[1:]
        asked = [*needs, *(False,) * (3 + 2 * told.weights - len(needs))]
        results = torch.ops.bigmodel.cuda_layer_begin_backward.default(
            *(cuda_linear.rows_of(whole), rows, states, norm_weight),
            *(told.eps, weights, told.layout, asked),
        )
        dx, *others = gradients(results, asked)
        return None, None if dx is None else dx.view(ctx.size), *others[: len(needs) - 1]


class _EndNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        told: _End,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor | None,
        attention_seed: Tensor | None,
        context_seed: Tensor | None,
        ffn_seed: Tensor | None,
        *parameters: Tensor | None,
    ) -> Tensor:
        (
            w_context, b_context, attention_norm_weight, attention_norm_bias,
            w_in, b_in, w_out, b_out, norm_weight, norm_bias,
        ) = parameters  # fmt: skip
        attention_p, context_p, ffn_p = told.dropouts
        dropouts = (attention_seed, attention_p, context_seed, context_p, ffn_seed, ffn_p)
        out, context, logsumexp, total, normalised, preactivation, ffn_total = (
            torch.ops.bigmodel.cuda_layer_end_training.default(
                *(cuda_linear.rows_of(x), query, key, value, lengths, *told.attention, *dropouts),
                *(w_context, b_context, attention_norm_weight, attention_norm_bias, told.attention_eps),
                *(w_in, b_in, w_out, b_out, told.layout, told.activation, told.position),
                *(norm_weight, norm_bias, told.ffn_eps, told.by_torch, told.recompute),
            )
        )
        ctx.told, ctx.size = told, x.shape
        ctx.save_for_backward(
            *(query, key, value, lengths, attention_seed, context_seed, ffn_seed),
            *(context, logsumexp, total, normalised),
            None if told.recompute else preactivation,
            ffn_total if told.position == "post" else None,
            *(w_context, attention_norm_weight, w_in, b_in if told.recompute else None, w_out, norm_weight),
        )
        return out.view(x.shape)  # type: ignore[no-any-return]

    @staticmethod
    @_by_library
    def backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> _Tensors:
        query, key, value, lengths, attention_seed, context_seed, ffn_seed, *kept = saved
        *kept, w_context, attention_norm_weight, w_in, b_in, w_out, norm_weight = kept
        told = ctx.told
        attention_p, context_p, ffn_p = told.dropouts
        needs = ctx.needs_input_grad
        asked = [*needs[1:5], *needs[9:]]
        results = torch.ops.bigmodel.cuda_layer_end_backward.default(
            *(cuda_linear.rows_of(grad), query, key, value, lengths, *told.attention),
            *(attention_seed, attention_p, context_seed, context_p, ffn_seed, ffn_p),
            *(*kept, w_context, attention_norm_weight, told.attention_eps, w_in, b_in, w_out),
            *(told.layout, told.activation, told.position, norm_weight, told.ffn_eps, asked),
        )
        dx, dquery, dkey, dvalue, *others = gradients(results, asked)
        dx = None if dx is None else dx.view(ctx.size)
        return None, dx, dquery, dkey, dvalue, None, None, None, None, *others
