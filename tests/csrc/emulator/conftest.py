from __future__ import annotations

import fcntl
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def build_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bigmodel_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library() -> Path:
    """The emulator's library, built when it is not up to date; processes take turns."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / ".emulator.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path: Path = build_module().emulator()
    torch.ops.load_library(str(path))
    return path


@pytest.fixture(scope="session")
def run_word(library: Path) -> Any:
    """run_word(name, input, output, seed=0): a kernel of csrc/testing/words.cuh."""
    return torch.ops.bigmodel_testing.run
