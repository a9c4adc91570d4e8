"""Whatever a raw CPU operator is called with, it raises an error that names an argument or gives a result
that it has written in full, leaves what it was given as it was, and stays within its memory.

The last is seen by `make sanitize`, which runs this file on a library built with AddressSanitizer, with many
times the examples; elsewhere such a fault is seen only where it ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigmodel_kernels import _native, verify

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

from raw_calls import MAKERS, Inputs, resolved, spoil

native = torch.ops.bigmodel
ISAS = native.cpu_isas().split(", ")
# Of the largest element: sums of a hundred products, rounded in other orders.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 8e-3}
# What torch says before an operator sees its arguments, of memory that it does not have, and when it is asked
# about None that stands for a tensor.
TORCH_REFUSES = re.compile(
    r"There were no tensor arguments|Could not run 'bigmodel::\w+'|not enough memory|can't allocate|"
    r"DefaultCPUAllocator|out of memory|overflow|invalid combination of arguments|"
    r"is not currently supported by the .* backend|with Meta tensors|aoti_torch_get_\w+\(.*\) API call failed"
)
# These are made of other operators, and their errors speak of their arguments.
_LAYER = (
    *("packed", "packed_in", "packed_out", "bias", "b_in", "b_out", "b_gate", "residual"),
    *("norm_weight", "norm_bias", "softmax_scale"),
)
INNER = {
    "cpu_layer_end": ("bias", "cu_seqlens_q", "cu_seqlens_k", "packed", "residual"),
    "cpu_layers": (
        *(*_LAYER, "keys", "values", "q_norm_weight", "k_norm_weight"),
        *("crossed_keys", "crossed_values", "key_padding_mask", "attention_bias"),
    ),
    "cpu_encoder": (*_LAYER, "query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "attention_bias"),
}
WRITTEN = {"cpu_layers": ("buffers",)}


@pytest.fixture(autouse=True)
def _instruction_set() -> Iterator[None]:
    before = native.cpu_isa()
    yield
    native.cpu_set_isa(before)


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []


def memory_of(value: Any) -> list[Tensor]:
    """The bytes behind every tensor, whatever view of them it is."""
    dense = [t for t in tensors_in(value) if t.layout == torch.strided and t.device.type == "cpu"]
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in dense]


def call(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(getattr(native, op)(**arguments))


def check_call(op: str, arguments: dict[str, Any]) -> list[Tensor] | None:
    """The results, or None where the call was refused with a reason."""
    read = {name: value for name, value in arguments.items() if name not in WRITTEN.get(op, ())}
    before = memory_of(read)
    try:
        results = call(op, arguments)
    except (RuntimeError, TypeError, IndexError) as error:
        text = str(error)
        named = any(re.search(rf"\b{re.escape(name)}\b", text) for name in (*arguments, *INNER.get(op, ())))
        assert named or TORCH_REFUSES.search(text), f"{op} names no argument: {text}"
        results = None
    for old, new in zip(before, memory_of(read), strict=True):
        assert torch.equal(old, new), f"{op} wrote into an argument"
    for result in results or ():
        assert result.device.type == "cpu" and result.layout == torch.strided
        result.clone()  # reads all of it
    return results


def test_every_raw_operator_is_called() -> None:
    names = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("bigmodel::cpu_")
    }
    assert names == set(MAKERS)


@pytest.mark.parametrize("op", sorted(MAKERS))
@given(data=st.data())
def test_valid_calls(op: str, data: st.DataObject) -> None:
    """Every element of a result is written, with what the kernels for every CPU make of it."""
    native.cpu_set_isa(isa := data.draw(st.sampled_from(ISAS)))
    inputs = Inputs(data.draw)
    arguments = MAKERS[op](inputs)
    given_ = {name: resolved(value) for name, value in arguments.items()}
    with verify.poisoned():
        results = check_call(op, given_)
    assert results is not None, "a valid call was refused"
    assert not any(result.isnan().any() for result in results if result.is_floating_point())
    native.cpu_set_isa(ISAS[-1])
    expected = call(op, {name: resolved(value) for name, value in arguments.items()})
    if op == "cpu_pack_weight":  # each instruction set has a form of its own, which the products read
        return
    for result, other in zip(results, expected, strict=True):
        assert result.dtype == other.dtype and result.shape == other.shape
        if not result.is_floating_point():
            assert torch.equal(result, other), isa
        elif result.numel():
            finite = other.isfinite()
            assert torch.equal(result.isfinite(), finite), isa
            scale = float(other[finite].abs().max()) if finite.any() else 0.0
            # Layers one behind the other round one after the other.
            layers = len(arguments.get("epsilons", ())) // 3 or 1
            wide = TOLERANCE[inputs.dtype] * max(scale, 1.0) * layers
            torch.testing.assert_close(result[finite].double(), other[finite].double(), rtol=0, atol=wide)


@pytest.mark.parametrize("op", sorted(MAKERS))
@given(data=st.data())
def test_spoiled_calls(op: str, data: st.DataObject) -> None:
    native.cpu_set_isa(data.draw(st.sampled_from(ISAS)))
    inputs = Inputs(data.draw)
    arguments = {name: resolved(value) for name, value in MAKERS[op](inputs).items()}
    for _ in range(data.draw(st.integers(1, 3)) if arguments else 0):
        spoil(inputs, arguments)
    check_call(op, arguments)
