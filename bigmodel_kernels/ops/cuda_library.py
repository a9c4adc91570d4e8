"""What the operators that call the compiled CUDA library have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import _native

_DTYPES = (torch.bfloat16, torch.float16)


def lacking(tensor: Tensor) -> str | None:
    """Why the library cannot run on tensors of this dtype and device, or None where it can."""
    if tensor.dtype not in _DTYPES:
        instead = "; Triton's kernels take it" if tensor.dtype == torch.float32 else ""
        return f"it has no {tensor.dtype}, for its tensor cores take bfloat16 and float16{instead}"
    if not _native.is_pretending() and (reason := _native.cuda_reason()):
        return reason
    if _capability(tensor) < (8, 0):
        return f"{torch.cuda.get_device_name(tensor.device)} is older than sm_80"
    return None


def _capability(tensor: Tensor) -> tuple[int, int]:
    return (9, 0) if _native.is_pretending() else _capability_of(tensor.device)


#: Every call asks, and torch's own answer takes longer than the rest of the asking.
_capability_of = functools.cache(torch.cuda.get_device_capability)


#: Compute capabilities on which the library has been measured to be faster than Triton's kernels.
_MEASURED = ((9, 0),)


def unmeasured(tensor: Tensor, *args: Any, **options: Any) -> str | None:
    """Why Triton's kernels come before the library's on this device, or None where they do not."""
    capability = _capability(tensor)
    if capability in _MEASURED:
        return None
    return (
        "its kernels are verified in the emulator and not yet measured on "
        f"sm_{capability[0]}{capability[1]}; BIGMODEL_BACKEND=native"
    )


def readable(tensor: Tensor) -> bool:
    """Rows are copied 16 bytes at a time."""
    if tensor.is_contiguous() and tensor.shape[-1] % 8 == 0:  # as most are
        return tensor.data_ptr() % 16 == 0
    strides = [s for s, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides)


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros that a kernel counts its blocks in, and leaves as zeros.

    Calls on one stream run one after the other and share them. A CUDA graph may be replayed on any stream,
    beside other work, and gets its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    size = max(1024, 1 << (count - 1).bit_length())
    return _kept_counters(device, torch.cuda.current_stream(device).cuda_stream, size)


@functools.cache
def _kept_counters(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def captured(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Replays a CUDA graph of so many calls; raises where a call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # what is allocated once is not allocated in the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
