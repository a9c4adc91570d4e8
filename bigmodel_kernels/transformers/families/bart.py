"""BART: norms behind its halves."""

from __future__ import annotations

from transformers.models.bart import modeling_bart as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "Bart", order="post", norms=("layernorm_embedding",))


class BigmodelBartAttention(seq2seq_like.Attention, hf.BartAttention, kin=KIN):
    pass


class BigmodelBartEncoder(seq2seq_like.Encoder, hf.BartEncoder, kin=KIN):
    pass


class BigmodelBartEncoderLayer(seq2seq_like.EncoderLayer, hf.BartEncoderLayer, kin=KIN):
    pass


class BigmodelBartDecoderLayer(seq2seq_like.DecoderLayer, hf.BartDecoderLayer, kin=KIN):
    pass


class BigmodelBartDecoder(seq2seq_like.Stack, hf.BartDecoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, hf.shift_tokens_right, caches=False)
class BigmodelBartForConditionalGeneration(hf.BartForConditionalGeneration):
    pass


FAMILY = seq2seq_like.family("bart", KIN)
