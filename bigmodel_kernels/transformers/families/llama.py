"""Llama 2, 3 and every model of its architecture."""

from __future__ import annotations

from transformers.models.llama import modeling_llama as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Llama")


class BigmodelLlamaRMSNorm(llama_like.RMSNorm, hf.LlamaRMSNorm, kin=KIN):
    pass


class BigmodelLlamaAttention(llama_like.Attention, hf.LlamaAttention, kin=KIN):
    pass


class BigmodelLlamaMLP(llama_like.MLP, hf.LlamaMLP, kin=KIN):
    pass


class BigmodelLlamaDecoderLayer(llama_like.Layer, hf.LlamaDecoderLayer, kin=KIN):
    pass


class BigmodelLlamaModel(llama_like.Model, hf.LlamaModel, kin=KIN):
    pass


class BigmodelLlamaForCausalLM(llama_like.CausalLM, hf.LlamaForCausalLM):
    pass


@llama_like.causal_lm(KIN)
class BigmodelLlamaForCausalLMWithoutLogits(llama_like.CausalLM, hf.LlamaForCausalLM):
    pass


FAMILY = llama_like.family("llama", KIN, BigmodelLlamaForCausalLM)
