"""The wheel for aarch64 (ARM servers, NEON), built on an x86-64 machine and tried there under emulation.

    python tools/aarch64.py wheel              dist/*_aarch64.whl, by the cross compiler
    python tools/aarch64.py check [WHEEL]      in an emulated environment: doctor, a part of verify, TESTS

What PATH lacks of aarch64-linux-gnu-g++ and qemu-aarch64-static comes from Debian (debian.py), as does the
Python that is emulated; torch for aarch64 comes from the package index. All of it lies in build/aarch64, is
installed nowhere else, takes 1.4 GB, and is kept for the next time. QEMU translates instructions one by one:
what it says of results holds for the machine, what a step takes says nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import debian
import wheels
import wheels_check

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "aarch64"
MACHINE = "aarch64"
COMPILER = f"{MACHINE}-linux-gnu-g++"
EMULATOR = f"qemu-{MACHINE}-static"
SUITE = "bookworm"
PYTHON = "3.11"  # that of SUITE
# The CPU to be: NEON and no SVE, as the smallest of today's ARM servers.
CPU = "neoverse-n1"
# The newest whose wheel for aarch64 is without CUDA: the later ones ask for gigabytes of it.
TORCH = "torch==2.10.0"
TESTS = ("tests/csrc/test_instruction_sets.py", "tests/csrc/test_native_attention.py")


def compiler() -> str:
    """The path of the cross compiler: PATH's own, or Debian's in FOLDER."""
    if found := shutil.which(COMPILER):
        return found
    folder = debian.unpacked(FOLDER / "compiler", SUITE, f"g++-{MACHINE}-linux-gnu")
    return debian.compiler_script(FOLDER / "bin" / COMPILER, folder, COMPILER)


def emulator() -> str:
    """The path of QEMU for programs: PATH's own, or Debian's in FOLDER."""
    if found := shutil.which(EMULATOR):
        return found
    return str(debian.unpacked(FOLDER / "qemu", SUITE, "qemu-user-static") / "usr/bin" / EMULATOR)


def environment(wheel: Path) -> Path:
    """The folder of programs of an environment whose Python is emulated, with what wheel and steps need.

    Its `python` is a script, so that programs which start another one by sys.executable or by a first line
    do so with no help of the system's.
    """
    binaries = FOLDER / "environment" / "bin"
    packages = (f"python{PYTHON}", "libstdc++6", "libgomp1")
    system = debian.unpacked(FOLDER / "system", SUITE, *packages, architecture="arm64")
    python = system / "usr/bin" / f"python{PYTHON}"
    run = f'QEMU_CPU={CPU} exec {emulator()} -L {system} -0 "$0" {python} "$@"'
    debian.write_script(binaries / "python", run)
    (binaries.parent / "lib" / f"python{PYTHON}" / "site-packages").mkdir(parents=True, exist_ok=True)
    (binaries.parent / "pyvenv.cfg").write_text(
        f"home = {python.parent}\ninclude-system-site-packages = false\nversion = {PYTHON}\n"
    )
    marker = binaries.parent / TORCH
    if not marker.exists():
        print(f"into {binaries.parent}: {TORCH} (some minutes: pip is emulated too)", flush=True)
        needed = [TORCH, "pip", *wheels_check.TEST_PACKAGES, str(wheel)]  # the wheel, for its dependencies
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python"]
        command = [*pip, str(binaries / "python"), "install", "--no-compile", *needed]
        if subprocess.run(command, env=wheels_check.clean_environment()).returncode:
            raise SystemExit(f"pip could not install {' '.join(needed)} for {MACHINE}")
        marker.touch()
    return binaries


def build_wheel(output: Path) -> Path:
    if "CXX" not in os.environ:
        os.environ["CXX"] = compiler()
    wheel = wheels.build(wheels.Variant(MACHINE), output, wheels.FOLDER)
    print(wheels.describe(wheel))
    return wheel


def check(wheel: Path) -> list[str]:
    """Installs the wheel into the environment and runs the steps; names of those that failed."""
    binaries = environment(wheel)
    with tempfile.TemporaryDirectory(prefix="bigmodel_kernels-aarch64-") as folder:
        print(f"{wheel.name} on an emulated {CPU}", flush=True)
        return wheels_check.try_wheel(wheel, binaries, Path(folder), TESTS)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("wheel").add_argument("--output", type=Path, default=ROOT / "dist")
    commands.add_parser("check").add_argument("wheel", nargs="?", type=Path)
    arguments = parser.parse_args()
    if platform.machine() != "x86_64":
        raise SystemExit(
            f"machine={platform.machine()}: this is for x86_64 (`make wheels` builds a machine's own)"
        )
    if arguments.command == "wheel":
        build_wheel(arguments.output)
        return 0
    wheel = arguments.wheel or max((ROOT / "dist").glob(f"*_{MACHINE}.whl"), default=None)
    if wheel is None:
        raise SystemExit(f"no wheel for {MACHINE} in dist/; `python tools/aarch64.py wheel` builds it")
    failed = check(wheel.resolve())
    print("\n".join(f"FAILED: {name}" for name in failed) or f"the wheel works on {MACHINE}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
