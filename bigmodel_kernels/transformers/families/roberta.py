"""RoBERTa: the layers of BERT, positions that count real tokens, and its own language-model head."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta as hf

from bigmodel_kernels.transformers import bert_like, encoder_model
from bigmodel_kernels.transformers.bert_like import Kin

KIN = Kin.of(hf, "Roberta")


class BigmodelRobertaEmbeddings(bert_like.CountedEmbeddings, hf.RobertaEmbeddings, kin=KIN):
    pass


class BigmodelRobertaSelfAttention(bert_like.SelfAttention, hf.RobertaSelfAttention, kin=KIN):
    pass


class BigmodelRobertaSelfOutput(bert_like.SelfOutput, hf.RobertaSelfOutput, kin=KIN):
    pass


class BigmodelRobertaLayer(bert_like.Layer, hf.RobertaLayer, kin=KIN):
    pass


class BigmodelRobertaEncoder(bert_like.Encoder, hf.RobertaEncoder, kin=KIN):
    pass


class BigmodelRobertaPaddedEncoder(BigmodelRobertaEncoder):
    packs = False


class BigmodelRobertaPooler(bert_like.Pooler, hf.RobertaPooler, kin=KIN):
    pass


class BigmodelRobertaModel(encoder_model.Model, hf.RobertaModel, kin=KIN):
    pass


class BigmodelRobertaLMHead(bert_like.LMHead, hf.RobertaLMHead, kin=KIN):
    pass


@bert_like.masked_lm(KIN, hf.RobertaLMHead)
class BigmodelRobertaForMaskedLM(hf.RobertaForMaskedLM):
    pass


FAMILY = bert_like.roberta_family(
    "roberta",
    KIN,
    encoder_model.rule(KIN, BigmodelRobertaModel),
    hf.RobertaLMHead,
    hf.RobertaForQuestionAnswering,
    BigmodelRobertaPaddedEncoder,
)
