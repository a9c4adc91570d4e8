"""CamemBERT: RoBERTa for French."""

from __future__ import annotations

from torch import nn
from transformers.models.camembert import modeling_camembert as hf

from bigmodel_kernels.transformers import bert_like
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear

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


class BigmodelCamembertLMHead(bert_like.LMHead, hf.CamembertLMHead, kin=KIN):
    pass


FAMILY = Family(
    name="camembert",
    rules=(
        *bert_like.rules(KIN, embeddings=bert_like.COUNTED_NOTE),
        Rule(hf.CamembertLMHead, BigmodelCamembertLMHead, ("linear",), bert_like.check_lm_head),
    ),
    children=(
        ChildRule(hf.CamembertLMHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN, hf.CamembertForQuestionAnswering, "roberta.encoder", BigmodelCamembertPaddedEncoder
        ),
    ),
    models=(hf.CamembertModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
