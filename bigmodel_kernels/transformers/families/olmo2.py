"""OLMo 2: Llama with its norms behind attention and feed-forward, and norms of all queries and keys."""

from __future__ import annotations

from transformers.models.olmo2 import modeling_olmo2 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "Olmo2", keeps_dtype=True, norms=llama_like.OUTER, head_norms="features")


class BigmodelOlmo2RMSNorm(llama_like.RMSNorm, hf.Olmo2RMSNorm, kin=KIN):
    pass


class BigmodelOlmo2Attention(llama_like.Attention, hf.Olmo2Attention, kin=KIN):
    pass


class BigmodelOlmo2MLP(llama_like.MLP, hf.Olmo2MLP, kin=KIN):
    pass


class BigmodelOlmo2DecoderLayer(llama_like.Layer, hf.Olmo2DecoderLayer, kin=KIN):
    pass


class BigmodelOlmo2Model(layer_stack.Model, hf.Olmo2Model, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelOlmo2ForCausalLM(hf.Olmo2ForCausalLM):
    pass


FAMILY = llama_like.family("olmo2", KIN)
