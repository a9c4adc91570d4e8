"""What nvcc makes of the CUDA kernels: registers, spills, instructions. Needs no GPU."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from build_csrc import build_module, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    path: Path = build_module().cuda(["80", "90a"])
    return path.parent


def entries(log: Path) -> dict[str, tuple[int, int, int]]:
    """Kernel -> (registers, bytes of stack, bytes spilled), from ptxas -v."""
    found = {}
    for name, rest in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", log.read_text(), re.S
    ):
        stack, stores, loads = map(
            int,
            re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", rest)[
                0
            ],
        )
        registers = int(re.findall(r"Used (\d+) registers", rest)[0])
        found[name] = (registers, stack, stores + loads)
    return found


# Attention: two element types, six head_dims, short and general, on Hopper two short ones of the two
# smallest; of the backward two each, and sm_80's file has delta for both in three widths; for decoding
# there is one of each. The backward in one pass: two element types, three head_dims, and for each what
# rounds dQ.
# Linear: two element types, two layouts of the weight, and on Hopper two widths of a tile, one of them in
# ping-pong too; for few rows the first two. The norm: two element types, two lengths of a row, six of the
# gradient's. Sums over rows: two element types, two stages.
COUNTS = {
    "attention.decode": 12,
    "attention.sm80": 24,
    "attention.sm80_backward": 54,
    "attention.sm90": 28,
    "attention.sm90_backward": 48,
    "attention.sm90_one_pass": 12,
    "linear.few_rows": 4,
    "linear.sm80": 4,
    "linear.sm90": 12,
    "norm.backward_rows": 12,
    "norm.rows": 4,
    "reduce.columns": 4,
}


@pytest.mark.parametrize(("kernel", "count"), COUNTS.items())
def test_nothing_spills(folder: Path, kernel: str, count: int) -> None:
    found = entries(folder / f"{kernel}.o.log")
    assert len(found) == count
    assert {name: v for name, v in found.items() if v[1] or v[2]} == {}


@pytest.mark.parametrize(
    "kernel", ["attention.sm90", "attention.sm90_backward", "attention.sm90_one_pass", "linear.sm90"]
)
def test_wgmma_is_not_serialised(folder: Path, kernel: str) -> None:
    """C7508: setmaxnreg ignored; C7510: a wait after each wgmma; C7519: a fence that was not written."""
    log = (folder / f"{kernel}.o.log").read_text()
    assert re.findall(r"C75\d\d", log) == []


SM80 = [
    "HMMA.16816.F32.BF16",
    "HMMA.16816.F32 ",
    "LDSM.16.M88.4",
    "LDSM.16.MT88.4",
    "LDGSTS.E.BYPASS.128",
    "MUFU.EX2",
]
SM90 = ["HGMMA.64x128x16.F32.BF16", "UTMALDG.4D", "SYNCS.PHASECHK", "USETMAXREG", "MUFU.EX2"]


@pytest.mark.parametrize(
    ("kernel", "instructions"),
    [
        ("attention.decode", [*SM80, "ATOMG.E.INC.STRONG.GPU"]),
        ("attention.sm80", SM80),
        ("attention.sm80_backward", SM80),
        ("attention.sm90", SM90),
        ("attention.sm90_backward", [*SM90, "HGMMA.64x256x16.F32.BF16", "STSM.16.M88.4"]),
        ("attention.sm90_one_pass", [*SM90, "STSM.16.MT88.4", "UBLKRED.G.S.ADD.F32.RN"]),
        ("linear.sm80", SM80),
        ("linear.sm90", SM90),
    ],
)
def test_the_instructions_are_there(folder: Path, kernel: str, instructions: list[str]) -> None:
    text = load("cycles").sass(kernel)
    assert [name for name in instructions if name not in text] == []
    assert not re.search(r"\b(LDL|STL)\b", text), "local memory"


def test_the_documented_resources_are_those_of_the_build(folder: Path) -> None:
    """The table of docs/cuda.md, line by line, as `python csrc/cycles.py resources` prints it."""
    cycles = load("cycles")
    assert set(cycles.KERNELS) == set(COUNTS)
    lines = cycles.resources(list(cycles.KERNELS)).splitlines()
    documented = (folder.parents[1] / "docs" / "cuda.md").read_text().splitlines()
    assert [line for line in lines if line not in documented] == []
    assert len(lines) > 20
    tests = {path.stem for path in (Path(__file__).parent / "emulator").glob("test_*.py")}
    assert set(cycles.KERNELS.values()) <= tests


def test_main_loops_leave_the_tensor_cores_busy(folder: Path) -> None:
    """Counted in the SASS; a branch for each element, as a mask in the wrong place makes it, would show."""
    cycles = load("cycles")
    loops = {loop.kernel: loop for file in cycles.FILES for loop in cycles.loops_of(file)}
    assert len(loops) == 8 + 12 + 3 + 6
    forward = loops["AttentionSm90<bfloat16, 128, 0, 2>"]
    rows, keys, head_dim = 128, 128, 128
    assert forward.cycles()["tensor"] == 2 * rows * keys * head_dim / cycles.MULTIPLIES_PER_CYCLE
    assert forward.cycles()["exp2"] >= rows * keys / 16
    assert forward.in_turns() > 0.9
    assert loops["AttentionKeyValueGradSm90<bfloat16, 128, 0>"].in_turns() > 0.9
    one_pass = loops["AttentionOnePassSm90<bfloat16, 128>"]
    queries = 64
    assert one_pass.cycles()["tensor"] == 5 * queries * keys * head_dim / cycles.MULTIPLIES_PER_CYCLE
    assert one_pass.in_turns() > 0.9
    assert loops["LinearSm90<bfloat16, 128, 0, 0>"].in_turns() > 0.99
    assert loops["LinearSm90<bfloat16, 128, 0, 1>"].in_turns() > 0.99
