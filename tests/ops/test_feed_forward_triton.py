"""The Triton feed-forward block against float64, in Triton's interpreter or on a GPU."""

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", ["none", "pre", "post"])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
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


def test_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "triton")
    arguments = _block((9,), 16, 32, torch.float32, "linear")
    options: dict[str, Any] = {"activation": "gelu", "residual": arguments[0]}
    assert bk.explain("feed_forward", *arguments, **options).chosen == "triton"
    assert torch.equal(bk.feed_forward(*arguments, **options), kernel.run(*arguments, **options))


def test_reasons() -> None:
    arguments = _block((9,), 16, 32, torch.float64, "linear")
    assert "float64" in str(kernel.supports(*arguments, activation="gelu"))
