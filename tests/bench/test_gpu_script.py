"""The dry run of benchmarks/gpu.sh, whose first real run should not be the first run of its steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def dry_run(python: str) -> subprocess.CompletedProcess[str]:
    """Without nvcc: tests/csrc/test_cuda_build.py compiles the kernels."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run", python],
        env={**os.environ, "NVCC": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_step_is_in_order() -> None:
    done = dry_run(sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("doctor", "kernels", "tests", "linear", "verify", "bench"):
        assert f"\n{step}, at most" in done.stdout


def test_a_step_that_cannot_run_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    refuse = 'case "$*" in *verify*) echo no such option; exit 2;; *-m*) exit 0;; esac'
    python.write_text(f'#!/bin/sh\n{refuse}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = dry_run(str(python))
    assert done.returncode == 1 and done.stderr == "failed: verify\n"
    assert "no such option" in done.stdout
