"""BERT: BertModel and every head on it, as encoder; decoders and cross-attention keep their own code.

The layers are those of `bert_like`; here are the heads.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert import modeling_bert as hf

from bigmodel_kernels.transformers import bert_like, checks, fused_loss
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


class BigmodelBertPredictionHeadTransform(bert_like.Transform, hf.BertPredictionHeadTransform):
    pass


@fused_loss.named_like_its_original
class BigmodelBertForMaskedLM(hf.BertForMaskedLM):
    """In training mode, with labels: the loss without logits, from the tokens that have a label."""

    @functools.wraps(hf.BertForMaskedLM.forward)  # Trainer reads the names of the arguments
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        known = checks.intact(self.cls, hf.BertOnlyMLMHead) and checks.intact(
            self.cls.predictions, hf.BertLMPredictionHead
        )
        if not known or not fused_loss.wanted(self, args, kwargs):
            return super().forward(*args, **kwargs)
        outputs = self.bert(*args, **fused_loss.of_the_body(kwargs), return_dict=True)
        rows, target = fused_loss.labelled(outputs.last_hidden_state, kwargs["labels"])
        states = self.cls.predictions.transform(rows)
        held = fused_loss.head(self.cls.predictions.decoder, checks.dtype_of(states))
        if held is None:  # an adapter or a hook on the head: the logits are what it makes of the states
            loss = nn.functional.cross_entropy(self.cls.predictions.decoder(states).float(), target)
        else:
            loss = fused_loss.loss(states, *held, target)
        return MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


FAMILY = Family(
    name="bert",
    rules=(*bert_like.rules(KIN), bert_like.transform_rule(BigmodelBertPredictionHeadTransform)),
    children=(
        ChildRule(hf.BertLMPredictionHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(KIN, hf.BertForQuestionAnswering, "bert.encoder", BigmodelBertPaddedEncoder),
    ),
    losses=(fused_loss.rule(hf.BertForMaskedLM, BigmodelBertForMaskedLM),),
    models=(hf.BertModel,),
    mask_path=bert_like.mask_path(KIN),
    left=bert_like.left(KIN),
)
