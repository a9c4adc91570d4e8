"""Pegasus: mBART with sines for positions and no norm of the embedding."""

from __future__ import annotations

from transformers.models.pegasus import modeling_pegasus as hf

from bigmodel_kernels.transformers import seq2seq_like
from bigmodel_kernels.transformers.seq2seq_like import Kin

KIN = Kin.of(hf, "Pegasus", order="pre", norms=("layer_norm",))


class BigmodelPegasusAttention(seq2seq_like.Attention, hf.PegasusAttention, kin=KIN):
    pass


class BigmodelPegasusEncoder(seq2seq_like.Encoder, hf.PegasusEncoder, kin=KIN):
    pass


class BigmodelPegasusEncoderLayer(seq2seq_like.EncoderLayer, hf.PegasusEncoderLayer, kin=KIN):
    pass


class BigmodelPegasusDecoderLayer(seq2seq_like.DecoderLayer, hf.PegasusDecoderLayer, kin=KIN):
    pass


class BigmodelPegasusDecoder(seq2seq_like.Stack, hf.PegasusDecoder, kin=KIN):
    pass


@seq2seq_like.language_model(KIN, hf.shift_tokens_right, caches=False)
class BigmodelPegasusForConditionalGeneration(hf.PegasusForConditionalGeneration):
    pass


FAMILY = seq2seq_like.family("pegasus", KIN)
