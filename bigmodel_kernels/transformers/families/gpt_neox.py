"""GPT-NeoX and Pythia: both halves from the layer's input, or one after the other."""

from __future__ import annotations

from transformers.models.gpt_neox import modeling_gpt_neox as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.GPTNeoXAttention,
    hf.GPTNeoXLayer,
    hf.GPTNeoXMLP,
    hf.GPTNeoXModel,
    hf.GPTNeoXForCausalLM,
    attention_at="attention",
    mlp_at="mlp",
    norms=("input_layernorm", "post_attention_layernorm"),
    dropouts=("post_attention_dropout", "post_mlp_dropout"),
    qkv=("query_key_value",),
    out="dense",
    head_dim="head_size",
    w_in="dense_h_to_4h",
    w_out="dense_4h_to_h",
    rotary="half",
    order=lambda layer: "parallel" if layer.use_parallel_residual else "pre",
    last_norms=("final_layer_norm",),
)


class BigmodelGPTNeoXAttention(gpt_like.Attention, hf.GPTNeoXAttention, kin=KIN):
    pass


class BigmodelGPTNeoXMLP(gpt_like.MLP, hf.GPTNeoXMLP, kin=KIN):
    pass


class BigmodelGPTNeoXLayer(gpt_like.Layer, hf.GPTNeoXLayer, kin=KIN):
    pass


class BigmodelGPTNeoXModel(layer_stack.Model, hf.GPTNeoXModel, kin=KIN):
    pass


@gpt_like.causal_lm(KIN)
class BigmodelGPTNeoXForCausalLM(hf.GPTNeoXForCausalLM):
    pass


FAMILY = gpt_like.family("gpt_neox", KIN)
