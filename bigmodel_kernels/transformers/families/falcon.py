"""Falcon: one weight with the queries that share a key, the key and the value in turn; rotary embedding, or
ALiBi; both halves side by side, from one norm or two, or one after the other. Its code goes by no interface
of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon import modeling_falcon as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Given, Kin


def _side_by_side(layer: Any) -> bool:
    return layer.config.new_decoder_architecture or layer.config.parallel_attn  # type: ignore[no-any-return]


def _norms(layer: Any) -> tuple[str, str | None]:
    if not _side_by_side(layer):
        return "input_layernorm", "post_attention_layernorm"
    if layer.config.new_decoder_architecture and layer.config.num_ln_in_parallel_attn == 2:
        return "ln_attn", "ln_mlp"
    return "input_layernorm", None


def _queries(attention: Any) -> int:
    """How many share a key in the weight; in the cache they share one only with `multi_query`."""
    return attention.num_heads // attention.num_kv_heads  # type: ignore[no-any-return]


def _is_in_the_mask(alibi: Tensor | None) -> bool:
    """Whether the model has added it to a mask of four dimensions: then it has given it four as well."""
    return alibi is not None and alibi.dim() == 4


def _refuse(attention: Any) -> str | None:
    if attention.config.alibi and attention.config._attn_implementation == "eager":
        return "attn_implementation='eager' adds ALiBi twice; known is 'sdpa', which adds it once"
    return None


KIN = Kin(
    hf.FalconAttention,
    hf.FalconDecoderLayer,
    hf.FalconMLP,
    hf.FalconModel,
    hf.FalconForCausalLM,
    attention_at="self_attention",
    mlp_at="mlp",
    norms=_norms,
    dropouts=("config.attention_dropout", "hidden_dropout"),
    drops_the_sum=True,
    linear=hf.FalconLinear,
    qkv=("query_key_value",),
    queries=_queries,
    repeats=lambda attention: _queries(attention) if attention.new_decoder_architecture else 1,
    out="dense",
    attention_dropout=lambda attention: "attention_dropout" if attention.config.alibi else "",
    w_in="dense_h_to_4h",
    w_out="dense_4h_to_h",
    rotary="half",
    positional=(
        "alibi",
        "attention_mask",
        "position_ids",
        "layer_past",
        "use_cache",
        "output_attentions",
        "position_embeddings",
    ),
    gives_weights=True,
    order=lambda layer: "parallel" if _side_by_side(layer) else "pre",
    interface=False,
    reads_booleans=True,
    asks_for_full_masks=True,
    scale=lambda attention: float(attention.inv_norm_factor),
    refuse=_refuse,
    last_norms=("ln_f",),
)


class BigmodelFalconAttention(gpt_like.Attention, hf.FalconAttention, kin=KIN):
    def _alibi(self, query: Tensor, given: Given) -> Tensor | None:
        """Scaled as the logits are."""
        if _is_in_the_mask(given.alibi):
            return None
        alibi = super()._alibi(query, given)
        return None if alibi is None else alibi * self.inv_norm_factor

    def _for_its_own_code(self, states: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = super()._for_its_own_code(states, kwargs)
        if _is_in_the_mask(kwargs.get("alibi")):  # eager code would add it once more
            kwargs["alibi"] = torch.zeros_like(kwargs["alibi"])
        return kwargs


class BigmodelFalconMLP(gpt_like.MLP, hf.FalconMLP, kin=KIN):
    pass


class BigmodelFalconDecoderLayer(gpt_like.Layer, hf.FalconDecoderLayer, kin=KIN):
    pass


class BigmodelFalconModel(layer_stack.Model, hf.FalconModel, kin=KIN):
    at = "h"


@gpt_like.causal_lm(KIN)
class BigmodelFalconForCausalLM(hf.FalconForCausalLM):
    pass


FAMILY = gpt_like.family("falcon", KIN)
