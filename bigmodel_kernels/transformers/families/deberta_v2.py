"""DeBERTa v2 and v3: BERT's layer with disentangled attention.

What position and content say of each other is a logit for each query and key, made from both: the model's
own code makes it from the queries and keys that we have, or on the CPU we, and attention adds it. There
batches run without their padding, too. Embeddings stay the model's own: between norm and dropout they
multiply by the mask.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2 import modeling_deberta_v2 as hf

from bigmodel_kernels.transformers import (
    attention_interface,
    bert_like,
    blocks,
    checks,
    fused_loss,
    layer_stack,
    packed_encoder,
)
from bigmodel_kernels.transformers.attention_interface import Visibility
from bigmodel_kernels.transformers.bert_like import Kin
from bigmodel_kernels.transformers.blocks import Packing, Terms
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear, Form, NamedForm

KIN = Kin(
    embeddings=hf.DebertaV2Embeddings,
    self_attention=hf.DisentangledSelfAttention,
    self_output=hf.DebertaV2SelfOutput,
    attention=hf.DebertaV2Attention,
    intermediate=hf.DebertaV2Intermediate,
    output=hf.DebertaV2Output,
    layer=hf.DebertaV2Layer,
    encoder=hf.DebertaV2Encoder,
)


class BigmodelDisentangledSelfAttention(bert_like.SelfAttention, hf.DisentangledSelfAttention, kin=KIN):
    """One product for Q, K and V, and attention with a bias made from Q and K."""

    names = ("query_proj", "key_proj", "value_proj")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Any = None,
        relative_pos: Any = None,
        rel_embeddings: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        if query_states is not None or not self.readable() or checks.watched_globally():
            return hf.DisentangledSelfAttention.forward(  # type: ignore[no-any-return]
                self,
                hidden_states,
                attention_mask,
                output_attentions,
                query_states,
                relative_pos,
                rel_embeddings,
            )
        parts = self.projections(checks.dtype_of(hidden_states))
        query, key, value = (
            t.transpose(1, 2) for t in blocks.heads(hidden_states, parts, "linear", self.attention_head_size)
        )
        query, seen = self.seen(query, key, attention_mask, relative_pos, rel_embeddings)
        out, weights = attention_interface.attend(
            *(self, query, key, value, seen, self.scaling), p=self.dropout_p(), wanted=output_attentions
        )
        return out.flatten(2), weights

    @property
    def scaling(self) -> float:
        return float(self.attention_head_size * self._terms()) ** -0.5

    def _terms(self) -> int:
        """How many terms a logit is the sum of."""
        return 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)

    def seen(
        self, query: Tensor, key: Tensor, mask: Tensor, relative_pos: Any, rel_embeddings: Any
    ) -> tuple[Tensor, Visibility]:
        """query and key (B, H, S, D), mask (B, 1, S, S). Returns the query too.

        A query at padding sees nothing. As in the model's own code, all keys weigh the same for it: a query
        of zeros gives that, with a bias of zeros.
        """
        bias: Any = 0
        if self.relative_attention:
            positions, places = (
                self.pos_dropout(rel_embeddings),
                _places(relative_pos, self.pos_ebd_size, key.shape[2]),
            )
            if places is not None:
                bias = self._bias(query, key, positions, places)
            else:
                bias = self.disentangled_attention_bias(  # type: ignore[no-untyped-call]
                    query.reshape(-1, *query.shape[2:]),
                    key.reshape(-1, *key.shape[2:]),
                    relative_pos,
                    positions,
                    self._terms(),
                )
        if isinstance(bias, Tensor):
            bias = bias.view(*query.shape[:2], *bias.shape[-2:])
        else:
            bias = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = mask.bool()
        if not attention_interface.is_tracing(mask) and mask.is_cpu and bool(mask.all()):
            return query, Visibility(key.shape[2], bias=bias)
        sees = mask.any(dim=-1, keepdim=True)
        hidden = torch.zeros(sees.shape, dtype=bias.dtype, device=bias.device).masked_fill_(
            sees, float("-inf")
        )
        return query.masked_fill(~sees, 0), Visibility(key.shape[2], bias=torch.where(mask, bias, hidden))

    def packed_bias(
        self, packing: Packing, relative_pos: Any, rel_embeddings: Any, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """Of packed rows (tokens, H, D), whose sequences have no gaps: (B, H, longest, longest)."""
        if not self.relative_attention:
            return None
        length = packing.longest
        query, key = (packing.unpack_heads(t)[:, :length].transpose(1, 2) for t in (query, key))
        places = _places(relative_pos, self.pos_ebd_size, length)
        assert places is not None  # as the encoder has seen
        bias = self._bias(query, key, self.pos_dropout(rel_embeddings), places)
        return bias if isinstance(bias, Tensor) else None

    def _bias(self, query: Tensor, key: Tensor, positions: Tensor, places: Places) -> Any:
        """What `disentangled_attention_bias` gives, (B, H, S, S), from the positions that are needed.

        Each product is of a head with all sequences, B S rows. That of keys has the positions as its rows:
        so both are read, and the bias is written, in the order of the keys.
        """
        x = positions[places.first : places.first + places.needed]
        size, batch, found = self.attention_head_size, len(query), []
        if self.share_att_key:
            of_query, of_key, _ = blocks.heads(x, self.projections(checks.dtype_of(x)), "linear", size)

        def projected(name: str) -> Tensor:
            """(H, positions, D)"""
            if self.share_att_key:
                x_of = of_key if name == "key" else of_query
            else:
                x_of = getattr(self, f"pos_{name}_proj")(x).unflatten(-1, (-1, size))
            return (x_of * self.scaling).transpose(0, 1)

        if "c2p" in self.pos_att_type:
            rows = query.transpose(0, 1).flatten(1, 2)
            scores = torch.bmm(rows, projected("key").transpose(1, 2)).unflatten(1, (batch, -1))
            found.append(_gathered(scores, -1, places.of_queries))
        if "p2c" in self.pos_att_type:
            rows = key.transpose(0, 1).flatten(1, 2)
            scores = torch.bmm(projected("query"), rows.transpose(1, 2)).unflatten(2, (batch, -1))
            scores = scores.transpose(1, 2)
            found.append(_gathered(scores, -2, places.of_keys))
        return sum(found[1:], found[0]).transpose(0, 1) if found else 0


def _gathered(scores: Tensor, dim: int, places: Tensor) -> Tensor:
    """Those at the same places (S, S) for all heads and sequences; half precision as integers, of which torch
    gathers twice as many, where no gradient is wanted.
    """
    places = places.expand(*scores.shape[:2], -1, -1)
    if scores.element_size() == 2 and not torch.is_grad_enabled():
        return scores.view(torch.int16).gather(dim, places).view(scores.dtype)
    return scores.gather(dim, places)


class Places(NamedTuple):
    """Which positions a batch needs of the table, so many from the `first` on, and of these for each query
    and key, (S, S), that of the key seen by the query, and that of the query seen by the key.
    """

    first: int
    needed: int
    of_queries: Tensor
    of_keys: Tensor


#: Of the distances (a copy) and the span that were seen last: all layers of a model share them.
_last: tuple[Tensor, int, Places] | None = None


def _places(distances: Any, span: int, length: int) -> Places | None:
    """For distances (1, S, S) of as many queries as keys; None where their values may not be looked at, or a
    look waits for a device.
    """
    global _last
    if not isinstance(distances, Tensor) or distances.shape != (1, length, length) or not length:
        return None
    if not distances.is_cpu or attention_interface.is_tracing(distances):
        return None
    last, distances = _last, distances.long()
    if last is not None and last[1] == span and torch.equal(last[0], distances):
        return last[2]
    with torch.inference_mode(False):  # which makes tensors that no gradient may need
        both = [(span + each).clamp(0, 2 * span - 1) for each in (distances[0], -distances[0].T)]
        ends = [each.aminmax() for each in both]
        first = min(int(low) for low, _ in ends)
        needed = max(int(high) for _, high in ends) + 1 - first
        found = Places(first, needed, *((each - first).contiguous() for each in both))
        _last = distances.clone(), span, found
    return found


class BigmodelDebertaV2SelfOutput(bert_like.SelfOutput, hf.DebertaV2SelfOutput, kin=KIN):
    pass


class BigmodelDebertaV2Layer(bert_like.Layer, hf.DebertaV2Layer, kin=KIN):
    """The whole layer in four calls, and those that make the bias."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        query_states: Any = None,
        relative_pos: Any = None,
        rel_embeddings: Any = None,
        output_attentions: bool = False,
        bigmodel_run: tuple[Any, Packing] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """A call with `bigmodel_run`, the layer's modules and how rows are packed, gets packed states."""
        if bigmodel_run is not None:
            modules, packing = bigmodel_run
            bias = partial(modules.attention.packed_bias, packing, relative_pos, rel_embeddings)

            def attend_packed(query: Tensor, key: Tensor, value: Tensor) -> Terms:
                terms = packing.terms(query, key, value, modules.attention.scaling)
                return terms._replace(bias=bias(query, key))

            return self.fused(hidden_states, modules, attend_packed), None
        modules = None
        asked = attention_interface.wants_attentions({"output_attentions": output_attentions})
        if query_states is None and not asked and not checks.watched_globally():
            modules = bert_like.gathered(self, KIN)
        if modules is None:
            return hf.DebertaV2Layer.forward(  # type: ignore[no-any-return]
                self,
                hidden_states,
                attention_mask,
                query_states,
                relative_pos,
                rel_embeddings,
                output_attentions,
            )
        attention = modules.attention

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Terms:
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            query, seen = attention.seen(query, key, attention_mask, relative_pos, rel_embeddings)
            return blocks.terms(query, key, value, seen, attention.scaling)

        return self.fused(hidden_states, modules, attend), None


class BigmodelDebertaV2Encoder(Form, hf.DebertaV2Encoder, kin=KIN):
    """All layers on packed tokens, where the model has said that it wants the last states alone."""

    #: False under a head whose result depends on what stands at padding.
    packs: ClassVar[bool] = True

    def forward(  # type: ignore[override]
        self,
        hidden_states: Any,
        attention_mask: Any,
        output_hidden_states: bool = True,
        output_attentions: bool = False,
        query_states: Any = None,
        relative_pos: Any = None,
        return_dict: bool = True,
    ) -> Any:
        plain = not output_attentions and query_states is None and relative_pos is None and return_dict
        packing = self._packing(hidden_states, attention_mask) if plain else None
        layers: list[Any] = list(self.layer)
        gathered = [] if packing is None else [bert_like.gathered(layer, KIN) for layer in layers]
        if packing is None or None in gathered:
            return hf.DebertaV2Encoder.forward(
                *(self, hidden_states, attention_mask, output_hidden_states, output_attentions),
                *(query_states, relative_pos, return_dict),
            )
        x = packing.pack(hidden_states)
        distances = self.get_rel_pos(hidden_states[:, : packing.longest])  # type: ignore[no-untyped-call]
        positions = self.get_rel_embedding()  # type: ignore[no-untyped-call]
        for layer, modules in zip(layers, gathered, strict=True):
            x, _ = layer(
                *(x, attention_mask),
                relative_pos=distances,
                rel_embeddings=positions,
                bigmodel_run=(modules, packing),
            )
        last = packing.unpack(x)
        return BaseModelOutput(
            last_hidden_state=last, hidden_states=(last,) if output_hidden_states else None
        )

    def _packing(self, x: Any, mask: Any) -> Packing | None:
        if (
            not (self.packs and _wanted.last_states_alone)
            or self.conv is not None  # it looks at neighbours
            or not isinstance(x, Tensor)
            or not isinstance(mask, Tensor)
            or not (x.is_cpu and mask.is_cpu)
            or mask.dim() != 2
            or attention_interface.is_tracing(mask)
            or checks.watched_globally()
        ):
            return None
        padding = mask.bool()
        packing = None if bool(padding.all()) else attention_interface.packing_of(padding)
        return packing if packing is not None and packing.unbroken() else None


class BigmodelDebertaV2PaddedEncoder(BigmodelDebertaV2Encoder):
    packs = False


class _Wanted(threading.local):
    last_states_alone = False


_wanted = _Wanted()


class BigmodelDebertaV2Model(NamedForm, hf.DebertaV2Model, kin=KIN):
    """Its own forward asks the encoder for all states, whether its caller does or not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        before = _wanted.last_states_alone
        asked = layer_stack.wants_states(self, kwargs)
        _wanted.last_states_alone = not asked and len(args) < 7 and self.z_steps < 2
        try:
            return super().__call__(*args, **kwargs)
        finally:
            _wanted.last_states_alone = before


class BigmodelLegacyDebertaV2PredictionHeadTransform(
    bert_like.Transform, hf.LegacyDebertaV2PredictionHeadTransform
):
    pass


@fused_loss.language_model(
    KIN, bert_like.cls_head(hf.LegacyDebertaV2OnlyMLMHead, hf.LegacyDebertaV2LMPredictionHead)
)
class BigmodelDebertaV2ForMaskedLM(hf.DebertaV2ForMaskedLM):
    pass


_check_encoder = partial(
    packed_encoder.check, hf.DebertaV2Layer, KIN, partial(bert_like.whole_bert_layer, KIN)
)


def _check_model(model: Any) -> str | None:
    """Its states are what it wants of the encoder that runs without padding."""
    return checks.reason_for_class(model.encoder, hf.DebertaV2Encoder) or _check_encoder(model.encoder)


FAMILY = Family(
    name="deberta_v2",
    rules=(
        Rule(hf.DebertaV2Model, BigmodelDebertaV2Model, (), _check_model, "says which states it wants"),
        Rule(hf.DebertaV2Encoder, BigmodelDebertaV2Encoder, (), _check_encoder, packed_encoder.NOTE),
        *bert_like.layer_rules(KIN),
        bert_like.transform_rule(BigmodelLegacyDebertaV2PredictionHeadTransform),
    ),
    children=(
        ChildRule(hf.LegacyDebertaV2LMPredictionHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(hf.ContextPooler, "dense", nn.Linear, BigmodelLinear, ("linear",)),
        packed_encoder.keeps_padding(
            hf.DebertaV2ForQuestionAnswering,
            "deberta.encoder",
            hf.DebertaV2Encoder,
            BigmodelDebertaV2PaddedEncoder,
            _check_encoder,
        ),
    ),
    losses=fused_loss.rules(*KIN.forms.values()),
    models=(hf.DebertaV2Model,),
    left={
        hf.DebertaV2Embeddings: "it multiplies by the mask between its norm and its dropout",
        hf.ConvLayer: "a convolution over positions, once a model",
    },
)
