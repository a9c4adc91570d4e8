"""Gradients of a kernel against those of a formula in float64, by the numerics rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.verify import compare


def gradients(
    formula: Callable[..., Tensor], tensors: Mapping[str, Tensor | None], upstream: Tensor, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """The formula's result ("out") and the gradients of its tensors, computed in ``dtype``."""
    leaves = {
        name: None if t is None else t.detach().to(dtype).requires_grad_() for name, t in tensors.items()
    }
    out = formula(**leaves)
    out.backward(upstream.to(dtype))
    return {"out": out.detach(), **{name: None if t is None else t.grad for name, t in leaves.items()}}


def check_against_formula(
    formula: Callable[..., Tensor],
    tensors: Mapping[str, Tensor | None],
    upstream: Tensor,
    results: Mapping[str, Tensor],
) -> None:
    """``results``: "out" and gradients of ``tensors``, all or some; empty (0,) for those that are None."""
    dtype = upstream.dtype
    exact = gradients(formula, tensors, upstream, torch.float64)
    eager: dict[str, Any] = gradients(formula, tensors, upstream, dtype)
    assert set(results) <= set(exact)
    for name, ours in results.items():
        expected = exact[name]
        if expected is None:
            assert ours.shape == (0,), name
            continue
        assert ours.dtype == dtype and ours.is_contiguous(), name
        verdict = compare(ours, eager[name], expected, "forward" if name == "out" else "gradient")
        assert verdict.ok, (name, verdict)
