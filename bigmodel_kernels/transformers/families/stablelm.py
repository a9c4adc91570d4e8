"""StableLM: Llama's layer with LayerNorms, or both halves from one norm; rotary embedding of a part of the
head.
"""

from __future__ import annotations

from transformers.models.stablelm import modeling_stablelm as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.StableLmAttention,
    hf.StableLmDecoderLayer,
    hf.StableLmMLP,
    hf.StableLmModel,
    hf.StableLmForCausalLM,
    attention_at="self_attn",
    mlp_at="mlp",
    norms=("input_layernorm", "post_attention_layernorm"),
    dropouts=("", "dropout"),
    out="o_proj",
    w_in="up_proj",
    w_gate="gate_proj",
    w_out="down_proj",
    activation="act_fn",
    rotary="half",
    order=lambda layer: "parallel" if layer.use_parallel_residual else "pre",
    refuse=gpt_like.refuse_head_norms,
    last_norms=("norm",),
)


class BigmodelStableLmAttention(gpt_like.Attention, hf.StableLmAttention, kin=KIN):
    pass


class BigmodelStableLmMLP(gpt_like.MLP, hf.StableLmMLP, kin=KIN):
    pass


class BigmodelStableLmDecoderLayer(gpt_like.Layer, hf.StableLmDecoderLayer, kin=KIN):
    pass


class BigmodelStableLmModel(layer_stack.Model, hf.StableLmModel, kin=KIN):
    pass


@gpt_like.causal_lm(KIN)
class BigmodelStableLmForCausalLM(hf.StableLmForCausalLM):
    pass


FAMILY = gpt_like.family("stablelm", KIN)
