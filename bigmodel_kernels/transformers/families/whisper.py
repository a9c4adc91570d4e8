"""Whisper: mBART behind two convolutions of its own; keys have no bias."""

from __future__ import annotations

from transformers.models.whisper import modeling_whisper as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "Whisper", order="pre", head="proj_out", norms=("layer_norm",))


class BigmodelWhisperAttention(seq2seq_like.Attention, hf.WhisperAttention, kin=KIN):
    pass


class BigmodelWhisperEncoderLayer(seq2seq_like.EncoderLayer, hf.WhisperEncoderLayer, kin=KIN):
    pass


class BigmodelWhisperEncoder(seq2seq_like.Stack, hf.WhisperEncoder, kin=KIN):
    pass


class BigmodelWhisperDecoderLayer(seq2seq_like.DecoderLayer, hf.WhisperDecoderLayer, kin=KIN):
    pass


class BigmodelWhisperDecoder(seq2seq_like.Stack, hf.WhisperDecoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, hf.shift_tokens_right)
class BigmodelWhisperForConditionalGeneration(hf.WhisperForConditionalGeneration):
    pass


FAMILY = seq2seq_like.family("whisper", KIN)
