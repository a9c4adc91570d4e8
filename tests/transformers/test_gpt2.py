"""Patched GPT-2 against eager GPT-2: logits, heads, gradients, and the tokens it generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    build,
    eager_of,
    float64_of,
    gpt2_config,
    gradients,
    left_padding,
    right_padding,
    runs,
    token_ids,
    without_padding,
)
from transformers import (
    DynamicCache,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    StaticCache,
)

import bigmodel_kernels as bk
from bigmodel_kernels.transformers import blocks

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_batches(padding: Any, use_cache: bool) -> None:
    model = build(GPT2LMHeadModel, gpt2_config())
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), padding()
    with torch.no_grad():
        out, expected = (
            m(ids, attention_mask=mask, use_cache=use_cache).logits[mask.bool()] for m in (model, eager)
        )
        assert_as_near(out, expected, without_padding(reference, ids, mask))


def test_every_head() -> None:
    ids = token_ids()
    for cls, inputs in (
        (GPT2Model, {}),
        (GPT2LMHeadModel, {"labels": ids}),
        (GPT2DoubleHeadsModel, {"labels": ids, "mc_labels": torch.tensor([0, 0, 0])}),
        (GPT2ForSequenceClassification, {"labels": torch.randint(0, 2, (3,))}),
        (GPT2ForTokenClassification, {"labels": torch.randint(0, 2, (3, 17))}),
        (
            GPT2ForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])},
        ),
    ):
        size = {"input_ids": ids}
        if cls is GPT2DoubleHeadsModel:
            size = {"input_ids": ids[:, None]}
            inputs = {"labels": ids[:, None], "mc_labels": torch.zeros(3, dtype=torch.long)}
        model = build(cls, gpt2_config())
        outputs = runs(model, **size, **inputs, use_cache=False)
        assert_all_near(outputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"n_inner": 40},
        {"tie_word_embeddings": False},
    ],
)
def test_configs(changes: dict[str, Any]) -> None:
    model = build(GPT2LMHeadModel, gpt2_config(**changes))
    outputs = runs(model, input_ids=token_ids(), use_cache=False)
    assert len(bk.explain(model).patched) == 2 * 3 + 2
    assert_all_near(outputs)


def test_all_blocks_run_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = blocks.pre_norm_layer
    monkeypatch.setattr(blocks, "pre_norm_layer", lambda x, *args: calls.append(x.shape[1]) or run(x, *args))
    model = build(GPT2LMHeadModel, gpt2_config())
    bk.patch(model)
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
@pytest.mark.parametrize("padded", [False, True])
def test_generate(kind: str, padded: bool) -> None:
    model = build(GPT2LMHeadModel, gpt2_config())
    eager = eager_of(model)
    bk.patch(model)
    batch = 1 if kind == "prompt lookup" else 3
    ids = token_ids(batch)
    mask = left_padding(batch) if padded else torch.ones_like(ids)
    made = []
    for network in (model, eager):
        torch.manual_seed(5)
        made.append(
            network.generate(ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **GENERATION[kind])
        )
    assert torch.equal(*made)


def test_chunked_prefill_and_a_cache_of_the_users_own() -> None:
    model = build(GPT2LMHeadModel, gpt2_config())
    reference = float64_of(model)
    eager = eager_of(model)
    bk.patch(model)
    ids, mask = token_ids(), left_padding()
    outputs = []
    for network in (model, eager):
        cache = DynamicCache(config=network.config)
        name = "cache" if "cache" in type(network.transformer).forward.__annotations__ else "past_key_values"
        parts = []
        with torch.no_grad():
            for start, stop in ((0, 7), (7, 16), (16, 17)):
                given = {"attention_mask": mask[:, :stop], name: cache, "use_cache": True}
                parts.append(network(ids[:, start:stop], **given).logits)
        outputs.append(torch.cat(parts, dim=1)[mask.bool()])
    with torch.no_grad():
        assert_as_near(*outputs, without_padding(reference, ids, mask))


def test_hidden_states_and_attentions() -> None:
    for options in (
        {"output_hidden_states": True},
        {"output_hidden_states": True, "output_attentions": True},
    ):
        model = build(GPT2LMHeadModel, gpt2_config())
        outputs = runs(
            model, input_ids=token_ids(), attention_mask=right_padding(), use_cache=False, **options
        )
        assert "hidden_states.2" in outputs[0]
        assert ("attentions.1" in outputs[0]) == ("output_attentions" in options)
        assert_all_near(outputs)


def test_a_mask_of_the_users_own() -> None:
    visible = (torch.rand(3, 1, 17, 17) > 0.5).tril() | torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = build(GPT2LMHeadModel, gpt2_config())
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        expected = (
            eager(ids, attention_mask=additive)[0],
            reference(ids, attention_mask=additive.double())[0],
        )
        for mask in (visible, additive):
            assert_as_near(model(ids, attention_mask=mask)[0], *expected)


def test_cross_attention_keeps_its_own_code() -> None:
    model = build(GPT2LMHeadModel, gpt2_config(add_cross_attention=True))
    left = [row for row in bk.explain(model).left_alone if row.name.endswith("crossattention")]
    assert len(left) == 2 and "cross-attention" in left[0].reason
    states = torch.randn(3, 9, 48)
    inputs = {"encoder_hidden_states": states, "encoder_attention_mask": right_padding(3, 9)}
    outputs = runs(model, input_ids=token_ids(), use_cache=False, **inputs)
    assert_all_near(outputs)
    # Without encoder states the blocks are plain ones, and a cache has two halves.
    outputs = runs(
        build(GPT2LMHeadModel, gpt2_config(add_cross_attention=True)), input_ids=token_ids(), use_cache=True
    )
    assert_all_near([{"logits": out["logits"]} for out in outputs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build(GPT2LMHeadModel, gpt2_config()).to(dtype)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids = token_ids()
    with torch.no_grad():
        assert_as_near(*(m(ids).logits for m in (model, eager, reference)))


def test_autocast() -> None:
    """Types are those of eager, and the result is as near to float64."""
    model = build(GPT2LMHeadModel, gpt2_config())
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


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    model = build(GPT2LMHeadModel, gpt2_config(**NO_DROPOUT)).train(training)
    models = (model, eager_of(model), float64_of(model).train(training))
    bk.patch(model)
    ids = token_ids()
    assert_gradients(*(gradients(m, ids, None) for m in models))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build(GPT2LMHeadModel, gpt2_config(**NO_DROPOUT)).train()
    models = (model, eager_of(model), float64_of(model).train())
    bk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    ids = token_ids()
    assert_gradients(*(gradients(m, ids, None) for m in models))


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph(padded: bool) -> None:
    model = build(GPT2LMHeadModel, gpt2_config())
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
    model = build(GPT2LMHeadModel, gpt2_config())
    eager = eager_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    name = "cache" if "cache" in type(model.transformer).forward.__annotations__ else "past_key_values"
    ids, outputs = token_ids(3, 9), []
    for network, decode in ((model, compiled), (eager, eager)):
        cache = StaticCache(config=network.config, max_cache_len=16)
        mask, parts = left_padding(3, 9), []
        with torch.no_grad():
            network(ids, attention_mask=mask, use_cache=True, **{name: cache})
            for step in range(3):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                given = {"attention_mask": mask, "position_ids": torch.full((3, 1), 9 + step), name: cache}
                parts.append(decode(ids[:, step : step + 1], use_cache=True, **given).logits)
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


def test_the_language_model_head_stays_tied() -> None:
    model = build(GPT2LMHeadModel, gpt2_config())
    bk.patch(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    with torch.no_grad():
        before = model(token_ids(1, 4)).logits
        model.transformer.wte.weight.mul_(2)
        torch.manual_seed(0)
        after = model(token_ids(1, 4)).logits
    assert not torch.equal(before, after)
