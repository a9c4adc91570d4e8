"""Tiny models with random weights, the float64 reference of each, and the rule that a patched model must
meet.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import BertConfig, GPT2Config

import bigmodel_kernels as bk

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


def decoder(prefix: str, head: str = "ForCausalLM", **changes: Any) -> Any:
    """One of `DECODERS`, with random weights."""
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
    head = "TextModel" if (prefix, head) == ("Gemma3", "Model") else head
    return build(getattr(transformers, prefix + head), config(**options))


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
}


def gpt_like(prefix: str, head: str = "ForCausalLM", **changes: Any) -> Any:
    """One of `GPT_LIKE`, with random weights."""
    config = getattr(transformers, prefix + "Config")(**{**_TOKENS, **GPT_LIKE[prefix], **changes})
    return build(getattr(transformers, prefix + head), config)


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


def seq2seq(prefix: str, head: str = "ForConditionalGeneration", **changes: Any) -> Any:
    """One of `SEQ2SEQ`, with random weights."""
    config = getattr(transformers, prefix + "Config")(**{**_TOKENS, **SEQ2SEQ[prefix], **changes})
    head = "MTModel" if (prefix, head) == ("Marian", "ForConditionalGeneration") else head
    return build(getattr(transformers, prefix + head), config)


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


def token_ids(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def right_padding(batch: int = 3, length: int = 17) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 6 :] = 0
    mask[-1, 4:] = 0
    return mask


def left_padding(batch: int = 3, length: int = 17) -> torch.Tensor:
    return right_padding(batch, length).flip(1)


def inputs_of(model: Any, padding: Any = None, batch: int = 3) -> dict[str, torch.Tensor]:
    """Random inputs of a language model, with a mask by `right_padding` or `left_padding`; an encoder-decoder
    gets a shorter sequence for its decoder, padded likewise.
    """
    inputs = {"input_ids": token_ids(batch)}
    if model.main_input_name == "input_features":
        encoder = model.model.encoder
        inputs = {
            "input_features": torch.randn(batch, encoder.num_mel_bins, 2 * encoder.max_source_positions)
        }
    elif padding is not None:
        inputs["attention_mask"] = padding(batch)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(batch, 9)
        if padding is not None:
            inputs["decoder_attention_mask"] = padding(batch, 9)
    return inputs


def real_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which of the positions that have logits are no padding."""
    part = "decoder_" if "decoder_input_ids" in inputs else ""
    mask = inputs.get(f"{part}attention_mask")
    return torch.ones_like(inputs[f"{part}input_ids"]).bool() if mask is None else mask.bool()


def call(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """The output of a model for inputs in its own type."""
    cast = {
        k: v.to(model.dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()
    }
    return model(**cast, **options)


def float64_of(model: Any) -> Any:
    """The same model in float64 with eager attention: the definition of right."""
    reference = copy.deepcopy(model).double()
    reference.set_attn_implementation("eager")
    for module in reference.modules():
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False  # it refuses float64, where it has no meaning
    return reference.eval()


def tensors_of(output: Any) -> dict[str, torch.Tensor]:
    """All floating tensors of a model output, by name; tuples by position."""
    found: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                if isinstance(part, torch.Tensor):
                    found[f"{name}.{i}"] = part
    return found


def assert_as_near(
    out: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,
    where: torch.Tensor | None = None,
    name: str = "",
) -> None:
    """`out` is as near to the float64 `reference` as `eager` is, in the maximum and in the mean."""
    assert out.shape == eager.shape, f"{name}: {tuple(out.shape)} is not {tuple(eager.shape)}"
    assert out.dtype == eager.dtype, name
    if where is not None:
        out, eager, reference = out[where], eager[where], reference[where]
    out64, eager64, reference = out.detach().double(), eager.detach().double(), reference.detach().double()
    assert torch.isfinite(out64).all(), f"{name}: not finite"
    rounded = reference.to(out.dtype)
    rounding = 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().double()
    got, allowed = (out64 - reference).abs(), (eager64 - reference).abs()
    few = got.numel() < 1000
    if few:  # the error of a few numbers, a loss among them, is a matter of luck: some ulps are allowed
        rounding = torch.maximum(rounding, 8 * torch.finfo(out.dtype).eps * reference.abs().max())
    assert got.max() <= 2 * allowed.max() + rounding, (
        f"{name}: {got.max():.3e} against {allowed.max():.3e} of eager"
    )
    assert few or got.mean() <= 1.2 * allowed.mean() + rounding / 4, (
        f"{name}: {got.mean():.3e}, {allowed.mean():.3e}"
    )


def eager_of(model: Any) -> Any:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager


def runs(model: Any, **inputs: Any) -> list[dict[str, torch.Tensor]]:
    """Outputs of the patched model, of eager and of eager in float64; the model stays patched."""
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    with torch.no_grad():
        return [tensors_of(call(m, inputs)) for m in (model, eager, reference)]


def assert_all_near(outputs: list[dict[str, torch.Tensor]], tokens: torch.Tensor | None = None) -> None:
    assert outputs[0].keys() == outputs[1].keys()
    for name in outputs[0]:
        per_token = tokens is not None and outputs[0][name].shape[:2] == tokens.shape
        assert_as_near(*(out[name] for out in outputs), where=tokens if per_token else None, name=name)


def gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return gradients_for(model, {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})})


def gradients_for(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call(model, inputs).logits[real_of(inputs)].double().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(ours: Any, eager: Any, reference: Any, computed_in: torch.dtype | None = None) -> None:
    """The numerics rule for gradients. `computed_in` is the type that autocast computes in, if it does."""
    assert ours.keys() == eager.keys()
    # Some gradients are zero but for rounding (that of a key's bias): what counts is the size of the others.
    rounding = 1e-7 * max(gradient.abs().max() for gradient in reference.values())
    for name, gradient in ours.items():
        assert gradient.dtype == eager[name].dtype, name
        error = (gradient.double() - reference[name]).abs()
        allowed = (eager[name].double() - reference[name]).abs()
        few, slack = error.numel() < 1000, rounding
        if few:  # as in assert_as_near
            eps = torch.finfo(computed_in or gradient.dtype).eps
            slack = torch.maximum(rounding, 8 * eps * reference[name].abs().max())
        assert error.max() <= 3 * allowed.max() + slack, (
            f"{name}: {error.max():.2e}, eager {allowed.max():.2e}"
        )
        assert few or error.mean() <= 1.5 * allowed.mean() + rounding, name


def without_padding(reference: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of real tokens, each sequence on its own: in float64, eager masks with finfo.min give NaN."""
    logits = []
    for row, real in zip(ids, mask.bool(), strict=True):
        # OPT makes positions of its own from the mask.
        positions = {} if "OPT" in type(reference).__name__ else {"position_ids": real.nonzero().T}
        logits.append(reference(row[real][None], use_cache=False, **positions).logits[0])
    return torch.cat(logits)
