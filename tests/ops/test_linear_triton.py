"""The Triton linear kernel against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradient_checks import check_against_formula
from torch import Tensor
from triton_dtypes import DTYPES, LAYOUTS_AND_DTYPES, QUICK_DTYPES

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops import philox
from bigmodel_kernels.ops.linear import reference
from bigmodel_kernels.ops.linear import triton as kernel
from bigmodel_kernels.ops.linear import triton_gemm as gemm
from bigmodel_kernels.triton_runtime import AMPERE, BLACKWELL, HOPPER, INTERPRETED, MI300
from bigmodel_kernels.verify import compare, linear_formula, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"


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


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
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


def _use(monkeypatch: pytest.MonkeyPatch, tile: gemm.GemmTile) -> None:
    """This tile, whatever the cost model would have chosen."""
    monkeypatch.setattr(gemm, "gemm_tiles", lambda *_, **__: [tile])


@pytest.mark.parametrize("tile", [*gemm.HALF_TILES, *gemm.FLOAT_TILES], ids=str)
def test_every_tile(tile: gemm.GemmTile, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile each way, with edges, whatever the cost model would have chosen."""
    _use(monkeypatch, tile)
    dtype = torch.float32 if tile in gemm.FLOAT_TILES else torch.bfloat16
    m, n = tile.tile_m + 3, tile.tile_n + 5
    _check(_tensor(m, 144, dtype=dtype), _weights(144, n, dtype=dtype), [_tensor(n, dtype=dtype)])


def test_grouped_order_visits_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows of tiles than one group has, and a last group that is smaller."""
    _use(monkeypatch, gemm.GemmTile(16, 16, 16, 1, 1))
    _check(_tensor(16 * 11 + 1, 16), _weights(16, 16 * 3 + 1), [])


@pytest.mark.parametrize(
    "target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=["sm_80", "sm_90", "sm_100", "gfx942"]
)
def test_cost_model(target: Any) -> None:
    for m in (1, 17, 512, 4096, 100_000):
        for n in (1, 768, 3072):
            for k in (1, 768, 4096):
                for itemsize, products, split in ((2, 1, False), (4, 1, True), (2, 2, False), (2, 1, True)):
                    options = {"products": products, "split": split, "descriptors": target.warpgroups}
                    tiles = gemm.gemm_tiles(m, n, k, itemsize, target, **options)
                    assert 1 <= len(tiles) <= gemm.MAX_CANDIDATES and len(set(tiles)) == len(tiles)
                    for tile in tiles:
                        stage = (tile.tile_m + products * tile.tile_n) * tile.tile_k * itemsize
                        assert stage * tile.num_stages <= target.shared_memory and tile.tile_k >= 16
                        assert tile.splits == 1 or split
    assert gemm.gemm_tiles(16_384, 4096, 4096, 2, target)[0].tile_m == 128
    assert gemm.gemm_tiles(8, 768, 768, 2, target)[0].tile_m == 16
    assert gemm.gemm_tiles(384, 384, 65_536, 2, target, split=True)[0].splits > 1
    assert gemm.gemm_tiles(16_384, 4096, 4096, 2, target, descriptors=True)[0].descriptors


SEED = 2**40 + 77


def _check_both_ways(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor | None = None,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, *, dropout_p: float = 0.0,
    norm_kind: str = "layer_norm", recompute: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Output and all gradients, by the numerics rule."""
    size = sum(w.shape[options.get("weight_layout") == "conv1d"] for w in weights)
    rows = x.numel() // x.shape[-1]
    seed = torch.tensor(SEED, device=DEVICE) if dropout_p else None

    def formula(x: Tensor, residual: Any, norm_weight: Any, norm_bias: Any, **parameters: Tensor) -> Tensor:
        ws = [parameters[f"weight {i}"] for i in range(len(weights))]
        bs = [parameters[f"bias {i}"] for i in range(len(biases))]
        y = linear_formula(x, ws, bs or None, **options)
        if dropout_p:
            keep = philox.keep_elements(torch.tensor(SEED), dropout_p, rows, size, x.dtype, x.device)
            y = y * keep.view(y.shape)
        y = y if residual is None else y + residual
        if norm_weight is None:
            return y
        if norm_kind == "rms_norm":
            return torch.nn.functional.rms_norm(y, y.shape[-1:], norm_weight, 1e-5)
        return torch.nn.functional.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, 1e-5)

    tensors = {
        "x": x, "residual": residual, "norm_weight": norm_weight, "norm_bias": norm_bias,
        **{f"weight {i}": w for i, w in enumerate(weights)}, **{f"bias {i}": b for i, b in enumerate(biases)},
    }  # fmt: skip
    arguments = (x, weights, biases, residual, norm_weight, norm_bias, seed)
    options_of_call = {**options, "dropout_p": dropout_p, "norm_kind": norm_kind}
    assert kernel.supports_training(*arguments, **options_of_call) is None
    out, preactivation, prenorm = kernel.run_training(*arguments, **options_of_call)
    assert torch.equal(out, kernel.run(*arguments, **options_of_call))
    assert preactivation.shape == ((0,) if options.get("activation", "none") == "none" else out.shape)
    assert prenorm.shape == ((0,) if norm_weight is None else out.shape)
    upstream = _tensor(*out.shape, dtype=x.dtype)
    saved = [None if recompute or t.shape == (0,) else t for t in (preactivation, prenorm)]
    assert kernel.supports_backward(upstream, *arguments, *saved, **options_of_call) is None
    grads = kernel.run_backward(
        upstream, *arguments, *saved, **options_of_call, needs=[t is not None for t in tensors.values()]
    )
    check_against_formula(formula, tensors, upstream, {"out": out, **dict(zip(tensors, grads, strict=True))})


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
def test_gradients_of_activations(activation: str, layout: str, dtype: torch.dtype) -> None:
    weights = _weights(48, 65, dtype=dtype, layout=layout)
    bias = _tensor(65, dtype=dtype)
    options: dict[str, Any] = {"activation": activation, "weight_layout": layout}
    _check_both_ways(_tensor(17, 48, dtype=dtype), weights, [bias], recompute=layout == "linear", **options)


@pytest.mark.parametrize("norm_kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_gradients_of_all_that_follows(dtype: torch.dtype, norm_kind: str) -> None:
    layout = "linear" if norm_kind == "layer_norm" else "conv1d"
    x, weights = _tensor(2, 5, 24, dtype=dtype), _weights(24, 32, 32, 9, dtype=dtype, layout=layout)
    biases = [_tensor(w.shape[layout == "conv1d"], dtype=dtype) for w in weights]
    residual, vector = _tensor(2, 5, 73, dtype=dtype), _tensor(73, dtype=dtype)
    options: dict[str, Any] = {"weight_layout": layout, "dropout_p": 0.3}
    _check_both_ways(x, weights, biases, residual, **options)
    norm_bias = vector + 1 if norm_kind == "layer_norm" else None
    arguments = (x, weights, [], residual, vector, norm_bias)
    options["norm_kind"] = norm_kind
    _check_both_ways(*arguments, activation="silu", **options)
    _check_both_ways(*arguments, activation="silu", recompute=True, **options)
    # One weight: the norm's kernel drops, and sums for the bias.
    weight, bias = _weights(24, 73, dtype=dtype, layout=layout), _tensor(73, dtype=dtype)
    for given in (residual, None):
        _check_both_ways(x, weight, [bias], given, vector, norm_bias, **options)
    _check_both_ways(x, weight, [bias], residual, vector, norm_bias, **{**options, "dropout_p": 0.0})


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_gradients_of_several_weights_by_the_vendors_library(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One product for all of them, where rows of one matrix are the gradients; also of equal weights."""
    monkeypatch.setattr(kernel, "_by_library", lambda x: True)
    dtype = torch.bfloat16
    for sizes in ((40, 8, 8), (24, 24, 24)):
        weights = _weights(24, *sizes, dtype=dtype, layout=layout)
        biases = [_tensor(n, dtype=dtype) for n in sizes]
        _check_both_ways(_tensor(2, 9, 24, dtype=dtype), weights, biases, weight_layout=layout)


def test_slopes_far_from_zero() -> None:
    """No NaN at the ends of an activation."""
    x = torch.tensor([[-1e4, -100.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 100.0, 1e4]], device=DEVICE).t()
    one = torch.ones(1, 1, device=DEVICE)
    for activation in kernel.ACTIVATIONS:
        leaf = x.double().requires_grad_()
        linear_formula(leaf, [one.double()], activation=activation).sum().backward()
        needs = [True, False, False, False, False]
        dx, *_ = kernel.run_backward(torch.ones_like(x), x, [one], [], activation=activation, needs=needs)
        torch.testing.assert_close(dx.double(), leaf.grad, rtol=1e-5, atol=1e-6)


def test_only_what_is_needed() -> None:
    x, weights, bias, vector = _tensor(9, 24), _weights(24, 20, 12), _tensor(20), _tensor(32)
    arguments = (_tensor(9, 32), x, weights, [bias, bias[:12]], _tensor(9, 32), vector, vector)
    every = kernel.run_backward(*arguments, activation="gelu", needs=[True] * 8)
    for i in range(8):
        one = kernel.run_backward(*arguments, activation="gelu", needs=[i == j for j in range(8)])
        assert torch.equal(one[i], every[i]) and all(t.shape == (0,) for j, t in enumerate(one) if j != i)


def test_gradients_without_tokens() -> None:
    x, weights, bias = _tensor(0, 24), _weights(24, 20), _tensor(20)
    needs = [True, False, False, False, True, True]
    grads = kernel.run_backward(_tensor(0, 20), x, weights, [bias], activation="relu", needs=needs)
    assert grads[0].shape == (0, 24) and (grads[4] == 0).all() and (grads[5] == 0).all()


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
def test_split_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in parts that are whole steps, the last one shorter; with a scale; the same bits every time."""
    x, weight = _tensor(150, 37, dtype=dtype).t(), _tensor(150, 41, dtype=dtype)
    scale = torch.tensor(0.25, device=DEVICE)
    exact, eager = 0.25 * (x.double() @ weight.double()), 0.25 * (x @ weight)
    for splits in (2, 3, 4):
        _use(monkeypatch, gemm.GemmTile(32, 32, 16, 1, 2, splits=splits))
        outs = [gemm.matmul(x, weight, torch.empty_like(eager), scale=scale, split=True) for _ in range(2)]
        verdict = compare(outs[0], eager, exact)
        assert verdict.ok and torch.equal(*outs), verdict


@pytest.mark.parametrize("x_transposed", [False, True])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_descriptors(
    dtype: torch.dtype, layout: str, x_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edges each way, more tiles than programs, either order of both operands, and K split."""
    target = gemm.target_of(_tensor(1))._replace(processors=5)
    monkeypatch.setattr(gemm, "target_of", lambda _: target)
    _use(monkeypatch, gemm.GemmTile(32, 32, 32, 1, 2, descriptors=True))
    x = _tensor(104, 88, dtype=dtype).t() if x_transposed else _tensor(88, 104, dtype=dtype)
    weights = _weights(104, 72, dtype=dtype, layout=layout)
    _check(x, weights, [_tensor(72, dtype=dtype)], weight_layout=layout, activation="silu")
    _use(monkeypatch, gemm.GemmTile(32, 32, 32, 1, 2, descriptors=True, splits=2))
    product = kernel.as_product(weights[0], layout)
    out = gemm.matmul(x, product, torch.empty(88, 72, dtype=dtype, device=DEVICE), split=True)
    verdict = compare(out, x @ product, x.double() @ product.double())
    assert verdict.ok, verdict


def test_which_matrices_have_descriptors() -> None:
    half = _tensor(64, 64, dtype=torch.bfloat16)
    assert gemm._describable(half) and gemm._describable(half.t()) and gemm._describable(half[:, 8:])
    assert not gemm._describable(half[:, 1:]) and not gemm._describable(half[:, ::2])
    assert not gemm._describable(half[:0]) and not gemm._describable(half.float())
    assert not gemm._describable(_tensor(64, 65, dtype=torch.bfloat16))


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
