"""Loads the compiled libraries once, on first need, and says why where it cannot.

A library that is there and cannot be used is the subject of one RuntimeWarning: something else runs instead.
"""

from __future__ import annotations

import functools
import mmap
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "libbigmodel_cpu.so"
_CUDA_LIBRARY = Path(__file__).parent / "libbigmodel_cuda.so"

#: What csrc/cuda_build.cpp leaves in the CUDA library.
_CUDA_BUILD = re.compile(
    rb"bigmodel_kernels CUDA library: CUDART_VERSION (\d+), architectures ([0-9a-z ]+)\."
)

#: torch's major version of CUDA -> the wheel for it, of those in docs/building.md.
_CUDA_WHEELS = {"12": "+cu124", "13": "+cu130"}


@dataclass(frozen=True)
class CudaBuild:
    """What the CUDA library was built for: a CUDA version such as "13.0", and architectures such as "90a"."""

    cuda: str
    architectures: tuple[str, ...]


def _installed_behind() -> Path | None:
    """The folder of an installed package that has the library, where Python found this one before it."""
    for folder in map(Path, sys.path):
        library = folder / _LIBRARY.parent.name / _LIBRARY.name
        if library.exists():
            return library.parent
    return None


@functools.cache
def reason() -> str | None:
    """Why the compiled library is not loaded, or None where it is."""
    if not _LIBRARY.exists():
        missing = f"the CPU extension is not built ({_LIBRARY.name} is missing)"
        if behind := _installed_behind():
            return (
                f"{missing} in {_LIBRARY.parent}, which Python found before the package in {behind}: "
                "start it in another folder, or `pip install --no-build-isolation -e .` here"
            )
        return f"{missing}; reinstall with a C++20 compiler and ninja on PATH"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return _warned(f"the CPU extension does not load: {error}")
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


def cuda_build() -> CudaBuild | None:
    """What the CUDA library was built for, read from its file; None without one, or where it does not say."""
    if not _CUDA_LIBRARY.exists():
        return None
    with _CUDA_LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = _CUDA_BUILD.search(content)
        if found is None:
            return None
        version = int(found[1])
        return CudaBuild(f"{version // 1000}.{version % 1000 // 10}", tuple(found[2].decode().split()))


def how_to_have_cuda(torch_cuda: str | None) -> str:
    """How to get the CUDA library for a torch of this CUDA version, such as "13.0", or without (None)."""
    if torch_cuda is None:
        return "it needs a torch with CUDA, and the wheel for that CUDA"
    major = torch_cuda.partition(".")[0]
    from_sources = f"build with BIGMODEL_CUDA=1 and nvcc of CUDA {major} (docs/building.md)"
    if major not in _CUDA_WHEELS:
        return from_sources
    return f"install the wheel for CUDA {major} ({_CUDA_WHEELS[major]}), or {from_sources}"


@functools.cache
def cuda_reason() -> str | None:
    """Why the CUDA library is not loaded, or None where it is (``torch.ops.bigmodel.cuda_*``)."""
    if not _CUDA_LIBRARY.exists():
        return (
            f"the CUDA extension is not built ({_CUDA_LIBRARY.name} is missing); "
            f"{how_to_have_cuda(torch.version.cuda)}"
        )
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    build = cuda_build()
    # The CUDA runtime is linked in; what is built for one minor version runs with the others of its major.
    if build is not None and build.cuda.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return _warned(
            f"the CUDA extension is built for CUDA {build.cuda}, and this torch ({torch.__version__}) "
            f"for CUDA {torch.version.cuda}"
        )
    try:
        torch.ops.load_library(str(_CUDA_LIBRARY))
    except OSError as error:
        return _warned(f"the CUDA extension does not load: {error}")
    return None


def _warned(text: str) -> str:
    warnings.warn(
        f"bigmodel_kernels: {text}; `bigmodel-kernels doctor` says what to do", RuntimeWarning, stacklevel=3
    )
    return text
