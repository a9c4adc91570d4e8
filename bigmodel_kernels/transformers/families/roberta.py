"""RoBERTa: the layers of BERT, positions that count real tokens, and its own language-model head."""

from __future__ import annotations

from torch import nn
from transformers.models.roberta import modeling_roberta as hf

from bigmodel_kernels.transformers import bert_like
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear

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


class BigmodelRobertaLMHead(bert_like.LMHead, hf.RobertaLMHead, kin=KIN):
    pass


FAMILY = Family(
    name="roberta",
    rules=(
        *bert_like.rules(KIN, embeddings=bert_like.COUNTED_NOTE),
        Rule(hf.RobertaLMHead, BigmodelRobertaLMHead, ("linear",), bert_like.check_lm_head),
    ),
    children=(
        ChildRule(hf.RobertaLMHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN, hf.RobertaForQuestionAnswering, "roberta.encoder", BigmodelRobertaPaddedEncoder
        ),
    ),
    models=(hf.RobertaModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
