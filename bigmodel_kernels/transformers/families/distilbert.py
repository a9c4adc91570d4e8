"""DistilBERT: BERT's layer with its modules in other places, no types of tokens and no pooler."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as hf

from bigmodel_kernels.transformers import bert_like, blocks, checks
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.blocks import Affine, FeedForward, LayerParts
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear

KIN = Kin(
    embeddings=hf.Embeddings,
    self_attention=hf.DistilBertSelfAttention,
    layer=hf.TransformerBlock,
    encoder=hf.Transformer,
)


class BigmodelDistilBertEmbeddings(bert_like.Embeddings, hf.Embeddings, kin=KIN):
    """Word + position + LayerNorm in one pass."""

    tables = ("word_embeddings", "position_embeddings")

    def forward(self, input_ids: Any, inputs_embeds: Any = None, position_ids: Any = None) -> Tensor:  # type: ignore[override]
        # Ids go before embeddings in transformers' code, where both are given.
        held = None if input_ids is None else self._held()
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


class BigmodelDistilBertBlock(bert_like.Layer, hf.TransformerBlock, kin=KIN):
    """The whole layer in four calls, or two."""

    def gather(self) -> _Modules | None:
        modules = self.__dict__["_modules"]
        attention, ffn = modules["attention"], modules["ffn"]
        norms = modules["sa_layer_norm"], modules["output_layer_norm"]
        if (
            not checks.intact(attention, BigmodelDistilBertSelfAttention)
            or not attention.readable()
            or not checks.row_wise(attention.__dict__["_modules"]["out_lin"], nn.Linear)
            or not all(checks.callable_as(norm, nn.LayerNorm) for norm in norms)
            or not _plain_ffn(ffn)
        ):
            return None
        return _Modules(attention, norms[0], ffn, norms[1], checks.recomputes(self))

    def parts(self, modules: Any, dtype: torch.dtype | None) -> LayerParts:
        attention, attention_norm, ffn, ffn_norm, recompute = modules
        w_in, w_out = (checks.parameters(part, nn.Linear, dtype) for part in (ffn.lin1, ffn.lin2))
        activation = checks.activation(ffn.activation)
        fused = None
        if w_in is not None and w_out is not None and activation is not None:
            fused = FeedForward(Affine(*w_in), Affine(*w_out), activation, recompute)
        return LayerParts(
            qkv=attention.projections(dtype),
            head_dim=attention.attention_head_size,
            attention_out=blocks.part(attention.out_lin, nn.Linear, dtype),
            attention_norm=blocks.part(attention_norm, nn.LayerNorm, dtype),
            attention_eps=attention_norm.eps,
            attention_p=attention.dropout.p if attention.training else 0.0,
            context_p=0.0,
            ffn=fused,
            ffn_norm=blocks.part(ffn_norm, nn.LayerNorm, dtype),
            ffn_eps=ffn_norm.eps,
            ffn_p=checks.dropout_p(ffn.dropout),
            unfused=lambda x: ffn_norm(ffn.ff_chunk(x) + x),  # a row alone: chunks are all the same
        )


class BigmodelDistilBertTransformer(bert_like.Encoder, hf.Transformer, kin=KIN):
    output = BaseModelOutput

    def _decodes(self) -> bool:
        return False


class BigmodelDistilBertPaddedTransformer(BigmodelDistilBertTransformer):
    packs = False


class _Modules(NamedTuple):
    attention: Any
    attention_norm: Any
    ffn: Any
    ffn_norm: Any
    recompute: bool


def _plain_ffn(ffn: Any) -> bool:
    modules = ffn.__dict__["_modules"]
    return (
        checks.intact(ffn, hf.FFN)
        and checks.plain_dropout(modules["dropout"])
        and checks.activation(ffn.activation) is not None
        and all(checks.row_wise(modules[name], nn.Linear) for name in ("lin1", "lin2"))
    )


def _check_attention(module: Any) -> str | None:
    return bert_like.check_self_attention(BigmodelDistilBertSelfAttention, module) or checks.reason_for_parts(
        module, {"out_lin": nn.Linear}, lora=True
    )


def _check_block(module: Any) -> str | None:
    return checks.reason_for_parts(
        module,
        {
            "sa_layer_norm": nn.LayerNorm,
            "ffn": hf.FFN,
            "ffn.lin1": nn.Linear,
            "ffn.lin2": nn.Linear,
            "ffn.dropout": nn.Dropout,
            "output_layer_norm": nn.LayerNorm,
        },
        lora=True,
    ) or checks.reason_for_activation(module.ffn.activation)


def _whole_block(kin: Kin, block: Any) -> str | None:
    return (
        checks.reason_for_hooks(block)
        or checks.inside(
            block.attention,
            "attention",
            hf.DistilBertSelfAttention,
            BigmodelDistilBertSelfAttention,
            _check_attention,
        )
        or checks.prefixed("block", _check_block(block))
    )


FAMILY = Family(
    name="distilbert",
    rules=(
        bert_like.embeddings_rule(KIN),
        bert_like.encoder_rule(KIN, _whole_block),
        Rule(
            hf.TransformerBlock,
            BigmodelDistilBertBlock,
            ("linear", "feed_forward"),
            _check_block,
            projections=("ffn.lin1", "ffn.lin2"),
        ),
        Rule(
            hf.DistilBertSelfAttention,
            BigmodelDistilBertSelfAttention,
            ("linear", "attention"),
            _check_attention,
            projections=("q_lin", "k_lin", "v_lin", "out_lin"),
        ),
    ),
    children=(
        ChildRule(hf.DistilBertForMaskedLM, "vocab_transform", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.DistilBertForMaskedLM, "vocab_projector", nn.Linear, BigmodelLinear, ("linear",)),
        bert_like.keeps_padding(
            KIN,
            hf.DistilBertForQuestionAnswering,
            "distilbert.transformer",
            BigmodelDistilBertPaddedTransformer,
            _whole_block,
        ),
    ),
    models=(hf.DistilBertModel,),
    mask_path=(hf.Transformer, hf.TransformerBlock, hf.DistilBertSelfAttention),
)
