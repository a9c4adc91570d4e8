"""Operators under torch.func: gradients of any nesting that has only first derivatives are those of autograd,
and what has no derivative says so at every level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from transformers import BertForSequenceClassification

import bigmodel_kernels as bk
from bigmodel_kernels.models.tiny import bert_config, build, token_ids


def make(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


TARGET = torch.tensor([[0, 3, 5, -100, 1]] * 3)
ANGLES = make(1, 7, 8)
IDS = torch.tensor([[1, 2, 0]])

CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "attention": (
        lambda q, k, v: bk.attention(q, k, v, is_causal=True),
        (make(2, 4, 7, 16), make(2, 2, 7, 16), make(2, 2, 7, 16)),
    ),
    "attention with bias": (
        lambda q, k, bias: bk.attention(q, k, k, bias=bias),
        (make(2, 4, 7, 16), make(2, 2, 7, 16), make(1, 4, 7, 7)),
    ),
    "linear": (lambda x, w, b: bk.linear(x, [w, w * 2], [b, b]), (make(3, 5, 8), make(6, 8), make(6))),
    "feed_forward": (
        lambda x, w_in, w_out: bk.feed_forward(x, w_in, None, w_out, None, activation="silu", residual=x),
        (make(3, 5, 8), make(10, 8), make(8, 10)),
    ),
    "layer_norm": (bk.layer_norm, (make(3, 5, 8), make(8), make(8) + 1)),
    "rms_norm": (bk.rms_norm, (make(3, 5, 8), make(8))),
    "embedding": (
        lambda words, positions: bk.embedding(IDS, words, torch.arange(3)[None], positions),
        (make(9, 8), make(5, 8)),
    ),
    "rotary": (
        lambda q, k: torch.cat(bk.rotary(q, k, ANGLES.cos(), ANGLES.sin()), 1),
        (make(2, 4, 7, 16), make(2, 2, 7, 16)),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: bk.linear_cross_entropy(x, w, TARGET, b),
        (make(3, 5, 8), make(6, 8), make(6)),
    ),
    "linear_cross_entropy of each": (
        lambda x, w, b: bk.linear_cross_entropy(x, w, TARGET, b, reduction="none"),
        (make(3, 5, 8), make(6, 8), make(6)),
    ),
}
OF_SECOND_ORDER = {"rotary"}


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(*args: Tensor) -> Tensor:
        out = function(*args)
        return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + 3 * out.sum()

    return loss


def by_autograd(loss: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in args]
    return torch.autograd.grad(loss(*leaves), leaves)


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_first_derivatives(name: str) -> None:
    function, args = CALLS[name]
    loss, places = loss_of(function), tuple(range(len(args)))
    expected = by_autograd(loss, args)
    assert_equal(grad(loss, argnums=places)(*args), expected)
    out, pull = vjp(function, *args)
    assert_equal(
        pull(torch.linspace(-1, 1, out.numel()).view(out.shape) + 3),
        expected,
    )
    with torch.no_grad():
        assert_equal(grad(loss, argnums=places)(*args), expected)


@pytest.mark.parametrize("name", CALLS)
def test_of_each_element(name: str) -> None:
    function, args = CALLS[name]
    loss, places = loss_of(function), tuple(range(len(args)))
    many = [torch.stack([t, t * 0.5, t + 1]) for t in args]
    expected = [by_autograd(loss, parts) for parts in zip(*many, strict=True)]
    assert_equal(
        vmap(grad(loss, argnums=places))(*many), [torch.stack(t) for t in zip(*expected, strict=True)]
    )
    (jacobian,) = jacrev(function, argnums=(0,))(*args)
    expected_jacobian = torch.autograd.functional.jacobian(lambda first: function(first, *args[1:]), args[0])
    assert_equal([jacobian], [expected_jacobian])


@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_derivative_says_so(name: str) -> None:
    """Were a level passed by, it would take the result for a constant."""
    function, args = CALLS[name]

    def square(first: Tensor) -> Tensor:
        return function(first, *args[1:]).square().sum()

    first = args[0]
    ways: dict[str, Callable[[], Any]] = {
        "grad of grad": lambda: grad(lambda t: grad(square)(t).square().sum())(first),
        "vjp of grad": lambda: vjp(grad(square), first)[1](first)[0],
        "backward of grad": lambda: by_autograd(lambda t: grad(square)(t).square().sum(), (first,)),
    }
    for way in ways.values():
        if name in OF_SECOND_ORDER:
            way()
            continue
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            way()
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        jvp(grad(square), (first,), (first,))


def test_an_operator_without_a_gradient() -> None:
    query, key = make(2, 4, 7, 16), make(2, 2, 7, 16)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        grad(lambda q: bk.attention_statistics(q, key).entropy.sum())(query)
    lengths = torch.tensor([7, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="has no gradient"):
        grad(lambda q: bk.attention_decode(q, key, key, lengths).sum())(query)


def test_gradients_of_each_text_of_a_patched_model() -> None:
    model: Any = build(BertForSequenceClassification, bert_config())
    bk.patch(model)
    ids, labels = token_ids(), torch.tensor([0, 1, 1])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], text: Tensor, label: Tensor) -> Tensor:
        out = functional_call(model, parameters, (text[None],))
        return torch.nn.functional.cross_entropy(out.logits, label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, ids, labels)
    for i in range(len(ids)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(ids[i : i + 1]).logits, labels[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad, atol=1e-4, rtol=1e-3)
