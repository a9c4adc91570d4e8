"""GPT-2: GPT2Model and every head on it; prefill, and decoding with any cache of transformers.

Per block five calls: LayerNorm, one product for Q, K and V (Conv1D weights as they are), attention that reads
it in place or reads the cache, projection + residual, and LayerNorm + feed-forward + residual.
`scale_attn_weights` and `scale_attn_by_inverse_layer_idx` are the operator's scale; `reorder_and_upcast_attn`
asks for a softmax in float32, which the operator always does. Left-padded batches carry their 2D mask to the
operator.

A call takes the original code of a block, and is as right, when dropout is active, under autocast, when
attention probabilities are asked for (then computed in plain PyTorch from the same Q and K), with
cross-attention, and where a hook or a replaced submodule stands in the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.models.gpt2 import modeling_gpt2 as hf
from transformers.pytorch_utils import Conv1D

from bigmodel_kernels.transformers import attention_interface, blocks, checks
from bigmodel_kernels.transformers.blocks import Affine, LayerWeights
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear

_CACHES = (type(None), DynamicCache, StaticCache, EncoderDecoderCache)


class BigmodelGPT2Attention(hf.GPT2Attention):
    """Self-attention with Conv1D projections by the operators; used when the block runs its own code."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cache, mask, plain = _call(args, kwargs)
        held = _projections(self, hidden_states.dtype) if plain else None
        if held is None or _resid_drops(self) or checks.original_code_needed(hidden_states.device.type):
            return super().forward(hidden_states, *args, **kwargs)
        qkv, out = held
        query, key, value = blocks.split_heads(blocks.linear(hidden_states, (qkv,), "conv1d"), self.head_dim)
        key, value = _cached(cache, key, value, self.layer_idx)
        context, weights = attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            output_attentions=kwargs.get("output_attentions", False),
        )
        return blocks.linear(context.flatten(2), (out,), "conv1d"), weights


class BigmodelGPT2MLP(hf.GPT2MLP):
    """The feed-forward block in one call."""

    def forward(self, hidden_states: Any) -> Tensor:
        held = _ffn(self, hidden_states.dtype)
        if held is None or checks.original_code_needed(hidden_states.device.type):
            return super().forward(hidden_states)
        return blocks.feed_forward(hidden_states, *held[:2], "conv1d", held[2], None)


class BigmodelGPT2Block(hf.GPT2Block):
    """The whole block in five calls."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        cache, mask, plain = _call(args, kwargs)
        weights = _block_weights(self, hidden_states.dtype) if plain else None
        if (
            weights is None
            or attention_interface.wants_attentions(kwargs)
            or checks.original_code_needed(hidden_states.device.type)
        ):
            return super().forward(hidden_states, *args, **kwargs)
        attention = self.attn
        scale, head_dim, index = attention.scaling, attention.head_dim, attention.layer_idx

        def attend(qkv: Tensor) -> Tensor:
            query, key, value = blocks.split_heads(qkv, head_dim)
            key, value = _cached(cache, key, value, index)
            seen = attention_interface.visibility(query, key.shape[2], mask, is_causal=True)
            if seen.keys != key.shape[2]:
                key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
            return blocks.merge_heads(attention_interface.run(query, key, value, seen, scale))

        return blocks.pre_norm_layer(hidden_states, weights, attend, "conv1d")


# ------------------------------------------------------------------------------------------------------------
# arguments and weights, read at each call


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Cache and mask of a call of a block or its attention, and whether it is plain causal self-attention."""
    cache = args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    encoder = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
    plain = (
        encoder is None
        and len(args) <= 3
        and type(cache) in _CACHES
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 3, 4)))
    )
    return cache, mask, plain


def _cached(cache: Any, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    if cache is None:
        return key, value
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    key, value = cache.update(key, value, layer)
    return key, value


def _resid_drops(attention: Any) -> bool:
    return checks.dropping(attention.resid_dropout) or not checks.intact(attention.resid_dropout, nn.Dropout)


def _projections(attention: Any, dtype: torch.dtype) -> tuple[Affine, Affine] | None:
    modules = attention.__dict__["_modules"]
    qkv = checks.parameters(modules["c_attn"], Conv1D, dtype)
    out = checks.parameters(modules["c_proj"], Conv1D, dtype)
    if qkv is None or out is None or attention.is_cross_attention:
        return None
    if not checks.intact(modules["attn_dropout"], nn.Dropout):
        return None
    return Affine(*qkv), Affine(*out)


def _ffn(mlp: Any, dtype: torch.dtype) -> tuple[Affine, Affine, str] | None:
    modules = mlp.__dict__["_modules"]
    ffn_in = checks.parameters(modules["c_fc"], Conv1D, dtype)
    ffn_out = checks.parameters(modules["c_proj"], Conv1D, dtype)
    activation = checks.activation(modules["act"])
    if ffn_in is None or ffn_out is None or activation is None:
        return None
    if checks.dropping(modules["dropout"]) or not checks.intact(modules["dropout"], nn.Dropout):
        return None
    return Affine(*ffn_in), Affine(*ffn_out), activation


def _block_weights(block: Any, dtype: torch.dtype) -> LayerWeights | None:
    modules = block.__dict__["_modules"]
    attention, mlp = modules["attn"], modules["mlp"]
    if not checks.intact(attention, BigmodelGPT2Attention) or not checks.intact(mlp, BigmodelGPT2MLP):
        return None
    if _resid_drops(attention) or (attention.training and attention.attn_dropout.p > 0):
        return None
    projections, ffn = _projections(attention, dtype), _ffn(mlp, dtype)
    first = checks.parameters(modules["ln_1"], nn.LayerNorm, dtype)
    second = checks.parameters(modules["ln_2"], nn.LayerNorm, dtype)
    if projections is None or ffn is None or first is None or second is None:
        return None
    return LayerWeights(
        (projections[0],),
        projections[1],
        Affine(*first),
        modules["ln_1"].eps,
        ffn[0],
        ffn[1],
        Affine(*second),
        modules["ln_2"].eps,
        ffn[2],
    )


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def _check_attention(module: Any) -> str | None:
    if module.is_cross_attention:
        return "cross-attention keeps its own projections; only its attention function changes"
    parts: dict[str, type] = {"c_attn": Conv1D, "c_proj": Conv1D}
    why = checks.reason_for_parts(module, {**parts, "attn_dropout": nn.Dropout, "resid_dropout": nn.Dropout})
    if why is not None:
        return why
    if getattr(module, "pruned_heads", None):
        return "it has pruned heads"
    if module.c_attn.nf != 3 * module.num_heads * module.head_dim:
        return f"c_attn gives {module.c_attn.nf} features, not 3 x heads x head size"
    if module.head_dim > 256:
        return f"head size {module.head_dim}; allowed are 1 to 256"
    return None


def _check_mlp(module: Any) -> str | None:
    why = checks.reason_for_parts(module, {"c_fc": Conv1D, "c_proj": Conv1D, "dropout": nn.Dropout})
    if why is None and checks.activation(module.act) is None:
        known = ", ".join(sorted(set(checks.ACTIVATIONS.values())))
        why = f"activation {type(module.act).__name__} has no kernel; known are {known}"
    return why


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
        Rule(
            hf.GPT2Block,
            BigmodelGPT2Block,
            ("layer_norm",),
            _check_block,
            note="with its parts as five calls",
        ),
        Rule(hf.GPT2Attention, BigmodelGPT2Attention, ("linear", "attention"), _check_attention),
        Rule(hf.GPT2MLP, BigmodelGPT2MLP, ("feed_forward",), _check_mlp),
    ),
    children=(
        ChildRule(hf.GPT2Model, "ln_f", nn.LayerNorm, BigmodelLayerNorm, ("layer_norm",)),
        ChildRule(hf.GPT2LMHeadModel, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.GPT2DoubleHeadsModel, "lm_head", nn.Linear, BigmodelLinear, ("linear",)),
    ),
    models=(hf.GPT2Model,),
    mask_path=(hf.GPT2Block, hf.GPT2Attention),
)
