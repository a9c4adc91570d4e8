"""XLM-RoBERTa: RoBERTa for a hundred languages."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from bigmodel_kernels.transformers import bert_like, encoder_model
from bigmodel_kernels.transformers.bert_like import Kin

KIN = Kin.of(hf, "XLMRoberta")


class BigmodelXLMRobertaEmbeddings(bert_like.CountedEmbeddings, hf.XLMRobertaEmbeddings, kin=KIN):
    pass


class BigmodelXLMRobertaSelfAttention(bert_like.SelfAttention, hf.XLMRobertaSelfAttention, kin=KIN):
    pass


class BigmodelXLMRobertaSelfOutput(bert_like.SelfOutput, hf.XLMRobertaSelfOutput, kin=KIN):
    pass


class BigmodelXLMRobertaLayer(bert_like.Layer, hf.XLMRobertaLayer, kin=KIN):
    pass


class BigmodelXLMRobertaEncoder(bert_like.Encoder, hf.XLMRobertaEncoder, kin=KIN):
    pass


class BigmodelXLMRobertaPaddedEncoder(BigmodelXLMRobertaEncoder):
    packs = False


class BigmodelXLMRobertaPooler(bert_like.Pooler, hf.XLMRobertaPooler, kin=KIN):
    pass


class BigmodelXLMRobertaModel(encoder_model.Model, hf.XLMRobertaModel, kin=KIN):
    pass


class BigmodelXLMRobertaLMHead(bert_like.LMHead, hf.XLMRobertaLMHead, kin=KIN):
    pass


@bert_like.masked_lm(KIN, hf.XLMRobertaLMHead)
class BigmodelXLMRobertaForMaskedLM(hf.XLMRobertaForMaskedLM):
    pass


FAMILY = bert_like.roberta_family(
    "xlm_roberta",
    KIN,
    encoder_model.rule(KIN, BigmodelXLMRobertaModel),
    hf.XLMRobertaLMHead,
    hf.XLMRobertaForQuestionAnswering,
    BigmodelXLMRobertaPaddedEncoder,
)
