"""What the tests of the compiled library share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bigmodel_kernels import _native


@pytest.fixture(params=torch.ops.bigmodel.cpu_isas().split(", ") if _native.available() else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU and build can run, in its turn."""
    before = torch.ops.bigmodel.cpu_isa()
    torch.ops.bigmodel.cpu_set_isa(request.param)
    yield request.param
    torch.ops.bigmodel.cpu_set_isa(before)
