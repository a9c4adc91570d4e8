"""What the machine is, what it can do at best, and whether it was quiet enough for the numbers to count."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import bigmodel_kernels
from bigmodel_kernels import _native
from bigmodel_kernels.bench.timing import Timing, once, summarize

#: Other runtimes whose versions count (peers.py).
RUNTIMES = ("onnxruntime", "openvino", "ctranslate2")

#: How far speed may move between the start and the end of a run, how far samples may spread, and how much of
#: the processors others may use, before the run is not trusted.
MOST_DRIFT = 0.10
MOST_SPREAD = 0.15
MOST_OTHER_LOAD = 0.10


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name for itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str | None:
    """The one that our CPU kernels run with, or None where they are not built."""
    return torch.ops.bigmodel.cpu_isa() if _native.available() else None


def instruction_sets() -> list[str]:
    """Those that this CPU and build support, best first."""
    return torch.ops.bigmodel.cpu_isas().split(", ") if _native.available() else []


def _commit() -> str | None:
    """The source tree's commit, with "+" where files differ from it; None for an installed package."""
    root = Path(bigmodel_kernels.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def facts(device: str) -> dict[str, Any]:
    """Everything about the machine and the software that a reader of the numbers needs."""
    gpu = None
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return {
        "device": device,
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "triton": version_of("triton"),
        "runtimes": {name: version_of(name) for name in RUNTIMES},
        "bigmodel_kernels": bigmodel_kernels.__version__,
        "commit": _commit(),
    }


def slug(machine: dict[str, Any]) -> str:
    """A file name for results of this machine: its GPU, or its CPU with cores and instruction set."""
    text = (
        machine["gpu"]["name"]
        if machine["gpu"]
        else f"{machine['cpu']} {machine['cores']} cores {machine['isa']}"
    )
    words = "".join(
        c if c.isalnum() else " " for c in text.lower().replace("(r)", " ").replace("(tm)", " ")
    ).split()
    return "-".join(words)


@dataclass(frozen=True)
class Calibration:
    """What the machine does at best: products of matrices, and copies of memory.

    gemm_flops: dtype -> FLOP/s of the fastest product; gemm: dtype -> the samples behind it; copy_bytes:
    bytes read and written in a second, by the fastest copy.
    """

    gemm_flops: dict[str, float]
    gemm: dict[str, Timing]
    copy_bytes: float
    copy: Timing

    def peak(self, dtype: str, device: str) -> float:
        """FLOP/s to measure a case against. On a CPU a half product may always be done in float32."""
        if device.startswith("cuda") or dtype == "float32":
            return self.gemm_flops[dtype]
        return max(self.gemm_flops.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(device: str, dtypes: list[str], quick: bool = False) -> Calibration:
    """Measures torch's own matrix product in each dtype, and a copy much larger than any cache."""
    flops: dict[str, float] = {}
    timings: dict[str, Timing] = {}
    for name in dtypes:
        dtype = getattr(torch, name)
        if device.startswith("cuda"):
            size, runs = (2048, 5) if quick else (8192, 20)
        elif dtype == torch.float32:
            size, runs = (512, 7) if quick else (2048, 7)
        else:  # torch has no fast half product on many CPUs
            size, runs = (256, 3) if quick else (512, 5)
        timings[name], flops[name] = _product(size, runs, dtype, device)
        if device == "cpu" and size == 512 and flops[name] > flops.get("float32", math.inf):
            timings[name], flops[name] = _product(2048, 7, dtype, device)  # a fast one has more to show
    count = (16 if quick else 64) * 2**20
    if device.startswith("cuda") and not quick:
        count *= 4
    source = torch.zeros(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = _samples(lambda: target.copy_(source), device, 5 if quick else 9)
    return Calibration(flops, timings, 2 * 4 * count / copy.min_s, copy)


def _product(size: int, runs: int, dtype: torch.dtype, device: str) -> tuple[Timing, float]:
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    timing = _samples(lambda: a @ b, device, runs)
    return timing, 2 * size**3 / timing.min_s


def _samples(run: Any, device: str, runs: int) -> Timing:
    once(run, device)
    return summarize([once(run, device)[0] for _ in range(runs)])


class OtherLoad:
    """The part of the processors that other processes used since this object was made; None where nobody
    counts it.
    """

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
            int, stat.read_text().split("\n")[0].split()[1:]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, own.user + own.system

    def share(self) -> float | None:
        """0 is a quiet machine, 1 is one whose processors all worked for others."""
        now = self._now()
        if now is None or self._start is None:
            return None
        elapsed = now[0] - self._start[0]
        others = (now[1] - self._start[1]) - (now[2] - self._start[2])
        return max(0.0, others / (elapsed * (os.cpu_count() or 1))) if elapsed > 0 else 0.0


@dataclass(frozen=True)
class Trust:
    """Whether the numbers of a run count, and every reason why not."""

    trusted: bool
    reasons: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def trust(start: Calibration, end: Calibration, other_load: float | None) -> Trust:
    """Judges a run by its calibrations before and after, and by what others did meanwhile."""
    reasons = []
    pairs = [(f"{name} GEMM", start.gemm[name], end.gemm[name]) for name in start.gemm if name in end.gemm]
    for what, before, after in [*pairs, ("copy", start.copy, end.copy)]:
        drift = abs(after.median_s / before.median_s - 1)
        if drift > MOST_DRIFT:
            reasons.append(f"{what} speed moved by {drift:.0%} from start to end (allowed {MOST_DRIFT:.0%})")
        spread = max(before.spread, after.spread)
        if spread > MOST_SPREAD:
            reasons.append(f"{what} samples spread by {spread:.0%} (allowed {MOST_SPREAD:.0%})")
    if other_load is not None and other_load > MOST_OTHER_LOAD:
        reasons.append(
            f"other processes used {other_load:.0%} of the processors (allowed {MOST_OTHER_LOAD:.0%})"
        )
    return Trust(not reasons, reasons)
