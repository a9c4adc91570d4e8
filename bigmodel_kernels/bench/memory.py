"""How much memory a call takes at its peak, over what the process held before it.

On a GPU torch's allocator tells. On a CPU it is the growth of the process's resident memory, from Linux's own
high-water mark: hooks on saved tensors, and torch's allocator, do not see the scratch memory of oneDNN or of
compiled kernels, and a step that keeps little but needs large scratch would look better than it is. What
earlier calls have freed is given back to the system before the mark is set, so that reuse is not taken for
thrift. The mark is exact to a page.
"""

from __future__ import annotations

import ctypes
import functools
import gc
from pathlib import Path

import torch

from bigmodel_kernels import _native
from bigmodel_kernels.bench.timing import Contender

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak(contender: Contender, device: str) -> int | None:
    """Bytes by which a call raises the peak over what is held when its `before` is done; None on a system
    that does not tell.
    """
    run = contender.run if contender.before is None else functools.partial(contender.run, contender.before())
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    if not _CLEAR.exists():
        return None
    if not give_back():  # freed memory would count as held before
        return None
    try:
        _CLEAR.write_text("5")  # sets the high-water mark to what is held now
    except PermissionError:
        return None
    before = _kilobytes("VmRSS")
    result = run()
    highest = _kilobytes("VmHWM")
    del result
    return max(0, highest - before) * 1024


def give_back() -> bool:
    """Gives what has been freed, and what our kernels keep of it, back to the system; False where the C
    library cannot.
    """
    if _native.reason() is None:
        torch.ops.bigmodel.cpu_release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return trim is not None


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {name}")
