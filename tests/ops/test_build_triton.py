"""The Triton kernels compile ahead of time, without a GPU, to matrix instructions and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def _build(*arguments: str, timeout: int = 120) -> list[dict[str, Any]]:
    """A process of its own: this one may be the interpreter's, which cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bigmodel_kernels.triton_build", "--json", *arguments]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", ["attention bf16 d32", "linear bf16 512x768x768"])
def test_matrix_instructions(case: str) -> None:
    sm_90, gfx942 = _build("--target", "sm_90", "--target", "gfx942", "--case", case)
    assert "wgmma" in sm_90["mma"] and "bf16" in sm_90["mma"]
    assert "v_mfma" in gfx942["mma"] and "bf16" in gfx942["mma"]
    for result in (sm_90, gfx942):
        assert result["case"] == case and result["spilled_bytes"] == 0 and result["registers"] > 0
        assert 0 < result["shared_bytes"] <= (232_448 if result is sm_90 else 65_536)


@pytest.mark.slow
def test_every_case_on_every_target() -> None:
    """Takes minutes; a spill or a failure makes the exit status 1."""
    results = _build(timeout=1800)
    assert {r["target"] for r in results} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for result in results:
        half = " fp32 " not in result["case"]
        if half and result["kernel"] in ("attention_kernel", "linear_kernel"):
            assert result["mma"] != "-", result


def test_an_interpreting_process_refuses() -> None:
    code = "from bigmodel_kernels import triton_build as b; b.build('norm bf16 384', 'sm_90')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and "TRITON_INTERPRET" in result.stderr
