"""What the main loops of the CUDA kernels can reach: counts the instructions that nvcc made of them, by pipe.

    python csrc/build.py cuda && python csrc/cycles.py            a table of the Hopper kernels, in Markdown
    python csrc/cycles.py attention.sm90 linear.sm90              of these files of build/cuda
    python csrc/cycles.py resources                               registers, shared memory, spills of all

Needs no GPU. The main loop of a kernel is its innermost loop with the most products of the tensor cores; of
its paths the shortest is counted, which is that of a tile without a hidden pair. (The general loops are
left out: their shortest path is that of a tile with hidden pairs only.) A pipe's cycles are those of one
pass of all consumer warps of a multiprocessor. The longest pipe bounds the loop: `at most` is the share of
the time in which the tensor cores can be busy if all the others work beside them. `in turns` is that share
if a warp does one thing after the other, and only the products of one warpgroup run beside the rest of
another's. Latencies, waits, bank conflicts and what lies outside the loop make it less.
"""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent.resolve() / "build" / "cuda"
# File -> where the emulator's tests of its kernels are.
KERNELS = {
    "attention.sm90": "test_emulated_attention",
    "attention.sm90_backward": "test_emulated_attention_backward",
    "attention.sm90_one_pass": "test_emulated_attention_backward",
    "attention.sm80": "test_emulated_attention",
    "attention.sm80_backward": "test_emulated_attention_backward",
    "attention.decode": "test_emulated_decode",
    "linear.sm90": "test_emulated_linear",
    "linear.sm80": "test_emulated_linear",
    "linear.few_rows": "test_emulated_linear",
    "norm.backward_rows": "test_emulated_norm_backward",
    "norm.rows": "test_emulated_linear",
    "reduce.columns": "test_emulated_norm_backward",
}
FILES = ("attention.sm90", "attention.sm90_backward", "attention.sm90_one_pass", "linear.sm90")

# Cycles that one instruction of a warp keeps its pipe busy, of the four that a multiprocessor has: 128
# lanes over the results a cycle of the CUDA C++ Programming Guide's table of arithmetic throughput for
# compute capability 9.0 (float32 128, integers, comparisons and conversions 64, exp2 16, shuffles 32;
# shared memory 128 bytes).
PIPES: dict[str, tuple[float, str]] = {
    "exp2": (8, r"MUFU"),
    "float": (1, r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2"),
    "integer": (
        2,
        r"IMAD|IADD|LOP3|[IF]MNMX|VI?MNMX|VIADD|[IF]SETP|[IF]?SEL|SHF|SHL|SHR|LEA|PRMT|MOV|F2F|F2I|I2F|PLOP3"
        r"|P2R|R2P|SGXT|BMSK|IABS",
    ),
    "shared": (4, r"SHFL|LDS\b|LDS\.[US]|STS\b|STS\.U|LDSM\.16\.MT?88\b(?!\.)"),
    "shared, 8 bytes a lane": (8, r"[LS][DT]S\.64|(LDSM|STSM)\.16\.MT?88\.2"),
    "shared, 16 bytes a lane": (16, r"[LS][DT]S\.128|(LDSM|STSM)\.16\.MT?88\.4"),
}  # fmt: skip
# Of a multiprocessor's tensor cores: 4096 floating-point operations a cycle on each of 132 at 1.83 GHz are
# the 989 TFLOP/s of the H100 SXM's data sheet.
MULTIPLIES_PER_CYCLE = 2048


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    target: int | None  # of a branch
    conditional: bool


@dataclass(frozen=True)
class Loop:
    """One pass of a warp through a kernel's main loop."""

    kernel: str
    warps: int  # on each of the four warp schedulers, that run this loop
    instructions: int
    tensor: float  # cycles of the multiprocessor's tensor cores for one warpgroup
    pipes: dict[str, float]

    def cycles(self) -> dict[str, float]:
        """Of each pipe, for all warps."""
        pipes = {name: self.warps * cycles for name, cycles in self.pipes.items()}
        return {"tensor": self.warps * self.tensor, "issue": self.warps * self.instructions, **pipes}

    def at_most(self) -> float:
        return self.cycles()["tensor"] / max(self.cycles().values())

    def in_turns(self) -> float:
        alone = self.tensor + max(sum(self.pipes.values()), self.instructions)
        return self.cycles()["tensor"] / max(*self.cycles().values(), alone)


def cuobjdump() -> str:
    """CUDA's own, or the one that Triton ships."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def sass(file: str) -> str:
    """Of build/cuda/<file>.o."""
    command = [cuobjdump(), "-sass", str(FOLDER / f"{file}.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, list[Instruction]]:
    """Kernel -> its instructions."""
    found: dict[str, list[Instruction]] = {}
    for function in text.split("Function : ")[1:]:
        name, body = function.split(None, 1)
        found[name] = []
        for address, predicate, opcode, rest in re.findall(
            r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)([^;]*);", body
        ):
            to = re.findall(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else []
            conditional = bool(predicate) or (bool(to) and "P" in rest.split("0x")[0])
            found[name].append(
                Instruction(int(address, 16), opcode, int(to[-1], 16) if to else None, conditional)
            )
    return found


def products(instruction: Instruction) -> int:
    """Multiplications of a warpgroup (HGMMA)."""
    size = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode)
    return int(size[1]) * int(size[2]) * int(size[3]) if size else 0


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest way through the innermost loop with the most products."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    ways: list[list[int]] = []
    for i, instruction in enumerate(code):
        to = [] if instruction.target is None else [index[instruction.target]]
        ends = instruction.opcode.startswith(("EXIT", "BRA", "RET")) and not instruction.conditional
        ways.append(to if ends or i + 1 == len(code) else [*to, i + 1])
    back: list[list[int]] = [[] for _ in code]
    for i, all_to in enumerate(ways):
        for j in all_to:
            back[j].append(i)

    loops: dict[int, tuple[set[int], int]] = {}  # header -> (body, where it jumps back)
    for i, all_to in enumerate(ways):
        for header in all_to:
            if header > i:
                continue
            body, open_ = {header, i}, [i]
            while open_:
                here = open_.pop()
                for j in back[here] if here != header else []:
                    if j not in body:
                        body.add(j)
                        open_.append(j)
            if min(body) == header and any(products(code[j]) for j in body):
                loops[header] = (body, i)
    inner = {h: v for h, v in loops.items() if not any(o != h and o in v[0] for o in loops)}
    if not inner:
        raise ValueError("no loop with a product of the tensor cores")
    header = max(inner, key=lambda h: (sum(products(code[j]) for j in inner[h][0]), len(inner[h][0])))
    body, end = inner[header]

    length, before, queue = {header: 1}, {header: header}, [(1, header)]
    while queue:
        so_far, here = heapq.heappop(queue)
        for j in ways[here]:
            if j in body and j != header and so_far + 1 < length.get(j, 1 << 30):
                length[j], before[j] = so_far + 1, here
                heapq.heappush(queue, (so_far + 1, j))
    path = [end]
    while path[-1] != header:
        path.append(before[path[-1]])
    return [code[i] for i in reversed(path)]


@dataclass(frozen=True)
class Kernel:
    """What its mangled name says: `enter<AttentionSm90<bfloat16, 128, false, 2>, bytes of shared memory>`."""

    name: str
    arguments: tuple[str, ...]
    shared: int

    @classmethod
    def of(cls, mangled: str) -> Kernel:
        found = re.search(r"enterINS0_(\d+)(.*)EELi(\d+)EEEvNT_", mangled)
        if found is None:
            raise ValueError(f"{mangled} is no kernel of arch/launch.cuh")
        length = int(found[1])
        arguments = re.findall(r"\d+(bfloat16|float16)|L[ib](\d+)E", found[2][length:] + "E")
        return cls(found[2][:length], tuple(a or b for a, b in arguments), int(found[3]))

    def is_general(self) -> bool:
        """Of attention's kernels: element type, head_dim, whether general."""
        return self.name.startswith("Attention") and self.arguments[2:3] == ("1",)

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"


def measure(name: str, code: list[Instruction]) -> Loop:
    path = main_loop(code)
    pipes: dict[str, float] = defaultdict(float)
    for instruction in path:
        for pipe, (cycles, pattern) in PIPES.items():
            if re.match(pattern, instruction.opcode):
                pipes[pipe.split(",")[0]] += cycles
                break
    kernel = Kernel.of(name)
    # The producer's warpgroup runs another loop. Three consumers where the kernel says so, else two.
    consumers = 3 if kernel.name == "AttentionSm90" and kernel.arguments[-1] == "3" else 2
    tensor = sum(map(products, path)) / MULTIPLIES_PER_CYCLE
    return Loop(str(kernel), consumers, len(path), tensor, dict(pipes))


def loops_of(file: str) -> list[Loop]:
    """Of the bfloat16 kernels of build/cuda/<file>.o with a short loop."""
    found = [
        measure(name, code)
        for name, code in functions(sass(file)).items()
        if any(map(products, code)) and "bfloat16" in name and not Kernel.of(name).is_general()
    ]
    return sorted(found, key=lambda loop: loop.kernel)


def table(files: list[str]) -> str:
    columns = ["tensor", "exp2", "float", "integer", "shared", "issue"]
    lines = [
        "| main loop | " + " | ".join(columns) + " | in turns | at most |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for file in files:
        for loop in loops_of(file):
            cycles = loop.cycles()
            cells = " | ".join(f"{cycles.get(column, 0):.0f}" for column in columns)
            lines.append(f"| {loop.kernel} | {cells} | {loop.in_turns():.0%} | {loop.at_most():.0%} |")
    return "\n".join(lines)


def spilled(log: str) -> dict[str, tuple[int, int]]:
    """Kernel -> registers that it is launched with, and bytes spilled, from what ptxas -v says."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        numbers = re.search(
            r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            text,
            re.S,
        )
        assert numbers is not None, name
        found[name] = (int(numbers[3]), int(numbers[1]) + int(numbers[2]))
    return found


def used(text: str) -> dict[str, int]:
    """Kernel -> the most registers in its instructions, where warpgroups give each other registers."""
    found = {}
    for function in text.split("Function : ")[1:]:
        name, body = function.split(None, 1)
        if "USETMAXREG" in body:
            found[name] = 1 + max(int(r) for r in re.findall(r"\bR(\d+)\b", body))
    return found


def resources(files: list[str]) -> str:
    """A table of the bfloat16 kernels; those that differ by the first number alone share a line, N."""
    lines = [
        "| kernel | N | emulated in | registers of a thread | shared memory of a block, bytes | spilled |",
        "|---|---|---|---|---|---|",
    ]
    for file in files:
        rows: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
        most = used(sass(file))
        for name, (registers, bytes_) in spilled((FOLDER / f"{file}.o.log").read_text()).items():
            kernel = Kernel.of(name)
            element, *more = kernel.arguments
            if element == "bfloat16":
                label = f"{kernel.name}<{', '.join([element, *['N'] * bool(more), *more[1:]])}>"
                size = int(more[0]) if more else 0
                rows[label].append((size, most.get(name, registers), kernel.shared, bytes_))
        for label, entries in sorted(rows.items()):
            sizes, *rest = [" / ".join(map(str, column)) for column in zip(*sorted(entries), strict=True)]
            lines.append(f"| {' | '.join([label, sizes, f'`{KERNELS[file]}`', *rest])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["resources"]:
        print(resources(sys.argv[2:] or list(KERNELS)))
    else:
        print(table(sys.argv[1:] or list(FILES)))
