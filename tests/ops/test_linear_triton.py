"""The Triton linear kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops.linear import reference
from bigmodel_kernels.ops.linear import triton as kernel
from bigmodel_kernels.triton_runtime import AMPERE, BLACKWELL, HOPPER, INTERPRETED, MI300
from bigmodel_kernels.verify import compare, linear_formula, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _weights(k: int, *sizes: int, dtype: torch.dtype = torch.float32, layout: str = "linear") -> list[Tensor]:
    return [_tensor(*((n, k) if layout == "linear" else (k, n)), dtype=dtype) / k**0.5 for n in sizes]


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(v) for v in value]
    return value.double() if isinstance(value, Tensor) else value


def _check(x: Tensor, weights: list[Tensor], biases: list[Tensor], **options: Any) -> Tensor:
    """Runs the kernel and holds it to the numerics rule."""
    assert kernel.supports(x, weights, biases, **options) is None
    out = kernel.run(x, weights, biases, **options)
    exact = reference.run(
        _double(x), _double(weights), _double(biases), **{k: _double(v) for k, v in options.items()}
    )
    assert out.shape == exact.shape and out.dtype == x.dtype and out.is_contiguous()
    verdict = compare(out, linear_formula(x, weights, biases or None, **options), exact)
    assert verdict.ok, verdict
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    for layout in ("linear", "conv1d"):
        x = 3 * _tensor(17, 48, dtype=dtype)
        weights = _weights(48, 65, dtype=dtype, layout=layout)
        _check(x, weights, [_tensor(65, dtype=dtype)], activation=activation, weight_layout=layout)


@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_activations_far_from_zero(activation: str) -> None:
    """Exponentials overflow at the ends and nothing may become NaN but NaN."""
    x = torch.tensor(
        [[-1e4, -100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 100.0, 1e4, torch.nan]], device=DEVICE
    ).t()
    out = kernel.run(x, [torch.ones(1, 1, device=DEVICE)], [], activation=activation)
    exact = reference.run(x.double(), [torch.ones(1, 1, device=DEVICE).double()], [], activation=activation)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (1, 200, 17), (17, 17, 17), (127, 129, 33), (129, 64, 127), (3, 300, 260)]
)
def test_sizes(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    _check(_tensor(m, k, dtype=dtype), _weights(k, n, dtype=dtype), [_tensor(n, dtype=dtype)])


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_several_weights_with_all_that_follows(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weights = _tensor(2, 9, 40, dtype=dtype), _weights(40, 33, 16, 7, dtype=dtype, layout=layout)
        biases = [_tensor(w.shape[layout == "conv1d"], dtype=dtype) for w in weights]
        options: dict[str, Any] = {"weight_layout": layout, "activation": "gelu"}
        _check(x, weights, biases, **options)
        _check(x, weights, [], **options)
        options["residual"] = _tensor(2, 9, 56, dtype=dtype)
        _check(x, weights, biases, **options)
        _check(x, weights, biases, norm_weight=_tensor(56, dtype=dtype), **options)
        _check(
            x,
            weights,
            biases,
            norm_weight=_tensor(56, dtype=dtype),
            norm_bias=_tensor(56, dtype=dtype),
            **options,
        )


def test_shapes_without_elements() -> None:
    weights = _weights(8, 5)
    assert _check(_tensor(0, 8), weights, []).shape == (0, 5)
    assert _check(_tensor(8), weights, []).shape == (5,)
    assert kernel.run(_tensor(3, 8), [_tensor(0, 8)], []).shape == (3, 0)
    assert (kernel.run(_tensor(3, 0), [_tensor(4, 0)], [torch.ones(4, device=DEVICE)]) == 1).all()


def test_strides() -> None:
    """Any strides of x, weights and residual; a weight that is a slice of a fused one."""
    fused = _tensor(3 * 20, 2 * 24)
    weights = [fused[20:40, ::2], fused[:20, 24:]]
    _check(_tensor(24, 9).t(), weights, [])
    _check(_tensor(2, 24, 9).transpose(1, 2), weights, [], residual=_tensor(2, 40, 9).transpose(1, 2))
    _check(_tensor(9, 48)[:, ::2], weights, [fused[0, :20], fused[:20, 0]], residual=_tensor(9, 80)[:, ::2])
    _check(_tensor(1, 24).expand(7, 24), weights, [], residual=_tensor(40).expand(7, 40))


@pytest.mark.parametrize("tile", [*kernel._HALF_TILES, *kernel._FLOAT_TILES], ids=str)
def test_every_tile(tile: kernel.GemmTile, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile each way, with edges, whatever the cost model would have chosen."""
    monkeypatch.setattr(kernel, "gemm_tile", lambda *_: tile)
    dtype = torch.float32 if tile in kernel._FLOAT_TILES else torch.bfloat16
    m, n = tile.tile_m + 3, tile.tile_n + 5
    _check(_tensor(m, 144, dtype=dtype), _weights(144, n, dtype=dtype), [_tensor(n, dtype=dtype)])


def test_grouped_order_visits_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than one group has, and a last group that is smaller."""
    monkeypatch.setattr(kernel, "gemm_tile", lambda *_: kernel.GemmTile(16, 16, 16, 1, 1))
    _check(_tensor(16 * 11 + 1, 16), _weights(16, 16 * 3 + 1), [])


@pytest.mark.parametrize(
    "target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=["sm_80", "sm_90", "sm_100", "gfx942"]
)
def test_cost_model(target: Any) -> None:
    for m in (1, 17, 512, 4096, 100_000):
        for n in (1, 768, 3072):
            for k in (1, 768, 4096):
                for itemsize in (2, 4):
                    tile = kernel.gemm_tile(m, n, k, itemsize, target)
                    stage = (tile.tile_m + tile.tile_n) * tile.tile_k * itemsize
                    assert stage * tile.num_stages <= target.shared_memory and tile.tile_k >= 16
    assert kernel.gemm_tile(16_384, 4096, 4096, 2, target).tile_m == 128
    assert kernel.gemm_tile(8, 768, 768, 2, target).tile_m == 16


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    x, weights = _tensor(9, 24), _weights(24, 20, 10)
    assert bk.explain("linear", x, weights).chosen == "triton"
    assert torch.equal(
        bk.linear(x, weights, activation="silu"), kernel.run(x, weights, [], activation="silu")
    )


def test_reasons() -> None:
    x, weights = _tensor(3, 4), _weights(4, 5)
    assert "float64" in str(kernel.supports(x.double(), weights, []))
    assert "bfloat16" in str(kernel.supports(x, [weights[0].bfloat16()], []))
    assert "swish" in str(kernel.supports(x, weights, [], activation="swish"))
