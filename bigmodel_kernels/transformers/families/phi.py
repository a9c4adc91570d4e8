"""Phi 1 and 2: both halves from one norm, and rotary embedding of a part of the head."""

from __future__ import annotations

from transformers.models.phi import modeling_phi as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.PhiAttention,
    hf.PhiDecoderLayer,
    hf.PhiMLP,
    hf.PhiModel,
    hf.PhiForCausalLM,
    attention_at="self_attn",
    mlp_at="mlp",
    norms=("input_layernorm", None),
    dropouts=("resid_dropout", "resid_dropout"),
    out="dense",
    activation="activation_fn",
    rotary="half",
    order=lambda layer: "parallel",
    refuse=gpt_like.refuse_head_norms,
    last_norms=("final_layernorm",),
)


class BigmodelPhiAttention(gpt_like.Attention, hf.PhiAttention, kin=KIN):
    pass


class BigmodelPhiMLP(gpt_like.MLP, hf.PhiMLP, kin=KIN):
    pass


class BigmodelPhiDecoderLayer(gpt_like.Layer, hf.PhiDecoderLayer, kin=KIN):
    pass


class BigmodelPhiModel(layer_stack.Model, hf.PhiModel, kin=KIN):
    pass


@gpt_like.causal_lm(KIN)
class BigmodelPhiForCausalLM(hf.PhiForCausalLM):
    pass


FAMILY = gpt_like.family("phi", KIN)
