"""A layer in two calls of a compiled library: to query, key and value, and from them to the result.

The calls are those of `blocks`, without the Python between: for a few tokens that takes longer than the
arithmetic, and a GPU waits for it. It is where nobody listens to the operators (see
`ops.registration.call`): on GPUs whose kernels in the CUDA library come before Triton's, where gradients are
wanted too (`training_layer`), and without gradients and dropout on the CPU. Everywhere else, and for what
`held` and `takes` do not take, `blocks` makes its calls.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_kernels import backends
from bigmodel_kernels.ops import cuda_library
from bigmodel_kernels.ops.linear import cuda as cuda_linear
from bigmodel_kernels.ops.linear.cuda_choice import TORCH, Case
from bigmodel_kernels.ops.linear.native import empty, joined, packed_together
from bigmodel_kernels.ops.native_library import contiguous, lacking
from bigmodel_kernels.ops.registration import nobody_listens, plain
from bigmodel_kernels.transformers import training_layer

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.blocks import LayerParts, Part, Terms


class Held(NamedTuple):
    """The weights of a layer as the CPU library reads them."""

    qkv: Tensor
    qkv_bias: Tensor | None
    context: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None


class HeldOnGpu(NamedTuple):
    """Those of query, key and value for the CUDA library, which takes all weights as they are."""

    qkv: list[Tensor]
    qkv_biases: list[Tensor]
    layout: str
    training: bool  # gradients are wanted


def held(x: Tensor, w: LayerParts, layout: str) -> Held | HeldOnGpu | None:
    """The weights of the layer, if it can run so on x; else None."""
    ffn = w.ffn
    training = torch.is_grad_enabled()
    if (
        (not _on_gpu(x) if training else w.attention_p or w.context_p or w.ffn_p)
        or not nobody_listens(x.device.type)
        or not plain(x)
        or backends.forced() not in (None, "native")
        or ffn is None
        or ffn.hidden_p
        or any(
            isinstance(part, nn.Module) for part in (*w.qkv, w.attention_out, w.attention_norm, w.ffn_norm)
        )
    ):
        return None
    qkv: tuple[Any, ...] = w.qkv
    weights, biases = [part.weight for part in qkv], [part.bias for part in qkv if part.bias is not None]
    if len(biases) not in (0, len(qkv)):
        return None
    single: tuple[Any, ...] = (w.attention_out, ffn.w_in, ffn.w_out)
    if _on_gpu(x):
        return _held_on_gpu(x, w, weights, biases, single, layout)
    if lacking("cpu_layer_end", x.dtype) is not None:
        return None
    groups = [weights, *([part.weight] for part in single)]
    if ffn.w_gate is not None:
        groups.append([ffn.w_gate.weight])
    if empty(*(weight for group in groups for weight in group)):
        return None
    first, context, w_in, w_out, *gate = packed_together(groups, layout)
    return Held(first, joined(biases), context, w_in, w_out, gate[0] if gate else None)


def _held_on_gpu(
    x: Tensor, w: LayerParts, qkv: list[Tensor], biases: list[Tensor], single: tuple[Any, ...], layout: str
) -> HeldOnGpu | None:
    ffn = w.ffn
    assert ffn is not None
    if (
        cuda_library.lacking(x)
        or cuda_library.unmeasured(x)
        or ffn.w_gate is not None
        or len(qkv) > cuda_linear.WEIGHTS
        or w.head_dim % 8
        or not x.shape[-1]
        or not x.numel()
    ):
        return None
    training = torch.is_grad_enabled()
    norms = (w.attention_norm, w.ffn_norm)
    tensors = [*qkv, *biases, *(t for part in (*single, *norms) for t in part if t is not None)]  # type: ignore[union-attr]
    for t in tensors:
        if t.data_ptr() % 16 or t.shape[0] % 8 or t.shape[-1] % 8 or not t.is_contiguous():
            return None
    if training and not training_layer.takes_layer(x, tensors):
        return None
    return HeldOnGpu(qkv, biases, layout, training)


def begin(
    x: Tensor, norm: Part | None, eps: float, held: Held | HeldOnGpu, head_dim: int
) -> tuple[Tensor, ...]:
    """Query, key and value of norm(x), each (..., heads, head_dim), side by side in one tensor."""
    weight, bias = (None, None) if norm is None else _affine(norm)
    if isinstance(held, Held):
        qkv = torch.ops.bigmodel.cpu_layer_begin.default(
            *(x.contiguous(), contiguous(weight), contiguous(bias)),
            *(eps, "layer_norm", held.qkv, held.qkv_bias),
        )
    elif held.training:
        return training_layer.begin(x, weight, bias, eps, held, head_dim)
    else:
        qkv = torch.ops.bigmodel.cuda_layer_begin.default(
            cuda_linear.rows_of(x), weight, bias, eps, held.qkv, held.qkv_biases, held.layout
        )
        qkv = qkv.view(*x.shape[:-1], qkv.shape[1])
    return training_layer.split_heads(qkv, head_dim)


def takes(terms: Terms, held: Held | HeldOnGpu, attention_p: float) -> bool:
    """Whether `end` has this attention, with this dropout."""
    if terms.packing is not None:
        return False
    if isinstance(held, Held):
        return True
    # The rest of the library's attention is behind Triton's.
    plain = terms.padding is None and terms.bias is None and not terms.softcap
    if not plain or not all(map(cuda_library.readable, (terms.query, terms.key, terms.value))):
        return False
    return not held.training or training_layer.takes_attention(terms, attention_p)


def end(x: Tensor, terms: Terms, w: LayerParts, held: Held | HeldOnGpu, position: str) -> Tensor:
    """The layer's result; `position` is where the norms of the two halves are, "pre" or "post"."""
    ffn = w.ffn
    assert ffn is not None
    first_norm = _affine(w.attention_norm) if position == "post" else (None, None)
    if isinstance(held, HeldOnGpu):
        attention_out, ffn_norm = _affine(w.attention_out), _affine(w.ffn_norm)
        width = x.shape[-1]
        features = (t.numel() // width for t in (attention_out[0], ffn.w_out.weight))
        by_torch = _by_torch(x.device, x.dtype, width, x.numel() // width, held.layout, *features)
        if held.training:
            return training_layer.end(x, terms, w, held, position, by_torch)
        out = torch.ops.bigmodel.cuda_layer_end.default(
            *(
                cuda_linear.rows_of(x),
                terms.query,
                terms.key,
                terms.value,
                terms.lengths,
                terms.longest,
                terms.sinks,
            ),
            *(terms.scale, terms.is_causal, terms.window_left, terms.window_right),
            *(*attention_out, *first_norm, w.attention_eps),
            *(ffn.w_in.weight, ffn.w_in.bias, ffn.w_out.weight, ffn.w_out.bias, held.layout),
            *(ffn.activation, position, *ffn_norm, w.ffn_eps, by_torch),
        )
        return out.view(x.shape)  # type: ignore[no-any-return]
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


@functools.lru_cache(maxsize=1024)
def _by_torch(
    device: torch.device, dtype: torch.dtype, out: int, rows: int, layout: str, *features: int
) -> tuple[bool, ...]:
    """Whether torch's product of so many features is the faster before a norm that adds the residual."""
    cases = (
        Case(str(dtype)[6:], count, out, layout, "none + residual + layer_norm", rows) for count in features
    )
    return tuple(cuda_linear.remembered(device, case) == TORCH for case in cases)


def _on_gpu(x: Tensor) -> bool:
    return not x.is_cpu


def _affine(part: Part) -> tuple[Tensor, Tensor | None]:
    assert not isinstance(part, nn.Module)  # as `held` has seen
    return part
