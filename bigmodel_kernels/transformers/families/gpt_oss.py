"""GPT-OSS: attention with sinks and a window in every second layer; the experts keep their own code."""

from __future__ import annotations

from transformers.models.gpt_oss import modeling_gpt_oss as hf

from bigmodel_kernels.transformers import llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "GptOss", keeps_dtype=True, sinks=True, once=True, mlp=None, experts="MLP")


class BigmodelGptOssRMSNorm(llama_like.RMSNorm, hf.GptOssRMSNorm, kin=KIN):
    pass


class BigmodelGptOssAttention(llama_like.Attention, hf.GptOssAttention, kin=KIN):
    pass


class BigmodelGptOssDecoderLayer(llama_like.Layer, hf.GptOssDecoderLayer, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelGptOssForCausalLM(hf.GptOssForCausalLM):
    pass


FAMILY = llama_like.family("gpt_oss", KIN)
