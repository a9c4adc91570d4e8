"""How wheels are named, put together and compared: what needs no compiler and no new environment."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import bigmodel_kernels as bk

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


debian = load("debian")  # first: the others import it, and each other
cuda12, wheels, wheels_check = load("cuda12"), load("wheels"), load("wheels_check")
aarch64 = load("aarch64")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88", "cu130"),
        ("Cuda compilation tools, release 12.6, V12.6.85\nBuild cuda_12.6", "cu126"),
    ],
)
def test_a_compiler_says_its_variant(text: str, name: str) -> None:
    assert wheels.cuda_name(text) == name


def test_a_compiler_that_says_nothing() -> None:
    with pytest.raises(ValueError, match="no CUDA release in 'clang'"):
        wheels.cuda_name("clang")


def test_what_is_built() -> None:
    variants, left_out = wheels.choose([], {"cu130": "/b/nvcc", "cu118": "/c/nvcc"})
    assert [(v.name, v.nvcc) for v in variants] == [("cpu", None), ("cu130", "/b/nvcc")]
    assert left_out == ["12"]
    variants, left_out = wheels.choose([], {"cu130": "/b", "cu124": "/d", "cu128": "/e"})
    assert [v.name for v in variants] == ["cpu", "cu128", "cu130"] and not left_out
    variants, left_out = wheels.choose(["aarch64"], {"cu130": "/b"})
    assert [(v.name, v.nvcc, v.machine()) for v in variants] == [
        ("aarch64", None, "aarch64")
    ] and not left_out
    variants, left_out = wheels.choose(["cu124"], {"cu124": "/d", "cu128": "/e"})
    assert [(v.name, v.nvcc) for v in variants] == [("cu124", "/d")] and not left_out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cu126", r"variant='cu126' needs nvcc 12\.6 \(set NVCC\); there is: cu130 \(/b/nvcc\)"),
        ("rocm", "variant='rocm' is unknown; allowed are cpu, aarch64, and names such as cu124"),
        ("cu12", "variant='cu12' is unknown"),
    ],
)
def test_what_cannot_be_built(name: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        wheels.choose([name], {"cu130": "/b/nvcc"})


def test_the_compilers_that_NVCC_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, release in (("a", "12.6"), ("b", "12.8"), ("c", "12.6")):
        compiler = tmp_path / folder / "nvcc"
        compiler.parent.mkdir()
        compiler.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("NVCC", ":".join(str(tmp_path / folder / "nvcc") for folder in "abc"))
    found = wheels.compilers()
    assert found["cu126"] == str(tmp_path / "a" / "nvcc")  # the first
    assert found["cu128"] == str(tmp_path / "b" / "nvcc")


@pytest.mark.parametrize(
    ("debian", "ours"),
    [
        ("./usr/lib/nvidia-cuda-toolkit/bin/nvcc", "bin/nvcc"),
        ("./usr/bin/nvcc", None),  # a script that calls the one above
        ("./usr/bin/cudafe++", "bin/cudafe++"),
        ("./usr/lib/nvidia-cuda-toolkit/bin/cicc", "nvvm/bin/cicc"),
        ("./usr/lib/nvidia-cuda-toolkit/libdevice/libdevice.10.bc", "nvvm/libdevice/libdevice.10.bc"),
        ("./usr/include/crt/host_config.h", "include/crt/host_config.h"),
        ("./usr/lib/x86_64-linux-gnu/libcudart_static.a", "lib64/libcudart_static.a"),
        ("./usr/lib/x86_64-linux-gnu/libcublas_static.a", None),
    ],
)
def test_where_debians_files_belong(debian: str, ours: str | None) -> None:
    assert cuda12.place(debian) == ours


def test_a_variant_sets_all_that_the_build_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"BIGMODEL_CUDA": "0", "BIGMODEL_LOCAL_VERSION": "", "BIGMODEL_TARGET": ""}
    assert wheels.Variant("cpu").environment() == cpu
    assert wheels.Variant("aarch64").environment() == {**cpu, "BIGMODEL_TARGET": "aarch64"}
    cuda = wheels.Variant("cu130", "/b/nvcc").environment()
    assert cuda.pop("BIGMODEL_LINEINFO") == "0"  # which would hold the times of source files
    chosen = {"BIGMODEL_CUDA": "1", "BIGMODEL_LOCAL_VERSION": "cu130", "NVCC": "/b/nvcc"}
    assert cuda == {**chosen, "BIGMODEL_TARGET": ""}


def test_the_local_version_is_in_the_metadata(tmp_path: Path) -> None:
    """setup.py's part of it, without a compiler."""
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "egg_info", "--egg-base", str(tmp_path)]
    environment = {"PATH": "/usr/bin:/bin", "BIGMODEL_LOCAL_VERSION": "cu130"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (metadata,) = tmp_path.glob("*.egg-info/PKG-INFO")
    assert f"\nVersion: {bk.__version__}+cu130\n" in metadata.read_text()


def test_what_torch_brings_is_left_out() -> None:
    """The libraries that csrc/build.py links with; never the CUDA runtime, which is in ours."""
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(wheels.FROM_TORCH)
    assert not any("cudart" in library for library in wheels.FROM_TORCH)


def pack(path: Path, names: list[str], year: int, mode: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name, (year, 5, 6, 7, 8, 10))
            info.external_attr = mode << 16
            archive.writestr(info, f"content of {name}\n" * 20)


def test_the_same_files_make_the_same_wheel(tmp_path: Path) -> None:
    names = ["p-1.dist-info/RECORD", "p-1.dist-info/METADATA", "p/__init__.py", "p/libp.so"]
    one, other = tmp_path / "one.whl", tmp_path / "other.whl"
    pack(one, names, 2020, 0o100600)
    pack(other, names[::-1], 2024, 0o100775)
    assert one.read_bytes() != other.read_bytes()
    wheels.normalise(one)
    wheels.normalise(other)
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as archive:
        found = archive.infolist()
        assert archive.testzip() is None
        assert archive.read("p/__init__.py") == b"content of p/__init__.py\n" * 20
    assert [info.filename for info in found] == ["p/__init__.py", "p/libp.so", *names[1::-1]]
    assert {info.filename: info.external_attr >> 16 for info in found}["p/libp.so"] == 0o100755
    assert {info.external_attr >> 16 for info in found if not info.filename.endswith(".so")} == {0o100644}


def test_what_differs_between_two_wheels_is_named(tmp_path: Path) -> None:
    names = ["p/__init__.py", "p/libp.so", "p-1.dist-info/RECORD"]
    one, other = tmp_path / "one.whl", tmp_path / "other.whl"
    pack(one, names, 2020, 0o100644)
    pack(other, [*names, "p/more.py"], 2020, 0o100644)
    assert wheels.differences(one, one) == []
    assert wheels.differences(one, other) == wheels.differences(other, one) == ["p/more.py"]
    with zipfile.ZipFile(other, "w") as archive:
        for name in names:
            archive.writestr(name, "something else")
    assert wheels.differences(one, other) == ["p/__init__.py", "p/libp.so"]


def test_sources_are_copied_as_they_are_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    (tree / "csrc").mkdir(parents=True)
    (tree / "csrc" / "a.cpp").write_text("1")
    (tree / "b.py").write_text("2")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    (tree / "unknown.txt").write_text("to git")
    monkeypatch.setattr(wheels, "ROOT", tree)
    wheels.copy_sources(copy)
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == {"csrc/a.cpp", "b.py"}
    before = (copy / "csrc" / "a.cpp").stat().st_mtime_ns
    (copy / "build").mkdir()
    (copy / "build" / "a.o").write_text("kept for the next build")
    (copy / "stray.py").write_text("not the tree's")
    (tree / "b.py").write_text("changed")
    wheels.copy_sources(copy)
    assert (copy / "csrc" / "a.cpp").stat().st_mtime_ns == before
    assert (copy / "b.py").read_text() == "changed"
    assert (copy / "build" / "a.o").exists() and not (copy / "stray.py").exists()


def fatbin(*entries: tuple[int, int, int]) -> bytes:
    """A container of entries of (kind, architecture, size of content), as nvcc embeds it."""
    content = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 0x101, 64, size, architecture) + bytes(size)
        for kind, architecture, size in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


def test_sizes_of_gpu_code() -> None:
    stray = wheels.FATBIN + b"no container"
    library = (
        b"text" + fatbin((2, 80, 100), (1, 80, 30)) + stray + fatbin((2, 90, 50), (2, 80, 6)) + bytes(20)
    )
    assert wheels.gpu_code(library) == {"sm_80": 100 + 64 + 6 + 64, "compute_80": 30 + 64, "sm_90": 50 + 64}


@pytest.mark.parametrize(
    ("torch_cuda", "built_for", "loaded", "right"),
    [
        (None, None, False, True),  # the wheel for CPUs
        (None, "13.0", False, True),
        ("13.2", "13.0", True, True),
        ("13.2", "13.0", False, False),  # should have been
        ("12.8", "13.0", False, True),
        ("12.8", "13.0", True, False),  # should not
    ],
)
def test_the_doctors_answer_is_read(
    torch_cuda: str | None, built_for: str | None, loaded: bool, right: bool
) -> None:
    found = {
        "cpu": {"isa": "avx2"},
        "native_library": {"loaded": True, "reason": None},
        "cuda_library": {
            "loaded": loaded,
            "reason": None if loaded else "no fit",
            "built_for": built_for and {"cuda": built_for, "architectures": ["80"]},
        },
        "gpu": {"torch_cuda": torch_cuda},
    }
    said = f"CPU: avx2; CUDA: {'loaded' if loaded else 'no fit'}"
    assert wheels_check.doctors_answer(json.dumps(found)) == (right, said)
    found["native_library"] = {"loaded": False, "reason": "broken"}
    assert wheels_check.doctors_answer(json.dumps(found))[0] is False


def test_wheels_are_tried_without_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BIGMODEL_BACKEND", "reference")
    monkeypatch.setenv("HOME_OF_SOMETHING", "kept")
    environment = wheels_check.clean_environment()
    assert "PYTHONPATH" not in environment and "BIGMODEL_BACKEND" not in environment
    assert environment["HOME_OF_SOMETHING"] == "kept"
    assert all((ROOT / test).exists() for test in (*wheels_check.TESTS, *aarch64.TESTS))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_debians_packages_are_loaded_with_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a package made here, and an apt-get that writes down what it is asked."""
    root, package = tmp_path / "package", tmp_path / "tool_1_all.deb"
    (root / "DEBIAN").mkdir(parents=True)
    fields = {"Package": "tool", "Version": 1, "Architecture": "all", "Maintainer": "us", "Description": "-"}
    control = "".join(f"{name}: {value}\n" for name, value in fields.items())
    (root / "DEBIAN" / "control").write_text(control)
    (root / "usr" / "bin").mkdir(parents=True)
    (root / "usr" / "bin" / "tool").write_text("real")
    (root / "usr" / "bin" / "name").symlink_to("tool")
    subprocess.run(["dpkg-deb", "--build", str(root), str(package)], check=True, capture_output=True)
    script = f"""\
echo "$*" >> {tmp_path}/asked
case "$*" in
  indextargets*) echo http://mirror/debian ;;
  *install*) cat sources.list >> {tmp_path}/asked; cp {package} cache/archives ;;
esac"""
    debian.write_script(tmp_path / "bin" / "apt-get", script)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for _ in range(2):  # the second time it is there
        target = debian.unpacked(tmp_path / "system", aarch64.SUITE, "tool", architecture="arm64")
    assert (target / "usr" / "bin" / "name").read_text() == "real"
    asked = (tmp_path / "asked").read_text()
    assert asked.count("--download-only install tool\n") == 1 and "APT::Architecture=arm64" in asked
    assert f"deb [signed-by={debian.KEYS}] http://mirror/debian {aarch64.SUITE} main\n" in asked


def test_an_unfinished_folder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fail(packages: tuple[str, ...], suite: str, target: Path, *, architecture: str) -> None:
        made.append(target)
        raise subprocess.CalledProcessError(100, ["apt-get"])

    monkeypatch.setattr(debian, "unpack", fail)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            debian.unpacked(tmp_path / "system", aarch64.SUITE, "tool")
    assert len(made) == 2


def test_the_emulated_python_can_run_programs(tmp_path: Path) -> None:
    """It is a script, and a script's first line can name it."""
    debian.write_script(tmp_path / "python", 'echo "$0" "$@"')
    (tmp_path / "program").write_text(f"#!{tmp_path}/python\n")
    (tmp_path / "program").chmod(0o755)
    said = subprocess.run([tmp_path / "program", "one"], capture_output=True, text=True, check=True).stdout
    assert said == f"{tmp_path}/python {tmp_path}/program one\n"


def test_a_compiler_runs_on_its_folders_own_files(tmp_path: Path) -> None:
    program = tmp_path / "root" / "usr" / "bin" / "c++"
    debian.write_script(program, 'echo "$LD_LIBRARY_PATH" "$@"')
    script = debian.compiler_script(tmp_path / "bin" / "c++", tmp_path / "root", "c++")
    said = subprocess.run([script, "-c", "a b.cpp"], capture_output=True, text=True, check=True).stdout
    libraries = tmp_path / "root" / "usr" / "lib" / "x86_64-linux-gnu"
    assert said == f"{libraries} --sysroot={tmp_path}/root -c a b.cpp\n"
