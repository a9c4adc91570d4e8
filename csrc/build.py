"""Builds the CUDA kernels with ninja: for GPUs, with nvcc, or for the tests on a CPU, in the emulator.

    python csrc/build.py emulator            build/emulator/libbigmodel_emulator.so
    python csrc/build.py cuda [80 90a]       build/cuda/libbigmodel_cuda.so and libbigmodel_words.so (tests)

Neither needs a GPU. CXX and NVCC name the compilers, BIGMODEL_CUDA_ARCHS the targets (default "80 90a");
MAX_JOBS limits parallel compilation. BIGMODEL_SANITIZE=address builds the emulator in a folder of its own
with AddressSanitizer and UndefinedBehaviorSanitizer (see csrc/sanitize.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
CSRC = ROOT / "csrc"
# Kernel file -> the architecture that it is for. An "a" target runs on that GPU alone; the others are kept as
# PTX too, which the driver compiles for every later GPU.
KERNELS = {
    "attention/decode.cu": "80",
    "attention/sm80.cu": "80",
    "attention/sm80_backward.cu": "80",
    "attention/sm90.cu": "90a",
    "attention/sm90_backward.cu": "90a",
    "linear/sm80.cu": "80",
    "linear/sm90.cu": "90a",
    "norm/rows.cu": "80",
}
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# A sanitized build ends the process at its first report, at -O1: at -O3 it compiles several times as long.
SANITIZERS = {
    "address": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread",
}


def sanitizer() -> str | None:
    """What BIGMODEL_SANITIZE asks for: None, address (ASan and UBSan) or thread (TSan)."""
    name = os.environ.get("BIGMODEL_SANITIZE") or None
    if name not in (None, *SANITIZERS):
        raise SystemExit(f"BIGMODEL_SANITIZE={name} is not one of {', '.join(SANITIZERS)}")
    return name


def write_ninja(folder: Path, rules: dict[str, str], targets: list[tuple[str, str, list[str]]]) -> None:
    """rules: name -> command with $in and $out; targets: (output, rule, inputs)."""
    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if "$out.d" in command:
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for output, rule, inputs in targets:
        lines.append(f"build {output}: {rule} {' '.join(inputs)}")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def run_ninja(folder: Path, *options: str) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run(["ninja", *options, *jobs], cwd=folder, check=True)


def torch_flags() -> tuple[str, str]:
    import torch

    root = Path(torch.__file__).parent
    return f"-isystem {root / 'include'}", f"-L{root / 'lib'} -ltorch_cpu -ltorch -lc10"


def emulator() -> Path:
    compiler = os.environ.get("CXX", "g++")
    include, libraries = torch_flags()
    name = sanitizer()
    folder = ROOT / "build" / (f"emulator-{name}" if name else "emulator")
    build = SANITIZERS[name] if name else "-O2 -g0"
    # A warning of a pragma that only nvcc knows says nothing here.
    flags = f"-std=c++20 {build} -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wno-unknown-pragmas"
    extra = os.environ.get("CXXFLAGS", "")
    flags = f"{flags} {extra} -I{CSRC} {include} {' '.join(DEFINES)} -MMD -MF $out.d"
    compile_ = f"{compiler} {flags} -x c++ -c $in -o $out"
    sources = [
        "emulator/emulator.cpp",
        "emulator/fiber.cpp",
        "testing/register.cpp",
        "register_cuda.cpp",
        *KERNELS,
    ]
    objects = [source.replace("/", ".").rsplit(".", 1)[0] + ".o" for source in sources]
    targets = [(o, "compile", [str(CSRC / s)]) for o, s in zip(objects, sources, strict=True)]
    targets.append(("libbigmodel_emulator.so", "link", objects))
    link = f"{compiler} {build} -shared -o $out $in {libraries}"
    write_ninja(folder, {"compile": compile_, "link": link}, targets)
    run_ninja(folder, "--quiet")
    return folder / "libbigmodel_emulator.so"


def gencode(arch: str) -> str:
    code = f"sm_{arch}" if arch.endswith("a") else f"[sm_{arch},compute_{arch}]"
    return f"-gencode=arch=compute_{arch},code={code}"


def cuda(archs: list[str]) -> Path:
    """Both libraries for these architectures; each kernel file's own must be among them."""
    missing = sorted(set(KERNELS.values()) - set(archs))
    if missing:
        raise SystemExit(f"architectures {archs} leave out {missing}, for which there are kernels")
    nvcc = os.environ.get("NVCC", "nvcc")
    include, libraries = torch_flags()
    folder = ROOT / "build" / "cuda"
    flags = (
        "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v -lineinfo"
    )
    # A file holds dozens of kernels; two threads take a quarter of the time (nvcc 12.3 and later).
    flags += " --split-compile 0"
    flags = f"{flags} -I{CSRC} {include} {' '.join(DEFINES)} -DUSE_CUDA -MD -MF $out.d"
    # The stream's symbol is in libtorch_cuda.so, which a torch with CUDA has behind libtorch.so: keep that,
    # though the torch that we link against, which may have no CUDA, resolves nothing by it.
    libraries = f"-Xlinker --no-as-needed {libraries}"
    rules = {"link": f"{nvcc} -shared -cudart static -o $out $in {libraries}"}
    targets = []

    def add(source: str, kernel_archs: list[str]) -> str:
        rule = "compile_" + "_".join(kernel_archs)
        code = " ".join(map(gencode, kernel_archs))
        rules[rule] = f"{nvcc} {flags} {code} -x cu -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)"
        name = source.replace("/", ".").rsplit(".", 1)[0] + ".o"
        targets.append((name, rule, [str(CSRC / source)]))
        return name

    objects = [add(source, [arch]) for source, arch in KERNELS.items()]
    objects.append(add("register_cuda.cpp", archs))
    targets.append(("libbigmodel_cuda.so", "link", objects))
    targets.append(("libbigmodel_words.so", "link", [add("testing/register.cpp", archs)]))
    write_ninja(folder, rules, targets)
    run_ninja(folder, "--quiet")
    return folder / "libbigmodel_cuda.so"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["emulator"]:
        print(emulator())
    elif arguments[:1] == ["cuda"]:
        print(cuda(arguments[1:] or os.environ.get("BIGMODEL_CUDA_ARCHS", "80 90a").split()))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
