"""Compiled libraries that are missing, do not fit or do not load: a reason, one warning, never an error."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends
from bigmodel_kernels.ops import cuda_library


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    def clear() -> None:
        _native.reason.cache_clear()
        _native.cuda_reason.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture
def cuda_library_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that says that it was built for CUDA 13.0, and is no library."""
    path = tmp_path / "libbigmodel_cuda.so"
    text = b"bigmodel_kernels CUDA library: CUDART_VERSION 13000, architectures 80 90a."
    path.write_bytes(b"\x7fELF" + bytes(5000) + text + bytes(5000))
    monkeypatch.setattr(_native, "_CUDA_LIBRARY", path)
    return path


def test_the_source_says_what_is_looked_for() -> None:
    source = (Path(__file__).parents[1] / "csrc" / "cuda_build.cpp").read_text()
    text = source[source.index('"bigmodel_kernels') :].replace('" TEXT(CUDART_VERSION) "', "12060")
    text = text.replace('" BIGMODEL_CUDA_ARCHS "', "80 90a")
    found = _native._CUDA_BUILD.search(text.encode())
    assert found is not None and found.groups() == (b"12060", b"80 90a")


def test_what_a_library_was_built_for(cuda_library_for: Path) -> None:
    assert _native.cuda_build() == _native.CudaBuild("13.0", ("80", "90a"))
    cuda_library_for.write_bytes(b"older sources")
    assert _native.cuda_build() is None
    cuda_library_for.unlink()
    assert _native.cuda_build() is None


def test_a_torch_without_cuda(cuda_library_for: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.cuda_reason() == f"this torch ({torch.__version__}) is built without CUDA"


@pytest.mark.parametrize(
    ("torch_cuda", "remedy"),
    [
        (None, "it needs a torch with CUDA, and the wheel"),
        ("12.8", "install the wheel for CUDA 12 (+cu124), or build with BIGMODEL_CUDA=1 and nvcc of CUDA 12"),
        ("13.0", "install the wheel for CUDA 13 (+cu130), or build with BIGMODEL_CUDA=1 and nvcc of CUDA 13"),
        ("14.0", "build with BIGMODEL_CUDA=1 and nvcc of CUDA 14"),  # which has no wheel yet
    ],
)
def test_a_wheel_without_cuda_names_the_one_that_fits(
    torch_cuda: str | None, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "_CUDA_LIBRARY", tmp_path / "libbigmodel_cuda.so")
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    said = cuda_library.lacking(torch.zeros(8, dtype=torch.bfloat16))
    missing = "the CUDA extension is not built (libbigmodel_cuda.so is missing); "
    assert said is not None and said.startswith(missing + remedy)


def test_the_wheels_that_are_named_are_those_of_the_documentation() -> None:
    building = (Path(__file__).parents[1] / "docs" / "building.md").read_text()
    documented = re.findall(
        r"^\| `bigmodel_kernels-\S+(\+cu\d+)` .* a torch of CUDA (\d+)", building, re.MULTILINE
    )
    assert {major: wheel for wheel, major in documented} == _native._CUDA_WHEELS


@pytest.mark.parametrize("torch_cuda", ["12.6", "14.0"])
def test_a_torch_of_another_cuda_is_warned_of_once(
    torch_cuda: str, cuda_library_for: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    tensor = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="built for CUDA 13.0, and this torch") as caught:
        said = [cuda_library.lacking(tensor) for _ in range(3)]
    assert len(caught) == 1
    assert said[0] is not None and said[0].endswith(f"for CUDA {torch_cuda}") and len(set(said)) == 1


def test_a_torch_of_the_same_major_is_tried(cuda_library_for: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    with pytest.warns(RuntimeWarning, match="the CUDA extension does not load"):  # for it is no library
        assert "does not load" in str(_native.cuda_reason())


def test_without_a_cpu_library_that_loads_the_reference_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libbigmodel_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_LIBRARY", broken)
    x, weight = torch.randn(4, 64), torch.randn(64)
    with backends.use("reference"):
        expected = bk.rms_norm(x, weight)
    with pytest.warns(
        RuntimeWarning, match="the CPU extension does not load.*bigmodel-kernels doctor"
    ) as caught:
        out = [bk.rms_norm(x, weight) for _ in range(2)]
    assert len(caught) == 1
    torch.testing.assert_close(out[0], expected)
    assert bk.explain("rms_norm", x, weight).chosen == "reference"


def test_a_cpu_library_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "libbigmodel_cpu.so")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "nowhere")])
    said = "the CPU extension is not built (libbigmodel_cpu.so is missing); reinstall with a C++20 compiler"
    assert said in str(_native.reason())


def test_sources_that_hide_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python in a clone, after `pip install .`: it finds the clone's own folder first."""
    clone, installed = tmp_path / "clone/bigmodel_kernels", tmp_path / "site-packages/bigmodel_kernels"
    for folder in (clone, installed):
        folder.mkdir(parents=True)
    (installed / "libbigmodel_cpu.so").touch()
    monkeypatch.setattr(_native, "_LIBRARY", clone / "libbigmodel_cpu.so")
    monkeypatch.setattr(sys, "path", [str(clone.parent), str(installed.parent)])
    expected = f"is missing) in {clone}, which Python found before the package in {installed}: start"
    assert expected in str(_native.reason())
