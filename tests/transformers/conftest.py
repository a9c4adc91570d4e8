"""Every test here runs on one thread, from the same seed, and leaves no compiled code behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("BIGMODEL_TEST_THREADS", "1")))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Any, Any], None]], None]:
    """Tells a function what each call of all layers by one of `whole_layer` was for: states and layers."""

    def watch(name: str, note: Callable[[Any, Any], None]) -> None:
        from bigmodel_kernels.transformers import whole_layer

        run = getattr(whole_layer, name)

        def noted(x: Any, layers: Any, *args: Any) -> Any:
            out = run(x, layers, *args)
            if out is not None:
                note(x, layers)
            return out

        monkeypatch.setattr(whole_layer, name, noted)

    return watch


@pytest.fixture
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is of all layers."""
    for name in ("tokens", "encoded"):
        monkeypatch.setattr(f"bigmodel_kernels.transformers.whole_layer.{name}", lambda *args: None)
