"""Loads the compiled libraries once, on first need, and says why where it cannot."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "libbigmodel_cpu.so"
_CUDA_LIBRARY = Path(__file__).parent / "libbigmodel_cuda.so"


@functools.cache
def reason() -> str | None:
    """Why the compiled library is not loaded, or None where it is."""
    if not _LIBRARY.exists():
        return (
            f"the CPU extension is not built ({_LIBRARY.name} is missing); "
            "reinstall with a C++20 compiler and ninja on PATH"
        )
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"the CPU extension does not load: {error}"
    return None


_pretending: ContextVar[bool] = ContextVar("pretending", default=False)


@contextmanager
def pretend_loaded() -> Iterator[None]:
    """Both libraries count as built from these sources, and the GPU as a Hopper one, inside the block.

    To ask what they can run, on a machine where they cannot: nothing is loaded.
    """
    token = _pretending.set(True)
    try:
        yield
    finally:
        _pretending.reset(token)


def is_pretending() -> bool:
    """Whether this is inside `pretend_loaded`."""
    return _pretending.get()


def available() -> bool:
    """Whether the compiled CPU ops (``torch.ops.bigmodel.cpu_*``) can be called."""
    return reason() is None


@functools.cache
def cuda_reason() -> str | None:
    """Why the CUDA library is not loaded, or None where it is (``torch.ops.bigmodel.cuda_*``)."""
    if not _CUDA_LIBRARY.exists():
        return (
            f"the CUDA extension is not built ({_CUDA_LIBRARY.name} is missing); "
            "reinstall with nvcc on PATH and BIGMODEL_CUDA=1"
        )
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return f"the CUDA extension does not load: {error}"
    return None
