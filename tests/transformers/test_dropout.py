"""Dropout in patched models: where eager has it, as much as eager has, and reproducible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, BertModel, GPT2LMHeadModel, GPT2Model

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import eager_of
from bigmodel_kernels.models.tiny import (
    bert_config,
    build,
    gpt2_config,
    right_padding,
    token_ids,
)

BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES: dict[str, Callable[[], Any]] = {
    "bert hidden": lambda: build(
        BertModel, bert_config(num_hidden_layers=1, **{**BERT, "hidden_dropout_prob": 0.3})
    ),
    "bert attention": lambda: build(
        BertModel, bert_config(num_hidden_layers=1, **{**BERT, "attention_probs_dropout_prob": 0.3})
    ),
    "gpt2 embeddings": lambda: build(GPT2Model, gpt2_config(n_layer=1, **{**GPT2, "embd_pdrop": 0.3})),
    "gpt2 residual": lambda: build(GPT2Model, gpt2_config(n_layer=1, **{**GPT2, "resid_pdrop": 0.3})),
    "gpt2 attention": lambda: build(GPT2Model, gpt2_config(n_layer=1, **{**GPT2, "attn_pdrop": 0.3})),
}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: build(BertForMaskedLM, bert_config(hidden_dropout_prob=0.2)).train(),
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config(resid_pdrop=0.2)).train(),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_and_variance_are_those_of_eager(case: str) -> None:
    """The same sequence many times in a batch is as many samples. The last tokens of some are padding."""
    samples, length = 1500, 6
    model = CASES[case]().train()
    eager = eager_of(model)
    bk.patch(model)
    ids = token_ids(1, length).expand(samples, length)
    mask = torch.ones_like(ids)
    mask[: samples // 2, -1] = 0
    with torch.no_grad():
        ours, theirs = (m(ids, attention_mask=mask)[0].double() for m in (model, eager))
    for half, tokens in ((slice(0, samples // 2), length - 1), (slice(samples // 2, samples), length)):
        a, b = ours[half, :tokens], theirs[half, :tokens]
        count = a.shape[0]
        spread = ((a.var(0) + b.var(0)) / count).sqrt()
        assert spread.min() > 0  # something is dropped everywhere
        assert ((a.mean(0) - b.mean(0)).abs() / spread).max() < 5
        # The variance of a sample variance depends on the fourth moment.
        fourth = sum(((x - x.mean(0)) ** 4).mean(0) - x.var(0) ** 2 for x in (a, b)) / count
        assert ((a.var(0) - b.var(0)).abs() / fourth.sqrt()).max() < 5.5
        # Samples are independent of each other: the mean of many varies as little as it should.
        halves = a.view(2, count // 2, *a.shape[1:]).mean(1)
        assert ((halves[0] - halves[1]).abs() / (a.var(0) * 4 / count).sqrt()).max() < 5


def run(model: Any, seed: int, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    model.zero_grad()
    logits = model(**inputs).logits
    (logits.double() * inputs["attention_mask"][..., None]).square().mean().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: Any, other: Any) -> None:
    """Logits and gradients from the same draws. How products round depends on where in memory their operands
    happen to lie; another draw would be off by far more."""
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(other[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    return {"input_ids": token_ids(), "attention_mask": right_padding()}


@pytest.mark.parametrize("kind", MODELS)
def test_the_generator_of_torch_decides(kind: str) -> None:
    model, given = MODELS[kind](), inputs()
    bk.patch(model)
    first, again, other = (run(model, seed, **given) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.allclose(first[0], other[0], atol=1e-2)
    torch.manual_seed(1)
    with torch.no_grad():
        one, two = model(**given).logits, model(**given).logits
    torch.testing.assert_close(one, first[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one, two, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same(kind: str, reentrant: bool) -> None:
    model, given = MODELS[kind](), inputs()
    bk.patch(model)
    if reentrant:
        model.enable_input_require_grads()
    plain = run(model, 1, **given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = run(model, 1, **given)
    assert_same(plain, checkpointed)


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_is_that_of_what_was_dropped(kind: str) -> None:
    """Against differences of the loss with the same seed, in float64."""
    model, given = MODELS[kind]().double(), inputs()
    bk.patch(model)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return (model(**given).logits * given["attention_mask"][..., None]).square().mean()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    direction = [torch.randn_like(p) for p in model.parameters()]
    expected = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (step, -2 * step):
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter.add_(d, alpha=sign)
            ends.append(loss())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_dropped_in_evaluation_or_with_a_probability_of_zero(kind: str) -> None:
    model, given = MODELS[kind](), inputs()
    eager = eager_of(model).eval()
    bk.patch(model)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**given).logits[real]
        torch.testing.assert_close(model.eval()(**given).logits[real], expected, atol=1e-4, rtol=1e-4)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.testing.assert_close(model(**given).logits[real], expected, atol=1e-4, rtol=1e-4)


def test_everything_can_be_dropped() -> None:
    """A probability of one leaves the residuals, as in eager."""
    model, given = MODELS["gpt2"](), inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not model.transformer.drop:
            module.p = 1.0
    model.transformer.drop.p = 0.0
    eager = eager_of(model)
    bk.patch(model)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**given).logits[real]
        torch.testing.assert_close(model(**given).logits[real], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_compiled(kind: str) -> None:
    model, given = MODELS[kind](), inputs()
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first, again, other = (run(compiled, seed, **given) for seed in (1, 1, 2))
    assert_same(first, again)
    assert not torch.allclose(first[0], other[0], atol=1e-2)
    # The backward sees what the forward dropped: as uncompiled with the same draws, which padding changes.
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    pair = [run(m, 3, **given) for m in (compiled, model)]
    torch.testing.assert_close(pair[0][0], pair[1][0], atol=1e-4, rtol=1e-4)
    for name, gradient in pair[1][1].items():
        torch.testing.assert_close(pair[0][1][f"_orig_mod.{name}"], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_generation_in_training_mode() -> None:
    """Dropout with a cache: one query to many keys."""
    model = MODELS["gpt2"]()
    bk.patch(model)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(
            model.generate(token_ids(2, 5) * 0 + 7, max_new_tokens=12, do_sample=False, pad_token_id=0)
        )
    assert made[0].shape == (2, 17)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
