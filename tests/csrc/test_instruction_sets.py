"""Every instruction set that this CPU and build can run gives the reference's results.

The usual build has the portable kernels and those of the CPU. `make test-isa` builds the AVX-512 and AMX ones
so that they run on any AVX2 CPU, and runs this file again.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigmodel_kernels import _native

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

native = torch.ops.bigmodel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half results are rounded once; float32 sums of a few hundred products of unit normals.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(out: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(
        out.double(), expected, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype] * scale
    )


def test_unknown_instruction_set_is_named() -> None:
    with pytest.raises(RuntimeError, match=rf"'mmx' is not supported.*{native.cpu_isas()}"):
        native.cpu_set_isa("mmx")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(1, 17, 5), (3, 601, 70), (7, 64, 33), (25, 129, 100), (130, 300, 513)]
)
def test_linear(isa: str, dtype: torch.dtype, layout: str, rows: int, k: int, n: int) -> None:
    x = randn(rows, k, dtype=dtype, seed=1)
    weights = [randn(n, k, dtype=dtype, seed=2) / k**0.5, randn(3, k, dtype=dtype, seed=3) / k**0.5]
    bias = randn(n + 3, dtype=dtype, seed=4)
    stored = weights if layout == "linear" else [w.t().contiguous() for w in weights]
    packed = native.cpu_pack_weight(stored, layout)
    out = native.cpu_linear(x, packed, bias, "none", None, None, None, 1e-5)
    assert_near(out, x.double() @ torch.cat(weights).double().t() + bias.double())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "k", "n"), [(610, 90, 300), (647, 1700, 450), (1201, 33, 20)])
def test_rows_for_every_thread(isa: str, threads: int, rows: int, k: int, n: int) -> None:
    """So many that each thread has rows of its own, which fit a cache or do not."""
    x = randn(rows, k, dtype=torch.bfloat16, seed=1)
    weight = randn(n, k, dtype=torch.bfloat16, seed=2) / k**0.5
    packed = native.cpu_pack_weight([weight], "linear")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = native.cpu_linear(x, packed, None, "none", None, None, None, 1e-5)
    finally:
        torch.set_num_threads(before)
    assert_near(out, x.double() @ weight.double().t())


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 33, 64, 94])
@pytest.mark.parametrize("features", [(48,), (1, 16, 40), (16, 17, 15, 33)])
def test_packing(isa: str, features: tuple[int, ...], k: int, dtype: torch.dtype, layout: str) -> None:
    """Weights beside each other, whole panels and parts of them: each number is where it was."""
    weights = [randn(n, k, dtype=dtype, seed=i) for i, n in enumerate(features)]
    packed = native.cpu_pack_weight(
        weights if layout == "linear" else [w.t().contiguous() for w in weights], layout
    )
    out = native.cpu_linear(torch.eye(k, dtype=dtype), packed, None, "none", None, None, None, 1e-5)
    assert torch.equal(out, torch.cat(weights).t())


@pytest.mark.parametrize(("rows", "k", "n"), [(64, 31, 20), (70, 200, 65), (193, 450, 40)])
def test_float32_products_keep_all_bits(isa: str, rows: int, k: int, n: int) -> None:
    """Numbers of all 24 bits, over many magnitudes, against the rounding of one float32 sum of k."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, k, generator=generator) * 2.0 ** torch.randint(
        -30, 30, (rows, 1), generator=generator
    )
    weight = torch.randn(n, k, generator=generator) * 2.0 ** torch.randint(
        -30, 30, (n, 1), generator=generator
    )
    out = native.cpu_linear(
        x, native.cpu_pack_weight([weight], "linear"), None, "none", None, None, None, 1e-5
    )
    error = (out.double() - x.double() @ weight.double().t()).abs()
    # The tile unit's sums of six products each have fewer roundings than a chain of k.
    roundings = 2.0 if isa == "amx" else k**0.5
    assert (error <= roundings * 2.0**-24 * (x.double().abs() @ weight.double().abs().t())).all()


@pytest.mark.parametrize("where", ["x", "weight", "both"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4028234e38, 3.4e38])
def test_float32_products_of_extreme_numbers(isa: str, value: float, where: str) -> None:
    """One such number changes the row or column that it is in, as float32 has it, and no other."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(70, 210, generator=generator).clamp(-9, 9) / 10  # so that no finite result overflows
    weight = torch.randn(50, 210, generator=generator) * 1e-3
    if where != "weight":
        x[37, 100] = value
        x[3] = 0.5  # exact in bf16: its other parts are zero
    if where != "x":
        weight[11, 205] = value
    expected = x.double() @ weight.double().t()
    for layout, stored in {"linear": weight, "conv1d": weight.t().contiguous()}.items():
        packed = native.cpu_pack_weight([stored], layout)
        out = native.cpu_linear(x, packed, None, "none", None, None, None, 1e-5)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    if abs(value) < float("inf"):
        return
    x, weight = x.half(), weight.half()
    expected = x.double() @ weight.double().t()
    packed = native.cpu_pack_weight([weight], "linear")
    out = native.cpu_linear(x, packed, None, "none", None, None, None, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str) -> None:
    x = torch.linspace(-12, 12, 4001)[:, None]
    packed = native.cpu_pack_weight([torch.ones(1, 1)], "linear")
    out = native.cpu_linear(x, packed, None, activation, None, None, None, 1e-5)
    torch.testing.assert_close(out.double(), ACTIVATIONS[activation](x.double()), rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", ["none", "pre", "post"])
@pytest.mark.parametrize("rows", [1, 4, 40, 500])  # one row; one tile; cut by columns; by rows
def test_feed_forward(isa: str, dtype: torch.dtype, position: str, rows: int) -> None:
    hidden, inner = 72, 200
    x, residual = randn(rows, hidden, dtype=dtype, seed=1), randn(rows, hidden, dtype=dtype, seed=2)
    w_in, b_in = randn(inner, hidden, dtype=dtype, seed=3) / hidden**0.5, randn(inner, dtype=dtype, seed=4)
    w_out, b_out = randn(hidden, inner, dtype=dtype, seed=5) / inner**0.5, randn(hidden, dtype=dtype, seed=6)
    weight, bias = randn(hidden, dtype=dtype, seed=7), randn(hidden, dtype=dtype, seed=8)
    norm = (None, None) if position == "none" else (weight, bias)
    out = native.cpu_feed_forward(
        x, native.cpu_pack_weight([w_in], "linear"), b_in, native.cpu_pack_weight([w_out], "linear"), b_out,
        "gelu", residual, position, *norm, 1e-5,
    )  # fmt: skip

    def layer_norm(y: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(y, (hidden,), weight.double(), bias.double(), 1e-5)

    first = layer_norm(x.double()) if position == "pre" else x.double()
    h = torch.nn.functional.gelu(first @ w_in.double().t() + b_in.double())
    expected = h @ w_out.double().t() + b_out.double() + residual.double()
    assert_near(out, layer_norm(expected) if position == "post" else expected, scale=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 64, 129, 768])
def test_layer_norm(isa: str, dtype: torch.dtype, n: int) -> None:
    x, residual = randn(19, n, dtype=dtype, seed=1), randn(19, n, dtype=dtype, seed=2)
    weight, bias = randn(n, dtype=dtype, seed=3), randn(n, dtype=dtype, seed=4)
    out = native.cpu_layer_norm(x, weight, bias, 1e-5, residual)
    total = x.double() + residual.double()
    assert_near(out, torch.nn.functional.layer_norm(total, (n,), weight.double(), bias.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "angles"), [(2, 1), (33, 5), (64, 32), (128, 64), (96, 20)])
def test_rotary(isa: str, dtype: torch.dtype, interleaved: bool, dim: int, angles: int) -> None:
    """Rows of any stride, angles of the whole batch or of each sequence, in float32 or in the dtype."""
    whole = randn(2, 7, 5 * dim, dtype=dtype, seed=1).view(2, 7, 5, dim).transpose(1, 2)
    inputs = whole[:, :3], whole[:, 4:]
    for batch, table in ((1, torch.float32), (2, dtype)):
        turn = randn(batch, 7, angles, dtype=torch.float64, seed=2)
        cos, sin = turn.cos().to(table), turn.sin().to(table)
        for x, out in zip(inputs, native.cpu_rotary(*inputs, cos, sin, interleaved), strict=True):
            assert out.transpose(1, 2).is_contiguous()
            expected = x.double().clone()
            first = slice(0, 2 * angles, 2) if interleaved else slice(0, angles)
            second = slice(1, 2 * angles, 2) if interleaved else slice(angles, 2 * angles)
            a, b = expected[..., first].clone(), expected[..., second].clone()
            c, s = cos.double()[:, None], sin.double()[:, None]
            expected[..., first], expected[..., second] = a * c - b * s, b * c + a * s
            assert_near(out, expected)


def test_rotary_refuses_what_would_read_elsewhere(isa: str) -> None:
    x, table = torch.randn(2, 3, 7, 8), torch.randn(1, 7, 4)
    for query, key, cos, sin, words in (
        (x, x[:1], table, table, "key: shape"),
        (x, x, table[:, :6].contiguous(), table, "cos: shape"),
        (x, x, torch.randn(1, 7, 5), torch.randn(1, 7, 5), "cos: shape"),
        (x, x, table, table[:, :6].contiguous(), "sin: shape"),
        (x, x.bfloat16(), table, table, "key: dtype"),
        (x, x.transpose(2, 3).contiguous().transpose(2, 3), table, table, "key: last dimension"),
    ):
        with pytest.raises(RuntimeError, match=words):
            native.cpu_rotary(query, key, cos, sin, False)


def test_half_conversions_are_exact(isa: str) -> None:
    """All 2^16 bf16 and fp16 values survive a round trip; float32 rounds to nearest even, as torch does."""
    packed_identity = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = packed_identity.view(dtype)
        ids = torch.arange(values.numel())
        out = native.cpu_embedding(
            ids, values[:, None].contiguous(), None, None, None, None, None, None, 1e-5
        )[:, 0]
        torch.testing.assert_close(out, values, rtol=0, atol=0, equal_nan=True)
