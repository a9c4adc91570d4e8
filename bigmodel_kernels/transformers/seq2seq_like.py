"""Encoder-decoders after BART: BART, mBART, Marian, Pegasus, M2M-100, Whisper. `t5_like` uses its attention.

A family says in a `Kin` which its classes are and what their parts are called, and puts the forms below in
front of them:

    KIN = Kin.of(hf, "Bart", order="post")

    class BigmodelBartAttention(seq2seq_like.Attention, hf.BartAttention, kin=KIN): ...

Per layer of an encoder: LayerNorm, one product for Q, K and V, attention that reads it in place, projection +
residual in one call, LayerNorm + feed-forward + residual in one; with the norms behind, each is part of the
call before it. A decoder has a causal attention over its cache, and then one on what the encoder has made:
one product for the queries, and one for keys and values, which is made once for a generation and read from
the cache after that. Padding is the operator's mask of keys, and no tensor has all queries times all keys.
Embeddings, positions and Whisper's convolutions stay the model's own.

A projection that peft has given a LoRA adapter, a norm with a hook and a feed-forward without a kernel are
called as they are, between our other calls. A feed-forward that drops in its hidden layer runs as two
products in training. A call takes the original code of a layer, and is as right, when attention probabilities
are asked for (then computed in plain PyTorch from the same Q and K), with a cache that is quantised or one
that has no place for the encoder's keys, and where a hook or a replaced module stands in the way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from bigmodel_kernels.transformers import (
    attention_interface,
    blocks,
    checks,
    crossed_layers,
    fused_loss,
    layer_stack,
    packed_encoder,
    whole_layer,
)
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear, Form, is_form


@dataclass(frozen=True)
class Kin:
    """The classes of one model, and the patched form of each that has one."""

    attention: type[nn.Module]
    encoder_layer: type[nn.Module]
    decoder_layer: type[nn.Module]
    encoder: type[nn.Module]
    decoder: type[nn.Module]
    #: Models with a projection to the vocabulary, and its name there.
    heads: tuple[type[nn.Module], ...]
    head: str
    #: "pre" or "post": where the norms of a layer stand.
    order: str
    #: LayerNorms of encoder and decoder themselves.
    norms: tuple[str, ...] = ()
    forms: dict[type, type] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: Any,
        prefix: str,
        *,
        order: str,
        heads: tuple[str, ...] = ("ForConditionalGeneration", "ForCausalLM"),
        head: str = "lm_head",
        norms: tuple[str, ...] = (),
    ) -> Kin:
        """The classes of transformers' `module`, whose names begin with `prefix`."""
        return cls(
            attention=getattr(module, prefix + "Attention"),
            encoder_layer=getattr(module, prefix + "EncoderLayer"),
            decoder_layer=getattr(module, prefix + "DecoderLayer"),
            encoder=getattr(module, prefix + "Encoder"),
            decoder=getattr(module, prefix + "Decoder"),
            heads=tuple(getattr(module, prefix + name) for name in heads),
            head=head,
            order=order,
            norms=norms,
        )


class Attention(Form):
    """One product for Q, K and V, or for K and V of the encoder's states, and attention over the cache."""

    #: Names of the parts, and of the arguments that have the encoder's states and the mask.
    qkv: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")
    out: ClassVar[str] = "out_proj"
    size: ClassVar[str] = "head_dim"
    states: ClassVar[str] = "key_value_states"
    mask: ClassVar[str] = "attention_mask"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = None if args else self.given(hidden_states, kwargs)
        if given is None:
            return super().forward(hidden_states, *args, **kwargs)
        context, *rest = self.context(hidden_states, given)
        return blocks.project(context, self.projection(checks.dtype_of(hidden_states)), "linear"), *rest

    def context(self, hidden_states: Tensor, given: Given) -> tuple[Any, ...]:
        """The heads' results side by side, and what this attention returns beside its output: at least the
        probabilities, None where they are not asked for.
        """
        query, key, value = self._heads(hidden_states, given)
        return self._attend(query, key, value, given, None)

    def projection(self, dtype: torch.dtype | None) -> blocks.Part:
        return blocks.part(self.__dict__["_modules"][self.out], nn.Linear, dtype)

    def given(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Given | None:
        """The arguments of a call, read; None if the attention's own code has to do it."""
        states, mask = kwargs.get(self.states), kwargs.get(self.mask)
        cache, dropout_p = attention_interface.cache_of(kwargs), checks.probability(self, "dropout")
        updated, packing = None, kwargs.get(packed_encoder.ARGUMENT)
        if type(cache) is EncoderDecoderCache:
            updated = None if states is None else cache.is_updated
            cache = cache.self_attention_cache if states is None else cache.cross_attention_cache
        elif cache is not None and states is not None:
            return None
        if (
            dropout_p is None
            or type(cache) not in attention_interface.CACHES
            or (states is not None and states.shape[0] != hidden_states.shape[0])
            or not attention_interface.readable(mask)
            or (packing is not None and not attention_interface.packable(mask))
            or not attention_interface.gets_readable_masks(self)
            or checks.watched_globally()
        ):
            return None
        causal = kwargs.get("is_causal")
        return Given(
            states=states,
            mask=mask,
            cache=cache,
            updated=updated,
            is_causal=self.is_decoder and states is None if causal is None else causal,
            output_attentions=bool(kwargs.get("output_attentions")),
            dropout_p=dropout_p,
            position_bias=kwargs.get("position_bias"),
            packing=packing,
        )

    def _heads(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, H, S, D), with those of the cache."""
        cache, index = given.cache, self.layer_idx
        if given.states is None:
            query, key, value = self._project(x, self.qkv)
        else:
            (query,) = self._project(x, self.qkv[:1])
            if cache is not None and given.updated and given.updated.get(index):
                held = cache.layers[index]
                return query, held.keys, held.values
            key, value = self._project(given.states, self.qkv[1:])
        if cache is not None:
            key, value, _ = attention_interface.updated(cache, key, value, index, None)
            if given.updated is not None:
                given.updated[index] = True
        return query, key, value

    def _project(self, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        modules, dtype = self.__dict__["_modules"], checks.dtype_of(x)
        parts = tuple(blocks.part(modules[name], nn.Linear, dtype) for name in names)
        made = blocks.side_by_side(x, parts, "linear", (1,) * len(parts))
        return tuple(t.unflatten(-1, (-1, getattr(self, self.size))).transpose(1, 2) for t in made)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, given: Given, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if given.packing is not None:
            args = (given.mask, given.packing, self.scaling, given.dropout_p)
            return attention_interface.packed_attention(query, key, value, *args), None
        out, weights = attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            given.mask,
            dropout=given.dropout_p,
            scaling=self.scaling,
            is_causal=given.is_causal,
            position_bias=bias,
            output_attentions=given.output_attentions,
        )
        return out.flatten(2), weights


class Layer(Form):
    """The whole layer, norms and sums in the calls of its halves."""

    #: Arguments after the states, in their order, that the models give by place.
    names: ClassVar[tuple[str, ...]] = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        x, halves = packed_encoder.rows(hidden_states, kwargs), None
        if len(args) <= len(self.names) and not attention_interface.wants_attentions(named):
            halves = self._halves(x, named)
        drops = [checks.probability(self, name) for name in ("dropout", "activation_dropout")]
        if halves is None or None in drops:
            return packed_encoder.own_code(super().forward, hidden_states, args, kwargs)
        done = self._with_all(x, named, halves)
        if done is not None:
            return done
        order, dtype, modules = self.kin.order, checks.dtype_of(hidden_states), self.__dict__["_modules"]
        p, hidden_p = (p or 0.0 for p in drops)
        for name, given in halves:
            attention, norm = modules[name], modules[f"{name}_layer_norm"]
            x = blocks.attention_half(
                x,
                order,
                blocks.part(norm, nn.LayerNorm, dtype),
                blocks.eps_of(norm),
                attention.projection(dtype),
                p,
                partial(_context, attention, given),
            )
        norm = modules["final_layer_norm"]
        x = blocks.feed_forward_half(
            x,
            order,
            blocks.part(norm, nn.LayerNorm, dtype),
            blocks.eps_of(norm),
            blocks.feed_forward_of(self, *_FEED_FORWARD, dtype, hidden_p=hidden_p),
            partial(self._unfused, p=p, hidden_p=hidden_p),
            p,
        )
        return self._closed(x)

    def _halves(self, x: Tensor, named: dict[str, Any]) -> list[tuple[str, Given]] | None:
        """The attentions that the layer runs, by name, and what each is given; None for its own code."""
        calls = [("self_attn", None, named.get("attention_mask"))]
        if (states := named.get("encoder_hidden_states")) is not None:
            calls.append(("encoder_attn", states, named.get("encoder_attention_mask")))
        halves = []
        for name, states, mask in calls:
            attention = self.__dict__["_modules"][name]
            if not is_form(attention, self.kin.attention):
                return None
            given = attention.given(x, {**named, attention.states: states, attention.mask: mask})
            if given is None:
                return None
            halves.append((name, given))
        return halves

    def _unfused(self, x: Tensor, p: float, hidden_p: float) -> Tensor:
        """The feed-forward with its dropouts by the layer's own modules."""
        w_in, w_out, activation = (self.__dict__["_modules"][name] for name in _FEED_FORWARD)
        hidden = activation(w_in(x))
        y: Tensor = w_out(torch.dropout(hidden, hidden_p, True) if hidden_p else hidden)
        return torch.dropout(y, p, True) if p else y

    def _with_all(self, x: Tensor, named: dict[str, Any], halves: list[tuple[str, Given]]) -> Tensor | None:
        """The result of all layers of the stack, if this one may do their work."""
        return None

    def _closed(self, x: Tensor) -> Tensor:
        return x


class DecoderLayer(layer_stack.Layer, Layer):
    """The same, and the first of a decoder, for a token of a generation, does the work of all."""

    def _with_all(self, x: Tensor, named: dict[str, Any], halves: list[tuple[str, Given]]) -> Tensor | None:
        given = [each for _, each in halves]
        if given[0].cache is None:
            return None
        return layer_stack.result(self, named, partial(_tokens, x, given))


class Stack(layer_stack.Model):
    """Runs a stack of all its layers; goes before the class that it stands for."""

    def stacked(self) -> list[nn.Module]:
        return list(getattr(self, self.at).__dict__["_modules"].values())


class Encoder(Stack, packed_encoder.Encoder):
    """Without padding."""


class EncoderLayer(layer_stack.Layer, Layer):
    """The same, and the first of an encoder, on few tokens, does the work of all."""

    names = ("attention_mask",)

    def _with_all(self, x: Tensor, named: dict[str, Any], halves: list[tuple[str, Given]]) -> Tensor | None:
        if x.dtype is torch.float16:
            return None  # each layer clamps
        return layer_stack.result(self, named, partial(_rows, x, halves[0][1]))

    def _closed(self, x: Tensor) -> Tensor:
        """Half precision is kept from overflowing, as by the model's own code."""
        if x.dtype != torch.float16:
            return x
        limit = torch.finfo(x.dtype).max - 1000
        clamped = torch.clamp(x, min=-limit, max=limit)
        return clamped if self.kin.order == "pre" else torch.where(torch.isfinite(x).all(), x, clamped)


_FEED_FORWARD = ("fc1", "fc2", "activation_fn")


# ------------------------------------------------------------------------------------------------------------
# arguments, read at each call


class Given(NamedTuple):
    """What attention is called with beside the hidden states.

    `states` are the encoder's, for cross-attention; `updated` says then of which layers the cache has their
    keys, if there is a cache.
    """

    states: Tensor | None
    mask: Tensor | None
    cache: Any
    updated: dict[int, bool] | None
    is_causal: bool
    output_attentions: bool
    dropout_p: float
    position_bias: Tensor | None
    packing: blocks.Packing | None = None


def _tokens(x: Tensor, given: Sequence[Given], stack: layer_stack.Stack) -> Tensor | None:
    """`crossed_layers.tokens` of layers after BART."""
    first: Any = stack.layers[0]
    read = partial(_read, first.kin, first.kin.decoder_layer, len(given) > 1)
    return crossed_layers.tokens(x, stack, given, read, whole_layer.How(order=first.kin.order))


def _rows(x: Tensor, given: Given, stack: layer_stack.Stack) -> Tensor | None:
    """`crossed_layers.encoded` by layers after BART."""
    first: Any = stack.layers[0]
    read = partial(_read, first.kin, first.kin.encoder_layer, False)
    return crossed_layers.encoded(x, stack, given, read, whole_layer.How(order=first.kin.order))


def _read(
    kin: Kin, cls: type[nn.Module], crosses: bool, layer: Any, dtype: torch.dtype | None
) -> crossed_layers.Read | None:
    if not checks.intact(layer, kin.forms[cls]):
        return None
    modules, p = layer.__dict__["_modules"], checks.probability(layer, "dropout")
    hidden_p = checks.probability(layer, "activation_dropout")
    attention, crossed = modules["self_attn"], None
    if p != 0 or hidden_p != 0 or not is_form(attention, kin.attention):
        return None

    def norm(name: str) -> tuple[blocks.Part, float]:
        return blocks.part(modules[name], nn.LayerNorm, dtype), blocks.eps_of(modules[name])

    parts = crossed_layers.layer_parts(
        attention,
        *norm("self_attn_layer_norm"),
        blocks.feed_forward_of(layer, *_FEED_FORWARD, dtype),
        *norm("final_layer_norm"),
        dtype,
    )
    if crosses and is_form(modules["encoder_attn"], kin.attention):
        crossed = crossed_layers.CrossedParts.of(
            modules["encoder_attn"], *norm("encoder_attn_layer_norm"), dtype
        )
    if parts is None or (crosses and crossed is None):
        return None
    return parts, (layer_stack.Where.of(attention.layer_idx, parts, attention.scaling, attention), crossed)


def _context(attention: Any, given: Given, x: Tensor) -> Tensor:
    return attention.context(x, given)[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def check_attention(kin: Any, module: Any) -> str | None:
    """Of these kin, whose form of attention says what its parts are called."""
    form = kin.forms[kin.attention]
    if not hasattr(sys.modules[kin.attention.__module__], "ALL_ATTENTION_FUNCTIONS"):
        return "this version of transformers computes its attention without the attention interface"
    why = checks.reason_for_parts(module, dict.fromkeys((*form.qkv, form.out), nn.Linear), lora=True)
    if why is not None:
        return why
    head_dim = getattr(module, form.size)
    if head_dim > 256:
        return f"head size {head_dim}; allowed are 1 to 256"
    features = [checks.without_adapter(module.get_submodule(name)).out_features for name in form.qkv]
    if len(set(features)) > 1 or features[0] % head_dim:
        return f"query, key and value have {features} features, not as many heads of {head_dim} in each"
    return None


def _check_layer(kin: Kin, module: Any) -> str | None:
    w_in, w_out, activation = _FEED_FORWARD
    why = checks.reason_for_parts(module, {w_in: nn.Linear, w_out: nn.Linear}, lora=True)
    why = why or checks.reason_for_activation(getattr(module, activation))
    for name in ("self_attn", "encoder_attn"):
        part = getattr(module, name, None)
        if why is None and part is not None:
            why = inside_attention(kin, part, name)
    return why


def inside_attention(kin: Any, part: Any, name: str) -> str | None:
    """Why the attention `name` of a layer, patched already or not, cannot run fused."""
    return checks.inside(part, name, kin.attention, kin.forms[kin.attention], partial(check_attention, kin))


# ------------------------------------------------------------------------------------------------------------
# what a family says


def attention_rule(kin: Any) -> Rule:
    form = kin.forms[kin.attention]
    return Rule(
        kin.attention,
        form,
        ("linear", "attention"),
        partial(check_attention, kin),
        projections=(*form.qkv, form.out),
    )


STACK_NOTE = "its layers in one call, for a token and on few rows of an encoder"


def _stack_rule(kin: Kin, model: type[nn.Module], layer: type[nn.Module]) -> Rule:
    def check(stack: Any) -> str | None:
        so = "each runs alone"
        return packed_encoder.reason_for_layers(
            stack, layer, kin.forms[layer], partial(_check_layer, kin), so
        )

    return layer_stack.rule(model, kin.forms[model], check, STACK_NOTE)


def family(name: str, kin: Kin) -> Family:
    """The family of these kin."""
    models = (kin.encoder, kin.decoder)
    packs = issubclass(kin.forms[kin.encoder], packed_encoder.Encoder)
    stacks = [(kin.decoder, kin.decoder_layer), *([] if packs else [(kin.encoder, kin.encoder_layer)])]
    return Family(
        name=name,
        rules=(
            *(
                [packed_encoder.rule(kin.encoder, kin.encoder_layer, kin, partial(_check_layer, kin))]
                if packs
                else []
            ),
            *(
                Rule(
                    layer,
                    kin.forms[layer],
                    ("layer_norm", "feed_forward"),
                    partial(_check_layer, kin),
                    "its halves with their norms and sums",
                    projections=_FEED_FORWARD[:2],
                )
                for layer in (kin.encoder_layer, kin.decoder_layer)
            ),
            attention_rule(kin),
            *(_stack_rule(kin, *each) for each in stacks),
        ),
        children=(
            *(
                ChildRule(model, norm, nn.LayerNorm, BigmodelLayerNorm, ("layer_norm",))
                for model in models
                for norm in kin.norms
            ),
            *(ChildRule(model, kin.head, nn.Linear, BigmodelLinear, ("linear",)) for model in kin.heads),
        ),
        losses=fused_loss.rules(*kin.forms.values()),
        models=models,
        mask_path=(kin.encoder_layer, kin.decoder_layer, kin.attention),
    )


def language_model(
    kin: Kin, shift: Callable[[Tensor, int, int], Tensor], caches: bool = True
) -> Callable[[type], type]:
    """`fused_loss.language_model`; `shift` (labels, padding, first token) makes decoder ids."""

    def shifted(model: Any, labels: Tensor) -> Tensor:
        return shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)

    return fused_loss.language_model(kin, fused_loss.encoder_decoder(shifted, kin.head, caches))
