"""StarCoder2: keys that several queries share, and a window."""

from __future__ import annotations

from transformers.models.starcoder2 import modeling_starcoder2 as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.Starcoder2Attention,
    hf.Starcoder2DecoderLayer,
    hf.Starcoder2MLP,
    hf.Starcoder2Model,
    hf.Starcoder2ForCausalLM,
    attention_at="self_attn",
    mlp_at="mlp",
    norms=("input_layernorm", "post_attention_layernorm"),
    dropouts=("self_attn.residual_dropout", "mlp.residual_dropout"),
    out="o_proj",
    w_in="c_fc",
    w_out="c_proj",
    rotary="half",
    last_norms=("norm",),
)


class BigmodelStarcoder2Attention(gpt_like.Attention, hf.Starcoder2Attention, kin=KIN):
    pass


class BigmodelStarcoder2MLP(gpt_like.MLP, hf.Starcoder2MLP, kin=KIN):
    pass


class BigmodelStarcoder2DecoderLayer(gpt_like.Layer, hf.Starcoder2DecoderLayer, kin=KIN):
    pass


class BigmodelStarcoder2Model(layer_stack.Model, hf.Starcoder2Model, kin=KIN):
    pass


@gpt_like.causal_lm(KIN)
class BigmodelStarcoder2ForCausalLM(hf.Starcoder2ForCausalLM):
    pass


FAMILY = gpt_like.family("starcoder2", KIN)
