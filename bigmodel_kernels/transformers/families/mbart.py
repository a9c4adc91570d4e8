"""mBART: BART with norms before its halves."""

from __future__ import annotations

from transformers.models.mbart import modeling_mbart as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "MBart", order="pre", norms=("layernorm_embedding", "layer_norm"))


class BigmodelMBartAttention(seq2seq_like.Attention, hf.MBartAttention, kin=KIN):
    pass


class BigmodelMBartEncoder(seq2seq_like.Encoder, hf.MBartEncoder, kin=KIN):
    pass


class BigmodelMBartEncoderLayer(seq2seq_like.EncoderLayer, hf.MBartEncoderLayer, kin=KIN):
    pass


class BigmodelMBartDecoderLayer(seq2seq_like.DecoderLayer, hf.MBartDecoderLayer, kin=KIN):
    pass


class BigmodelMBartDecoder(seq2seq_like.Stack, hf.MBartDecoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, lambda ids, pad, start: hf.shift_tokens_right(ids, pad), caches=False)
class BigmodelMBartForConditionalGeneration(hf.MBartForConditionalGeneration):
    pass


FAMILY = seq2seq_like.family("mbart", KIN)
