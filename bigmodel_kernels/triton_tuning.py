"""Which of a few configurations of a Triton kernel a device runs fastest: measured once, kept on disk.

A cost model picks at most a handful of candidates, the likeliest first (``ops/linear/triton_gemm.py``). The
first call of a shape on a GPU measures them, which takes a compilation and some hundredths of a second each;
later calls, in this process and the next, read the result from

    $XDG_CACHE_HOME/bigmodel_kernels/triton_tuning/v1/<device> triton-<version>.json     (or ~/.cache)

The file is replaced as a whole, so that a reader never sees half of one; a file that cannot be read is
ignored with a warning. Measuring stops for good when a process has spent BUDGET_SECONDS on it: what is left
unmeasured runs the cost model's first choice, and is measured by a later process.

Nothing is measured, and the first candidate runs unless the file knows better,

- with ``BIGMODEL_TRITON_TUNE=0``, when the file is not read either;
- under ``torch.use_deterministic_algorithms``, when the file is not read either: another tile is
  another order of summation;
- while a CUDA graph is captured, in the interpreter, and where the call cannot be repeated.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from .triton_runtime import is_pretending

ENVIRONMENT = "BIGMODEL_TRITON_TUNE"
VERSION = 1
BUDGET_SECONDS = 30.0

T = TypeVar("T", bound=tuple[Any, ...])

# Device name -> key -> configuration. Read from the file of the device on first use.
_known: dict[str, dict[str, list[Any]]] = {}
_spent = 0.0
_warned: set[str] = set()


def choose(
    key: str, candidates: Sequence[T], launch: Callable[[T], None], like: Tensor, *, repeatable: bool = True
) -> T:
    """The candidate to run on the device that holds ``like``; ``candidates`` come likeliest first.

    ``launch(candidate)`` runs the kernel; it is called many times if the choice has to be measured, so it
    must be ``repeatable``: give the same result again.
    """
    first = candidates[0]
    if (
        len(candidates) == 1
        or not _measurable(like)
        or os.environ.get(ENVIRONMENT) == "0"
        or torch.are_deterministic_algorithms_enabled()
    ):
        return first
    device = _device_name(like)
    known = _known.get(device)
    if known is None:
        known = _known[device] = _read(_path(device))
    stored = known.get(key)
    if stored is not None:
        for candidate in candidates:
            if list(candidate) == stored:
                return candidate
    if not repeatable or _spent >= BUDGET_SECONDS or _capturing(like):
        return first
    best = _fastest(candidates, launch)
    if best is None:  # the budget ran out before a comparison
        return first
    known[key] = list(best)
    _write(_path(device), device, key, known[key])
    return best


def _fastest(candidates: Sequence[T], launch: Callable[[T], None]) -> T | None:
    global _spent
    times: list[tuple[float, int]] = []
    for i, candidate in enumerate(candidates):
        if _spent >= BUDGET_SECONDS:
            return None
        begin = _clock()
        times.append((_measure(lambda candidate=candidate: launch(candidate)), i))  # type: ignore[misc]
        _spent += _clock() - begin
    return candidates[min(times)[1]]


_clock: Callable[[], float] = time.perf_counter


def _measure(run: Callable[[], None]) -> float:
    """Milliseconds that one run takes on the device: the median of some hundredths of a second of them."""
    run()  # compiles
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    repetitions = max(5, min(50, int(10 / max(begin.elapsed_time(end), 1e-3))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2]


def _measurable(like: Tensor) -> bool:
    return like.device.type == "cuda" and not is_pretending()


def _capturing(like: Tensor) -> bool:
    return torch.cuda.is_current_stream_capturing()


def _device_name(like: Tensor) -> str:
    return _name_of(like.device)


_name_of = functools.cache(torch.cuda.get_device_name)


def _path(device: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} triton-{triton.__version__}")
    return Path(cache, "bigmodel_kernels", "triton_tuning", f"v{VERSION}", f"{name}.json")


def _read(path: Path) -> dict[str, list[Any]]:
    """What the file holds; nothing, with a warning, if it is not what this version writes."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} is ignored: it cannot be read ({error})")
        return {}
    entries = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or document.get("version") != VERSION:
        _warn(f"{path} is ignored: it is not a table of version {VERSION}")
        return {}
    if not all(isinstance(value, list) for value in entries.values()):
        _warn(f"{path} is ignored: an entry of it is not a list")
        return {}
    return entries


def _write(path: Path, device: str, key: str, configuration: list[Any]) -> None:
    """Add an entry to the file: what another process has written since is kept."""
    entries = {**_read(path), key: configuration}
    document = {"version": VERSION, "device": device, "triton": triton.__version__, "entries": entries}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(document, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        _warn(f"{path} cannot be written, so kernels are tuned again by the next process ({error})")


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
