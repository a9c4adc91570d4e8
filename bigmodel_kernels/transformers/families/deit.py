"""DeiT: ViT with one token more."""

from __future__ import annotations

from transformers.models.deit import modeling_deit as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.DeiTAttention,
    hf.DeiTLayer,
    hf.DeiTMLP,
    hf.DeiTModel,
    None,
    attention_at="attention",
    mlp_at="mlp",
    norms=("layernorm_before", "layernorm_after"),
    dropouts=("dropout", "dropout"),
    positional=("attention_mask",),
    out="o_proj",
    activation="activation_fn",
    last_norms=("layernorm",),
)


class BigmodelDeiTAttention(gpt_like.Attention, hf.DeiTAttention, kin=KIN):
    pass


class BigmodelDeiTMLP(gpt_like.MLP, hf.DeiTMLP, kin=KIN):
    pass


class BigmodelDeiTLayer(gpt_like.Layer, hf.DeiTLayer, kin=KIN):
    pass


class BigmodelDeiTModel(layer_stack.Model, hf.DeiTModel, kin=KIN):
    pass


FAMILY = gpt_like.family("deit", KIN)
