"""BERT: BertModel and every head on it, as encoder; decoders and cross-attention keep their own code.

The layers are those of `bert_like`; here are the heads.
"""

from __future__ import annotations

from torch import nn
from transformers.models.bert import modeling_bert as hf

from bigmodel_kernels.transformers import bert_like, encoder_model, fused_loss
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.families import ChildRule, Family
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin.of(hf, "Bert")


class BigmodelBertEmbeddings(bert_like.Embeddings, hf.BertEmbeddings, kin=KIN):
    pass


class BigmodelBertSelfAttention(bert_like.SelfAttention, hf.BertSelfAttention, kin=KIN):
    pass


class BigmodelBertSelfOutput(bert_like.SelfOutput, hf.BertSelfOutput, kin=KIN):
    pass


class BigmodelBertLayer(bert_like.Layer, hf.BertLayer, kin=KIN):
    pass


class BigmodelBertEncoder(bert_like.Encoder, hf.BertEncoder, kin=KIN):
    pass


class BigmodelBertPaddedEncoder(BigmodelBertEncoder):
    packs = False


class BigmodelBertPooler(bert_like.Pooler, hf.BertPooler, kin=KIN):
    pass


class BigmodelBertModel(encoder_model.Model, hf.BertModel, kin=KIN):
    pass


class BigmodelBertPredictionHeadTransform(bert_like.Transform, hf.BertPredictionHeadTransform):
    pass


@fused_loss.language_model(KIN, bert_like.cls_head(hf.BertOnlyMLMHead, hf.BertLMPredictionHead))
class BigmodelBertForMaskedLM(hf.BertForMaskedLM):
    pass


FAMILY = Family(
    name="bert",
    rules=(
        encoder_model.rule(KIN, BigmodelBertModel),
        *bert_like.rules(KIN),
        bert_like.transform_rule(BigmodelBertPredictionHeadTransform),
    ),
    children=(
        ChildRule(hf.BertLMPredictionHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(KIN, hf.BertForQuestionAnswering, "bert.encoder", BigmodelBertPaddedEncoder),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.BertModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
