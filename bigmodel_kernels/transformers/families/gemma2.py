"""Gemma 2: Gemma with norms on both sides, a softcap, and a window in every second layer."""

from __future__ import annotations

from transformers.models.gemma2 import modeling_gemma2 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Gemma2", offset=1.0, keeps_dtype=True, norms=llama_like.BOTH, softcap=True)


class BigmodelGemma2RMSNorm(llama_like.RMSNorm, hf.Gemma2RMSNorm, kin=KIN):
    pass


class BigmodelGemma2Attention(llama_like.Attention, hf.Gemma2Attention, kin=KIN):
    pass


class BigmodelGemma2MLP(llama_like.MLP, hf.Gemma2MLP, kin=KIN):
    pass


class BigmodelGemma2DecoderLayer(llama_like.Layer, hf.Gemma2DecoderLayer, kin=KIN):
    pass


class BigmodelGemma2Model(layer_stack.Model, hf.Gemma2Model, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelGemma2ForCausalLM(hf.Gemma2ForCausalLM):
    pass


FAMILY = llama_like.family("gemma2", KIN)
