"""Example calls: one for every public operator, which its backend runs."""

from __future__ import annotations

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.ops.examples import OPERATORS, example


def test_every_public_operator_has_one() -> None:
    assert set(OPERATORS) == set(backends._PUBLIC)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("head_dim", [64, 17])
def test_it_runs(op: str, head_dim: int) -> None:
    args, kwargs = example(op, torch.float32, "cpu", head_dim)
    result = getattr(bk, op)(*args, **kwargs)
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.isfinite().all()


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match=r"op='magic' is unknown; allowed are attention, "):
        example("magic", torch.float32, "cpu")
