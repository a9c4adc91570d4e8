"""MPNet: BERT's layer with its modules in other places, and relative positions, which all layers add to their
logits. Attention, which takes no bias without padding, runs with it; all else runs without.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet as hf

from bigmodel_kernels.transformers import (
    attention_interface,
    bert_like,
    blocks,
    checks,
    encoder_like,
    fused_loss,
)
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.blocks import Attend
from bigmodel_kernels.transformers.encoder_like import Places
from bigmodel_kernels.transformers.families import ChildRule, Family
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin(
    embeddings=hf.MPNetEmbeddings,
    self_attention=hf.MPNetSelfAttention,
    layer=hf.MPNetLayer,
    encoder=hf.MPNetEncoder,
    pooler=hf.MPNetPooler,
)


class BigmodelMPNetEmbeddings(bert_like.Embeddings, hf.MPNetEmbeddings, kin=KIN):
    """Word + position + LayerNorm in one pass."""

    tables = ("word_embeddings", "position_embeddings")

    def forward(  # type: ignore[override]
        self, input_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> Tensor:
        held = None if input_ids is None or inputs_embeds is not None else self.held()
        if held is None:
            return hf.MPNetEmbeddings.forward(self, input_ids, position_ids, inputs_embeds, **kwargs)  # type: ignore[no-any-return]
        if position_ids is None:
            position_ids = hf.create_position_ids_from_input_ids(input_ids, self.padding_idx)
        return self._embed(input_ids, position_ids, None, held)


class BigmodelMPNetSelfAttention(bert_like.SelfAttention, hf.MPNetSelfAttention, kin=KIN):
    """One product for Q, K and V; the output's projection is here too."""

    names = ("q", "k", "v")
    is_causal = False

    @property
    def scaling(self) -> float:
        return float(self.attention_head_size) ** -0.5

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        given = {"position_bias": position_bias, "output_attentions": output_attentions}
        found = self.context(hidden_states, attention_mask, (), given)
        if found is None:
            mask = _added(attention_mask, hidden_states)
            return hf.MPNetSelfAttention.forward(
                self, hidden_states, mask, position_bias, output_attentions, **kwargs
            )
        out = blocks.project(
            found[0], blocks.part(self.o, nn.Linear, checks.dtype_of(hidden_states)), "linear"
        )
        return (out, found[1]) if output_attentions else (out,)


class BigmodelMPNetLayer(encoder_like.Layer, hf.MPNetLayer, kin=KIN):
    places = Places(
        attention="attention.attn",
        out="attention.attn.o",
        context_dropout="attention.dropout",
        attention_norm="attention.LayerNorm",
        w_in="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        w_out="output.dense",
        ffn_dropout="output.dropout",
        ffn_norm="output.LayerNorm",
        holders=(
            ("attention", hf.MPNetAttention),
            ("intermediate", hf.MPNetIntermediate),
            ("output", hf.MPNetOutput),
        ),
    )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        bigmodel_run: tuple[Any, Attend] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A call with `bigmodel_run` gets the states, every other a tuple, as from the original."""
        if bigmodel_run is not None:
            return self.fused(hidden_states, *bigmodel_run)
        run = None
        if not attention_interface.wants_attentions({"output_attentions": output_attentions}):
            run = self.alone(hidden_states, attention_mask, position_bias)
        if run is None:
            return hf.MPNetLayer.forward(
                self, hidden_states, attention_mask, position_bias, output_attentions, **kwargs
            )
        return (self.fused(hidden_states, *run),)


class BigmodelMPNetEncoder(bert_like.Encoder, hf.MPNetEncoder, kin=KIN):
    output = BaseModelOutput
    relative = True

    def position_bias(self, x: Tensor) -> Tensor:
        return self.compute_position_bias(x[:1])  # type: ignore[no-any-return, no-untyped-call]

    def _decodes(self) -> bool:
        return False


class BigmodelMPNetPaddedEncoder(BigmodelMPNetEncoder):
    packs = False


class BigmodelMPNetPooler(bert_like.Pooler, hf.MPNetPooler, kin=KIN):
    pass


class BigmodelMPNetLMHead(bert_like.LMHead, hf.MPNetLMHead, kin=KIN):
    pass


@bert_like.masked_lm(KIN, hf.MPNetLMHead)
class BigmodelMPNetForMaskedLM(hf.MPNetForMaskedLM):
    pass


def _added(mask: Any, states: Tensor) -> Any:
    """A mask for the model's own code, which adds what it gets."""
    boolean = isinstance(mask, Tensor) and mask.dtype == torch.bool
    return attention_interface.additive_of(mask, states) if boolean else mask


PARTS: dict[str, type] = {"o": nn.Linear}

FAMILY = Family(
    name="mpnet",
    rules=(
        *encoder_like.rules(
            KIN, "o", PARTS, "runs its layers but for attention without padding", bert_like.COUNTED_NOTE
        ),
        bert_like.pooler_rule(KIN),
        bert_like.lm_head_rule(KIN, hf.MPNetLMHead),
    ),
    children=(
        ChildRule(hf.MPNetLMHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN,
            hf.MPNetForQuestionAnswering,
            "mpnet.encoder",
            BigmodelMPNetPaddedEncoder,
            partial(encoder_like.whole_layer, PARTS),
        ),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.MPNetModel,),
    mask_path=(hf.MPNetEncoder, hf.MPNetLayer, hf.MPNetAttention, hf.MPNetSelfAttention),
    reads_masks_patched=(hf.MPNetSelfAttention,),
)
