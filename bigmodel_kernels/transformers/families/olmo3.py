"""OLMo 3: OLMo 2 with a window in most layers."""

from __future__ import annotations

from transformers.models.olmo3 import modeling_olmo3 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Olmo3", keeps_dtype=True, norms=llama_like.OUTER, head_norms="features")


class BigmodelOlmo3RMSNorm(llama_like.RMSNorm, hf.Olmo3RMSNorm, kin=KIN):
    pass


class BigmodelOlmo3Attention(llama_like.Attention, hf.Olmo3Attention, kin=KIN):
    pass


class BigmodelOlmo3MLP(llama_like.MLP, hf.Olmo3MLP, kin=KIN):
    pass


class BigmodelOlmo3DecoderLayer(llama_like.Layer, hf.Olmo3DecoderLayer, kin=KIN):
    pass


class BigmodelOlmo3Model(layer_stack.Model, hf.Olmo3Model, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelOlmo3ForCausalLM(hf.Olmo3ForCausalLM):
    pass


FAMILY = llama_like.family("olmo3", KIN)
