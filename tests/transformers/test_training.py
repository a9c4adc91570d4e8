"""Training a patched model: losses, gradients, optimizers, Trainer, LoRA, accelerate, compiled steps.

Dropout is off in all of this file but where a test says so: eager is then something to compare with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2LMHeadModel,
)

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import (
    assert_as_near,
    assert_gradients,
    eager_of,
    float64_of,
)
from bigmodel_kernels.models.tiny import (
    VOCABULARY,
    bert_config,
    build,
    gpt2_config,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import blocks

NO_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
MODELS: dict[str, Callable[[], Any]] = {
    "classifier": lambda: build(
        BertForSequenceClassification, bert_config(num_labels=3, **NO_DROPOUT["bert"])
    ),
    "masked lm": lambda: build(BertForMaskedLM, bert_config(**NO_DROPOUT["bert"])),
    "questions": lambda: build(BertForQuestionAnswering, bert_config(**NO_DROPOUT["bert"])),
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config(**NO_DROPOUT["gpt2"])),
}


def batch(kind: str, padded: bool = True, seed: int = 0, size: int = 3) -> dict[str, torch.Tensor]:
    """Inputs and labels; padded positions have no label."""
    torch.manual_seed(seed)
    ids, mask = token_ids(size), right_padding(size) if padded else torch.ones(size, 17, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "classifier":
        return {**inputs, "labels": torch.randint(0, 3, (size,))}
    if kind == "questions":
        ends = {name: torch.randint(0, 4, (size,)) for name in ("start_positions", "end_positions")}
        return {**inputs, **ends}
    labels = ids if kind == "gpt2" else torch.randint(3, VOCABULARY, ids.shape)
    return {**inputs, "labels": labels.masked_fill(mask == 0, -100)}


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained_trio(kind: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The model, patched; eager; eager in float64: all in training mode."""
    model = MODELS[kind]().to(dtype)
    trio = [model, eager_of(model), float64_of(model)]
    bk.patch(model)
    return [m.train() for m in trio]


def assert_steps_agree(
    results: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], computed_in: torch.dtype | None = None
) -> None:
    """Loss and gradients; a loss is one number, which is held to roundings of the type computed in."""
    ours, eager, reference = (loss.double() for loss, _ in results)
    rounding = 4 * torch.finfo(computed_in or results[0][0].dtype).eps * reference.abs()
    assert (ours - reference).abs() <= 2 * (eager - reference).abs() + rounding
    assert_gradients(*(grads for _, grads in results), computed_in=computed_in)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_and_every_gradient(kind: str, padded: bool) -> None:
    trio = trained_trio(kind)
    results = [loss_and_gradients(m, batch(kind, padded)) for m in trio]
    assert results[0][1].keys() == {name for name, _ in trio[0].named_parameters()}
    assert_steps_agree(results)


SMALL = build(BertForMaskedLM, bert_config(num_hidden_layers=1, **NO_DROPOUT["bert"])).train()


@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(1, 19), st.integers(0, 2**31), st.booleans())
def test_gradients_through_packing_with_any_mask(size: int, length: int, seed: int, frozen: bool) -> None:
    """Whatever is padded, the gradients are those of the padded run; holes in sequences too."""
    torch.manual_seed(seed)
    mask = torch.randint(0, 2, (size, length))
    mask[:, 0] = 1
    ids = torch.randint(3, VOCABULARY, (size, length))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model = copy.deepcopy(SMALL)
    model.bert.embeddings.requires_grad_(not frozen)
    trio = [model, eager_of(model), float64_of(model).train()]
    bk.patch(model)
    assert_steps_agree([loss_and_gradients(m, inputs) for m in trio])


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_bfloat16_weights(kind: str) -> None:
    results = [loss_and_gradients(m, batch(kind)) for m in trained_trio(kind, torch.bfloat16)]
    assert_steps_agree(results)


@pytest.mark.parametrize("kind, stem", [("masked lm", "bert.encoder.layer"), ("gpt2", "transformer.h")])
def test_frozen_parts_get_no_gradient_and_the_rest_the_same(kind: str, stem: str) -> None:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith(f"{stem}.0") or "embedding" in name or "wte" in name or "wpe" in name:
                parameter.requires_grad = False

    trio = trained_trio(kind)
    for model in trio:
        freeze(model)
    results = [loss_and_gradients(m, batch(kind)) for m in trio]
    assert not any(name.startswith(f"{stem}.0") for name in results[0][1])
    assert any(name.startswith(f"{stem}.1") for name in results[0][1])
    assert_steps_agree(results)


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
@pytest.mark.parametrize("trained", ["biases", "norms", "one projection"])
def test_training_a_few_tensors_only(kind: str, trained: str) -> None:
    trio = trained_trio(kind)
    for model in trio:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = {
                "biases": name.endswith("bias"),
                "norms": "LayerNorm" in name or "ln_" in name,
                "one projection": name.endswith(("layer.1.attention.self.key.weight", "h.1.mlp.c_fc.weight")),
            }[trained]
    results = [loss_and_gradients(m, batch(kind)) for m in trio]
    assert len(results[0][1]) >= 1
    assert_steps_agree(results)


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_gradients_add_up_over_batches(kind: str) -> None:
    model = trained_trio(kind)[0]
    separate = [loss_and_gradients(model, batch(kind, seed=seed))[1] for seed in (1, 2)]
    model.zero_grad()
    for seed in (1, 2):
        model(**batch(kind, seed=seed)).loss.backward()
    for name, parameter in model.named_parameters():
        total = separate[0][name] + separate[1][name]
        torch.testing.assert_close(parameter.grad, total, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_optimizer_steps(kind: str, optimizer: str) -> None:
    """Weights after some steps go where eager's go: each step is seen by the next forward."""
    trio = trained_trio(kind)
    start = copy.deepcopy(trio[2].state_dict())
    losses = []
    for model in trio:
        make = {
            "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4),
            "SGD": lambda p: torch.optim.SGD(p, lr=0.005),
        }
        steps = make[optimizer](model.parameters())
        run = []
        for seed in range(4):
            loss, _ = loss_and_gradients(model, batch(kind, seed=seed % 2))
            steps.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][2] < losses[0][0]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    reference = trio[2].state_dict()
    for name in trio[0].state_dict():
        if name.endswith("key.bias"):
            continue  # its gradient is rounding alone
        moved = (reference[name] - start[name]).abs().max()
        error, allowed = ((m.state_dict()[name].double() - reference[name]).abs().max() for m in trio[:2])
        assert error <= 3 * allowed + 0.01 * moved, name


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_state_dict_and_unpatching_after_training(kind: str) -> None:
    model, eager, _ = trained_trio(kind)
    steps = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(2):
        loss_and_gradients(model, batch(kind, seed=seed))
        steps.step()
    eager.load_state_dict(model.state_dict())
    inputs = batch(kind, seed=7)
    with torch.no_grad():
        expected = eager(**inputs).loss
        patched = model.eval()(**inputs).loss
        assert bk.unpatch(model) > 0
        plain = model(**inputs).loss
    torch.testing.assert_close(patched, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain, expected, atol=1e-5, rtol=1e-5)
    # and trains on, unpatched
    results = [loss_and_gradients(m.train(), inputs)[1] for m in (model, eager)]
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(kind: str, reentrant: bool) -> None:
    trio = trained_trio(kind)
    trio[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        trio[0].enable_input_require_grads()
    assert_steps_agree([loss_and_gradients(m, batch(kind)) for m in trio])


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_adapters_in_a_frozen_model(kind: str, reentrant: bool) -> None:
    """Nothing before the first adapter requires a gradient but by the hook that transformers sets."""
    base = MODELS[kind]()
    trio = [with_lora(m, kind).train() for m in (base, eager_of(base), float64_of(base))]
    bk.patch(trio[0])
    trio[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    trio[0].enable_input_require_grads()
    results = [loss_and_gradients(m, batch(kind)) for m in trio]
    assert any("lora_" in name for name in results[0][1])
    assert_steps_agree(results)


@pytest.mark.parametrize("kind", ["classifier", "masked lm", "gpt2"])
def test_autocast(kind: str) -> None:
    trio = trained_trio(kind)
    inputs = batch(kind)
    results = []
    for model, enabled in zip(trio, (True, True, False), strict=True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(**inputs)
        out.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.loss.detach(), gradients, out.logits.dtype))
    assert results[0][2] == results[1][2]
    assert results[0][0].dtype == results[1][0].dtype
    assert_steps_agree([result[:2] for result in results], computed_in=torch.bfloat16)


@pytest.mark.parametrize("how", ["plain", "checkpointing", "autocast", "lora", "dropout"])
@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_training_runs_fused_and_bert_without_padding(
    how: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for name in ("post_norm_layer", "pre_norm_layer"):
        run = getattr(blocks, name)
        monkeypatch.setattr(
            blocks, name, lambda x, *a, run=run: rows.append(x.shape[:-1].numel()) or run(x, *a)
        )
    model = MODELS[kind]().train()
    if how == "lora":
        model = with_lora(model, kind)
    bk.patch(model)
    if how == "dropout":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model(**inputs).loss
    loss.backward()
    tokens = int(inputs["attention_mask"].sum()) if kind == "classifier" else inputs["input_ids"].numel()
    assert rows == [tokens] * (4 if how == "checkpointing" else 2)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators of ours that run, with their keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bigmodel":
            self.made.append((func.__name__.split(".")[0], args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, stem", [("masked lm", "bert.encoder.layer"), ("gpt2", "transformer.h")])
def test_no_product_is_made_for_a_frozen_weight(kind: str, stem: str) -> None:
    model = MODELS[kind]().train()
    bk.patch(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f"{stem}.1" in name and name.endswith("bias")
    loss = model(**batch(kind)).loss
    with Calls() as calls:
        loss.backward()
    backward = [(name, kwargs) for name, _, kwargs in calls.made if name.endswith("_backward")]
    # The head and the last layer alone; its attention's output too, as the projections have biases.
    assert {name for name, _ in backward} >= {"linear_backward", "feed_forward_backward"}
    assert sum(name == "feed_forward_backward" for name, _ in backward) == 1
    for name, kwargs in backward:
        if name == "linear_backward":
            count = (len(kwargs["needs"]) - 4) // 2
            assert not any(kwargs["needs"][4 : 4 + count])
        elif name == "feed_forward_backward":
            assert not kwargs["needs"][1] and not kwargs["needs"][3] and kwargs["needs"][2]


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_hidden_layers_made_again_in_the_backward(kind: str) -> None:
    trio = trained_trio(kind)
    kept = saved_bytes(trio[0], batch(kind))
    report = bk.patch(trio[0], recompute=True)
    rows = [row for row in report.rows if "feed_forward" in row.ops]
    assert rows and all("again in the backward" in row.reason for row in rows)
    hidden = batch(kind)["attention_mask"].sum() if kind == "classifier" else batch(kind)["input_ids"].numel()
    width = 72 if kind == "classifier" else 4 * 48
    assert kept - saved_bytes(trio[0], batch(kind)) >= 0.9 * 2 * hidden * width * 4
    assert_steps_agree([loss_and_gradients(m, batch(kind)) for m in trio])
    assert "again" in str(bk.explain(trio[0]))
    twin = copy.deepcopy(trio[0])
    bk.unpatch(twin)
    assert not any("_bigmodel" in name for module in twin.modules() for name in vars(module))
    bk.patch(twin)
    assert "again" not in str(bk.explain(twin))


def saved_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """What a forward keeps for its backward, without the parameters."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    del loss
    return sum(kept.values())


# ------------------------------------------------------------------------------------------------------------
# compiled


@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_a_compiled_training_step(kind: str) -> None:
    """Forward and loss in one graph, the backward in its own, the optimizer's steps seen by the next call."""
    trio = trained_trio(kind)
    if kind == "gpt2":
        trio[0].loss_type = "ForCausalLM"  # else transformers logs a warning, which breaks any graph
    compiled = torch.compile(trio[0], backend="aot_eager", fullgraph=True)
    inputs = batch(kind)
    for _ in range(2):
        results = [loss_and_gradients(m, inputs) for m in (compiled, *trio[1:])]
        results[0] = (results[0][0], {k.removeprefix("_orig_mod."): v for k, v in results[0][1].items()})
        assert_steps_agree(results)
        for model in trio:
            torch.optim.SGD(model.parameters(), lr=1e-2).step()
        for model in trio[1:]:  # the same weights again, so that only one step's rounding is compared
            model.load_state_dict(trio[0].state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_a_training_step_compiled_by_inductor(kind: str) -> None:
    trio = trained_trio(kind)
    if kind == "gpt2":
        trio[0].loss_type = "ForCausalLM"
    compiled = torch.compile(trio[0], fullgraph=True)
    results = [loss_and_gradients(m, batch(kind)) for m in (compiled, *trio[1:])]
    results[0] = (results[0][0], {k.removeprefix("_orig_mod."): v for k, v in results[0][1].items()})
    assert_steps_agree(results)
    for module in trio[0].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    inputs = batch(kind)  # which seeds the generator
    losses = [compiled(**inputs).loss for _ in range(2)]
    losses[0].backward()
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------------------------------
# the ecosystem


@pytest.fixture
def accelerate() -> Any:
    """The package, with nothing left of its process-wide state before or after."""
    package = pytest.importorskip("accelerate")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield package
    package.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_trainer(options: dict[str, Any], tmp_path: Any, accelerate: Any) -> None:
    """transformers' Trainer with nothing of ours in it."""
    from transformers import Trainer, TrainingArguments

    losses = []
    rows = [{k: v[0] for k, v in batch("classifier", size=1, seed=i, padded=False).items()} for i in range(8)]
    for row in rows:
        row["attention_mask"][10:] = 0
    for patch in (True, False):
        model = MODELS["classifier"]()
        if patch:
            bk.patch(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(patch)),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
            **options,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.05 if "bf16" in options else 2e-3)


def test_accelerate(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, eager, _ = trained_trio("classifier")
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, eager)]
    wrapped, ours = accelerator.prepare(model, optimizers[0])
    for seed in range(4):
        with accelerator.accumulate(wrapped):
            loss = wrapped(**batch("classifier", seed=seed)).loss
            accelerator.backward(loss)
            ours.step()
            ours.zero_grad()
        (eager(**batch("classifier", seed=seed)).loss / 2).backward()
        if seed % 2:
            optimizers[1].step()
            optimizers[1].zero_grad()
    plain = accelerator.unwrap_model(wrapped)
    assert plain is model
    for (name, ours_), theirs in zip(plain.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs, atol=1e-5, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------------------
# LoRA

LORA = {
    "classifier": (["query", "value"], "SEQ_CLS"),
    "masked lm": (["query", "key", "value", "dense"], None),
    "gpt2": (["c_attn"], "CAUSAL_LM"),
}


def with_lora(model: Any, kind: str, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets, task = LORA[kind]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=targets,
        task_type=task,
        fan_in_fan_out=kind == "gpt2",
        **options,
    )
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return adapted


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("order", ["patch first", "adapter first"])
def test_lora(kind: str, order: str) -> None:
    base = MODELS[kind]()
    trio = [with_lora(m, kind) for m in (eager_of(base), float64_of(base))]
    if order == "patch first":
        bk.patch(base)
        model = with_lora(base, kind)
    else:
        model = with_lora(base, kind)
        report = bk.patch(model)
        adapted = [row for row in report.rows if "LoRA" in row.reason]
        assert adapted, str(report)
    trio = [m.train() for m in (model, *trio)]
    results = [loss_and_gradients(m, batch(kind)) for m in trio]
    assert results[0][1] and all("lora_" in name or "classifier" in name for name in results[0][1])
    assert_steps_agree(results)
    for m in trio:
        torch.optim.SGD(m.parameters(), lr=0.05).step()
    merged = [m.merge_and_unload().eval() for m in trio]
    if order == "adapter first":
        assert len(bk.patch(merged[0]).patched) > 0
    with torch.no_grad():
        assert_as_near(
            *(
                m(**batch(kind)).logits[batch(kind)["attention_mask"].bool()]
                if kind != "classifier"
                else m(**batch(kind)).logits
                for m in merged
            )
        )
    assert not any(isinstance(m, nn.Module) and "lora" in type(m).__module__ for m in merged[0].modules())


def test_the_report_speaks_of_adapters() -> None:
    model = with_lora(MODELS["classifier"](), "classifier")
    rows = {row.name.removeprefix("base_model.model.bert."): row for row in bk.patch(model).rows}
    attention = rows["encoder.layer.0.attention.self"]
    assert (attention.status, attention.ops) == ("patched", ("linear", "attention"))
    assert attention.reason == "query, value: LoRA, called as they are"
    assert rows["encoder"].status == "patched"
    model = with_lora(MODELS["masked lm"](), "masked lm")
    rows = {row.name.removeprefix("base_model.model.bert."): row for row in bk.patch(model).rows}
    assert rows["encoder.layer.0.attention.self"].ops == ("attention",)
    assert "feed-forward runs module by module" in rows["encoder.layer.0"].reason
    assert rows["encoder.layer.1.attention.output"].reason == "dense: LoRA, called as it is"


def test_mixed_adapters_in_a_batch_keep_the_rows_in_place() -> None:
    """peft then looks up each sample's adapter by its place in the batch, so nothing is packed."""
    model = with_lora(MODELS["classifier"](), "classifier")
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model.add_adapter(
        "other", peft.LoraConfig(r=4, target_modules=LORA["classifier"][0], init_lora_weights=False)
    )
    model.eval()
    inputs = batch("classifier")
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model(**inputs, adapter_names=names).logits
        bk.patch(model)
        out = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def kept_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """What a forward keeps for the backward beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_training_step_keeps_is_half_at_most(dtype: torch.dtype) -> None:
    """Of a model with dropout, at a length where eager and sdpa keep probabilities or masks of them; without
    dropout sdpa keeps none, and ours less than sdpa all the same, and half with `recompute`.
    """
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 256, "intermediate_size": 192}
    ids = torch.randint(3, VOCABULARY, (1, 256))
    inputs = {"input_ids": ids, "labels": torch.zeros(1, dtype=torch.long)}
    for dropout in (True, False):
        changes = {**sizes, **({} if dropout else NO_DROPOUT["bert"])}
        sdpa = build(BertForSequenceClassification, bert_config(**changes)).to(dtype).train()
        eager, ours = eager_of(sdpa).train(), copy.deepcopy(sdpa)
        bk.patch(ours)
        keeps = {
            name: kept_bytes(m, inputs) for name, m in (("eager", eager), ("sdpa", sdpa), ("ours", ours))
        }
        assert keeps["ours"] <= keeps["eager"] / 2
        assert keeps["ours"] <= keeps["sdpa"] * (0.5 if dropout else 0.75)
        bk.patch(ours, recompute=True)
        assert kept_bytes(ours, inputs) <= keeps["sdpa"] * 0.52
