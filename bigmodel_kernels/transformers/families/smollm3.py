"""SmolLM3: Llama with layers that have no rotary embedding."""

from __future__ import annotations

from transformers.models.smollm3 import modeling_smollm3 as hf

from bigmodel_kernels.transformers import layer_stack, llama_like
from bigmodel_kernels.transformers.llama_like import Kin

KIN = Kin.of(hf, "SmolLM3")


class BigmodelSmolLM3RMSNorm(llama_like.RMSNorm, hf.SmolLM3RMSNorm, kin=KIN):
    pass


class BigmodelSmolLM3Attention(llama_like.Attention, hf.SmolLM3Attention, kin=KIN):
    pass


class BigmodelSmolLM3MLP(llama_like.MLP, hf.SmolLM3MLP, kin=KIN):
    pass


class BigmodelSmolLM3DecoderLayer(llama_like.Layer, hf.SmolLM3DecoderLayer, kin=KIN):
    pass


class BigmodelSmolLM3Model(layer_stack.Model, hf.SmolLM3Model, kin=KIN):
    pass


@llama_like.causal_lm(KIN)
class BigmodelSmolLM3ForCausalLM(hf.SmolLM3ForCausalLM):
    pass


FAMILY = llama_like.family("smollm3", KIN)
