"""Compile the Triton kernels ahead of time, with no GPU, and say what the compilers made of them.

    python -m bigmodel_kernels.triton_build                      # a table, every case on every target
    python -m bigmodel_kernels.triton_build --target sm_90 --case attention --json

Triton carries its own assemblers, so a kernel compiles for NVIDIA and AMD devices on any machine. Each case
of ``triton_cases`` calls an operation's own launcher; the launch is recorded instead of run and compiled with
exactly the tile, types and specialisations that it would have had on the device. The table shows registers
per thread, shared memory, bytes of spilled registers (which should be 0) and the matrix instruction that the
assembly holds. Cases are compiled by several processes (``--jobs``); the last line says how long all took.

Exits with status 1 if a case fails to compile, spills, or needs more shared memory than there is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bigmodel_kernels import triton_runtime
from bigmodel_kernels.triton_cases import CASES

TARGETS: dict[str, tuple[GPUTarget, triton_runtime.Target]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), triton_runtime.AMPERE),
    "sm_90": (GPUTarget("cuda", 90, 32), triton_runtime.HOPPER),
    "sm_100": (GPUTarget("cuda", 100, 32), triton_runtime.BLACKWELL),
    "gfx942": (GPUTarget("hip", "gfx942", 64), triton_runtime.MI300),
}


# ---- recording a launch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a launcher asked Triton to run."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        """The kernel specialised for these arguments as at a launch on the device, and the compiler options.

        An integer of 1 and an absent tensor become constants; an integer or an address that 16 divides is
        marked.
        """
        names = self.kernel.arg_names
        values = dict(zip(names, self.arguments, strict=False))
        values.update({name: value for name, value in self.options.items() if name in names})
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for position, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            kind, mark = "constexpr", None
            if not parameter.is_constexpr:
                kind, mark = native_specialize_impl(BaseBackend, value, False, True, True)
            signature[name] = kind
            if kind == "constexpr":
                constants[name] = value
            elif mark == "D":
                attributes[position,] = [["tt.divisibility", 16]]
        options = {name: value for name, value in self.options.items() if name not in names}
        return ASTSource(self.kernel, signature, constants, attributes), options


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it a launch of any Triton kernel is noted in the list and not run."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, arguments, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = original


# ---- compiling ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a compiler made of one case for one target."""

    case: str
    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    mma: str
    seconds: float


def build(case: str, target: str) -> list[Result]:
    """Compile every kernel that one of ``CASES`` launches for one of ``TARGETS``, in the order of launch."""
    if triton_runtime.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels in this process are interpreted and cannot be compiled"
        )
    gpu, description = TARGETS[target]
    with recorded() as launches, triton_runtime.pretend(description):
        CASES[case]()
    return [_compile(case, launch, target, gpu) for launch in launches]


def _compile(case: str, launch: Launch, target: str, gpu: GPUTarget) -> Result:
    source, options = launch.source()
    start = time.perf_counter()
    compiled = triton.compile(source, target=gpu, options=options)
    seconds = time.perf_counter() - start
    if gpu.backend == "cuda":
        registers, spilled = _nvidia_resources(compiled.asm["cubin"])
        assembly = compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = _amd_resources(assembly)
    return Result(
        case,
        launch.kernel.__name__,
        target,
        registers,
        compiled.metadata.shared,
        spilled,
        _mma(assembly),
        round(seconds, 2),
    )


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory (where registers spill to) per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers (both files) per thread, and bytes of spilled ones."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return field("vgpr_count"), 4 * field("vgpr_spill_count")


def _mma(assembly: str) -> str:
    """The kind of matrix instruction in the assembly, or "-"."""
    patterns = (
        r"tcgen05\.mma[\w.:]*",
        r"wgmma\.mma_async\.sync\.aligned\.\w+[\w.]*",
        r"mma\.sync\.aligned\.\w+[\w.]*",
        r"v_mfma_\w+",
    )
    for pattern in patterns:
        if found := re.search(pattern, assembly):
            return found[0].replace(".sync.aligned", "")
    return "-"


def _build_quietly(pair: tuple[str, str]) -> list[Result] | str:
    """:func:`build` for a worker process: what went wrong as text."""
    case, target = pair
    torch.set_num_threads(1)
    try:
        return build(case, target)
    except Exception as error:  # a compiler may fail in many ways; every failure is reported at the end
        return f"{case} on {target}: {type(error).__name__}: {error}"


def main(arguments: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bigmodel_kernels.triton_build", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="only this target (repeatable)"
    )
    parser.add_argument("--case", action="append", help="only cases whose name contains this (repeatable)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per CPU)")
    chosen = parser.parse_args(arguments)
    for part in chosen.case or ():
        if not any(part in case for case in CASES):
            parser.error(f"--case {part!r} is in none of: {', '.join(CASES)}")
    cases = [case for case in CASES if chosen.case is None or any(part in case for part in chosen.case)]
    pairs = [(case, target) for case in cases for target in chosen.target or TARGETS]
    results: list[Result] = []
    failures: list[str] = []
    columns = "{:44} {:30} {:8} {:>9} {:>8} {:>8} {:>8}  {}"
    if not chosen.json:
        print(
            columns.format(
                "case", "kernel", "target", "registers", "shared", "spilled", "seconds", "matrix instruction"
            )
        )
    start = time.perf_counter()
    with ExitStack() as stack:
        built: Iterable[list[Result] | str] = map(_build_quietly, pairs)
        if chosen.jobs > 1 and len(pairs) > 1:
            # Processes of their own: the compilers hold Python's lock, and torch does not like forks.
            pool = multiprocessing.get_context("spawn").Pool(min(chosen.jobs, len(pairs)))
            built = stack.enter_context(pool).imap(_build_quietly, pairs)
        for outcome in built:
            if isinstance(outcome, str):
                failures.append(outcome)
                continue
            results += outcome
            for r in outcome if not chosen.json else []:
                fields = r.registers, r.shared_bytes, r.spilled_bytes, r.seconds, r.mma
                print(columns.format(r.case, r.kernel, r.target, *fields), flush=True)
    if chosen.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        seconds, work = time.perf_counter() - start, sum(r.seconds for r in results)
        print(
            f"{len(results)} kernels in {seconds:.0f} s ({work:.0f} s of compiling, {chosen.jobs} processes)"
        )
    for r in results:
        what = f"{r.kernel} of {r.case} on {r.target}"
        if r.spilled_bytes:
            failures.append(f"{what}: spills {r.spilled_bytes} bytes")
        if r.shared_bytes > (most := TARGETS[r.target][1].shared_memory):
            failures.append(
                f"{what}: needs {r.shared_bytes} bytes of shared memory, of which there are {most}"
            )
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
