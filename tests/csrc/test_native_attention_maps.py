"""What attention looks at, by the compiled library, for every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigmodel_kernels import _native
from bigmodel_kernels.ops.attention_maps import native, prepare, prepare_probabilities, reference

pytestmark = pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))


CALLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 1, 1, 1, 1, 1), {}),
    ((2, 4, 2, 70, 300, 64), {"is_causal": True}),
    ((1, 6, 2, 127, 129, 40), {"window": (40, 3), "softcap": 5.0}),
    ((2, 2, 1, 50, 60, 256), {"key_padding_mask": torch.arange(120).view(2, 60) % 120 < 90}),
    ((1, 4, 4, 130, 131, 16), {"sinks": torch.linspace(-1, 2, 4), "alibi_slopes": torch.linspace(0.1, 1, 4)}),
    ((1, 2, 2, 33, 257, 80), {"bias": torch.linspace(-3, 3, 257).repeat(33, 1)}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("size", "options"), CALLS, ids=str)
def test_against_float64(
    isa: str, size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    batch, heads, kv_heads, queries, keys, dim = size
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key = torch.randn(batch, kv_heads, keys, dim).to(dtype)
    wide = {
        name: t.double() if torch.is_tensor(t) and t.is_floating_point() and name != "alibi_slopes" else t
        for name, t in options.items()
    }
    args, raw = prepare(query, key, top_k=3, **options)
    right = reference.run_statistics(*prepare(query.double(), key.double(), top_k=3, **wide)[0], **raw)
    for got, expected in zip(native.run_statistics(*args, **raw), right, strict=True):
        if expected.is_floating_point():
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    chosen = {"heads": [heads - 1, 0], "queries": [queries - 1, 0]}
    for some in ({}, chosen):
        args, raw = prepare_probabilities(query, key, **some, **options)
        right = reference.run_probabilities(
            *prepare_probabilities(query.double(), key.double(), **wide)[0], **raw
        )
        rounding = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        torch.testing.assert_close(
            native.run_probabilities(*args, **raw).double(), right, rtol=rounding, atol=1e-6
        )


def test_bad_arguments_are_refused() -> None:
    (query, key, *rest), _ = prepare_probabilities(torch.randn(1, 2, 8, 16), torch.randn(1, 2, 9, 16))
    call = torch.ops.bigmodel.cpu_attention_probabilities
    numbers = (0, 0, 0.25, False, -1, -1, 0.0)
    with pytest.raises(RuntimeError, match="queries: 8 must be 0 to 7"):
        call(query, key, *rest, torch.tensor([8]), *numbers)
    with pytest.raises(RuntimeError, match=r"query_padding_mask: shape .* must be \(1, 8\)"):
        call(query, key, None, torch.ones(1, 9, dtype=torch.bool), *rest[2:], None, *numbers)
    with pytest.raises(RuntimeError, match="top_k: 65 must be 0 to 64"):
        torch.ops.bigmodel.cpu_attention_statistics(query, key, *rest, *numbers, 65)
