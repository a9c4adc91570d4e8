"""BertModel and its kin in three calls: embeddings, all layers, and the pooler (see `whole_model`).

Of batches of few tokens without padding: with more tokens what is around the layers is a small part.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from bigmodel_kernels.transformers import bert_like, checks, whole_layer, whole_model
from bigmodel_kernels.transformers.families import Rule
from bigmodel_kernels.transformers.generic import is_form


class Model(whole_model.Model):
    kin: ClassVar[bert_like.Kin]

    def at_once(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        *rest: Any,
        token_type_ids: Any = None,
        position_ids: Any = None,
        **others: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | None:
        if (
            rest
            or not whole_model.plain(self, input_ids, others)
            or input_ids.numel() > whole_layer.MOST_ROWS
            or self.config.is_decoder
        ):
            return None
        if attention_mask is not None and not (
            whole_model.masks_tokens(attention_mask, input_ids.shape) and bool(attention_mask.all())
        ):
            return None
        layers = self._layers()
        around = None if layers is None else layers.around()
        if layers is None or around is None:
            return None
        scale, eps = layers.given
        word, position, kind, *norm, pooler, pooler_bias = around
        modules = self.__dict__["_modules"]
        try:
            positions, types = modules["embeddings"].ids(input_ids, position_ids, token_type_ids)
            ids, positions, types = (
                t.expand(input_ids.shape).contiguous() for t in (input_ids, positions, types)
            )
            x = torch.ops.bigmodel.cpu_embedding.default(
                *(ids, word, positions, position, types, kind, *norm, eps)
            )
        except RuntimeError:
            return None  # the model's own forward says what is wrong with the ids
        x = whole_layer.encoded(x, layers, scale, None, None, 0)
        if x is None:
            return None
        pooled = None
        if modules.get("pooler") is not None:
            first = x[:, 0].contiguous()
            pooled = torch.ops.bigmodel.cpu_linear.default(
                *(first, pooler, pooler_bias, "none", None, None, None, 0.0)
            ).tanh_()
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=x, pooler_output=pooled)

    def _layers(self) -> whole_layer.Layers | None:
        """All layers, with the scale of their attention and the epsilon of the embeddings; around them the
        tables and the norm of the embeddings and the pooler's projection.
        """
        modules = self.__dict__["_modules"]
        parts: list[Any] = [modules.get(name) for name in ("embeddings", "encoder", "pooler")]
        embeddings, encoder, pooler = parts
        word = getattr(embeddings, "word_embeddings", None)
        roots = [module for module in parts if module is not None]

        def gather(dtype: torch.dtype) -> whole_layer.Gathered | None:
            kin = self.kin
            form: Any = kin.forms[kin.encoder]
            if not is_form(embeddings, kin.embeddings) or not isinstance(encoder, form):
                return None
            held, behind, within = embeddings.held(), _pooler(pooler, kin, dtype), encoder.modules_of_all()
            if held is None or len(held) != 4 or behind is None or checks.dropout_p(embeddings.dropout):
                return None
            parts = encoder.together(within, dtype) if within else None
            if parts is None or not checks.intact(encoder, type(encoder)):
                return None
            *tables, norm = held
            around = [*(weight for weight, _ in tables), *norm, *behind]
            return parts, (within[0].attention.scaling, embeddings.LayerNorm.eps), around

        like = getattr(word, "weight", None)
        return whole_model.layers_of(self, roots, like, "linear", "cpu_encoder", gather)


def _pooler(pooler: Any, kin: bert_like.Kin, dtype: torch.dtype) -> list[Any] | None:
    """Weight, to be packed, and bias of its projection, both None if there is no pooler."""
    if pooler is None:
        return [None, None]
    if not is_form(pooler, kin.pooler) or not checks.intact(pooler.activation, nn.Tanh):
        return None
    held = checks.parameters(pooler.dense, nn.Linear, dtype)
    return None if held is None else [[held[0]], held[1]]


def _check(kin: bert_like.Kin, model: Any) -> str | None:
    embeddings, encoder = kin.forms[kin.embeddings], kin.forms[kin.encoder]
    own = type(model.encoder) if isinstance(model.encoder, encoder) else encoder
    return checks.inside(
        *(model.embeddings, "embeddings", kin.embeddings, embeddings),
        partial(bert_like.check_embeddings, embeddings),
    ) or checks.inside(
        *(model.encoder, "encoder", kin.encoder, own),
        partial(bert_like.check_encoder, kin, bert_like.whole_bert_layer),
    )


def rule(kin: bert_like.Kin, form: type[Model]) -> Rule:
    """Lets the model's parts be called past its forward."""
    return Rule(form.__bases__[-1], form, (), partial(_check, kin), note="short texts in three calls")
