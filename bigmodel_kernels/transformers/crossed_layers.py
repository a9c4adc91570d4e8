"""All layers of an encoder, or of a decoder that attends to one, in one call (see `layer_stack`): what the
families of `seq2seq_like` and `t5_like` share.

A token of a decoder goes through two attentions in each layer: to the tokens before it, whose keys the call
adds to in the cache, and to what the encoder has made, whose keys are in the cache already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from bigmodel_kernels.transformers import attention_interface, blocks, checks, layer_stack, whole_layer
from bigmodel_kernels.transformers.blocks import Affine, LayerParts

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.seq2seq_like import Given


class CrossedParts(NamedTuple):
    """Of the attention of a layer on the encoder's states: its parts, and where in a cache their keys are."""

    norm: Affine
    eps: float
    query: Affine
    out: Affine
    layer: int
    scale: float

    @staticmethod
    def of(attention: Any, norm: blocks.Part, eps: float, dtype: torch.dtype | None) -> CrossedParts | None:
        """None if one call cannot read them, or the attention drops."""
        query = blocks.part(attention.__dict__["_modules"][attention.qkv[0]], nn.Linear, dtype)
        out = attention.projection(dtype)
        if not (isinstance(norm, Affine) and isinstance(query, Affine) and isinstance(out, Affine)):
            return None
        if checks.probability(attention, "dropout") != 0:
            return None
        return CrossedParts(norm, eps, query, out, attention.layer_idx, float(attention.scaling))

    def around(self) -> tuple[whole_layer.Around, ...]:
        """The tensors, in the order of `whole_layer.Crossed`."""
        return (*self.norm, [self.query.weight], self.query.bias, [self.out.weight], self.out.bias)


#: What a layer's reader says of it: its parts, where in a cache its keys are, and the attention on the
#: encoder's states, if it is wanted.
Read = tuple[LayerParts, tuple[layer_stack.Where, CrossedParts | None]]


def tokens(
    x: Tensor,
    stack: layer_stack.Stack,
    given: Sequence[Given],
    read: Callable[[Any, torch.dtype | None], Read | None],
    how: whole_layer.How,
    biases: Callable[[], Sequence[Tensor]] = lambda: (),
) -> Tensor | None:
    """The result of all layers for the next tokens of sequences, or None (see `whole_layer.tokens`).

    `given` is what the first layer's attentions are: that on the tokens, and if there is one that on the
    encoder's states, whose keys must be in the cache. `biases` makes those of `whole_layer.tokens`.
    """
    own, crossed = given[0], given[1] if len(given) > 1 else None
    if not whole_layer.few(x) or own.packing is not None:
        return None
    if crossed is not None and (type(crossed.cache) is not DynamicCache or not crossed.updated):
        return None

    def gather() -> Any:
        found = layer_stack.read_all(stack.layers, checks.dtype_of(x), read)
        if found is None or crossed is None:
            return found
        around = [item for _, w in found[1] if w is not None for item in w.around()]
        return *found, around

    layers = whole_layer.layers_of(stack.model, stack.layers, x, "linear", gather, crossed is not None)
    if layers is None or not layers.takes:
        return None
    where = [each for each, _ in layers.given]
    if not layer_stack.causal(x, where, own.is_causal):
        return None
    seen = None
    if crossed is not None:
        seen = _crossed(x, layers, crossed)
        if seen is None:
            return None
    cached = [each.within(own.cache, own.mask) for each in where]
    return whole_layer.tokens(x, layers, cached, how, (), biases(), seen)


def encoded(
    x: Tensor,
    stack: layer_stack.Stack,
    given: Given,
    read: Callable[[Any, torch.dtype | None], Read | None],
    how: whole_layer.How,
    biases: Callable[[], Sequence[Tensor]] | None = None,
) -> Tensor | None:
    """The result of all layers of an encoder, or None (see `whole_layer.encoded`); x may be packed.

    `biases` makes those of `whole_layer.encoded`, which depend on the distance of two positions alone. With
    them, padding is left out here, and its states are zeros.
    """
    padding, packing = given.mask, given.packing
    if given.cache is not None or given.states is not None or given.is_causal:
        return None
    packs = packing is None and biases is not None and attention_interface.says_padding(padding)
    if not packs and not whole_layer.few(x):
        return None
    if packing is not None:
        if not attention_interface.hides_keys(padding):
            return None  # a window
    elif padding is not None:
        padding = keys_seen(padding, x)
        if padding is None or padding.shape != x.shape[:2]:
            return None
    layers = layer_stack.layers_of(stack, x, "linear", read)
    if layers is None or not layers.takes or len({where.scale for where, _ in layers.given}) > 1:
        return None
    scale = layers.given[0][0].scale
    added = () if biases is None else biases()
    if packs:
        found = attention_interface.packing_of(padding)
        if found is not None and found.unbroken():
            length = found.longest
            added = [bias[..., :length, :length] for bias in added]
            lengths = (found.cu_seqlens, length)
            out = whole_layer.encoded(found.pack(x), layers, scale, None, *lengths, how, added)
            return None if out is None else found.unpack(out)
    if not whole_layer.few(x):
        return None
    if packing is None:
        return whole_layer.encoded(x, layers, scale, padding, None, 0, how, added)
    lengths = (packing.cu_seqlens, packing.longest)
    out = whole_layer.encoded(x[0], layers, scale, None, *lengths, how)
    return None if out is None else out[None]


def keys_seen(mask: Tensor, x: Tensor) -> Tensor | None:
    """Of a mask that says no more, which keys each sequence of x sees, bool (B, S)."""
    if not attention_interface.hides_keys(mask) or mask.shape[0] not in (1, x.shape[0]):
        return None
    return mask[:, 0, 0].expand(x.shape[0], -1)


def _crossed(x: Tensor, layers: whole_layer.Layers, given: Given) -> whole_layer.Crossed | None:
    """What all layers attend to of the encoder's; None if the cache does not have it."""
    parts, where = layers.around(), [w for _, w in layers.given]
    held, states, mask = given.cache.layers, [], given.mask
    if mask is not None and mask.dim() != 2:
        mask = keys_seen(mask, x)
        if mask is None:
            return None
    if parts is None:
        return None
    for w in where:
        if not given.updated.get(w.layer) or w.layer >= len(held):  # type: ignore[union-attr]
            return None
        for t in (held[w.layer].keys, held[w.layer].values):
            if type(t) is not Tensor or t.dtype is not x.dtype or t.device != x.device or t.stride(-1) != 1:
                return None
            states.append(t)
    return whole_layer.Crossed(parts, [w.eps for w in where], states, mask, [w.scale for w in where])


def layer_parts(
    attention: Any,
    norm: blocks.Part,
    eps: float,
    ffn: blocks.FeedForward | None,
    ffn_norm: blocks.Part,
    ffn_eps: float,
    dtype: torch.dtype | None,
) -> LayerParts | None:
    """Those of a decoder's layer that drops nothing; None if one call cannot read its attention or has no
    feed-forward.
    """
    projections, p = attention.__dict__["_modules"], checks.probability(attention, "dropout")
    qkv = tuple(blocks.part(projections[name], nn.Linear, dtype) for name in attention.qkv)
    if ffn is None or p is None or any(isinstance(part, nn.Module) for part in qkv):
        return None
    return LayerParts(
        qkv=qkv,
        head_dim=getattr(attention, attention.size),
        attention_out=attention.projection(dtype),
        attention_norm=norm,
        attention_eps=eps,
        attention_p=p,
        context_p=0.0,
        ffn=ffn,
        ffn_norm=ffn_norm,
        ffn_eps=ffn_eps,
        ffn_p=0.0,
        unfused=attention.forward,  # never called, for there is a feed-forward
    )
