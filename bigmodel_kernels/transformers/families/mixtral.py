"""Mixtral: Mistral with experts, which keep their own code."""

from __future__ import annotations

from transformers.models.mixtral import modeling_mixtral as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Mixtral", mlp=None, experts="SparseMoeBlock")


class BigmodelMixtralRMSNorm(llama_like.RMSNorm, hf.MixtralRMSNorm, kin=KIN):
    pass


class BigmodelMixtralAttention(llama_like.Attention, hf.MixtralAttention, kin=KIN):
    pass


class BigmodelMixtralDecoderLayer(llama_like.Layer, hf.MixtralDecoderLayer, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelMixtralForCausalLM(hf.MixtralForCausalLM):
    pass


FAMILY = llama_like.family("mixtral", KIN)
