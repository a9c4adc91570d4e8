"""SigLIP: CLIP with a text encoder that is not causal, and a head that attends with one query an image."""

from __future__ import annotations

from transformers.models.siglip import modeling_siglip as hf

from bigmodel_kernels.transformers import gpt_like, layer_stack
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.SiglipAttention,
    hf.SiglipEncoderLayer,
    hf.SiglipMLP,
    (hf.SiglipTextModel, hf.SiglipVisionModel),
    None,
    attention_at="self_attn",
    mlp_at="mlp",
    norms=("layer_norm1", "layer_norm2"),
    attention_dropout="dropout",
    positional=("attention_mask",),
    above=(hf.SiglipEncoder,),
    activation="activation_fn",
    scale=lambda attention: float(attention.scale),
    last_norms=("final_layer_norm", "post_layernorm"),
)


class BigmodelSiglipAttention(gpt_like.Attention, hf.SiglipAttention, kin=KIN):
    pass


class BigmodelSiglipMLP(gpt_like.MLP, hf.SiglipMLP, kin=KIN):
    pass


class BigmodelSiglipEncoderLayer(gpt_like.Layer, hf.SiglipEncoderLayer, kin=KIN):
    pass


class BigmodelSiglipEncoder(layer_stack.Model, hf.SiglipEncoder, kin=KIN):
    pass


FAMILY = gpt_like.family(
    "siglip",
    KIN,
    left={
        hf.SiglipMultiheadAttentionPoolingHead: "one query an image: its attention is torch's own module",
    },
)
