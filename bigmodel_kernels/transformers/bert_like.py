"""The layers of BERT, for it and for every model whose code is copied from it (RoBERTa, ELECTRA, ...);
DistilBERT uses part of it.

transformers gives each of these models classes of its own with the same code inside. A family names them in a
`Kin`, and puts the forms below in front of them:

    KIN = Kin.of(hf, "Roberta")

    class BigmodelRobertaLayer(bert_like.Layer, hf.RobertaLayer, kin=KIN): ...

Per layer: one product for Q, K and V, attention that reads it in place, one call for projection + dropout +
residual + LayerNorm, one for the feed-forward block; the same in training, under autocast and under gradient
checkpointing. A padded batch runs without its padding, forward and backward: the encoder packs the real
tokens once, runs all layers on them and unpacks once. The result at real tokens is that of the padded run; at
padding it is zero (a head that mixes positions, such as question answering, whose loss looks at padded ones
too, keeps the padding). It packs when it may look at the mask (not under torch.compile) and each sequence
starts with a real token: with padding on the left the pooler reads a padded position, which then has to hold
what eager puts there.

A projection that peft has given a LoRA adapter is called as it is, between our other calls. A call takes the
original code of a layer, and is as right, when attention probabilities are asked for, with a cache, and where
a hook or a replaced submodule stands in the way. Attention probabilities are then computed apart, from the
same Q and K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from bigmodel_kernels.ops.registration import call, draw_seed
from bigmodel_kernels.transformers import (
    attention_interface,
    blocks,
    checks,
    fused_loss,
    packed_encoder,
    whole_layer,
)
from bigmodel_kernels.transformers.blocks import Affine, Attend, FeedForward, LayerParts, Part, Terms
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear, Form, is_form


@dataclass(frozen=True)
class Kin:
    """The classes of one model, and the patched form of each that has one."""

    embeddings: type[nn.Module]
    self_attention: type[nn.Module]
    layer: type[nn.Module]
    encoder: type[nn.Module]
    # The parts of a layer of BERT; DistilBERT has others.
    cross_attention: Any = None
    self_output: Any = None
    attention: Any = None
    intermediate: Any = None
    output: Any = None
    pooler: Any = None
    forms: dict[type, type] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any, prefix: str) -> Kin:
        """The classes of transformers' `module`, whose names begin with `prefix`."""
        names = {
            "embeddings": "Embeddings",
            "self_attention": "SelfAttention",
            "cross_attention": "CrossAttention",
            "self_output": "SelfOutput",
            "attention": "Attention",
            "intermediate": "Intermediate",
            "output": "Output",
            "layer": "Layer",
            "encoder": "Encoder",
        }
        found = {role: getattr(module, prefix + name) for role, name in names.items()}
        return cls(**found, pooler=getattr(module, prefix + "Pooler", None))


class Embeddings(Form):
    """Word + position + type + LayerNorm in one pass."""

    tables: ClassVar[tuple[str, ...]] = ("word_embeddings", "position_embeddings", "token_type_embeddings")

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        held = None if input_ids is None else self.held()
        if held is None or inputs_embeds is not None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, *args, **kwargs)
        # The number of cached tokens, under the name of the version of transformers.
        start = next(iter((*args, *kwargs.values())), 0)
        return self._embed(input_ids, *self.ids(input_ids, position_ids, token_type_ids, start), held)

    def ids(
        self, input_ids: Tensor, positions: Tensor | None, types: Tensor | None, start: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Positions and types of tokens, what is not given as the model takes it to be."""
        if positions is None:
            positions = self._positions(input_ids, start)
        if types is None:
            all_types = self.token_type_ids.expand(positions.shape[0], -1)
            types = torch.gather(all_types, dim=1, index=positions)
        return positions, types

    def _embed(self, input_ids: Tensor, positions: Tensor, types: Tensor | None, held: Any) -> Tensor:
        word, position, *kind, norm = held
        p, padding_idx = checks.dropout_p(self.dropout), self.word_embeddings.padding_idx
        out: Tensor = call(
            "embedding",
            input_ids,
            word[0],
            positions,
            position[0],
            types,
            kind[0][0] if kind else None,
            *norm,
            self.LayerNorm.eps,
            draw_seed(p, input_ids.device),
            dropout_p=p,
            padding_idx=-1 if padding_idx is None else padding_idx,
        )
        if (
            torch.is_grad_enabled()
            and not out.requires_grad
            and checks.marks_its_output(self.word_embeddings)
        ):
            out.requires_grad_(True)
        return out

    def _positions(self, input_ids: Tensor, start: int) -> Tensor:
        return self.position_ids[:, start : start + input_ids.shape[1]]  # type: ignore[no-any-return]

    def held(self) -> tuple[Any, ...] | None:
        dtype = self.word_embeddings.weight.dtype
        tables = [getattr(self, name) for name in self.tables]
        # The operator has a padding_idx for words, whose row gets no gradient, and none for the other tables.
        learns = [torch.is_grad_enabled() and table.weight.requires_grad for table in tables]
        if any(
            learn and table.padding_idx is not None
            for learn, table in zip(learns[1:], tables[1:], strict=True)
        ):
            return None
        if not checks.plain_dropout(self.dropout) or checks.watched_globally():
            return None
        held = (
            *(checks.parameters(table, nn.Embedding, dtype) for table in tables),
            checks.parameters(self.LayerNorm, nn.LayerNorm, dtype),
        )
        return None if None in held else held


class CountedEmbeddings(Embeddings):
    """RoBERTa's: positions count the real tokens, from padding_idx + 1; padding is at padding_idx."""

    def _positions(self, input_ids: Tensor, start: int) -> Tensor:
        return self.create_position_ids_from_input_ids(input_ids, self.padding_idx, start)  # type: ignore[no-any-return]


#: What a report says of them: their table of positions has a row that gets no gradient.
COUNTED_NOTE = "by its own code where the table of positions is trained"


class SelfAttention(Form):
    """One product for Q, K and V."""

    #: The projections, the attribute that says how many heads there are, and the dropout of probabilities.
    names: ClassVar[tuple[str, ...]] = ("query", "key", "value")
    heads: ClassVar[str] = "num_attention_heads"
    drops: ClassVar[str] = "dropout"

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        context = self.context(hidden_states, attention_mask, args, kwargs)
        return super().forward(hidden_states, attention_mask, *args, **kwargs) if context is None else context

    def context(
        self, hidden_states: Tensor, attention_mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None] | None:
        """The heads' results side by side, and the probabilities where they are asked for; None if the
        original code has to do it.
        """
        cached = args or any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if (
            cached
            or not attention_interface.readable(attention_mask)
            or not self.readable()
            or checks.watched_globally()
        ):
            return None
        qkv = self.projections(checks.dtype_of(hidden_states))
        query, key, value = blocks.heads(hidden_states, qkv, "linear", self.attention_head_size)
        out, weights = attention_interface.attention_forward(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask if self.is_causal else _bidirectional(attention_mask),
            dropout=self.dropout_p(),
            scaling=self.scaling,
            **{k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")},
        )
        return out.flatten(2), weights

    def readable(self) -> bool:
        modules = self.__dict__["_modules"]
        return checks.plain_dropout(modules[self.drops]) and all(
            checks.row_wise(modules[name], nn.Linear) for name in self.names
        )

    def dropout_p(self) -> float:
        return float(self.__dict__["_modules"][self.drops].p) if self.training else 0.0

    def projections(self, dtype: torch.dtype | None) -> tuple[Part, ...]:
        modules = self.__dict__["_modules"]
        return tuple(blocks.part(modules[name], nn.Linear, dtype) for name in self.names)


class SelfOutput(Form):
    """Projection, dropout, residual and LayerNorm in one call."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not checks.plain_dropout(self.dropout) or checks.watched_globally():
            return super().forward(hidden_states, input_tensor)
        dtype = checks.dtype_of(hidden_states)
        return blocks.output(
            hidden_states,
            blocks.part(self.dense, nn.Linear, dtype),
            "linear",
            input_tensor,
            checks.dropout_p(self.dropout),
            blocks.part(self.LayerNorm, nn.LayerNorm, dtype),
            blocks.eps_of(self.LayerNorm),
        )


class Layer(Form):
    """The whole layer in four calls, or two.

    The encoder passes `bigmodel_run` when it knows how all layers run: the layer's modules, and the attention
    on rows that may be packed. Going through the call of the module, gradient checkpointing, sharded
    parameters and captured hidden states are what they are for the original.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        bigmodel_run: tuple[Any, Attend] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if bigmodel_run is None and _plain_call(args, kwargs):
            bigmodel_run = self.alone(hidden_states, attention_mask)
        if bigmodel_run is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        return self.fused(hidden_states, *bigmodel_run)

    def alone(self, x: Tensor, mask: Any, position_bias: Tensor | None = None) -> tuple[Any, Attend] | None:
        """How this layer runs by itself; None if its own code has to do it."""
        if not attention_interface.readable(mask) or getattr(self, "is_decoder", False):
            return None
        modules = None if checks.watched_globally() else gathered(self, self.kin)
        if modules is None:
            return None
        return modules, _dense(_seen(x, mask, position_bias), modules.attention.scaling)

    def fused(self, x: Tensor, modules: Any, attend: Attend) -> Tensor:
        return blocks.post_norm_layer(x, self.parts(modules, checks.dtype_of(x)), attend)

    def gather(self) -> Any:
        """The modules of the layer if it can run fused, on packed rows too, else None; `attention` is one."""
        return _modules(self)

    def parts(self, modules: Any, dtype: torch.dtype | None) -> LayerParts:
        return _layer_parts(modules, dtype)

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        modules = None if checks.watched_globally() else _feed_forward_modules(self)
        dtype = checks.dtype_of(attention_output)
        ffn = None if modules is None else _ffn(*modules, dtype, checks.recomputes(self))
        norm = None if modules is None else blocks.part(modules[1].LayerNorm, nn.LayerNorm, dtype)
        if ffn is None or modules is None or not isinstance(norm, Affine):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc,no-any-return]
        return blocks.feed_forward(
            attention_output,
            ffn,
            "linear",
            attention_output,
            "post",
            norm,
            modules[1].LayerNorm.eps,
            checks.dropout_p(modules[1].dropout),
        )


class Encoder(Form):
    """All layers on packed tokens, or densely where the mask may not be looked at."""

    #: False for a head that mixes positions: question answering takes a softmax over all positions of a
    #: sequence, padded ones included, so those have to hold what eager puts there.
    packs: ClassVar[bool] = True
    #: Whether `position_bias` depends on the distance of two positions alone.
    relative: ClassVar[bool] = False
    #: What it returns.
    output: ClassVar[type] = BaseModelOutputWithPastAndCrossAttentions

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        plain = not any(kwargs.get(name) for name in ("use_cache", "output_hidden_states"))
        layers = together = None
        if plain and _plain_call(args, kwargs) and attention_interface.readable(attention_mask):
            layers, together = self._gathered(hidden_states)
        if not layers:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        scale = layers[0].attention.scaling
        seen = _seen(hidden_states, attention_mask, self.position_bias(hidden_states))
        packs = self.packs and attention_interface.says_padding(attention_mask)
        packing = attention_interface.packing_of(seen.padding if packs else None)
        if packing is not None:
            x = packing.pack(hidden_states)
            # Attention without padding takes no bias.
            attend = packing.attend(scale) if seen.bias is None else packing.padded(_dense(seen, scale))
        else:
            x, attend = hidden_states, _dense(seen, scale)
        x = self.enter(x)
        result = None
        if together is not None and (whole_layer.few(x) or seen.bias is not None):
            how = whole_layer.How(order="post")
            biases = [] if seen.bias is None else [seen.bias]
            if packing is None:
                result = whole_layer.encoded(x, together, scale, seen.padding, None, 0, how, biases)
            elif not biases or (self.relative and packing.unbroken()):
                longest = packing.longest
                biases = [bias[..., :longest, :longest] for bias in biases]
                result = whole_layer.encoded(
                    *(x, together, scale, None, packing.cu_seqlens, longest, how, biases)
                )
        if result is not None:
            x = result
        else:
            for layer, modules in zip(self.sequence(), layers, strict=True):
                x = layer(x, bigmodel_run=(modules, attend))
        if packing is not None:
            x = packing.unpack(x)
        return self.output(last_hidden_state=x)

    def modules_of_all(self) -> list[Any] | None:
        """The modules of all layers, if every layer can run fused."""
        if self._watched():
            return None
        layers = [gathered(layer, self.kin) for layer in self.sequence()]
        return None if None in layers else layers

    def _watched(self) -> bool:
        """Whether layers have to be called one by one as they are."""
        return self._decodes() or attention_interface.collected() or checks.watched_globally()

    def _gathered(self, x: Tensor) -> tuple[list[Any] | None, whole_layer.Layers | None]:
        """The modules of all layers, see `modules_of_all`, and all of them for one call, if it may be one."""
        form: Any = self.kin.forms[self.kin.layer]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or form.fused is not Layer.fused:
            return self.modules_of_all(), None
        layers, modules = list(self.sequence()), None
        if not layers or self._watched():
            return None, None

        def gather() -> tuple[list[LayerParts], list[Any]] | None:
            nonlocal modules
            modules = self.modules_of_all()
            parts = None if modules is None else self.together(modules, checks.dtype_of(x))
            return None if parts is None or modules is None else (parts, modules)

        together = whole_layer.layers_of(self, layers, x, "linear", gather)
        return (modules if together is None else together.given), together

    def together(self, modules: list[Any], dtype: torch.dtype | None) -> list[LayerParts] | None:
        """The parts of all layers, of their modules, for one call; None if a layer is watched."""
        form, layers = self.kin.forms[self.kin.layer], list(self.sequence())
        if not all(checks.intact(layer, form) for layer in layers):
            return None
        return [layer.parts(m, dtype) for layer, m in zip(layers, modules, strict=True)]

    def sequence(self) -> Iterable[Any]:
        """The layers, in their order."""
        return self.layer  # type: ignore[no-any-return]

    def position_bias(self, x: Tensor) -> Tensor | None:
        """What all layers add to their logits."""
        return None

    def enter(self, x: Tensor) -> Tensor:
        """What comes before the first layer, on rows that may be packed."""
        return x

    def _decodes(self) -> bool:
        return bool(self.config.is_decoder)


class Pooler(Form):
    def forward(self, hidden_states: Tensor) -> Tensor:
        dense = checks.parameters(self.dense, nn.Linear, checks.dtype_of(hidden_states))
        if dense is None or checks.watched_globally():
            return super().forward(hidden_states)
        return self.activation(blocks.linear(hidden_states[:, 0], (Affine(*dense),), "linear"))  # type: ignore[no-any-return]


class LMHead(Form):
    """RoBERTa's: projection, GELU and LayerNorm in one call, then the product with the vocabulary."""

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        states = transform(features, self.dense, "gelu", self.layer_norm)
        if states is None:
            return super().forward(features, **kwargs)  # type: ignore[no-any-return]
        return self.decoder(states)  # type: ignore[no-any-return]

    @staticmethod
    def states(head: Any, rows: Tensor) -> Tensor:
        """What goes into the product, of a head that is patched or not."""
        states = transform(rows, head.dense, "gelu", head.layer_norm)
        return head.layer_norm(nn.functional.gelu(head.dense(rows))) if states is None else states


class Transform(Form):
    """Projection, activation and LayerNorm of a language-model head in one call."""

    activation_at: ClassVar[str] = "transform_act_fn"
    norm_at: ClassVar[str] = "LayerNorm"

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = self.transformed(hidden_states)
        return super().forward(hidden_states) if out is None else out

    def transformed(self, x: Tensor) -> Tensor | None:
        """None where it cannot be fused."""
        activation = checks.activation(getattr(self, self.activation_at))
        return transform(x, self.dense, activation, getattr(self, self.norm_at))


def transform(x: Tensor, dense: Any, activation: str | None, norm: Any) -> Tensor | None:
    """norm(activation(dense(x))) before a language-model head, in one call; None where it cannot be fused."""
    dtype = checks.dtype_of(x)
    w, n = checks.parameters(dense, nn.Linear, dtype), checks.parameters(norm, nn.LayerNorm, dtype)
    if w is None or n is None or activation is None or checks.watched_globally():
        return None
    if blocks.lowered(x):  # torch's rule: the product in the autocast type, the norm in float32
        return blocks.layer_norm(blocks.linear(x, (Affine(*w),), "linear", activation), Affine(*n), norm.eps)
    return blocks.linear(x, (Affine(*w),), "linear", activation, norm=Affine(*n), eps=norm.eps)


# ------------------------------------------------------------------------------------------------------------
# weights, gathered at each call


def _bidirectional(mask: Any) -> Any:
    """A plain 2D padding mask, as flash attention's mask function gives it, in the shape that means just
    padding.
    """
    return mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask


def _plain_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer or the encoder is asked for plain self-attention and for its result only."""
    given = ("encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values")
    return (
        all(arg is None for arg in args)
        and all(kwargs.get(name) is None for name in given)
        and not attention_interface.wants_attentions(kwargs)
    )


def _seen(x: Tensor, mask: Any, position_bias: Tensor | None = None) -> attention_interface.Visibility:
    """Which of its own positions x (B, S, hidden) sees."""
    mask = _bidirectional(mask)
    return attention_interface.visibility(
        x[:, None], x.shape[1], mask, is_causal=False, position_bias=position_bias
    )


def _dense(seen: attention_interface.Visibility, scale: float) -> Attend:
    """Attention of (B, S, H, D) with whatever mask there is."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Terms:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return blocks.terms(query, key, value, seen, scale)

    return attend


class _Modules(NamedTuple):
    """The modules of a layer that is as known, all of them without hooks."""

    attention: Any
    attention_output: Any
    intermediate: Any
    output: Any
    recompute: bool


def gathered(layer: Any, kin: Kin) -> Any:
    """What a layer of these kin gathers; None too for one that is not as known or has hooks."""
    return layer.gather() if checks.callable_as(layer, kin.forms[kin.layer]) else None


def _modules(layer: Any) -> _Modules | None:
    """Those of BERT's layer."""
    kin = layer.kin
    attention = layer.__dict__["_modules"]["attention"]
    if not checks.intact(attention, kin.attention):
        return None
    inner = attention.__dict__["_modules"]
    self_attention, output, feed_forward = inner["self"], inner["output"], _feed_forward_modules(layer)
    if (
        feed_forward is None
        or not checks.intact(self_attention, kin.forms[kin.self_attention])
        or not checks.intact(output, kin.forms[kin.self_output])
        or not self_attention.readable()
        or not _row_wise(output, "dense")
    ):
        return None
    return _Modules(self_attention, output, *feed_forward, checks.recomputes(layer))


def _feed_forward_modules(layer: Any) -> tuple[Any, Any] | None:
    modules = layer.__dict__["_modules"]
    intermediate, output = modules["intermediate"], modules["output"]
    if (
        not checks.intact(intermediate, layer.kin.intermediate)
        or not checks.intact(output, layer.kin.output)
        or not checks.row_wise(intermediate.__dict__["_modules"]["dense"], nn.Linear)
        or checks.activation(intermediate.intermediate_act_fn) is None
        or not _row_wise(output, "dense")
    ):
        return None
    return intermediate, output


def _row_wise(output: Any, name: str) -> bool:
    """A projection, a dropout and a norm."""
    modules = output.__dict__["_modules"]
    return (
        checks.row_wise(modules[name], nn.Linear)
        and checks.plain_dropout(modules["dropout"])
        and checks.callable_as(modules["LayerNorm"], nn.LayerNorm)
    )


def _ffn(intermediate: Any, output: Any, dtype: torch.dtype | None, recompute: bool) -> FeedForward | None:
    w_in = checks.parameters(intermediate.__dict__["_modules"]["dense"], nn.Linear, dtype)
    w_out = checks.parameters(output.__dict__["_modules"]["dense"], nn.Linear, dtype)
    activation = checks.activation(intermediate.intermediate_act_fn)
    if w_in is None or w_out is None or activation is None:
        return None
    return FeedForward(Affine(*w_in), Affine(*w_out), activation, recompute)


def _layer_parts(modules: _Modules, dtype: torch.dtype | None) -> LayerParts:
    attention, attention_output, intermediate, output, recompute = modules
    return LayerParts(
        qkv=attention.projections(dtype),
        head_dim=attention.attention_head_size,
        attention_out=blocks.part(attention_output.dense, nn.Linear, dtype),
        attention_norm=blocks.part(attention_output.LayerNorm, nn.LayerNorm, dtype),
        attention_eps=blocks.eps_of(attention_output.LayerNorm),
        attention_p=attention.dropout_p(),
        context_p=checks.dropout_p(attention_output.dropout),
        ffn=_ffn(intermediate, output, dtype, recompute),
        ffn_norm=blocks.part(output.LayerNorm, nn.LayerNorm, dtype),
        ffn_eps=blocks.eps_of(output.LayerNorm),
        ffn_p=checks.dropout_p(output.dropout),
        unfused=lambda x: output(intermediate(x), x),
    )


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def check_embeddings(form: Any, module: Any) -> str | None:
    """For an `Embeddings` form and the module that may get it."""
    tables = form.tables
    parts: dict[str, type] = dict.fromkeys(tables, nn.Embedding)
    why = checks.reason_for_parts(module, {**parts, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout})
    if why is None and getattr(module, "position_embedding_type", "absolute") != "absolute":
        why = f"position_embedding_type={module.position_embedding_type!r}; only 'absolute' is known"
    for name in tables if why is None else ():
        table = module.get_submodule(name)
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            why = f"{name} has max_norm, scale_grad_by_freq or sparse"
    return why


def check_self_attention(form: Any, module: Any) -> str | None:
    """For a `SelfAttention` form and the module that may get it."""
    parts: dict[str, type] = dict.fromkeys(form.names, nn.Linear)
    why = checks.reason_for_parts(module, {**parts, form.drops: nn.Dropout}, lora=True)
    if why is not None:
        return why
    kind = getattr(module, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        return f"position_embedding_type={kind!r} enters the scores; only 'absolute' is known"
    if getattr(module, "pruned_heads", None):
        return "it has pruned heads"
    expected = getattr(module, form.heads) * module.attention_head_size
    for name in parts:
        features = module.get_submodule(name).out_features
        if features != expected:
            return f"{name} gives {features} features, not heads x head size, {expected}"
    if module.attention_head_size > 256:
        return f"head size {module.attention_head_size}; allowed are 1 to 256"
    return None


def _check_self_output(module: Any) -> str | None:
    return checks.reason_for_parts(
        module, {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}, lora=True
    )


def _check_layer(kin: Kin, module: Any) -> str | None:
    return checks.reason_for_parts(
        module,
        {
            "intermediate": kin.intermediate,
            "intermediate.dense": nn.Linear,
            "output": kin.output,
            "output.dense": nn.Linear,
            "output.LayerNorm": nn.LayerNorm,
            "output.dropout": nn.Dropout,
        },
        lora=True,
    ) or checks.reason_for_activation(module.intermediate.intermediate_act_fn)


def check_encoder(kin: Kin, whole_layer: WholeLayer, module: Any) -> str | None:
    """`whole_layer` says why a layer as a whole cannot run fused."""
    if getattr(getattr(module, "config", None), "is_decoder", False):
        return "is_decoder=True: causal layers with a cache run one by one"
    form, check = kin.forms[kin.layer], partial(whole_layer, kin)
    return packed_encoder.reason_for_layers(module, kin.layer, form, check, "they run one by one")


def whole_bert_layer(kin: Kin, layer: Any) -> str | None:
    """Why a layer as a whole cannot run fused."""
    attention = layer.attention
    return (
        checks.reason_for_hooks(layer)
        or checks.prefixed("attention", checks.reason(attention, kin.attention))
        or checks.inside(
            attention.self,
            "attention.self",
            kin.self_attention,
            kin.forms[kin.self_attention],
            partial(check_self_attention, kin.forms[kin.self_attention]),
        )
        or checks.inside(
            attention.output,
            "attention.output",
            kin.self_output,
            kin.forms[kin.self_output],
            _check_self_output,
        )
        or _check_layer(kin, layer)
    )


def _check_pooler(module: Any) -> str | None:
    return checks.reason_for_parts(module, {"dense": nn.Linear, "activation": nn.Tanh})


def _check_transform(form: type[Transform], module: Any) -> str | None:
    return checks.reason_for_parts(
        module, {"dense": nn.Linear, form.norm_at: nn.LayerNorm}
    ) or checks.reason_for_activation(getattr(module, form.activation_at))


def _check_lm_head(module: Any) -> str | None:
    return checks.reason_for_parts(module, {"dense": nn.Linear, "layer_norm": nn.LayerNorm})


# ------------------------------------------------------------------------------------------------------------
# what a family says


def transform_rule(form: type[Transform]) -> Rule:
    return Rule(form.__bases__[1], form, ("linear",), partial(_check_transform, form))


def masked_lm(kin: Kin, lm_head: type[nn.Module]) -> Callable[[type], type]:
    """`fused_loss.language_model` of a masked language model with a head of RoBERTa's kind."""

    def before(model: Any) -> fused_loss.Rows | None:
        known = is_form(model.lm_head, lm_head) or checks.intact(model.lm_head, lm_head)
        return partial(LMHead.states, model.lm_head) if known else None

    return fused_loss.language_model(kin, fused_loss.Head("lm_head.decoder", ("lm_head",), before))


def cls_head(outer: type[nn.Module], predictions: type[nn.Module]) -> fused_loss.Head:
    """`fused_loss.Head` of BERT's kind: `cls.predictions` has a transform and the product."""

    def before(model: Any) -> fused_loss.Rows | None:
        cls = model._modules.get("cls")  # DeBERTa v2 has it in its first form alone
        known = checks.intact(cls, outer) and checks.intact(cls.predictions, predictions)
        return cls.predictions.transform if known else None

    return fused_loss.Head("cls.predictions.decoder", ("cls",), before)


#: Why a layer of these kin as a whole cannot run fused.
WholeLayer = Callable[[Kin, Any], str | None]


def rules(kin: Kin, embeddings: str = "") -> tuple[Rule, ...]:
    """The rules of BERT's own layers; `embeddings` is the note on the embeddings."""
    layers = (embeddings_rule(kin, embeddings), encoder_rule(kin), *layer_rules(kin))
    return layers if kin.pooler is None else (*layers, pooler_rule(kin))


def layer_rules(kin: Kin) -> tuple[Rule, ...]:
    """Those of the layer and its halves."""
    attention: Any = kin.forms[kin.self_attention]
    return (
        Rule(
            kin.layer,
            kin.forms[kin.layer],
            ("feed_forward",),
            partial(_check_layer, kin),
            projections=("intermediate.dense", "output.dense"),
        ),
        Rule(
            kin.self_attention,
            attention,
            ("linear", "attention"),
            partial(check_self_attention, attention),
            projections=attention.names,
        ),
        Rule(
            kin.self_output,
            kin.forms[kin.self_output],
            ("linear",),
            _check_self_output,
            projections=("dense",),
        ),
    )


def pooler_rule(kin: Kin) -> Rule:
    return Rule(kin.pooler, kin.forms[kin.pooler], ("linear",), _check_pooler)


def lm_head_rule(kin: Kin, lm_head: type[nn.Module]) -> Rule:
    return Rule(lm_head, kin.forms[lm_head], ("linear",), _check_lm_head)


def embeddings_rule(kin: Kin, note: str = "") -> Rule:
    form = kin.forms[kin.embeddings]
    return Rule(kin.embeddings, form, ("embedding",), partial(check_embeddings, form), note)


def encoder_rule(
    kin: Kin, whole_layer: WholeLayer = whole_bert_layer, note: str = packed_encoder.NOTE
) -> Rule:
    check = partial(check_encoder, kin, whole_layer)
    return Rule(kin.encoder, kin.forms[kin.encoder], (), check, note)


def keeps_padding(
    kin: Kin,
    model: type[nn.Module],
    attribute: str,
    patched: type[nn.Module],
    whole_layer: WholeLayer = whole_bert_layer,
) -> ChildRule:
    """For a head that mixes positions: the encoder at `attribute` becomes a form whose `packs` is False."""
    check = partial(check_encoder, kin, whole_layer)
    return packed_encoder.keeps_padding(model, attribute, kin.encoder, patched, check)


def roberta_family(
    name: str,
    kin: Kin,
    model: Rule,
    lm_head: type[nn.Module],
    question_answering: type[nn.Module],
    padded_encoder: type[nn.Module],
) -> Family:
    """The family of a model that is RoBERTa under other names."""
    return Family(
        name=name,
        rules=(model, *rules(kin, embeddings=COUNTED_NOTE), lm_head_rule(kin, lm_head)),
        children=(
            ChildRule(lm_head, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
            keeps_padding(kin, question_answering, "roberta.encoder", padded_encoder),
        ),
        models=(model.original,),
        losses=fused_loss.rules(*kin.forms.values()),
        mask_path=mask_path(kin),
        left=left(kin),
    )


def mask_path(kin: Kin) -> tuple[type[nn.Module], ...]:
    """See `Family.mask_path`."""
    return kin.encoder, kin.layer, kin.attention, kin.self_attention, kin.cross_attention


def left(kin: Kin) -> dict[type, str]:
    """See `Family.left`."""
    return {kin.cross_attention: "cross-attention keeps its projections; only its attention function changes"}
