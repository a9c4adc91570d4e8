"""Layers that are BERT's with the modules in other places: a family names the places.

DistilBERT, ALBERT and MPNet have the same two halves, each with its norm behind it; what differs is which
module holds which projection. A `Layer` form says that in `Places`, and runs as one of `bert_like`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_kernels.transformers import bert_like, blocks, checks, packed_encoder
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.blocks import Affine, FeedForward, LayerParts
from bigmodel_kernels.transformers.families import Rule


@dataclass(frozen=True)
class Places:
    """Dotted names in a layer; "" for a dropout that there is not."""

    attention: str
    out: str
    attention_norm: str
    w_in: str
    activation: str
    w_out: str
    ffn_norm: str
    context_dropout: str = ""
    ffn_dropout: str = ""
    #: Modules that hold others and are passed by, with their classes.
    holders: tuple[tuple[str, type[nn.Module]], ...] = ()

    def modules(self) -> Iterator[tuple[str, type[nn.Module]]]:
        """What has to be as known, but for attention and activation."""
        yield from self.holders
        yield from ((name, nn.Linear) for name in (self.out, self.w_in, self.w_out))
        yield from ((name, nn.LayerNorm) for name in (self.attention_norm, self.ffn_norm))
        yield from ((name, nn.Dropout) for name in (self.context_dropout, self.ffn_dropout) if name)


class Modules(NamedTuple):
    """The modules of a layer that is as known, all of them without hooks."""

    attention: Any
    out: Any
    attention_norm: Any
    w_in: Any
    activation: Any
    w_out: Any
    ffn_norm: Any
    context_dropout: Any
    ffn_dropout: Any
    recompute: bool


class Layer(bert_like.Layer):
    """The whole layer in four calls."""

    places: ClassVar[Places]

    def gather(self) -> Modules | None:
        at, places = partial(_at, self), self.places
        found = Modules(
            attention=at(places.attention),
            out=at(places.out),
            attention_norm=at(places.attention_norm),
            w_in=at(places.w_in),
            activation=at(places.activation),
            w_out=at(places.w_out),
            ffn_norm=at(places.ffn_norm),
            context_dropout=at(places.context_dropout),
            ffn_dropout=at(places.ffn_dropout),
            recompute=checks.recomputes(self),
        )
        return found if _fusible(found, self.kin) and _holders_intact(self) else None

    def parts(self, modules: Any, dtype: torch.dtype | None) -> LayerParts:
        m: Modules = modules
        w_in, w_out = (checks.parameters(part, nn.Linear, dtype) for part in (m.w_in, m.w_out))
        activation, ffn = checks.activation(m.activation), None
        if w_in is not None and w_out is not None and activation is not None:
            ffn = FeedForward(Affine(*w_in), Affine(*w_out), activation, m.recompute)
        return LayerParts(
            qkv=m.attention.projections(dtype),
            head_dim=m.attention.attention_head_size,
            attention_out=blocks.part(m.out, nn.Linear, dtype),
            attention_norm=blocks.part(m.attention_norm, nn.LayerNorm, dtype),
            attention_eps=blocks.eps_of(m.attention_norm),
            attention_p=m.attention.dropout_p(),
            context_p=_dropped(m.context_dropout),
            ffn=ffn,
            ffn_norm=blocks.part(m.ffn_norm, nn.LayerNorm, dtype),
            ffn_eps=blocks.eps_of(m.ffn_norm),
            ffn_p=_dropped(m.ffn_dropout),
            unfused=partial(_unfused, m),
        )


# ------------------------------------------------------------------------------------------------------------
# modules, read at each call


def _at(layer: Any, name: str) -> Any:
    return attrgetter(name)(layer) if name else None


def _holders_intact(layer: Layer) -> bool:
    return all(checks.intact(_at(layer, name), cls) for name, cls in layer.places.holders)


def _fusible(found: Modules, kin: Kin) -> bool:
    """Whether fused calls may read all of these, on packed rows too."""
    return (
        checks.intact(found.attention, kin.forms[kin.self_attention])
        and found.attention.readable()
        and all(checks.row_wise(part, nn.Linear) for part in (found.out, found.w_in, found.w_out))
        and all(checks.callable_as(part, nn.LayerNorm) for part in (found.attention_norm, found.ffn_norm))
        and all(
            part is None or checks.plain_dropout(part) for part in (found.context_dropout, found.ffn_dropout)
        )
        and checks.activation(found.activation) is not None
    )


def _dropped(dropout: Any) -> float:
    return 0.0 if dropout is None else checks.dropout_p(dropout)


def _unfused(m: Modules, x: Tensor) -> Tensor:
    """The feed-forward with residual and norm by the layer's own modules."""
    y = m.w_out(m.activation(m.w_in(x)))
    return m.ffn_norm((y if m.ffn_dropout is None else m.ffn_dropout(y)) + x)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------
# what a family says


def _check_layer(form: type[Layer], module: Any) -> str | None:
    places = form.places
    why = checks.reason_for_parts(module, dict(places.modules()), lora=True)
    return why or checks.reason_for_activation(_at(module, places.activation))


def check_attention(form: Any, parts: dict[str, type], module: Any) -> str | None:
    """For a `SelfAttention` form that has more `parts` than query, key and value."""
    return bert_like.check_self_attention(form, module) or checks.reason_for_parts(module, parts, lora=True)


def whole_layer(parts: dict[str, type], kin: Kin, layer: Any) -> str | None:
    """Why a layer as a whole cannot run fused; `parts` are those of its attention, as above."""
    form: Any = kin.forms[kin.layer]
    attention, place = kin.forms[kin.self_attention], form.places.attention
    return (
        checks.reason_for_hooks(layer)
        or checks.inside(
            _at(layer, place),
            place,
            kin.self_attention,
            attention,
            partial(check_attention, attention, parts),
        )
        or _check_layer(form, layer)
    )


def rules(
    kin: Kin, out: str, parts: dict[str, type], encoder: str = packed_encoder.NOTE, embeddings: str = ""
) -> tuple[Rule, ...]:
    """Of embeddings, encoder, layer and attention, which has the projection `out` and these `parts`.

    `encoder` and `embeddings` are notes on those.
    """
    form: Any = kin.forms[kin.layer]
    attention: Any = kin.forms[kin.self_attention]
    return (
        bert_like.embeddings_rule(kin, embeddings),
        bert_like.encoder_rule(kin, partial(whole_layer, parts), encoder),
        Rule(
            kin.layer,
            form,
            ("linear", "feed_forward"),
            partial(_check_layer, form),
            projections=(form.places.w_in, form.places.w_out),
        ),
        Rule(
            kin.self_attention,
            attention,
            ("linear", "attention"),
            partial(check_attention, attention, parts),
            projections=(*attention.names, out),
        ),
    )
