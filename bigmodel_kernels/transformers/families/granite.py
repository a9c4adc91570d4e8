"""Granite: Llama with factors on the sums, the attention and the logits."""

from __future__ import annotations

from transformers.models.granite import modeling_granite as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Granite")


class BigmodelGraniteRMSNorm(llama_like.RMSNorm, hf.GraniteRMSNorm, kin=KIN):
    pass


class BigmodelGraniteAttention(llama_like.Attention, hf.GraniteAttention, kin=KIN):
    pass


class BigmodelGraniteMLP(llama_like.MLP, hf.GraniteMLP, kin=KIN):
    pass


class BigmodelGraniteDecoderLayer(llama_like.Layer, hf.GraniteDecoderLayer, kin=KIN):
    pass


class BigmodelGraniteModel(layer_stack.Model, hf.GraniteModel, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelGraniteForCausalLM(hf.GraniteForCausalLM):
    pass


FAMILY = llama_like.family("granite", KIN)
