"""CamemBERT: RoBERTa for French."""

from __future__ import annotations

from transformers.models.camembert import modeling_camembert as hf

from bigmodel_kernels.transformers import bert_like, encoder_model
from bigmodel_kernels.transformers.bert_like import Kin

KIN = Kin.of(hf, "Camembert")


class BigmodelCamembertEmbeddings(bert_like.CountedEmbeddings, hf.CamembertEmbeddings, kin=KIN):
    pass


class BigmodelCamembertSelfAttention(bert_like.SelfAttention, hf.CamembertSelfAttention, kin=KIN):
    pass


class BigmodelCamembertSelfOutput(bert_like.SelfOutput, hf.CamembertSelfOutput, kin=KIN):
    pass


class BigmodelCamembertLayer(bert_like.Layer, hf.CamembertLayer, kin=KIN):
    pass


class BigmodelCamembertEncoder(bert_like.Encoder, hf.CamembertEncoder, kin=KIN):
    pass


class BigmodelCamembertPaddedEncoder(BigmodelCamembertEncoder):
    packs = False


class BigmodelCamembertPooler(bert_like.Pooler, hf.CamembertPooler, kin=KIN):
    pass


class BigmodelCamembertModel(encoder_model.Model, hf.CamembertModel, kin=KIN):
    pass


class BigmodelCamembertLMHead(bert_like.LMHead, hf.CamembertLMHead, kin=KIN):
    pass


@bert_like.masked_lm(KIN, hf.CamembertLMHead)
class BigmodelCamembertForMaskedLM(hf.CamembertForMaskedLM):
    pass


FAMILY = bert_like.roberta_family(
    "camembert",
    KIN,
    encoder_model.rule(KIN, BigmodelCamembertModel),
    hf.CamembertLMHead,
    hf.CamembertForQuestionAnswering,
    BigmodelCamembertPaddedEncoder,
)
