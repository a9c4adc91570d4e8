"""What the compiled files of kernels and operators show to the linker."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from build_csrc import build_module

SOURCES = [*build_module().KERNELS, *build_module().OPS]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("source", SOURCES)
def test_a_file_has_a_function_that_others_can_see(library: Path, source: str) -> None:
    """By its name nvcc 12 tells what is local to one file from what is local to another. Where there is none
    it takes the number of its process, and no two builds have the same bytes."""
    name = source.replace("/", ".").rsplit(".", 1)[0] + ".o"
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(library.parent / name)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    seen = [symbol.split(" ", 2)[2] for symbol in symbols if " T " in symbol]
    assert [function for function in seen if function.startswith("bigmodel::cuda::")]
