"""ModernBERT: norms before both halves, rotary embedding, a window to both sides in most layers, and a gated
feed-forward with one weight for gate and up. The model packs batches by itself, so that it has a form too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert import modeling_modernbert as hf

from bigmodel_kernels.transformers import (
    attention_interface,
    bert_like,
    blocks,
    checks,
    fused_loss,
    gpt_like,
    packed_encoder,
    whole_layer,
    whole_model,
)
from bigmodel_kernels.transformers.blocks import FeedForward
from bigmodel_kernels.transformers.families import ChildRule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear
from bigmodel_kernels.transformers.gpt_like import Kin

KIN = Kin(
    hf.ModernBertAttention,
    hf.ModernBertEncoderLayer,
    hf.ModernBertMLP,
    hf.ModernBertModel,
    None,
    attention_at="attn",
    mlp_at="mlp",
    norms=("attn_norm", "mlp_norm"),  # the first of the first layer is nn.Identity
    dropouts=("attn.out_drop", ""),
    qkv=("Wqkv",),
    split=gpt_like.in_thirds,
    out="Wo",
    w_in="Wi",
    w_out="Wo",
    gated=True,
    rotary="half",
    scale=lambda attention: float(attention.head_dim) ** -0.5,
    last_norms=("final_norm",),
)


class BigmodelModernBertAttention(gpt_like.Attention, hf.ModernBertAttention, kin=KIN):
    pass


class BigmodelModernBertMLP(gpt_like.MLP, hf.ModernBertMLP, kin=KIN):
    """Two products; one call for inference on the CPU."""

    def forward(self, hidden_states: Any) -> Tensor:  # type: ignore[override]
        if checks.watched_globally():
            return hf.ModernBertMLP.forward(self, hidden_states)  # type: ignore[no-any-return]
        dtype = checks.dtype_of(hidden_states)
        ffn = self.joined(dtype)
        if ffn is not None:
            return blocks.feed_forward(hidden_states, ffn, "linear", None)
        both, down = (blocks.part(part, nn.Linear, dtype) for part in (self.Wi, self.Wo))
        return blocks.gated_of_one(hidden_states, both, self.act, down, self.drop)

    def joined(self, dtype: torch.dtype | None) -> FeedForward | None:
        if checks.probability(self, "drop") != 0:
            return None
        return blocks.feed_forward_of_joined(self, "Wi", "Wo", "act", dtype)


class BigmodelModernBertEncoderLayer(gpt_like.Layer, hf.ModernBertEncoderLayer, kin=KIN):
    pass


class BigmodelModernBertModel(whole_model.Model, packed_encoder.Encoder, hf.ModernBertModel, kin=KIN):
    """Texts that are not long in three calls: embeddings, all layers, and the last norm."""

    windows = True

    def at_once(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *rest: Any,
        position_ids: Any = None,
        **others: Any,
    ) -> BaseModelOutput | None:
        if (
            rest
            or not whole_model.plain(self, input_ids, others)
            or input_ids.numel() > whole_layer.MOST_ROWS
            or not attention_interface.gets_readable_masks(self)
        ):
            return None
        shape, padding = input_ids.shape, None
        if attention_mask is not None:
            if not whole_model.masks_tokens(attention_mask, shape):
                return None
            padding = attention_mask.bool()
            padding = None if bool(padding.all()) else padding.contiguous()
        layers = self._together()
        around = None if layers is None else layers.around()
        if layers is None or around is None:
            return None
        scale, eps, last_eps = layers.given
        word, *norms = around
        packing = None if padding is None else self._packing((input_ids, attention_mask), others)
        ids = input_ids.contiguous() if packing is None else input_ids[padding]
        try:
            x = torch.ops.bigmodel.cpu_embedding.default(ids, word, None, None, None, None, *norms[:2], eps)
        except RuntimeError:
            return None  # the model's own forward says what is wrong with the ids
        kinds = [layer.attention_type for layer in self.layers]
        if position_ids is None:
            position_ids = torch.arange(shape[1])[None]
        turns = {kind: blocks.half(self.rotary_emb(x, position_ids, kind)) for kind in set(kinds)}
        if any(cos.shape[:2] not in ((1, shape[1]), tuple(shape)) for cos, _ in turns.values()):
            return None
        window = self.config.sliding_window + 1  # as the masks have it
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
        lengths, longest = None, 0
        if packing is not None:
            turns = {kind: _packed(packing, turn) for kind, turn in turns.items()}
            padding, lengths, longest = None, packing.cu_seqlens, packing.longest
        x = whole_layer.encoded(
            *(x, layers, scale, padding, lengths, longest, whole_layer.How(), ()),
            *(windows, [turns[kind] for kind in kinds]),
        )
        if x is None:
            return None
        x = torch.ops.bigmodel.cpu_layer_norm.default(x, *norms[2:], last_eps, None)
        return BaseModelOutput(last_hidden_state=x if packing is None else packing.unpack(x))

    def _together(self) -> whole_layer.Layers | None:
        """All layers, with the scale of their attention and the epsilons of the embeddings and of the last
        norm; around them the table and these two norms.
        """
        embeddings: Any = self.embeddings
        roots = (embeddings, self.layers, self.final_norm)

        def gather(dtype: torch.dtype) -> whole_layer.Gathered | None:
            layers: list[Any] = list(self.layers)
            form = KIN.forms[hf.ModernBertEncoderLayer]
            if not all(checks.intact(layer, form) for layer in layers):
                return None
            if (
                not checks.intact(embeddings, hf.ModernBertEmbeddings)
                or checks.probability(embeddings, "drop") != 0
            ):
                return None
            table = checks.parameters(embeddings.tok_embeddings, nn.Embedding, dtype)
            norms: list[Any] = [
                checks.parameters(n, BigmodelLayerNorm, dtype) for n in (embeddings.norm, self.final_norm)
            ]
            parts: list[Any] = [gpt_like.whole_parts(layer, dtype) for layer in layers]
            if table is None or None in norms or None in parts:
                return None
            given = (KIN.scale(layers[0].attn), embeddings.norm.eps, self.final_norm.eps)
            return parts, given, [table[0], *norms[0], *norms[1]]

        like = getattr(embeddings.tok_embeddings, "weight", None)
        return whole_model.layers_of(self, roots, like, "linear", "cpu_encoder", gather)


class BigmodelModernBertPaddedModel(BigmodelModernBertModel):
    packs = False


class BigmodelModernBertPredictionHead(bert_like.Transform, hf.ModernBertPredictionHead):
    activation_at = "act"
    norm_at = "norm"


@fused_loss.language_model(
    KIN, fused_loss.Head("decoder", ("head", "decoder"), lambda model: model.head, loss_type="ForMaskedLM")
)
class BigmodelModernBertForMaskedLM(hf.ModernBertForMaskedLM):
    pass


def _packed(packing: blocks.Packing, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The angles of packed rows."""
    cos, sin = (packing.rows(t.expand(packing.shape[0], -1, -1)) for t in angles)
    return cos, sin


_check_layer = partial(gpt_like.check_layer, KIN)

_LAYERS = gpt_like.family("modernbert", KIN)

FAMILY = replace(
    _LAYERS,
    rules=(
        packed_encoder.rule(hf.ModernBertModel, hf.ModernBertEncoderLayer, KIN, _check_layer),
        *_LAYERS.rules,
        bert_like.transform_rule(BigmodelModernBertPredictionHead),
    ),
    children=(
        *_LAYERS.children,
        packed_encoder.keeps_padding(
            hf.ModernBertForQuestionAnswering,
            "model",
            hf.ModernBertModel,
            BigmodelModernBertPaddedModel,
            partial(packed_encoder.check, hf.ModernBertEncoderLayer, KIN, _check_layer),
        ),
        ChildRule(hf.ModernBertEmbeddings, "norm", nn.LayerNorm, BigmodelLayerNorm, ("layer_norm",)),
        ChildRule(hf.ModernBertForMaskedLM, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
    ),
)
