"""OPT, with norms before its halves, or behind them as in OPT-350m. Its positions stay the model's own."""

from __future__ import annotations

from transformers.models.opt import modeling_opt as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.OPTAttention,
    hf.OPTDecoderLayer,
    None,
    hf.OPTDecoder,
    hf.OPTForCausalLM,
    attention_at="self_attn",
    mlp_at="",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    dropouts=("dropout", "dropout"),
    attention_dropout="dropout",
    activation="activation_fn",
    order=lambda layer: "pre" if layer.do_layer_norm_before else "post",
    last_norms=("final_layer_norm",),
    projections=("project_in", "project_out"),
)


class BigmodelOPTAttention(gpt_like.Attention, hf.OPTAttention, kin=KIN):
    pass


class BigmodelOPTDecoderLayer(gpt_like.Layer, hf.OPTDecoderLayer, kin=KIN):
    pass


class BigmodelOPTDecoder(layer_stack.Model, hf.OPTDecoder, kin=KIN):
    pass


@gpt_like.causal_lm(KIN)
class BigmodelOPTForCausalLM(hf.OPTForCausalLM):
    pass


FAMILY = gpt_like.family("opt", KIN)
