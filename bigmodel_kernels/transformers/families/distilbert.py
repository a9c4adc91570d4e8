"""DistilBERT: BERT's layer with its modules in other places, no types of tokens and no pooler."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from bigmodel_kernels.transformers import bert_like, blocks, checks, encoder_like, fused_loss
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.encoder_like import Places
from bigmodel_kernels.transformers.families import ChildRule, Family
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin(
    embeddings=hf.Embeddings,
    self_attention=hf.DistilBertSelfAttention,
    layer=hf.TransformerBlock,
    encoder=hf.Transformer,
)
#: What the attention has beside query, key and value.
PARTS: dict[str, type[nn.Module]] = {"out_lin": nn.Linear}


class BigmodelDistilBertEmbeddings(bert_like.Embeddings, hf.Embeddings, kin=KIN):
    """Word + position + LayerNorm in one pass."""

    tables = ("word_embeddings", "position_embeddings")

    def forward(self, input_ids: Any, inputs_embeds: Any = None, position_ids: Any = None) -> Tensor:  # type: ignore[override]
        # Ids go before embeddings in transformers' code, where both are given.
        held = None if input_ids is None else self.held()
        if held is None:
            return hf.Embeddings.forward(self, input_ids, inputs_embeds, position_ids)  # type: ignore[no-any-return]
        positions = self._positions(input_ids, 0) if position_ids is None else position_ids
        return self._embed(input_ids, positions, None, held)


class BigmodelDistilBertSelfAttention(bert_like.SelfAttention, hf.DistilBertSelfAttention, kin=KIN):
    """One product for Q, K and V; the output's projection is here too."""

    names = ("q_lin", "k_lin", "v_lin")
    heads = "n_heads"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        found = self.context(hidden_states, attention_mask, (), kwargs)
        if found is None:
            return hf.DistilBertSelfAttention.forward(self, hidden_states, attention_mask, **kwargs)
        out = blocks.part(self.out_lin, nn.Linear, checks.dtype_of(hidden_states))
        return blocks.project(found[0], out, "linear"), found[1]


class BigmodelDistilBertBlock(encoder_like.Layer, hf.TransformerBlock, kin=KIN):
    """The whole layer in four calls, or two."""

    places = Places(
        attention="attention",
        out="attention.out_lin",
        attention_norm="sa_layer_norm",
        w_in="ffn.lin1",
        activation="ffn.activation",
        w_out="ffn.lin2",
        ffn_norm="output_layer_norm",
        ffn_dropout="ffn.dropout",
        holders=(("ffn", hf.FFN),),
    )


class BigmodelDistilBertTransformer(bert_like.Encoder, hf.Transformer, kin=KIN):
    output = BaseModelOutput

    def _decodes(self) -> bool:
        return False


class BigmodelDistilBertPaddedTransformer(BigmodelDistilBertTransformer):
    packs = False


_BEFORE_LOGITS = ("vocab_transform", "activation", "vocab_layer_norm")


@fused_loss.language_model(
    KIN,
    fused_loss.Head(
        "vocab_projector",
        (*_BEFORE_LOGITS, "vocab_projector"),
        lambda model: lambda rows: reduce(lambda x, part: getattr(model, part)(x), _BEFORE_LOGITS, rows),
    ),
)
class BigmodelDistilBertForMaskedLM(hf.DistilBertForMaskedLM):
    pass


FAMILY = Family(
    name="distilbert",
    rules=encoder_like.rules(KIN, "out_lin", PARTS),
    children=(
        ChildRule(hf.DistilBertForMaskedLM, "vocab_transform", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.DistilBertForMaskedLM, "vocab_projector", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN,
            hf.DistilBertForQuestionAnswering,
            "distilbert.transformer",
            BigmodelDistilBertPaddedTransformer,
            partial(encoder_like.whole_layer, PARTS),
        ),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.DistilBertModel,),
    mask_path=(hf.Transformer, hf.TransformerBlock, hf.DistilBertSelfAttention),
)
