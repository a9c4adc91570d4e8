"""Installs each wheel in clean environments of several Pythons and torches, and tries it there.

    python tools/wheels_check.py                       every wheel of dist/ in every environment of MATRIX
    python tools/wheels_check.py --in 3.12:2.14.1      in these only (may be repeated): Python, torch
    python tools/wheels_check.py dist/*+cu130*.whl     these wheels only

In each: the import, `bigmodel-kernels doctor` (which must find nothing broken, and the libraries loaded), a
quarter of `verify`'s cases in two dtypes, and TESTS, all of the installed package. An environment with a CUDA
build of torch takes several gigabytes; there is one at a time, removed when its wheels are done. Interpreters
are pyenv's and those on PATH; one that is missing is reported, and counts as a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Python and torch: the oldest and the newest of both, and those between.
MATRIX = ("3.10:2.10.0", "3.11:2.13.0", "3.12:2.10.0", "3.13:2.14.1")
TESTS = ("tests/ops/test_norm.py", "tests/csrc/test_native_attention.py")
TEST_PACKAGES = ("pytest", "hypothesis")


def interpreter(version: str) -> str | None:
    """The path of Python 3.x, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)
    # Those on PATH may be pyenv's shims, which do not run a version that is not selected.
    return str(installed[0]) if installed else shutil.which(f"python{version}")


def steps(binaries: Path, tests: tuple[str, ...] = TESTS) -> dict[str, list[str]]:
    """What is run in an environment: name -> command."""
    command = str(binaries / "bigmodel-kernels")
    return {
        "import": [str(binaries / "python"), "-c", "import bigmodel_kernels"],
        "doctor": [command, "doctor", "--json"],
        "verify": [command, "verify", "--fast", "--dtype", "float32", "--dtype", "bfloat16"],
        "tests": [str(binaries / "pytest"), "--no-header", *(str(ROOT / test) for test in tests)],
    }


def doctors_answer(text: str) -> tuple[bool, str]:
    """Whether the libraries are loaded by `doctor --json`, and what it says of each.

    The CPU library has to be, and the CUDA library where torch is for the same CUDA, with a GPU or without.
    """
    found = json.loads(text)
    cpu, cuda = found["native_library"], found["cuda_library"]
    torch_cuda, built_for = found["gpu"]["torch_cuda"], cuda["built_for"] and cuda["built_for"]["cuda"]
    fits = bool(torch_cuda and built_for) and torch_cuda.partition(".")[0] == built_for.partition(".")[0]
    said = f"CPU: {cpu['reason'] or found['cpu']['isa']}; CUDA: {cuda['reason'] or 'loaded'}"
    return cpu["loaded"] and cuda["loaded"] == fits, said


def clean_environment() -> dict[str, str]:
    """This process's, without what would lead to the checkout's own package or change what is chosen."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("BIGMODEL_")}


def try_wheel(wheel: Path, binaries: Path, folder: Path, tests: tuple[str, ...] = TESTS) -> list[str]:
    """Installs the wheel and runs the steps; names of those that failed."""
    pip = [str(binaries / "python"), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(wheel)], check=True, env=clean_environment())
    failed = []
    for name, command in steps(binaries, tests).items():
        start = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=clean_environment(), capture_output=True, text=True)
        ok = done.returncode == 0
        said = done.stdout.strip().rpartition("\n")[2] if ok else (done.stdout + done.stderr).strip()[-2000:]
        if name == "doctor" and ok:
            ok, said = doctors_answer(done.stdout)
        print(f"    {name}: {'ok' if ok else 'FAILED'} ({time.monotonic() - start:.0f} s) {said}", flush=True)
        failed += [] if ok else [name]
    return failed


def try_environment(python: str, torch: str, wheels: list[Path]) -> list[str]:
    """All wheels in one new environment; what failed."""
    executable = interpreter(python)
    if executable is None:
        print(f"Python {python}: no such interpreter, on PATH or of pyenv")
        return [f"Python {python}"]
    requirement = f"torch=={torch}"
    failed = []
    with tempfile.TemporaryDirectory(prefix="bigmodel_kernels-check-") as folder:
        binaries = Path(folder, "venv", "bin")
        subprocess.run([executable, "-m", "venv", str(binaries.parent)], check=True)
        pip = [str(binaries / "python"), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
        packages = [requirement, *TEST_PACKAGES, str(wheels[0])]  # the wheel, for its dependencies
        if subprocess.run([*pip, *packages], env=clean_environment()).returncode:
            print(f"Python {python}, {requirement}: pip could not install {' '.join(packages)}")
            return [f"Python {python}, {requirement}"]
        show = "import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda)"
        found = subprocess.run(
            [str(binaries / "python"), "-c", show], capture_output=True, text=True, cwd=folder
        )
        print(
            f"Python, torch and its CUDA: {found.stdout.strip() or found.stderr.strip()[-500:]}", flush=True
        )
        for wheel in wheels:
            print(f"  {wheel.name}", flush=True)
            failed += [
                f"Python {python}, {requirement}, {wheel.name}: {name}"
                for name in try_wheel(wheel, binaries, Path(folder))
            ]
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", nargs="*", type=Path)
    parser.add_argument("--in", dest="environments", action="append", metavar="PYTHON:TORCH")
    arguments = parser.parse_args()
    wheels = [w.resolve() for w in arguments.wheel] or sorted(
        (ROOT / "dist").glob(f"*_{platform.machine()}.whl")
    )
    if not wheels:
        raise SystemExit("no wheel in dist/; `make wheels` builds them")
    failed = []
    for environment in arguments.environments or MATRIX:
        python, _, torch = environment.partition(":")
        if not torch:
            raise SystemExit(f"--in={environment!r} must be PYTHON:TORCH, such as {MATRIX[0]}")
        failed += try_environment(python, torch, wheels)
    print("\n".join(f"FAILED: {what}" for what in failed) or "every wheel works in every environment")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
