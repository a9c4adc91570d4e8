"""Gemma: Llama with norms that keep their weights as the distance from 1."""

from __future__ import annotations

from transformers.models.gemma import modeling_gemma as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Gemma", offset=1.0, keeps_dtype=True)


class BigmodelGemmaRMSNorm(llama_like.RMSNorm, hf.GemmaRMSNorm, kin=KIN):
    pass


class BigmodelGemmaAttention(llama_like.Attention, hf.GemmaAttention, kin=KIN):
    pass


class BigmodelGemmaMLP(llama_like.MLP, hf.GemmaMLP, kin=KIN):
    pass


class BigmodelGemmaDecoderLayer(llama_like.Layer, hf.GemmaDecoderLayer, kin=KIN):
    pass


class BigmodelGemmaModel(layer_stack.Model, hf.GemmaModel, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelGemmaForCausalLM(hf.GemmaForCausalLM):
    pass


FAMILY = llama_like.family("gemma", KIN)
