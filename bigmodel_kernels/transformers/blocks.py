"""The two kinds of transformer layer, as a handful of calls of our operators; families say where the weights
are.

post-norm (BERT, RoBERTa, ...)   x = LN(x + attend(x)),  x = LN(x + ffn(x))
pre-norm  (GPT-2, ...)           x = x + attend(LN(x)),  x = x + ffn(LN(x))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bigmodel_kernels.ops.attention
import bigmodel_kernels.ops.embedding
import bigmodel_kernels.ops.feed_forward
import bigmodel_kernels.ops.linear
import bigmodel_kernels.ops.norm  # noqa: F401  (all five define torch.ops.bigmodel.*)
from bigmodel_kernels.ops.registration import call

Attend = Callable[[Tensor], Tensor]


class Affine(NamedTuple):
    """Weight and bias of a projection or of a norm."""

    weight: Tensor
    bias: Tensor | None


class LayerWeights(NamedTuple):
    """All tensors of one layer, gathered anew for each forward: nothing is remembered between calls."""

    qkv: tuple[Affine, ...]
    attention_out: Affine
    attention_norm: Affine
    attention_eps: float
    ffn_in: Affine
    ffn_out: Affine
    ffn_norm: Affine
    ffn_eps: float
    activation: str


def linear(
    x: Tensor,
    parts: tuple[Affine, ...],
    layout: str,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Affine | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One product for one or several projections of the same input; their outputs lie side by side."""
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) != len(parts):
        biases = [
            part.weight.new_zeros(_width(part, layout)) if part.bias is None else part.bias for part in parts
        ]
    out: Tensor = call(
        "linear",
        x,
        [part.weight for part in parts],
        biases,
        residual,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        weight_layout=layout,
        activation=activation,
        norm_eps=eps,
    )
    return out


def _width(part: Affine, layout: str) -> int:
    return part.weight.shape[1] if layout == "conv1d" else part.weight.shape[0]


def feed_forward(
    x: Tensor,
    ffn_in: Affine,
    ffn_out: Affine,
    layout: str,
    activation: str,
    residual: Tensor | None,
    position: str = "none",
    norm: Affine | None = None,
    eps: float = 1e-5,
) -> Tensor:
    out: Tensor = call(
        "feed_forward",
        x,
        *ffn_in,
        *ffn_out,
        residual,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        activation=activation,
        weight_layout=layout,
        norm_position=position,
        norm_eps=eps,
    )
    return out


def layer_norm(x: Tensor, norm: Affine, eps: float) -> Tensor:
    out: Tensor = call("layer_norm", x, norm.weight, norm.bias, eps, None)
    return out


def post_norm_layer(x: Tensor, w: LayerWeights, attend: Attend, layout: str = "linear") -> Tensor:
    """BERT's layer in four calls. `attend` takes the fused projection (..., 3 * hidden) to (..., hidden)."""
    context = attend(linear(x, w.qkv, layout))
    x = linear(context, (w.attention_out,), layout, residual=x, norm=w.attention_norm, eps=w.attention_eps)
    return feed_forward(x, w.ffn_in, w.ffn_out, layout, w.activation, x, "post", w.ffn_norm, w.ffn_eps)


def pre_norm_layer(x: Tensor, w: LayerWeights, attend: Attend, layout: str = "linear") -> Tensor:
    """GPT-2's layer in five calls."""
    context = attend(linear(layer_norm(x, w.attention_norm, w.attention_eps), w.qkv, layout))
    x = linear(context, (w.attention_out,), layout, residual=x)
    return feed_forward(x, w.ffn_in, w.ffn_out, layout, w.activation, x, "pre", w.ffn_norm, w.ffn_eps)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, 3 * H * D) to three views (B, H, S, D), read in place by attention."""
    batch, length, width = qkv.shape
    query, key, value = (
        qkv.view(batch, length, 3, width // (3 * head_dim), head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    )
    return query, key, value


def merge_heads(out: Tensor) -> Tensor:
    """(B, H, S, D), laid out as (B, S, H, D), to (B, S, H * D); nothing is copied."""
    return out.transpose(1, 2).flatten(2)


class Packing:
    """Batches without their padding: which rows are real, and where the sequences begin.

    `pack` keeps the real tokens in one (tokens, hidden) tensor; `unpack` puts them back, with zeros for the
    padding.
    """

    def __init__(self, mask: Tensor) -> None:
        """mask: bool (B, S), True is a real token; any pattern."""
        self.shape = mask.shape
        lengths = mask.sum(dim=1, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.longest = int(lengths.max())
        self.index = mask.flatten().nonzero().flatten()

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        batch, length = self.shape
        out = torch.zeros(batch * length, x.shape[-1], dtype=x.dtype, device=x.device)
        return out.index_copy(0, self.index, x).view(batch, length, -1)

    def attend(self, head_dim: int, scale: float) -> Attend:
        def run(qkv: Tensor) -> Tensor:
            tokens, width = qkv.shape
            query, key, value = qkv.view(tokens, 3, width // (3 * head_dim), head_dim).unbind(1)
            out: Any = call(
                "attention",
                query,
                key,
                value,
                None,
                None,
                self.cu_seqlens,
                self.cu_seqlens,
                max_seqlen_q=self.longest,
                max_seqlen_k=self.longest,
                softmax_scale=scale,
            )
            return out[0].view(tokens, -1)  # type: ignore[no-any-return]

        return run
