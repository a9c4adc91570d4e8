"""Puts an nvcc 12.4 into a folder: the one that Debian 13 has in its section non-free.

    python tools/cuda12.py build/cuda-12.4
    make wheels NVCC=$PWD/build/cuda-12.4/bin/nvcc WHEELS=cu124

No Python package has the whole of nvcc 12: `nvidia-cuda-nvcc-cu12` holds ptxas, without nvcc, cudafe++ and
fatbinary; `nvidia-cuda-nvcc`, which has all, begins at 13.0. This is for x86-64 machines with Debian among
apt's sources (debian.py); it loads 1 GB, of which 0.2 GB are kept. The licence is that of the CUDA toolkit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

import debian

SUITE = "trixie"
PACKAGES = ("nvidia-cuda-toolkit", "nvidia-cuda-dev", "libcu++-dev", "libthrust-dev", "libcub-dev")
# Where Debian has a file -> where it lies in NVIDIA's own layout, in which nvcc finds the rest beside itself.
LAYOUT = {
    r"usr/bin/(cudafe\+\+|fatbinary|nvlink|ptxas|cuobjdump|nvdisasm)": r"bin/\1",
    r"usr/lib/nvidia-cuda-toolkit/bin/(nvcc|crt/.+)": r"bin/\1",
    r"usr/lib/nvidia-cuda-toolkit/bin/(cicc)": r"nvvm/bin/\1",
    r"usr/lib/nvidia-cuda-toolkit/(libdevice/.+)": r"nvvm/\1",
    r"usr/(include/.+)": r"\1",
    r"usr/lib/x86_64-linux-gnu/(libcudart_static\.a|libcudadevrt\.a)": r"lib64/\1",
}
PROFILE = """\
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(TOP)/nvvm/bin:$(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
"""


def place(name: str) -> str | None:
    """A path in Debian's packages -> the path in the toolkit's folder, or None for what is left out."""
    name = str(PurePosixPath(name))  # without "./"
    for pattern, target in LAYOUT.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(target)
    return None


def unpack(package: Path, target: Path) -> None:
    """What LAYOUT names."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = place(member.name)
            if path is not None and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(content.read())
                (target / path).chmod(member.mode)
    if process.returncode:
        raise SystemExit(f"dpkg-deb could not read {package.name}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the toolkit is to lie")
    target = parser.parse_args().folder.resolve()
    target.mkdir(parents=True, exist_ok=True)
    files = debian.downloaded(PACKAGES, SUITE, components="main non-free", with_dependencies=False)
    with files as packages:
        for package in packages:
            unpack(package, target)
    (target / "bin" / "nvcc.profile").write_text(PROFILE)
    nvcc = target / "bin" / "nvcc"
    print(subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout)
    print(f"NVCC={nvcc}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
