"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Mistral")


class BigmodelMistralRMSNorm(llama_like.RMSNorm, hf.MistralRMSNorm, kin=KIN):
    pass


class BigmodelMistralAttention(llama_like.Attention, hf.MistralAttention, kin=KIN):
    pass


class BigmodelMistralMLP(llama_like.MLP, hf.MistralMLP, kin=KIN):
    pass


class BigmodelMistralDecoderLayer(llama_like.Layer, hf.MistralDecoderLayer, kin=KIN):
    pass


class BigmodelMistralModel(llama_like.Model, hf.MistralModel, kin=KIN):
    pass


class BigmodelMistralForCausalLM(llama_like.CausalLM, hf.MistralForCausalLM):
    pass


@llama_like.causal_lm(KIN)
class BigmodelMistralForCausalLMWithoutLogits(llama_like.CausalLM, hf.MistralForCausalLM):
    pass


FAMILY = llama_like.family("mistral", KIN, BigmodelMistralForCausalLM)
