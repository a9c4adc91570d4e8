"""A layer of a padded batch with its padding removed, in one graph whose sizes depend on the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor

import bigmodel_kernels as bk

HEADS, HIDDEN = 2, 32


def layer(
    ids: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    table: Tensor,
    qkv: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    ones: Tensor,
) -> Tensor:
    places = mask.flatten().nonzero().squeeze(1)
    positions = torch.arange(mask.shape[1]).expand_as(mask).flatten()[places]
    x = bk.embedding(ids.flatten()[places], table, positions, table[:8], norm_weight=ones)
    query, key, value = bk.linear(x, qkv).view(-1, 3, HEADS, HIDDEN // HEADS).unbind(1)
    longest = mask.shape[1]
    out: Any = bk.attention(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    x = bk.layer_norm(out.flatten(1), ones, None, residual=x)
    x = bk.feed_forward(
        x, w_in, None, w_out, None, activation="gelu", residual=x, norm_position="post", norm_weight=ones
    )
    return torch.zeros(mask.numel(), HIDDEN).index_put((places,), x).view(*mask.shape, HIDDEN)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_depend_on_the_data(backend: str) -> None:
    torch._dynamo.reset()
    shapes = ((20, HIDDEN), (3 * HIDDEN, HIDDEN), (64, HIDDEN), (HIDDEN, 64), (HIDDEN,))
    parameters = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for lengths in ((8, 3, 1), (5, 8, 2)):
        ids = torch.randint(0, 20, (3, 8))
        mask = torch.stack([torch.arange(8) < n for n in lengths])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        expected = layer(ids, mask, cu_seqlens, *parameters)
        out = compiled(ids, mask, cu_seqlens, *parameters)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.square().sum(), parameters), atol=1e-2, rtol=1e-3
        )
