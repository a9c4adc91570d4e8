"""Builds the wheels into dist/: one for CPUs and Triton, and one more for each major version of CUDA.

    python tools/wheels.py                   cpu, and one for each of MAJORS whose nvcc is on this machine
    python tools/wheels.py cpu cu130         these; a missing nvcc is an error
    python tools/wheels.py aarch64           CPU kernels for ARM, by the cross compiler aarch64-linux-gnu-g++
    python tools/wheels.py --twice cpu       builds it again in a new folder and compares the bytes

NVCC names compilers to look at first, with colons between them; then come the one on PATH and those of
/usr/local/cuda-*. BIGMODEL_CUDA_ARCHS, CXX, CXXFLAGS and MAX_JOBS are those of the build (docs/building.md):
a CXX for another machine is for its wheel alone, so name no other beside it.
Needs auditwheel and patchelf.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU = "cpu"
# Versions of CUDA that torch is built for. A wheel works with all of one major, whichever nvcc made it.
MAJORS = ("12", "13")
SYSTEM = "manylinux_2_28"
# Machines for which there is a wheel that another machine can make, with CPU kernels alone.
MACHINES = ("aarch64",)
# auditwheel knows every machine's rules, and offers those of this one: it is told a machine instead.
AUDITWHEEL = """
import platform, runpy, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
runpy.run_module("auditwheel", run_name="__main__")
"""
# torch brings these, in whichever version is installed; everything else that a library needs must be in every
# Linux of SYSTEM.
FROM_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
FOLDER = ROOT / "build" / "wheels"
# Where a second build that has other bytes is kept, to be compared by hand.
OTHER = ROOT / "build" / "wheels-other"
# Any moment serves, as long as it is the same; the format has no years before 1980.
MOMENT = (1980, 1, 1, 0, 0, 0)


FATBIN = (0xBA55ED50).to_bytes(4, "little")


@dataclass(frozen=True)
class Variant:
    """A wheel to build: "cpu", one of MACHINES, or "cu" and the digits of a CUDA version, with its nvcc."""

    name: str
    nvcc: str | None = None

    def environment(self) -> dict[str, str]:
        """What setup.py reads."""
        if self.nvcc is None:
            target = self.name if self.name in MACHINES else ""
            return {"BIGMODEL_CUDA": "0", "BIGMODEL_LOCAL_VERSION": "", "BIGMODEL_TARGET": target}
        return {
            "BIGMODEL_CUDA": "1",
            "BIGMODEL_LINEINFO": "0",
            "BIGMODEL_LOCAL_VERSION": self.name,
            "BIGMODEL_TARGET": "",
            "NVCC": self.nvcc,
        }

    def machine(self) -> str:
        """What it is for, as its tag ends."""
        return self.name if self.name in MACHINES else os.uname().machine


def cuda_name(version_text: str) -> str:
    """What `nvcc --version` prints -> "cu130". Raises ValueError where it names no release."""
    found = re.search(r"release (\d+)\.(\d+)", version_text)
    if found is None:
        raise ValueError(f"no CUDA release in {version_text!r}")
    return f"cu{found[1]}{found[2]}"


def compilers() -> dict[str, str]:
    """Name of a variant -> nvcc for it, the first one found."""
    candidates = [c for c in os.environ.get("NVCC", "").split(":") if c]
    candidates += ["nvcc", *sorted(map(str, Path("/usr/local").glob("cuda-*/bin/nvcc")))]
    found: dict[str, str] = {}
    for path in filter(None, map(shutil.which, candidates)):
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        found.setdefault(cuda_name(version), path)
    return found


def choose(wanted: list[str], found: dict[str, str]) -> tuple[list[Variant], list[str]]:
    """The variants to build, and majors that are left out, where no variant was named.

    Of several compilers of a major the newest is taken. Raises SystemExit for a named variant that is
    unknown, or whose compiler is missing.
    """
    at_hand = ", ".join(f"{name} ({path})" for name, path in sorted(found.items())) or "none"
    for name in wanted:
        compiled = re.fullmatch(r"cu\d{3}", name)
        if name not in (CPU, *MACHINES) and not compiled:
            raise SystemExit(
                f"variant={name!r} is unknown; allowed are cpu, {', '.join(MACHINES)}, "
                "and names such as cu124 and cu130"
            )
        if compiled and name not in found:
            raise SystemExit(
                f"variant={name!r} needs nvcc {name[2:-1]}.{name[-1]} (set NVCC); there is: {at_hand}"
            )
    of_major = {
        major: max((n for n in found if n.startswith(f"cu{major}")), default=None) for major in MAJORS
    }
    names = wanted or [CPU, *filter(None, of_major.values())]
    left_out = [] if wanted else [major for major, name in of_major.items() if name is None]
    return [Variant(name, found.get(name)) for name in names], left_out


def copy_sources(target: Path) -> None:
    """The tree's files that git knows, as they are now; files that did not change keep their time."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = {name for name in listed.decode().split("\0") if name and (ROOT / name).exists()}
    for path in [p for p in target.rglob("*") if p.is_file()]:
        name = path.relative_to(target).as_posix()
        if name not in names and not name.startswith("build/"):
            path.unlink()
    for name in sorted(names):
        source, copy = ROOT / name, target / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def normalise(wheel: Path) -> None:
    """Writes the wheel again in one order, with one time, with modes that do not depend on who built it."""
    with zipfile.ZipFile(wheel) as old:
        contents = {info.filename: old.read(info) for info in old.infolist() if not info.is_dir()}
    # The metadata comes last, RECORD at the very end, as the format recommends.
    order = sorted(contents, key=lambda n: (".dist-info/" in n, n.endswith("/RECORD"), n))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        for name in order:
            info = zipfile.ZipInfo(name, MOMENT)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, whose modes follow
            info.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            new.writestr(info, contents[name])


def build(variant: Variant, output: Path, source: Path) -> Path:
    """One wheel, from a copy of the sources in that folder, proved by auditwheel to load on SYSTEM."""
    copy_sources(source)
    for stale in [*source.glob("build/lib*"), *source.glob("build/bdist*"), *source.glob("*.egg-info")]:
        shutil.rmtree(stale)  # setuptools would pack what another variant has left here
    environment = {**os.environ, **variant.environment()}
    pack = [sys.executable, "-W", "ignore:setup.py install", "setup.py", "-q", "bdist_wheel", "--dist-dir"]
    audit = [sys.executable, "-c", AUDITWHEEL, variant.machine(), "repair"]
    audit += ["--plat", f"{SYSTEM}_{variant.machine()}", "--only-plat"]
    # strip knows this machine's files; setup.py's linker has stripped those for another one.
    audit += [] if variant.name in MACHINES else ["--strip"]
    for library in FROM_TORCH:
        audit += ["--exclude", library]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        raw, repaired = Path(folder, "raw"), Path(folder, "repaired")
        subprocess.run([*pack, str(raw)], cwd=source, env=environment, check=True)
        (wheel,) = raw.glob("*.whl")
        subprocess.run([*audit, "--wheel-dir", str(repaired), str(wheel)], check=True)
        (wheel,) = repaired.glob("*.whl")
        normalise(wheel)
        target = output / wheel.name
        shutil.copyfile(wheel, target)
    return target


def gpu_code(library: bytes) -> dict[str, int]:
    """Bytes of GPU code in a library by architecture: "sm_90" is machine code, "compute_80" PTX.

    nvcc embeds containers: magic, version, size of header and of content; then, one after the other, entries:
    kind (1 is PTX), version, size of header and of content, and at 28 the architecture.
    """
    container, entry = struct.Struct("<IHHQ"), struct.Struct("<HHIQ")
    sizes: dict[str, int] = {}
    for found in re.finditer(re.escape(FATBIN), library):
        _, version, header, size = container.unpack_from(library, found.start())
        position, end = found.start() + header, found.start() + header + size
        if version != 1 or header != container.size or end > len(library):
            continue  # these bytes by chance
        while position < end:
            kind, _, header, size = entry.unpack_from(library, position)
            (number,) = struct.unpack_from("<I", library, position + 28)
            name = f"{'compute' if kind == 1 else 'sm'}_{number}"
            sizes[name] = sizes.get(name, 0) + header + size
            position += header + size
    return sizes


def describe(wheel: Path) -> str:
    """Size and checksum of the wheel; of each library the size, packed and not, and of its GPU code."""
    data = wheel.read_bytes()
    lines = [f"{wheel.name}: {len(data) / 1e6:.1f} MB, sha256 {hashlib.sha256(data).hexdigest()}"]
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".so"):
                sizes = f"{info.compress_size / 1e6:.1f} MB packed, {info.file_size / 1e6:.1f} MB"
                lines.append(f"  {info.filename}: {sizes}")
                for name, size in sorted(gpu_code(archive.read(info)).items()):
                    lines.append(f"    {name}: {size / 1e6:.1f} MB")
    return "\n".join(lines)


def differences(wheel: Path, other: Path) -> list[str]:
    """Files of the two wheels that are not the same, or in one of them only; but RECORD, which follows."""

    def files(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {n: archive.read(n) for n in archive.namelist() if not n.endswith(".dist-info/RECORD")}

    return sorted({name for name, _ in files(wheel).items() ^ files(other).items()})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", nargs="*", help="cpu, cu124, cu130 and the like")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--twice", action="store_true", help="fail where a second build has other bytes")
    arguments = parser.parse_args()
    found = compilers()
    variants, left_out = choose(arguments.variant, found)
    status = 0
    # The second builds share a folder, as the first do: what is for CPUs is compiled once more, not for each.
    with tempfile.TemporaryDirectory() as second:
        for variant in variants:
            wheel = build(variant, arguments.output, FOLDER)
            print(describe(wheel), flush=True)
            if arguments.twice:
                os.environ["CCACHE_DISABLE"] = "1"
                again = build(variant, Path(second, "wheels"), Path(second, "source"))
                same = again.read_bytes() == wheel.read_bytes()
                if same:
                    print("  a second build has the same bytes", flush=True)
                else:
                    OTHER.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(again, OTHER / again.name)
                    where = ", ".join(differences(wheel, again)) or "the archive itself"
                    print(f"  a second build has OTHER bytes: {where}; it is kept in {OTHER}", flush=True)
                status |= not same
    if left_out:
        print(
            f"left out: CUDA {' and '.join(left_out)} (no nvcc of it; there is: {', '.join(found) or 'none'})"
        )
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
