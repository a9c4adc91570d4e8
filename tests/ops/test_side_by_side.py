"""Cutting a tensor into parts, and the gradient that is one tensor where the parts' gradients lie in one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigmodel_kernels.ops import side_by_side
from bigmodel_kernels.ops.attention import attention

SIZES = (24, 8, 8)


class _Gives(torch.autograd.Function):
    """Its gradients are those that it is given, as an operator's are that writes them into one tensor."""

    @staticmethod
    def forward(ctx, grads, *parts):  # type: ignore[no-untyped-def]
        ctx.grads = grads
        return parts[0].sum()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return (None, *ctx.grads)


def gradient_of(whole: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    (result,) = torch.autograd.grad(_Gives.apply(grads, *side_by_side.cut(whole, SIZES)), whole)
    return result


def test_a_gradient_that_lies_in_one_tensor_is_not_copied() -> None:
    whole = torch.randn(2, 3, 40, requires_grad=True)
    assert all(map(torch.equal, side_by_side.cut(whole, SIZES), whole.split(SIZES, -1)))
    one = torch.randn(2, 3, 40)
    got = gradient_of(whole, one.split(SIZES, -1))
    assert got.data_ptr() == one.data_ptr() and got.is_contiguous() and torch.equal(got, one)


@pytest.mark.parametrize("kind", ["apart", "in another order", "more beside", "one from elsewhere", "a hole"])
def test_any_other_gradient_is_put_together(kind: str) -> None:
    whole = torch.randn(2, 3, 40, requires_grad=True)
    one = torch.randn(2, 3, 48)
    parts = one.split((*SIZES, 8), -1)
    grads = {
        "apart": tuple(p.contiguous() for p in parts[:3]),
        "in another order": (parts[0], parts[2], parts[1]),
        "more beside": parts[:3],
        "one from elsewhere": (*torch.randn(2, 3, 40).split(SIZES, -1)[:2], parts[2]),
        "a hole": (parts[0], parts[1], parts[3]),
    }[kind]
    assert side_by_side.whole_of(grads) is None
    assert torch.equal(gradient_of(whole, grads), torch.cat(grads, -1))


def test_a_part_that_is_not_used_has_a_gradient_of_zeros() -> None:
    whole = torch.randn(2, 40, requires_grad=True)
    (got,) = torch.autograd.grad(side_by_side.cut(whole, SIZES)[1].sum(), whole)
    assert torch.equal(got, torch.zeros(2, 40).index_fill_(1, torch.arange(24, 32), 1.0))


def test_a_second_derivative() -> None:
    whole = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: [p.pow(3) for p in side_by_side.cut(x, SIZES)], whole)


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_heads_of_one_projection_are_known(kv_heads: int, packed: bool) -> None:
    """Also where the batch is one; not where keys are another tensor's, or rows hold more."""
    counts = (3, kv_heads, kv_heads)
    for batch in (1, 2):
        whole = torch.randn(*(() if packed else (batch,)), 5, sum(counts) * 8)
        parts = [t.unflatten(-1, (-1, 8)) for t in whole.split([8 * n for n in counts], -1)]
        query, key, value = parts if packed else [t.transpose(1, 2) for t in parts]
        known = side_by_side.heads_lie_side_by_side
        assert known((query, key, value))
        assert not known((query, key)) and not known((query, value, key))
        assert not known((query, key.clone(), value)) and not known((query, key, value[..., :4]))


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_the_gradient_of_a_projection_for_attention(kv_heads: int) -> None:
    """Is that of the parts as torch cuts them."""
    counts = (3, kv_heads, kv_heads)
    whole = torch.randn(2, 5, 8 * sum(counts), requires_grad=True)
    results = []
    for parts in (side_by_side.cut(whole, [8 * n for n in counts]), whole.split([8 * n for n in counts], -1)):
        query, key, value = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in parts)
        out = attention(query, key, value, is_causal=True)
        results += torch.autograd.grad(out.square().sum(), whole)
    assert torch.equal(*results)


@pytest.mark.parametrize("kv_heads", [3, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_attention_are_written_into_one_tensor(
    kv_heads: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the default backend of the CPU, to the bits of those that lie apart."""
    counts = (3, kv_heads, kv_heads)
    whole = torch.randn(*((11,) if packed else (2, 5)), sum(counts) * 8, requires_grad=True)
    lengths = torch.tensor([0, 4, 11], dtype=torch.int32)
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 7, "max_seqlen_k": 7}

    def gradient(apart: bool) -> Tensor:
        parts = [t.unflatten(-1, (-1, 8)) for t in side_by_side.cut(whole, [8 * n for n in counts])]
        parts = [t.clone() if apart else t for t in parts]
        query, key, value = parts if packed else [t.transpose(1, 2) for t in parts]
        out = attention(query, key, value, **(options if packed else {}))
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return torch.autograd.grad((out * weights).sum(), whole)[0]

    want = gradient(apart=True)
    with monkeypatch.context() as patch:
        patch.setattr(side_by_side.torch, "cat", None)
        got = gradient(apart=False)
    assert torch.equal(got, want)
