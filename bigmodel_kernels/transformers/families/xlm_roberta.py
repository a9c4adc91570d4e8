"""XLM-RoBERTa: RoBERTa for a hundred languages."""

from __future__ import annotations

from torch import nn
from transformers.models.xlm_roberta import modeling_xlm_roberta as hf

from bigmodel_kernels.transformers import bert_like
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear

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


class BigmodelXLMRobertaLMHead(bert_like.LMHead, hf.XLMRobertaLMHead, kin=KIN):
    pass


FAMILY = Family(
    name="xlm_roberta",
    rules=(
        *bert_like.rules(KIN, embeddings=bert_like.COUNTED_NOTE),
        Rule(hf.XLMRobertaLMHead, BigmodelXLMRobertaLMHead, ("linear",), bert_like.check_lm_head),
    ),
    children=(
        ChildRule(hf.XLMRobertaLMHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN, hf.XLMRobertaForQuestionAnswering, "roberta.encoder", BigmodelXLMRobertaPaddedEncoder
        ),
    ),
    models=(hf.XLMRobertaModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
