"""Marian: BART with sines for positions and no norm of the embedding."""

from __future__ import annotations

from transformers.models.marian import modeling_marian as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "Marian", order="post", heads=("MTModel", "ForCausalLM"))


class BigmodelMarianAttention(seq2seq_like.Attention, hf.MarianAttention, kin=KIN):
    pass


class BigmodelMarianEncoder(seq2seq_like.Encoder, hf.MarianEncoder, kin=KIN):
    pass


class BigmodelMarianEncoderLayer(seq2seq_like.EncoderLayer, hf.MarianEncoderLayer, kin=KIN):
    pass


class BigmodelMarianDecoderLayer(seq2seq_like.DecoderLayer, hf.MarianDecoderLayer, kin=KIN):
    pass


class BigmodelMarianDecoder(seq2seq_like.Stack, hf.MarianDecoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, hf.shift_tokens_right, caches=False)
class BigmodelMarianMTModel(hf.MarianMTModel):
    pass


FAMILY = seq2seq_like.family("marian", KIN)
