"""BERT: BertModel and every head on it, as encoder; decoders and cross-attention keep their own code.

Per layer: one product for Q, K and V, attention that reads it in place, one call for projection + dropout +
residual + LayerNorm, one for the feed-forward block; the same in training, under autocast and under gradient
checkpointing. A padded batch runs without its padding, forward and backward: the encoder packs the real
tokens once, runs all layers on them and unpacks once. The result at real tokens is that of the padded run; at
padding it is zero (question answering, whose loss looks at padded positions too, keeps the padding). It packs
when it may look at the mask (not under torch.compile) and each sequence starts with a real token: with
padding on the left the pooler reads a padded position, which then has to hold what eager puts there.

A projection that peft has given a LoRA adapter is called as it is, between our other calls. A call takes the
original code of a layer, and is as right, when attention probabilities are asked for, with a cache, and where
a hook or a replaced submodule stands in the way. Attention probabilities are then computed in plain PyTorch
from the same Q and K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, MaskedLMOutput
from transformers.models.bert import modeling_bert as hf

from bigmodel_kernels.ops.registration import call, draw_seed
from bigmodel_kernels.transformers import attention_interface, blocks, checks, fused_loss
from bigmodel_kernels.transformers.blocks import Affine, Attend, FeedForward, LayerParts, Part
from bigmodel_kernels.transformers.families import ChildRule, Family, Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear


class BigmodelBertEmbeddings(hf.BertEmbeddings):
    """Word + position + type + LayerNorm in one pass."""

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        held = None if input_ids is None else self._held()
        if held is None or inputs_embeds is not None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, *args, **kwargs)
        if position_ids is None:
            # The number of cached tokens, under the name of the version of transformers.
            start = next(iter((*args, *kwargs.values())), 0)
            position_ids = self.position_ids[:, start : start + input_ids.shape[1]]
        if token_type_ids is None:
            types = self.token_type_ids.expand(position_ids.shape[0], -1)
            token_type_ids = torch.gather(types, dim=1, index=position_ids)
        word, position, kind, norm = held
        p, padding_idx = checks.dropout_p(self.dropout), self.word_embeddings.padding_idx
        out: Tensor = call(
            "embedding",
            input_ids,
            word[0],
            position_ids,
            position[0],
            token_type_ids,
            kind[0],
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

    def _held(self) -> tuple[Any, ...] | None:
        dtype = self.word_embeddings.weight.dtype
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        # The operator has a padding_idx for words, whose row gets no gradient, and none for the other tables.
        if any(table.padding_idx is not None for table in tables[1:]):
            return None
        if not checks.plain_dropout(self.dropout) or checks.watched_globally():
            return None
        held = (
            *(checks.parameters(table, nn.Embedding, dtype) for table in tables),
            checks.parameters(self.LayerNorm, nn.LayerNorm, dtype),
        )
        return None if None in held else held


class BigmodelBertSelfAttention(hf.BertSelfAttention):
    """One product for Q, K and V."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        cached = args or any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if (
            cached
            or not attention_interface.readable(attention_mask)
            or not _readable(self)
            or checks.watched_globally()
        ):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        qkv = _qkv(self, checks.dtype_of(hidden_states))
        query, key, value = blocks.heads(hidden_states, qkv, "linear", self.attention_head_size)
        out, weights = attention_interface.attention_forward(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask if self.is_causal else _bidirectional(attention_mask),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **{k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")},
        )
        return out.flatten(2), weights


class BigmodelBertSelfOutput(hf.BertSelfOutput):
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
            self.LayerNorm.eps,
        )


class BigmodelBertLayer(hf.BertLayer):
    """The whole layer in four calls.

    The encoder passes `bigmodel_run` when it knows how all layers run: the layer's modules, and the attention
    on rows that may be packed. Going through the call of the module, gradient checkpointing, sharded
    parameters and captured hidden states are what they are for the original.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        bigmodel_run: tuple[_Modules, Attend] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (
            bigmodel_run is None
            and _plain_call(args, kwargs)
            and attention_interface.readable(attention_mask)
        ):
            modules = None if self.is_decoder or checks.watched_globally() else _modules(self)
            if modules is not None:
                bigmodel_run = (
                    modules,
                    _dense(_seen(hidden_states, attention_mask), modules.attention.scaling),
                )
        if bigmodel_run is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        modules, attend = bigmodel_run
        return blocks.post_norm_layer(
            hidden_states, _layer_parts(modules, checks.dtype_of(hidden_states)), attend
        )

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        modules = None if checks.watched_globally() else _feed_forward_modules(self)
        dtype = checks.dtype_of(attention_output)
        ffn = None if modules is None else _ffn(*modules, dtype, checks.recomputes(self))
        norm = None if modules is None else blocks.part(modules[1].LayerNorm, nn.LayerNorm, dtype)
        if ffn is None or modules is None or not isinstance(norm, Affine):
            return super().feed_forward_chunk(attention_output)  # type: ignore[no-any-return]
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


class BigmodelBertEncoder(hf.BertEncoder):
    """All layers on packed tokens, or densely where the mask may not be looked at."""

    packs: ClassVar[bool] = True

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        plain = not any(kwargs.get(name) for name in ("use_cache", "output_hidden_states"))
        layers = None
        if plain and _plain_call(args, kwargs) and attention_interface.readable(attention_mask):
            layers = self._layers()
        if not layers:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        scale = layers[0].attention.scaling
        seen = _seen(hidden_states, attention_mask)
        packing = None
        # Whether to pack is a question about values.
        padding = seen.padding if self.packs else None
        if padding is not None and not attention_interface.is_tracing(padding) and bool(padding[:, 0].all()):
            packing = blocks.Packing(padding)
        if packing is not None:
            x, attend = packing.pack(hidden_states), packing.attend(scale)
        else:
            x, attend = hidden_states, _dense(seen, scale)
        for layer, modules in zip(self.layer, layers, strict=True):
            x = layer(x, bigmodel_run=(modules, attend))
        if packing is not None:
            x = packing.unpack(x)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)

    def _layers(self) -> list[_Modules] | None:
        """The modules of all layers, if every layer can run fused."""
        if self.config.is_decoder or attention_interface.collected() or checks.watched_globally():
            return None
        layers = [_modules(layer) for layer in self.layer]
        return None if None in layers else layers  # type: ignore[return-value]


class BigmodelBertPaddedEncoder(BigmodelBertEncoder):
    """The same with the padding left in, for a head that mixes positions: question answering takes a softmax
    over all positions of a sequence, padded ones included, so those have to hold what eager puts there."""

    packs = False


class BigmodelBertPooler(hf.BertPooler):
    def forward(self, hidden_states: Tensor) -> Tensor:
        dense = checks.parameters(self.dense, nn.Linear, checks.dtype_of(hidden_states))
        if dense is None or checks.watched_globally():
            return super().forward(hidden_states)
        return self.activation(blocks.linear(hidden_states[:, 0], (Affine(*dense),), "linear"))  # type: ignore[no-any-return]


class BigmodelBertPredictionHeadTransform(hf.BertPredictionHeadTransform):
    """Projection, activation and LayerNorm in one call."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = checks.dtype_of(hidden_states)
        dense = checks.parameters(self.dense, nn.Linear, dtype)
        norm = checks.parameters(self.LayerNorm, nn.LayerNorm, dtype)
        activation = checks.activation(self.transform_act_fn)
        if dense is None or norm is None or activation is None or checks.watched_globally():
            return super().forward(hidden_states)
        if blocks.lowered(
            hidden_states
        ):  # torch's rule: the product in the autocast type, the norm in float32
            out = blocks.linear(hidden_states, (Affine(*dense),), "linear", activation)
            return blocks.layer_norm(out, Affine(*norm), self.LayerNorm.eps)
        return blocks.linear(
            hidden_states,
            (Affine(*dense),),
            "linear",
            activation=activation,
            norm=Affine(*norm),
            eps=self.LayerNorm.eps,
        )


@fused_loss.named_like_its_original
class BigmodelBertForMaskedLM(hf.BertForMaskedLM):
    """In training mode, with labels: the loss without logits, from the tokens that have a label."""

    @functools.wraps(hf.BertForMaskedLM.forward)  # Trainer reads the names of the arguments
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        known = checks.intact(self.cls, hf.BertOnlyMLMHead) and checks.intact(
            self.cls.predictions, hf.BertLMPredictionHead
        )
        if not known or not fused_loss.wanted(self, args, kwargs):
            return super().forward(*args, **kwargs)
        outputs = self.bert(*args, **fused_loss.of_the_body(kwargs), return_dict=True)
        rows, target = fused_loss.labelled(outputs.last_hidden_state, kwargs["labels"])
        states = self.cls.predictions.transform(rows)
        held = fused_loss.head(self.cls.predictions.decoder, checks.dtype_of(states))
        if held is None:  # an adapter or a hook on the head: the logits are what it makes of the states
            loss = nn.functional.cross_entropy(self.cls.predictions.decoder(states).float(), target)
        else:
            loss = fused_loss.loss(states, *held, target)
        return MaskedLMOutput(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


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


def _seen(x: Tensor, mask: Any) -> attention_interface.Visibility:
    """Which of its own positions x (B, S, hidden) sees."""
    return attention_interface.visibility(x[:, None], x.shape[1], _bidirectional(mask), is_causal=False)


def _dense(seen: attention_interface.Visibility, scale: float) -> Attend:
    """Attention of (B, S, H, D) with whatever mask there is."""

    def attend(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return (
            attention_interface.run(query, key, value, seen, scale, dropout_p=dropout_p)
            .transpose(1, 2)
            .flatten(2)
        )

    return attend


class _Modules(NamedTuple):
    """The modules of a layer that is as known, all of them without hooks."""

    attention: Any
    attention_output: Any
    intermediate: Any
    output: Any
    recompute: bool


def _modules(layer: Any) -> _Modules | None:
    """The modules of a layer that can run fused, on packed rows too; else None."""
    if not checks.callable_as(layer, BigmodelBertLayer):
        return None
    attention = layer.__dict__["_modules"]["attention"]
    if not checks.intact(attention, hf.BertAttention):
        return None
    inner = attention.__dict__["_modules"]
    self_attention, output, feed_forward = inner["self"], inner["output"], _feed_forward_modules(layer)
    if (
        feed_forward is None
        or not checks.intact(self_attention, BigmodelBertSelfAttention)
        or not checks.intact(output, BigmodelBertSelfOutput)
        or not _readable(self_attention)
        or not _row_wise(output, "dense")
    ):
        return None
    return _Modules(self_attention, output, *feed_forward, checks.recomputes(layer))


def _feed_forward_modules(layer: Any) -> tuple[Any, Any] | None:
    modules = layer.__dict__["_modules"]
    intermediate, output = modules["intermediate"], modules["output"]
    if (
        not checks.intact(intermediate, hf.BertIntermediate)
        or not checks.intact(output, hf.BertOutput)
        or not checks.row_wise(intermediate.__dict__["_modules"]["dense"], nn.Linear)
        or checks.activation(intermediate.intermediate_act_fn) is None
        or not _row_wise(output, "dense")
    ):
        return None
    return intermediate, output


def _readable(attention: Any) -> bool:
    modules = attention.__dict__["_modules"]
    return checks.plain_dropout(modules["dropout"]) and all(
        checks.row_wise(modules[name], nn.Linear) for name in ("query", "key", "value")
    )


def _row_wise(output: Any, name: str) -> bool:
    """A projection, a dropout and a norm."""
    modules = output.__dict__["_modules"]
    return (
        checks.row_wise(modules[name], nn.Linear)
        and checks.plain_dropout(modules["dropout"])
        and checks.callable_as(modules["LayerNorm"], nn.LayerNorm)
    )


def _qkv(attention: Any, dtype: torch.dtype | None) -> tuple[Part, Part, Part]:
    modules = attention.__dict__["_modules"]
    return (
        blocks.part(modules["query"], nn.Linear, dtype),
        blocks.part(modules["key"], nn.Linear, dtype),
        blocks.part(modules["value"], nn.Linear, dtype),
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
        qkv=_qkv(attention, dtype),
        head_dim=attention.attention_head_size,
        attention_out=blocks.part(attention_output.dense, nn.Linear, dtype),
        attention_norm=blocks.part(attention_output.LayerNorm, nn.LayerNorm, dtype),
        attention_eps=attention_output.LayerNorm.eps,
        attention_p=attention.dropout.p if attention.training else 0.0,
        context_p=checks.dropout_p(attention_output.dropout),
        ffn=_ffn(intermediate, output, dtype, recompute),
        ffn_norm=blocks.part(output.LayerNorm, nn.LayerNorm, dtype),
        ffn_eps=output.LayerNorm.eps,
        ffn_p=checks.dropout_p(output.dropout),
        unfused=lambda x: output(intermediate(x), x),
    )


# ------------------------------------------------------------------------------------------------------------
# what can be patched


def _check_embeddings(module: Any) -> str | None:
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    parts: dict[str, type] = dict.fromkeys(tables, nn.Embedding)
    why = checks.reason_for_parts(module, {**parts, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout})
    if why is None and getattr(module, "position_embedding_type", "absolute") != "absolute":
        why = f"position_embedding_type={module.position_embedding_type!r}; only 'absolute' is known"
    for name in tables if why is None else ():
        table = module.get_submodule(name)
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            why = f"{name} has max_norm, scale_grad_by_freq or sparse"
    return why


def _check_self_attention(module: Any) -> str | None:
    parts: dict[str, type] = dict.fromkeys(("query", "key", "value"), nn.Linear)
    why = checks.reason_for_parts(module, {**parts, "dropout": nn.Dropout}, lora=True)
    if why is not None:
        return why
    kind = getattr(module, "position_embedding_type", None) or "absolute"
    if kind != "absolute":
        return f"position_embedding_type={kind!r} enters the scores; only 'absolute' is known"
    if getattr(module, "pruned_heads", None):
        return "it has pruned heads"
    expected = module.num_attention_heads * module.attention_head_size
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


def _check_layer(module: Any) -> str | None:
    return checks.reason_for_parts(
        module,
        {
            "intermediate": hf.BertIntermediate,
            "intermediate.dense": nn.Linear,
            "output": hf.BertOutput,
            "output.dense": nn.Linear,
            "output.LayerNorm": nn.LayerNorm,
            "output.dropout": nn.Dropout,
        },
        lora=True,
    ) or _check_activation(module.intermediate.intermediate_act_fn)


def _check_activation(function: Any) -> str | None:
    if checks.activation(function) is not None:
        return None
    name = getattr(function, "__name__", None) or type(function).__name__
    return f"activation {name} has no kernel; known are {', '.join(sorted(set(checks.ACTIVATIONS.values())))}"


def _check_encoder(module: Any) -> str | None:
    if module.config.is_decoder:
        return "is_decoder=True: causal layers with a cache run one by one"
    for name, part in module.named_modules():
        if isinstance(part, hf.BertLayer):
            why = checks.reason_for_class(part, hf.BertLayer) if type(part) is not BigmodelBertLayer else None
            why = why or _whole_layer(part)
            if why is not None:
                return f"not all of its layers can be fused, so they run one by one ({name}: {why})"
    return None


def _whole_layer(layer: Any) -> str | None:
    """Why a layer as a whole cannot run fused."""
    attention = layer.attention
    return (
        checks.reason_for_hooks(layer)
        or _prefixed("attention", checks.reason(attention, hf.BertAttention))
        or _inside(
            attention.self,
            "attention.self",
            hf.BertSelfAttention,
            BigmodelBertSelfAttention,
            _check_self_attention,
        )
        or _inside(
            attention.output,
            "attention.output",
            hf.BertSelfOutput,
            BigmodelBertSelfOutput,
            _check_self_output,
        )
        or _check_layer(layer)
    )


def _inside(part: Any, name: str, cls: type, patched: type, check: Callable[[Any], str | None]) -> str | None:
    why = None if type(part) is patched else checks.reason_for_class(part, cls)
    return _prefixed(name, why or checks.reason_for_hooks(part) or check(part))


def _prefixed(name: str, why: str | None) -> str | None:
    return None if why is None else f"{name}: {why}"


def _check_pooler(module: Any) -> str | None:
    return checks.reason_for_parts(module, {"dense": nn.Linear, "activation": nn.Tanh})


def _check_transform(module: Any) -> str | None:
    return checks.reason_for_parts(
        module, {"dense": nn.Linear, "LayerNorm": nn.LayerNorm}
    ) or _check_activation(module.transform_act_fn)


FAMILY = Family(
    name="bert",
    rules=(
        Rule(hf.BertEmbeddings, BigmodelBertEmbeddings, ("embedding",), _check_embeddings),
        Rule(hf.BertEncoder, BigmodelBertEncoder, (), _check_encoder, note="runs its layers without padding"),
        Rule(
            hf.BertLayer,
            BigmodelBertLayer,
            ("feed_forward",),
            _check_layer,
            projections=("intermediate.dense", "output.dense"),
        ),
        Rule(
            hf.BertSelfAttention,
            BigmodelBertSelfAttention,
            ("linear", "attention"),
            _check_self_attention,
            projections=("query", "key", "value"),
        ),
        Rule(
            hf.BertSelfOutput, BigmodelBertSelfOutput, ("linear",), _check_self_output, projections=("dense",)
        ),
        Rule(hf.BertPooler, BigmodelBertPooler, ("linear",), _check_pooler),
        Rule(
            hf.BertPredictionHeadTransform, BigmodelBertPredictionHeadTransform, ("linear",), _check_transform
        ),
    ),
    children=(
        ChildRule(hf.BertLMPredictionHead, "decoder", nn.Linear, BigmodelLinear, ("linear",)),
        ChildRule(
            hf.BertForQuestionAnswering,
            "bert.encoder",
            hf.BertEncoder,
            BigmodelBertPaddedEncoder,
            (),
            _check_encoder,
            note="runs its layers with the padding in: the head's softmax is over all positions",
        ),
    ),
    losses=(
        Rule(
            hf.BertForMaskedLM,
            BigmodelBertForMaskedLM,
            ("linear_cross_entropy",),
            fused_loss.check,
            note=fused_loss.NOTE,
        ),
    ),
    models=(hf.BertModel,),
    mask_path=(hf.BertEncoder, hf.BertLayer, hf.BertAttention, hf.BertSelfAttention, hf.BertCrossAttention),
    left={
        hf.BertCrossAttention: "cross-attention keeps its projections; only its attention function changes"
    },
)
