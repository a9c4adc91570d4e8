"""Decoders with LayerNorms, after GPT-2: logits, heads, gradients, tokens of patched models against eager,
and what is left alone.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoder_checks import (
    Doubled,
    check_autocast,
    check_compiled,
    check_dropout,
    check_generation,
    check_gradient_checkpointing,
    check_gradients,
    check_gradients_under_autocast,
    check_in_parts,
    check_lora,
    check_names_of_family,
    check_padded_batch,
    check_states_and_attentions,
    check_unpatching_pickle_deepcopy_and_saving,
    crossed,
    in_parts,
    logits_of,
)
from torch import nn
from transformers import DynamicCache

import bigmodel_kernels as bk
from bigmodel_kernels.models.checks import GENERATION
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    eager_of,
    float64_of,
    gradients,
    runs,
    without_padding,
)
from bigmodel_kernels.models.tiny import (
    GPT_LIKE,
    family_of,
    gpt_like,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks, whole_layer
from bigmodel_kernels.transformers import gpt_like as gpt_like_module

#: Where the layers of each, its attentions and its dropouts are.
#: One of each form; the others differ from these in names.
DIFFERENT = ("OPT", "GPTNeoX", "GPTJ", "GPTNeo", "Bloom")
LAYERS = {
    "OPT": "model.decoder.layers",
    "GPTNeoX": "gpt_neox.layers",
    "GPTJ": "transformer.h",
    "GPTNeo": "transformer.h",
    "Bloom": "transformer.h",
    "CodeGen": "transformer.h",
    "Phi": "model.layers",
    "Starcoder2": "model.layers",
    "StableLm": "model.layers",
    "Falcon": "transformer.h",
}
ATTENTION = {
    "OPT": "self_attn",
    "GPTNeoX": "attention",
    "GPTJ": "attn",
    "GPTNeo": "attn.attention",
    "Bloom": "self_attention",
    "CodeGen": "attn",
    "Phi": "self_attn",
    "Starcoder2": "self_attn",
    "StableLm": "self_attn",
    "Falcon": "self_attention",
}
MLP = {prefix: "" if prefix == "OPT" else "mlp" for prefix in GPT_LIKE}
PROJECTION = {
    "OPT": "q_proj",
    "GPTNeoX": "query_key_value",
    "GPTJ": "q_proj",
    "GPTNeo": "q_proj",
    "Bloom": "query_key_value",
    "CodeGen": "qkv_proj",
    "Phi": "q_proj",
    "Starcoder2": "q_proj",
    "StableLm": "q_proj",
    "Falcon": "query_key_value",
}
FIRST = {
    "OPT": "fc1",
    "GPTNeoX": "mlp.dense_h_to_4h",
    "GPTJ": "mlp.fc_in",
    "GPTNeo": "mlp.c_fc",
    "Bloom": "mlp.dense_h_to_4h",
    "CodeGen": "mlp.fc_in",
    "Phi": "mlp.fc1",
    "Starcoder2": "mlp.c_fc",
    "StableLm": "mlp.gate_proj",
    "Falcon": "mlp.dense_h_to_4h",
}
NORM = {
    "OPT": "self_attn_layer_norm",
    "GPTNeoX": "input_layernorm",
    "GPTJ": "ln_1",
    "GPTNeo": "ln_1",
    "Bloom": "input_layernorm",
    "CodeGen": "ln_1",
    "Phi": "input_layernorm",
    "Starcoder2": "input_layernorm",
    "StableLm": "input_layernorm",
    "Falcon": "ln_attn",
}
DROPOUT: dict[str, dict[str, float]] = {
    "OPT": {"dropout": 0.3, "attention_dropout": 0.2},
    "GPTNeoX": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
    "GPTJ": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
    "CodeGen": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
    "GPTNeo": {"resid_dropout": 0.3, "attention_dropout": 0.2},
    "Bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
    "Phi": {"resid_pdrop": 0.3, "attention_dropout": 0.2},
    "Starcoder2": {"residual_dropout": 0.3, "attention_dropout": 0.2},
    "StableLm": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
    "Falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.2},
}
#: Models whose layers are in another order, or have other parts.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    ("OPT", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("OPT", {"do_layer_norm_before": False, "layer_norm_elementwise_affine": False}),
    ("OPT", {"activation_function": "gelu"}),
    ("GPTNeoX", {"use_parallel_residual": False}),
    ("GPTNeoX", {"attention_bias": False, "hidden_act": "gelu_new"}),
    (
        "GPTNeoX",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "partial_rotary_factor": 1.0}},
    ),
    ("GPTNeo", {"attention_types": [[["local"], 2]], "window_size": 1}),
    ("GPTNeo", {"activation_function": "gelu", "tie_word_embeddings": False, "window_size": 40}),
    ("Bloom", {"apply_residual_connection_post_layernorm": True}),
    ("Bloom", {"n_head": 4, "tie_word_embeddings": False, "pretraining_tp": 2}),
    ("CodeGen", {"n_head": 6, "rotary_dim": 8, "tie_word_embeddings": True}),
    ("GPTJ", {"rotary_dim": 16, "tie_word_embeddings": True}),
    ("GPTJ", {"activation_function": "relu", "n_inner": None}),
    ("Phi", {"hidden_act": "gelu", "num_attention_heads": 4, "num_key_value_heads": 1}),
    ("Starcoder2", {"use_bias": False, "num_key_value_heads": 4, "sliding_window": None}),
    ("StableLm", {"use_parallel_residual": True, "use_qkv_bias": False, "hidden_act": "gelu"}),
    ("Falcon", {"num_ln_in_parallel_attn": 1, "bias": True}),
    ("Falcon", {"new_decoder_architecture": False}),
    (
        "Falcon",
        {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "num_kv_heads": 4},
    ),
]


def needs_fused_layers(prefix: str) -> None:
    """Skips a test where the installed transformers has the attention of a model left alone."""
    kin = importlib.import_module(f"bigmodel_kernels.transformers.families.{family_of(prefix)}").KIN
    if kin.interface and not gpt_like_module._calls_the_interface(kin):
        pytest.skip(f"{prefix} of transformers {transformers.__version__} calls no attention interface")


def layers_of(model: Any, prefix: str) -> Any:
    return model.get_submodule(LAYERS[prefix])


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@crossed("use_cache", [True, False], GPT_LIKE, DIFFERENT)
def test_padded_batches(prefix: str, padding: Any, use_cache: bool) -> None:
    model = gpt_like(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), padding()
    with torch.no_grad():
        out, expected = (
            m(ids, attention_mask=mask, use_cache=use_cache).logits[mask.bool()] for m in (model, eager)
        )
        assert_as_near(out, expected, without_padding(reference, ids, mask))


HEADS: dict[str, dict[str, Any]] = {
    "Model": {},
    "ForCausalLM": {"labels": (3, 17)},
    "ForSequenceClassification": {"labels": (3,)},
    "ForTokenClassification": {"labels": (3, 17)},
    "ForQuestionAnswering": {"start_positions": (3,), "end_positions": (3,)},
}


@pytest.mark.parametrize(
    ("prefix", "head"), [(p, h) for p in GPT_LIKE for h in HEADS if hasattr(transformers, p + h)]
)
def test_every_head(prefix: str, head: str) -> None:
    labels = {name: torch.randint(0, 2, shape) for name, shape in HEADS[head].items()}
    options = {} if head == "ForCausalLM" else {"num_labels": 2}
    outputs = runs(gpt_like(prefix, head, **options), input_ids=token_ids(), **labels, use_cache=False)
    assert_all_near(outputs)


@pytest.mark.parametrize(("prefix", "changes"), VARIANTS)
def test_configs(prefix: str, changes: dict[str, Any]) -> None:
    needs_fused_layers(prefix)
    model = gpt_like(prefix, **changes)
    eager, reference = eager_of(model), float64_of(model)
    report = bk.patch(model)
    assert not [row for row in report.left_alone if LAYERS[prefix] in row.name and "norm" not in row.name]
    ids, mask = token_ids(), left_padding()
    models = (model, eager, reference)
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in models[:2]]
        assert_as_near(*outputs, without_padding(reference, ids, mask))
    assert_gradients(*(gradients(m.train(), ids, None) for m in models))
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(m.eval().generate(ids, **options) for m in models[:2]))


@pytest.mark.parametrize("prefix", ["Phi", "StableLm"])
def test_norms_of_the_heads_are_left_alone(prefix: str) -> None:
    model = gpt_like(prefix, qk_layernorm=True)
    mask, ids = right_padding(), token_ids()
    eager, reference = eager_of(model), float64_of(model)
    report = bk.patch(model)
    assert any("qk_layernorm=True" in row.reason for row in report.left_alone)
    assert {row.module for row in report.patched} >= {prefix + "MLP", "LayerNorm"}
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, eager)]
        assert_as_near(*outputs, without_padding(reference, ids, mask))


@pytest.mark.parametrize("own_code", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_falcon_with_alibi(parallel: bool, own_code: bool) -> None:
    """Against sdpa: eager code of this model adds ALiBi twice."""
    options = {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "alibi": True}
    model = gpt_like("Falcon", parallel_attn=parallel, bias=True, attn_implementation="sdpa", **options)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model).double()
    report = bk.patch(model)
    assert {row.module for row in report.left_alone} == {"Embedding"}
    ids, mask = token_ids(), left_padding()
    hooks = [nn.modules.module.register_module_forward_hook(lambda *_: None)] if own_code else []
    try:
        with torch.no_grad():
            outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, plain, reference)]
            made = [
                m.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
                for m in (model, plain)
            ]
    finally:
        for hook in hooks:
            hook.remove()
    assert_as_near(*outputs)
    assert torch.equal(*made)


def test_falcon_of_two_alibis_is_left_alone() -> None:
    model = gpt_like("Falcon", alibi=True)
    reasons = {row.name: row.reason for row in bk.patch(model).left_alone}
    assert "adds ALiBi twice" in reasons["transformer.h.0.self_attention"]


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_all_layers_run_fused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_fused_layers(prefix)
    calls = []
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    run = blocks.decoder_layer
    monkeypatch.setattr(blocks, "decoder_layer", lambda x, *args: calls.append(x.shape[1]) or run(x, *args))
    model = gpt_like(prefix)
    report = bk.patch(model)
    assert {row.module for row in report.left_alone} <= {"Embedding", "OPTLearnedPositionalEmbedding"}
    model.generate(token_ids(), attention_mask=left_padding(), max_new_tokens=3, do_sample=False)
    assert calls == [17, 17, 1, 1, 1, 1]


@crossed("kind", GENERATION, GPT_LIKE, DIFFERENT)
def test_generate(prefix: str, kind: str) -> None:
    check_generation(gpt_like(prefix), kind, (False, True), length=9, new=7)


@pytest.mark.parametrize("made_from", ["nothing", "config", "static"])
@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_several_tokens_after_a_cache(prefix: str, made_from: str) -> None:
    if (prefix, made_from) == ("Bloom", "static"):
        pytest.skip("its own code wants a mask of all the cache, as generate makes it")
    check_in_parts(gpt_like(prefix), made_from, (7, 10, 16, 17))


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_hidden_states_and_attentions(prefix: str) -> None:
    for attentions in (False, True):
        # Eager in float64 has NaN at padding that sees nothing in its window.
        window = {"sliding_window": None} if prefix == "Starcoder2" else {}
        check_states_and_attentions(gpt_like(prefix, **window), attentions)


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_a_mask_of_the_users_own(prefix: str) -> None:
    if prefix in ("OPT", "Bloom"):
        pytest.skip("makes positions from a mask of two dimensions")
    visible = (torch.rand(3, 1, 17, 17) > 0.5).tril() | torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = gpt_like(prefix)
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        outputs = [m(ids, attention_mask=additive).logits for m in (model, eager)]
        assert_as_near(*outputs, reference(ids, attention_mask=additive.double()).logits)


@crossed("dtype", [torch.bfloat16, torch.float16], GPT_LIKE, DIFFERENT)
def test_half_precision(prefix: str, dtype: torch.dtype) -> None:
    check_padded_batch(gpt_like(prefix).to(dtype), right_padding)


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_autocast(prefix: str) -> None:
    check_autocast(gpt_like(prefix))


@crossed("recompute", [False, True], GPT_LIKE, DIFFERENT)
def test_gradients(prefix: str, recompute: bool) -> None:
    check_gradients(gpt_like(prefix), recompute=recompute)


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_gradients_under_autocast(prefix: str) -> None:
    check_gradients_under_autocast(gpt_like(prefix))


@crossed("reentrant", [False, True], GPT_LIKE, DIFFERENT)
def test_gradient_checkpointing(prefix: str, reentrant: bool) -> None:
    check_gradient_checkpointing(gpt_like(prefix), reentrant)


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_dropout(prefix: str) -> None:
    check_dropout(gpt_like(prefix, **DROPOUT[prefix]), lambda m: layers_of(m, prefix)[0])


@crossed("padded", [True, False], GPT_LIKE, DIFFERENT)
def test_compile_fullgraph(prefix: str, padded: bool) -> None:
    check_compiled(gpt_like(prefix), padded)


# ------------------------------------------------------------------------------------------------------------
# patching


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_unpatching_pickle_deepcopy_and_saving(prefix: str, tmp_path: Path) -> None:
    check_unpatching_pickle_deepcopy_and_saving(gpt_like(prefix), tmp_path)


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_a_family_names_only_its_own_classes(prefix: str) -> None:
    gpt_like(prefix)
    check_names_of_family(prefix, family_of(prefix))


def change_projection(layer: Any, prefix: str) -> str:
    layer.get_submodule(f"{ATTENTION[prefix]}.{PROJECTION[prefix]}").__class__ = Doubled
    return ATTENTION[prefix]


def change_first(layer: Any, prefix: str) -> str:
    layer.get_submodule(FIRST[prefix]).__class__ = Doubled
    return MLP[prefix]


def hook_first(layer: Any, prefix: str) -> str:
    layer.get_submodule(FIRST[prefix]).register_forward_hook(lambda m, args, out: out * 2)
    return MLP[prefix]


def hook_attention(layer: Any, prefix: str) -> str:
    layer.get_submodule(ATTENTION[prefix]).register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    return ATTENTION[prefix]


def hook_a_norm(layer: Any, prefix: str) -> str:
    layer.get_submodule(NORM[prefix]).register_forward_hook(lambda m, args, out: out * 2)
    return ""


def subclass_attention(layer: Any, prefix: str) -> str:
    attention = layer.get_submodule(ATTENTION[prefix])
    cls = type(attention)
    forward = cls.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return (out[0] / 2, *out[1:])

    attention.__class__ = type("Halved", (cls,), {"forward": halved})
    return ATTENTION[prefix]


CHANGES = [change_projection, change_first, hook_first, hook_attention, hook_a_norm, subclass_attention]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_what_is_not_as_known_is_heard(prefix: str, change: Any, after: bool) -> None:
    """Before patching it is left alone, with the reason; after it, calls go by its own code."""
    needs_fused_layers(prefix)
    model = gpt_like(prefix)
    reference = copy.deepcopy(model)
    name = change(layers_of(reference, prefix)[0], prefix)
    if not after:
        change(layers_of(model, prefix)[0], prefix)
    report = bk.patch(model)
    if after:
        change(layers_of(model, prefix)[0], prefix)
    elif change is not hook_a_norm:
        at = f"{LAYERS[prefix]}.0.{name}".rstrip(".")
        assert [row for row in report.left_alone if row.name == at and row.reason]
        assert len(report.patched) >= 4
    ids, mask = token_ids(), left_padding()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, reference)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_lora(prefix: str, after: bool) -> None:
    needs_fused_layers(prefix)
    torch.manual_seed(1)
    targets = [PROJECTION[prefix], FIRST[prefix].split(".")[-1]]
    check_lora(gpt_like(prefix), targets, after, f"{PROJECTION[prefix]}: LoRA")


@pytest.mark.parametrize("prefix", GPT_LIKE)
def test_heads_above_256_keep_their_own_code(prefix: str) -> None:
    needs_fused_layers(prefix)
    sizes = {"n_embd": 528, "n_head": 2} if prefix in ("GPTJ", "CodeGen") else {"hidden_size": 528}
    if prefix not in ("GPTJ", "CodeGen"):
        sizes |= {
            "num_heads" if prefix == "GPTNeo" else "n_head" if prefix == "Bloom" else "num_attention_heads": 2
        }
    model = gpt_like(prefix, **sizes)
    reasons = {row.name: row.reason for row in bk.explain(model).left_alone}
    assert "head size 264" in reasons[f"{LAYERS[prefix]}.0.{ATTENTION[prefix]}"]
    assert "head size 264" in reasons[f"{LAYERS[prefix]}.0"]
    assert_all_near(logits_of(runs(model, input_ids=token_ids(), use_cache=False)))


@pytest.mark.parametrize("prefix", ["GPTNeo", "Bloom"])
def test_a_cache_that_is_not_known(prefix: str) -> None:
    """Its own code then runs, and gets a dense mask."""

    class Counted(DynamicCache):
        pass

    model = gpt_like(prefix)
    eager = eager_of(model)
    bk.patch(model)
    ids, mask = token_ids(), left_padding()
    for given in (None, mask):
        outputs = [in_parts(m, ids, given, Counted(config=m.config), (7, 16, 17)) for m in (model, eager)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("prefix", ["GPTNeo", "Bloom"])
def test_masks_are_small_where_every_attention_is_patched(prefix: str, changed: bool) -> None:
    model, seen = gpt_like(prefix), []
    if changed:
        change_projection(layers_of(model, prefix)[1], prefix)
    bk.patch(model)
    for layer in layers_of(model, prefix):
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["attention_mask"].dim()), with_kwargs=True
        )
    with torch.no_grad():
        model(token_ids(), attention_mask=left_padding())
    assert seen == ([4, 4] if changed else [2, 2])


def test_bloom_that_asks_for_the_sums_of_tensor_parallel_training() -> None:
    model = gpt_like("Bloom", pretraining_tp=2, slow_but_exact=True)
    reasons = {row.name: row.reason for row in bk.explain(model).left_alone}
    for name in ("", ".mlp", ".self_attention"):
        assert "slow_but_exact" in reasons[f"transformer.h.0{name}"]


def test_a_file_that_does_not_call_the_interface_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions of transformers have it: attention is left alone, and so are its masks."""
    home = importlib.import_module("transformers.models.gptj.modeling_gptj")
    family = importlib.import_module("bigmodel_kernels.transformers.families.gptj")
    model, ids, mask = gpt_like("GPTJ"), token_ids(), left_padding()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with monkeypatch.context() as patched:
            patched.delattr(home, "ALL_ATTENTION_FUNCTIONS", raising=False)
            patched.setattr(family, "FAMILY", gpt_like_module.family("gptj", family.KIN))
            report = bk.patch(model)
        reasons = {row.name: row.reason for row in report.left_alone}
        assert "without the attention interface" in reasons["transformer.h.0.attn"]
        assert (
            model.transformer.config._attn_implementation == model.config._attn_implementation != "bigmodel"
        )
        out = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_bloom_decodes_over_a_static_cache_as_over_a_dynamic_one() -> None:
    """generate compiles the steps, whose masks are then dense and boolean; its own code adds its masks."""
    model = gpt_like("Bloom")
    eager, ids = eager_of(model), token_ids(3, 9)
    bk.patch(model)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = [
        network.generate(
            ids, **options, cache_implementation=kind, output_logits=True, return_dict_in_generate=True
        )
        for network, kind in ((model, "static"), (eager, "dynamic"))
    ]
    torch.testing.assert_close(*(torch.stack(m.logits) for m in made), atol=1e-4, rtol=1e-4)
