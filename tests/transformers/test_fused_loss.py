"""`patch(model, fused_loss=True)`: loss and gradients of eager, without logits, and only where asked for."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from typing import Any

import pytest
import torch
from test_training import MODELS, assert_steps_agree, batch, loss_and_gradients
from torch import nn
from transformers import DebertaV2ForMaskedLM, DistilBertForMaskedLM

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import call, eager_of, float64_of
from bigmodel_kernels.models.tiny import (
    TINY,
    VOCABULARY,
    bert_like,
    build,
    decoder,
    encoder_config,
    inputs_of,
    seq2seq,
    token_ids,
)

KINDS = ["masked lm", "gpt2"]


def trio_of(kind: str) -> list[Any]:
    model = MODELS[kind]()
    trio = [model, eager_of(model), float64_of(model)]
    bk.patch(model, fused_loss=True)
    return [m.train() for m in trio]


LANGUAGE_MODELS = [name for name, tiny in TINY.items() if tiny.architecture.endswith(("LM", "LMHeadModel"))]
LANGUAGE_MODELS += [
    name for name, tiny in TINY.items() if tiny.architecture.endswith(("ConditionalGeneration", "MTModel"))
]


def labelled_inputs(model: Any, **more: Any) -> dict[str, Any]:
    """Inputs and labels, three in ten of which do not count; a decoder reads what the labels give it."""
    inputs = inputs_of(model, batch=2)
    ids = inputs.pop("decoder_input_ids", inputs.get("input_ids"))
    assert ids is not None
    return {**inputs, "labels": ids.masked_fill(torch.rand(ids.shape) < 0.3, -100), **more}


def agree(model: Any, inputs: dict[str, Any], fused: bool = True) -> Any:
    """Loss and gradients of the model, which is not patched yet; whether `fused`, without logits. Returns the
    report.
    """
    trio = [model.train(), eager_of(model).train(), float64_of(model).train()]
    report = bk.patch(model, fused_loss=True)
    results = []
    for twin in trio:
        out = call(twin, inputs)
        assert (out.logits is None) == (fused and twin is model)
        out.loss.backward()
        results.append(
            (out.loss.detach(), {n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
        )
    assert_steps_agree(results)
    return report


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_language_model(name: str) -> None:
    """Of every family: what a model does before its head and after it, and a bias of the vocabulary."""
    model = TINY[name].model()
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias.normal_()
    fused = name != "gemma2"
    report = agree(model, labelled_inputs(model), fused)
    assert fused == any("linear_cross_entropy" in row.ops for row in report.patched)
    assert fused or any("bends the logits" in row.reason for row in report.left_alone)


def test_what_reads_other_arguments_or_more_of_them() -> None:
    """Given decoder ids; the experts' balance in the loss; a length that Whisper refuses."""
    model = TINY["bart"].model()
    inputs = labelled_inputs(model)
    agree(model, {**inputs, "decoder_input_ids": inputs["labels"].clamp(min=3)})
    model = decoder("Mixtral")
    agree(model, labelled_inputs(model, output_router_logits=True), fused=False)
    model = seq2seq("Whisper")
    bk.patch(model.train(), fused_loss=True)
    long = torch.zeros(2, model.max_target_positions + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot exceed the maximum allowed length"):
        model(**{**labelled_inputs(model), "labels": long})


def test_what_is_refused_says_why() -> None:
    def reason(model: Any) -> str:
        return next(row.reason for row in bk.patch(model, fused_loss=True).left_alone if row.name == "")

    newer = encoder_config("DebertaV2", legacy=False)
    assert "its head is not the one that is known" in reason(build(DebertaV2ForMaskedLM, newer))
    model = bert_like("Roberta", "ForMaskedLM")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    assert "its head is not the one that is known" in reason(model)
    model = TINY["distilbert"].model()
    assert isinstance(model, DistilBertForMaskedLM)
    model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert "a loss function of the user's own" in reason(model)
    model = TINY["modernbert"].model(sparse_prediction=True, sparse_pred_ignore_index=7)
    assert "sparse_pred_ignore_index=7" in reason(model)


def test_only_training_with_labels_has_no_logits() -> None:
    for kind in KINDS:
        model, eager, _ = trio_of(kind)
        inputs = batch(kind)
        out = model(**inputs)
        assert out.logits is None and out.loss.dtype == torch.float32
        assert model(input_ids=inputs["input_ids"]).logits is not None
        assert model(**inputs, return_dict=False)[1].shape == (3, 17, VOCABULARY)
        with torch.no_grad():
            expected, evaluated = (m.eval()(**inputs) for m in (eager, model))
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(evaluated.logits[real], expected.logits[real], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(evaluated.loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_every_gradient(kind: str) -> None:
    trio = trio_of(kind)
    for padded in (True, False):
        assert_steps_agree([loss_and_gradients(m, batch(kind, padded)) for m in trio])


@pytest.mark.parametrize("kind", KINDS)
def test_few_labels_and_none(kind: str) -> None:
    """Tokens without a label cost nothing, and with no label at all the mean is that of nothing."""
    trio = trio_of(kind)
    inputs = batch(kind)
    inputs["labels"] = torch.where(torch.rand(inputs["labels"].shape) < 0.8, -100, inputs["labels"])
    assert_steps_agree([loss_and_gradients(m, inputs) for m in trio])
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert all(torch.isnan(m(**inputs).loss) for m in trio)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_not_one_for_each_position(kind: str) -> None:
    model, *_ = trio_of(kind)
    ids = token_ids()
    for labels in (ids[:, :5], ids[:2], torch.cat([ids, ids])):
        with pytest.raises(ValueError, match=r"labels have shape .* one for each .* \(3, 17\)"):
            model(input_ids=ids, labels=labels)


def test_what_trainer_passes() -> None:
    """The number of items of all accumulated batches divides the sum."""
    trio = trio_of("gpt2")
    for items in (torch.tensor(40), 25):
        results = [loss_and_gradients(m, {**batch("gpt2"), "num_items_in_batch": items}) for m in trio]
        assert_steps_agree(results)
    shifted = torch.roll(batch("gpt2")["labels"], -1, 1)
    assert_steps_agree([loss_and_gradients(m, {**batch("gpt2"), "shift_labels": shifted}) for m in trio])


def test_trainer_trains_and_evaluates(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0] for k, v in batch("gpt2", padded=False, seed=i, size=1).items()} for i in range(8)]
    found = []
    for fused in (True, False):
        model = MODELS["gpt2"]()
        bk.patch(model, fused_loss=fused)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(fused)),
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([*losses, trainer.evaluate()["eval_loss"]])
    assert found[0] == pytest.approx(found[1], rel=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    trio, results = trio_of(kind), []
    for model, enabled in zip(trio, (True, True, False), strict=True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch(kind)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert_steps_agree(results, computed_in=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_goes_by_its_name_and_comes_back(kind: str, tmp_path: Any) -> None:
    model = MODELS[kind]()
    original = type(model)
    report = bk.patch(model, fused_loss=True)
    row = next(row for row in report.patched if row.ops == ("linear_cross_entropy",))
    assert row.name == "" and "logits is None" in row.reason
    assert type(model) is not original and isinstance(model, original)
    assert type(model).__name__ == original.__name__
    assert list(inspect.signature(model.forward).parameters) == list(
        inspect.signature(original(model.config).forward).parameters
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [original.__name__]
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin) is type(model) and twin.train()(**batch(kind)).logits is None
    # Patching again without the option changes nothing; unpatching takes it away.
    assert any("linear_cross_entropy" in row.ops for row in bk.patch(model).patched)
    bk.unpatch(model)
    assert type(model) is original
    assert not any("linear_cross_entropy" in row.ops for row in bk.patch(model).patched)


def test_a_loss_of_the_users_own_keeps_its_logits() -> None:
    model = MODELS["gpt2"]()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    report = bk.patch(model, fused_loss=True)
    assert "takes logits" in next(row.reason for row in report.left_alone if row.name == "")
    model = MODELS["gpt2"]()
    bk.patch(model, fused_loss=True)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()  # set later
    assert model.train()(**batch("gpt2")).logits is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_cannot_be_read(kind: str) -> None:
    """A hook on the projection is honoured."""
    trio = trio_of(kind)
    for model in trio:
        head = model.lm_head if kind == "gpt2" else model.cls.predictions.decoder
        head.register_forward_hook(lambda module, args, out: out * 2)
    assert isinstance(trio[0], nn.Module)
    assert_steps_agree([loss_and_gradients(m, batch(kind)) for m in trio])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    trio = trio_of(kind)
    compiled = torch.compile(trio[0], backend="aot_eager", fullgraph=True)
    results = [loss_and_gradients(m, batch(kind)) for m in (compiled, *trio[1:])]
    results[0] = (results[0][0], {k.removeprefix("_orig_mod."): v for k, v in results[0][1].items()})
    assert_steps_agree(results)
