"""Models with the layers of BERT under other names, or in other places: what differs; the forms fit each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_checks import IN_THE_WAY, check_lora, check_what_stands_in_the_way

import bigmodel_kernels as bk
from bigmodel_kernels.models import checks
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    eager_of,
    float64_of,
    gradients,
    runs,
)
from bigmodel_kernels.models.tiny import (
    BERT_LIKE,
    PAD,
    VOCABULARY,
    bert_like,
    family_of,
    inputs_of,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks

ROBERTAS = ["Roberta", "XLMRoberta", "Camembert"]
PATCHED = ("Embeddings", "Encoder", *(2 * ("Layer", "SelfAttention", "SelfOutput")))
#: Names of patched classes of models whose modules are not those of `PATCHED`.
OTHERS: dict[str, tuple[str, ...]] = {
    "DistilBert": ("Embeddings", "Transformer", *(2 * ("TransformerBlock", "DistilBertSelfAttention"))),
    "Albert": (
        *("AlbertEmbeddings", "AlbertTransformer", "AlbertMLMHead"),
        *(2 * ("AlbertLayer", "AlbertAttention")),
    ),
    "MPNet": ("MPNetEmbeddings", "MPNetEncoder", "MPNetLMHead", *(2 * ("MPNetLayer", "MPNetSelfAttention"))),
}
HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "Model": {},
    "ForMaskedLM": {"labels": (3, 17)},
    "ForSequenceClassification": {"labels": (3,)},
    "ForTokenClassification": {"labels": (3, 17)},
    "ForQuestionAnswering": {"start_positions": (3,), "end_positions": (3,)},
}
#: Of those: where a layer is, in it attention, a projection of that, and the first of the feed-forward.
PLACES = {
    "DistilBert": ("transformer.layer.1", "attention", "q_lin", "ffn.lin1"),
    "Albert": ("encoder.albert_layer_groups.1.albert_layers.0", "attention", "query", "ffn"),
    "MPNet": ("encoder.layer.1", "attention.attn", "q", "intermediate.dense"),
}


def ids_of(mask: torch.Tensor | None) -> torch.Tensor:
    """Padding is what the tokenizer puts there: positions count from it."""
    ids = token_ids()
    return ids if mask is None else ids.masked_fill(mask == 0, PAD)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_every_head(prefix: str, head: str, padded: bool) -> None:
    model = bert_like(prefix, head, num_labels=2)
    mask = right_padding() if padded else None
    labels = {name: torch.randint(0, 2, shape) for name, shape in HEADS[head].items()}
    if padded and "labels" in labels and labels["labels"].dim() == 2:
        labels["labels"][~right_padding().bool()] = -100
    outputs = runs(model, input_ids=ids_of(mask), attention_mask=mask, **labels)
    assert_all_near(outputs, None if mask is None else mask.bool())
    if head == "ForQuestionAnswering":
        assert_all_near(outputs)  # its loss looks at padded positions too


@pytest.mark.parametrize("summary", ["first", "last", "mean"])
def test_a_summary_of_all_positions(summary: str) -> None:
    model = bert_like("Electra", "ForMultipleChoice", summary_type=summary)
    mask = torch.cat([right_padding(), right_padding()]).view(2, 3, 17)
    ids = torch.randint(3, VOCABULARY, (2, 3, 17)).masked_fill(mask == 0, PAD)
    assert_all_near(runs(model, input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 2])))


def test_the_discriminator_of_electra() -> None:
    mask = right_padding()
    outputs = runs(bert_like("Electra", "ForPreTraining"), input_ids=ids_of(mask), attention_mask=mask)
    assert_all_near(outputs, mask.bool())


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_every_layer_is_fused_and_the_report_accounts_for_all(prefix: str) -> None:
    model = bert_like(prefix, "ForMaskedLM")
    report = bk.patch(model)
    left = {row.name for row in report.rows if row.status == "left alone"}
    heads = {
        "Electra": {"generator_predictions.LayerNorm", "generator_predictions.dense"},
        "DistilBert": {"vocab_layer_norm"},
    }
    assert left == heads.get(prefix, set())
    patched = [row.module for row in report.rows if row.status == "patched"]
    for name in OTHERS.get(prefix, [prefix + name for name in PATCHED]):
        assert name in patched
        patched.remove(name)


@pytest.mark.usefixtures("layer_by_layer")
@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_padding_is_taken_out(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask, shapes = bert_like(prefix), right_padding(), []
    run = blocks.post_norm_layer
    monkeypatch.setattr(
        blocks, "post_norm_layer", lambda x, *args: shapes.append(tuple(x.shape)) or run(x, *args)
    )
    bk.patch(model)
    with torch.no_grad():
        model(ids_of(mask), attention_mask=mask)
    assert shapes == [(int(mask.sum()), 48)] * model.config.num_hidden_layers


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_padding_on_the_left(prefix: str) -> None:
    mask = left_padding()
    outputs = runs(bert_like(prefix), input_ids=ids_of(mask), attention_mask=mask)
    assert_all_near(outputs, mask.bool())


@pytest.mark.parametrize("prefix", ROBERTAS)
def test_positions_count_real_tokens_wherever_padding_is(prefix: str) -> None:
    model = bert_like(prefix)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids = token_ids()
    ids[0, :5], ids[1, 7], ids[2, 9:] = PAD, PAD, PAD
    with torch.no_grad():
        outputs = [m.embeddings(ids) for m in (model, eager, reference)]
        assert_as_near(*outputs)
        given = torch.randint(0, 64, ids.shape)
        types = torch.zeros_like(ids)
        assert_as_near(*(m.embeddings(ids, types, given) for m in (model, eager, reference)))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_gradients(prefix: str, padded: bool) -> None:
    """Those of the table of positions too, whose row for padding gets none."""
    model = bert_like(prefix, "ForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.train()
    eager, reference = eager_of(model), float64_of(model).train()
    bk.patch(model)
    mask = right_padding() if padded else None
    ids = ids_of(mask)
    ours = gradients(model, ids, mask)
    assert_gradients(ours, gradients(eager, ids, mask), gradients(reference, ids, mask))
    name = next(name for name in ours if name.endswith("position_embeddings.weight"))
    assert ours[name].abs().sum() > 0


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_unpatching_pickle_and_deepcopy(prefix: str) -> None:
    model = bert_like(prefix, "ForMaskedLM")
    inputs = inputs_of(model, right_padding)
    checks.check_unpatching(model, inputs)
    checks.check_copies(model, inputs)


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_compile_fullgraph(prefix: str) -> None:
    model = bert_like(prefix, "ForMaskedLM")
    checks.check_forward(model, inputs_of(model, right_padding), compiled=True)


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_attentions_and_hidden_states(prefix: str) -> None:
    model, mask = bert_like(prefix), right_padding()
    eager, reference, ids = eager_of(model), float64_of(model), ids_of(mask)
    bk.patch(model)
    wanted: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        got, *expected = [m(ids, attention_mask=mask, **wanted) for m in (model, eager, reference)]
    for i in range(2):
        assert_as_near(
            got.attentions[i],
            *(e.attentions[i] for e in expected),
            where=mask.bool()[:, None].expand(-1, 4, -1),
        )
    for i in range(3):
        assert_as_near(got.hidden_states[i], *(e.hidden_states[i] for e in expected), where=mask.bool())


@pytest.mark.parametrize("prefix", PLACES)
def test_bfloat16(prefix: str) -> None:
    mask = right_padding()
    outputs = runs(bert_like(prefix).bfloat16(), input_ids=ids_of(mask), attention_mask=mask)
    assert_all_near(outputs, mask.bool())


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("what", IN_THE_WAY)
@pytest.mark.parametrize("prefix", PLACES)
def test_what_stands_in_the_way_is_heard(prefix: str, what: str, after: bool) -> None:
    """At padding too, which stays in where a layer cannot be fused."""
    mask = right_padding()
    inputs = {"input_ids": ids_of(mask), "attention_mask": mask}
    check_what_stands_in_the_way(bert_like(prefix), *PLACES[prefix], what, after, inputs)


@pytest.mark.parametrize("prefix", PLACES)
def test_lora(prefix: str) -> None:
    *_, projection, first = PLACES[prefix]
    model = bert_like(
        prefix, "ForQuestionAnswering", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    mask = right_padding()
    check_lora(model, [projection, first], {"input_ids": ids_of(mask), "attention_mask": mask})


def test_groups_of_albert_with_several_layers() -> None:
    model = bert_like("Albert", inner_group_num=2, num_hidden_layers=3, num_hidden_groups=3)
    mask = right_padding()
    assert_all_near(runs(model, input_ids=ids_of(mask), attention_mask=mask), mask.bool())


@pytest.mark.parametrize("prefix", ["Roberta", "Electra"])
def test_a_decoder_generates_what_eager_does(prefix: str) -> None:
    model = bert_like(prefix, "ForCausalLM", is_decoder=True)
    eager, ids = eager_of(model), token_ids(2, 9)
    report = bk.patch(model)
    assert any("is_decoder" in row.reason for row in report.rows)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))


@pytest.mark.parametrize("prefix", BERT_LIKE)
def test_a_family_names_only_its_own_classes(prefix: str) -> None:
    family = importlib.import_module(f"bigmodel_kernels.transformers.families.{family_of(prefix)}")
    check: Callable[[type], bool] = lambda cls: cls.__name__.startswith(prefix)  # noqa: E731
    for rule in (*family.FAMILY.rules, *(r for r in family.FAMILY.children if r.parent is not None)):
        assert issubclass(rule.patched, rule.original)
    for rule in family.FAMILY.rules:
        assert check(rule.original) or rule.original.__name__ in OTHERS["DistilBert"]
        assert getattr(family, rule.patched.__qualname__) is rule.patched  # pickle finds it there
