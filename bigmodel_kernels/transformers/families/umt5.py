"""UMT5: T5 1.1 with relative positions of its own in each layer."""

from __future__ import annotations

from transformers.models.umt5 import modeling_umt5 as hf

from bigmodel_kernels.transformers import llama_like, t5_like
from bigmodel_kernels.transformers.t5_like import Kin

KIN = Kin.of(hf, "UMT5")


class BigmodelUMT5LayerNorm(llama_like.RMSNorm, hf.UMT5LayerNorm, kin=KIN):
    pass


class BigmodelUMT5Attention(t5_like.Attention, hf.UMT5Attention, kin=KIN):
    states = "encoder_hidden_states"
    mask = "attention_mask"
    shares_bias = False


class BigmodelUMT5LayerSelfAttention(t5_like.SelfAttention, hf.UMT5LayerSelfAttention, kin=KIN):
    pass


class BigmodelUMT5LayerCrossAttention(t5_like.CrossAttention, hf.UMT5LayerCrossAttention, kin=KIN):
    pass


class BigmodelUMT5DenseActDense(t5_like.Dense, hf.UMT5DenseActDense, kin=KIN):
    pass


class BigmodelUMT5DenseGatedActDense(t5_like.GatedDense, hf.UMT5DenseGatedActDense, kin=KIN):
    pass


class BigmodelUMT5LayerFF(t5_like.LayerFF, hf.UMT5LayerFF, kin=KIN):
    pass


class BigmodelUMT5Block(t5_like.Block, hf.UMT5Block, kin=KIN):
    names = ("attention_mask", "encoder_hidden_states", "encoder_attention_mask")
    gives_biases = False


class BigmodelUMT5Stack(t5_like.Stack, hf.UMT5Stack, kin=KIN):
    pass


@t5_like.language_model(KIN)
class BigmodelUMT5ForConditionalGeneration(hf.UMT5ForConditionalGeneration):
    pass


FAMILY = t5_like.family("umt5", KIN)
