"""CLIP: the encoder of images, and that of texts, which is causal."""

from __future__ import annotations

from transformers.models.clip import modeling_clip as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.CLIPAttention,
    hf.CLIPEncoderLayer,
    hf.CLIPMLP,
    (hf.CLIPTextModel, hf.CLIPVisionModel),
    None,
    attention_at="self_attn",
    mlp_at="mlp",
    norms=("layer_norm1", "layer_norm2"),
    attention_dropout="dropout",
    positional=("attention_mask",),
    above=(hf.CLIPEncoder,),
    activation="activation_fn",
    scale=lambda attention: float(attention.scale),
    last_norms=("final_layer_norm", "pre_layrnorm", "post_layernorm"),
)


class BigmodelCLIPAttention(gpt_like.Attention, hf.CLIPAttention, kin=KIN):
    pass


class BigmodelCLIPMLP(gpt_like.MLP, hf.CLIPMLP, kin=KIN):
    pass


class BigmodelCLIPEncoderLayer(gpt_like.Layer, hf.CLIPEncoderLayer, kin=KIN):
    pass


class BigmodelCLIPEncoder(layer_stack.Model, hf.CLIPEncoder, kin=KIN):
    pass


FAMILY = gpt_like.family("clip", KIN)
