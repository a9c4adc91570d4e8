"""Qwen3-MoE: Qwen3 with experts in some layers, which keep their own code."""

from __future__ import annotations

from transformers.models.qwen3_moe import modeling_qwen3_moe as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Qwen3Moe", head_norms="heads", experts="SparseMoeBlock")


class BigmodelQwen3MoeRMSNorm(llama_like.RMSNorm, hf.Qwen3MoeRMSNorm, kin=KIN):
    pass


class BigmodelQwen3MoeAttention(llama_like.Attention, hf.Qwen3MoeAttention, kin=KIN):
    pass


class BigmodelQwen3MoeMLP(llama_like.MLP, hf.Qwen3MoeMLP, kin=KIN):
    pass


class BigmodelQwen3MoeDecoderLayer(llama_like.Layer, hf.Qwen3MoeDecoderLayer, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelQwen3MoeForCausalLM(hf.Qwen3MoeForCausalLM):
    pass


FAMILY = llama_like.family("qwen3_moe", KIN)
