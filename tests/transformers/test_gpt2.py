"""Patched GPT-2 against eager GPT-2: logits, heads, gradients, and the tokens it generates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_checks import (
    check_autocast,
    check_compiled,
    check_compiled_decoding,
    check_generation,
    check_gradient_checkpointing,
    check_gradients,
    check_in_parts,
    check_padded_batch,
)
from transformers import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
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
    build,
    gpt2_config,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks, whole_layer

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_batches(padding: Any, use_cache: bool) -> None:
    check_padded_batch(build(GPT2LMHeadModel, gpt2_config()), padding, use_cache=use_cache)


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
    assert len(bk.explain(model).patched) == 2 * 3 + 4
    assert_all_near(outputs)


def test_all_blocks_run_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    run = blocks.pre_norm_layer
    monkeypatch.setattr(blocks, "pre_norm_layer", lambda x, *args: calls.append(x.shape[1]) or run(x, *args))
    model = build(GPT2LMHeadModel, gpt2_config())
    bk.patch(model)
    model.generate(token_ids(), attention_mask=left_padding(), max_new_tokens=3, do_sample=False)
    assert calls == [17, 17, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", GENERATION)
@pytest.mark.parametrize("padded", [False, True])
def test_generate(kind: str, padded: bool) -> None:
    check_generation(build(GPT2LMHeadModel, gpt2_config()), kind, (padded,), length=17, new=12)


def test_chunked_prefill_and_a_cache_of_the_users_own() -> None:
    check_in_parts(build(GPT2LMHeadModel, gpt2_config()), "config", (7, 16, 17))


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
    check_autocast(build(GPT2LMHeadModel, gpt2_config()))


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    check_gradients(build(GPT2LMHeadModel, gpt2_config(**NO_DROPOUT)), training)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    check_gradient_checkpointing(build(GPT2LMHeadModel, gpt2_config(**NO_DROPOUT)), reentrant)


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph(padded: bool) -> None:
    check_compiled(build(GPT2LMHeadModel, gpt2_config()), padded)


def test_compile_fullgraph_of_decoding_with_a_static_cache() -> None:
    check_compiled_decoding(build(GPT2LMHeadModel, gpt2_config()))


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
