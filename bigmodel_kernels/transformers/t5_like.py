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

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigmodel_kernels.transformers import blocks, checks, fused_loss, llama_like, seq2seq_like
from bigmodel_kernels.transformers.blocks import FeedForward
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
