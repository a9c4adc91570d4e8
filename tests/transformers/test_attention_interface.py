"""`attn_implementation="bigmodel"` gives the eager result on models of every kind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

import bigmodel_kernels.transformers as bt
from bigmodel_kernels.models.rule import assert_as_near, tensors_of, without_padding
from bigmodel_kernels.models.tiny import (
    left_padding,
    randomize,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import attention_interface
from bigmodel_kernels.transformers.attention_interface import attention_forward, attention_mask

SMALL = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {**SMALL, **NO_SPECIAL, "intermediate_size": 48, "max_position_embeddings": 64}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 2}),
    "mistral-window": ("MistralForCausalLM", {**DECODER, "num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", {**DECODER, "num_key_value_heads": 2}),
    "gemma2-softcap-window": (
        "Gemma2ForCausalLM",
        {
            **DECODER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 8,
        },
    ),
    "opt": ("OPTForCausalLM", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        {**NO_SPECIAL, "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "bert-decoder": ("BertLMHeadModel", {**DECODER, "is_decoder": True}),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64}),
    "roberta": (
        "RobertaModel",
        {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1},
    ),
    "distilbert": (
        "DistilBertModel",
        {
            "vocab_size": 101,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "electra": (
        "ElectraModel",
        {**SMALL, "embedding_size": 32, "intermediate_size": 48, "max_position_embeddings": 64},
    ),
}


def make(name: str, options: dict[str, Any], implementation: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**options) if cls.config_class else cls.config(**options)
    model = cls._from_config(config, attn_implementation=implementation)
    return randomize(model).eval()


def pair(name: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The model with our attention, the eager one, and the eager one in float64; the same weights in all."""
    ours, eager, reference = (make(name, options, kind) for kind in ("bigmodel", "eager", "eager"))
    eager.load_state_dict(ours.state_dict())
    reference.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == "bigmodel"
    return ours, eager, reference.double()


def compare(ours: Any, eager: Any, reference: Any, where: torch.Tensor | None = None, **inputs: Any) -> None:
    with torch.no_grad():
        outputs = [tensors_of(model(**inputs)) for model in (ours, eager, reference)]
    name = next(k for k in ("logits", "last_hidden_state") if k in outputs[0])
    assert_as_near(*(out[name] for out in outputs), where=where, name=name)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_decoders_prefill(kind: str, padding: str) -> None:
    models = pair(*DECODERS[kind])
    ids = token_ids()
    if padding == "none":
        compare(*models, input_ids=ids)
        return
    mask = left_padding() if padding == "left" else right_padding()
    ours, eager, reference = models
    with torch.no_grad():
        a, b = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
        assert_as_near(a, b, without_padding(reference, ids, mask), name="logits")


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoders_generate(kind: str, cache: str) -> None:
    ours, eager, _ = pair(*DECODERS[kind])
    options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        options["cache_implementation"] = "static"
    for mask in (None, left_padding()):
        ids = token_ids()
        assert torch.equal(
            ours.generate(ids, attention_mask=mask, **options),
            eager.generate(ids, attention_mask=mask, **options),
        )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_made_ahead_and_passed_again(cache: str, padded: bool) -> None:
    """`generate` does so for static caches: a mask that goes through the function twice stays the same."""
    tokens = left_padding().bool() if padded else None
    config = make(*DECODERS["mistral-window"], "bigmodel").config
    for start, rows in ((0, 17), (0, 9), (9, 4), (9, 1)):
        kinds = {"dynamic": transformers.DynamicCache(config=config)}
        kinds["static"] = transformers.StaticCache(config=config, max_cache_len=20)
        held = kinds[cache]
        for layer in range(2):
            if start:
                held.update(torch.zeros(3, 2, start, 8), torch.zeros(3, 2, start, 8), layer)
        given = None if tokens is None else tokens[:, : start + rows]
        embeds = torch.zeros(3, rows, 32)
        for make_mask in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
            once = make_mask(config, embeds, given, held)
            twice = make_mask(config, embeds, None if once is None else once.clone(), held)
            assert (once is None) == (twice is None)
            if once is not None:
                assert torch.equal(once, twice)
                name = attention_interface._WINDOW
                assert getattr(once, name, None) == getattr(twice, name, None)


@pytest.mark.parametrize("kind", ["llama-gqa", "mistral-window", "gemma2-softcap-window", "gpt2"])
def test_chunked_prefill_with_a_cache(kind: str) -> None:
    """Several new tokens against a cache: the last query sees the last key."""
    ours, eager, _ = pair(*DECODERS[kind])
    ids, mask = token_ids(3, 17), left_padding(3, 17)
    results = []
    for model in (ours, eager):
        with torch.no_grad():
            first = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
            cache = {k: v for k, v in first.items() if k in ("cache", "past_key_values")}
            logits = model(ids[:, 9:], attention_mask=mask, use_cache=True, **cache).logits
            results.append(logits[mask[:, 9:].bool()])
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


def test_a_prefill_longer_than_what_a_static_cache_holds_yet() -> None:
    """No mask and more keys than queries: sdpa's causal is top-left there."""
    ours, eager, _ = pair(*DECODERS["llama-gqa"])
    ids = token_ids(2, 9)
    results = []
    for model in (ours, eager):
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        with torch.no_grad():
            name = "cache" if "cache" in model.forward.__wrapped__.__code__.co_varnames else "past_key_values"
            one = model(ids, use_cache=True, **{name: cache}).logits
            two = model(ids[:, :3], use_cache=True, **{name: cache}).logits
            results.append(torch.cat([one, two], dim=1))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_encoders(kind: str, padding: str) -> None:
    models = pair(*ENCODERS[kind])
    ids = token_ids()
    if padding == "none":
        compare(*models, input_ids=ids)
    else:
        # Padded queries see the real keys, so all rows are those of eager.
        compare(
            *models, input_ids=ids, attention_mask=right_padding() if padding == "right" else left_padding()
        )


def test_vit() -> None:
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
    }
    compare(*pair("ViTModel", options), pixel_values=torch.randn(2, 3, 16, 16))


def test_t5_position_bias_scale_one_and_cross_attention() -> None:
    options = {
        **NO_SPECIAL,
        "vocab_size": 101,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    ours, eager, reference = pair("T5ForConditionalGeneration", options)
    ids, target = token_ids(), token_ids(3, 7)
    for mask in (None, right_padding()):
        compare(ours, eager, reference, input_ids=ids, attention_mask=mask, decoder_input_ids=target)
        made = [
            m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (ours, eager)
        ]
        assert torch.equal(*made)


def test_bart_cross_attention() -> None:
    options = {
        **NO_SPECIAL,
        "vocab_size": 101,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    }
    models = pair("BartForConditionalGeneration", options)
    for mask in (None, right_padding()):
        compare(*models, input_ids=token_ids(), attention_mask=mask, decoder_input_ids=token_ids(3, 7))


@pytest.mark.parametrize("kind", ["bert", "llama-gqa"])
@pytest.mark.parametrize("form", ["bool", "additive", "per-query", "per-head"])
def test_a_mask_of_the_users_own(kind: str, form: str) -> None:
    models = pair(*{**ENCODERS, **DECODERS}[kind])
    ids = token_ids(2, 11)
    visible = torch.rand(2, 4 if form == "per-head" else 1, 11, 11) > 0.4
    visible |= torch.eye(11, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager_mask = additive
    ours_mask = visible if form in ("bool", "per-head") else additive
    with torch.no_grad():
        out = models[0](input_ids=ids, attention_mask=ours_mask)[0]
        eager = models[1](input_ids=ids, attention_mask=eager_mask)[0]
        reference = models[2](input_ids=ids, attention_mask=eager_mask.double())[0]
    assert_as_near(out, eager, reference)


def test_packed_sequences_by_position_ids() -> None:
    """transformers reads restarts of position_ids as several sequences in a row."""
    models = pair(*DECODERS["llama-gqa"])
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    compare(*models, input_ids=token_ids(1, 14), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("kind", ["bert", "llama-gqa", "gpt2"])
def test_output_attentions(kind: str) -> None:
    ours, eager, reference = pair(*{**ENCODERS, **DECODERS}[kind])
    # A padded query of a decoder sees nothing: zeros here, even shares in eager.
    ids, mask = token_ids(), right_padding()
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "output_attentions": True,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        outputs = [tensors_of(model(**inputs)) for model in (ours, eager, reference)]
    assert outputs[0].keys() == outputs[1].keys()
    assert sum(name.startswith("attentions.") for name in outputs[0]) == 2
    for name in outputs[0]:
        assert_as_near(*(out[name] for out in outputs), name=name)


def test_gradients() -> None:
    for kind in ("bert", "mistral-window", "gemma2-softcap-window"):
        models = pair(*{**ENCODERS, **DECODERS}[kind])
        # A padded query of a decoder with a window sees nothing, which eager in float64 turns into NaN.
        ids, mask = token_ids(), right_padding() if kind == "bert" else None
        gradients = []
        for model in models:
            out = model(input_ids=ids, attention_mask=mask)[0]
            (out if mask is None else out[mask.bool()]).double().square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            eager, reference = gradients[1][name].double(), gradients[2][name]
            error, allowed = (gradient.double() - reference).abs().max(), (eager - reference).abs().max()
            assert error <= 3 * allowed + 1e-7 * (1 + reference.abs().max()), (
                f"{kind} {name}: {error} {allowed}"
            )


def test_dropout_while_training() -> None:
    """Probabilities are dropped in the operator: other numbers than eager's, the same expectation."""
    ours, _, _ = pair(*ENCODERS["bert"])
    ours.train()
    ids = token_ids()
    torch.manual_seed(1)
    first = ours(ids)[0]
    torch.manual_seed(1)
    assert torch.equal(first, ours(ids)[0])
    assert not torch.equal(first, ours(ids)[0])
    first.sum().backward()

    class Module(nn.Module):
        is_causal = False

    module = Module().train()
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    total = sum(attention_forward(module, query, key, value, None, dropout=0.3)[0] for _ in range(600)) / 600
    exact, _ = attention_forward(module.eval(), query, key, value, None, dropout=0.3)
    assert (total - exact).abs().max() < 0.15
    out, weights = attention_forward(
        module.train(), query, key, value, None, dropout=0.3, output_attentions=True
    )
    assert weights is not None and (weights == 0).any()
    torch.testing.assert_close(out, (weights @ value).transpose(1, 2))


def test_autocast_and_half_precision() -> None:
    ours, eager, _ = pair(*DECODERS["llama-gqa"])
    ids, mask = token_ids(), left_padding()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        a, b = ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits
    assert a.dtype == b.dtype
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=0.15, rtol=0.1)
    for dtype in (torch.bfloat16, torch.float16):
        models = pair(*ENCODERS["bert"])
        compare(
            models[0].to(dtype), models[1].to(dtype), models[2], input_ids=ids, attention_mask=right_padding()
        )


@pytest.mark.parametrize("kind", ["bert", "llama-gqa"])
def test_compile_fullgraph(kind: str) -> None:
    ours, eager, _ = pair(*{**ENCODERS, **DECODERS}[kind])
    ids, mask = token_ids(), right_padding()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    options = {} if kind == "bert" else {"use_cache": False}
    with torch.no_grad():
        a = compiled(input_ids=ids, attention_mask=mask, **options)[0]
        b = eager(input_ids=ids, attention_mask=mask, **options)[0]
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# the functions themselves


class Causal(nn.Module):
    is_causal = True


class Full(nn.Module):
    is_causal = False


def sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *args, **kwargs)[0]


@pytest.mark.parametrize("module", [Causal, Full])
@pytest.mark.parametrize("rows, keys", [(5, 5), (1, 5), (5, 9), (5, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_no_mask_means_what_it_means_to_sdpa(module: Any, rows: int, keys: int, biased: bool) -> None:
    query, key, value = torch.randn(2, 4, rows, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 8)
    bias = torch.randn(1, 4, rows, keys) if biased else None
    ours = attention_forward(module(), query, key, value, None, position_bias=bias)[0]
    torch.testing.assert_close(
        ours, sdpa(module(), query, key, value, None, position_bias=bias), atol=1e-5, rtol=1e-5
    )


def test_is_causal_of_the_call_goes_before_that_of_the_module() -> None:
    query, key, value = (torch.randn(1, 2, 4, 8) for _ in range(3))
    ours = attention_forward(Causal(), query, key, value, None, is_causal=False)[0]
    torch.testing.assert_close(ours, sdpa(Full(), query, key, value, None), atol=1e-5, rtol=1e-5)


def test_value_heads_of_another_size_run_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 12)
    attention_interface._logged.clear()
    ours = attention_forward(Causal(), query, key, value, None)[0]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(ours, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert "value heads of 12" in caplog.text


@pytest.mark.parametrize("head_dim", [8, 260])
def test_sinks(head_dim: int) -> None:
    """One more logit of each head, without a value; the weights that are returned add up to less than 1."""
    query, key, value = (torch.randn(2, heads, 5, head_dim) for heads in (4, 2, 2))
    sinks = torch.randn(4)
    out, weights = attention_forward(
        Causal(), query, key, value, None, s_aux=sinks, scaling=0.3, output_attentions=True
    )
    logits = torch.matmul(query, key.repeat_interleave(2, dim=1).transpose(2, 3)) * 0.3
    logits = logits.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
    logits = torch.cat([logits, sinks[None, :, None, None].expand(2, 4, 5, 1)], dim=-1)
    expected = logits.softmax(-1)[..., :-1]
    assert weights is not None
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(
        out.transpose(1, 2), expected @ value.repeat_interleave(2, dim=1), atol=1e-5, rtol=1e-5
    )


def test_what_is_refused() -> None:
    query = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="sliding window"):
        attention_forward(Causal(), query, query, query, torch.ones(1, 1, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask is a str"):
        attention_forward(Causal(), query, query, query, "causal")  # type: ignore[arg-type]
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    for mask in (torch.ones(1, 4, 4, dtype=torch.bool), torch.ones(1, 1, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, ., 4\) and dtype"):
            attention_mask(**sizes, attention_mask=mask)


def test_masks_stay_small() -> None:
    padded = torch.ones(2, 8, dtype=torch.bool)
    padded[0, 5:] = False
    sizes = {"batch_size": 2, "q_length": 8, "kv_length": 8}
    bidirectional = {
        "mask_function": masking_utils.bidirectional_mask_function,
        "allow_is_bidirectional_skip": True,
    }
    window = masking_utils.sliding_window_causal_mask_function(3)
    assert attention_mask(**sizes) is None
    assert attention_mask(**sizes, attention_mask=torch.ones(2, 8, dtype=torch.bool)) is None
    assert attention_mask(**sizes, attention_mask=padded).shape == (2, 8)
    assert attention_mask(**sizes, attention_mask=padded, **bidirectional).shape == (2, 1, 1, 8)
    assert attention_mask(**sizes, mask_function=window, attention_mask=padded).shape == (2, 1, 8)
    assert attention_mask(**sizes, mask_function=window).shape == (2, 1, 8)
    assert attention_mask(**sizes, attention_mask=padded, allow_is_causal_skip=False).shape == (2, 1, 8, 8)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    assert attention_mask(**sizes, mask_function=chunked, attention_mask=padded).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("q_offset", [0, 3, torch.tensor(3)])
@pytest.mark.parametrize("window", [None, 2, 4, 50])
@pytest.mark.parametrize("keys", [5, 8, 12])
def test_a_small_mask_says_what_the_dense_one_says(q_offset: Any, window: int | None, keys: int) -> None:
    """Our mask and attention against sdpa's mask and attention, over caches of every fill."""
    rows = 5
    keys += int(q_offset)
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    query, key, value = torch.randn(2, 4, rows, 8), torch.randn(2, 4, keys, 8), torch.randn(2, 4, keys, 8)
    for length in (int(q_offset) + rows, keys):
        padding = torch.ones(2, length, dtype=torch.bool)
        padding[0, :2] = False
        for mask in (None, padding):
            options = {
                "batch_size": 2,
                "q_length": rows,
                "kv_length": keys,
                "q_offset": q_offset,
                "mask_function": function,
                "attention_mask": mask,
            }
            dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
            seen = dense.any(-1)[
                :, 0
            ]  # a query that sees nothing is zero here and NaN or even shares elsewhere
            ours = attention_forward(Causal(), query, key, value, attention_mask(**options))[0]
            expected = sdpa(Causal(), query, key, value, dense)
            torch.testing.assert_close(ours[seen], expected[seen], atol=1e-5, rtol=1e-5)
            assert (ours[~seen] == 0).all()


def test_models_that_compute_attention_themselves_are_refused() -> None:
    model = make("MPNetModel", {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64}, "eager")
    model.config._attn_implementation = "bigmodel"
    if not hasattr(sys.modules["transformers.models.mpnet.modeling_mpnet"], "create_bidirectional_mask"):
        pytest.skip("this version of mpnet does not ask for a mask either")
    with pytest.raises(ValueError, match="MPNetConfig"):
        model(token_ids(), attention_mask=right_padding())


@pytest.mark.parametrize(
    "imports",
    [
        "import bigmodel_kernels; assert 'transformers' not in sys.modules; import transformers",
        "import transformers; import bigmodel_kernels",
        "from transformers import BertModel; import bigmodel_kernels",
        "import transformers.modeling_utils; from bigmodel_kernels import transformers as b; b.register()",
    ],
)
def test_registered_in_whatever_order_things_are_imported(imports: str) -> None:
    code = f"""
import sys
{imports}
from transformers import AutoModel, BertConfig
size = {{"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}}
config = BertConfig(**size, intermediate_size=8)
assert AutoModel.from_config(config, attn_implementation="bigmodel").config._attn_implementation == "bigmodel"
assert not any("bigmodel" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names_of_the_layer() -> None:
    assert all(callable(getattr(bt, name)) for name in bt.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bt.nonsense
