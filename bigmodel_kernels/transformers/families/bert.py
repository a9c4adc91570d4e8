"""BERT: BertModel and every head on it, as encoder; decoders and cross-attention keep their own code.

Per layer: one product for Q, K and V, attention that reads it in place, one call for projection + residual +
LayerNorm, one for the feed-forward block. A padded batch runs without its padding: the encoder packs the real
tokens once, runs all layers on them and unpacks once. The result at real tokens is that of the padded run; at
padding it is zero (question answering, whose loss looks at padded positions too, keeps the padding). It packs
when it may look at the mask (not under torch.compile) and each sequence starts with a real token: with
padding on the left the pooler reads a padded position, which then has to hold what eager puts there.

A call takes the original code of a layer, and is as right, when dropout is active, under autocast, when
hidden states or attention probabilities are asked for, with gradient checkpointing, with a cache, and where a
hook or a replaced submodule stands in the way. Attention probabilities are then computed in plain PyTorch
from the same Q and K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert import modeling_bert as hf

from bigmodel_kernels.transformers import attention_interface, blocks, checks
from bigmodel_kernels.transformers.blocks import Affine, LayerWeights
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
        held = None if input_ids is None else self._held(input_ids.device.type)
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
        return torch.ops.bigmodel.embedding.default(  # type: ignore[no-any-return]
            input_ids, word[0], position_ids, position[0], token_type_ids, kind[0], *norm, self.LayerNorm.eps
        )

    def _held(self, device_type: str) -> tuple[Any, ...] | None:
        dtype = self.word_embeddings.weight.dtype
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        # The operator's gradient knows no padding_idx, whose row must get none: training keeps torch's
        # embedding.
        if torch.is_grad_enabled() and any(
            t.padding_idx is not None and t.weight.requires_grad for t in tables
        ):
            return None
        if checks.dropping(self.dropout) or checks.original_code_needed(device_type):
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
        qkv = None if cached or not _maskable(attention_mask) else _qkv(self, hidden_states.dtype)
        if qkv is None or checks.original_code_needed(hidden_states.device.type):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query, key, value = blocks.split_heads(
            blocks.linear(hidden_states, qkv, "linear"), self.attention_head_size
        )
        out, weights = attention_interface.attention_forward(
            self,
            query,
            key,
            value,
            attention_mask if self.is_causal else _bidirectional(attention_mask),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **{k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")},
        )
        return out.flatten(2), weights


class BigmodelBertSelfOutput(hf.BertSelfOutput):
    """Projection, residual and LayerNorm in one call."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense = checks.parameters(self.dense, nn.Linear, hidden_states.dtype)
        norm = checks.parameters(self.LayerNorm, nn.LayerNorm, hidden_states.dtype)
        if (
            dense is None
            or norm is None
            or checks.dropping(self.dropout)
            or not checks.intact(self.dropout, nn.Dropout)
            or checks.original_code_needed(hidden_states.device.type)
        ):
            return super().forward(hidden_states, input_tensor)
        return blocks.linear(
            hidden_states,
            (Affine(*dense),),
            "linear",
            residual=input_tensor,
            norm=Affine(*norm),
            eps=self.LayerNorm.eps,
        )


class BigmodelBertLayer(hf.BertLayer):
    """Intermediate and output as one feed-forward call."""

    def feed_forward_chunk(self, attention_output: Tensor) -> Tensor:
        ffn = _ffn(self, attention_output.dtype)
        if ffn is None or checks.original_code_needed(attention_output.device.type):
            return super().feed_forward_chunk(attention_output)  # type: ignore[no-any-return]
        ffn_in, ffn_out, norm, eps, activation = ffn
        return blocks.feed_forward(
            attention_output, ffn_in, ffn_out, "linear", activation, attention_output, "post", norm, eps
        )


class BigmodelBertEncoder(hf.BertEncoder):
    """All layers on packed tokens, or densely where the mask may not be looked at."""

    packs: ClassVar[bool] = True

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        layers = None if args or not _maskable(attention_mask) else self._layers(hidden_states, kwargs)
        if not layers:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        attention: Any = self.layer[0].get_submodule("attention.self")
        head_dim, scale = attention.attention_head_size, attention.scaling
        seen = attention_interface.visibility(
            hidden_states[:, None], hidden_states.shape[1], _bidirectional(attention_mask), is_causal=False
        )
        packing = None
        # Whether to pack is a question about values.
        padding = seen.padding if self.packs else None
        if padding is not None and not attention_interface.is_tracing(padding) and bool(padding[:, 0].all()):
            packing = blocks.Packing(padding)
        if packing is not None:
            x, attend = packing.pack(hidden_states), packing.attend(head_dim, scale)
        else:
            x = hidden_states

            def attend(qkv: Tensor) -> Tensor:
                query, key, value = blocks.split_heads(qkv, head_dim)
                return blocks.merge_heads(attention_interface.run(query, key, value, seen, scale))

        for weights in layers:
            x = blocks.post_norm_layer(x, weights, attend)
        if packing is not None:
            x = packing.unpack(x)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x)

    def _layers(self, x: Tensor, kwargs: dict[str, Any]) -> list[LayerWeights] | None:
        """The weights of all layers, if every layer can run fused for this call."""
        for name in ("encoder_hidden_states", "cache", "past_key_values", "output_attentions"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                return None
        if (
            self.config.is_decoder
            or attention_interface.collected()
            or checks.original_code_needed(x.device.type)
        ):
            return None
        result = []
        for layer in self.layer:
            weights = _layer_weights(layer, x.dtype)
            if weights is None:
                return None
            result.append(weights)
        return result


class BigmodelBertPaddedEncoder(BigmodelBertEncoder):
    """The same with the padding left in, for a head that mixes positions: question answering takes a softmax
    over all positions of a sequence, padded ones included, so those have to hold what eager puts there."""

    packs = False


class BigmodelBertPooler(hf.BertPooler):
    def forward(self, hidden_states: Tensor) -> Tensor:
        dense = checks.parameters(self.dense, nn.Linear, hidden_states.dtype)
        if dense is None or checks.original_code_needed(hidden_states.device.type):
            return super().forward(hidden_states)
        return self.activation(blocks.linear(hidden_states[:, 0], (Affine(*dense),), "linear"))  # type: ignore[no-any-return]


class BigmodelBertPredictionHeadTransform(hf.BertPredictionHeadTransform):
    """Projection, activation and LayerNorm in one call."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense = checks.parameters(self.dense, nn.Linear, hidden_states.dtype)
        norm = checks.parameters(self.LayerNorm, nn.LayerNorm, hidden_states.dtype)
        activation = checks.activation(self.transform_act_fn)
        if (
            dense is None
            or norm is None
            or activation is None
            or checks.original_code_needed(hidden_states.device.type)
        ):
            return super().forward(hidden_states)
        return blocks.linear(
            hidden_states,
            (Affine(*dense),),
            "linear",
            activation=activation,
            norm=Affine(*norm),
            eps=self.LayerNorm.eps,
        )


# ------------------------------------------------------------------------------------------------------------
# weights, gathered at each call


def _maskable(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.dim() in (2, 3, 4))


def _bidirectional(mask: Any) -> Any:
    """A plain 2D padding mask, as flash attention's mask function gives it, in the shape that means just
    padding.
    """
    return mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask


def _qkv(attention: Any, dtype: torch.dtype) -> tuple[Affine, Affine, Affine] | None:
    modules = attention.__dict__["_modules"]
    query = checks.parameters(modules["query"], nn.Linear, dtype)
    key = checks.parameters(modules["key"], nn.Linear, dtype)
    value = checks.parameters(modules["value"], nn.Linear, dtype)
    if query is None or key is None or value is None or not checks.intact(modules["dropout"], nn.Dropout):
        return None
    return Affine(*query), Affine(*key), Affine(*value)


def _ffn(layer: Any, dtype: torch.dtype) -> tuple[Affine, Affine, Affine, float, str] | None:
    modules = layer.__dict__["_modules"]
    intermediate, output = modules["intermediate"], modules["output"]
    if not checks.intact(intermediate, hf.BertIntermediate) or not checks.intact(output, hf.BertOutput):
        return None
    inner = output.__dict__["_modules"]
    ffn_in = checks.parameters(intermediate.__dict__["_modules"]["dense"], nn.Linear, dtype)
    ffn_out = checks.parameters(inner["dense"], nn.Linear, dtype)
    norm = checks.parameters(inner["LayerNorm"], nn.LayerNorm, dtype)
    activation = checks.activation(intermediate.intermediate_act_fn)
    if ffn_in is None or ffn_out is None or norm is None or activation is None:
        return None
    if checks.dropping(inner["dropout"]) or not checks.intact(inner["dropout"], nn.Dropout):
        return None
    return Affine(*ffn_in), Affine(*ffn_out), Affine(*norm), inner["LayerNorm"].eps, activation


def _layer_weights(layer: Any, dtype: torch.dtype) -> LayerWeights | None:
    """Everything that one layer needs, or None if its own code has to run."""
    if not checks.intact(layer, BigmodelBertLayer) or (layer.gradient_checkpointing and layer.training):
        return None
    attention = layer.__dict__["_modules"]["attention"]
    if not checks.intact(attention, hf.BertAttention):
        return None
    inner = attention.__dict__["_modules"]
    self_attention, output = inner["self"], inner["output"]
    if not checks.intact(self_attention, BigmodelBertSelfAttention) or not checks.intact(
        output, BigmodelBertSelfOutput
    ):
        return None
    if self_attention.training and self_attention.dropout.p > 0:
        return None
    qkv, ffn = _qkv(self_attention, dtype), _ffn(layer, dtype)
    parts = output.__dict__["_modules"]
    dense = checks.parameters(parts["dense"], nn.Linear, dtype)
    norm = checks.parameters(parts["LayerNorm"], nn.LayerNorm, dtype)
    if qkv is None or ffn is None or dense is None or norm is None:
        return None
    if checks.dropping(parts["dropout"]) or not checks.intact(parts["dropout"], nn.Dropout):
        return None
    return LayerWeights(qkv, Affine(*dense), Affine(*norm), parts["LayerNorm"].eps, *ffn)


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
    why = checks.reason_for_parts(module, {**parts, "dropout": nn.Dropout})
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
        module, {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}
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
        or _part(
            attention.self,
            "attention.self",
            hf.BertSelfAttention,
            BigmodelBertSelfAttention,
            _check_self_attention,
        )
        or _part(
            attention.output,
            "attention.output",
            hf.BertSelfOutput,
            BigmodelBertSelfOutput,
            _check_self_output,
        )
        or _check_layer(layer)
    )


def _part(part: Any, name: str, cls: type, patched: type, check: Callable[[Any], str | None]) -> str | None:
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
        Rule(hf.BertLayer, BigmodelBertLayer, ("feed_forward",), _check_layer),
        Rule(hf.BertSelfAttention, BigmodelBertSelfAttention, ("linear", "attention"), _check_self_attention),
        Rule(hf.BertSelfOutput, BigmodelBertSelfOutput, ("linear",), _check_self_output),
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
    models=(hf.BertModel,),
    mask_path=(hf.BertEncoder, hf.BertLayer, hf.BertAttention, hf.BertSelfAttention, hf.BertCrossAttention),
    left={
        hf.BertCrossAttention: "cross-attention keeps its projections; only its attention function changes"
    },
)
