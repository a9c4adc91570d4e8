"""GPT-Neo: logits that are not scaled, and a window in every other layer. Its code goes by no interface of
transformers, and masks what is outside the window itself.
"""

from __future__ import annotations

from typing import Any

from transformers.models.gpt_neo import modeling_gpt_neo as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin


def _window(attention: Any) -> int | None:
    return int(attention.config.window_size) if attention.attention_type == "local" else None


KIN = Kin(
    hf.GPTNeoSelfAttention,
    hf.GPTNeoBlock,
    hf.GPTNeoMLP,
    hf.GPTNeoModel,
    hf.GPTNeoForCausalLM,
    attention_at="attn.attention",
    mlp_at="mlp",
    norms=("ln_1", "ln_2"),
    dropouts=("attn.attention.resid_dropout", "mlp.dropout"),
    attention_dropout="attn_dropout",
    index="layer_id",
    w_in="c_fc",
    w_out="c_proj",
    gives_weights=True,
    interface=False,
    masks_itself=_window,
    scale=lambda attention: 1.0,
    around=(hf.GPTNeoAttention,),
    last_norms=("ln_f",),
)


class BigmodelGPTNeoSelfAttention(gpt_like.Attention, hf.GPTNeoSelfAttention, kin=KIN):
    pass


class BigmodelGPTNeoMLP(gpt_like.MLP, hf.GPTNeoMLP, kin=KIN):
    pass


class BigmodelGPTNeoBlock(gpt_like.Layer, hf.GPTNeoBlock, kin=KIN):
    pass


class BigmodelGPTNeoModel(layer_stack.Model, hf.GPTNeoModel, kin=KIN):
    at = "h"


@gpt_like.causal_lm(KIN)
class BigmodelGPTNeoForCausalLM(hf.GPTNeoForCausalLM):
    pass


FAMILY = gpt_like.family("gpt_neo", KIN)
