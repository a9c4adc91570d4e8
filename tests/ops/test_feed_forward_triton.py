"""The Triton feed-forward block against float64, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradient_checks import check_against_formula
from torch import Tensor
from triton_dtypes import LAYOUTS_AND_DTYPES, QUICK_DTYPES

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("run by test_interpreted_triton.py, in a process of its own", allow_module_level=True)

import bigmodel_kernels as bk
from bigmodel_kernels.ops import philox
from bigmodel_kernels.ops.feed_forward import reference
from bigmodel_kernels.ops.feed_forward import triton as kernel
from bigmodel_kernels.triton_runtime import INTERPRETED
from bigmodel_kernels.verify import compare, feed_forward_formula, poisoned

DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, so that what a kernel does not write shows; and the seed is fixed."""
    torch.manual_seed(0)
    with poisoned():
        yield


def _block(rows: tuple[int, ...], width: int, hidden: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    w_in, w_out = tensor(hidden, width) / width**0.5, tensor(width, hidden) / hidden**0.5
    if layout == "conv1d":
        w_in, w_out = w_in.t().contiguous(), w_out.t().contiguous()
    return [tensor(*rows, width), w_in, tensor(hidden), w_out, tensor(width)]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def _check(arguments: list[Tensor | None], **options: Any) -> None:
    assert kernel.supports(*arguments, **options) is None
    out = kernel.run(*arguments, **options)
    # In float64 no rounding of the hidden layer: the rule compares with what is exact.
    exact = reference.run(*map(_double, arguments), **{k: _double(v) for k, v in options.items()})
    assert out.shape == exact.shape and out.is_contiguous()
    verdict = compare(out, feed_forward_formula(*arguments, **options), exact)
    assert verdict.ok, verdict


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("position", ["none", "pre", "post"])
def test_block(layout: str, position: str, dtype: torch.dtype) -> None:
    arguments = _block((2, 17), 40, 129, dtype, layout)
    norm = {"norm_weight": arguments[4] + 1, "norm_bias": arguments[4]} if position != "none" else {}
    for activation, residual in (("gelu", None), ("gelu_tanh", arguments[0])):
        options = {"weight_layout": layout, "residual": residual, "norm_position": position, **norm}
        _check([*arguments], activation=activation, **options)


@pytest.mark.parametrize("activation", ["none", "quick_gelu", "relu", "silu"])
def test_other_activations_and_no_bias(activation: str) -> None:
    x, w_in, _, w_out, _ = _block((33,), 17, 65, torch.float32, "linear")
    _check([x, w_in, None, w_out, None], activation=activation)


def test_no_tokens() -> None:
    _check([*_block((0,), 8, 9, torch.float32, "linear")], activation="gelu")


SEED = 2**35 + 9
NAMES = ("x", "w_in", "b_in", "w_out", "b_out", "residual", "norm_weight", "norm_bias", "w_gate", "b_gate")


def _check_both_ways(
    tensors: dict[str, Tensor | None], *, activation: str, layout: str = "linear", position: str = "none",
    norm_kind: str = "layer_norm", p: float = 0.0, recompute: bool = False,
) -> None:  # fmt: skip
    """Output and all gradients, by the numerics rule."""
    activations = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}

    def norm(y: Tensor, weight: Any, bias: Any) -> Tensor:
        if norm_kind == "rms_norm":
            return torch.nn.functional.rms_norm(y, y.shape[-1:], weight, 1e-5)
        return torch.nn.functional.layer_norm(y, y.shape[-1:], weight, bias, 1e-5)

    def project(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(y, weight.t() if layout == "conv1d" else weight, bias)

    def formula(**t: Any) -> Tensor:
        h = norm(t["x"], t["norm_weight"], t["norm_bias"]) if position == "pre" else t["x"]
        hidden = project(h, t["w_in"], t["b_in"])
        if t["w_gate"] is None:
            hidden = activations[activation](hidden)
        else:
            hidden = activations[activation](project(h, t["w_gate"], t["b_gate"])) * hidden
        y = project(hidden, t["w_out"], t["b_out"])
        if p:
            rows = y.numel() // y.shape[-1]
            keep = philox.keep_elements(torch.tensor(SEED), p, rows, y.shape[-1], y.dtype, y.device)
            y = y * keep.view(y.shape)
        y = y if t["residual"] is None else y + t["residual"]
        return norm(y, t["norm_weight"], t["norm_bias"]) if position == "post" else y

    seed = torch.tensor(SEED, device=DEVICE) if p else None
    arguments = [tensors[name] for name in NAMES] + [seed]
    options: dict[str, Any] = {
        "activation": activation, "weight_layout": layout, "norm_position": position, "norm_kind": norm_kind,
        "dropout_p": p,
    }  # fmt: skip
    assert kernel.supports_training(*arguments, **options, recompute=recompute) is None
    out, *saved = kernel.run_training(*arguments, **options, recompute=recompute)
    assert torch.equal(out, kernel.run(*arguments, **options))
    assert (saved[0].shape == (0,)) is recompute and (saved[2].shape == (0,)) is (position != "post")
    saved = [None if t.shape == (0,) else t for t in saved]
    upstream = torch.randn(out.shape, device=DEVICE).to(out.dtype)
    assert kernel.supports_backward(upstream, *arguments, *saved, **options) is None
    needs = [tensors[name] is not None for name in NAMES]
    grads = kernel.run_backward(upstream, *arguments, *saved, **options, needs=needs)
    check_against_formula(formula, tensors, upstream, {"out": out, **dict(zip(NAMES, grads, strict=True))})


def _tensors(dtype: torch.dtype, layout: str, gated: bool, norm: str | None) -> dict[str, Tensor | None]:
    x, w_in, b_in, w_out, b_out = _block((2, 9), 24, 65, dtype, layout)
    _, w_gate, b_gate, _, _ = _block((1,), 24, 65, dtype, layout)
    return {
        "x": x, "w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out, "residual": x.flip(0).clone(),
        "norm_weight": None if norm is None else b_out + 1,
        "norm_bias": b_out.flip(0) if norm == "layer_norm" else None,
        "w_gate": w_gate if gated else None, "b_gate": b_gate if gated else None,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", QUICK_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "position", "norm_kind", "gated", "recompute"),
    [
        ("linear", "post", "layer_norm", False, False),
        ("conv1d", "pre", "layer_norm", False, True),
        ("linear", "pre", "rms_norm", True, False),
        ("conv1d", "post", "rms_norm", True, True),
    ],
)
def test_gradients(
    layout: str, position: str, norm_kind: str, gated: bool, recompute: bool, dtype: torch.dtype
) -> None:
    """BERT, GPT-2, Llama and the rest, with dropout and residual."""
    _check_both_ways(
        _tensors(dtype, layout, gated, norm_kind), activation="silu" if gated else "gelu", layout=layout,
        position=position, norm_kind=norm_kind, p=0.2, recompute=recompute,
    )  # fmt: skip


def test_gradients_without_biases_and_residual() -> None:
    for gated in (False, True):
        tensors = _tensors(torch.float32, "linear", gated, None)
        _check_both_ways(
            {**tensors, "b_in": None, "b_out": None, "residual": None, "b_gate": None}, activation="gelu"
        )


def test_prenorm_is_computed_again() -> None:
    tensors = _tensors(torch.float32, "linear", False, "layer_norm")
    arguments = [tensors[name] for name in NAMES]
    options: dict[str, Any] = {"activation": "gelu", "norm_position": "post"}
    out, *saved = kernel.run_training(*arguments, **options)
    needs = [t is not None for t in arguments]
    kept = kernel.run_backward(torch.ones_like(out), *arguments, None, *saved, **options, needs=needs)
    again = kernel.run_backward(torch.ones_like(out), *arguments, **options, needs=needs)
    assert all(map(torch.equal, kept, again))


def test_only_what_is_needed() -> None:
    tensors = _tensors(torch.float32, "linear", True, "rms_norm")
    arguments = [tensors[name] for name in NAMES]
    options: dict[str, Any] = {"activation": "silu", "norm_position": "pre", "norm_kind": "rms_norm"}
    grad = torch.randn_like(arguments[0])
    every = kernel.run_backward(grad, *arguments, **options, needs=[t is not None for t in arguments])
    for i, tensor in enumerate(arguments):
        if tensor is not None:
            one = kernel.run_backward(grad, *arguments, **options, needs=[i == j for j in range(10)])
            assert torch.equal(one[i], every[i]) and all(t.shape == (0,) for j, t in enumerate(one) if j != i)


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    arguments = _block((9,), 16, 32, torch.float32, "linear")
    options: dict[str, Any] = {"activation": "gelu", "residual": arguments[0]}
    assert bk.explain("feed_forward", *arguments, **options).chosen == "triton"
    assert torch.equal(bk.feed_forward(*arguments, **options), kernel.run(*arguments, **options))


def test_reasons() -> None:
    arguments = _block((9,), 16, 32, torch.float64, "linear")
    assert "float64" in str(kernel.supports(*arguments, activation="gelu"))
