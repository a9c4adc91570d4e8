"""A layer in two calls of the compiled library: to query, key and value, and from them to the result.

The calls are those of `blocks`, to the same bits, without the Python between: for a few tokens that takes
longer than the arithmetic. It is for the CPU, in inference, where nobody listens to the operators (see
`ops.registration.call`); everywhere else, and for what `held` does not take, `blocks` makes its calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_kernels import backends
from bigmodel_kernels.ops.linear.native import empty, joined, packed_together
from bigmodel_kernels.ops.native_library import contiguous, lacking
from bigmodel_kernels.ops.registration import nobody_listens, plain

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.blocks import LayerParts, Part, Terms


class Held(NamedTuple):
    """The weights of a layer as the library reads them."""

    qkv: Tensor
    qkv_bias: Tensor | None
    context: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None


def held(x: Tensor, w: LayerParts, layout: str) -> Held | None:
    """The packed weights of the layer, if it can run so on x; else None."""
    ffn = w.ffn
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or not nobody_listens("cpu")
        or not plain(x)
        or lacking("cpu_layer_end", x.dtype) is not None
        or backends.forced() not in (None, "native")
        or ffn is None
        or w.attention_p
        or w.context_p
        or w.ffn_p
        or ffn.hidden_p
        or any(
            isinstance(part, nn.Module) for part in (*w.qkv, w.attention_out, w.attention_norm, w.ffn_norm)
        )
    ):
        return None
    qkv: tuple[Any, ...] = w.qkv
    single: tuple[Any, ...] = (w.attention_out, ffn.w_in, ffn.w_out)
    biases = [part.bias for part in qkv if part.bias is not None]
    groups = [[part.weight for part in qkv], *([part.weight] for part in single)]
    if ffn.w_gate is not None:
        groups.append([ffn.w_gate.weight])
    if len(biases) not in (0, len(qkv)) or empty(*(weight for group in groups for weight in group)):
        return None
    first, context, w_in, w_out, *gate = packed_together(groups, layout)
    return Held(first, joined(biases), context, w_in, w_out, gate[0] if gate else None)


def begin(x: Tensor, norm: Part | None, eps: float, held: Held) -> Tensor:
    """Query, key and value of norm(x), side by side (..., 3 * hidden)."""
    weight, bias = (None, None) if norm is None else _affine(norm)
    return torch.ops.bigmodel.cpu_layer_begin.default(  # type: ignore[no-any-return]
        *(x.contiguous(), contiguous(weight), contiguous(bias), eps, "layer_norm", held.qkv, held.qkv_bias)
    )


def end(x: Tensor, terms: Terms, w: LayerParts, held: Held, position: str) -> Tensor:
    """The layer's result; `position` is where the norms of the two halves are, "pre" or "post"."""
    ffn = w.ffn
    assert ffn is not None
    first_norm = _affine(w.attention_norm) if position == "post" else (None, None)
    return torch.ops.bigmodel.cpu_layer_end.default(  # type: ignore[no-any-return]
        *(x.contiguous(), terms.query, terms.key, terms.value),
        *(contiguous(terms.padding), terms.bias, contiguous(terms.lengths), terms.longest, terms.sinks),
        *(terms.scale, terms.is_causal, terms.window_left, terms.window_right, terms.softcap),
        *(
            held.context,
            contiguous(_affine(w.attention_out)[1]),
            *map(contiguous, first_norm),
            w.attention_eps,
        ),
        *(held.w_in, contiguous(ffn.w_in.bias), held.w_out, contiguous(ffn.w_out.bias)),
        *(held.w_gate, None if ffn.w_gate is None else contiguous(ffn.w_gate.bias)),
        *(ffn.activation, position, *map(contiguous, _affine(w.ffn_norm)), w.ffn_eps, "layer_norm"),
    )


def _affine(part: Part) -> tuple[Tensor, Tensor | None]:
    assert not isinstance(part, nn.Module)  # as `held` has seen
    return part
