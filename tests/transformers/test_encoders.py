"""Encoders with norms before their halves (ViT, DeiT, CLIP, SigLIP, ModernBERT) and DeBERTa v2 against eager,
with the float64 model as the definition of right, and what is left alone.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from contextlib import nullcontext
from typing import Any

import decoder_checks
import pytest
import torch
import transformers
from encoder_checks import (
    IN_THE_WAY,
    check_lora,
    check_what_stands_in_the_way,
    outputs_of,
)
from torch import nn

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models import checks
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    eager_of,
    float64_of,
    gradients_of,
    runs,
    tensors_of,
)
from bigmodel_kernels.models.tiny import (
    ENCODERS,
    VOCABULARY,
    encoder,
    family_of,
    holes,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import attention_interface, blocks

TEXTS = ["ModernBert", "DebertaV2"]
IMAGES = ["ViT", "DeiT", "CLIP", "Siglip"]
#: Where a layer is, and in it attention, a projection of it, and one of the feed-forward.
LAYER = {
    "ViT": "vit.layers.1",
    "DeiT": "deit.layers.1",
    "CLIP": "vision_model.encoder.layers.1",
    "Siglip": "text_model.encoder.layers.1",
    "ModernBert": "model.layers.1",
    "DebertaV2": "deberta.encoder.layer.1",
}
ATTENTION = {
    "ViT": "attention",
    "DeiT": "attention",
    "CLIP": "self_attn",
    "Siglip": "self_attn",
    "ModernBert": "attn",
    "DebertaV2": "attention.self",
}
PROJECTION = {
    **dict.fromkeys(IMAGES, "q_proj"),
    "ModernBert": "Wqkv",
    "DebertaV2": "query_proj",
}
FIRST = {**dict.fromkeys(IMAGES, "mlp.fc1"), "ModernBert": "mlp.Wi", "DebertaV2": "intermediate.dense"}
DROPOUT: dict[str, dict[str, Any]] = {
    "ViT": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
    "DeiT": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
    "CLIP": {"attention_dropout": 0.2},
    "Siglip": {"attention_dropout": 0.2},
    "ModernBert": {"attention_dropout": 0.2, "mlp_dropout": 0.3},
    "DebertaV2": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2},
}
NO_DROPOUT: dict[str, dict[str, Any]] = {
    prefix: dict.fromkeys(changes, 0.0) for prefix, changes in DROPOUT.items()
}
#: What differs in other models of the families.
VARIANTS: list[Any] = [
    ("ViT", {"qkv_bias": False}),
    ("CLIP", {"hidden_act": "gelu"}),
    ("ModernBert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    pytest.param(
        "ModernBert",
        {"layer_types": ["full_attention"] * 3, "hidden_activation": "gelu_pytorch_tanh"},
        marks=pytest.mark.skipif(
            decoder_checks.before("5.18"),
            reason="its config wants layers of both kinds before transformers 5.18",
        ),
    ),
    ("ModernBert", {"local_attention": 64, **DROPOUT["ModernBert"]}),
    ("DebertaV2", {"share_att_key": False, "conv_kernel_size": 3, "position_biased_input": True}),
    ("DebertaV2", {"pos_att_type": ["p2c"], "share_att_key": False, "position_buckets": -1}),
    ("DebertaV2", {"pos_att_type": ["c2p"], "share_att_key": False, "type_vocab_size": 2}),
    ("DebertaV2", {"pos_att_type": []}),
    ("DebertaV2", {"relative_attention": False, "pos_att_type": []}),
    ("DebertaV2", {"legacy": False}),
]


def inputs_of(prefix: str, mask: torch.Tensor | None = None) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    if prefix in IMAGES:
        inputs["pixel_values"] = torch.randn(3, 3, 12, 12)
    if prefix not in ("ViT", "DeiT"):
        inputs.update(input_ids=token_ids(), attention_mask=mask)
    return inputs


# ------------------------------------------------------------------------------------------------------------
# results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ENCODERS)
def test_outputs(prefix: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(prefix)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert_all_near(runs(encoder(prefix).to(dtype), **inputs))


@pytest.mark.parametrize(
    ("prefix", "padding"),
    [
        ("CLIP", right_padding),  # on the left, eager in float64 has NaN where the first queries see nothing
        ("Siglip", right_padding),
        ("Siglip", left_padding),
        ("DebertaV2", right_padding),
        ("DebertaV2", left_padding),
    ],
)
def test_padded_batches(prefix: str, padding: Any) -> None:
    real = padding().bool() if prefix == "DebertaV2" else None
    assert_all_near(runs(encoder(prefix), **inputs_of(prefix, padding())), real)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each layer of BERT's kind ran on, or sequences with their padding."""
    seen: list[int] = []
    run = blocks.post_norm_layer
    monkeypatch.setattr(blocks, "post_norm_layer", lambda x, *args: seen.append(x.shape[0]) or run(x, *args))
    return seen


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("padding", "packed"), [(right_padding, True), (left_padding, False), (holes, False)]
)
def test_padding_of_deberta_is_taken_out(
    padding: Any, packed: bool, dtype: torch.dtype, backend: str | None, rows: list[int]
) -> None:
    """Where each text begins at once and has no gaps. One operator for one has no bias without padding."""
    mask, model = padding(), encoder("DebertaV2", "Model").to(dtype)
    with backends.use(backend) if backend else nullcontext():
        assert_all_near(runs(model, **inputs_of("DebertaV2", mask)), mask.bool())
    assert rows == [int(mask.sum()) if packed else 3] * 2


@pytest.mark.parametrize("by_config", [False, True])
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_states_of_deberta_that_are_asked_for_have_their_padding(
    head: str, by_config: bool, rows: list[int]
) -> None:
    model, inputs = encoder("DebertaV2", head), inputs_of("DebertaV2", right_padding())
    if by_config:
        model.config.output_hidden_states = True
    else:
        inputs["output_hidden_states"] = True
    outputs = runs(model, **inputs)
    assert {"hidden_states.2", "hidden_states.0"} <= {*outputs[0]} and rows == [3, 3]
    assert_all_near(outputs)


def test_question_answering_by_deberta_has_its_padding(rows: list[int]) -> None:
    inputs = inputs_of("DebertaV2", right_padding())
    assert_all_near(runs(encoder("DebertaV2", "ForQuestionAnswering"), **inputs))
    assert rows == [3, 3]


@pytest.mark.parametrize("watched", ["a hook on a layer", "a layer that is replaced"])
def test_layers_of_deberta_that_are_not_as_known(watched: str, rows: list[int]) -> None:
    model, inputs = encoder("DebertaV2", "Model"), inputs_of("DebertaV2", right_padding())
    eager = eager_of(model)
    bk.patch(model)
    for network in (model, eager):
        layer = network.encoder.layer[1]
        if watched == "a hook on a layer":
            layer.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
        else:
            layer.output.dense = nn.Sequential(layer.output.dense)
    with torch.no_grad():
        outputs = [network(**inputs).last_hidden_state for network in (model, eager)]
    real = right_padding().bool()
    torch.testing.assert_close(*(out[real] for out in outputs), atol=1e-5, rtol=1e-5)
    assert 3 in rows  # all with their padding


@pytest.mark.parametrize("length", [3, 17, 40])
@pytest.mark.parametrize("inference", [False, True])
def test_deberta_projects_the_positions_that_a_batch_needs(
    length: int, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 x 32 buckets: far ones are shared, so that 40 tokens need fewer than they have distances."""
    model, seen = encoder("DebertaV2", "Model", position_buckets=32), []
    form = type(bk.patch(model) and model.encoder.layer[0].attention.self)
    run = form._bias
    monkeypatch.setattr(form, "_bias", lambda *args: seen.append(args[-1].needed) or run(*args))
    ids = torch.randint(3, VOCABULARY, (2, length))
    with torch.inference_mode() if inference else torch.no_grad():
        ours = model(ids).last_hidden_state
        monkeypatch.setattr(form, "_bias", None)
        monkeypatch.setattr(sys.modules[form.__module__], "_places", lambda *args: None)
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert len(seen) == 2 and len(set(seen)) == 1
    assert seen[0] == 2 * length - 1 if length < 17 else seen[0] <= min(2 * length - 1, 64)


def test_deberta_trains_after_inference_on_as_many_tokens() -> None:
    model, ids = encoder("DebertaV2", "Model"), torch.randint(3, VOCABULARY, (2, 13))
    bk.patch(model)
    with torch.inference_mode():
        model(ids)
    model(ids).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_distances_of_the_callers_own() -> None:
    model = encoder("DebertaV2", "Model")
    eager = eager_of(model)
    bk.patch(model)
    states, mask = torch.randn(3, 17, 48), torch.ones(3, 17)
    given = model.encoder.get_rel_pos(states)
    for _ in range(2):
        with torch.no_grad():
            ours, expected = (
                m.encoder(states, mask, relative_pos=given).last_hidden_state for m in (model, eager)
            )
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        given[:, :9] = given[:, :9].flip(1)  # the very same tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [right_padding, left_padding])
def test_padded_batches_in_windows(padding: Any, dtype: torch.dtype) -> None:
    decoder_checks.check_padded_batch(encoder("ModernBert").to(dtype), padding)


@pytest.mark.parametrize(("prefix", "changes"), VARIANTS)
def test_variants(prefix: str, changes: dict[str, Any]) -> None:
    mask = right_padding() if prefix == "DebertaV2" else None
    outputs = runs(encoder(prefix, **changes), **inputs_of(prefix, mask))
    assert_all_near(outputs, None if mask is None else mask.bool())


@pytest.mark.parametrize(
    ("prefix", "head", "labels"),
    [
        ("ViT", "Model", None),
        ("ViT", "ForMaskedImageModeling", None),
        ("DeiT", "ForImageClassificationWithTeacher", None),
        ("ModernBert", "ForSequenceClassification", (3,)),
        ("ModernBert", "ForTokenClassification", (3, 17)),
        ("DebertaV2", "ForSequenceClassification", (3,)),
        ("DebertaV2", "ForTokenClassification", (3, 17)),
        ("DebertaV2", "ForQuestionAnswering", None),
    ],
)
def test_other_heads(prefix: str, head: str, labels: tuple[int, ...] | None) -> None:
    inputs = inputs_of(prefix)
    if labels is not None:
        inputs["labels"] = torch.randint(0, 2, labels)
    assert_all_near(runs(encoder(prefix, head), **inputs))


@pytest.mark.parametrize("prefix", ENCODERS)
def test_every_layer_is_fused_and_the_report_accounts_for_all(
    prefix: str, monkeypatch: pytest.MonkeyPatch, layer_by_layer: None
) -> None:
    model, calls = encoder(prefix), []
    report = bk.patch(model)
    named = {name for name, _ in model.named_modules()}
    assert {row.name for row in report.rows} <= named
    assert not [row for row in report.left_alone if "layer" in row.name.split(".")[-2:][0]]
    for kind in ("post_norm_layer", "decoder_layer"):
        run = getattr(blocks, kind)
        monkeypatch.setattr(blocks, kind, lambda *args, run=run: calls.append(1) or run(*args))
    with torch.no_grad():
        model(**inputs_of(prefix))
    assert len(calls) == {"CLIP": 4, "Siglip": 4, "ModernBert": 3}.get(prefix, 2)


def test_the_text_encoder_of_clip_is_causal() -> None:
    model = encoder("CLIP").text_model
    bk.patch(model)
    ids = token_ids()
    other = ids.clone()
    other[:, 9:] = torch.randint(3, VOCABULARY, (3, 8))
    with torch.no_grad():
        a, b = (model(x).last_hidden_state for x in (ids, other))
    torch.testing.assert_close(a[:, :9], b[:, :9])
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("prefix", ENCODERS)
def test_states_and_attentions(prefix: str) -> None:
    head = {"CLIP": "VisionModel", "Siglip": "VisionModel"}.get(prefix, "")
    model = encoder(prefix) if not head else encoder(prefix).vision_model
    inputs = inputs_of("ViT" if head else prefix)
    outputs = runs(model, **inputs, output_hidden_states=True, output_attentions=True)
    assert {"hidden_states.2", "attentions.1"} <= outputs[0].keys()
    assert_all_near(outputs)


@pytest.mark.parametrize("prefix", ENCODERS)
def test_autocast(prefix: str) -> None:
    model, inputs = encoder(prefix), inputs_of(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = outputs_of((model, eager), inputs)
    assert_all_near(outputs + outputs_of((reference,), inputs))


def test_windows_to_both_sides_ride_on_masks_of_two_dimensions() -> None:
    """The mask of a window, and the attention that it gives, against the dense mask of sdpa."""
    config = encoder("ModernBert").config
    states, tokens = torch.randn(3, 17, 48), right_padding()
    query, key, value = torch.randn(3, 3, 4, 17, 12)
    module = nn.Module()
    for given in (None, tokens):
        masks = []
        for implementation in ("bigmodel", "sdpa"):
            config._attn_implementation = implementation
            masks.append(
                transformers.masking_utils.create_bidirectional_sliding_window_mask(
                    config=config, inputs_embeds=states, attention_mask=given
                )
            )
        assert masks[0].shape == (3, 2, 17)
        outputs = [
            attention_interface.attention_forward(module, query, key, value, mask, output_attentions=True)
            for mask in masks
        ]
        for i in range(2):
            torch.testing.assert_close(outputs[0][i], outputs[1][i])
        copied = masks[0].clone()
        with pytest.raises(ValueError, match="was copied on the way"):
            attention_interface.attention_forward(module, query, key, value, copied)
        again = attention_interface.attention_forward(module, query, key, value, copied, sliding_window=5)
        torch.testing.assert_close(again[0], outputs[0][0])


# ------------------------------------------------------------------------------------------------------------
# gradients, and the graph


@pytest.mark.parametrize("prefix", ENCODERS)
def test_gradients(prefix: str) -> None:
    inputs = inputs_of(prefix, right_padding() if prefix == "DebertaV2" else None)
    checks.check_gradients(encoder(prefix, **NO_DROPOUT[prefix]), inputs)


@pytest.mark.parametrize("prefix", TEXTS)
def test_gradients_with_the_hidden_layer_made_again(prefix: str) -> None:
    decoder_checks.check_gradients(encoder(prefix, **NO_DROPOUT[prefix]), recompute=True)


@pytest.mark.parametrize(
    ("prefix", "reentrant"),
    [
        *((prefix, False) for prefix in ENCODERS),
        # Not DeBERTa: its layers share the graph of the relative positions, and eager fails.
        *((prefix, True) for prefix in ENCODERS if prefix != "DebertaV2"),
    ],
)
def test_gradient_checkpointing(prefix: str, reentrant: bool) -> None:
    model, inputs = encoder(prefix, **NO_DROPOUT[prefix]).train(), inputs_of(prefix)
    bk.patch(model)
    expected = gradients_of(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # of what does not hang on an input, the first layer's input among it, it makes no gradient
        for embeddings in (m for m in model.modules() if type(m).__name__.endswith("Embeddings")):
            embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    made = gradients_of(model, inputs)
    assert made.keys() == expected.keys()
    for name, gradient in made.items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("prefix", ENCODERS)
def test_dropout(prefix: str) -> None:
    """Drawn from torch's generator, and in training only."""
    model, inputs = encoder(prefix, **DROPOUT[prefix]), inputs_of(prefix)
    assert_all_near(runs(model, **inputs))
    model.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            outputs.append(next(iter(tensors_of(model(**inputs)).values())))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("prefix", IMAGES)
def test_compile_fullgraph_of_images(prefix: str) -> None:
    model, inputs = encoder(prefix), inputs_of(prefix)
    model = getattr(model, "vision_model", model)
    inputs = {"pixel_values": inputs["pixel_values"]}
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_all_near(outputs_of((compiled, eager, reference), inputs))


@pytest.mark.parametrize("prefix", ["CLIP", "Siglip"])
def test_compile_fullgraph_of_texts_next_to_images(prefix: str) -> None:
    model = encoder(prefix).text_model
    inputs = {"input_ids": token_ids(), "attention_mask": right_padding()}
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_all_near(outputs_of((compiled, eager, reference), inputs))


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph_of_windows(padded: bool) -> None:
    decoder_checks.check_compiled(encoder("ModernBert"), padded)


@pytest.mark.parametrize("padded", [False, True])
def test_compile_fullgraph_of_disentangled_attention(padded: bool) -> None:
    model, ids, mask = encoder("DebertaV2"), token_ids(), right_padding() if padded else None
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_as_near(*(m(ids, attention_mask=mask).logits for m in (compiled, eager, reference)))


# ------------------------------------------------------------------------------------------------------------
# patching


@pytest.mark.parametrize("prefix", ENCODERS)
def test_unpatching_pickle_and_deepcopy(prefix: str) -> None:
    model, inputs = encoder(prefix), inputs_of(prefix)
    classes, state = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = tensors_of(model(**inputs))
        bk.patch(model)
        out = tensors_of(model(**inputs))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for name, value in tensors_of(other(**inputs)).items():
                assert torch.equal(value, out[name])
        assert not [row for row in bk.patch(model).rows if row.status == "patched"]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert bk.unpatch(model) > 0
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        for name, value in tensors_of(model(**inputs)).items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("prefix", ENCODERS)
def test_what_stands_in_the_way_is_heard(prefix: str, what: str, after: bool) -> None:
    places = (LAYER[prefix], ATTENTION[prefix], PROJECTION[prefix], FIRST[prefix])
    check_what_stands_in_the_way(encoder(prefix), *places, what, after, inputs_of(prefix))


@pytest.mark.parametrize("prefix", ENCODERS)
def test_lora(prefix: str) -> None:
    targets = [PROJECTION[prefix], FIRST[prefix].removeprefix("mlp.")]
    check_lora(encoder(prefix, **NO_DROPOUT[prefix]), targets, inputs_of(prefix))


@pytest.mark.parametrize("prefix", ENCODERS)
def test_a_family_names_only_classes_of_its_own_file(prefix: str) -> None:
    name = family_of(prefix)
    family = importlib.import_module(f"bigmodel_kernels.transformers.families.{name}")
    for rule in family.FAMILY.rules:
        assert rule.original.__module__ == f"transformers.models.{name}.modeling_{name}"
        assert issubclass(rule.patched, rule.original)
        assert getattr(family, rule.patched.__qualname__) is rule.patched  # pickle finds it there


def test_query_states_of_deberta_take_its_own_code() -> None:
    """Of an enhanced mask decoder, which no checkpoint's config asks for."""
    model = encoder("DebertaV2")
    eager = eager_of(model)
    bk.patch(model)
    states, queries = torch.randn(2, 3, 17, 48)
    outputs = []
    for network in (model, eager):
        layers = network.deberta.encoder
        mask = layers.get_attention_mask(right_padding())
        with torch.no_grad():
            outputs.append(
                layers.layer[0](
                    states,
                    mask,
                    query_states=queries,
                    relative_pos=layers.get_rel_pos(states),
                    rel_embeddings=layers.get_rel_embedding(),
                )[0]
            )
    torch.testing.assert_close(*outputs)
