"""Makes the emulator stand where the CUDA library would, for layers of models on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigmodel_kernels import backends
from bigmodel_kernels.ops import cuda_library
from bigmodel_kernels.ops.attention import cuda as attention
from bigmodel_kernels.ops.linear import cuda as linear
from bigmodel_kernels.ops.linear import cuda_choice
from bigmodel_kernels.transformers import whole_layer


def stand_in(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], product: str) -> list[str]:
    """These operators are the emulator's, on tensors that seem to be on a GPU that the library was measured
    on, where `product` is the faster. Returns the list of those that will have run.
    """
    seen: list[str] = []

    def recording(name: str) -> Any:
        operator = getattr(torch.ops.bigmodel_emulator, name).default

        class Operator:
            @staticmethod
            def default(*args: Any, **options: Any) -> Any:
                seen.append(name)
                return operator(*args, **options)

        return Operator

    for name in names:
        monkeypatch.setattr(torch.ops.bigmodel, name, recording(name), raising=False)
    monkeypatch.setattr(cuda_library, "_capability_of", lambda device: (9, 0))
    for module in (cuda_library, linear, attention):
        monkeypatch.setattr(module, "lacking", lambda x: None)
    monkeypatch.setattr(linear, "_device", lambda device: ("a GPU", "9.0"))
    monkeypatch.setattr(linear, "choose", lambda *args: linear.Choice(product, "for the test"))
    monkeypatch.setattr(whole_layer, "_by_torch", lambda *args: (product == cuda_choice.TORCH,) * 2)
    monkeypatch.setattr(whole_layer, "_on_gpu", lambda x: True)
    operators = {"layer_norm", *(name.removeprefix("cuda_") for name in names)} | {"feed_forward"}
    for (op, device), row in backends.TABLE.items():
        if device == "cuda" and op.removesuffix("_training") in operators:
            own = tuple(i for i in row if op != "layer_norm" or i.name != "triton")
            monkeypatch.setitem(backends.TABLE, (op, "cpu"), own)
    return seen
