"""Builds the CPU extension with ninja: each kernel source once per instruction set, with flags of its own.

The library uses LibTorch's stable ABI and no Python symbol, so one binary serves every torch from 2.10 and
every Python from 3.10. Environment: BIGMODEL_CPU_EXTENSION=0 leaves it out; BIGMODEL_EMULATE_AVX512=1 is a
test build whose AVX-512 and AMX objects run on any AVX2 CPU, through the SIMD Everywhere headers;
BIGMODEL_CUDA=1 or 0 decides whether the CUDA library is built too (by default where torch has CUDA and nvcc
is on PATH); BIGMODEL_LOCAL_VERSION=cu130 adds +cu130 to the version; BIGMODEL_SANITIZE=address or thread is a
test build that stays under build/ (csrc/sanitize.py); BIGMODEL_TARGET=aarch64 makes a wheel for that machine
on another one; CXX names the compiler (with arguments, if need be: for another machine it is
aarch64-linux-gnu-g++ by default); CXXFLAGS is added to its flags; MAX_JOBS limits parallel compilation.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.resolve()
# Sources in csrc/, in which every instruction set has its kernels.
KERNELS = [
    "activations/cpu",
    "attention/backward",
    "attention/cpu",
    "attention_maps/cpu",
    "cross_entropy/cpu",
    "embedding/backward",
    "embedding/cpu",
    "feed_forward/backward",
    "feed_forward/cpu",
    "gemm/cpu",
    "gemm/tiles",
    "linear/backward",
    "linear/cpu",
    "norm/backward",
    "norm/cpu",
    "philox/cpu",
    "rotary/cpu",
    "add/cpu",
]
# But sets that extend avx512 have what multiplies by what they have more, and what calls that; they take the
# rest from it.
OWN_KERNELS = {
    "avx512_bf16": ["feed_forward/cpu", "gemm/cpu", "gemm/tiles", "linear/cpu"],
    "amx": [
        "attention/tile_unit",
        "attention/tile_unit_backward",
        "cross_entropy/cpu",
        "feed_forward/backward",
        "feed_forward/cpu",
        "gemm/cpu",
        "gemm/split",
        "gemm/tiles",
        "linear/backward",
        "linear/cpu",
    ],
}
REGISTRATION = [
    "register_cpu",
    "register_attention",
    "register_layer",
    "register_training",
    "memory",
    "glibc",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
# name: (compiler flags, lanes in bits, has the bf16 dot product); first what every CPU of the machine has.
InstructionSets = dict[str, tuple[list[str], int, int]]
PORTABLE: InstructionSets = {"portable": ([], 0, 0)}
X86: InstructionSets = {
    **PORTABLE,
    "avx2": (AVX2, 256, 0),
    "avx512": (AVX512, 512, 0),
    "avx512_bf16": ([*AVX512, "-mavx512bf16"], 512, 1),
    "amx": ([*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"], 512, 1),
}
NEON: InstructionSets = {"neon": ([], 128, 0)}  # part of every ARMv8


def instruction_sets(machine: str) -> InstructionSets:
    """By what platform.machine() says, which differs between systems."""
    named = {"x86_64": X86, "amd64": X86, "aarch64": NEON, "arm64": NEON}
    return named.get(machine.lower(), PORTABLE)


def missing_tool(compiler: str) -> str | None:
    """Why the extension cannot be built here, or None."""
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"no C++ compiler: '{compiler}' is not on PATH (install g++ or clang++, or set CXX)"
    if shutil.which("ninja") is None:
        return "ninja is not on PATH (pip install ninja)"
    if importlib.util.find_spec("torch") is None:
        return "torch is missing from the build environment (install it, then use --no-build-isolation)"
    return None


def load_build() -> ModuleType:
    """csrc/build.py, which is a script beside what it builds."""
    spec = importlib.util.spec_from_file_location("bigmodel_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wants_cuda() -> bool:
    """BIGMODEL_CUDA=1 or 0 decides; otherwise whether torch has CUDA and nvcc is there to compile for it."""
    build, asked = load_build(), os.environ.get("BIGMODEL_CUDA")
    if asked == "1" and build.crossing():
        raise SystemExit(f"BIGMODEL_CUDA=1: for BIGMODEL_TARGET={build.target()} there are CPU kernels alone")
    if asked is not None or build.crossing():
        return asked == "1"
    return build.torch_cuda() is not None and shutil.which(os.environ.get("NVCC", "nvcc")) is not None


class BuildWithNinja(build_ext):
    """Writes build.ninja and runs it; ninja's own log makes the next build incremental."""

    def run(self) -> None:
        build = load_build()
        wanted = os.environ.get("BIGMODEL_CPU_EXTENSION") != "0"
        reason = missing_tool(build.compiler()) if wanted else "BIGMODEL_CPU_EXTENSION=0"
        if reason and wanted and build.crossing():
            raise SystemExit(f"BIGMODEL_TARGET={build.target()}: {reason}")
        if reason:
            print(
                f"bigmodel_kernels: building without the CPU extension: {reason}. "
                "The reference and Triton implementations still work.",
                file=sys.stderr,
            )
            self.extensions = []
            return
        super().run()
        if wants_cuda():
            self.build_cuda()

    def build_cuda(self) -> None:
        """The CUDA library beside the CPU one."""
        library = load_build().cuda(os.environ.get("BIGMODEL_CUDA_ARCHS", "80 90a").split())
        target = Path(self.get_ext_fullpath("bigmodel_kernels.libbigmodel_cuda")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(library, target)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        emulate = os.environ.get("BIGMODEL_EMULATE_AVX512") == "1"
        ninja = load_build()
        sanitizer = ninja.sanitizer()
        machine = ninja.target() if ninja.crossing() else None
        if machine and self.inplace:
            raise SystemExit(
                f"BIGMODEL_TARGET={machine} is for wheels: in the tree this machine's library would go"
            )
        kinds = ["cpu", machine, "emulated" if emulate else None, sanitizer]
        build = ROOT / "build" / "-".join(filter(None, kinds))
        target.parent.mkdir(parents=True, exist_ok=True)
        library = build / ("threads" if sanitizer == "thread" else "libbigmodel_cpu.so")
        ninja.write_ninja(build, *self.plan(ninja, library.name, emulate, sanitizer))
        try:
            ninja.run_ninja(build)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"bigmodel_kernels: the CPU extension did not compile (ninja exited with {error.returncode}; "
                "its output is above). A C++20 compiler is needed, g++ 11 or clang++ 14 and newer; "
                "BIGMODEL_CPU_EXTENSION=0 installs without it."
            ) from None
        if sanitizer:  # stays where it was built: `make sanitize` runs it from there
            return
        target.unlink(missing_ok=True)  # a process that runs with the old library keeps it
        shutil.copy2(library, target)

    def plan(
        self, ninja: ModuleType, library: str, emulate: bool, sanitizer: str | None
    ) -> tuple[dict[str, str], list[tuple[str, str, list[str]]]]:
        """Rules and targets: a rule for each instruction set, and one for what torch sees."""
        include, libraries = ninja.torch_flags()
        compiler, sets = ninja.compiler(), instruction_sets(ninja.target())
        every_cpu = next(iter(sets))
        rules, targets = ninja.torch_stand_ins() if ninja.crossing() else ({}, [])
        stand_ins = [name for name, _, _ in targets]
        if stand_ins:  # stripped here: what strips a wheel may know this machine's files alone
            libraries = f"-s -Wl,--no-as-needed {' '.join(stand_ins)}"
        build = ninja.SANITIZERS[sanitizer] if sanitizer else "-O3 -g0"
        common = f"-std=c++20 {build} -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wno-psabi"
        common = f"{ninja.launcher()}{compiler} {common} {os.environ.get('CXXFLAGS', '')}"
        common = f"{common} {' '.join(ninja.path_flags())}"
        result = "-pthread" if sanitizer == "thread" else f"-shared {libraries}"
        rules["link"] = f"{compiler} {build} -o $out $in {result}"

        objects: list[str] = []

        def add(rule: str, flags: list[str], sources: dict[str, str]) -> None:
            command = f"{common} {' '.join(flags)} -MMD -MF $out.d"
            before: list[str] = []
            # Compilers take the .gch beside a header, or the header where another compiler made the .gch: it
            # is empty, for sources include what they need. ccache would ask for options of its own.
            if not ninja.launcher():
                header = f"{rule}.h"
                rules[f"{rule}_header"] = f"{command} -x c++-header $in -o $out && : > {header}"
                targets.append((f"{header}.gch", f"{rule}_header", [str(ROOT / "csrc" / "precompiled.h")]))
                command, before = f"{command} -Winvalid-pch -include {header}", ["|", f"{header}.gch"]
            rules[rule] = f"{command} -c $in -o $out"
            for name, source in sources.items():
                targets.append((name, rule, [str(ROOT / "csrc" / source), *before]))
                objects.append(name)

        if sanitizer == "thread":  # a program instead of torch: what threads share is the same in every set
            isa = "avx2" if "avx2" in sets else every_cpu
            sets = {isa: sets[isa]}
            add("driver", [f"-DBIGMODEL_DRIVEN={isa}"], {"threads.o": "testing/threads.cpp"})
        else:
            defines = [
                *ninja.DEFINES,
                f"-DBIGMODEL_EVERY_CPU={every_cpu}",
                *(["-DBIGMODEL_X86"] if "avx2" in sets else []),
            ]
            defines += ["-DBIGMODEL_EMULATE_AVX512"] if emulate else []
            # No kernel is among these: what little they compute is not worth what -O3 takes.
            add(
                "register",
                [*defines, include, *([] if sanitizer else ["-O1"])],
                {f"{name}.o": f"{name}.cpp" for name in REGISTRATION},
            )
        for isa, (flags, bits, bf16) in reversed(sets.items()):  # jobs start in this order: longest first
            if emulate and bits == 512:
                flags = [*AVX2, "-DBIGMODEL_SIMDE", "-O1"]  # emulated vectors at -O3 compile for many minutes
            named = [f"-DBIGMODEL_ISA={isa}", f"-DBIGMODEL_SIMD={bits}", f"-DBIGMODEL_BF16_DOT={bf16}"]
            named.append(f"-DBIGMODEL_AMX={int(isa == 'amx')}")
            sources = [*OWN_KERNELS.get(isa, KERNELS), "table"]
            objects_of = {f"{s.removesuffix('/cpu').replace('/', '_')}.{isa}.o": f"{s}.cpp" for s in sources}
            add(isa, [*flags, *named], objects_of)
        targets.append((library, "link", [*objects, "|", *stand_ins]))
        return rules, targets

    def get_ext_filename(self, fullname: str) -> str:
        # No Python symbols inside, so no interpreter tag in the name.
        return str(Path(*fullname.split(".")).with_suffix(".so"))


class LocalVersion(egg_info):
    """The version, with BIGMODEL_LOCAL_VERSION after a plus."""

    def initialize_options(self) -> None:
        super().initialize_options()
        if local := os.environ.get("BIGMODEL_LOCAL_VERSION"):
            self.tag_build = f"+{local}"


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        build = load_build()
        return "py3", "none", f"linux_{build.target()}" if build.crossing() else super().get_tag()[2]


setup(
    ext_modules=[Extension("bigmodel_kernels.libbigmodel_cpu", sources=[])],
    cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": PlatformWheel, "egg_info": LocalVersion},
)
