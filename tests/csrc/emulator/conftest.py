from __future__ import annotations

import fcntl
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests" / "csrc"))


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulator's library, built when it is not up to date; processes take turns."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / ".emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        from build_csrc import build_module

        path: Path = build_module().emulator()
    torch.ops.load_library(str(path))
    return path


@pytest.fixture(scope="session")
def run_word(library: Path) -> Any:
    """run_word(name, input, output, seed=0): a kernel of csrc/testing/words.cuh."""
    return torch.ops.bigmodel_testing.run


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90a"])
def architecture(request: pytest.FixtureRequest, library: Path) -> int:
    torch.ops.bigmodel_emulator.set_architecture(request.param)
    return int(request.param)
