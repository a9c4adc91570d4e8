"""Builds the CUDA kernels with ninja: for GPUs, with nvcc, or for the tests on a CPU, in the emulator.

    python csrc/build.py emulator            build/emulator/libbigmodel_emulator.so
    python csrc/build.py cuda [80 90a]       build/cuda/libbigmodel_cuda.so and libbigmodel_words.so (tests)

Neither needs a GPU. CXX and NVCC name the compilers, BIGMODEL_CUDA_ARCHS the targets (default "80 90a");
MAX_JOBS limits parallel compilation; ccache is used where it is on PATH. The same sources and compilers give
the same bytes in any folder, of the CUDA libraries with BIGMODEL_LINEINFO=0, which leaves out what profilers
read. BIGMODEL_SANITIZE=address builds the emulator in a folder of its own with AddressSanitizer and
UndefinedBehaviorSanitizer (csrc/sanitize.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
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
    "attention/sm90_one_pass.cu": "90a",
    "linear/few_rows.cu": "80",
    "linear/sm80.cu": "80",
    "linear/sm90.cu": "90a",
    "norm/backward_rows.cu": "80",
    "norm/rows.cu": "80",
    "reduce/columns.cu": "80",
}
OPS = ("register_cuda.cpp", "register_cuda_norm.cpp", "register_cuda_layer.cpp")
TORCH_LIBRARIES = ("torch_cpu", "torch", "c10")
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# What the CUDA runtime, which is linked in, takes from the libraries that glibc 2.34 merged into libc.so.6.
GLIBC_MERGED = {
    "libdl.so.2": "dlclose dlerror dlmopen dlopen dlsym dlvsym",
    "librt.so.1": "shm_open shm_unlink",
    "libpthread.so.0": """
        pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
        pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once
        pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
        pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
        pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
        pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
        pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
        sem_timedwait sem_trywait sem_wait""",
}
# Symbol versions on the one architecture that the stand-ins are for; those not named are of GLIBC_2.2.5.
GLIBC_VERSIONS = {"dlmopen": "GLIBC_2.3.4"}
# A sanitized build ends the process at its first report, at -O1: at -O3 it compiles several times as long.
SANITIZERS = {
    "address": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread",
    # Clang's alone. The runtime is a library, for Python, which is not built with it, has to load it first.
    "fuzz": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=fuzzer-no-link,address,undefined "
    "-fno-sanitize-recover=all -shared-libasan -Wno-unknown-warning-option",
}


def sanitizer() -> str | None:
    """What BIGMODEL_SANITIZE asks for: None, address (ASan and UBSan) or thread (TSan)."""
    name = os.environ.get("BIGMODEL_SANITIZE") or None
    if name not in (None, *SANITIZERS):
        raise SystemExit(f"BIGMODEL_SANITIZE={name} is not one of {', '.join(SANITIZERS)}")
    return name


def target() -> str:
    """The machine to build for, as platform.machine() names it: BIGMODEL_TARGET, or this one."""
    return os.environ.get("BIGMODEL_TARGET") or platform.machine()


def crossing() -> bool:
    """Whether that is another machine than this one."""
    return target() != platform.machine()


def compiler() -> str:
    """The C++ compiler's command, which may have arguments: CXX, or g++ by the name that Debian gives it."""
    return os.environ.get("CXX") or (f"{target()}-linux-gnu-g++" if crossing() else "g++")


def write_ninja(
    folder: Path,
    rules: dict[str, str],
    targets: list[tuple[str, str, list[str]]],
    keep_logs: bool = False,
) -> None:
    """rules: name -> command with $in and $out; targets: (output, rule, inputs as ninja writes them).

    What compilers print goes to $out.log if keep_logs.
    """
    # By one name: pip has python3 of an environment where make has python, and another command is built anew.
    python = os.path.realpath(sys.executable)
    lines = ["ninja_required_version = 1.5"]
    for name, command in rules.items():
        log = " --log $out.log" if keep_logs and "$in" in command and "$out.d" in command else ""
        command = f"{python} {CSRC / 'job.py'} $out{log} -- {command}"
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
    start = time.time()
    subprocess.run(["ninja", *options, *jobs], cwd=folder, check=True)
    if summary := usage_since(folder, start):
        print(summary)


def usage_since(folder: Path, start: float) -> str:
    """What the jobs that have ended since then took, in one line; empty where there were none."""
    usage = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.usage") if p.stat().st_mtime >= start}
    if not usage:
        return ""
    largest = max(usage, key=lambda name: usage[name]["megabytes"])
    return (
        f"{folder.name}: {len(usage)} jobs in {time.time() - start:.0f} s "
        f"({sum(u['processor_seconds'] for u in usage.values()):.0f} s of processors); "
        f"the largest took {usage[largest]['megabytes']} MB ({largest})"
    )


def launcher() -> str:
    """What compile commands begin with."""
    return "ccache " if shutil.which("ccache") else ""


def torch_folder() -> Path:
    """Where torch lies. It is not imported, which takes longer than many a change takes to compile."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch is missing from the build environment")
    return Path(spec.origin).parent


def torch_cuda() -> str | None:
    """torch.version.cuda: "13.0", or None for a build without CUDA."""
    spec = importlib.util.spec_from_file_location("torch_version", torch_folder() / "version.py")
    assert spec is not None and spec.loader is not None
    version = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(version)
    return version.cuda


def torch_include() -> Path:
    return torch_folder() / "include"


def torch_flags() -> tuple[str, str]:
    include = torch_include()
    libraries = " ".join(f"-l{name}" for name in TORCH_LIBRARIES)
    return f"-isystem {include}", f"-L{include.parent / 'lib'} {libraries}"


def torch_stand_ins() -> tuple[dict[str, str], list[tuple[str, str, list[str]]]]:
    """Rules and targets of empty libraries named as torch's, for a machine whose torch is not here.

    They are for the linker, which then names torch's libraries in the result; what loads it has them.
    """
    names = [f"lib{name}.so" for name in TORCH_LIBRARIES]
    command = f"{compiler()} -shared -nostdlib -x c++ /dev/null -o $out"
    rules = {f"stand_in_{name}": f"{command} -Wl,-soname,{name}" for name in names}
    return rules, [(f"torch/{name}", f"stand_in_{name}", []) for name in names]


def path_flags() -> list[str]:
    """Paths in messages of errors are the sources' own and torch's, wherever both lie."""
    return [f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={torch_include()}/="]


def emulator() -> Path:
    include, libraries = torch_flags()
    name = sanitizer()
    folder = ROOT / "build" / (f"emulator-{name}" if name else "emulator")
    build = SANITIZERS[name] if name else "-O2 -g0"
    # A warning of a pragma that only nvcc knows says nothing here.
    flags = f"-std=c++20 {build} -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wno-unknown-pragmas"
    extra = os.environ.get("CXXFLAGS", "")
    flags = f"{flags} {extra} -I{CSRC} {include} {' '.join(DEFINES)} -MMD -MF $out.d"
    compile_ = f"{launcher()}{compiler()} {flags} -x c++ -c $in -o $out"
    sources = [
        "emulator/emulator.cpp",
        "emulator/fiber.cpp",
        "testing/register.cpp",
        *OPS,
        *KERNELS,
    ]
    objects = [source.replace("/", ".").rsplit(".", 1)[0] + ".o" for source in sources]
    targets = [(o, "compile", [str(CSRC / s)]) for o, s in zip(objects, sources, strict=True)]
    targets.append(("libbigmodel_emulator.so", "link", objects))
    link = f"{compiler()} {build} -shared -o $out $in {libraries}"
    write_ninja(folder, {"compile": compile_, "link": link}, targets)
    run_ninja(folder, "--quiet")
    return folder / "libbigmodel_emulator.so"


def gencode(arch: str) -> str:
    code = f"sm_{arch}" if arch.endswith("a") else f"[sm_{arch},compute_{arch}]"
    return f"-gencode=arch=compute_{arch},code={code}"


def older_glibc(folder: Path) -> tuple[dict[str, str], list[tuple[str, str, list[str]]]]:
    """Rules and targets of stand-ins for libraries that glibc 2.34 merged into libc.so.6.

    Linked before libc, they give their symbols the versions of old, which every glibc still has, so that the
    library loads with glibc 2.28 (manylinux_2_28). They are for the linker: a program loads glibc's own.
    They lie in a folder of their own, for nvcc lets its programs load libraries from the current one.
    """
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        return {}, []
    rules: dict[str, str] = {}
    targets: list[tuple[str, str, list[str]]] = []
    stand_ins = folder / "older_glibc"
    stand_ins.mkdir(parents=True, exist_ok=True)
    for library, names in GLIBC_MERGED.items():
        source = "".join(
            f'extern "C" void {name}_() {{}}\n'
            f'__asm__(".symver {name}_, {name}@@@{GLIBC_VERSIONS.get(name, "GLIBC_2.2.5")}");\n'
            for name in names.split()
        )
        versions = "".join(f"{v} {{}};\n" for v in sorted({"GLIBC_2.2.5", *GLIBC_VERSIONS.values()}))
        for path, text in {
            stand_ins / f"{library}.cpp": source,
            stand_ins / f"{library}.map": versions,
        }.items():
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
        targets.append((f"older_glibc/{library}", f"stand_in_{library}", [f"older_glibc/{library}.cpp"]))
        soname = f"-Wl,-soname,{library} -Wl,--version-script,older_glibc/{library}.map"
        rules[f"stand_in_{library}"] = f"{compiler()} -shared -nostdlib -fPIC {soname} -o $out $in"
    return rules, targets


def cuda(archs: list[str]) -> Path:
    """Both libraries for these architectures; each kernel file's own must be among them."""
    missing = sorted(set(KERNELS.values()) - set(archs))
    if missing:
        raise SystemExit(f"architectures {archs} leave out {missing}, for which there are kernels")
    nvcc = os.environ.get("NVCC", "nvcc")
    if shutil.which(nvcc) is None:
        raise SystemExit(f"no CUDA compiler: {nvcc!r} is not on PATH (set NVCC, or install the CUDA toolkit)")
    include, libraries = torch_flags()
    folder = ROOT / "build" / "cuda"
    host = ",".join(["-fPIC", "-fvisibility=hidden", *path_flags()])
    flags = f"-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler {host} -Xptxas -v"
    # For profilers. Times of source files are part of it, so wheels go without, and without the table of
    # symbols, which holds names of nvcc's temporary files.
    profiled = os.environ.get("BIGMODEL_LINEINFO") != "0"
    flags += " -lineinfo" if profiled else ""
    # A file holds dozens of kernels; two threads take a quarter of the time (nvcc 12.3 and later).
    flags += " --split-compile 0"
    # Names of what is local to a file hold a random number otherwise. nvcc 12.4 has no such option: there
    # they hold the name of the file's first function that others can see, and each file has to have one.
    if (
        "--frandom-seed"
        in subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    ):
        flags += " --frandom-seed $out"
    # They also hold a hash of what the front end takes for the source's path: make it the same everywhere.
    flags += " -Xcudafe --orig_src_path_name=$out"
    flags = f"{flags} -I{CSRC} {include} {' '.join(DEFINES)} -DUSE_CUDA -MD -MF $out.d"
    rules, targets = older_glibc(folder)
    stand_ins = [name for name, _, _ in targets]
    # The stream's symbol is in libtorch_cuda.so, which a torch with CUDA has behind libtorch.so: keep that,
    # though the torch that we link against, which may have no CUDA, resolves nothing by it.
    strip = [] if profiled else ["--strip-all"]
    for_linker = " ".join(f"-Xlinker {option}" for option in [*strip, "--no-as-needed", *stand_ins])
    rules["link"] = f"{nvcc} -shared -cudart static -o $out $in {for_linker} {libraries}"

    def add(source: str, kernel_archs: list[str], defines: str = "") -> str:
        name = source.replace("/", ".").rsplit(".", 1)[0] + ".o"
        rule = f"compile_{'_'.join(kernel_archs)}" + (f"_{name.removesuffix('.o')}" if defines else "")
        code = " ".join(map(gencode, kernel_archs))
        rules[rule] = f"{launcher()}{nvcc} {flags} {defines} {code} -x cu -c $in -o $out"
        targets.append((name, rule, [str(CSRC / source)]))
        return name

    objects = [add(source, [arch]) for source, arch in KERNELS.items()]
    objects += [add(source, archs) for source in (*OPS, "glibc.cpp")]
    objects.append(add("cuda_build.cpp", archs, f"""'-DBIGMODEL_CUDA_ARCHS="{" ".join(archs)}"'"""))
    targets.append(("libbigmodel_cuda.so", "link", [*objects, "|", *stand_ins]))
    targets.append(("libbigmodel_words.so", "link", [add("testing/register.cpp", archs), "|", *stand_ins]))
    write_ninja(folder, rules, targets, keep_logs=True)
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
