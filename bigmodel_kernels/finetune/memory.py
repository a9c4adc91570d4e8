"""The most memory that a run held."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_bytes(device: str) -> int | None:
    """On a GPU what torch allocated at most; on the CPU the largest resident size of this process.

    None on a system that does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would count what the parent had before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
