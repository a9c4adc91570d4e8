"""GPT-2: GPT2Model and every head on it; prefill, and decoding with any cache of transformers.

Per block five calls: LayerNorm, one product for Q, K and V (Conv1D weights as they are), attention that reads
it in place or reads the cache, projection + residual, and LayerNorm + feed-forward + residual. In inference
on the CPU they are two, before and behind the cache (`whole_layer`); for a token of a generation there is one
for all blocks (`layer_stack`).
`scale_attn_weights` and `scale_attn_by_inverse_layer_idx` are the operator's scale; `reorder_and_upcast_attn`
asks for a softmax in float32, which the operator always does. Left-padded batches carry their 2D mask to the
operator.

Training, autocast and gradient checkpointing run the same calls. A projection that peft has given a LoRA
adapter is called as it is, between our other calls. A call takes the original code of a block, as right,
when attention probabilities are asked for (then computed in plain PyTorch from the same Q and K), with
cross-attention, and where a hook or a replaced submodule stands in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D

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
from bigmodel_kernels.transformers.blocks import Affine, FeedForward, LayerParts, Terms
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear

_CACHES = (*attention_interface.CACHES, EncoderDecoderCache)


class BigmodelGPT2Attention(hf.GPT2Attention):
    """Self-attention with Conv1D projections by the operators; used when the block runs its own code."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cache, mask, told, plain = _call(args, kwargs)
        if not plain or not _projects(self) or checks.watched_globally():
            return super().forward(hidden_states, *args, **kwargs)
        dtype = checks.dtype_of(hidden_states)
        parts = (blocks.part(self.c_attn, Conv1D, dtype),)
        query, key, value = (
            t.transpose(1, 2) for t in blocks.heads(hidden_states, parts, "conv1d", self.head_dim)
        )
        key, value, told = _cached(cache, key, value, self.layer_idx, told)
        context, weights = attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            output_attentions=kwargs.get("output_attentions", False),
            **told,
        )
        out = blocks.project(context.flatten(2), blocks.part(self.c_proj, Conv1D, dtype), "conv1d")
        return self.resid_dropout(out), weights


class BigmodelGPT2MLP(hf.GPT2MLP):
    """The feed-forward block in one call."""

    def forward(self, hidden_states: Any) -> Tensor:
        ffn = _ffn(self, checks.dtype_of(hidden_states))
        if ffn is None or checks.watched_globally():
            return super().forward(hidden_states)
        return blocks.feed_forward(
            hidden_states, ffn, "conv1d", None, dropout_p=checks.dropout_p(self.dropout)
        )


class BigmodelGPT2Block(layer_stack.Layer, hf.GPT2Block):
    """The whole block in five calls, or two."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cache, mask, told, plain = _call(args, kwargs)
        parts = None
        if plain and told is None:
            out = layer_stack.result(self, kwargs, partial(_tokens, hidden_states, cache, mask))
            if out is not None:
                return out
        if plain and told is None:  # in continuous batching its own code calls the patched parts
            parts = _block_parts(self, checks.dtype_of(hidden_states))
        if parts is None or attention_interface.wants_attentions(kwargs) or checks.watched_globally():
            return super().forward(hidden_states, *args, **kwargs)
        scale, index = self.attn.scaling, self.attn.layer_idx

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Terms:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            key, value, _ = _cached(cache, key, value, index)
            seen = attention_interface.visibility(query, key.shape[2], mask, is_causal=True)
            return blocks.terms(query, key, value, seen, scale)

        return blocks.pre_norm_layer(hidden_states, parts, attend, "conv1d")


class BigmodelGPT2Model(token_model.Model, layer_stack.Model, hf.GPT2Model):
    at, layout = "h", "conv1d"
    output = BaseModelOutputWithPastAndCrossAttentions

    def known(self, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
        self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)  # type: ignore[no-untyped-call]
        return not self.config.add_cross_attention  # else it makes another cache

    def table(self) -> Any:
        return self.__dict__["_modules"].get("wte")

    def read(self, layer: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
        return _read(layer, dtype)

    def around(self, dtype: torch.dtype) -> tuple[list[whole_layer.Around], float] | None:
        modules = self.__dict__["_modules"]
        tables = [checks.parameters(modules[name], nn.Embedding, dtype) for name in ("wte", "wpe")]
        norm = checks.parameters(modules["ln_f"], BigmodelLayerNorm, dtype)
        if None in tables or norm is None or checks.probability(self, "drop") != 0.0:
            return None
        return [*(table[0] for table in tables if table is not None), *norm], self.ln_f.eps

    def enter(self, ids: Tensor, positions: Tensor, around: Sequence[Any]) -> tuple[Tensor, Any]:
        word, position, *_ = around
        states = torch.ops.bigmodel.cpu_embedding.default(
            *(ids, word, positions, position, None, None, None, None, 0.0)
        )
        return states, None

    def leave(self, states: Tensor, around: Sequence[Any], eps: float) -> Tensor:
        return torch.ops.bigmodel.cpu_layer_norm.default(states, *around[2:], eps, None)  # type: ignore[no-any-return]


class BigmodelGPT2LMHeadModel(token_model.LanguageModel, hf.GPT2LMHeadModel):
    holds, output = "transformer", CausalLMOutputWithCrossAttentions


@fused_loss.language_model()
class BigmodelGPT2LMHeadModelWithoutLogits(token_model.LanguageModel, hf.GPT2LMHeadModel):
    holds, output = "transformer", CausalLMOutputWithCrossAttentions


# ------------------------------------------------------------------------------------------------------------
# arguments and weights, read at each call


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any] | None, bool]:
    """Cache and mask of a call of a block or its attention, what it is told of continuous batching, and
    whether it is plain causal self-attention.
    """
    cache = args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    encoder = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
    told = paged.arguments(cache, kwargs)
    plain = (
        encoder is None
        and len(args) <= 3
        and (told is not None or type(cache) in _CACHES)
        and attention_interface.readable(mask)
    )
    return cache, mask, told, plain


def _cached(
    cache: Any, key: Tensor, value: Tensor, layer: int, told: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    if cache is None:
        return key, value, {}
    return attention_interface.updated(_self_attention(cache), key, value, layer, told)


def _self_attention(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _projects(attention: Any) -> bool:
    """Whether this is self-attention whose projections and dropouts are as known."""
    modules = attention.__dict__["_modules"]
    return (
        not attention.is_cross_attention
        and checks.row_wise(modules["c_attn"], Conv1D)
        and checks.row_wise(modules["c_proj"], Conv1D)
        and checks.plain_dropout(modules["attn_dropout"])
        and checks.plain_dropout(modules["resid_dropout"])
    )


def _ffn(mlp: Any, dtype: torch.dtype | None) -> FeedForward | None:
    modules = mlp.__dict__["_modules"]
    w_in = checks.parameters(modules["c_fc"], Conv1D, dtype)
    w_out = checks.parameters(modules["c_proj"], Conv1D, dtype)
    activation = checks.activation(modules["act"])
    if w_in is None or w_out is None or activation is None:
        return None
    if not checks.plain_dropout(modules["dropout"]):
        return None
    return FeedForward(Affine(*w_in), Affine(*w_out), activation, checks.recomputes(mlp))


def _block_parts(block: Any, dtype: torch.dtype | None) -> LayerParts | None:
    modules = block.__dict__["_modules"]
    attention, mlp, first, second = modules["attn"], modules["mlp"], modules["ln_1"], modules["ln_2"]
    if (
        not checks.intact(attention, BigmodelGPT2Attention)
        or not checks.intact(mlp, BigmodelGPT2MLP)
        or not _projects(attention)
    ):
        return None
    within = attention.__dict__["_modules"]
    return LayerParts(
        qkv=(blocks.part(within["c_attn"], Conv1D, dtype),),
        head_dim=attention.head_dim,
        attention_out=blocks.part(within["c_proj"], Conv1D, dtype),
        attention_norm=blocks.part(first, nn.LayerNorm, dtype),
        attention_eps=blocks.eps_of(first),
        attention_p=within["attn_dropout"].p if attention.training else 0.0,
        context_p=checks.dropout_p(within["resid_dropout"]),
        ffn=_ffn(mlp, dtype),
        ffn_norm=blocks.part(second, nn.LayerNorm, dtype),
        ffn_eps=blocks.eps_of(second),
        ffn_p=checks.dropout_p(mlp.__dict__["_modules"]["dropout"]),
        unfused=mlp,
    )


def _read(block: Any, dtype: torch.dtype | None) -> tuple[LayerParts, layer_stack.Where] | None:
    """A block's parts, and where in a cache its keys are; None if it does not run as one of all blocks."""
    parts = _block_parts(block, dtype) if checks.intact(block, BigmodelGPT2Block) else None
    if parts is None:
        return None
    attention = block.attn
    return parts, layer_stack.Where(attention.layer_idx, attention.num_heads, attention.scaling)


def _tokens(x: Tensor, cache: Any, mask: Any, stack: layer_stack.Stack) -> Tensor | None:
    """The result of all blocks for the next tokens of sequences, or None (see `whole_layer.tokens`)."""
    if not whole_layer.few(x) or checks.watched_globally():
        return None

    layers = layer_stack.layers_of(stack, x, "conv1d", _read)
    if layers is None:
        return None
    cache = _self_attention(cache)
    return whole_layer.tokens(x, layers, [where.within(cache, mask) for where in layers.given])


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def _check_attention(module: Any) -> str | None:
    if module.is_cross_attention:
        return "cross-attention keeps its own projections; only its attention function changes"
    parts: dict[str, type] = {"c_attn": Conv1D, "c_proj": Conv1D}
    why = checks.reason_for_parts(
        module, {**parts, "attn_dropout": nn.Dropout, "resid_dropout": nn.Dropout}, lora=True
    )
    if why is not None:
        return why
    if getattr(module, "pruned_heads", None):
        return "it has pruned heads"
    features = checks.without_adapter(module.c_attn).nf
    if features != 3 * module.num_heads * module.head_dim:
        return f"c_attn gives {features} features, not 3 x heads x head size"
    if module.head_dim > 256:
        return f"head size {module.head_dim}; allowed are 1 to 256"
    return None


def _check_mlp(module: Any) -> str | None:
    why = checks.reason_for_parts(
        module, {"c_fc": Conv1D, "c_proj": Conv1D, "dropout": nn.Dropout}, lora=True
    )
    return why or checks.reason_for_activation(module.act)


def _check_block(module: Any) -> str | None:
    why = checks.reason_for_parts(module, {"ln_1": nn.LayerNorm, "ln_2": nn.LayerNorm})
    for name, cls, patched, check in (
        ("attn", hf.GPT2Attention, BigmodelGPT2Attention, _check_attention),
        ("mlp", hf.GPT2MLP, BigmodelGPT2MLP, _check_mlp),
    ):
        part = getattr(module, name)
        found = why or (None if type(part) is patched else checks.reason_for_class(part, cls))
        found = found or checks.reason_for_hooks(part) or check(part)
        if why is None and found is not None:
            why = f"{name}: {found}"
    return why


FAMILY = Family(
    name="gpt2",
    rules=(
        token_model.rule(BigmodelGPT2LMHeadModel),
        layer_stack.rule(hf.GPT2Model, BigmodelGPT2Model),
        Rule(
            hf.GPT2Block,
            BigmodelGPT2Block,
            ("layer_norm",),
            _check_block,
            note="with its parts as five calls",
        ),
        Rule(
            hf.GPT2Attention,
            BigmodelGPT2Attention,
            ("linear", "attention"),
            _check_attention,
            projections=("c_attn", "c_proj"),
        ),
        Rule(hf.GPT2MLP, BigmodelGPT2MLP, ("feed_forward",), _check_mlp, projections=("c_fc", "c_proj")),
    ),
    children=(
        ChildRule(hf.GPT2Model, "ln_f", nn.LayerNorm, BigmodelLayerNorm, ("layer_norm",)),
        ChildRule(hf.GPT2LMHeadModel, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.GPT2DoubleHeadsModel, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),
    ),
    losses=fused_loss.rules(BigmodelGPT2LMHeadModelWithoutLogits),
    models=(hf.GPT2Model,),
    mask_path=(hf.GPT2Block, hf.GPT2Attention),
)
