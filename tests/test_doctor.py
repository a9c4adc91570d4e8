"""What `doctor` finds live, off and broken, and what it says to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bigmodel_kernels as bk
from bigmodel_kernels import _native, cli, doctor
from bigmodel_kernels.doctor import BROKEN, LIVE, OFF, Gpus

ROOT = Path(__file__).parents[1]
HOPPER = Gpus(("NVIDIA H100",), (9, 0), driver=True)
CUDA_13 = _native.CudaBuild("13.0", ("80", "90a"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stands in for running operators on a GPU; keeps (backend, device)."""
    calls: list[tuple[str, str]] = []

    def run(backend: str, device: str, only: str | None = None) -> str | None:
        calls.append((backend, device))
        return None

    monkeypatch.setattr(doctor, "run_operators", run)
    return calls


def test_cpu_kernels() -> None:
    check = doctor.native_cpu(_native.reason())
    if _native.available():
        assert (check.status, check.detail) == (LIVE, f"instruction set {torch.ops.bigmodel.cpu_isa()}")
        assert check.fix is None
    else:
        assert check.status == BROKEN


def test_cpu_kernels_that_are_not_there() -> None:
    check = doctor.native_cpu("the CPU extension is not built")
    assert (check.status, check.detail) == (BROKEN, "the CPU extension is not built")
    assert check.fix is not None and "g++ 11" in check.fix


def test_an_operator_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise OSError("illegal something")

    assert doctor.run_operators("reference", "cpu") is None
    monkeypatch.setattr(bk, "rms_norm", fail)
    said = "rms_norm in torch.float32: OSError: illegal something"
    assert doctor.run_operators("reference", "cpu") == said
    assert doctor.run_operators("reference", "cpu", only="layer_norm") is None


def test_a_backend_that_cannot_run_the_one_operator_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = doctor.run_operators("triton", "cpu", only="layer_norm")
    assert said is not None and "BIGMODEL_BACKEND=triton cannot run layer_norm on cpu" in said


@pytest.mark.parametrize(
    ("driver", "build", "status"),
    [(False, None, OFF), (True, None, OFF), (False, CUDA_13, OFF), (True, CUDA_13, BROKEN)],
)
def test_cuda_without_a_gpu(driver: bool, build: _native.CudaBuild | None, status: str) -> None:
    """Only who has the driver and the wheel for it should have had CUDA."""
    check = doctor.native_cuda(Gpus(driver=driver), None, build, "this torch is built without CUDA")
    assert check.status == status
    assert ("the library here is for CUDA 13.0" in check.detail) == (build is not None)
    assert check.fix is not None and ("a torch for CUDA 13" in check.fix) == (status == BROKEN)


def test_a_wheel_of_another_cuda(ran: list[tuple[str, str]]) -> None:
    check = doctor.native_cuda(HOPPER, "12.6", CUDA_13, "the CUDA extension is built for CUDA 13.0, and")
    assert check.status == BROKEN
    assert check.fix is not None and check.fix.startswith("install the wheel for CUDA 12 (+cu124)")
    assert not ran


def test_a_wheel_of_another_cuda_is_named_without_a_gpu_too() -> None:
    reason = "the CUDA extension is built for CUDA 13.0, and this torch (2.10.0+cu128) for CUDA 12.8"
    check = doctor.native_cuda(Gpus(), "12.8", CUDA_13, reason)
    assert check.status == OFF and check.detail.endswith(reason)


def test_a_wheel_without_cuda_is_whole(ran: list[tuple[str, str]]) -> None:
    check = doctor.native_cuda(HOPPER, "13.0", None, "the CUDA extension is not built (x.so is missing)")
    assert (check.status, ran) == (OFF, [])
    assert check.fix is not None and check.fix.startswith("install the wheel for CUDA 13 (+cu130)")


def test_cuda_that_is_live(ran: list[tuple[str, str]]) -> None:
    check = doctor.native_cuda(HOPPER, "13.0", CUDA_13, None)
    assert (check.status, check.detail) == (LIVE, "built for CUDA 13.0, architectures 80 90a")
    assert ran == [("native", "cuda")]


def test_an_older_gpu_and_another_maker(ran: list[tuple[str, str]]) -> None:
    turing = Gpus(("NVIDIA T4",), (7, 5), driver=True)
    check = doctor.native_cuda(turing, "13.0", CUDA_13, None)
    assert (check.status, check.detail) == (OFF, "NVIDIA T4 is older than sm_80")
    assert doctor.native_cuda(Gpus(("AMD MI300X",), (9, 4)), None, None, "no CUDA").status == OFF
    assert not ran


def test_triton(ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.triton(Gpus()).status == OFF
    assert doctor.triton(HOPPER).status == LIVE
    monkeypatch.setattr(doctor, "run_operators", lambda *a, **k: "No module named 'triton'")
    check = doctor.triton(HOPPER)
    assert (check.status, check.detail) == (BROKEN, "No module named 'triton'")
    assert check.fix is not None and "bigmodel_kernels[triton]" in check.fix


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, OFF), ("4.57.1", BROKEN), ("5.15.2", BROKEN), ("5.16.0", LIVE), ("6.0.0rc1", LIVE)],
)
def test_transformers(version: str | None, status: str) -> None:
    check = doctor.installed_transformers(version)
    assert check.status == status
    assert (check.fix is None) == (status == LIVE)


def test_the_oldest_transformers_is_the_requirement() -> None:
    (oldest,) = re.findall(r'transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple(map(int, oldest.split("."))) == doctor.OLDEST_TRANSFORMERS


def test_the_command_fails_where_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "installed_transformers", lambda v: doctor.Check("transformers", BROKEN, "old", "new")
    )
    shown = CliRunner().invoke(cli.app, ["doctor"])
    assert shown.exit_code == 1
    assert "broken transformers: old" in shown.output and "to mend it: new" in shown.output
    found = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert found.exit_code == 1
    answer = json.loads(found.stdout)
    assert answer["ok"] is False
    broken = [check for check in answer["checks"] if check["status"] == BROKEN]
    assert broken == [{"name": "transformers", "status": BROKEN, "detail": "old", "fix": "new"}]


def test_a_wrong_instruction_set_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library refuses it when it is first asked, which in this process has been already."""

    def refuse() -> str:
        raise RuntimeError("BIGMODEL_CPU_ISA=foo is not supported by this CPU and build; supported: avx2")

    monkeypatch.setattr(torch.ops.bigmodel, "cpu_isa", refuse, raising=False)
    monkeypatch.setattr(_native, "reason", lambda: None)
    found = doctor.examine()
    (check,) = (c for c in found["checks"] if c["name"] == "native, cpu")
    assert check["status"] == BROKEN and check["detail"].startswith("BIGMODEL_CPU_ISA=foo")
    assert not found["ok"] and found["cpu"]["isa"] is None


def test_every_check_that_is_not_live_says_what_to_do() -> None:
    checks = doctor.examine()["checks"]
    assert {c["name"] for c in checks} == {
        "native, cpu",
        "native, cuda",
        "triton",
        "reference",
        "transformers",
    }
    assert all((c["fix"] is None) == (c["status"] == LIVE) for c in checks)
