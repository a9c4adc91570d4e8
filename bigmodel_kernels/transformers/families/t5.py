"""T5, 1.0 and 1.1 (Flan-T5): relu, or gelu with a gate."""

from __future__ import annotations

from transformers.models.t5 import modeling_t5 as hf

from bigmodel_kernels.transformers import llama_like, t5_like
from bigmodel_kernels.transformers.t5_like import Kin

KIN = Kin.of(hf, "T5")


class BigmodelT5LayerNorm(llama_like.RMSNorm, hf.T5LayerNorm, kin=KIN):
    pass


class BigmodelT5Attention(t5_like.Attention, hf.T5Attention, kin=KIN):
    pass


class BigmodelT5LayerSelfAttention(t5_like.SelfAttention, hf.T5LayerSelfAttention, kin=KIN):
    pass


class BigmodelT5LayerCrossAttention(t5_like.CrossAttention, hf.T5LayerCrossAttention, kin=KIN):
    pass


class BigmodelT5DenseActDense(t5_like.Dense, hf.T5DenseActDense, kin=KIN):
    pass


class BigmodelT5DenseGatedActDense(t5_like.GatedDense, hf.T5DenseGatedActDense, kin=KIN):
    pass


class BigmodelT5LayerFF(t5_like.LayerFF, hf.T5LayerFF, kin=KIN):
    pass


class BigmodelT5Block(t5_like.Block, hf.T5Block, kin=KIN):
    pass


class BigmodelT5Stack(t5_like.Stack, hf.T5Stack, kin=KIN):
    pass


@t5_like.language_model(KIN)
class BigmodelT5ForConditionalGeneration(hf.T5ForConditionalGeneration):
    pass


FAMILY = t5_like.family("t5", KIN)
