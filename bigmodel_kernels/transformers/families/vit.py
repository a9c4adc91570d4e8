"""ViT: an encoder of patches of an image, whose layers are GPT-2's without a mask."""

from __future__ import annotations

from transformers.models.vit import modeling_vit as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.ViTAttention,
    hf.ViTLayer,
    hf.ViTMLP,
    hf.ViTModel,
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


class BigmodelViTAttention(gpt_like.Attention, hf.ViTAttention, kin=KIN):
    pass


class BigmodelViTMLP(gpt_like.MLP, hf.ViTMLP, kin=KIN):
    pass


class BigmodelViTLayer(gpt_like.Layer, hf.ViTLayer, kin=KIN):
    pass


class BigmodelViTModel(layer_stack.Model, hf.ViTModel, kin=KIN):
    pass


FAMILY = gpt_like.family("vit", KIN)
