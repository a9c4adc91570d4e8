"""Qwen3: Qwen2 with an RMSNorm of each head of the queries and keys."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3 as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Qwen3", head_norms="heads")


class BigmodelQwen3RMSNorm(llama_like.RMSNorm, hf.Qwen3RMSNorm, kin=KIN):
    pass


class BigmodelQwen3Attention(llama_like.Attention, hf.Qwen3Attention, kin=KIN):
    pass


class BigmodelQwen3MLP(llama_like.MLP, hf.Qwen3MLP, kin=KIN):
    pass


class BigmodelQwen3DecoderLayer(llama_like.Layer, hf.Qwen3DecoderLayer, kin=KIN):
    pass


class BigmodelQwen3Model(llama_like.Model, hf.Qwen3Model, kin=KIN):
    pass


class BigmodelQwen3ForCausalLM(llama_like.CausalLM, hf.Qwen3ForCausalLM):
    pass


@llama_like.causal_lm(KIN)
class BigmodelQwen3ForCausalLMWithoutLogits(llama_like.CausalLM, hf.Qwen3ForCausalLM):
    pass


FAMILY = llama_like.family("qwen3", KIN, BigmodelQwen3ForCausalLM)
