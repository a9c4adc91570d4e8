"""csrc/build.py and csrc/job.py: jobs and what they took, older glibc, code that knows no path."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from build_csrc import ROOT, build_module, load

build, job = build_module(), load("job")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("objdump") is None or sys.platform != "linux",
    reason="needs g++ and objdump, on Linux",
)


def imports(library: Path) -> dict[str, str]:
    """Undefined symbol -> its version, or ""."""
    table = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines() if "*UND*" in line]
    return {row[-1]: row[-2].strip("()") if row[-2].startswith("(") else "" for row in rows}


def test_torch_is_found_without_its_import() -> None:
    assert build.torch_folder() == Path(torch.__file__).parent
    assert build.torch_cuda() == torch.version.cuda


def test_a_missing_cuda_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="no CUDA compiler: '/nowhere/nvcc' is not on PATH"):
        build.cuda(["80", "90a"])


def test_an_interpreter_by_another_name_builds_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, targets = {"copy": "cp $in $out"}, [("b", "copy", ["a"])]
    build.write_ninja(tmp_path, rules, targets)
    before = (tmp_path / "build.ninja").read_text()
    (tmp_path / "python3").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    build.write_ninja(tmp_path, rules, targets)
    assert (tmp_path / "build.ninja").read_text() == before


def test_a_job_says_what_it_took(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grow = "x = bytearray(300_000_000); print('grown')"
    status = job.main([str(tmp_path / "a.o"), "--", sys.executable, "-c", grow])
    assert status == 0
    usage = json.loads((tmp_path / "a.o.usage").read_text())
    assert usage["megabytes"] >= 300 and usage["processor_seconds"] > 0
    said = capfd.readouterr().out
    times = f"{usage['seconds']} s ({usage['processor_seconds']} s of processors)"
    assert "grown" in said and f"a.o: {times}, {usage['megabytes']} MB" in said


def test_a_job_keeps_a_log_and_shows_it_on_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.o.log"
    command = [sys.executable, "-c", "import sys; print('because'); sys.exit(int(sys.argv[1]))"]
    assert job.main([str(tmp_path / "a.o"), "--log", str(log), "--", *command, "0"]) == 0
    assert log.read_text() == "because\n" and "because" not in capfd.readouterr().out
    assert job.main([str(tmp_path / "b.o"), "--log", str(log), "--", *command, "3"]) == 3
    assert "because" in capfd.readouterr().out
    assert not (tmp_path / "b.o.usage").exists()


def test_the_summary_is_of_this_build(tmp_path: Path) -> None:
    assert build.usage_since(tmp_path, 0.0) == ""
    for name, seconds, megabytes in (("a.o", 2.0, 90), ("b.o", 3.5, 400)):
        usage = {"processor_seconds": seconds, "megabytes": megabytes}
        (tmp_path / f"{name}.usage").write_text(json.dumps(usage))
    said = build.usage_since(tmp_path, time.time() - 100)
    assert (
        "2 jobs" in said and "(6 s of processors)" in said and said.endswith("the largest took 400 MB (b.o)")
    )
    assert build.usage_since(tmp_path, time.time() + 100) == ""


def test_ccache_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.launcher() == ""
    (tmp_path / "ccache").write_text("#!/bin/sh\n")
    (tmp_path / "ccache").chmod(0o755)
    assert build.launcher() == "ccache "


@needs_compiler
def test_stand_ins_give_the_versions_of_an_older_glibc(tmp_path: Path) -> None:
    rules, targets = build.older_glibc(tmp_path)
    if not targets:
        pytest.skip("the stand-ins are for x86-64")
    for output, rule, (source,) in targets:
        command = rules[rule].replace("$out", output).replace("$in", source)
        subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    names = [name for merged in build.GLIBC_MERGED.values() for name in merged.split()]
    # As nvcc links the CUDA runtime: an object that knows nothing of versions.
    calls = "".join(f"  {name}();\n" for name in names)
    declared = "".join(f'extern "C" void {name}();\n' for name in names)
    (tmp_path / "user.cpp").write_text(f"{declared}void use() {{\n{calls}}}\n")
    link = "g++ -shared -fPIC -fno-builtin -o user.so user.cpp -Wl,--no-as-needed"
    subprocess.run([*link.split(), *(output for output, _, _ in targets)], cwd=tmp_path, check=True)
    found = imports(tmp_path / "user.so")
    wrong = {name: found[name] for name in names if found[name] not in ("GLIBC_2.2.5", "GLIBC_2.3.4")}
    assert not wrong
    # The real ones are what the loader takes, and they have all of it: this would fail on a wrong version.
    subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL('./user.so')"], cwd=tmp_path, check=True
    )


@needs_compiler
def test_the_library_loads_with_older_libraries_of_c_and_cpp(tmp_path: Path) -> None:
    (tmp_path / "user.cpp").write_text(
        "#include <memory>\n#include <sstream>\n"
        "std::shared_ptr<int> copy(const std::shared_ptr<int>& p) { return p; }\n"
        "std::string text(std::stringstream* s) { new (s) std::stringstream(); return s->str(); }\n"
    )
    for name, source in {"user": "user.cpp", "ours": str(ROOT / "csrc/glibc.cpp")}.items():
        flags = ["-std=c++20", "-O1", "-fno-inline", "-fPIC", "-fvisibility=hidden", "-c", "-o", f"{name}.o"]
        subprocess.run(["g++", *flags, source], cwd=tmp_path, check=True)
    for name, objects in {"without": ["user.o"], "with": ["user.o", "ours.o"]}.items():
        subprocess.run(["g++", "-shared", "-o", f"{name}.so", *objects], cwd=tmp_path, check=True)
    newer = {"__libc_single_threaded", "GLIBCXX_3.4.26", "GLIBCXX_3.4.29"}  # of glibc 2.32, GCC 9 and GCC 11
    without, with_ = (
        {*found, *found.values()} for found in map(imports, (tmp_path / "without.so", tmp_path / "with.so"))
    )
    if not newer <= without:
        pytest.skip(f"the compiler's headers use {newer & without or 'none'} of {newer}")
    assert not newer & with_


@needs_compiler
def test_objects_hold_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders, the same bytes, and messages that name the file as the sources do."""
    made = []
    for folder in ("one", "another"):
        root = tmp_path / folder
        (root / "csrc").mkdir(parents=True)
        (root / "csrc" / "a.cpp").write_text("const char* file() { return __FILE__; }\n")
        monkeypatch.setattr(build, "ROOT", root)
        command = ["g++", "-c", *build.path_flags(), str(root / "csrc/a.cpp"), "-o", str(root / "a.o")]
        subprocess.run(command, cwd=root, check=True)
        made.append((root / "a.o").read_bytes())
    assert made[0] == made[1]
    assert b"csrc/a.cpp" in made[0] and str(tmp_path).encode() not in made[0]


@needs_compiler
def test_the_program_of_the_thread_sanitizer_fits_the_kernels() -> None:
    """It is linked under the sanitizer alone, so that nothing else would see it fall behind."""
    source = ROOT / "csrc" / "testing" / "threads.cpp"
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-DBIGMODEL_DRIVEN=portable"]
    done = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
