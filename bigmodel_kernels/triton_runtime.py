"""What the Triton launchers of every operation share: where a kernel may run, and how it is launched.

Triton decides when a function is decorated whether it will be compiled or interpreted
(``TRITON_INTERPRET=1`` runs kernels block by block in NumPy on the CPU), so the environment variable has to
be set before Triton is first imported, and one process cannot do both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True in a process that runs kernels in Triton's interpreter."""


class Target(NamedTuple):
    """What the tile choices need to know of a device."""

    processors: int
    """Streaming multiprocessors (NVIDIA) or compute units (AMD)."""
    shared_memory: int
    """Bytes of shared memory that one program may use."""
    warp: int = 32
    """Threads that execute together."""
    warpgroups: bool = False
    """Four warps issue matrix products of 64 rows together (Hopper, Blackwell), not each its own of 16."""
    tensor_memory: bool = False
    """Accumulators have a memory of their own (Blackwell)."""


HOPPER = Target(processors=132, shared_memory=232_448, warpgroups=True)
"""H100 and H200; also what the interpreter pretends to be."""
AMPERE = Target(processors=108, shared_memory=166_912)
BLACKWELL = Target(processors=148, shared_memory=232_448, warpgroups=True, tensor_memory=True)
MI300 = Target(processors=304, shared_memory=65_536, warp=64)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    # PyTorch publishes the shared memory of a program under two names, by version and vendor.
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    warpgroups = torch.version.hip is None and properties.major in (9, 10)
    warp = getattr(properties, "warp_size", 32)
    tensor_memory = warpgroups and properties.major == 10
    return Target(properties.multi_processor_count, shared, warp, warpgroups, tensor_memory)


_pretended: Target | None = None


@contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Choose tiles for ``target`` whatever device the tensors are on: for ahead-of-time compilation."""
    global _pretended
    before, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = before


def is_pretending() -> bool:
    """Whether tiles are being chosen for a device that is not there."""
    return _pretended is not None


def target_of(tensor: Tensor) -> Target:
    """The :class:`Target` that holds ``tensor``."""
    if _pretended is not None:
        return _pretended
    if tensor.device.type != "cuda":
        return HOPPER
    index = tensor.device.index
    return _device_target(torch.cuda.current_device() if index is None else index)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, which may be called in kernels too, takes the host microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def unsupported(argument: str, tensor: Tensor) -> str | None:
    """Why Triton cannot run on ``tensor``, or None if it can."""
    device = tensor.device.type
    if device == "cpu" and not INTERPRETED and not is_pretending():
        return f"{argument} is on the CPU, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    if device not in ("cuda", "cpu"):
        return f"{argument} is on {device}; Triton runs on CUDA and ROCm devices"
    if tensor.dtype not in DTYPES:
        return f"{argument} is {tensor.dtype}; the Triton kernels take float32, bfloat16 and float16"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _mend_interpreter() -> None:
    """Give the interpreter correct bfloat16, and products that do not depend on the tile.

    Triton 3.9's interpreter keeps bfloat16 as uint16 bit patterns, multiplies those patterns as integers in
    ``tl.dot`` and truncates where the hardware rounds to nearest even.

    NumPy adds up a product's terms in an order that goes with the shapes of the operands, so that one logit
    comes out differently in kernels of different tiles. On a device each element of a float32 product is one
    chain of fused multiply-adds along K in any tile, and kernels that make a probability again count on it:
    where it is nearly 1, two roundings of a large logit would be most of its error. Sums in float64, rounded
    at the end, do not depend on the order either. Only the interpreter is touched.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def widen(data: Any) -> Any:
        return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)

    def narrow(data: Any) -> Any:
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)

    def cast(self: Any, source: Any, target: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        return original_cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(operand.data), tl.float32) for operand in (a, b))
        if d.dtype.scalar != tl.float32:
            return original_dot(self, a, b, d, *rest)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, tl.float32)

    builder.cast_impl, builder.create_dot = cast, dot


if INTERPRETED:
    _mend_interpreter()
