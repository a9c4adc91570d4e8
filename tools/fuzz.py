"""Fuzzes the raw operators with inputs that are guided by the C++ code they reach, under sanitizers.

    python tools/fuzz.py [--seconds 30] [--jobs 1] [OPERATOR...]     all operators with arguments by default
    python tools/fuzz.py --reproduce build/fuzz/crashes/OPERATOR/crash-...

The kernels are built by Clang with AddressSanitizer, UndefinedBehaviorSanitizer and libFuzzer's counters. An
input is the bytes from which hypothesis draws a call of tests/fuzz (guided.py there): libFuzzer changes
inputs that reached code which no other one did. They are kept in build/fuzz/corpus, and the next run goes on
from them. The first fault ends the run with an error: a sanitizer's report, a failed test (a wrong result,
an error that names no argument), a call that does not end. Its input is kept in build/fuzz/crashes and shown
as a call. Before anything else a planted fault must be found that a blind search would not find.

Linux. Clang is that which CXX names, or clang++ on PATH if it has its fuzzer and sanitizer libraries, or
Debian's (debian.py), which is put into build/fuzz/clang (0.5 GB) and installed nowhere else. MAX_JOBS limits
parallel compilation.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import debian

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "fuzz"
TESTS = ROOT / "tests" / "fuzz"
SUITE = "bookworm"
VERSION = "14"  # of Clang, in SUITE
# An allocation of 2 GB fails as one of 2^62 bytes does. Where there is no llvm-symbolizer, addr2line serves.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048"
    ":allow_addr2line=1:verify_asan_link_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:allow_addr2line=1",
}
# A call takes milliseconds; a machine may stand still for a while. Single allocations are bounded above. What
# counts is which code is reached, and not how often: that differs with every size, and each would be kept.
SEARCH = [
    *("-timeout=300", "-report_slow_units=300", "-rss_limit_mb=8192", "-malloc_limit_mb=4096"),
    *("-use_counters=0", "-print_funcs=0", "-print_final_stats=1"),
]

# What only one of 2^32 blind inputs finds; guided, each right number is code that was not reached before.
PLANTED = """
extern "C" void call(const unsigned char* of) {
  volatile char* row = new char[16];
  if (of[0] == 66)
    if (of[1] == 203)
      if (of[2] == 17)
        if (of[3] == 144) row[of[0] - 50] = 1;
  delete[] row;
}
"""
PLANTED_TEST = """
import ctypes, sys
import guided

planted = ctypes.CDLL(sys.argv[1])
guided.fuzz(guided.libfuzzer(), guided.padded(planted.call), sys.argv[2:])
"""


@dataclass
class Clang:
    command: str
    libfuzzer: str  # an archive without main
    runtime: str  # of AddressSanitizer, with that of UndefinedBehaviorSanitizer inside


def runtime_file(command: str, name: str, suffix: str) -> str | None:
    """The path of a library of Clang's own, or None."""
    for file in (f"libclang_rt.{name}-{platform.machine()}.{suffix}", f"libclang_rt.{name}.{suffix}"):
        ask = [*shlex.split(command), f"-print-file-name={file}"]
        found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
        if Path(found).is_absolute():
            return found
    return None


def complete(command: str) -> Clang | None:
    """The compiler with what fuzzing needs of it, or None where it is another one or lacks a part."""
    libfuzzer, runtime = runtime_file(command, "fuzzer_no_main", "a"), runtime_file(command, "asan", "so")
    return Clang(command, libfuzzer, runtime) if libfuzzer and runtime else None


def clang(download: bool = True) -> Clang | None:
    """As the head of this file says; None where nothing is to be loaded and there is none."""
    if command := os.environ.get("CXX"):
        if found := complete(command):
            return found
        if download:
            raise SystemExit(f"CXX={command} is no Clang with fuzzer and sanitizer libraries (libclang-rt)")
    if (command := shutil.which("clang++")) and (found := complete(command)):
        return found
    folder, script = FOLDER / "clang", FOLDER / "bin" / "clang++"
    if not download and not script.exists():
        return None
    if platform.machine() != "x86_64":
        raise SystemExit("no clang++ with fuzzer and sanitizer libraries; Debian's is loaded on x86-64 alone")
    debian.unpacked(folder, SUITE, f"clang-{VERSION}", f"libclang-rt-{VERSION}-dev")
    return complete(debian.compiler_script(script, folder, f"clang++-{VERSION}"))


def build_libfuzzer(compiler: Clang, folder: Path) -> Path:
    """libFuzzer as a library, which Python can call, with a way to change inputs that is ours."""
    library, exports = folder / "libfuzzer.so", folder / "libfuzzer.map"
    folder.mkdir(parents=True, exist_ok=True)
    exports.write_text("{ global: LLVMFuzzer*; __sanitizer_cov_*; __sancov_lowest_stack; local: *; };\n")
    archive = f"-Wl,--whole-archive,{compiler.libfuzzer},--no-whole-archive,--version-script,{exports}"
    flags = [
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-fsanitize=address",
        "-shared-libasan",
        archive,
    ]
    mutator = str(TESTS / "mutator.cpp")
    subprocess.run([*shlex.split(compiler.command), mutator, *flags, "-o", str(library)], check=True)
    return library


def environment(compiler: Clang, libfuzzer: Path, **more: str) -> dict[str, str]:
    """For Python, which is not built with the sanitizers itself. The C++ library comes with them: they look
    for the function that throws when they start. libFuzzer comes before: the sanitizers have functions of the
    same names that counters would call."""
    ours = {
        "LD_PRELOAD": f"{libfuzzer} {compiler.runtime} libstdc++.so.6",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return {**os.environ, **OPTIONS, **ours, **more}


def logged(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> tuple[int, str]:
    """Runs the command; its exit code, and what it printed, which goes to `log` as it comes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file).returncode
    return code, log.read_text(errors="replace")


def prove(compiler: Clang, libfuzzer: Path, seconds: int = 120) -> str:
    """What libFuzzer printed of the planted fault, which must be found within that time."""
    folder = libfuzzer.parent
    source, library = folder / "planted.cpp", folder / "planted.so"
    source.write_text(PLANTED)
    flags = ["-O1", "-g1", "-fPIC", "-shared", "-shared-libasan", "-fsanitize=fuzzer-no-link,address"]
    subprocess.run([*shlex.split(compiler.command), *flags, str(source), "-o", str(library)], check=True)
    options = [*SEARCH, f"-max_total_time={seconds}", "-max_len=8", "-seed=1"]
    options.append(f"-artifact_prefix={folder}/planted-")
    command = [sys.executable, "-c", PLANTED_TEST, str(library), *options]
    with_what = environment(compiler, libfuzzer)
    code, log = logged(command, TESTS, with_what, folder / "planted.txt")
    if code == 0 or "heap-buffer-overflow" not in log:
        raise SystemExit(f"the planted fault is not found (exit code {code}):\n{log[-3000:]}")
    return log


def build_kernels(compiler: Clang) -> Path:
    how = {"BIGMODEL_SANITIZE": "fuzz", "BIGMODEL_CUDA": "0", "CXX": compiler.command}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **how}, check=True)
    return ROOT / "build" / "cpu-fuzz" / "libbigmodel_cpu.so"


PROGRESS = re.compile(
    r"^#(?P<runs>\d+)\s+\w+\s+cov: (?P<edges>\d+) ft: (?P<features>\d+)(?: corp: (?P<inputs>\d+))?", re.M
)
KEPT = re.compile(r"Test unit written to (\S+)")


def summary(op: str, log: str, seconds: float) -> str:
    """One line of what a search has reached, from libFuzzer's output."""
    steps = list(PROGRESS.finditer(log))
    if not steps:
        return f"{op}: nothing was run"
    first, last = steps[0], steps[-1]
    runs = int(last["runs"])
    return (
        f"{op:36}{runs:8} runs, {runs / seconds:4.0f} a second; edges {first['edges']} to {last['edges']}, "
        f"features {first['features']} to {last['features']}, {last['inputs'] or 0} inputs kept"
    )


def search(op: str, seconds: int, environment: dict[str, str]) -> str | None:
    """Fuzzes one operator. The path of the input that shows a fault, or None; other errors end the run."""
    corpus, crashes = FOLDER / "corpus" / op, FOLDER / "crashes" / op
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    options = [*SEARCH, f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/"]
    command = [sys.executable, str(TESTS / "guided.py"), op, *options, str(corpus)]
    start = time.monotonic()
    code, text = logged(command, ROOT, environment, FOLDER / "logs" / f"{op}.txt")
    print(summary(op, text, time.monotonic() - start), flush=True)
    if code == 0:
        return None
    if found := KEPT.search(text):
        return found[1]
    raise SystemExit(f"{op}: exited with {code} and kept no input:\n{text[-3000:]}")


def reproduce(file: Path, environment: dict[str, str]) -> int:
    """Makes the calls of an input, and shows them; the exit code, which is 0 where there was no fault."""
    op = file.resolve().parent.name
    command = [sys.executable, str(TESTS / "guided.py"), op, "--show", str(file.resolve())]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def first_fault(ops: list[str], jobs: int, one: Callable[[str], str | None]) -> str | None:
    """Searches in turn, `jobs` at a time, until one has found a fault."""
    found: str | None = None

    def unless_found(op: str) -> None:
        nonlocal found
        if found is None and (fault := one(op)):
            found = fault

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(unless_found, op) for op in ops]:
            future.result()
    return found


def operators() -> list[str]:
    """Those whose calls differ."""
    sys.path.insert(0, str(TESTS))
    from raw_calls import MAKERS, nothing

    return sorted(op for op, maker in MAKERS.items() if maker is not nothing)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OPERATOR")
    parser.add_argument("--seconds", type=int, default=30, help="for each operator")
    parser.add_argument("--jobs", type=int, default=1, help="operators at a time")
    parser.add_argument("--reproduce", type=Path, metavar="FILE", help="an input that showed a fault")
    arguments = parser.parse_args()
    known = operators()
    if unknown := sorted(set(arguments.ops) - set(known)):
        raise SystemExit(f"{', '.join(unknown)} is not one of {', '.join(known)}")
    if arguments.reproduce and not arguments.reproduce.is_file():
        raise SystemExit(f"{arguments.reproduce}: there is no such file")
    compiler = clang()
    assert compiler is not None
    libfuzzer = build_libfuzzer(compiler, FOLDER)
    library = build_kernels(compiler)
    runs_with = environment(compiler, libfuzzer, BIGMODEL_TEST_LIBRARY=str(library))
    if arguments.reproduce:
        code = reproduce(arguments.reproduce, runs_with)
        print("no fault" if code == 0 else f"exited with {code}")
        return int(code != 0)
    prove(compiler, libfuzzer)
    print("the planted fault is found", flush=True)
    fault = first_fault(
        arguments.ops or known, arguments.jobs, lambda op: search(op, arguments.seconds, runs_with)
    )
    if fault is None:
        print("no fault")
        return 0
    print(f"a fault, in {fault}:", flush=True)
    code = reproduce(Path(fault), runs_with)
    again = "again with" if code else "this time without a fault, by"
    print(f"{again} python {Path(__file__).relative_to(ROOT)} --reproduce {Path(fault).relative_to(ROOT)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
