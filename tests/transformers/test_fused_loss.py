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

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import eager_of, float64_of
from bigmodel_kernels.models.tiny import VOCABULARY

KINDS = ["masked lm", "gpt2"]


def trio_of(kind: str) -> list[Any]:
    model = MODELS[kind]()
    trio = [model, eager_of(model), float64_of(model)]
    bk.patch(model, fused_loss=True)
    return [m.train() for m in trio]


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
