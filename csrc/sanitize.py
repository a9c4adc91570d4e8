"""Builds the kernels with sanitizers and runs tests on them; ends with an error at the first report.

    python csrc/sanitize.py [cpu] [emulator] [threads]     all three by default

cpu         the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests of raw
            operators (tests/fuzz, with many more examples than otherwise) and of kernels, on every
            instruction set that this CPU has. Memory that torch allocates is guarded too, since the
            sanitizer is loaded before it.
emulator    the CUDA kernels in the emulator, with the same two, under the emulator's tests
threads     csrc/testing/threads.cpp with ThreadSanitizer: the kernels on threads of its own, without torch

Before anything else it runs programs with a fault of each kind, which must be reported: a harness that
reports nothing when it should is worse than none. The builds lie under build/, beside the usual ones.
Linux, g++ or clang++ with its sanitizer libraries. CXX and MAX_JOBS as for setup.py.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build import ROOT, SANITIZERS, compiler, emulator

COMPILER = compiler()
OPTIONS = {
    # Python keeps memory until it ends; a request for more memory than there is must fail as malloc's does.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:halt_on_error=1:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
# Kernels under the sanitizer run many times as long: the cases with the most edges, all instruction sets.
CPU_TESTS = [
    "tests/csrc/test_instruction_sets.py",
    "tests/csrc/test_training_kernels.py",
    "tests/csrc/test_native_attention.py",
    "tests/csrc/test_native_attention_backward.py",
]
EMULATOR_TESTS = ["tests/csrc/emulator/test_emulated_words.py", "tests/csrc/emulator/test_emulated_decode.py"]


def environment(sanitizer: str, **more: str) -> dict[str, str]:
    return {**os.environ, **OPTIONS, "BIGMODEL_SANITIZE": sanitizer, "OMP_NUM_THREADS": "2", **more}


def preloaded(**more: str) -> dict[str, str]:
    """For Python, which is not built with the sanitizer itself. The C++ library comes with it: the sanitizer
    looks for the function that throws when it starts."""
    names = ["libasan.so", "libstdc++.so"]
    found = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    if missing := [path for path in found if not Path(path).is_absolute()]:
        raise SystemExit(f"{COMPILER} has no {', '.join(missing)}: install its sanitizer libraries")
    return environment("address", LD_PRELOAD=" ".join(found), **more)


def run(command: list[str], environment: dict[str, str]) -> None:
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    print("+", " ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processors = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"  {time.monotonic() - start:.0f} s ({processors:.0f} s of processors)", flush=True)
    if code:
        raise SystemExit(f"exited with {code}")


def pytest(files: list[str], environment: dict[str, str], *options: str) -> None:
    # Without capture: what a sanitizer prints as it ends a process would be lost.
    how = ["-p", "no:cacheprovider", "-s", "-x", "-n", "2", "--dist", "worksteal", "--max-worker-restart=0"]
    run([sys.executable, "-m", "pytest", *how, *options, *files], environment)


# Name of the fault: (sanitizer, what the report says, C++).
WRITE = "void fault(int n) { volatile char* p = new char[n]; p[n] = 1; delete[] p; }"
OVERFLOW = "void fault(int n) { volatile int x = 2147483647; x = x + n; }"
RACE = """#include <thread>
int x = 0;
void fault(int n) { std::thread t([&] { x += n; }); x += n; t.join(); }"""
FAULTS = {
    "a write past the end": ("address", "heap-buffer-overflow", WRITE),
    "a signed overflow": ("address", "runtime error", OVERFLOW),
    "a race": ("thread", "data race", RACE),
}


def prove(sanitizers: set[str]) -> None:
    """Each fault, planted in a library of its own (a program for threads), must be reported, by an error."""
    with tempfile.TemporaryDirectory() as folder:
        for fault, (sanitizer, report, code) in FAULTS.items():
            if sanitizer not in sanitizers:
                continue
            source, result = Path(folder, "fault.cpp"), Path(folder, "fault.so")
            library = sanitizer == "address"
            main = 'extern "C" void call() { fault(16); }' if library else "int main() { fault(16); }"
            source.write_text(f"{code}\n{main}\n")
            flags = ["-shared", "-fPIC"] if library else ["-pthread"]
            build = [COMPILER, *SANITIZERS[sanitizer].split(), *flags, str(source), "-o", str(result)]
            subprocess.run(build, check=True)
            call = [sys.executable, "-c", f"import torch, ctypes; ctypes.CDLL({str(result)!r}).call()"]
            seen = subprocess.run(
                call if library else [str(result)],
                env=preloaded() if library else environment(sanitizer),
                capture_output=True,
                text=True,
            )
            if seen.returncode == 0 or report not in seen.stderr:
                raise SystemExit(
                    f"{fault} is not reported (exit code {seen.returncode}):\n{seen.stderr[-2000:]}"
                )
            print(f"{fault} is reported", flush=True)


def build_cpu(sanitizer: str) -> Path:
    run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        environment(sanitizer, BIGMODEL_CUDA="0"),
    )
    return ROOT / "build" / f"cpu-{sanitizer}"


def cpu() -> None:
    library = build_cpu("address") / "libbigmodel_cpu.so"
    tests = preloaded(BIGMODEL_TEST_LIBRARY=str(library))
    pytest(["tests/fuzz"], tests, "--hypothesis-profile=sanitize")
    pytest(CPU_TESTS, tests)


def emulated() -> None:
    os.environ["BIGMODEL_SANITIZE"] = "address"
    emulator()
    pytest(EMULATOR_TESTS, preloaded())


def threads() -> None:
    run([str(build_cpu("thread") / "threads")], environment("thread"))


PARTS = {"cpu": ("address", cpu), "emulator": ("address", emulated), "threads": ("thread", threads)}


def main(parts: list[str]) -> None:
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"{', '.join(sorted(unknown))} is not one of {', '.join(PARTS)}")
    chosen = [PARTS[part] for part in parts or PARTS]
    prove({sanitizer for sanitizer, _ in chosen})
    for _, part in chosen:
        part()
    print("no report")


if __name__ == "__main__":
    main(sys.argv[1:])
