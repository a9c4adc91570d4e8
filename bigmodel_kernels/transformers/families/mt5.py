"""mT5: T5 1.1."""

from __future__ import annotations

from transformers.models.mt5 import modeling_mt5 as hf

from bigmodel_kernels.transformers import llama_like, t5_like
from bigmodel_kernels.transformers.t5_like import Kin

KIN = Kin.of(hf, "MT5")


class BigmodelMT5LayerNorm(llama_like.RMSNorm, hf.MT5LayerNorm, kin=KIN):
    pass


class BigmodelMT5Attention(t5_like.Attention, hf.MT5Attention, kin=KIN):
    pass


class BigmodelMT5LayerSelfAttention(t5_like.SelfAttention, hf.MT5LayerSelfAttention, kin=KIN):
    pass


class BigmodelMT5LayerCrossAttention(t5_like.CrossAttention, hf.MT5LayerCrossAttention, kin=KIN):
    pass


class BigmodelMT5DenseActDense(t5_like.Dense, hf.MT5DenseActDense, kin=KIN):
    pass


class BigmodelMT5DenseGatedActDense(t5_like.GatedDense, hf.MT5DenseGatedActDense, kin=KIN):
    pass


class BigmodelMT5LayerFF(t5_like.LayerFF, hf.MT5LayerFF, kin=KIN):
    pass


class BigmodelMT5Block(t5_like.Block, hf.MT5Block, kin=KIN):
    pass


class BigmodelMT5Stack(t5_like.Stack, hf.MT5Stack, kin=KIN):
    pass


@t5_like.language_model(KIN)
class BigmodelMT5ForConditionalGeneration(hf.MT5ForConditionalGeneration):
    pass


FAMILY = t5_like.family("mt5", KIN)
