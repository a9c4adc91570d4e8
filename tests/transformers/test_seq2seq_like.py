"""Encoder-decoders: logits, heads, gradients and tokens of patched models, and what is left alone."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_checks import (
    Doubled,
    before,
    check_autocast,
    check_compiled,
    check_dropout,
    check_generation,
    check_gradient_checkpointing,
    check_gradients,
    check_gradients_under_autocast,
    check_lora,
    check_names_of_family,
    check_padded_batch,
    check_unpatching_pickle_deepcopy_and_saving,
    crossed,
    logits_of,
    name_of_cache,
)
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import bigmodel_kernels as bk
from bigmodel_kernels.models.checks import GENERATION
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    call,
    eager_of,
    float64_of,
    gradients_of,
    real_of,
    runs,
)
from bigmodel_kernels.models.tiny import (
    SEQ2SEQ,
    inputs_of,
    left_padding,
    right_padding,
    seq2seq,
    token_ids,
)
from bigmodel_kernels.transformers import blocks

T5_LIKE = ("T5", "MT5", "UMT5")
BART_LIKE = tuple(prefix for prefix in SEQ2SEQ if prefix not in T5_LIKE)
#: One of each form and order; the others differ from these in names.
KINDS = ("T5", "UMT5", "Bart", "Whisper")


def layer_of(model: Any, part: str = "decoder", index: int = 0) -> Any:
    stack = getattr(getattr(model, "model", model), part)
    return (stack.block if hasattr(stack, "block") else stack.layers)[index]


def home_of(prefix: str, name: str, index: int = 0) -> str:
    """The name in the model of a part of a decoder's layer."""
    layer = f"decoder.block.{index}" if prefix in T5_LIKE else f"model.decoder.layers.{index}"
    return f"{layer}.{name}" if name else layer


#: Parts of a decoder's layer.
SELF = {p: "layer.0.SelfAttention" if p in T5_LIKE else "self_attn" for p in SEQ2SEQ}
CROSS = {p: "layer.1.EncDecAttention" if p in T5_LIKE else "encoder_attn" for p in SEQ2SEQ}
QUERY = {p: "q" if p in T5_LIKE else "q_proj" for p in SEQ2SEQ}
KEY = {p: "k" if p in T5_LIKE else "k_proj" for p in SEQ2SEQ}
NORM = {p: "layer.1.layer_norm" if p in T5_LIKE else "encoder_attn_layer_norm" for p in SEQ2SEQ}
FIRST = {p: "layer.2.DenseReluDense.wi_1" if p in T5_LIKE else "fc1" for p in SEQ2SEQ}
FIRST["T5"] = "layer.2.DenseReluDense.wi"


# ------------------------------------------------------------------------------------------------------------
# results


@pytest.mark.parametrize("padding", [None, left_padding, right_padding])
@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_logits(prefix: str, padding: Any) -> None:
    check_padded_batch(seq2seq(prefix), padding)


#: Models whose layers have other parts.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("T5", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    ("T5", {"num_decoder_layers": 3, "scale_decoder_outputs": False, "d_kv": 10}),
    ("UMT5", {"feed_forward_proj": "relu"}),
    ("Bart", {"activation_function": "gelu_new", "encoder_layers": 1, "scale_embedding": True}),
    ("Bart", {"decoder_attention_heads": 2, "decoder_ffn_dim": 40}),
    ("Whisper", {"activation_function": "relu", "decoder_layers": 1}),
]


@pytest.mark.parametrize(("prefix", "changes"), VARIANTS)
def test_configs(prefix: str, changes: dict[str, Any]) -> None:
    model = seq2seq(prefix, **changes)
    report = bk.explain(model)
    assert {row.module for row in report.left_alone} <= KEPT
    check_padded_batch(model, right_padding)


#: Classes that stay as they are in every model.
KEPT = {
    "Embedding",
    "Conv1d",
    "M2M100ScaledWordEmbedding",
    *(
        f"{p}{name}"
        for p in ("Bart", "MBart")
        for name in ("ScaledWordEmbedding", "LearnedPositionalEmbedding")
    ),
    "MarianSinusoidalPositionalEmbedding",
    "PegasusSinusoidalPositionalEmbedding",
    "WhisperPositionalEmbedding",
}

HEADS: list[tuple[str, str, dict[str, Any]]] = [
    ("T5", "Model", {}),
    ("T5", "EncoderModel", {}),
    ("T5", "ForTokenClassification", {"labels": (3, 17)}),
    ("T5", "ForSequenceClassification", {"labels": (3,)}),
    ("UMT5", "ForQuestionAnswering", {"start_positions": (3,), "end_positions": (3,)}),
    ("Bart", "Model", {}),
    ("Bart", "ForConditionalGeneration", {"labels": (3, 9)}),
    ("Bart", "ForCausalLM", {"labels": (3, 17)}),
    ("Bart", "ForQuestionAnswering", {"start_positions": (3,), "end_positions": (3,)}),
    ("MBart", "ForSequenceClassification", {"labels": (3,)}),
    ("Whisper", "ForConditionalGeneration", {"labels": (3, 9)}),
    ("Whisper", "ForAudioClassification", {"labels": (3,)}),
]


@pytest.mark.parametrize(("prefix", "head", "labels"), HEADS)
def test_heads(prefix: str, head: str, labels: dict[str, tuple[int, ...]]) -> None:
    model = seq2seq(prefix, head, num_labels=2)
    inputs: dict[str, torch.Tensor] = {"input_ids": token_ids(), "attention_mask": right_padding()}
    if prefix == "Whisper":
        inputs = {"input_features": torch.randn(3, 6, 34)}
    if head in ("Model", "ForConditionalGeneration"):
        inputs["decoder_input_ids"] = token_ids(3, 9)
    if head == "ForSequenceClassification":
        inputs["input_ids"][:, 3] = 2  # its pooler looks for the end of the sentence
    inputs |= {name: torch.randint(0, 2, shape) for name, shape in labels.items()}
    if head == "ForTokenClassification":
        inputs["labels"][inputs["attention_mask"] == 0] = -100
    outputs = runs(model, **inputs)
    rows = {
        "EncoderModel": "last_hidden_state",
        "ForTokenClassification": "logits",
        "ForCausalLM": None,
        "ForAudioClassification": None,
    }.get(head, "encoder_last_hidden_state")
    if rows is not None and prefix != "Whisper":  # packed, with zeros at padding
        states = [out.pop(rows) for out in outputs]
        assert_as_near(*states, where=inputs["attention_mask"].bool())
    assert_all_near(outputs)


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_all_layers_run_fused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of decoding has 3 halves in each of 2 layers, and the encoder runs once."""
    calls: list[tuple[str, int]] = []
    for half in ("attention_half", "feed_forward_half"):
        run = getattr(blocks, half)
        monkeypatch.setattr(
            blocks, half, lambda x, *a, run=run, half=half: calls.append((half, x.shape[1])) or run(x, *a)
        )
    model = seq2seq(prefix)
    report = bk.patch(model)
    assert {row.module for row in report.left_alone} <= KEPT
    inputs = inputs_of(model, left_padding)
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    encoder = [("attention_half", 17), ("feed_forward_half", 17)] * 2
    step = [("attention_half", 1), ("attention_half", 1), ("feed_forward_half", 1)] * 2
    assert calls == encoder + step * 3


@crossed("kind", GENERATION, SEQ2SEQ, KINDS)
def test_generate(prefix: str, kind: str) -> None:
    if (prefix, kind) == ("Whisper", "prompt lookup") and before("5.18"):
        pytest.skip("Whisper's own generate fails with it before transformers 5.18")
    check_generation(seq2seq(prefix), kind, (False, True), length=9, new=7)


@pytest.mark.parametrize("prefix", KINDS)
def test_encoder_outputs_that_are_given(prefix: str) -> None:
    model = seq2seq(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    inputs = inputs_of(model, left_padding)
    states = torch.randn(3, 17, 48)
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "input_features")}
    with torch.no_grad():
        outputs = [
            call(m, given, encoder_outputs=BaseModelOutput(last_hidden_state=states.to(m.dtype))).logits
            for m in (model, eager, reference)
        ]
    assert_as_near(*outputs, where=real_of(inputs))


@crossed("made", ["dynamic", "static"], SEQ2SEQ, KINDS)
def test_several_tokens_after_a_cache(prefix: str, made: str) -> None:
    model = seq2seq(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    inputs, outputs = inputs_of(model), []
    ids = inputs.pop("decoder_input_ids")
    for network in (model, eager):
        cache, parts = cache_for(network, made), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            given = {**inputs, "decoder_input_ids": ids[:, start:stop], name_of_cache(network): cache}
            with torch.no_grad():
                parts.append(network(**given, use_cache=True).logits)
        outputs.append(torch.cat(parts, dim=1))
        assert all(cache.is_updated.values())
    with torch.no_grad():
        assert_as_near(*outputs, call(reference, {**inputs, "decoder_input_ids": ids}).logits)


def cache_for(model: Any, made: str) -> EncoderDecoderCache:
    if made == "dynamic":
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    config = getattr(model, "model", model).decoder.config
    return EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=12), StaticCache(config=config, max_cache_len=17)
    )


@crossed("attentions", [True, False], SEQ2SEQ, KINDS)
def test_hidden_states_and_attentions(prefix: str, attentions: bool) -> None:
    model = seq2seq(prefix)
    options = {"output_hidden_states": True, "output_attentions": attentions, "use_cache": False}
    outputs = runs(model, **inputs_of(model, right_padding), **options)
    names = {"encoder_hidden_states.2", "decoder_hidden_states.2"}
    assert names <= outputs[0].keys()
    asked = {"encoder_attentions.1", "decoder_attentions.1", "cross_attentions.1"}
    assert asked & outputs[0].keys() == (asked if attentions else set())
    assert_all_near(outputs)


def test_maps_of_cross_attention() -> None:
    model = seq2seq("T5")
    bk.patch(model)
    maps = bk.attention_maps(model, probabilities=True, **inputs_of(model, right_padding))
    assert [layer.kind for layer in maps] == ["self"] * 2 + ["self", "cross"] * 2
    cross = maps.layers[3]
    assert cross.probabilities is not None and cross.probabilities.shape == (3, 3, 9, 17)
    assert (cross.probabilities[-1, :, :, 4:] == 0).all()


@crossed("dtype", [torch.bfloat16, torch.float16], SEQ2SEQ, KINDS)
def test_half_precision(prefix: str, dtype: torch.dtype) -> None:
    check_padded_batch(seq2seq(prefix).to(dtype), right_padding)


@pytest.mark.parametrize("prefix", T5_LIKE)
def test_half_precision_with_wo_in_float32(prefix: str, tmp_path: Path) -> None:
    """As transformers loads it; sums are then in float32."""
    model = seq2seq(prefix)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float16).eval()
    assert model.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float16
    eager, reference, inputs = eager_of(model), float64_of(model), inputs_of(model, right_padding)
    bk.patch(model)
    with torch.no_grad():
        outputs = [m(**inputs, output_hidden_states=True) for m in (model, eager, reference)]
    assert (
        outputs[0].decoder_hidden_states[1].dtype
        == outputs[1].decoder_hidden_states[1].dtype
        == torch.float32
    )
    assert_as_near(*(out.logits for out in outputs), where=real_of(inputs))


@pytest.mark.parametrize("prefix", BART_LIKE)
def test_half_precision_that_overflows(prefix: str) -> None:
    """An encoder's layer is kept finite, as by its own code."""
    model = seq2seq(prefix).half()
    layer, states = layer_of(model, "encoder"), torch.randn(1, 3, 48).half()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        if prefix in ("Bart", "Marian"):  # the norm behind overflows
            layer.self_attn_layer_norm.weight.fill_(1)
            layer.final_layer_norm.weight.fill_(6e4)
        else:  # the sum
            layer.fc2.bias.fill_(6e4)
            states = states.sign() * 6e4
        expected = layer(states, None)
        bk.patch(model)
        assert type(layer).__name__.startswith("Bigmodel")
        out = layer(states, None)
    assert torch.isfinite(expected).all() and expected.max() == torch.finfo(torch.float16).max - 1000
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_autocast(prefix: str) -> None:
    check_autocast(seq2seq(prefix))


# ------------------------------------------------------------------------------------------------------------
# gradients


@crossed("recompute", [False, True], SEQ2SEQ, KINDS)
def test_gradients(prefix: str, recompute: bool) -> None:
    check_gradients(seq2seq(prefix), recompute=recompute)


@pytest.mark.parametrize("prefix", KINDS)
def test_gradients_of_padded_batches(prefix: str) -> None:
    model = seq2seq(prefix).train()
    models = (model, eager_of(model), float64_of(model).train())
    bk.patch(model)
    inputs = inputs_of(model, left_padding)
    assert_gradients(*(gradients_of(m, inputs) for m in models))


@pytest.mark.parametrize("prefix", KINDS)
def test_gradients_under_autocast(prefix: str) -> None:
    check_gradients_under_autocast(seq2seq(prefix))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", KINDS)
def test_gradient_checkpointing(prefix: str, reentrant: bool) -> None:
    check_gradient_checkpointing(seq2seq(prefix), reentrant)


def dropping(prefix: str) -> Any:
    """A model that drops everywhere, in the hidden layer of the feed-forward too."""
    rates = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.25}
    return seq2seq(prefix, **({"dropout_rate": 0.2} if prefix in T5_LIKE else rates))


@crossed("part", ["decoder", "encoder"], SEQ2SEQ, ("T5", "Bart"))
def test_dropout(prefix: str, part: str) -> None:
    check_dropout(dropping(prefix), lambda m: layer_of(m, part))


@pytest.mark.parametrize("prefix", ["T5", "MT5", "Bart"])
def test_hidden_layers_with_dropout_that_are_made_again(prefix: str) -> None:
    """The same gradients, and nothing of the hidden layer's size is kept."""
    model = dropping(prefix).train()
    inputs, made, kept = inputs_of(model), [], []
    for recompute in (False, True):
        bk.unpatch(model)
        bk.patch(model, recompute=recompute)
        widths: list[int] = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, widths=widths: widths.append((1, *t.shape)[-1]) or t, lambda t: t
        ):
            made.append(gradients_of(model, inputs))
        kept.append(widths.count(72))
    assert all(torch.equal(made[0][name], gradient) for name, gradient in made[1].items())
    assert kept[0] > 0 and kept[1] == 0


@pytest.mark.parametrize("name", ["self", "cross"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("prefix", KINDS)
def test_lora(prefix: str, after: bool, name: str) -> None:
    torch.manual_seed(1)
    targets = [QUERY[prefix], FIRST[prefix].split(".")[-1]] if name == "self" else [KEY[prefix]]
    check_lora(seq2seq(prefix), targets, after, f"{targets[0]}: LoRA")


# ------------------------------------------------------------------------------------------------------------
# compiled


@crossed("padded", [True, False], KINDS, ("UMT5",))
def test_compile_fullgraph(prefix: str, padded: bool) -> None:
    check_compiled(seq2seq(prefix), padded)


@pytest.mark.parametrize("prefix", KINDS)
def test_compiled_decoding(prefix: str) -> None:
    """Over static caches, that of the encoder's keys filled by the first call."""
    model = seq2seq(prefix)
    eager = eager_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs, outputs = inputs_of(model), []
    ids = inputs.pop("decoder_input_ids")
    for network, decode in ((model, compiled), (eager, eager)):
        cache, parts, name = cache_for(network, "static"), [], name_of_cache(network)
        with torch.no_grad():
            network(**inputs, decoder_input_ids=ids[:, :4], use_cache=True, **{name: cache})
            encoded = network.get_encoder()(next(iter(inputs.values())))
            for step in range(4, 7):
                given = {
                    "encoder_outputs": encoded,
                    "decoder_input_ids": ids[:, step : step + 1],
                    name: cache,
                }
                parts.append(decode(**given, use_cache=True).logits)
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# patching


@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_unpatching_pickle_deepcopy_and_saving(prefix: str, tmp_path: Path) -> None:
    check_unpatching_pickle_deepcopy_and_saving(seq2seq(prefix), tmp_path)


@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_a_family_names_only_its_own_classes(prefix: str) -> None:
    seq2seq(prefix)
    check_names_of_family(prefix, "m2m_100" if prefix == "M2M100" else prefix.lower())


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_masks_are_small(prefix: str) -> None:
    """Two dimensions for a causal mask, one row for that of the encoder's keys."""
    model, seen = seq2seq(prefix), []
    bk.patch(model)
    run = blocks.call

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "attention":
            seen.append((args[3] is not None, None if args[4] is None else tuple(args[4].shape)))
        return run(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(blocks, "call", watched)
        model(**inputs_of(model, left_padding))
    masked = prefix != "Whisper"
    heads = 3 if prefix in T5_LIKE else 4
    encoder, causal = ((1, heads, 17, 17), (1, heads, 9, 9)) if prefix in T5_LIKE else (None, None)
    assert seen == [(masked, encoder)] * 2 + [(True, causal), (masked, None)] * 2


def change_query(layer: Any, prefix: str) -> str:
    layer.get_submodule(f"{SELF[prefix]}.{QUERY[prefix]}").__class__ = Doubled
    return SELF[prefix]


def change_key_of_cross(layer: Any, prefix: str) -> str:
    layer.get_submodule(f"{CROSS[prefix]}.{KEY[prefix]}").__class__ = Doubled
    return CROSS[prefix]


def change_first(layer: Any, prefix: str) -> str:
    layer.get_submodule(FIRST[prefix]).__class__ = Doubled
    return FIRST[prefix].rpartition(".")[0]


def hook_first(layer: Any, prefix: str) -> str:
    layer.get_submodule(FIRST[prefix]).register_forward_hook(lambda m, args, out: out * 2)
    return FIRST[prefix].rpartition(".")[0]


def hook_cross(layer: Any, prefix: str) -> str:
    layer.get_submodule(CROSS[prefix]).register_forward_hook(lambda m, args, out: (out[0] * 2, *out[1:]))
    return CROSS[prefix]


def hook_a_norm(layer: Any, prefix: str) -> str:
    layer.get_submodule(NORM[prefix]).register_forward_hook(lambda m, args, out: out * 2)
    return NORM[prefix] if prefix in T5_LIKE else ""


def subclass_attention(layer: Any, prefix: str) -> str:
    attention = layer.get_submodule(SELF[prefix])
    cls = type(attention)
    forward = cls.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return (out[0] / 2, *out[1:])

    attention.__class__ = type("Halved", (cls,), {"forward": halved})
    return SELF[prefix]


CHANGES = [
    change_query,
    change_key_of_cross,
    change_first,
    hook_first,
    hook_cross,
    hook_a_norm,
    subclass_attention,
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prefix", KINDS)
def test_what_is_not_as_known_is_heard(prefix: str, change: Any, after: bool) -> None:
    """Before patching it is left alone, with the reason; after it, calls go by its own code."""
    model = seq2seq(prefix)
    reference = copy.deepcopy(model)
    name = change(layer_of(reference), prefix)
    if not after:
        change(layer_of(model), prefix)
    report = bk.patch(model)
    if after:
        change(layer_of(model), prefix)
    elif change is not hook_a_norm or prefix in T5_LIKE:
        assert [row for row in report.left_alone if row.name == home_of(prefix, name) and row.reason]
        assert len(report.patched) >= 8
    inputs = inputs_of(model, left_padding)
    with torch.no_grad():
        outputs = [m(**inputs).logits[real_of(inputs)] for m in (model, reference)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["T5", "Bart"])
def test_heads_above_256_keep_their_own_code(prefix: str) -> None:
    sizes = {"d_kv": 264}
    if prefix == "Bart":
        sizes = {"d_model": 528, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    model = seq2seq(prefix, **sizes)
    reasons = {row.name: row.reason for row in bk.explain(model).left_alone}
    for name in (
        SELF[prefix],
        CROSS[prefix],
        *((SELF[prefix].rpartition(".")[0],) if prefix == "T5" else ("",)),
    ):
        assert "head size 264" in reasons[home_of(prefix, name)]
    assert_all_near(logits_of(runs(model, **inputs_of(model))))


@pytest.mark.parametrize("prefix", ["T5", "Bart"])
def test_a_cache_that_is_not_known(prefix: str) -> None:
    """Its own code then runs."""

    class Counted(DynamicCache):
        pass

    model = seq2seq(prefix)
    eager = eager_of(model)
    bk.patch(model)
    inputs, outputs = inputs_of(model, left_padding), []
    for network in (model, eager):
        cache = EncoderDecoderCache(Counted(), Counted())
        with torch.no_grad():
            outputs.append(network(**inputs, **{name_of_cache(network): cache}, use_cache=True).logits)
        assert cache.get_seq_length() == 9
    torch.testing.assert_close(*(out[real_of(inputs)] for out in outputs), atol=1e-5, rtol=1e-5)


def test_a_file_that_does_not_call_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seq2seq("Bart")
    home = importlib.import_module("transformers.models.bart.modeling_bart")
    monkeypatch.delattr(home, "ALL_ATTENTION_FUNCTIONS")
    report = bk.explain(model)
    reasons = {row.name: row.reason for row in report.left_alone}
    for name in (SELF["Bart"], CROSS["Bart"], ""):
        assert "without the attention interface" in reasons[home_of("Bart", name)]
    assert not [row for row in report.patched if row.module.startswith("Bart")]


@pytest.mark.parametrize("prefix", ["T5", "Whisper"])
def test_an_activation_without_a_kernel(prefix: str) -> None:
    name = "feed_forward_proj" if prefix == "T5" else "activation_function"
    model = seq2seq(prefix, **{name: "tanh"})
    home = home_of(prefix, FIRST[prefix].rpartition(".")[0])
    reasons = {row.name: row.reason for row in bk.explain(model).left_alone}
    assert "activation" in reasons[home] and "has no kernel" in reasons[home]
    assert_all_near(logits_of(runs(model, **inputs_of(model))))
