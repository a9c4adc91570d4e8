"""Gemma 3: Gemma 2 with norms of queries and keys in the place of the softcap, and two rotary embeddings.

The text model, alone or within the one that sees images.
"""

from __future__ import annotations

from transformers.models.gemma3 import modeling_gemma3 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(
    hf,
    "Gemma3",
    model="TextModel",
    offset=1.0,
    keeps_dtype=True,
    norms=llama_like.BOTH,
    head_norms="heads",
    angles_by_type=True,
)


class BigmodelGemma3RMSNorm(llama_like.RMSNorm, hf.Gemma3RMSNorm, kin=KIN):
    pass


class BigmodelGemma3Attention(llama_like.Attention, hf.Gemma3Attention, kin=KIN):
    pass


class BigmodelGemma3MLP(llama_like.MLP, hf.Gemma3MLP, kin=KIN):
    pass


class BigmodelGemma3DecoderLayer(llama_like.Layer, hf.Gemma3DecoderLayer, kin=KIN):
    pass


class BigmodelGemma3TextModel(layer_stack.Model, hf.Gemma3TextModel, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelGemma3ForCausalLM(hf.Gemma3ForCausalLM):
    pass


FAMILY = llama_like.family("gemma3", KIN)
