"""Decoders of Llama's kind: logits, heads, gradients, tokens of patched models against eager, and
what is left alone.
"""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import (
    DECODERS,
    assert_all_near,
    assert_as_near,
    assert_gradients,
    build,
    decoder,
    eager_of,
    float64_of,
    gradients,
    left_padding,
    right_padding,
    runs,
    token_ids,
    without_padding,
)
from torch import nn
from transformers import DynamicCache, StaticCache

import bigmodel_kernels as bk
from bigmodel_kernels.transformers import blocks

#: Those whose layers differ most from each other, for what takes long.
DIFFERENT = ["Llama", "Qwen2", "Gemma2", "Gemma3", "Phi3", "GptOss"]
#: The experts of each that has some: their loss has a part of its own.
EXPERTS = {"Mixtral": "MixtralSparseMoeBlock", "Qwen3Moe": "Qwen3MoeSparseMoeBlock", "GptOss": "GptOssMLP"}
FUSES_ITS_LOSS = [prefix for prefix in DECODERS if prefix not in EXPERTS]
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


def logits_of(outputs: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{"logits": out["logits"]} for out in outputs]


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prefix", DECODERS)
def test_padded_batches(prefix: str, padding: Any, use_cache: bool) -> None:
    model = decoder(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), padding()
    with torch.no_grad():
        out, expected = (
            m(ids, attention_mask=mask, use_cache=use_cache).logits[mask.bool()] for m in (model, eager)
        )
        assert_as_near(out, expected, without_padding(reference, ids, mask))


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


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("kind", GENERATION)
@pytest.mark.parametrize("prefix", DECODERS)
def test_generate(prefix: str, kind: str) -> None:
    model = decoder(prefix)
    eager = eager_of(model)
    bk.patch(model)
    for padded in (False, True):
        batch = 1 if kind == "prompt lookup" else 3
        ids = token_ids(batch, 9)
        mask = left_padding(batch, 9) if padded else torch.ones_like(ids)
        made = []
        for network in (model, eager):
            torch.manual_seed(5)
            made.append(
                network.generate(
                    ids, attention_mask=mask, max_new_tokens=7, pad_token_id=0, **GENERATION[kind]
                )
            )
        assert torch.equal(*made)


@pytest.mark.parametrize("made_from", ["nothing", "config", "static"])
@pytest.mark.parametrize("prefix", [*DIFFERENT, "Mistral"])
def test_several_tokens_after_a_cache(prefix: str, made_from: str) -> None:
    model = decoder(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask, outputs = token_ids(), left_padding(), []
    for network in (model, eager):
        cache: Any = DynamicCache() if made_from == "nothing" else DynamicCache(config=network.config)
        if made_from == "static":
            cache = StaticCache(config=network.config, max_cache_len=20)
        parts = []
        with torch.no_grad():
            for start, stop in ((0, 7), (7, 10), (10, 16), (16, 17)):
                given = {"attention_mask": mask[:, :stop], name_of_cache(network): cache, "use_cache": True}
                parts.append(network(ids[:, start:stop], **given).logits)
        outputs.append(torch.cat(parts, dim=1)[mask.bool()])
    with torch.no_grad():
        assert_as_near(*outputs, without_padding(reference, ids, mask))


def name_of_cache(model: Any) -> str:
    return "cache" if "cache" in type(model.model).forward.__annotations__ else "past_key_values"


@pytest.mark.parametrize("prefix", DECODERS)
def test_hidden_states_and_attentions(prefix: str) -> None:
    for options in (
        {"output_hidden_states": True},
        {"output_hidden_states": True, "output_attentions": True},
    ):
        model = decoder(prefix, **without_window(prefix))
        torch.manual_seed(1)
        mask = right_padding()
        outputs = runs(model, input_ids=token_ids(), attention_mask=mask, use_cache=False, **options)
        assert "hidden_states.2" in outputs[0]
        assert ("attentions.1" in outputs[0]) == ("output_attentions" in options)
        assert_all_near(outputs, mask.bool())


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", DECODERS)
def test_half_precision(prefix: str, dtype: torch.dtype) -> None:
    model = decoder(prefix).to(dtype)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, eager)]
        assert_as_near(*outputs, without_padding(reference, ids, mask))


@pytest.mark.parametrize("prefix", DECODERS)
def test_autocast(prefix: str) -> None:
    """Types are those of eager, and the result is as near to float64."""
    model = decoder(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids = token_ids()
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = (m(ids, output_hidden_states=True) for m in (model, eager))
    assert [t.dtype for t in a.hidden_states] == [t.dtype for t in b.hidden_states]
    assert_as_near(a.hidden_states[-1], b.hidden_states[-1], expected.hidden_states[-1])
    assert_as_near(a.logits, b.logits, expected.logits)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prefix", DECODERS)
def test_gradients(prefix: str, recompute: bool) -> None:
    model = decoder(prefix).train()
    models = (model, eager_of(model), float64_of(model).train())
    bk.patch(model, recompute=recompute)
    ids = token_ids()
    assert_gradients(*(gradients(m, ids, None) for m in models))


@pytest.mark.parametrize("prefix", DIFFERENT)
def test_gradients_under_autocast(prefix: str) -> None:
    model = decoder(prefix).train()
    models = (model, eager_of(model), float64_of(model).train())
    bk.patch(model)
    ids = token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = (gradients(m, ids, None) for m in models[:2])
    assert_gradients(ours, eager, gradients(models[2], ids, None), torch.bfloat16)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("prefix", DIFFERENT)
def test_gradient_checkpointing(prefix: str, reentrant: bool) -> None:
    model = decoder(prefix).train()
    models = (model, eager_of(model), float64_of(model).train())
    bk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    ids = token_ids()
    assert_gradients(*(gradients(m, ids, None) for m in models))


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
    model = decoder(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), left_padding() if padded else None
    where = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(
            ids, attention_mask=mask, use_cache=False
        )
        expected = eager(ids, attention_mask=mask).logits[where.bool()]
        assert_as_near(out.logits[where.bool()], expected, without_padding(reference, ids, where))


def test_compile_fullgraph_of_decoding_with_a_static_cache() -> None:
    model = decoder("Gemma3")
    eager = eager_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, outputs = token_ids(3, 9), []
    for network, decode in ((model, compiled), (eager, eager)):
        cache = StaticCache(config=network.config, max_cache_len=16)
        mask, parts = left_padding(3, 9), []
        name = name_of_cache(network)
        with torch.no_grad():
            network(ids, attention_mask=mask, use_cache=True, **{name: cache})
            for step in range(3):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                given = {"attention_mask": mask, "position_ids": torch.full((3, 1), 9 + step), name: cache}
                parts.append(decode(ids[:, step : step + 1], use_cache=True, **given).logits)
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# patching


@pytest.mark.parametrize("prefix", DECODERS)
def test_unpatching_pickle_deepcopy_and_saving(prefix: str, tmp_path: Path) -> None:
    model, mask, ids = decoder(prefix), left_padding(), token_ids()
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        bk.patch(model)
        out = model(ids, attention_mask=mask).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids, attention_mask=mask).logits, out)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert type(loaded.model.layers[0]).__module__.startswith("transformers.")
        again = bk.patch(model)
        assert not [row for row in again.rows if row.status == "patched"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert bk.unpatch(model) > 0
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.mark.parametrize("prefix", DECODERS)
def test_a_family_names_only_its_own_classes(prefix: str) -> None:
    decoder(prefix)
    name = {"GptOss": "gpt_oss", "Qwen3Moe": "qwen3_moe"}.get(prefix, prefix.lower())
    family = importlib.import_module(f"bigmodel_kernels.transformers.families.{name}")
    for rule in (*family.FAMILY.rules, *family.FAMILY.losses):
        assert issubclass(rule.patched, rule.original) and rule.original.__name__.startswith(prefix)
        assert getattr(family, rule.patched.__qualname__) is rule.patched  # pickle finds it there


def reasons_of(report: Any) -> dict[str, str]:
    return {row.name: row.reason for row in report.left_alone}


class HalvedMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class Doubled(nn.Linear):
    """As a quantised projection, in the place of a plain one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


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
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    model = decoder("Llama")
    if after:
        bk.patch(model)
    adapted = peft.get_peft_model(model, config).train()
    reference = copy.deepcopy(adapted)
    bk.unpatch(reference)
    report = bk.patch(adapted)
    assert any("q_proj, v_proj: LoRA" in row.reason for row in report.patched)
    ids = token_ids()
    models = (adapted, reference, copy.deepcopy(reference).double())
    assert_gradients(*(gradients(m, ids, None) for m in models))


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


# ------------------------------------------------------------------------------------------------------------
# the loss without logits


@pytest.mark.parametrize("prefix", FUSES_ITS_LOSS)
def test_fused_loss(prefix: str) -> None:
    model = decoder(prefix).train()
    eager, reference = eager_of(model).train(), float64_of(model).train()
    report = bk.patch(model, fused_loss=True)
    fused = prefix not in ("Gemma2", "Granite")
    assert fused == any("linear_cross_entropy" in row.ops for row in report.rows)
    assert fused or any("before the loss" in row.reason for row in report.left_alone)
    ids = token_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    outputs = [m(ids, labels=labels, use_cache=False) for m in (model, eager, reference)]
    assert (outputs[0].logits is None) == fused
    assert_as_near(*(out.loss for out in outputs))
    made = []
    for network, out in zip((model, eager, reference), outputs, strict=True):
        network.zero_grad()
        out.loss.backward()
        made.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert_gradients(*made)
    model.eval()
    assert model(ids, labels=labels).logits is not None
    assert type(model).__name__ == f"{prefix}ForCausalLM"
    bk.unpatch(model)
    assert type(model) is getattr(transformers, f"{prefix}ForCausalLM")
