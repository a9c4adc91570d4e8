"""Every test here runs on one thread, from the same seed, and leaves no compiled code behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BIGMODEL_TEST_THREADS", "1")))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is of all layers."""
    for name in ("tokens", "encoded"):
        monkeypatch.setattr(f"bigmodel_kernels.transformers.whole_layer.{name}", lambda *args: None)
