"""Layers with LayerNorms and a plain feed-forward, after GPT-2: OPT, GPT-NeoX, GPT-J, GPT-Neo and BLOOM, and
encoders with norms before their halves (ViT, CLIP, ...), which have no cache.

A family says in a `Kin` which its classes are and what their parts are called, and puts the forms below in
front of them:

    KIN = Kin(hf.GPTJAttention, hf.GPTJBlock, ..., rotary="interleaved")

    class BigmodelGPTJAttention(gpt_like.Attention, hf.GPTJAttention, kin=KIN): ...

Per layer: LayerNorm, one product for Q, K and V, rotary embedding where there is one, attention over the
cache, projection + residual in one call, and LayerNorm + feed-forward + residual in one. Where attention and
feed-forward stand side by side, the sum of the first is the residual of the second. A fused weight that holds
query, key and value of each head in turn is multiplied as it is, and attention reads the three in place.

Norms are called as modules if they are not as known, so that one with a hook is heard; a projection that peft
has given a LoRA adapter and a feed-forward without a kernel are called as they are. A call takes the original
code of a layer, and is as right, when attention probabilities are asked for (then computed in plain PyTorch
from the same Q and K), with a cache that is quantised, and where a hook or a replaced module stands in the
way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticCache

from bigmodel_kernels.ops.registration import call
from bigmodel_kernels.transformers import (
    attention_interface,
    blocks,
    checks,
    crossed_layers,
    fused_loss,
    layer_stack,
    packed_encoder,
    paged,
    whole_layer,
)
from bigmodel_kernels.transformers.blocks import DecoderParts, FeedForward, LayerParts
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear, Form, is_form


def head_by_head(whole: Tensor, head_dim: int, queries: int) -> tuple[Tensor, ...]:
    """Query, key and value, each (..., heads, head_dim), of a product that has, for each key in turn, the
    queries that share it, the key and the value.
    """
    query, key, value = whole.unflatten(-1, (-1, queries + 2, head_dim)).split((queries, 1, 1), -2)
    return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)


def in_thirds(whole: Tensor, head_dim: int, queries: int) -> tuple[Tensor, ...]:
    """The same of a product that has all of each in turn."""
    return whole.unflatten(-1, (3, -1, head_dim)).unbind(-3)


@dataclass(frozen=True)
class Kin:
    """The classes of one model, the names of their parts, and the patched form of each class."""

    attention: type[nn.Module]
    layer: type[nn.Module]
    mlp: type[nn.Module] | None  # None: its projections are the layer's own
    model: type[nn.Module] | tuple[type[nn.Module], ...]  # what makes the masks
    causal_lm: type[nn.Module] | None
    # Names in the layer; dotted for what is deeper.
    attention_at: str
    mlp_at: str
    #: None: one norm for both halves. A function of the layer where not all have the same.
    norms: tuple[str, str | None] | Callable[[Any], tuple[str, str | None]]
    #: Modules or numbers, of attention's output and of the feed-forward's; "" for none.
    dropouts: tuple[str, str] = ("", "")
    #: Whether halves side by side are dropped as one sum, by the second of these.
    drops_the_sum: bool = False
    linear: type[nn.Module] = nn.Linear  # the class of all projections
    # Names in the attention.
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    #: Of one weight for all three, from the head size and the number of queries that share a key.
    split: Callable[[Tensor, int, int], tuple[Tensor, ...]] = head_by_head
    #: For another order than head by head: the equal pieces of that weight in the order query, key, value.
    pieces: tuple[int, ...] = ()
    queries: Callable[[Any], int] = lambda attention: 1
    #: How often a key stands in the cache.
    repeats: Callable[[Any], int] = lambda attention: 1
    out: str = "out_proj"
    head_dim: str = "head_dim"
    attention_dropout: str | Callable[[Any], str] = "attention_dropout"  # a function of the attention
    index: str = "layer_idx"
    # Names in the feed-forward.
    w_in: str = "fc1"
    w_out: str = "fc2"
    activation: str = "act"
    w_gate: str = ""  # if it is gated
    #: Whether `w_in` holds gate and up: two products, and all between by the model's own modules, or what the
    #: form's `joined` gives of a dtype.
    gated: bool = False
    #: "half", "interleaved", or none. GPT-J has its sines first.
    rotary: str = ""
    sine_first: bool = False
    #: What layer and attention may be given by position, after the states.
    positional: tuple[str, ...] = ()
    #: Whether a layer gives the probabilities too.
    gives_weights: bool = False
    #: "pre", "post" or "parallel", of a layer.
    order: Callable[[Any], str] = lambda layer: "pre"
    #: Whether the attention's own code calls transformers' attention interface; else it reads dense masks.
    interface: bool = True
    #: If it does not: whether it takes boolean masks of four dimensions for what is visible, as sdpa.
    reads_booleans: bool = False
    #: Whether the model asks for masks in full, and adds ALiBi to them.
    asks_for_full_masks: bool = False
    #: For attention that makes its own causal mask next to the one that it gets: the window of that, which is
    #: None for all keys. Its cache must be one that grows.
    masks_itself: Callable[[Any], int | None] | None = None
    scale: Callable[[Any], float] = lambda attention: float(attention.scaling)
    #: Whether attention and feed-forward get the residual after the states, and add it; attention then gets
    #: `alibi` too.
    adds_residual: bool = False
    #: Classes between model and layer, and between layer and attention.
    above: tuple[type[nn.Module], ...] = ()
    around: tuple[type[nn.Module], ...] = ()
    #: Reasons of the family's own to leave an attention or a feed-forward alone.
    refuse: Callable[[Any], str | None] = lambda attention: None
    refuse_mlp: Callable[[Any], str | None] = lambda mlp: None
    #: LayerNorms and projections of the model itself.
    last_norms: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    forms: dict[type, type] = field(default_factory=dict)

    @property
    def models(self) -> tuple[type[nn.Module], ...]:
        return self.model if isinstance(self.model, tuple) else (self.model,)

    def norms_of(self, layer: Any) -> tuple[str, str | None]:
        return self.norms(layer) if callable(self.norms) else self.norms

    def attention_dropout_of(self, attention: Any) -> str:
        name = self.attention_dropout
        return name(attention) if callable(name) else name

    @property
    def ffn_projections(self) -> tuple[str, ...]:
        return (self.w_in, self.w_out, self.w_gate) if self.w_gate else (self.w_in, self.w_out)

    def inner(self, name: str) -> tuple[str, str]:
        """The half of the layer that has this dropout, or none, and its name there."""
        for place in (self.attention_at, self.mlp_at):
            if place and name.startswith(place + "."):
                return place, name[len(place) + 1 :]
        return "", name


class Attention(Form):
    """One product for Q, K and V, rotary, and attention over the cache."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = 1 if self.kin.adds_residual else 0
        given, p = _given(self, args[count:], kwargs), _dropped_inside(self, self.kin, 0)
        if given is None or p is None or len(args) < count:
            return super().forward(hidden_states, *args, **self._for_its_own_code(hidden_states, kwargs))
        context, weights = self.context(hidden_states, given)
        part = blocks.part(
            self.__dict__["_modules"][self.kin.out], self.kin.linear, checks.dtype_of(hidden_states)
        )
        if self.kin.adds_residual:
            return blocks.output(context, part, "linear", args[0], p), weights
        out = blocks.project(context, part, "linear")
        return torch.dropout(out, p, True) if p else out, weights

    def context(self, hidden_states: Tensor, given: Given) -> tuple[Tensor, Tensor | None]:
        """The heads' results side by side, and the probabilities where they are asked for."""
        query, key, value = (t.transpose(1, 2) for t in self._heads(hidden_states))
        if given.angles is not None:
            query, key = self._turned(query, key, *given.angles)
        told: dict[str, Any] = {}
        if given.cache is not None:
            if (times := self.kin.repeats(self)) != 1:
                key, value = (t.repeat_interleave(times, dim=1) for t in (key, value))
            key, value, told = attention_interface.updated(
                given.cache, key, value, getattr(self, self.kin.index), given.told
            )
        out, weights = self._attend(query, key, value, given, told)
        return out.flatten(2), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, given: Given, told: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        scale = self.kin.scale(self)
        window = attention_interface.own_window(self)
        if given.packing is not None:
            args = (given.mask, given.packing, scale, given.dropout_p, window)
            out = attention_interface.packed_attention(query, key, value, *args)
            return out, None
        if self.kin.masks_itself is not None:
            seen = attention_interface.visibility(query, key.shape[2], given.mask, is_causal=True)
            seen.causal, seen.window = query.shape[2] > 1, self.kin.masks_itself(self)
            return attention_interface.attend(
                *(self, query, key, value, seen, scale), p=given.dropout_p, wanted=given.output_attentions
            )
        return attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            given.mask,
            dropout=given.dropout_p,
            scaling=scale,
            is_causal=given.is_causal,
            sliding_window=window,
            position_bias=self._alibi(query, given),
            output_attentions=given.output_attentions,
            **told,
        )

    def _for_its_own_code(self, states: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of its own code, which without transformers' interface reads dense masks."""
        keys, cache = states.shape[1], attention_interface.cache_of(kwargs)
        if self.kin.interface or paged.is_paged(cache):
            return kwargs
        if cache is not None:
            keys = cache.get_mask_sizes(keys, getattr(self, self.kin.index))[0]
        return {
            **kwargs,
            "attention_mask": attention_interface.additive(kwargs.get("attention_mask"), states, keys),
        }

    def _alibi(self, query: Tensor, given: Given) -> Tensor | None:
        """What is added to the logits, (B, H, 1, Sk)."""
        alibi = given.alibi
        return None if alibi is None else alibi.view(*query.shape[:2], *alibi.shape[1:])

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each (B, S, H, D), before they are turned."""
        modules, dtype = self.__dict__["_modules"], checks.dtype_of(x)
        parts = tuple(blocks.part(modules[name], self.kin.linear, dtype) for name in self.kin.qkv)
        head_dim = getattr(self, self.kin.head_dim)
        if len(parts) == 1:
            whole = blocks.project(x, parts[0], "linear")
            return self.kin.split(whole, head_dim, self.kin.queries(self))  # type: ignore[no-any-return]
        return blocks.heads(x, parts, "linear", head_dim)

    def _turned(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(query.dtype, key.dtype)
        if cos.dtype not in (dtype, torch.float32):
            dtype = torch.promote_types(dtype, cos.dtype)  # as the products of the model's own code
            cos, sin = cos.to(dtype), sin.to(dtype)
        interleaved = self.kin.rotary == "interleaved"
        return call("rotary", query.to(dtype), key.to(dtype), cos, sin, interleaved=interleaved)  # type: ignore[no-any-return]


class MLP(Form):
    """The feed-forward in one call."""

    def forward(self, hidden_states: Any, *args: Any) -> Tensor:
        ffn, p = _ffn(self, self.kin, checks.dtype_of(hidden_states)), _dropped_inside(self, self.kin, 1)
        if ffn is None or p is None or checks.watched_globally():
            return super().forward(hidden_states, *args)  # type: ignore[no-any-return]
        return blocks.feed_forward(hidden_states, ffn, "linear", args[0] if args else None, dropout_p=p)


class Layer(layer_stack.Layer):
    """The whole layer, norms and sums in the calls of its halves."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        attention, given, parts = _attention_of(self), None, None
        if attention is not None:
            given = _given(attention, args, kwargs)
        if given is not None and given.told is None:
            all_layers = _rows if self.kin.causal_lm is None else _tokens
            out = layer_stack.result(self, kwargs, partial(all_layers, hidden_states, given))
            if out is not None:
                return self.gives(out)
        if given is not None and not attention_interface.wants_attentions(kwargs):
            parts = self._parts(attention, checks.dtype_of(hidden_states))
        if parts is None:
            return packed_encoder.own_code(super().forward, hidden_states, args, kwargs)
        x = packed_encoder.rows(hidden_states, kwargs)
        return self.gives(blocks.decoder_layer(x, parts, lambda x: attention.context(x, given)[0]))

    def gives(self, out: Tensor) -> Any:
        return (out, None) if self.kin.gives_weights else out

    def _parts(self, attention: Any, dtype: torch.dtype | None) -> DecoderParts | None:
        """All of it, or None if a dropout is not plain."""
        kin, modules = self.kin, self.__dict__["_modules"]
        attention_p, ffn_p = (checks.probability(self, name) for name in kin.dropouts)
        order = kin.order(self)
        if order == "parallel" and kin.drops_the_sum:
            attention_p, ffn_p = 0.0, None if ffn_p else 0.0
        if attention_p is None or ffn_p is None:
            return None
        mlp = modules[kin.mlp_at] if kin.mlp_at else self
        before, behind = kin.norms_of(self)
        first = modules[before]
        second = None if behind is None else modules.get(behind)  # StableLM may have none
        ffn = _ffn(mlp, kin, dtype) if mlp is self or is_form(mlp, kin.mlp) else None
        if ffn is None and kin.adds_residual:
            return None
        return DecoderParts(
            order=order,
            attention_norm=blocks.part(first, nn.LayerNorm, dtype),
            attention_eps=blocks.eps_of(first),
            attention_out=blocks.part(attention.__dict__["_modules"][kin.out], kin.linear, dtype),
            attention_p=attention_p,
            ffn_norm=None if second is None else blocks.part(second, nn.LayerNorm, dtype),
            ffn_eps=blocks.eps_of(first if second is None else second),
            ffn=ffn,
            unfused=partial(_unfused, self, ffn_p),
            ffn_p=ffn_p,
        )


# ------------------------------------------------------------------------------------------------------------
# arguments and weights, read at each call


def _tokens(x: Tensor, given: Given, stack: layer_stack.Stack) -> Tensor | None:
    """The result of all layers for the next tokens of sequences, or None (see `whole_layer.tokens`)."""
    first: Any = stack.layers[0]
    kin, order = first.kin, first.kin.order(first)
    if not whole_layer.few(x) or given.packing is not None:
        return None
    if given.angles is not None and given.angles[0].dtype not in (x.dtype, torch.float32):
        return None

    def read(layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
        parts = whole_parts(layer, dtype) if checks.intact(layer, kin.forms[kin.layer]) else None
        if parts is None or kin.order(layer) != order:
            return None
        attention: Any = _attention_of(layer)
        queries = kin.queries(attention)
        where = layer_stack.Where.of(
            getattr(attention, kin.index), parts, kin.scale(attention), attention, queries
        )
        if kin.masks_itself is not None:
            where = where._replace(window=kin.masks_itself(attention))
        uneven = len(kin.qkv) == 1 and queries > 1 and where.kv_heads > 1
        return None if uneven else (parts, where)

    layers = layer_stack.layers_of(stack, x, "linear", read)
    if layers is None or not layer_stack.causal(x, layers.given, given.is_causal):
        return None
    cached = layer_stack.within(stack, layers.given, given.cache, given.mask)
    if cached is None:
        return None
    how = whole_layer.How(
        order=order,
        interleaved=kin.rotary == "interleaved",
        head_by_head=len(kin.qkv) == 1 and kin.split is head_by_head,
    )
    attention: Any = _attention_of(first)
    alibi = attention._alibi(x.new_empty(len(x), layers.given[0].kv_heads * kin.queries(attention), 0), given)
    biases = [] if alibi is None else [alibi.contiguous()]
    angles = [] if given.angles is None else [given.angles]
    return whole_layer.tokens(x, layers, cached, how, angles, biases)


def _rows(x: Tensor, given: Given, stack: layer_stack.Stack) -> Tensor | None:
    """The result of all layers of an encoder without positions in its layers, or None (see
    `whole_layer.encoded`).
    """
    first: Any = stack.layers[0]
    kin, order = first.kin, first.kin.order(first)
    plain = given.packing is None and given.angles is None and given.alibi is None
    if given.cache is not None or order == "parallel" or not plain or not whole_layer.few(x):
        return None

    def read(layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, tuple[float, bool]] | None:
        parts = whole_parts(layer, dtype) if checks.intact(layer, kin.forms[kin.layer]) else None
        if parts is None or kin.order(layer) != order:
            return None
        attention: Any = _attention_of(layer)
        return parts, (kin.scale(attention), bool(attention.is_causal))

    layers = layer_stack.layers_of(stack, x, "linear", read)
    if layers is None or not layers.takes or len(set(layers.given)) > 1:
        return None
    scale, causal = layers.given[0]
    mask = given.mask
    if mask is None:
        causal = causal if given.is_causal is None else given.is_causal
    elif mask.dim() == 2 and mask.shape == x.shape[:2]:
        causal, mask = True, mask.bool()
    else:
        causal, mask = False, crossed_layers.keys_seen(mask, x)
        if mask is None or mask.shape != x.shape[:2]:
            return None
    return whole_layer.encoded(
        x, layers, scale, mask, None, 0, whole_layer.How(order=order), (), (), (), causal
    )


def whole_parts(layer: Any, dtype: torch.dtype | None) -> LayerParts | None:
    """All of a layer whose three projections lie apart, or in one head by head, in thirds or in pieces."""
    kin, attention = layer.kin, _attention_of(layer)
    if attention is None or kin.order(layer) not in ("pre", "post", "parallel"):
        return None
    if len(kin.qkv) == 1 and kin.split not in (head_by_head, in_thirds) and not kin.pieces:
        return None
    w, p = layer._parts(attention, dtype), checks.probability(attention, kin.attention_dropout_of(attention))
    if w is None or p is None or kin.repeats(attention) != 1:
        return None
    if w.ffn_norm is None and w.order != "parallel":
        return None
    projections = attention.__dict__["_modules"]
    qkv = tuple(blocks.part(projections[name], kin.linear, dtype) for name in kin.qkv)
    if any(isinstance(part, nn.Module) for part in qkv):
        return None
    if kin.pieces:
        qkv = _in_pieces(qkv[0], kin.pieces)
        if not qkv:
            return None
    norm = None if checks.intact(w.attention_norm, nn.Identity) else w.attention_norm
    return LayerParts(
        qkv=qkv,
        head_dim=getattr(attention, kin.head_dim),
        attention_out=w.attention_out,
        attention_norm=norm,
        attention_eps=w.attention_eps,
        attention_p=p,
        context_p=w.attention_p,
        ffn=w.ffn,
        ffn_norm=w.ffn_norm,
        ffn_eps=w.ffn_eps,
        ffn_p=w.ffn_p,
        unfused=w.unfused,
    )


def _in_pieces(joined: Any, order: tuple[int, ...]) -> tuple[blocks.Affine, ...]:
    """The pieces of one weight without a bias in this order; none if it cannot be read so."""
    pieces = None if joined.bias is not None else blocks.pieces(joined.weight, len(order))
    return () if pieces is None else tuple(blocks.Affine(pieces[i], None) for i in order)


class Given(NamedTuple):
    """What attention is called with beside the hidden states."""

    angles: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    cache: Any
    is_causal: bool | None
    output_attentions: bool
    dropout_p: float
    alibi: Tensor | None = None
    packing: blocks.Packing | None = None
    told: dict[str, Any] | None = None


def _given(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    """The arguments of a layer or of its attention; None if its own code has to read them."""
    known = attention.kin.positional
    kwargs, args = {**dict(zip(known, args, strict=False)), **kwargs}, args[len(known) :]
    mask, cache, angles = kwargs.get("attention_mask"), attention_interface.cache_of(kwargs), None
    dropout_p = checks.probability(attention, attention.kin.attention_dropout_of(attention))
    packing = kwargs.get(packed_encoder.ARGUMENT)
    told = paged.arguments(cache, kwargs) if attention.kin.interface else None
    if (
        args
        or dropout_p is None
        or (told is None and type(cache) not in attention_interface.CACHES)
        or not attention_interface.readable(mask)
        or (packing is not None and not attention_interface.packable(mask))
        or (attention.kin.interface and not attention_interface.gets_readable_masks(attention))
        or checks.watched_globally()
    ):
        return None
    if attention.kin.rotary and kwargs.get("alibi") is None:
        angles = _angles(attention.kin, kwargs.get("position_embeddings"))
        if angles is None:
            return None
        if packing is not None:
            cos, sin = (packing.rows(t.expand(packing.shape[0], -1, -1)) for t in angles)
            angles = cos, sin
    grows = attention.kin.masks_itself is not None  # it takes the last key for that of the last query
    adds = not (attention.kin.interface or attention.kin.reads_booleans)  # what is True in a mask as a one
    if (grows and type(cache) is StaticCache) or (
        adds and mask is not None and mask.dim() == 4 and mask.dtype == torch.bool
    ):
        return None
    wanted = bool(kwargs.get("output_attentions"))
    causal, alibi = kwargs.get("is_causal"), kwargs.get("alibi")
    return Given(angles, mask, cache, causal, wanted, dropout_p, alibi, packing, told)


def _angles(kin: Kin, positions: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines, every angle once."""
    if not isinstance(positions, (tuple, list)) or len(positions) != 2 or positions[0].dim() != 3:
        return None
    cos, sin = reversed(positions) if kin.sine_first else positions
    return blocks.half((cos, sin)) if kin.rotary == "half" else (cos, sin)


def _attention_of(layer: Any) -> Any:
    """The attention of a layer if it is in its patched form, and what is around it is as known."""
    part = layer
    *outer, last = layer.kin.attention_at.split(".")
    for name in outer:
        part = part.__dict__["_modules"][name]
        if not any(checks.intact(part, cls) for cls in layer.kin.around):
            return None
    part = part.__dict__["_modules"][last]
    return part if is_form(part, layer.kin.attention) else None


def _dropped_inside(half: Any, kin: Kin, which: int) -> float | None:
    """The same for the dropout of a half of the layer, 0 where the layer has it."""
    place, name = kin.inner(kin.dropouts[which])
    return checks.probability(half, name) if place else 0.0


def _ffn(mlp: Any, kin: Kin, dtype: torch.dtype | None) -> FeedForward | None:
    """Its weights, if one call may read them all."""
    if kin.gated:
        return mlp.joined(dtype)  # type: ignore[no-any-return]
    w_in, w_out, *gate = kin.ffn_projections
    return blocks.feed_forward_of(
        mlp, w_in, w_out, kin.activation, dtype, gate[0] if gate else None, linear=kin.linear
    )


def _unfused(layer: Any, p: float, x: Tensor) -> Tensor:
    """The feed-forward with its dropout by the layer's own modules."""
    kin = layer.kin
    if kin.mlp_at:
        y: Tensor = getattr(layer, kin.mlp_at)(x)
        if kin.inner(kin.dropouts[1])[0]:
            return y
    else:
        modules = layer.__dict__["_modules"]
        y = modules[kin.w_out](modules[kin.activation](modules[kin.w_in](x)))
    return torch.dropout(y, p, True) if p else y


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def _calls_the_interface(kin: Kin) -> bool:
    """Whether the installed transformers' file of this model calls the attention interface (it came late)."""
    return hasattr(sys.modules[kin.attention.__module__], "ALL_ATTENTION_FUNCTIONS")


def _check_attention(kin: Kin, module: Any) -> str | None:
    if kin.interface and not _calls_the_interface(kin):
        return "this version of transformers computes its attention without the attention interface"
    why = checks.reason_for_parts(module, dict.fromkeys((*kin.qkv, kin.out), kin.linear), lora=True)
    for place, name in (
        kin.inner(kin.dropouts[0]),
        (kin.attention_at, kin.attention_dropout_of(module)),
    ):
        if why is None and place and name and isinstance(getattr(module, name), nn.Module):
            why = checks.reason_for_parts(module, {name: _dropout_class(module, name)})
    if why is not None:
        return why
    head_dim = getattr(module, kin.head_dim)
    if head_dim > 256:
        return f"head size {head_dim}; allowed are 1 to 256"
    features = [checks.without_adapter(module.get_submodule(name)).out_features for name in kin.qkv]
    if len(features) == 1 and features[0] % (count := kin.queries(module) + 2) == 0:
        shared_width = features[0] // count
        features = [features[0] - 2 * shared_width, shared_width, shared_width]
    query, *shared = features
    if len(set(shared)) != 1 or shared[0] % head_dim or query % shared[0]:
        return (
            f"query, key and value have {features} features; allowed are heads of {head_dim}, as many for "
            "key as for value, and a multiple of that for query"
        )
    return kin.refuse(module)


def _dropout_class(module: Any, name: str) -> type[nn.Module]:
    """What a dropout has to be: some models have nn.Identity for none."""
    return nn.Identity if type(getattr(module, name)) is nn.Identity else nn.Dropout


def refuse_head_norms(attention: Any) -> str | None:
    """Of Phi and StableLM: norms of queries and keys are not among our calls."""
    return "qk_layernorm=True: norms of the heads are not known" if attention.qk_layernorm else None


def refuse_rotary(attention: Any) -> str | None:
    """Of GPT-J and CodeGen: why their own rotary embedding is not one of ours."""
    size = attention.head_dim if attention.rotary_dim is None else attention.rotary_dim
    if size % 2 or not 0 < size <= attention.head_dim:
        return f"rotary_dim is {size}; allowed are even numbers from 2 to the head size, {attention.head_dim}"
    return None


def _check_mlp(kin: Kin, module: Any) -> str | None:
    parts: dict[str, type] = dict.fromkeys(kin.ffn_projections, kin.linear)
    place, name = kin.inner(kin.dropouts[1])
    if place and isinstance(getattr(module, name), nn.Module):
        parts[name] = _dropout_class(module, name)
    why = checks.reason_for_parts(module, parts, lora=True)
    if why is None and not kin.gated:  # else the activation is called as it is
        why = checks.reason_for_activation(getattr(module, kin.activation))
    return why or kin.refuse_mlp(module)


def check_layer(kin: Kin, module: Any) -> str | None:
    own = [
        name
        for name in kin.dropouts
        if name and not kin.inner(name)[0] and isinstance(attrgetter(name)(module), nn.Module)
    ]
    why = checks.reason_for_parts(module, dict.fromkeys(own, nn.Dropout))
    why = why or (_check_mlp(kin, module) if kin.mlp is None else None)
    return why or checks.inside(
        module.get_submodule(kin.attention_at),
        kin.attention_at,
        kin.attention,
        kin.forms[kin.attention],
        partial(_check_attention, kin),
    )


def _check_norm(module: Any) -> str | None:
    return None if module.weight is not None else "it has no weights"


# ------------------------------------------------------------------------------------------------------------
# what a family says


def family(name: str, kin: Kin, left: dict[type, str] | None = None) -> Family:
    """The family of these kin; `left` is why other parts of it stay as they are, by class."""
    forms, rules = kin.forms, []
    heads = () if kin.causal_lm is None else (kin.causal_lm,)
    ops: tuple[str, ...] = ("layer_norm",)
    if kin.mlp is not None:
        rules.append(
            Rule(
                kin.mlp,
                forms[kin.mlp],
                ("linear",) if kin.gated else ("feed_forward",),
                partial(_check_mlp, kin),
                "two products: one weight holds gate and up" if kin.gated else "",
                projections=kin.ffn_projections,
            )
        )
    else:
        ops = ("layer_norm", "feed_forward")
    for model in (*kin.models, *kin.above):
        if model in forms:
            note = layer_stack.TOKEN_NOTE if heads else layer_stack.ROWS_NOTE
            rules.append(layer_stack.rule(model, forms[model], note=note))
    return Family(
        name=name,
        rules=(
            Rule(
                kin.layer,
                forms[kin.layer],
                ops,
                partial(check_layer, kin),
                "its halves with their norms and sums",
                projections=() if kin.mlp is not None else kin.ffn_projections,
            ),
            Rule(
                kin.attention,
                forms[kin.attention],
                ("linear", "rotary", "attention") if kin.rotary else ("linear", "attention"),
                partial(_check_attention, kin),
                projections=(*kin.qkv, kin.out),
            ),
            *rules,
        ),
        children=(
            *(
                ChildRule(model, norm, nn.LayerNorm, BigmodelLayerNorm, ("layer_norm",), _check_norm)
                for model in kin.models
                for norm in kin.last_norms
            ),
            *(
                ChildRule(model, projection, nn.Linear, BigmodelLinear, ("linear",))
                for model in kin.models
                for projection in kin.projections
            ),
            *(ChildRule(lm, "lm_head", nn.Linear, BigmodelLinear, ("linear",)) for lm in heads),
        ),
        losses=fused_loss.rules(*forms.values()),
        models=kin.models,
        mask_path=(*kin.above, kin.layer, *kin.around, kin.attention),
        reads_masks_patched=() if _calls_the_interface(kin) else (kin.attention,),
        asks_for_full_masks=kin.asks_for_full_masks,
        left=left or {},
    )


#: Makes the patched form of a causal language model's class: its loss without logits, in training.
causal_lm = fused_loss.language_model
