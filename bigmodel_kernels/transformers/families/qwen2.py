"""Qwen2 and Qwen2.5: Llama with biases on Q, K and V, and a window in some layers."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2 as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Qwen2")


class BigmodelQwen2RMSNorm(llama_like.RMSNorm, hf.Qwen2RMSNorm, kin=KIN):
    pass


class BigmodelQwen2Attention(llama_like.Attention, hf.Qwen2Attention, kin=KIN):
    pass


class BigmodelQwen2MLP(llama_like.MLP, hf.Qwen2MLP, kin=KIN):
    pass


class BigmodelQwen2DecoderLayer(llama_like.Layer, hf.Qwen2DecoderLayer, kin=KIN):
    pass


class BigmodelQwen2Model(llama_like.Model, hf.Qwen2Model, kin=KIN):
    pass


class BigmodelQwen2ForCausalLM(llama_like.CausalLM, hf.Qwen2ForCausalLM):
    pass


@llama_like.causal_lm(KIN)
class BigmodelQwen2ForCausalLMWithoutLogits(llama_like.CausalLM, hf.Qwen2ForCausalLM):
    pass


FAMILY = llama_like.family("qwen2", KIN, BigmodelQwen2ForCausalLM)
