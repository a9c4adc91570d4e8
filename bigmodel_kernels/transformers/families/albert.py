"""ALBERT: BERT's layer with its modules in other places, run several times with the same weights; the
embedding is narrower than the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert as hf

from bigmodel_kernels.transformers import bert_like, blocks, checks, encoder_like, fused_loss
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.encoder_like import Places
from bigmodel_kernels.transformers.families import ChildRule, Family
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin(
    embeddings=hf.AlbertEmbeddings,
    self_attention=hf.AlbertAttention,
    layer=hf.AlbertLayer,
    encoder=hf.AlbertTransformer,
)
#: What the attention has beside query, key and value.
PARTS: dict[str, type[nn.Module]] = {
    "dense": nn.Linear,
    "LayerNorm": nn.LayerNorm,
    "output_dropout": nn.Dropout,
}


class BigmodelAlbertEmbeddings(bert_like.Embeddings, hf.AlbertEmbeddings, kin=KIN):
    pass


class BigmodelAlbertAttention(bert_like.SelfAttention, hf.AlbertAttention, kin=KIN):
    """One product for Q, K and V, and one for output, dropout, residual and norm."""

    drops = "attention_dropout"

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        found = None
        if checks.plain_dropout(self.output_dropout):
            found = self.context(hidden_states, attention_mask, (), kwargs)
        if found is None:
            return hf.AlbertAttention.forward(self, hidden_states, attention_mask, **kwargs)
        dtype = checks.dtype_of(hidden_states)
        out = blocks.output(
            found[0],
            blocks.part(self.dense, nn.Linear, dtype),
            "linear",
            hidden_states,
            checks.dropout_p(self.output_dropout),
            blocks.part(self.LayerNorm, nn.LayerNorm, dtype),
            blocks.eps_of(self.LayerNorm),
        )
        return out, found[1]


class BigmodelAlbertLayer(encoder_like.Layer, hf.AlbertLayer, kin=KIN):
    places = Places(
        attention="attention",
        out="attention.dense",
        context_dropout="attention.output_dropout",
        attention_norm="attention.LayerNorm",
        w_in="ffn",
        activation="activation",
        w_out="ffn_output",
        ffn_norm="full_layer_layer_norm",
    )


class BigmodelAlbertTransformer(bert_like.Encoder, hf.AlbertTransformer, kin=KIN):
    output = BaseModelOutput

    def sequence(self) -> Iterator[Any]:
        count, groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        for i in range(count):
            group: Any = self.albert_layer_groups[int(i / (count / groups))]
            yield from group.albert_layers

    def enter(self, x: Tensor) -> Tensor:
        part = blocks.part(self.embedding_hidden_mapping_in, nn.Linear, checks.dtype_of(x))
        return blocks.project(x, part, "linear")

    def _watched(self) -> bool:
        known = checks.row_wise(self.embedding_hidden_mapping_in, nn.Linear) and all(
            checks.intact(group, hf.AlbertLayerGroup) for group in self.albert_layer_groups
        )
        return not known or super()._watched()

    def _decodes(self) -> bool:
        return False


class BigmodelAlbertPaddedTransformer(BigmodelAlbertTransformer):
    packs = False


class BigmodelAlbertMLMHead(bert_like.Transform, hf.AlbertMLMHead):
    """Projection, activation and LayerNorm in one call, then the product with the vocabulary."""

    activation_at = "activation"

    def forward(self, hidden_states: Tensor) -> Tensor:
        states = self.transformed(hidden_states)
        if states is None:
            return hf.AlbertMLMHead.forward(self, hidden_states)  # type: ignore[no-any-return]
        return self.decoder(states)  # type: ignore[no-any-return]


def _before_logits(model: Any) -> fused_loss.Rows | None:
    head = model.predictions
    if type(head) not in (hf.AlbertMLMHead, BigmodelAlbertMLMHead) or not checks.intact(head, type(head)):
        return None

    def states(rows: Tensor) -> Tensor:
        made = None if type(head) is hf.AlbertMLMHead else head.transformed(rows)
        return head.LayerNorm(head.activation(head.dense(rows))) if made is None else made

    return states


@fused_loss.language_model(KIN, fused_loss.Head("predictions.decoder", ("predictions",), _before_logits))
class BigmodelAlbertForMaskedLM(hf.AlbertForMaskedLM):
    pass


FAMILY = Family(
    name="albert",
    rules=(
        *encoder_like.rules(KIN, "dense", PARTS),
        bert_like.transform_rule(BigmodelAlbertMLMHead),
    ),
    children=(
        ChildRule(hf.AlbertModel, "pooler", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.AlbertMLMHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN,
            hf.AlbertForQuestionAnswering,
            "albert.encoder",
            BigmodelAlbertPaddedTransformer,
            partial(encoder_like.whole_layer, PARTS),
        ),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.AlbertModel,),
    mask_path=(hf.AlbertTransformer, hf.AlbertLayerGroup, hf.AlbertLayer, hf.AlbertAttention),
)
