"""The CUDA kernels of the linear layer, run in the emulator, against float64 by the rule of `numerics`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels import _native, backends
from bigmodel_kernels.ops import cuda_library, feed_forward
from bigmodel_kernels.ops.feed_forward import cuda as feed_forward_cuda
from bigmodel_kernels.ops.feed_forward import reference as feed_forward_reference
from bigmodel_kernels.ops.linear import cuda, cuda_choice, prepare, reference
from bigmodel_kernels.ops.philox import keep_elements
from bigmodel_kernels.verify import compare

pytestmark = pytest.mark.usefixtures("library", "architecture")

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def compute(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor | None, keep: Tensor | None,
    layout: str, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layer in plain PyTorch, in the dtype of x."""
    z = torch.cat([x @ (w if layout == "conv1d" else w.t()) for w in weights], -1)
    if biases:
        z = z + torch.cat(biases)
    y = ACTIVATIONS[activation](z)
    y = y if keep is None else y * keep.to(y.dtype)
    return (y if residual is None else y + residual), z


def check(
    rows: int,
    features: int,
    outs: list[int],
    dtype: torch.dtype,
    *,
    layout: str = "linear",
    activation: str = "none",
    bias: bool = True,
    residual: bool = False,
    dropout_p: float = 0.0,
    keep_preactivation: bool = False,
    form: int = -1,
) -> None:
    x = torch.randn(rows, features).to(dtype)
    weights = [
        (torch.randn((features, n) if layout == "conv1d" else (n, features)) * 0.1).to(dtype) for n in outs
    ]
    biases = [torch.randn(n).to(dtype) for n in outs] if bias else []
    extra = torch.randn(rows, sum(outs)).to(dtype) if residual else None
    seed = torch.tensor(1234567890123, dtype=torch.int64) if dropout_p else None
    keep = None
    if seed is not None:
        keep = keep_elements(seed, dropout_p, rows, sum(outs), torch.float32, torch.device("cpu"))
    out, z = torch.ops.bigmodel_emulator.cuda_linear(
        x, weights, biases, extra, seed, weight_layout=layout, activation=activation, dropout_p=dropout_p,
        keep_preactivation=keep_preactivation, form=form,
    )  # fmt: skip
    wide: Any = [x.double(), [w.double() for w in weights], [b.double() for b in biases]]
    ref, ref_z = compute(*wide, None if extra is None else extra.double(), keep, layout, activation)
    eager, eager_z = compute(x, weights, biases, extra, keep, layout, activation)
    pairs = [(out, ref, eager)] + ([(z, ref_z, eager_z)] if keep_preactivation else [])
    for mine, exact, usual in pairs:
        judge(mine, exact, usual)


def judge(mine: Tensor, exact: Tensor, usual: Tensor) -> None:
    verdict = compare(mine, usual, exact)
    assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(dtype: torch.dtype, layout: str, activation: str) -> None:
    check(70, 72, [136], dtype, layout=layout, activation=activation, keep_preactivation=activation != "none")


@pytest.mark.parametrize(
    ("rows", "features", "out"), [(1, 8, 8), (17, 64, 264), (129, 200, 128), (300, 40, 40)]
)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_sizes(rows: int, features: int, out: int, layout: str) -> None:
    check(rows, features, [out], torch.bfloat16, layout=layout)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_several_weights_side_by_side(layout: str) -> None:
    check(150, 64, [64, 136, 264], torch.float16, layout=layout, residual=True)


def check_hidden_backward(
    rows: int,
    features: int,
    out: int,
    dtype: torch.dtype,
    *,
    layout: str = "linear",
    activation: str = "gelu",
    need_hidden: bool = True,
    need_sums: bool = True,
    form: int = -1,
) -> None:
    grad = torch.randn(rows, features).to(dtype)
    weight = (torch.randn((out, features) if layout == "conv1d" else (features, out)) * 0.1).to(dtype)
    z = (2 * torch.randn(rows, out)).to(dtype)
    got = torch.ops.bigmodel_emulator.cuda_hidden_backward(
        grad, weight, z, weight_layout=layout, activation=activation,
        need_hidden=need_hidden, need_sums=need_sums, form=form,
    )  # fmt: skip
    parts = -(-rows // 16)
    assert [len(t) for t in got] == [rows, rows * need_hidden, parts * need_sums]

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        dh = grad.to(dtype) @ (weight.t() if layout == "conv1d" else weight).to(dtype)
        leaf = z.to(dtype).requires_grad_()
        hidden = ACTIVATIONS[activation](leaf)
        (dz,) = torch.autograd.grad(hidden, leaf, dh)
        padded = F.pad(dz, (0, 0, 0, parts * 16 - rows)).view(parts, 16, out)
        # Sums of 16 bits are added up in float32.
        return dz, hidden.detach(), padded.sum(1, dtype=torch.promote_types(dtype, torch.float32))

    exact, usual = formula(torch.float64), formula(dtype)
    for i, wanted in enumerate((True, need_hidden, need_sums)):
        if wanted:
            verdict = compare(got[i], usual[i], exact[i], "gradient")
            assert verdict.ok, (i, verdict)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_activations(dtype: torch.dtype, layout: str, activation: str) -> None:
    check_hidden_backward(70, 72, 136, dtype, layout=layout, activation=activation)


@pytest.mark.parametrize(
    ("rows", "features", "out", "need_hidden", "need_sums"),
    [
        (1, 8, 8, True, True),
        (17, 64, 264, False, True),
        (129, 200, 128, True, False),
        (300, 40, 40, False, False),
    ],
)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_sizes_of_the_gradient(
    rows: int, features: int, out: int, need_hidden: bool, need_sums: bool, layout: str
) -> None:
    needs = {"need_hidden": need_hidden, "need_sums": need_sums}
    check_hidden_backward(rows, features, out, torch.bfloat16, layout=layout, **needs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_derivative_far_out(activation: str) -> None:
    """0 or 1 (or the slope at 0), and no NaN from an infinity times 0."""
    z = torch.tensor([-1e30, -1e4, -50.0, 0.0, 50.0, 1e4, 1e30, -0.0]).bfloat16().expand(16, 8).contiguous()
    dz, hidden, _ = torch.ops.bigmodel_emulator.cuda_hidden_backward(
        torch.ones(16, 8).bfloat16(), torch.eye(8).bfloat16(), z, activation=activation, need_hidden=True
    )
    at_zero = {"none": 1.0, "relu": 0.0}.get(activation, 0.5)
    below = 1.0 if activation == "none" else 0.0
    slopes = torch.tensor([below] * 3 + [at_zero] + [1.0] * 3 + [at_zero])
    assert torch.allclose(dz[0].float(), slopes, rtol=0, atol=1e-15)
    assert torch.allclose(hidden, z if activation == "none" else z.clamp_min(0), rtol=0, atol=1e-15)


def test_more_tiles_than_blocks() -> None:
    check(400, 72, [520], torch.bfloat16, bias=False)


def test_dropout_and_residual() -> None:
    check(40, 64, [200], torch.float16, residual=True, dropout_p=0.3, activation="gelu")


@pytest.mark.parametrize("architecture", [90], indirect=True)
@pytest.mark.parametrize("form", range(6))
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_forms_of_hopper(form: int, layout: str) -> None:
    """Whatever the table would choose: blocks with several tiles and more features than stages, with none and one step."""
    check(130, 456, [136, 72], torch.bfloat16, layout=layout, form=form, activation="gelu", residual=True)
    check(5, 8, [200], torch.float16, layout=layout, form=form, dropout_p=0.3, keep_preactivation=True)
    check_hidden_backward(150, 200, 264, torch.bfloat16, layout=layout, form=form)


@pytest.mark.parametrize("architecture", [90], indirect=True)
@pytest.mark.parametrize("form", [4, 5])
def test_taking_turns_gives_the_same_bits_in_any_order(form: int) -> None:
    """The ring passes from one consumer to the other in the middle of its stages, and consumers have different numbers of tiles."""
    x, weight = torch.randn(130, 328).half(), torch.randn(392, 328).half()
    results = []
    for seed in (0, 5, 6):
        torch.ops.bigmodel_emulator.set_seed(seed)
        results.append(torch.ops.bigmodel_emulator.cuda_linear(x, [weight], [], form=form)[0])
    torch.ops.bigmodel_emulator.set_seed(0)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("rows", "features", "outs", "form"),
    [
        (8192, 768, [3072], 4),  # many tiles, and an epilogue worth hiding: ping-pong
        (8192, 4096, [1024], 0),  # long products: the widest tile reads least
        (2048, 768, [1536], 1),  # one tile for each multiprocessor: two consumers share it
        (128, 768, [3072], 3),  # few rows: many small tiles
    ],
)
def test_the_form_that_takes_least_time(rows: int, features: int, outs: list[int], form: int) -> None:
    assert torch.ops.bigmodel_emulator.cuda_linear_form(rows, features, outs, 132) == form


def test_a_form_that_is_none_is_refused(architecture: int) -> None:
    for form in (-2, 6) if architecture == 90 else (0,):
        with pytest.raises(RuntimeError, match=f"form: {form} must be -1, or on Hopper 0 to 5"):
            check(1, 8, [8], torch.float16, form=form)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [(1, 8, torch.float16), (5, 264, torch.bfloat16), (130, 1024, torch.float16), (3, 2600, torch.bfloat16)],
)
def test_norm(rows: int, columns: int, dtype: torch.dtype, kind: str, residual: bool) -> None:
    """Of rows with a large mean, in registers and longer than those."""
    x = torch.randn(rows, columns).to(dtype) + 8
    more = torch.randn(rows, columns).to(dtype) if residual else None
    weight = torch.randn(columns).to(dtype)
    bias = torch.randn(columns).to(dtype) if kind == "layer_norm" else None
    out, total = torch.ops.bigmodel_emulator.cuda_norm(x, more, weight, bias, kind=kind, keep_sum=residual)

    def formula(dtype: torch.dtype) -> Tensor:
        y = x.to(dtype) if more is None else x.to(dtype) + more.to(dtype)
        if kind == "rms_norm":
            return F.rms_norm(y, (columns,), weight.to(dtype), 1e-5)
        return F.layer_norm(y, (columns,), weight.to(dtype), None if bias is None else bias.to(dtype), 1e-5)

    judge(out, formula(torch.float64), formula(dtype))
    assert total.shape == (rows if residual else 0, columns)
    if more is not None:
        assert torch.equal(total, (x.float() + more.float()).to(dtype))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 12)}, "has 12 columns, which must be a multiple of 8"),
        ({"x": torch.zeros(16)}, "must have 2 dimensions"),
        ({"residual": torch.zeros(4, 8)}, r"residual: shape \(4, 8\) must be \(4, 16\)"),
        ({"weight": torch.zeros(8)}, r"weight: shape \(8,\) must be \(16,\)"),
        ({"bias": "not aligned"}, "from a multiple of 16 bytes"),
        ({"kind": "batch_norm"}, "'batch_norm' is unknown"),
    ],
)
def test_bad_input_of_the_norm_is_refused(change: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {"x": torch.zeros(4, 16), "residual": None, "weight": torch.zeros(16)} | change
    if change.get("x") is not None and change["x"].shape[-1] == 12:
        call["weight"] = torch.zeros(12)
    half = {k: v.half() if isinstance(v, Tensor) else v for k, v in call.items()}
    if "bias" in half:
        half["bias"] = torch.zeros(17).half()[1:]
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bigmodel_emulator.cuda_norm(**half)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 12)}, "rows must be multiples of 8"),
        ({"weights": [torch.zeros(16, 24)]}, "takes 24 features; x has 16"),
        ({"weights": []}, "1 to 4 are allowed"),
        ({"biases": [torch.zeros(8)]}, r"must be \(16,\)"),
        ({"residual": torch.zeros(4, 8)}, r"must be \(4, 16\)"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {"x": torch.zeros(4, 16), "weights": [torch.zeros(16, 16)]}
    call |= {"biases": [torch.zeros(16)], "residual": None}
    call |= change
    half = {
        k: [t.half() for t in v] if isinstance(v, list) else None if v is None else v.half()
        for k, v in call.items()
    }
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bigmodel_emulator.cuda_linear(**half)


@pytest.fixture
def row(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's row of the table, with the emulator where the CUDA library would be."""
    for name in ("cuda_linear", "cuda_norm", "cuda_hidden_backward"):
        operator = getattr(torch.ops.bigmodel_emulator, name)
        monkeypatch.setattr(torch.ops.bigmodel, name, operator, raising=False)
    monkeypatch.setattr(cuda_library, "_capability_of", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "lacking", lambda x: None)
    monkeypatch.setattr(cuda, "_device", lambda device: ("a GPU", "9.0"))


ROW_CALLS: dict[str, dict[str, Any]] = {
    "layer_norm": {"norm_weight": (24,), "norm_bias": (24,), "residual": (2, 5, 24)},
    "rms_norm": {"norm_weight": (24,), "norm_kind": "rms_norm", "activation": "silu"},
    "dropout": {"dropout_p": 0.5, "residual": (2, 5, 24), "activation": "gelu_tanh"},
}


@pytest.mark.parametrize("call", ROW_CALLS.values(), ids=ROW_CALLS.keys())
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.usefixtures("row")
def test_the_row_of_the_table(call: dict[str, Any], layout: str) -> None:
    """Result and what training keeps, of inputs that have three dimensions and no aligned rows."""
    x = torch.randn(2, 5, 20)[..., 3:19].half()
    weight = torch.randn((16, 24) if layout == "conv1d" else (24, 16)).half()
    tensors = {k: torch.randn(v).half() if isinstance(v, tuple) else v for k, v in call.items()}
    args, options = prepare(x, weight, torch.randn(24).half(), weight_layout=layout, **tensors)
    with backends.use("native"):
        assert backends.select("linear", "cuda", args, options).load()[0] is cuda.run
    expected = reference.run_training(*args, **options)
    got = cuda.run_training(*args, **options)
    for mine, exact in zip((cuda.run(*args, **options), *got), (expected[0], *expected), strict=True):
        assert mine.shape == exact.shape and mine.dtype == exact.dtype
        assert torch.allclose(mine.double(), exact.double(), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("rows", "faster", "runs"),
    [
        (128, cuda_choice.TORCH, cuda_choice.TORCH),
        (50, cuda_choice.OWN, cuda_choice.OWN),
        (2000, cuda_choice.TORCH, cuda_choice.OWN),  # too many rows to speak for 100
    ],
)
@pytest.mark.parametrize("device", ["a GPU", "its twin"])
@pytest.mark.usefixtures("row")
def test_a_measurement_decides_which_product_runs(
    rows: int, faster: str, runs: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_choice, "FILE", tmp_path / "cuda_choice.json")
    monkeypatch.setattr(cuda_choice, "measurements", cuda_choice.measurements.__wrapped__)
    x, weight, bias, residual = (torch.randn(n).half() for n in ((100, 16), (24, 16), (24,), (100, 24)))
    args, options = prepare(x, weight, bias, activation="gelu", residual=residual)

    def said() -> str:
        with backends.use("native"):
            return backends.explain_call("linear", "cuda", args, options).reasons["native"]

    assert said() == "runs this call: the library's kernel, not measured for this device and shape"
    case = cuda.case_of(*args, **options)
    assert case == cuda_choice.Case("float16", 16, 24, "linear", "gelu + residual", 100)
    functions: dict[str, Any] = {name: partial(str, name) for name in (cuda_choice.OWN, cuda_choice.TORCH)}
    entries = cuda_choice.measure(
        iter([(replace(case, rows=rows), functions)]), lambda call: lambda: 0.1 if call() == faster else 0.2
    )
    devices = {name: {"capability": "9.0", "cases": entries} for name in ("another", device)}
    devices["another"]["cases"] = [] if device == "a GPU" else entries
    cuda_choice.FILE.write_text(json.dumps(devices))
    assert said().startswith(f"runs this call: {runs}")
    assert said().endswith("measured" if device == "a GPU" else "measured on another") or rows == 2000
    assert ("0.100 ms against 0.200 of" in said()) == (rows != 2000)
    # The other one is not called.
    monkeypatch.setattr(cuda, "_own" if runs == cuda_choice.TORCH else "_torch", None)
    assert torch.allclose(cuda.run(*args, **options), reference.run(*args, **options), atol=2e-2)


@pytest.mark.usefixtures("row")
def test_torch_and_the_library_agree() -> None:
    """In all that the two products give, for training too."""
    for call in (
        {"norm_kind": "rms_norm"},
        {"norm_bias": torch.randn(24).half()},
        {"weight_layout": "conv1d"},
    ):
        weight = torch.randn((16, 24) if "weight_layout" in call else (24, 16)).half()
        more = {"norm_weight": torch.randn(24).half(), "activation": "silu", **call}
        args, options = prepare(torch.randn(9, 16).half(), weight, torch.randn(24).half(), **more)
        both = [cuda.run_training(*args, **options, product=p) for p in (cuda_choice.OWN, cuda_choice.TORCH)]
        for mine, theirs in zip(*both, strict=True):
            assert torch.allclose(mine, theirs, atol=2e-2, rtol=1e-2)


@pytest.mark.usefixtures("row")
def test_several_weights_in_the_row_and_none_of_a_row() -> None:
    weights, biases = [torch.randn(n, 16).half() for n in (8, 24)], [torch.randn(n).half() for n in (8, 24)]
    for rows in (0, 9):
        args, options = prepare(torch.randn(rows, 16).half(), weights, biases)
        assert torch.allclose(cuda.run(*args, **options), reference.run(*args, **options), atol=2e-2)


@pytest.mark.parametrize(
    ("x", "weights", "call", "reason"),
    [
        ((4, 16), [(12, 16)], {}, "gives 12 features, not a multiple of 8"),
        ((4, 12), [(16, 12)], {}, "x has 12 features, not a multiple of 8"),
        ((4, 16), [(8, 16)] * 5, {}, "5 weights; its product takes up to 4"),
        ((4, 16), [(8, 16)] * 2, {"dropout_p": 0.5}, "dropout over 2 weights"),
    ],
)
@pytest.mark.usefixtures("row")
def test_the_row_says_what_it_cannot(
    x: tuple[int, ...], weights: list[tuple[int, ...]], call: dict[str, Any], reason: str
) -> None:
    args, options = prepare(torch.zeros(x).half(), [torch.zeros(w).half() for w in weights], **call)
    with backends.use("native"), pytest.raises(backends.BackendError, match=reason):
        backends.select("linear", "cuda", args, options)
    assert reason in backends.explain_call("linear", "cuda", args, options).reasons["native"]


@pytest.mark.usefixtures("row")
def test_a_gpu_that_nobody_has_measured_runs_triton_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "_capability_of", lambda device: (8, 6))
    args, options = prepare(torch.zeros(4, 16).half(), torch.zeros(24, 16).half())
    said = backends.explain_call("linear", "cuda", args, options).reasons["native"]
    assert "not yet measured on sm_86; BIGMODEL_BACKEND=native" in said
    with backends.use("native"):
        assert backends.select("linear", "cuda", args, options).name == "native"


@pytest.mark.parametrize("position", ["none", "pre", "post"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("row")
def test_feed_forward_of_two_launches(position: str, layout: str, recompute: bool) -> None:
    """Result and what training keeps, against the reference."""
    x, w_in, w_out = (torch.randn(n).half() for n in ((2, 5, 16), (32, 16), (24, 32)))
    if layout == "conv1d":
        w_in, w_out = w_in.t().contiguous(), w_out.t().contiguous()
    width = 16 if position == "pre" else 24
    norm = {"norm_weight": torch.randn(width).half(), "norm_bias": torch.randn(width).half()}
    args, options = feed_forward.prepare(
        *(x, w_in, torch.randn(32).half(), w_out, torch.randn(24).half()),
        residual=torch.randn(2, 5, 24).half(),
        activation="gelu",
        weight_layout=layout,
        norm_position=position,
        **(norm if position != "none" else {}),
    )
    assert backends.select("feed_forward", "cuda", args, options).load()[0] is feed_forward_cuda.run
    got = feed_forward_cuda.run_training(*args, **options, recompute=recompute)
    expected = feed_forward_reference.run_training(*args, **options, recompute=recompute)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.shape == exact.shape and mine.dtype == exact.dtype
        assert torch.allclose(mine.double(), exact.double(), atol=4e-2, rtol=2e-2)
    assert torch.equal(feed_forward_cuda.run(*args, **options), got[0])
    gate = {"w_gate": w_in, "b_gate": None}
    gated, more = feed_forward.prepare(*args[:5], activation="gelu", weight_layout=layout, **gate)
    assert "gate" in str(feed_forward_cuda.supports(*gated, **more))


@pytest.fixture
def cuda_backward(row: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with the rest by torch: its products as on a GPU, and sums, which are Triton's there."""
    pytest.importorskip("triton")
    from bigmodel_kernels.ops.feed_forward import cuda_backward, triton
    from bigmodel_kernels.triton_runtime import HOPPER, pretend

    monkeypatch.setattr(triton.linear, "_by_library", lambda x: True)
    for module, name in ((triton, "column_sums"), (cuda_backward, "sum_parts")):
        monkeypatch.setattr(module, name, lambda parts, out: out.copy_(parts.sum(0, dtype=torch.float32)))
    with _native.pretend_loaded(), pretend(HOPPER):
        yield cuda_backward


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("needs", ["all", "weights", "biases"])
def test_feed_forward_backward(layout: str, needs: str, cuda_backward: Any) -> None:
    """All gradients, and those that need less of the first product, against the reference."""
    x, w_in, w_out = (torch.randn(n).half() for n in ((2, 5, 16), (32, 16), (24, 32)))
    if layout == "conv1d":
        w_in, w_out = w_in.t().contiguous(), w_out.t().contiguous()
    args, options = feed_forward.prepare(
        *(x, w_in, torch.randn(32).half(), w_out, torch.randn(24).half()),
        activation="gelu",
        weight_layout=layout,
    )
    preactivation = feed_forward_cuda.run_training(*args, **options)[1]
    # Not contiguous: rows lie apart.
    grad = torch.randn(2, 5, 28).half()[..., :24]
    call = (grad, *args, *[None] * (11 - len(args)), preactivation, None, None)
    wanted = {"all": (0, 1, 2, 3, 4), "weights": (1, 3), "biases": (2, 4)}[needs]
    options["needs"] = [i in wanted for i in range(10)]
    chosen = backends.select("feed_forward_backward", "cuda", call, options)
    assert chosen.load()[0] is cuda_backward.run_backward
    expected = feed_forward_reference.run_backward(*call, **options)
    for mine, exact in zip(cuda_backward.run_backward(*call, **options), expected, strict=True):
        assert mine.shape == exact.shape and mine.dtype == exact.dtype
        assert torch.allclose(mine.double(), exact.double(), atol=4e-2, rtol=2e-2)


def test_feed_forward_backward_of_no_rows_and_with_a_gate(cuda_backward: Any) -> None:
    x, w_in, w_out = torch.zeros(0, 16).half(), torch.zeros(32, 16).half(), torch.zeros(24, 32).half()
    call = (
        torch.zeros(0, 24).half(),
        x,
        w_in,
        torch.zeros(32).half(),
        w_out,
        *[None] * 7,
        x.new_empty(0, 32),
    )
    options = {"activation": "silu", "needs": [True, True, True, True, False, *[False] * 5]}
    dx, dw_in, db_in, dw_out, *_ = cuda_backward.run_backward(*call, **options)
    assert dx.shape == (0, 16)
    assert [torch.count_nonzero(t).item() for t in (dw_in, db_in, dw_out)] == [0, 0, 0]
    gated = [*call[:9], w_in, *call[10:]]
    assert "gate" in str(cuda_backward.supports_backward(*gated, **options))
