"""Phi-3 and Phi-4: Llama with one weight for Q, K and V and one for gate and up."""

from __future__ import annotations

from transformers.models.phi3 import modeling_phi3 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(
    hf,
    "Phi3",
    qkv=("qkv_proj",),
    gate_and_up=("gate_up_proj",),
    activation="activation_fn",
    dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
)


class BigmodelPhi3RMSNorm(llama_like.RMSNorm, hf.Phi3RMSNorm, kin=KIN):
    pass


class BigmodelPhi3Attention(llama_like.Attention, hf.Phi3Attention, kin=KIN):
    pass


class BigmodelPhi3MLP(llama_like.MLP, hf.Phi3MLP, kin=KIN):
    pass


class BigmodelPhi3DecoderLayer(llama_like.Layer, hf.Phi3DecoderLayer, kin=KIN):
    pass


class BigmodelPhi3Model(layer_stack.Model, hf.Phi3Model, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelPhi3ForCausalLM(hf.Phi3ForCausalLM):
    pass


FAMILY = llama_like.family("phi3", KIN)
