"""Every test is seeded and runs on one thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from bigmodel_kernels import _native

# No test waits for a network; whoever imports the hub's client later sees it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("bigmodel", deadline=None, derandomize=True, max_examples=40)
# The long search of `make sanitize`: pytest --hypothesis-profile=sanitize.
settings.register_profile("sanitize", settings.get_profile("bigmodel"), max_examples=300, print_blob=True)
settings.load_profile("bigmodel")
if library := os.environ.get("BIGMODEL_TEST_LIBRARY"):  # see csrc/sanitize.py
    _native._LIBRARY = Path(library)
    if reason := _native.reason():
        raise pytest.UsageError(f"BIGMODEL_TEST_LIBRARY={library}: {reason}")
torch.manual_seed(0)  # for what test files make when they are imported


#: Of torch and of our kernels. One, since test processes run side by side; another number runs on demand.
THREADS = int(os.environ.get("BIGMODEL_TEST_THREADS", "1"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def cpu_backends() -> list[object]:
    """The backends that a CPU test is run with; one that is not built is skipped, with its reason."""
    reason = _native.reason()
    native = pytest.param("native", marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    return ["reference", native]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cpu_backend" in metafunc.fixturenames:
        metafunc.parametrize("cpu_backend", cpu_backends())
