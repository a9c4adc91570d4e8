"""CodeGen: GPT-J with one weight for Q, V and K, in the four parts that it was trained in."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.codegen import modeling_codegen as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin


def _refuse(attention: Any) -> str | None:
    if attention.mp_num != 4 or attention.embed_dim % 4:
        return f"its weight for Q, V and K is in {attention.mp_num} parts; known are four"
    return gpt_like.refuse_rotary(attention)


def _split(whole: Tensor, head_dim: int, queries: int) -> tuple[Tensor, ...]:
    """Query, key and value of a product that has query, value and key of a quarter of the heads in turn."""
    query, value, key = (
        part.flatten(-2).unflatten(-1, (-1, head_dim)) for part in whole.unflatten(-1, (4, 3, -1)).unbind(-2)
    )
    return query, key, value


KIN = Kin(
    hf.CodeGenAttention,
    hf.CodeGenBlock,
    hf.CodeGenMLP,
    hf.CodeGenModel,
    hf.CodeGenForCausalLM,
    attention_at="attn",
    mlp_at="mlp",
    norms=("ln_1", None),
    dropouts=("attn.resid_dropout", "mlp.dropout"),
    qkv=("qkv_proj",),
    split=_split,
    pieces=(0, 3, 6, 9, 2, 5, 8, 11, 1, 4, 7, 10),
    w_in="fc_in",
    w_out="fc_out",
    rotary="interleaved",
    sine_first=True,
    order=lambda layer: "parallel",
    refuse=_refuse,
    last_norms=("ln_f",),
)


class BigmodelCodeGenAttention(gpt_like.Attention, hf.CodeGenAttention, kin=KIN):
    pass


class BigmodelCodeGenMLP(gpt_like.MLP, hf.CodeGenMLP, kin=KIN):
    pass


class BigmodelCodeGenBlock(gpt_like.Layer, hf.CodeGenBlock, kin=KIN):
    pass


class BigmodelCodeGenModel(layer_stack.Model, hf.CodeGenModel, kin=KIN):
    at = "h"


@gpt_like.causal_lm(KIN)
class BigmodelCodeGenForCausalLM(hf.CodeGenForCausalLM):
    pass


FAMILY = gpt_like.family("codegen", KIN)
