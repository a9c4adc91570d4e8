"""ELECTRA: the layers of BERT after embeddings of another width; generator and discriminator."""

from __future__ import annotations

from torch import nn
from transformers.models.electra import modeling_electra as hf

from bigmodel_kernels.transformers import bert_like, fused_loss
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.families import ChildRule, Family
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin.of(hf, "Electra")


class BigmodelElectraEmbeddings(bert_like.Embeddings, hf.ElectraEmbeddings, kin=KIN):
    pass


class BigmodelElectraSelfAttention(bert_like.SelfAttention, hf.ElectraSelfAttention, kin=KIN):
    pass


class BigmodelElectraSelfOutput(bert_like.SelfOutput, hf.ElectraSelfOutput, kin=KIN):
    pass


class BigmodelElectraLayer(bert_like.Layer, hf.ElectraLayer, kin=KIN):
    pass


class BigmodelElectraEncoder(bert_like.Encoder, hf.ElectraEncoder, kin=KIN):
    pass


class BigmodelElectraPaddedEncoder(BigmodelElectraEncoder):
    packs = False


@fused_loss.language_model(
    KIN,
    fused_loss.Head(
        "generator_lm_head",
        ("generator_predictions", "generator_lm_head"),
        lambda model: model.generator_predictions,
    ),
)
class BigmodelElectraForMaskedLM(hf.ElectraForMaskedLM):
    pass


FAMILY = Family(
    name="electra",
    rules=bert_like.rules(KIN),
    children=(
        ChildRule(hf.ElectraModel, "embeddings_project", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.ElectraForMaskedLM, "generator_lm_head", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN, hf.ElectraForQuestionAnswering, "electra.encoder", BigmodelElectraPaddedEncoder
        ),
        # The summary of a sequence may be its last position or the mean over all of them.
        bert_like.keeps_padding(
            KIN, hf.ElectraForMultipleChoice, "electra.encoder", BigmodelElectraPaddedEncoder
        ),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.ElectraModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
