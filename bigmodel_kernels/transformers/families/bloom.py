"""BLOOM: ALiBi, which its model makes, as a bias of the logits; attention and feed-forward that add their
residual themselves. Its code goes by no interface of transformers.
"""

from __future__ import annotations

from typing import Any

from transformers.models.bloom import modeling_bloom as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin


def _refuse(part: Any) -> str | None:
    if part.pretraining_tp > 1 and part.slow_but_exact:
        return "slow_but_exact asks for the sums of tensor parallel training"
    return None


KIN = Kin(
    hf.BloomAttention,
    hf.BloomBlock,
    hf.BloomMLP,
    hf.BloomModel,
    hf.BloomForCausalLM,
    attention_at="self_attention",
    mlp_at="mlp",
    norms=("input_layernorm", "post_attention_layernorm"),
    dropouts=("self_attention.hidden_dropout", "mlp.hidden_dropout"),
    qkv=("query_key_value",),
    out="dense",
    w_in="dense_h_to_4h",
    w_out="dense_4h_to_h",
    activation="gelu_impl",
    gives_weights=True,
    order=lambda layer: "normed" if layer.apply_residual_connection_post_layernorm else "pre",
    interface=False,
    scale=lambda attention: float(attention.inv_norm_factor),
    adds_residual=True,
    refuse=_refuse,
    refuse_mlp=_refuse,
    last_norms=("word_embeddings_layernorm", "ln_f"),
)


class BigmodelBloomAttention(gpt_like.Attention, hf.BloomAttention, kin=KIN):
    pass


class BigmodelBloomMLP(gpt_like.MLP, hf.BloomMLP, kin=KIN):
    pass


class BigmodelBloomBlock(gpt_like.Layer, hf.BloomBlock, kin=KIN):
    pass


class BigmodelBloomModel(layer_stack.Model, hf.BloomModel, kin=KIN):
    at = "h"


@gpt_like.causal_lm(KIN)
class BigmodelBloomForCausalLM(hf.BloomForCausalLM):
    pass


FAMILY = gpt_like.family("bloom", KIN)
