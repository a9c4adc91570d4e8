"""GPT-J: both halves from one norm of the layer's input."""

from __future__ import annotations

from transformers.models.gptj import modeling_gptj as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.GPTJAttention,
    hf.GPTJBlock,
    hf.GPTJMLP,
    hf.GPTJModel,
    hf.GPTJForCausalLM,
    attention_at="attn",
    mlp_at="mlp",
    norms=("ln_1", None),
    dropouts=("attn.resid_dropout", "mlp.dropout"),
    w_in="fc_in",
    w_out="fc_out",
    rotary="interleaved",
    sine_first=True,
    order=lambda layer: "parallel",
    refuse=gpt_like.refuse_rotary,
    last_norms=("ln_f",),
)


class BigmodelGPTJAttention(gpt_like.Attention, hf.GPTJAttention, kin=KIN):
    pass


class BigmodelGPTJMLP(gpt_like.MLP, hf.GPTJMLP, kin=KIN):
    pass


class BigmodelGPTJBlock(gpt_like.Layer, hf.GPTJBlock, kin=KIN):
    pass


class BigmodelGPTJModel(layer_stack.Model, hf.GPTJModel, kin=KIN):
    at = "h"


@gpt_like.causal_lm(KIN)
class BigmodelGPTJForCausalLM(hf.GPTJForCausalLM):
    pass


FAMILY = gpt_like.family("gptj", KIN)
