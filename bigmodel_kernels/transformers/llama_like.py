"""The layers of Llama, for it and for every decoder of its kind (Mistral, Qwen, Gemma, Phi-3, OLMo 2, ...).

transformers gives each of these models classes of its own with nearly the same code inside. A family says in
a `Kin` which they are and what they have that Llama has not, and puts the forms below in front of them:

    KIN = Kin.of(hf, "Qwen3", head_norms="heads")

    class BigmodelQwen3Attention(llama_like.Attention, hf.Qwen3Attention, kin=KIN): ...

Per layer: RMSNorm, one product for Q, K and V, RMSNorm of queries and keys where there is one, rotary
embedding, attention over the cache that reads a key for all the queries that share it, projection + residual
in one call, and RMSNorm + gated feed-forward + residual in one. Windows, softcap and sinks are the
operator's. Prefill, several tokens after a cache, decoding, training, autocast and gradient checkpointing run
the same calls.

Norms are called as modules, so that one with a hook is heard; a projection that peft has given a LoRA adapter
and a feed-forward that is not as known (experts, an activation without a kernel) are called as they are,
between our other calls. A call takes the original code of a layer, and is as right, when attention
probabilities are asked for (then computed in plain PyTorch from the same Q and K), with a cache that is
quantised, and where a hook or a replaced module stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bigmodel_kernels.ops.registration import call
from bigmodel_kernels.transformers import (
    attention_interface,
    blocks,
    checks,
    fused_loss,
    layer_stack,
    paged,
    token_model,
    whole_layer,
)
from bigmodel_kernels.transformers.blocks import Affine, FeedForward, GatedParts, LayerParts, Scale
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear, Form, is_form


class Norms(NamedTuple):
    """A layer's norms, or their names: before and after attention, before and after the feed-forward."""

    attention: Any = "input_layernorm"
    attention_outer: Any = None
    ffn: Any = "post_attention_layernorm"
    ffn_outer: Any = None


#: Gemma 2 and 3: norms on both sides.
BOTH = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
#: OLMo 2: behind only.
OUTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


@dataclass(frozen=True)
class Kin:
    """The classes of one model, what its layers have that Llama's have not, and the patched form of each."""

    attention: type[nn.Module]
    layer: type[nn.Module]
    norm: type[nn.Module]
    model: type[nn.Module]
    causal_lm: type[nn.Module]
    rotate: Callable[..., Any]
    # Norms: what is added to their weights; whether they give back the type of their input under autocast.
    norms: Norms = Norms()  # noqa: RUF009  (immutable)
    offset: float = 0.0
    keeps_dtype: bool = False
    # Attention: "heads" or "features" is what the norms of queries and keys run over, as `q_norm`, `k_norm`.
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_norms: str = ""
    softcap: bool = False
    sinks: bool = False
    #: cos and sin hold every angle once, not twice.
    once: bool = False
    #: Whether the angles are those of the layer's type.
    angles_by_type: bool = False
    # The feed-forward, dense or of experts, or in some layers this and in others that; the first projections
    # of a dense one, two or one that stands for both.
    mlp: type[nn.Module] | None = None
    experts: type[nn.Module] | None = None
    gate_and_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    #: The dropouts of attention's output and of the feed-forward's.
    dropouts: tuple[str, ...] = ()
    forms: dict[type, type] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        module: Any,
        prefix: str,
        *,
        model: str = "Model",
        mlp: str | None = "MLP",
        experts: str | None = None,
        **differences: Any,
    ) -> Kin:
        """The classes of transformers' `module`, whose names begin with `prefix`."""
        return cls(
            attention=getattr(module, prefix + "Attention"),
            layer=getattr(module, prefix + "DecoderLayer"),
            norm=getattr(module, prefix + "RMSNorm"),
            model=getattr(module, prefix + model),
            causal_lm=getattr(module, prefix + "ForCausalLM"),
            rotate=module.apply_rotary_pos_emb,
            mlp=None if mlp is None else getattr(module, prefix + mlp),
            experts=None if experts is None else getattr(module, prefix + experts),
            **differences,
        )


class RMSNorm(Form):
    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = None if checks.watched_globally() else scale_of(self, checks.dtype_of(hidden_states))
        if norm is None:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        out = blocks.rms_norm(hidden_states, norm)
        return out.to(hidden_states.dtype) if self.kin.keeps_dtype else out


class Attention(Form):
    """One product for Q, K and V, rotary, and attention over the cache."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = _given(self, args, kwargs)
        if given is None:
            return super().forward(hidden_states, *args, **kwargs)
        context, weights = self.context(hidden_states, given)
        output = blocks.part(self.o_proj, nn.Linear, checks.dtype_of(hidden_states))
        return blocks.project(context, output, "linear"), weights

    def context(self, hidden_states: Tensor, given: Given) -> tuple[Tensor, Tensor | None]:
        """The heads' results side by side, and the probabilities where they are asked for."""
        query, key, value = self._heads(hidden_states)
        if getattr(self, "use_rope", True):  # SmolLM3 has layers without
            query, key = self._turned(query, key, given.cos, given.sin)
        told: dict[str, Any] = {}
        if given.cache is not None:
            key, value, told = attention_interface.updated(
                given.cache, key, value, self.layer_idx, given.told
            )
        out, weights = attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            given.mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            softcap=self.attn_logit_softcapping if self.kin.softcap else None,
            s_aux=self.sinks if self.kin.sinks else None,
            is_causal=given.is_causal,
            sliding_window=attention_interface.own_window(self),
            output_attentions=given.output_attentions,
            **told,
        )
        return out.flatten(2), weights

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, H, S, D), before they are turned."""
        dtype, modules = checks.dtype_of(x), self.__dict__["_modules"]
        parts = tuple(blocks.part(modules[name], nn.Linear, dtype) for name in self.kin.qkv)
        groups = self.num_key_value_groups
        query, key, value = blocks.side_by_side(x, parts, "linear", (groups, 1, 1))
        if self.kin.head_norms == "features":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key, value))
        if self.kin.head_norms == "heads":
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _turned(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if query.dtype != key.dtype or cos.dtype not in (query.dtype, torch.float32):
            return self.kin.rotate(query, key, cos, sin)  # type: ignore[no-any-return]
        angles = cos.shape[-1] if self.kin.once else cos.shape[-1] // 2
        return call("rotary", query, key, cos[..., :angles], sin[..., :angles])  # type: ignore[no-any-return]


class MLP(Form):
    """The gated feed-forward in one call, or, but for inference on the CPU, in two products where one weight
    holds gate and up.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if checks.watched_globally():
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        dtype, modules = checks.dtype_of(hidden_states), self.__dict__["_modules"]
        ffn = self.ffn(dtype)
        if ffn is None and len(self.kin.gate_and_up) == 1:
            both = blocks.part(modules[self.kin.gate_and_up[0]], nn.Linear, dtype)
            down = blocks.part(modules["down_proj"], nn.Linear, dtype)
            return blocks.gated_of_one(hidden_states, both, getattr(self, self.kin.activation), down)
        if ffn is None:
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return blocks.feed_forward(hidden_states, ffn, "linear", None)

    def ffn(self, dtype: torch.dtype | None) -> FeedForward | None:
        """Its weights, if one call may read them all."""
        if len(self.kin.gate_and_up) == 1:
            joined, activation = self.kin.gate_and_up[0], self.kin.activation
            return blocks.feed_forward_of_joined(self, joined, "down_proj", activation, dtype)
        gate, up = self.kin.gate_and_up
        return blocks.feed_forward_of(self, up, "down_proj", self.kin.activation, dtype, gate)


class Layer(layer_stack.Layer):
    """The whole layer, norms and sums in the calls of its halves where the operators have them."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention, given = self.__dict__["_modules"]["self_attn"], None
        if is_form(attention, self.kin.attention):
            given = _given(attention, args, kwargs)
        if given is not None and given.told is None:
            out = layer_stack.result(self, kwargs, partial(_tokens, hidden_states, given))
            if out is not None:
                return out
        if given is None or attention_interface.wants_attentions(kwargs) or not self._drops_plainly():
            return super().forward(hidden_states, *args, **kwargs)
        parts = self._parts(checks.dtype_of(hidden_states))
        return blocks.gated_layer(hidden_states, parts, lambda x: attention.context(x, given)[0])

    def _parts(self, dtype: torch.dtype | None) -> GatedParts:
        kin, modules = self.kin, self.__dict__["_modules"]
        norms = Norms(*(None if name is None else modules[name] for name in kin.norms))
        mlp, inner = modules["mlp"], norms.ffn
        drops = [checks.dropout_p(modules[name]) for name in kin.dropouts] or [0.0, 0.0]
        return GatedParts(
            attention_norm=norms.attention,
            attention_out=blocks.part(modules["self_attn"].o_proj, nn.Linear, dtype),
            attention_outer_norm=norms.attention_outer,
            attention_p=drops[0],
            ffn_norm=None if inner is None else scale_of(inner, dtype) or inner,
            ffn=mlp.ffn(dtype) if is_form(mlp, kin.mlp) else None,
            unfused=partial(_first, mlp),
            ffn_outer_norm=norms.ffn_outer,
            ffn_p=drops[1],
            multiplier=getattr(self, "residual_multiplier", 1.0),
        )

    def _drops_plainly(self) -> bool:
        modules = self.__dict__["_modules"]
        return all(checks.plain_dropout(modules[name]) for name in self.kin.dropouts)


class Model(token_model.Model, layer_stack.Model):
    """Of layers that have nothing which Llama's have not."""

    how = whole_layer.How("rms_norm")
    output = BaseModelOutputWithPast

    def known(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        return bool(self.stacked())

    def table(self) -> Any:
        return self.__dict__["_modules"].get("embed_tokens")

    def read(self, layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
        return _read(layer, dtype)

    def around(self, dtype: torch.dtype) -> tuple[list[whole_layer.Around], Any] | None:
        table, norm = checks.parameters(self.table(), nn.Embedding, dtype), scale_of(self.norm, dtype)
        return None if table is None or norm is None else ([table[0], norm.weight], norm.eps)

    def enter(self, ids: Tensor, positions: Tensor, around: Sequence[Any]) -> tuple[Tensor, Any]:
        none = (None,) * 6
        states = torch.ops.bigmodel.cpu_embedding.default(ids, around[0], *none, 0.0)
        return states, blocks.half(self.rotary_emb(states, positions))

    def leave(self, states: Tensor, around: Sequence[Any], told: Any) -> Tensor:
        return torch.ops.bigmodel.cpu_rms_norm.default(states, around[1], told, None)  # type: ignore[no-any-return]


class CausalLM(token_model.LanguageModel):
    output = CausalLMOutputWithPast


# ------------------------------------------------------------------------------------------------------------
# arguments and weights, read at each call


def _tokens(x: Tensor, given: Given, stack: layer_stack.Stack) -> Tensor | None:
    """The result of all layers for the next tokens of sequences, or None (see `whole_layer.tokens`)."""
    first: Any = stack.layers[0]
    kin = first.kin
    if not whole_layer.few(x) or given.cos.dtype not in (x.dtype, torch.float32):
        return None
    if kin.sinks or kin.once:
        return None
    how, behind = _how(first), kin.norms.attention_outer is not None

    def gather() -> Any:
        found = layer_stack.read_all(stack.layers, checks.dtype_of(x), _read)
        if found is None or any(_how(layer) != how for layer in stack.layers):
            return None
        outer = [scale for layer in stack.layers for scale in _outer(layer, checks.dtype_of(x))]
        if None in outer:
            return None
        gathered = found[0], (found[1], [scale.eps for scale in outer])
        return (*gathered, [scale.weight for scale in outer]) if behind else gathered

    layers = whole_layer.layers_of(stack.model, stack.layers, x, "linear", gather, around=behind)
    if layers is None or not layers.takes:
        return None
    where, epsilons = layers.given
    weights = layers.around() if behind else ()
    if weights is None or not layer_stack.causal(x, where, given.is_causal):
        return None
    cached = layer_stack.within(stack, where, given.cache, given.mask)
    outer = whole_layer.Outer(weights, epsilons)
    angles = _angles(x, given, stack)
    if angles is None or cached is None:
        return None
    return whole_layer.tokens(x, layers, cached, how, angles, (), None, outer)


def _angles(x: Tensor, given: Given, stack: layer_stack.Stack) -> list[tuple[Tensor, Tensor]] | None:
    """Those of all layers, or of each; None if some of them cannot be known from the first layer's."""
    first: Any = stack.layers[0]
    model: Any = stack.model
    own = blocks.half((given.cos, given.sin))
    if not first.kin.angles_by_type:
        return [own]
    rotary = model.__dict__["_modules"].get("rotary_emb")
    if given.positions is None or not checks.intact(rotary, type(rotary)):
        return None
    types = model.config.layer_types[: len(stack.layers)]
    found = {types[0]: own}
    for kind in types:
        if kind not in found:
            found[kind] = blocks.half(rotary(x, given.positions, kind))
    return [found[kind] for kind in types]


def _how(layer: Any) -> whole_layer.How:
    """What a layer has that Llama's have not."""
    attention, kin = layer.self_attn, layer.kin
    return whole_layer.How(
        norm_kind="rms_norm",
        norm_offset=kin.offset,
        softcap=(attention.attn_logit_softcapping or 0.0) if kin.softcap else 0.0,
        factor=getattr(layer, "residual_multiplier", 1.0),
    )


def _outer(layer: Any, dtype: torch.dtype | None) -> list[Any]:
    """The norms behind attention and feed-forward, if it has them; None for one that is not as known."""
    modules, norms = layer.__dict__["_modules"], layer.kin.norms
    names = (norms.attention_outer, norms.ffn_outer)
    return [scale_of(modules[name], dtype) for name in names if name is not None]


def _read(layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
    """A layer's parts, and where in a cache its keys are; None if it does not run as one of all layers."""
    kin = getattr(type(layer), "kin", None)
    if kin is None or not is_form(layer, kin.layer) or not layer._drops_plainly():
        return None
    parts, attention = _whole_parts(layer, dtype), layer.self_attn
    if parts is None:
        return None
    queries = attention.num_key_value_groups
    return parts, layer_stack.Where.of(attention.layer_idx, parts, attention.scaling, attention, queries)


def _whole_parts(layer: Any, dtype: torch.dtype | None) -> LayerParts | None:
    """All of a layer, norms behind its halves aside."""
    kin, attention, w = layer.kin, layer.self_attn, layer._parts(dtype)
    names = [name for name in (kin.norms.attention, kin.norms.ffn) if name is not None]
    scales = [scale_of(layer.__dict__["_modules"][name], dtype) for name in names]
    if not is_form(attention, kin.attention) or None in scales:
        return None
    norms: list[Any] = [(Affine(scale.weight, None), scale.eps) for scale in scales if scale is not None]
    (norm, eps), (ffn_norm, ffn_eps) = norms or [(None, 0.0)] * 2
    projections = attention.__dict__["_modules"]
    qkv = tuple(blocks.part(projections[name], nn.Linear, dtype) for name in kin.qkv)
    heads = [
        scale_of(attention.__dict__["_modules"][f"{name}_norm"], dtype) for name in "qk" if kin.head_norms
    ]
    if any(isinstance(part, nn.Module) for part in qkv) or None in heads:
        return None
    head_norms: Any = tuple(heads) or (Scale(None, 0.0, 0.0),) * 2  # type: ignore[arg-type]
    if head_norms[0].eps != head_norms[1].eps:
        return None
    return LayerParts(
        qkv=qkv,
        head_dim=attention.head_dim,
        attention_out=w.attention_out,
        attention_norm=norm,
        attention_eps=eps,
        attention_p=attention.attention_dropout if attention.training else 0.0,
        context_p=w.attention_p,
        ffn=w.ffn,
        ffn_norm=ffn_norm,
        ffn_eps=ffn_eps,
        ffn_p=w.ffn_p,
        unfused=w.unfused,
        head_norms=(head_norms[0].weight, head_norms[1].weight),
        head_eps=head_norms[0].eps,
    )


class Given(NamedTuple):
    """What attention is called with beside the hidden states."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    cache: Any
    is_causal: bool | None
    output_attentions: bool
    told: dict[str, Any] | None
    positions: Tensor | None = None


def _given(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
    """The arguments of a layer or of its attention; None if its own code has to read them."""
    positions, mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
    cache = attention_interface.cache_of(kwargs)
    told = paged.arguments(cache, kwargs)
    if (
        args
        or not isinstance(positions, (tuple, list))
        or len(positions) != 2
        or positions[0].dim() != 3
        or (told is None and type(cache) not in attention_interface.CACHES)
        or not attention_interface.readable(mask)
        or not attention_interface.gets_readable_masks(attention)
        or checks.watched_globally()
    ):
        return None
    wanted = bool(kwargs.get("output_attentions"))
    cos, sin = positions
    causal, places = kwargs.get("is_causal"), kwargs.get("position_ids")
    return Given(cos, sin, mask, cache, causal, wanted, told, places)


def scale_of(norm: Any, dtype: torch.dtype | None) -> Scale | None:
    """The weight of a norm that is in its patched form."""
    kin: Any = getattr(type(norm), "kin", None)
    held = None if kin is None else checks.parameters(norm, kin.forms[kin.norm], dtype)
    return None if held is None else Scale(held[0], _eps(norm), kin.offset)


def _first(mlp: Any, x: Tensor) -> Tensor:
    """What a feed-forward gives, without the scores that GPT-OSS's experts give too."""
    out = mlp(x)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def check_norm(module: Any) -> str | None:
    return None if module.weight.dim() == 1 else "its weight is not a vector"


def _check_attention(kin: Kin, module: Any) -> str | None:
    parts: dict[str, type] = dict.fromkeys((*kin.qkv, "o_proj"), nn.Linear)
    why = checks.reason_for_parts(module, parts, lora=True)
    if why is not None:
        return why
    if module.head_dim > 256:
        return f"head size {module.head_dim}; allowed are 1 to 256"
    if module.head_dim % 2:
        return f"head size {module.head_dim}; the rotary embedding needs an even one"
    features = [checks.without_adapter(module.get_submodule(name)).out_features for name in kin.qkv]
    groups = module.num_key_value_groups
    if len(features) == 1:
        features = [features[0] * share // (groups + 2) for share in (groups, 1, 1)]
    if features[0] != groups * features[1] or features[1] != features[2] or features[1] % module.head_dim:
        return f"query, key and value have {features} features, which are not {groups} heads to one"
    return None


def _check_mlp(kin: Kin, module: Any) -> str | None:
    parts: dict[str, type] = dict.fromkeys((*kin.gate_and_up, "down_proj"), nn.Linear)
    why = checks.reason_for_parts(module, parts, lora=True)
    if why is None and len(kin.gate_and_up) == 2:  # else the activation is called as it is
        why = checks.reason_for_activation(getattr(module, kin.activation))
    return why


def _check_layer(kin: Kin, module: Any) -> str | None:
    return checks.reason_for_parts(module, dict.fromkeys(kin.dropouts, nn.Dropout)) or checks.inside(
        module.self_attn,
        "self_attn",
        kin.attention,
        kin.forms[kin.attention],
        partial(_check_attention, kin),
    )


# ------------------------------------------------------------------------------------------------------------
# what a family says


def family(name: str, kin: Kin, lm: type[CausalLM] | None = None) -> Family:
    """The family of these kin; `lm` is the form of the language model for tokens of a generation."""
    forms, rules = kin.forms, [] if lm is None else [token_model.rule(lm)]
    if kin.mlp is not None:
        fused = len(kin.gate_and_up) == 2
        rules.append(
            Rule(
                kin.mlp,
                forms[kin.mlp],
                ("feed_forward",) if fused else ("linear",),
                partial(_check_mlp, kin),
                "" if fused else "two products: one weight holds gate and up",
                projections=(*kin.gate_and_up, "down_proj"),
            )
        )
    if kin.model in forms:
        rules.append(layer_stack.rule(kin.model, forms[kin.model]))
    return Family(
        name=name,
        rules=(
            Rule(
                kin.layer,
                forms[kin.layer],
                (),
                partial(_check_layer, kin),
                "its halves with their norms and sums",
            ),
            Rule(
                kin.attention,
                forms[kin.attention],
                ("linear", "rotary", "attention"),
                partial(_check_attention, kin),
                projections=(*kin.qkv, "o_proj"),
            ),
            Rule(kin.norm, forms[kin.norm], ("rms_norm",), check_norm),
            *rules,
        ),
        children=(ChildRule(kin.causal_lm, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),),
        losses=fused_loss.rules(*forms.values()),
        models=(kin.model,),
        mask_path=(kin.layer, kin.attention),
        left={} if kin.experts is None else {kin.experts: EXPERTS},
    )


EXPERTS = "a mixture of experts, called as it is between our other calls"


#: Makes the patched form of a causal language model's class: its loss without logits, in training.
causal_lm = fused_loss.language_model
