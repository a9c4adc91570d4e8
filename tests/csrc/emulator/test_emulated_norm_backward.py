"""The CUDA kernels of the norm's gradient and of sums over rows, in the emulator, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops import cuda_library
from bigmodel_kernels.ops.norm import cuda
from bigmodel_kernels.ops.norm.reference import normalize
from bigmodel_kernels.ops.norm.reference import run_backward as reference_backward
from bigmodel_kernels.ops.philox import keep_elements
from bigmodel_kernels.verify import compare

pytestmark = pytest.mark.usefixtures("library")
NAMES = ("x", "residual", "weight", "bias", "sums")


@pytest.fixture(autouse=True)
def any_order() -> Iterator[None]:
    """Of threads and blocks."""
    torch.manual_seed(0)
    torch.ops.bigmodel_emulator.set_seed(1)
    yield
    torch.ops.bigmodel_emulator.set_seed(0)


def judge(mine: Tensor, exact: Tensor, usual: Tensor, name: str) -> None:
    verdict = compare(mine, usual, exact, "gradient")
    assert verdict.ok, (name, verdict)


SEED = torch.tensor(1234567890123)


def operands(rows: int, columns: int, dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    return {
        name: torch.randn(columns).to(dtype)
        if name in ("weight", "bias")
        else torch.randn(rows, columns).to(dtype)
        for name in names
    }


def formula(
    t: dict[str, Tensor], kind: str, dtype: torch.dtype, dropout_p: float, summed: bool, offset: float
) -> dict[str, Tensor]:
    """By autograd, in this dtype."""
    leaf = {k: v.to(dtype).requires_grad_() for k, v in t.items()}
    x = leaf["x"]
    keep = 1.0
    if dropout_p:
        keep = keep_elements(SEED, dropout_p, *x.shape, torch.float32, torch.device("cpu")).to(dtype)
    total = x if summed else x * keep + leaf.get("residual", 0.0)
    total.retain_grad()
    out = normalize(total, leaf.get("weight"), leaf.get("bias"), 1e-5, kind, offset)
    grad = t["grad"].to(dtype) + t.get("more_grad", torch.zeros(())).to(dtype)
    out.backward(grad)
    assert total.grad is not None
    of_total = total.grad + t.get("beside", torch.zeros(())).to(dtype)
    dx = of_total * keep
    found = {"x": dx, "residual": of_total, "sums": dx.sum(0)}
    return found | {name: leaf[name].grad for name in ("weight", "bias") if name in leaf}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    ("rows", "columns", "dropout_p", "form"),
    [
        (1, 8, 0.0, "plain"),
        (37, 264, 0.0, "summed"),
        (37, 264, 0.3, "plain"),
        (21, 520, 0.3, "summed"),
        (9, 768, 0.0, "bare"),
        (9, 1024, 0.3, "plain"),
        (7, 1032, 0.3, "summed"),
        (5, 4096, 0.3, "plain"),
    ],
)
def test_gradients(
    rows: int, columns: int, dropout_p: float, form: str, kind: str, dtype: torch.dtype
) -> None:
    """All of them, of the norm of a row with a large mean."""
    beside = {"plain": ("residual", "weight"), "summed": ("weight", "more_grad", "beside"), "bare": ()}[form]
    bias = ("bias",) if kind == "layer_norm" and form != "bare" else ()
    t = operands(rows, columns, dtype, "grad", "x", *beside, *bias)
    t["x"] += 4
    offset = 1.0 if kind == "rms_norm" and form != "bare" else 0.0
    needs = [True, True, "weight" in t, "bias" in t, True]
    got = torch.ops.bigmodel_emulator.cuda_norm_backward(
        *(t["grad"], t["x"], t.get("weight"), t.get("residual"), SEED if dropout_p else None),
        *(t.get("more_grad"), t.get("beside")),
        **{"kind": kind, "eps": 1e-5, "dropout_p": dropout_p, "weight_offset": offset},
        **{"summed": form == "summed", "needs": needs},
    )
    wants = [formula(t, kind, d, dropout_p, form == "summed", offset) for d in (torch.float64, dtype)]
    for name, need, mine in zip(NAMES, needs, got, strict=True):
        if need:
            judge(mine, wants[0][name], wants[1][name], name)
        else:
            assert mine.shape == (0,)


def test_only_what_is_needed() -> None:
    t = operands(6, 16, torch.bfloat16, "grad", "x", "weight")
    whole = torch.ops.bigmodel_emulator.cuda_norm_backward(**t, kind="layer_norm", eps=1e-5, needs=[True] * 5)
    for i, name in enumerate(NAMES):
        got = torch.ops.bigmodel_emulator.cuda_norm_backward(
            **t, kind="layer_norm", eps=1e-5, needs=[j == i for j in range(5)]
        )
        assert torch.equal(got[i], whole[i]), name
        assert all(g.shape == (0,) for j, g in enumerate(got) if j != i)
    none = torch.ops.bigmodel_emulator.cuda_norm_backward(
        *(torch.zeros(0, 16).half(), torch.zeros(0, 16).half(), None),
        **{"kind": "rms_norm", "eps": 0.0, "needs": [True] * 5},
    )
    assert [list(g.shape) for g in none] == [[0, 16], [0, 16], [16], [16], [16]]
    assert not any(g.any() for g in none)


def test_the_same_bits_in_any_order() -> None:
    """Of sums over more rows than blocks take at once, by all schedules."""
    t = operands(70, 24, torch.bfloat16, "grad", "x", "weight")
    found = []
    for seed in (0, 1, 2):
        torch.ops.bigmodel_emulator.set_seed(seed)
        found.append(
            torch.ops.bigmodel_emulator.cuda_norm_backward(
                **t, dropout_seed=SEED, dropout_p=0.1, kind="layer_norm", eps=1e-5, needs=[True] * 5
            )
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 12)}, "has 12 columns, which must be a multiple of 8"),
        ({"x": torch.zeros(4, 4104), "grad": torch.zeros(4, 4104), "weight": None}, "up to 4096 are allowed"),
        ({"grad": torch.zeros(3, 16)}, r"grad: shape \(3, 16\) must be \(4, 16\)"),
        ({"more_grad": torch.zeros(4, 8)}, r"more_grad: shape \(4, 8\) must be"),
        ({"beside": torch.zeros(8, 8)}, r"beside: shape \(8, 8\) must be"),
        ({"residual": torch.zeros(16)}, "residual: shape .* must have 2 dimensions"),
        ({"weight": torch.zeros(8)}, r"weight: shape \(8,\) must be \(16,\)"),
        ({"kind": "batch_norm"}, "'batch_norm' is unknown"),
        ({"dropout_p": 1.0}, r"must be in \[0, 1\)"),
        ({"dropout_p": 0.5}, "dropout_seed: must be given with dropout_p"),
        ({"needs": [True]}, "must hold 5 values, not 1"),
        ({"x": torch.zeros(4, 16).double()}, "x: dtype must be float16 or bfloat16"),
        ({"grad": torch.zeros(4, 16).double()}, "grad: wrong dtype"),
        ({"summed": True, "residual": torch.zeros(4, 16)}, "residual: must be None"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {name: torch.zeros(4, 16) for name in ("grad", "x")} | {"weight": torch.zeros(16)}
    call |= {"kind": "layer_norm", "eps": 1e-5, "needs": [True] * 5} | change
    half = {k: v.half() if isinstance(v, Tensor) and v.dtype == torch.float32 else v for k, v in call.items()}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bigmodel_emulator.cuda_norm_backward(**half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(0, 16), (1, 8), (70, 40), (45, 520)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_sums_of_columns(rows: int, columns: int, dtype: torch.dtype, dropout_p: float) -> None:
    x = torch.randn(rows, columns).to(dtype)
    seed = SEED if dropout_p else None
    sums, dropped = torch.ops.bigmodel_emulator.cuda_column_sums(x, seed, dropout_p=dropout_p)
    want = x
    if dropout_p:
        keep = keep_elements(SEED, dropout_p, rows, columns, torch.float32, torch.device("cpu"))
        assert torch.equal(dropped, (x.float() * keep).to(dtype))
        want = x.double() * keep
    else:
        assert dropped.shape == (0, columns)
    judge(sums, want.double().sum(0), want.to(dtype).sum(0), "sums")


def test_the_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs that have three dimensions and no aligned rows."""
    operator = torch.ops.bigmodel_emulator.cuda_norm_backward
    monkeypatch.setattr(torch.ops.bigmodel, "cuda_norm_backward", operator, raising=False)
    monkeypatch.setattr(cuda_library, "_capability_of", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "lacking", lambda x: None)
    wide = torch.randn(3, 2, 5, 20).half()
    grad, x, residual = (t[..., 3:19] for t in wide)
    weight, bias = torch.randn(2, 17).half()[:, 1:]
    args = (grad, x, weight, bias, residual, SEED)
    for kind in ("layer_norm", "rms_norm"):
        given = (*args[:3], bias if kind == "layer_norm" else None, *args[4:])
        needs = [True, True, True, kind == "layer_norm"]
        options: dict[str, Any] = {"kind": kind, "eps": 1e-5, "dropout_p": 0.25, "needs": needs}
        assert backends.select("norm_backward", "cuda", given, options).name == "native"
        got, want = cuda.run_backward(*given, **options), reference_backward(*given, **options)
        for mine, exact in zip(got, want, strict=True):
            assert mine.shape == exact.shape and mine.dtype == exact.dtype
            assert torch.allclose(mine.double(), exact.double(), atol=2e-2, rtol=1e-2)
    assert "not a multiple of 8" in str(cuda.supports_backward(grad[..., :12], x[..., :12]))
    assert "rows of up to 4096" in str(cuda.supports_backward(grad, torch.zeros(1, 4104)))
