"""Decoders of Llama's kind: logits, heads, gradients, tokens of patched models against eager, and
what is left alone.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoder_checks import (
    Doubled,
    check_autocast,
    check_compiled,
    check_compiled_decoding,
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
    logits_of,
)

import bigmodel_kernels as bk
from bigmodel_kernels.models.checks import GENERATION
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    eager_of,
    float64_of,
    runs,
)
from bigmodel_kernels.models.tiny import (
    DECODERS,
    build,
    decoder,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks, whole_layer

#: Those whose layers differ most from each other, for what takes long.
DIFFERENT = ["Llama", "Qwen2", "Gemma2", "Gemma3", "Phi3", "GptOss"]
#: The experts of each that has some: their loss has a part of its own.
EXPERTS = {"Mixtral": "MixtralSparseMoeBlock", "Qwen3Moe": "Qwen3MoeSparseMoeBlock", "GptOss": "GptOssMLP"}
#: Heads beside the language model's, and their labels.
HEADS: dict[str, dict[str, Any]] = {
    "Model": {},
    "ForSequenceClassification": {"labels": (3,)},
    "ForTokenClassification": {"labels": (3, 17)},
    "ForQuestionAnswering": {"start_positions": (3,), "end_positions": (3,)},
}


def without_window(prefix: str) -> dict[str, Any]:
    """A window that leaves every padded query a key: in float64, eager gives NaN for one that has none."""
    return {"sliding_window": 32} if "sliding_window" in DECODERS[prefix] else {}


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@crossed("use_cache", [True, False], DECODERS, DIFFERENT)
def test_padded_batches(prefix: str, padding: Any, use_cache: bool) -> None:
    check_padded_batch(decoder(prefix), padding, use_cache=use_cache)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [(p, h) for p in DECODERS for h in HEADS if h == "Model" or hasattr(transformers, p + h)],
)
def test_every_head(prefix: str, head: str) -> None:
    labels = {name: torch.randint(0, 2, shape) for name, shape in HEADS[head].items()}
    model = decoder(prefix, head, num_labels=2, **without_window(prefix))
    if head == "ForSequenceClassification" and not hasattr(model, "score"):
        pytest.skip("no head of its own")
    outputs = runs(model, input_ids=token_ids(), attention_mask=right_padding(), **labels, use_cache=False)
    assert_all_near(outputs, right_padding().bool())


@pytest.mark.parametrize(
    ("prefix", "changes"),
    [
        ("Llama", {"num_key_value_heads": 1}),
        ("Llama", {"num_key_value_heads": 4}),
        ("Llama", {"head_dim": 20}),
        ("Llama", {"head_dim": 2}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("Llama", {"hidden_act": "relu"}),
        ("Llama", {"rms_norm_eps": 0.1}),
        ("Llama", {"num_hidden_layers": 1, "intermediate_size": 7}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 500.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "Llama",
            {
                "max_position_embeddings": 12,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
            },
        ),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
        ("Mistral", {"sliding_window": 1}),
        ("Mistral", {"sliding_window": 17}),
        ("Mistral", {"sliding_window": 100}),
        ("Qwen2", {"use_sliding_window": False, "layer_types": None}),
        ("Qwen2", {"layer_types": ["sliding_attention", "sliding_attention"]}),
        ("Qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        ("Gemma", {"hidden_activation": "gelu"}),
        ("Gemma2", {"attn_logit_softcapping": None}),
        ("Gemma2", {"attn_logit_softcapping": 0.7, "final_logit_softcapping": None}),
        ("Gemma2", {"layer_types": ["full_attention", "full_attention"], "attention_bias": True}),
        ("Gemma3", {"layer_types": ["sliding_attention", "sliding_attention"]}),
        ("Gemma3", {"final_logit_softcapping": 3.0}),
        ("Gemma3", {"num_key_value_heads": 1, "attention_bias": True}),
        (
            "Gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                }
            },
        ),
        ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None, "head_dim": 16}),
        ("Phi3", {"num_key_value_heads": 4, "hidden_act": "relu6"}),
        ("Olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
        ("Granite", {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 1.0}),
        ("GptOss", {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": False}),
    ],
)
def test_configs(prefix: str, changes: dict[str, Any]) -> None:
    model = decoder(prefix, **changes)
    outputs = runs(model, input_ids=token_ids(), use_cache=False)
    assert not [row for row in bk.explain(model).left_alone if row.name.endswith(("self_attn", ".0", ".1"))]
    assert_all_near(logits_of(outputs))


@pytest.mark.parametrize("prefix", DECODERS)
def test_all_layers_run_fused(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    run = blocks.gated_layer
    monkeypatch.setattr(blocks, "gated_layer", lambda x, *args: calls.append(x.shape[1]) or run(x, *args))
    model = decoder(prefix)
    report = bk.patch(model)
    assert {row.module for row in report.left_alone} <= {
        "Embedding",
        f"{prefix}TextScaledWordEmbedding",
        EXPERTS.get(prefix, ""),
    }
    model.generate(token_ids(), attention_mask=left_padding(), max_new_tokens=3, do_sample=False)
    assert calls == [17, 17, 1, 1, 1, 1]


@crossed("kind", GENERATION, DECODERS, DIFFERENT)
def test_generate(prefix: str, kind: str) -> None:
    check_generation(decoder(prefix), kind, (False, True), length=9, new=7)


@pytest.mark.parametrize("made_from", ["nothing", "config", "static"])
@pytest.mark.parametrize("prefix", [*DIFFERENT, "Mistral"])
def test_several_tokens_after_a_cache(prefix: str, made_from: str) -> None:
    check_in_parts(decoder(prefix), made_from, (7, 10, 16, 17))


@pytest.mark.parametrize("prefix", DECODERS)
def test_hidden_states_and_attentions(prefix: str) -> None:
    for attentions in (False, True):
        check_states_and_attentions(decoder(prefix, **without_window(prefix)), attentions)


@pytest.mark.parametrize("prefix", ["Llama", "Gemma2"])
def test_a_mask_of_the_users_own(prefix: str) -> None:
    visible = (torch.rand(3, 1, 17, 17) > 0.5).tril() | torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = decoder(prefix)
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        expected = (
            eager(ids, attention_mask=additive)[0],
            reference(ids, attention_mask=additive.double())[0],
        )
        for mask in (visible, additive):
            assert_as_near(model(ids, attention_mask=mask)[0], *expected)


def test_packed_sequences_by_their_positions() -> None:
    model = decoder("Mistral")
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    outputs = runs(model, input_ids=token_ids(1), position_ids=positions, use_cache=False)
    assert_all_near(outputs)


@crossed("dtype", [torch.bfloat16, torch.float16], DECODERS, DIFFERENT)
def test_half_precision(prefix: str, dtype: torch.dtype) -> None:
    check_padded_batch(decoder(prefix).to(dtype), right_padding)


@pytest.mark.parametrize("prefix", DECODERS)
def test_autocast(prefix: str) -> None:
    check_autocast(decoder(prefix))


@crossed("recompute", [False, True], DECODERS, DIFFERENT)
def test_gradients(prefix: str, recompute: bool) -> None:
    check_gradients(decoder(prefix), recompute=recompute)


@pytest.mark.parametrize("prefix", DIFFERENT)
def test_gradients_under_autocast(prefix: str) -> None:
    check_gradients_under_autocast(decoder(prefix))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", DIFFERENT)
def test_gradient_checkpointing(prefix: str, reentrant: bool) -> None:
    check_gradient_checkpointing(decoder(prefix), reentrant)


def test_dropout() -> None:
    """The same at the same seed, other at another, and the mean is what is there without it."""
    model = decoder("Phi3", resid_pdrop=0.3, attention_dropout=0.2, sliding_window=None).train()
    bk.patch(model)
    ids, made = token_ids(1, 5), []
    with torch.no_grad():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(model.model(ids, use_cache=False).last_hidden_state)
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
        layer = model.model.layers[0]
        layer.mlp.down_proj.weight.zero_()  # what is dropped before it is not the mean after it
        positions = model.model.rotary_emb(made[0], torch.arange(5)[None])
        x = torch.randn(400, 5, 48)[:1].expand(400, -1, -1).contiguous()
        mean = layer(x, position_embeddings=positions).mean(0)
        expected = layer.eval()(x[:1], position_embeddings=positions)[0]
    assert (mean - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize(
    ("prefix", "padded"),
    [
        ("Llama", False),
        ("Qwen2", True),
        ("Gemma2", False),
        ("Gemma3", True),
        ("Phi3", True),
        ("GptOss", True),
    ],
)
def test_compile_fullgraph(prefix: str, padded: bool) -> None:
    check_compiled(decoder(prefix), padded)


def test_compile_fullgraph_of_decoding_with_a_static_cache() -> None:
    check_compiled_decoding(decoder("Gemma3"))


# ------------------------------------------------------------------------------------------------------------
# patching


@pytest.mark.parametrize("prefix", DECODERS)
def test_unpatching_pickle_deepcopy_and_saving(prefix: str, tmp_path: Path) -> None:
    check_unpatching_pickle_deepcopy_and_saving(decoder(prefix), tmp_path)


@pytest.mark.parametrize("prefix", DECODERS)
def test_a_family_names_only_its_own_classes(prefix: str) -> None:
    decoder(prefix)
    name = {"GptOss": "gpt_oss", "Qwen3Moe": "qwen3_moe"}.get(prefix, prefix.lower())
    check_names_of_family(prefix, name)


def reasons_of(report: Any) -> dict[str, str]:
    return {row.name: row.reason for row in report.left_alone}


class HalvedMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def change_mlp(model: Any) -> None:
    model.model.layers[0].mlp.__class__ = HalvedMLP


def change_projection(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.__class__ = Doubled


def hook_a_projection(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: out * 2)


def hook_attention(model: Any) -> None:
    model.model.layers[0].self_attn.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))


def hook_a_norm(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda m, args, out: out * 2)


def replace_the_forward_of_a_norm(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda x: x * norm.weight  # as the kernels of transformers' hub do


def replace_the_forward_of_an_activation(model: Any) -> None:
    activation = model.model.layers[1].mlp.act_fn
    activation.forward = lambda x: x


def hook_a_layer(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))


CHANGES: list[tuple[Any, str, str]] = [
    (change_mlp, "model.layers.0.mlp", "subclass"),
    (change_projection, "model.layers.1.self_attn", "k_proj"),
    (hook_a_projection, "model.layers.0.self_attn", "hook"),
    (hook_attention, "model.layers.0.self_attn", "hook"),
    (hook_a_norm, "model.layers.0.post_attention_layernorm", "hook"),
    (replace_the_forward_of_a_norm, "model.layers.1.input_layernorm", "forward is replaced"),
    (replace_the_forward_of_an_activation, "model.layers.1.mlp", "forward is replaced"),
    (hook_a_layer, "model.layers.1", "hook"),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("change", "name", "reason"), CHANGES)
def test_what_is_not_as_known_is_heard(change: Any, name: str, reason: str, after: bool) -> None:
    """Before patching it is left alone, with the reason; after it, calls go by its own code."""
    model = decoder("Llama")
    if not after:
        change(model)
    reference = copy.deepcopy(model)
    report = bk.patch(model)
    if after:
        change(model)
        change(reference)
    else:
        assert reason in reasons_of(report)[name]
        assert len(report.patched) > 6
    ids, mask = token_ids(), left_padding()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, reference)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("after", [False, True])
def test_lora(after: bool) -> None:
    torch.manual_seed(1)
    check_lora(decoder("Llama"), ["q_proj", "v_proj", "down_proj"], after, "q_proj, v_proj: LoRA")


def test_heads_above_256_keep_their_own_code() -> None:
    model = decoder("Llama", head_dim=264, num_attention_heads=2, num_key_value_heads=1)
    reasons = reasons_of(bk.explain(model))
    assert "head size 264" in reasons["model.layers.0.self_attn"]
    assert "head size 264" in reasons["model.layers.0"]
    assert_all_near(logits_of(runs(model, input_ids=token_ids(), use_cache=False)))


def test_an_activation_without_a_kernel() -> None:
    model = decoder("Llama", hidden_act="tanh")
    reasons = reasons_of(bk.explain(model))
    assert "activation" in reasons["model.layers.0.mlp"] and "model.layers.0" not in reasons
    assert_all_near(logits_of(runs(model, input_ids=token_ids(), use_cache=False)))


def test_norms_in_float32_in_a_bfloat16_model() -> None:
    """As GPT-OSS is loaded."""
    model = decoder("GptOss").bfloat16()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        assert_as_near(*(m(ids).logits for m in (model, eager, reference)))


def test_tied_weights_stay_tied() -> None:
    model = decoder("Gemma2")
    bk.patch(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = token_ids(1, 4)
    with torch.no_grad():
        before = model(ids).logits
        model.model.embed_tokens.weight.mul_(2)
        assert not torch.equal(before, model(ids).logits)


@pytest.mark.parametrize("prefix", ["Llama", "Gemma2", "GptOss"])
def test_the_attention_of_the_ecosystem(prefix: str) -> None:
    """attn_implementation="bigmodel", with softcap and sinks."""
    model = decoder(prefix)
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.transformers.register()
    model.set_attn_implementation("bigmodel")
    with torch.no_grad():
        assert_as_near(*(m(ids).logits for m in (model, eager, reference)))


def test_a_windowed_mask_that_was_copied_on_the_way() -> None:
    """Its window rides along as an attribute; without it the layer's own counts."""
    model = decoder("Mistral")
    reference = float64_of(model)
    bk.patch(model)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"].clone()}),
            with_kwargs=True,
        )
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.double(), reference(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Llava", "Gemma3"])
def test_within_a_model_that_sees_images(kind: str) -> None:
    """Its masks come from around the text model."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 16, "patch_size": 8}
    if kind == "Llava":
        text = decoder("Llama").config
        vision = transformers.CLIPVisionConfig(**sizes)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    else:
        text = decoder("Gemma3").config
        vision = transformers.SiglipVisionConfig(**sizes)
        tokens = {
            "mm_tokens_per_image": 4,
            "image_token_index": 7,
            "boi_token_index": 8,
            "eoi_token_index": 9,
        }
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = build(getattr(transformers, f"{kind}ForConditionalGeneration"), config)
    eager, reference = eager_of(model), copy.deepcopy(model).double()
    report = bk.patch(model)
    assert sum(row.module.endswith("DecoderLayer") for row in report.patched) == 2
    ids, pixels = token_ids(1).clamp(min=10), torch.randn(1, 3, 16, 16)
    ids[0, 3:7] = 7
    kinds = {"token_type_ids": (ids == 7).long()} if kind == "Gemma3" else {}
    with torch.no_grad():
        outputs = [m(input_ids=ids, pixel_values=pixels, **kinds).logits for m in (model, eager)]
        assert_as_near(*outputs, reference(input_ids=ids, pixel_values=pixels.double(), **kinds).logits)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pixel_values": pixels, **kinds}
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
