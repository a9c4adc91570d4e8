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

from bigmodel_kernels import triton_build

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
@pytest.mark.parametrize(
    "case",
    [
        "linear bf16 4096x768x3072 training",
        "feed_forward backward bf16 768x3072 gelu",
        "cross_entropy bf16 768x50257",
    ],
)
def test_every_target_uses_its_matrix_unit(case: str) -> None:
    """Tensor descriptors on Hopper and Blackwell included: the wanted instruction, and no spill."""
    wanted = {"sm_80": "mma.m16n8k16", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    results = _build("--case", case, "--jobs", "2", timeout=600)
    assert {r["target"] for r in results} == set(wanted)
    for result in results:
        if result["kernel"] in ("linear_kernel", "hidden_backward_kernel"):
            assert wanted[result["target"]] in result["mma"], result


def test_a_case_that_is_not_there() -> None:
    with pytest.raises(SystemExit):
        triton_build.main(["--case", "no such case"])


def test_a_spill_and_a_failure_are_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status and what is said of them, without a compiler."""

    def build(case: str, target: str) -> list[triton_build.Result]:
        if case == "broken":
            raise ValueError("no such instruction")
        spilled = 8 if case == "spilling" else 0
        return [triton_build.Result(case, "kernel", target, 32, 0, spilled, "-", 0.1)]

    monkeypatch.setattr(triton_build, "build", build)
    monkeypatch.setattr(triton_build, "CASES", dict.fromkeys(("fine", "spilling", "broken")))
    options = ["--target", "sm_90", "--jobs", "1"]
    assert triton_build.main([*options, "--case", "fine"]) == 0
    assert "1 kernels in" in capsys.readouterr().out
    assert triton_build.main([*options, "--case", "spilling"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    assert triton_build.main([*options, "--case", "broken"]) == 1
    assert "broken on sm_90: ValueError: no such instruction" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_on_every_target() -> None:
    """Takes minutes; a spill or a failure makes the exit status 1."""
    results = _build(timeout=1800)
    assert {r["target"] for r in results} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for result in results:
        half = " fp32 " not in result["case"]
        if half and result["kernel"] in ("attention_kernel", "linear_kernel", "hidden_backward_kernel"):
            assert result["mma"] != "-", result


def test_an_interpreting_process_refuses() -> None:
    code = "from bigmodel_kernels import triton_build as b; b.build('norm bf16 384', 'sm_90')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and "TRITON_INTERPRET" in result.stderr
