"""M2M-100 and NLLB-200: mBART with sines for positions and no norm of the embedding."""

from __future__ import annotations

from transformers.models.m2m_100 import modeling_m2m_100 as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "M2M100", order="pre", heads=("ForConditionalGeneration",), norms=("layer_norm",))


class BigmodelM2M100Attention(seq2seq_like.Attention, hf.M2M100Attention, kin=KIN):
    pass


class BigmodelM2M100Encoder(seq2seq_like.Encoder, hf.M2M100Encoder, kin=KIN):
    pass


class BigmodelM2M100EncoderLayer(seq2seq_like.EncoderLayer, hf.M2M100EncoderLayer, kin=KIN):
    pass


class BigmodelM2M100DecoderLayer(seq2seq_like.DecoderLayer, hf.M2M100DecoderLayer, kin=KIN):
    pass


class BigmodelM2M100Decoder(seq2seq_like.Stack, hf.M2M100Decoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, hf.shift_tokens_right)
class BigmodelM2M100ForConditionalGeneration(hf.M2M100ForConditionalGeneration):
    pass


FAMILY = seq2seq_like.family("m2m_100", KIN)
