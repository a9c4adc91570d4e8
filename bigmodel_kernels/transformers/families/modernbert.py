"""ModernBERT: norms before both halves, rotary embedding, a window to both sides in most layers, and a gated
feed-forward with one weight for gate and up. The model packs batches by itself, so that it has a form too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert as hf

from bigmodel_kernels.transformers import bert_like, blocks, checks, fused_loss, gpt_like, packed_encoder
from bigmodel_kernels.transformers.families import ChildRule
from bigmodel_kernels.transformers.generic import BigmodelLayerNorm, BigmodelLinear
from bigmodel_kernels.transformers.gpt_like import Kin


def in_thirds(whole: Tensor, head_dim: int, queries: int) -> tuple[Tensor, ...]:
    """Query, key and value, each (..., heads, head_dim), of a product that has all of each in turn."""
    return whole.unflatten(-1, (3, -1, head_dim)).unbind(-3)


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
    split=in_thirds,
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
        ffn = blocks.feed_forward_of_joined(self, "Wi", "Wo", "act", dtype)
        if ffn is not None and checks.probability(self, "drop") == 0:
            return blocks.feed_forward(hidden_states, ffn, "linear", None)
        both, down = (blocks.part(part, nn.Linear, dtype) for part in (self.Wi, self.Wo))
        return blocks.gated_of_one(hidden_states, both, self.act, down, self.drop)


class BigmodelModernBertEncoderLayer(gpt_like.Layer, hf.ModernBertEncoderLayer, kin=KIN):
    pass


class BigmodelModernBertModel(packed_encoder.Encoder, hf.ModernBertModel, kin=KIN):
    windows = True


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
