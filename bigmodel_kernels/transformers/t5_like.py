"""T5 and the models that are T5 under other names: mT5, and UMT5, which has relative positions in each layer.

A family says in a `Kin` which its classes are, and puts the forms below in front of them:

    KIN = Kin.of(hf, "T5")

    class BigmodelT5Attention(t5_like.Attention, hf.T5Attention, kin=KIN): ...

A layer consists of two or three modules, each with its norm and its sum: attention, in the decoder attention
on the encoder's states, feed-forward. Each is one module here too: RMSNorm, one product for Q, K and V,
attention over the cache, projection + residual in one call; RMSNorm + feed-forward, gated or not, + residual
in one. Logits have no scale. Relative positions are a bias (1, H, Sq, Sk) that the model's own code makes,
once for all layers of a stack (UMT5: in each layer), and that the operator adds; where there are none, in
cross-attention, there is no tensor of zeros. What `seq2seq_like` says of caches, padding and fallbacks holds.

In training T5 drops in the hidden layer of the feed-forward, which then runs as two or three products. Where
`wo` is kept in float32 next to half precision, as transformers does for float16, the feed-forward is called
as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_kernels.transformers import (
    blocks,
    checks,
    crossed_layers,
    fused_loss,
    layer_stack,
    llama_like,
    packed_encoder,
    seq2seq_like,
    whole_layer,
)
from bigmodel_kernels.transformers.blocks import Affine, FeedForward
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear, Form, is_form
from bigmodel_kernels.transformers.seq2seq_like import Given


@dataclass(frozen=True)
class Kin:
    """The classes of one model, and the patched form of each that has one."""

    attention: type[nn.Module]
    self_attention: type[nn.Module]
    cross_attention: type[nn.Module]
    feed_forward: type[nn.Module]
    dense: type[nn.Module]
    gated_dense: type[nn.Module]
    norm: type[nn.Module]
    block: type[nn.Module]
    stack: type[nn.Module]
    causal_lm: type[nn.Module]
    # Read by `llama_like.RMSNorm`: nothing is added to the weights, and the result keeps the type it gets.
    offset: float = 0.0
    keeps_dtype: bool = False
    forms: dict[type, type] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any, prefix: str) -> Kin:
        """The classes of transformers' `module`, whose names begin with `prefix`."""
        names = (
            *("Attention", "LayerSelfAttention", "LayerCrossAttention", "LayerFF", "DenseActDense"),
            *("DenseGatedActDense", "LayerNorm", "Block", "Stack", "ForConditionalGeneration"),
        )
        return cls(*(getattr(module, prefix + name) for name in names))


class Attention(seq2seq_like.Attention):
    """Without a scale, with a bias of relative positions."""

    qkv = ("q", "k", "v")
    out = "o"
    size = "key_value_proj_dim"
    mask = "mask"
    #: Whether the first layer's bias is that of all, and goes from layer to layer.
    shares_bias: ClassVar[bool] = True

    def context(self, hidden_states: Tensor, given: Given) -> tuple[Any, ...]:
        before = 0 if given.cache is None else given.cache.get_seq_length(self.layer_idx)
        if isinstance(before, Tensor):
            before = before.clone()  # a static cache counts in place
        query, key, value = self._heads(hidden_states, given)
        bias = given.position_bias
        if bias is None and self.has_relative_attention_bias:
            bias = self.compute_bias(
                query.shape[2], key.shape[2], device=query.device, past_seen_tokens=before
            ).contiguous()
        context, weights = self._attend(query, key, value, given, bias)
        return (context, bias, weights) if self.shares_bias else (context, weights)

    def bias_of_token(self, keys: int) -> Tensor:
        """`compute_bias` for one query, the last of so many keys, (1, H, 1, keys).

        It depends on the distance alone: a row of more keys ends with that of fewer.
        """
        table = self.relative_attention_bias.weight
        known = _rows.get(self)
        if known is None or known.row.shape[3] < keys or not torch.equal(known.table, table):
            room = max(keys + keys // 4, 64)
            row = self.compute_bias(1, room, device=table.device, past_seen_tokens=room - 1)
            known = _rows[self] = _Row(table.detach().clone(), row.detach().contiguous())
        room = known.row.shape[3]
        return known.row.narrow(3, room - keys, keys).contiguous()

    def bias_of_rows(self, rows: int) -> Tensor:
        """`compute_bias` for so many queries and keys, (1, H, rows, rows)."""
        bias: Tensor = self.compute_bias(rows, rows, device=self.relative_attention_bias.weight.device)
        return bias.contiguous()


class _Row(NamedTuple):
    """The bias of one query, and the table that it was made of."""

    table: Tensor
    row: Tensor


_rows: weakref.WeakKeyDictionary[nn.Module, _Row] = weakref.WeakKeyDictionary()


class SelfAttention(Form):
    """Norm, attention, projection and sum."""

    inner: ClassVar[str] = "SelfAttention"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        modules, given = self.__dict__["_modules"], None
        attention, norm, p = modules[self.inner], modules["layer_norm"], checks.probability(self, "dropout")
        if not args and p is not None and is_form(attention, self.kin.attention):
            mask = kwargs.get("attention_mask")
            given = attention.given(hidden_states, {**kwargs, attention.mask: mask})
        if given is None:
            return super().forward(hidden_states, *args, **kwargs)
        rest: list[Any] = []

        def attend(x: Tensor) -> Tensor:
            context, *rest[:] = attention.context(x, given)
            return context  # type: ignore[no-any-return]

        dtype = checks.dtype_of(hidden_states)
        scale, out = llama_like.scale_of(norm, dtype) or norm, attention.projection(dtype)
        return blocks.attention_half(hidden_states, "pre", scale, 0.0, out, p or 0.0, attend), *rest


class CrossAttention(SelfAttention):
    inner = "EncDecAttention"


class LayerFF(Form):
    """Norm, feed-forward and sum."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        modules, p = self.__dict__["_modules"], checks.probability(self, "dropout")
        dense, norm = modules["DenseReluDense"], modules["layer_norm"]
        if p is None or checks.watched_globally():
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        dtype, ffn = checks.dtype_of(hidden_states), None
        if is_form(dense, self.kin.dense) or is_form(dense, self.kin.gated_dense):
            ffn = dense.ffn(dtype)
        scale = llama_like.scale_of(norm, dtype) or norm

        def unfused(x: Tensor) -> Tensor:
            return torch.dropout(dense(x), p, True) if p else dense(x)

        return blocks.feed_forward_half(hidden_states, "pre", scale, 0.0, ffn, unfused, p)


class Dense(Form):
    """The feed-forward in one call."""

    w_in: ClassVar[str] = "wi"
    w_gate: ClassVar[str | None] = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        ffn = self.ffn(checks.dtype_of(hidden_states))
        if ffn is None or checks.watched_globally():
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return blocks.feed_forward(hidden_states, ffn, "linear", None)

    def ffn(self, dtype: torch.dtype | None) -> FeedForward | None:
        """Its weights, if the operators may read them all."""
        hidden_p = checks.probability(self, "dropout")
        if hidden_p is None:
            return None
        return blocks.feed_forward_of(self, self.w_in, "wo", "act", dtype, self.w_gate, hidden_p)

    @classmethod
    def projections(cls) -> tuple[str, ...]:
        return tuple(name for name in (cls.w_gate, cls.w_in, "wo") if name is not None)


class GatedDense(Dense):
    w_in = "wi_1"
    w_gate = "wi_0"


class Block(layer_stack.Layer):
    """Its modules as they are; the first does the work of all, for a token of a generation and on few of an
    encoder.
    """

    #: Arguments after the states, in their order.
    names: ClassVar[tuple[str, ...]] = (
        *("attention_mask", "position_bias", "encoder_hidden_states", "encoder_attention_mask"),
        "encoder_decoder_position_bias",
    )
    #: Whether it returns the biases beside the states.
    gives_biases: ClassVar[bool] = True

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = None
        if len(args) <= len(self.names):
            named = {**dict(zip(self.names, args, strict=False)), **kwargs}
            out = layer_stack.result(self, named, partial(_all_layers, hidden_states, named))
        return super().forward(hidden_states, *args, **kwargs) if out is None else self.gives(out)

    def gives(self, out: Tensor) -> Any:
        return (out, None, None) if self.gives_biases else out


class Stack(seq2seq_like.Stack):
    at = "block"


_HOW = whole_layer.How("rms_norm")


def _all_layers(x: Tensor, named: dict[str, Any], stack: layer_stack.Stack) -> Tensor | None:
    """The result of all layers, or None (see `whole_layer.tokens` and `whole_layer.encoded`)."""
    first: Any = stack.layers[0]
    kin, parts = first.kin, list(first.layer)
    if x.dtype is torch.float16 or named.get("position_bias") is not None:
        return None  # half precision its own code clamps
    calls = [(parts[0], None, named.get("attention_mask"))]
    if (states := named.get("encoder_hidden_states")) is not None and first.is_decoder:
        calls.append((parts[1], states, named.get("encoder_attention_mask")))
    given = []
    for part, states, mask in calls:
        attention = part.__dict__["_modules"].get(getattr(part, "inner", None))
        if not is_form(attention, kin.attention):
            return None
        found = attention.given(x, {**named, attention.states: states, attention.mask: mask})
        if found is None:
            return None
        given.append(found)
    read = partial(_read, kin, len(given) > 1)
    if not first.is_decoder:
        biases = partial(_biases, stack, lambda attention: attention.bias_of_rows(x.shape[1]))
        return crossed_layers.encoded(x, stack, given[0], read, _HOW, biases)
    cache = given[0].cache
    if x.shape[1] != 1 or cache is None:
        return None
    biases = partial(
        _biases,
        stack,
        lambda attention: attention.bias_of_token(cache.get_seq_length(attention.layer_idx) + 1),
    )
    return crossed_layers.tokens(x, stack, given, read, _HOW, biases)


def _biases(stack: layer_stack.Stack, of: Callable[[Any], Tensor]) -> list[Tensor]:
    """Those that the attentions of all layers have, one or one for each."""
    layers: Sequence[Any] = stack.layers
    attentions = [layer.layer[0].SelfAttention for layer in layers]
    return [of(attention) for attention in attentions if attention.has_relative_attention_bias]


def _read(kin: Kin, crosses: bool, layer: Any, dtype: torch.dtype | None) -> crossed_layers.Read | None:
    forms = kin.forms
    if not checks.intact(layer, forms[kin.block]):
        return None
    own, *between, last = layer.layer
    if not (
        is_form(own, kin.self_attention)
        and is_form(last, kin.feed_forward)
        and len(between) >= crosses
        and all(is_form(part, kin.cross_attention) for part in between)
        and all(checks.probability(part, "dropout") == 0 for part in (own, *between, last))
    ):
        return None
    attention, dense = own.SelfAttention, last.DenseReluDense
    scales = [llama_like.scale_of(part.layer_norm, dtype) for part in (own, last, *between)]
    if (
        None in scales
        or not is_form(attention, kin.attention)
        or not (is_form(dense, kin.dense) or is_form(dense, kin.gated_dense))
    ):
        return None
    (norm, eps), (ffn_norm, ffn_eps), *rest = (
        (Affine(s.weight, None), s.eps) for s in scales if s is not None
    )
    parts = crossed_layers.layer_parts(attention, norm, eps, dense.ffn(dtype), ffn_norm, ffn_eps, dtype)
    crossed = None
    if crosses and is_form(between[0].EncDecAttention, kin.attention):
        crossed = crossed_layers.CrossedParts.of(between[0].EncDecAttention, *rest[0], dtype)
    if parts is None or (crosses and crossed is None):
        return None
    where = layer_stack.Where.of(attention.layer_idx, parts, attention.scaling, attention)
    return parts, (where, crossed)


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def _check_attention_layer(kin: Kin, inner: str, module: Any) -> str | None:
    return checks.reason_for_parts(module, {"dropout": nn.Dropout}) or seq2seq_like.inside_attention(
        kin, getattr(module, inner), inner
    )


def _check_dense(projections: tuple[str, ...], module: Any) -> str | None:
    return (
        checks.reason_for_parts(module, dict.fromkeys(projections, nn.Linear), lora=True)
        or checks.reason_for_parts(module, {"dropout": nn.Dropout})
        or checks.reason_for_activation(module.act)
    )


def _check_feed_forward(module: Any) -> str | None:
    return checks.reason_for_parts(module, {"dropout": nn.Dropout})


def _check_block(kin: Kin, block: Any) -> str | None:
    *attentions, last = block.layer
    kinds = (kin.self_attention, kin.cross_attention)
    for at, (part, cls) in enumerate(zip(attentions, kinds, strict=False)):
        form: Any = kin.forms[cls]
        check = partial(_check_attention_layer, kin, form.inner)
        why = checks.inside(part, f"layer.{at}", cls, form, check)
        if why is not None:
            return why
    name, ffn = f"layer.{len(attentions)}", kin.forms[kin.feed_forward]
    why = checks.inside(last, name, kin.feed_forward, ffn, _check_feed_forward)
    if why is not None:
        return why
    dense = last.DenseReluDense
    gated = isinstance(dense, kin.gated_dense)
    cls = kin.gated_dense if gated else kin.dense
    patched: Any = kin.forms[cls]
    check = partial(_check_dense, patched.projections())
    return checks.inside(dense, f"{name}.DenseReluDense", cls, patched, check)


def _check_stack(kin: Kin, stack: Any) -> str | None:
    return packed_encoder.reason_for_layers(
        stack, kin.block, kin.forms[kin.block], partial(_check_block, kin), "each runs alone"
    )


# ------------------------------------------------------------------------------------------------------------
# what a family says


def family(name: str, kin: Kin) -> Family:
    """The family of these kin."""
    forms: dict[type, Any] = kin.forms
    note = "with its norm and its sum"
    return Family(
        name=name,
        rules=(
            *(
                Rule(layer, forms[layer], (), partial(_check_attention_layer, kin, forms[layer].inner), note)
                for layer in (kin.self_attention, kin.cross_attention)
            ),
            Rule(kin.feed_forward, forms[kin.feed_forward], (), _check_feed_forward, note),
            seq2seq_like.attention_rule(kin),
            *(
                Rule(
                    dense,
                    forms[dense],
                    ("feed_forward",),
                    partial(_check_dense, forms[dense].projections()),
                    projections=forms[dense].projections(),
                )
                for dense in (kin.dense, kin.gated_dense)
            ),
            Rule(kin.norm, forms[kin.norm], ("rms_norm",), llama_like.check_norm),
            Rule(
                kin.block, forms[kin.block], (), partial(_check_block, kin), "the first runs all where it may"
            ),
            layer_stack.rule(
                kin.stack, forms[kin.stack], partial(_check_stack, kin), seq2seq_like.STACK_NOTE
            ),
        ),
        children=(ChildRule(kin.causal_lm, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),),
        losses=fused_loss.rules(*forms.values()),
        models=(kin.stack,),
        mask_path=(kin.block, kin.self_attention, kin.cross_attention, kin.attention),
    )


def language_model(kin: Kin) -> Callable[[type], type]:
    """`fused_loss.language_model` of an encoder and a decoder."""
    return fused_loss.language_model(
        kin, fused_loss.encoder_decoder(lambda model, labels: model._shift_right(labels))
    )
