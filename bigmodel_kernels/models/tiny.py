"""Tiny models with random weights, of every family that can be patched, and what each of them reads.

`TINY`, at the end, has a row for each file of `transformers/families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, GPT2Config

VOCABULARY = 101

#: Of BERT, and of every model whose config has the same names.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}


_EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 4,  # all: which are chosen must not hang on rounding
    "experts_implementation": "batched_mm",  # has float64, and compiles
}

#: Decoders of Llama's kind: the prefix of their classes, and what their config has beside Llama's. Windows
#: are shorter than the sequences of the tests.
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 6},
    "Qwen2": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 9},
    "Gemma3": {
        "head_dim": 16,
        "sliding_window": 6,
        "query_pre_attn_scalar": 9,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Phi3": {"sliding_window": 6},
    "Olmo2": {},
    "Granite": {
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "Olmo3": {"sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Mixtral": {"sliding_window": 6, **_EXPERTS},
    "Qwen3Moe": {
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
        **_EXPERTS,
    },
    "GptOss": {
        "head_dim": 16,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_EXPERTS,
    },
}


def decoder_config(prefix: str, **changes: Any) -> Any:
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(prefix, prefix + "Config"))
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 72,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **DECODERS[prefix],
        **changes,
    }
    return config(**options)


def decoder(prefix: str, head: str = "ForCausalLM", **changes: Any) -> Any:
    """One of `DECODERS`, with random weights."""
    head = "TextModel" if (prefix, head) == ("Gemma3", "Model") else head
    return build(getattr(transformers, prefix + head), decoder_config(prefix, **changes))


_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

_HALF_ROTARY = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
}

#: Decoders with LayerNorms, after GPT-2: the prefix of their classes, and the sizes by their names.
GPT_LIKE: dict[str, dict[str, Any]] = {
    "OPT": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 72,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "GPTNeoX": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 72,
        "max_position_embeddings": 64,
        "rope_parameters": _HALF_ROTARY,
    },
    "GPTJ": {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_inner": 72, "n_positions": 64, "rotary_dim": 10},
    "CodeGen": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 72, "n_positions": 64, "rotary_dim": 10},
    "GPTNeo": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "intermediate_size": 72,
        "window_size": 5,
        "max_position_embeddings": 64,
    },
    "Bloom": {"hidden_size": 48, "n_layer": 2, "n_head": 3},
    "Phi": {**_LLAMA_SIZES, "num_attention_heads": 3, "rope_parameters": _HALF_ROTARY},
    "Starcoder2": {**_LLAMA_SIZES, "num_key_value_heads": 2, "sliding_window": 6},
    "StableLm": {
        **_LLAMA_SIZES,
        "num_key_value_heads": 2,
        "use_qkv_bias": True,
        "rope_parameters": _HALF_ROTARY,
    },
    # The decoder of Falcon-40B; that of Falcon-7B and that of Falcon-RW are variants in the tests.
    "Falcon": {
        **{name: value for name, value in _LLAMA_SIZES.items() if name != "intermediate_size"},
        "ffn_hidden_size": 72,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "attn_implementation": "eager",  # its sdpa forgets the mask where attentions are asked for
    },
}


def gpt_like_config(prefix: str, **changes: Any) -> Any:
    return getattr(transformers, prefix + "Config")(**{**_TOKENS, **GPT_LIKE[prefix], **changes})


def gpt_like(prefix: str, head: str = "ForCausalLM", **changes: Any) -> Any:
    """One of `GPT_LIKE`, with random weights."""
    return build(getattr(transformers, prefix + head), gpt_like_config(prefix, **changes))


#: Encoders after BERT: the prefix of their classes, and what their config has beside BERT's.
BERT_LIKE: dict[str, dict[str, Any]] = {
    "Roberta": {"type_vocab_size": 2},
    "XLMRoberta": {"type_vocab_size": 1},
    "Camembert": {"type_vocab_size": 1},
    "Electra": {"embedding_size": 32},
    "DistilBert": {},
    # Four layers with the weights of two.
    "Albert": {"embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2, "type_vocab_size": 2},
    "MPNet": {"attn_implementation": "eager"},  # it has no other
}
#: What DistilBERT calls the options of the others.
_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
#: Their token of padding. Of RoBERTa and its kin positions count from it.
PAD = 1


def bert_like_config(prefix: str, **changes: Any) -> Any:
    options = {**SIZES, "pad_token_id": PAD, **BERT_LIKE[prefix], **changes}
    if prefix == "DistilBert":
        options = {_DISTILBERT.get(name, name): value for name, value in options.items()}
    return getattr(transformers, prefix + "Config")(**options)


def bert_like(prefix: str, head: str = "Model", **changes: Any) -> Any:
    """One of `BERT_LIKE`, with random weights."""
    return build(getattr(transformers, prefix + head), bert_like_config(prefix, **changes))


_ENCODER_LAYERS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
}
_IMAGES = {**_ENCODER_LAYERS, "image_size": 12, "patch_size": 4}
_TEXTS = {
    **_ENCODER_LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": VOCABULARY - 1,
}
#: Encoders with norms before their halves, and DeBERTa v2: the prefix of their classes, the head, the config.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ForImageClassification", _IMAGES),
    "DeiT": ("ForImageClassification", _IMAGES),
    "CLIP": ("Model", {"text_config": _TEXTS, "vision_config": _IMAGES, "projection_dim": 32}),
    "Siglip": ("Model", {"text_config": _TEXTS, "vision_config": _IMAGES}),
    "ModernBert": (
        "ForMaskedLM",
        {
            **_TEXTS,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "local_attention": 8,
        },
    ),
    "DebertaV2": (
        "ForMaskedLM",
        {
            **{name: value for name, value in SIZES.items() if name != "attn_implementation"},
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
}


def encoder_config(prefix: str, **changes: Any) -> Any:
    """The changes of a model with two encoders are those of both."""
    _, options = ENCODERS[prefix]
    if "text_config" in options:
        parts = {name: {**options[name], **changes} for name in ("text_config", "vision_config")}
        options, changes = {**options, **parts}, {}
    return getattr(transformers, prefix + "Config")(**{**options, **changes})


def encoder(prefix: str, head: str = "", **changes: Any) -> Any:
    """One of `ENCODERS`, with random weights."""
    return build(
        getattr(transformers, prefix + (head or ENCODERS[prefix][0])), encoder_config(prefix, **changes)
    )


_BART: dict[str, Any] = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "decoder_start_token_id": 2,
}
_T5: dict[str, Any] = {
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 3,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,  # few and near, so that sequences of tests meet them all
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}

#: Encoder-decoders: the prefix of their classes, and the sizes by their names.
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5": _T5,
    "MT5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "UMT5": {**_T5, "feed_forward_proj": "gated-gelu"},
    "Bart": _BART,
    "MBart": {**_BART, "scale_embedding": True},
    "Marian": {**_BART, "decoder_vocab_size": VOCABULARY, "activation_function": "swish"},
    "Pegasus": {**_BART, "activation_function": "relu"},
    "M2M100": {**_BART, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    "Whisper": {
        **_BART,
        "num_mel_bins": 6,
        "max_source_positions": 17,
        "max_target_positions": 64,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}


def seq2seq_config(prefix: str, **changes: Any) -> Any:
    return getattr(transformers, prefix + "Config")(**{**_TOKENS, **SEQ2SEQ[prefix], **changes})


def seq2seq(prefix: str, head: str = "ForConditionalGeneration", **changes: Any) -> Any:
    """One of `SEQ2SEQ`, with random weights."""
    head = "MTModel" if (prefix, head) == ("Marian", "ForConditionalGeneration") else head
    return build(getattr(transformers, prefix + head), seq2seq_config(prefix, **changes))


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(**{**SIZES, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    options = {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_implementation": "sdpa",
        **changes,
    }
    return GPT2Config(**options)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every part matters: fresh models have zero biases and unit norms."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def build(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return randomize(cls(config)).eval()


def token_ids(batch: int = 3, length: int = 17) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def right_padding(batch: int = 3, length: int = 17) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 6 :] = 0
    mask[-1, 4:] = 0
    return mask


def holes(batch: int = 3, length: int = 17) -> Tensor:
    """Padding behind the texts, and within them."""
    mask = right_padding(batch, length)
    mask[:, 2] = 0
    return mask


def left_padding(batch: int = 3, length: int = 17) -> Tensor:
    return right_padding(batch, length).flip(1)


Padding = Callable[[int, int], Tensor]
PADDINGS: dict[str, Padding] = {"right": right_padding, "left": left_padding}

# ------------------------------------------------------------------------------------------------------------
# what models read: functions of the config, of a padding or None, and of how many


def tokens(config: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    """Padding is the token that a tokenizer puts there: RoBERTa counts positions by it."""
    ids = token_ids(batch)
    if padding is None:
        return {"input_ids": ids}
    mask, text = padding(*ids.shape), getattr(config, "text_config", config)
    return {"input_ids": ids.masked_fill(mask == 0, text.pad_token_id or 0), "attention_mask": mask}


def images(config: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    vision = getattr(config, "vision_config", config)
    return {"pixel_values": torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size)}


def images_and_tokens(config: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    return {**tokens(config, padding, batch), **images(config, batch=batch)}


def tokens_to_tokens(config: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    """For an encoder, and a shorter sequence for its decoder, padded likewise."""
    return {**tokens(config, padding, batch), **_decoder_tokens(padding, batch)}


def audio_to_tokens(config: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    """Log-mel features of the one length that Whisper's encoder takes; padded is its decoder's sequence."""
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, **_decoder_tokens(padding, batch)}


def _decoder_tokens(padding: Padding | None, batch: int) -> dict[str, Tensor]:
    ids = token_ids(batch, 9)
    mask = {} if padding is None else {"decoder_attention_mask": padding(*ids.shape)}
    return {"decoder_input_ids": ids, **mask}


def inputs_of(model: Any, padding: Padding | None = None, batch: int = 3) -> dict[str, Tensor]:
    """Random inputs for any model of a family, as the family's row of `TINY` has it."""
    modules = (cls.__module__.split(".") for cls in type(model).__mro__)
    family = next(parts[2] for parts in modules if parts[:2] == ["transformers", "models"])
    return TINY[family].reads(model.config, padding, batch)


def without_dropout(config: Any) -> Any:
    """The config with every dropout at 0, those of configs in it too."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


@dataclass(frozen=True)
class Tiny:
    """The small model that stands for a family.

    architecture: its class in transformers.
    config: makes its config.
    reads: one of the functions above.
    alone: with padding the reference is each sequence by itself, because a query at padding may see no key,
        for which eager in float64 gives NaN: decoders, and windows.
    lacks: checks that do not concern it, with the reason.
    """

    architecture: str
    config: Callable[..., Any]
    reads: Callable[..., dict[str, Tensor]] = tokens
    alone: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)

    def model(self, **changes: Any) -> Any:
        """With seeded random weights and no dropout, as transformers makes it, in evaluation mode."""
        config = without_dropout(self.config(**changes))
        return build(getattr(transformers, self.architecture), config)


_FAMILIES = {
    "XLMRoberta": "xlm_roberta",
    "GptOss": "gpt_oss",
    "Qwen3Moe": "qwen3_moe",
    "GPTNeoX": "gpt_neox",
    "GPTNeo": "gpt_neo",
    "DebertaV2": "deberta_v2",
    "M2M100": "m2m_100",
}


def family_of(prefix: str) -> str:
    """The name of the family, for the prefix of its classes."""
    return _FAMILIES.get(prefix, prefix.lower())


def _rows(prefixes: Iterable[str], config: Callable[..., Any], head: str, **options: Any) -> dict[str, Tiny]:
    """A row for each model that a prefix of classes names."""
    return {family_of(prefix): Tiny(prefix + head, partial(config, prefix), **options) for prefix in prefixes}


_UNPADDED = dict.fromkeys(("padding right", "padding left"), "images have no padding")
_CAUSAL_TEXT = {
    "padding left": "its text is causal: eager in float64 has NaN where the first queries see no key"
}

#: By the name of the family, which is that of transformers' module.
TINY: dict[str, Tiny] = {
    "bert": Tiny("BertForMaskedLM", bert_config),
    **_rows(BERT_LIKE, bert_like_config, "ForMaskedLM"),
    **_rows(["ViT", "DeiT"], encoder_config, "ForImageClassification", reads=images, lacks=_UNPADDED),
    **_rows(["CLIP"], encoder_config, "Model", reads=images_and_tokens, lacks=_CAUSAL_TEXT),
    **_rows(["Siglip"], encoder_config, "Model", reads=images_and_tokens),
    **_rows(["ModernBert"], encoder_config, "ForMaskedLM", alone=True),
    **_rows(["DebertaV2"], encoder_config, "ForMaskedLM"),
    **_rows(
        [prefix for prefix in SEQ2SEQ if prefix not in ("Marian", "Whisper")],
        seq2seq_config,
        "ForConditionalGeneration",
        reads=tokens_to_tokens,
    ),
    **_rows(["Marian"], seq2seq_config, "MTModel", reads=tokens_to_tokens),
    **_rows(["Whisper"], seq2seq_config, "ForConditionalGeneration", reads=audio_to_tokens),
    "gpt2": Tiny("GPT2LMHeadModel", gpt2_config, alone=True),
    **_rows(GPT_LIKE, gpt_like_config, "ForCausalLM", alone=True),
    **_rows(DECODERS, decoder_config, "ForCausalLM", alone=True),
}
