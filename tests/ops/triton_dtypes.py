"""The types that the Triton tests run in."""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# float16 goes through the kernels as bfloat16 does, element type aside. Where a test of DTYPES runs an
# operator's kernels in it, the interpreter's minutes are better spent on other features.
QUICK_DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))

# A layout is where a kernel reads, a type what it computes with: each is there once, crossed pairs are slow.
LAYOUTS_AND_DTYPES = (
    ("linear", torch.float32),
    ("conv1d", torch.bfloat16),
    *(
        pytest.param(layout, dtype, marks=pytest.mark.slow)
        for layout in ("linear", "conv1d")
        for dtype in DTYPES
        if (layout, dtype) not in (("linear", torch.float32), ("conv1d", torch.bfloat16))
    ),
)
