"""What every patched encoder has to do as eager does; each check takes an unpatched model, and patches it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoder_checks import Doubled

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_gradients,
    call,
    gradients_of,
    tensors_of,
)


def outputs_of(models: tuple[Any, ...], inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        return [tensors_of(call(m, inputs)) for m in models]


def check_lora(model: Any, targets: list[str], inputs: dict[str, Any]) -> None:
    """With adapters on the projections `targets`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    expected = copy.deepcopy(adapted)
    report = bk.patch(adapted)
    assert any("LoRA" in row.reason for row in report.patched)
    models = (adapted, expected, copy.deepcopy(expected).double())
    assert_gradients(*(gradients_of(m, inputs) for m in models))


#: What may stand in the way of fused calls.
IN_THE_WAY = ["hook on attention", "hook on a projection", "replaced projection"]


def check_what_stands_in_the_way(
    model: Any, layer: str, attention: str, projection: str, first: str, what: str, after: bool, inputs: Any
) -> None:
    """One of `IN_THE_WAY` is heard and reported, put there before patching or `after`.

    layer is its name in the model, attention its name in the layer, projection one in the attention, first
    that of the feed-forward's first in the layer.
    """
    heard: list[int] = []
    if after:
        bk.patch(model)
    parent = model.get_submodule(layer)
    if what == "hook on attention":
        parent.get_submodule(attention).register_forward_hook(lambda *_: heard.append(1))
    elif what == "hook on a projection":
        parent.get_submodule(first).register_forward_hook(lambda *_: heard.append(1))
    else:
        parent.get_submodule(f"{attention}.{projection}").__class__ = Doubled
    eager = copy.deepcopy(model)
    bk.unpatch(eager)
    report = bk.patch(model)
    word = "is a subclass of Linear" if what == "replaced projection" else "hook"
    assert any(word in row.reason for row in report.rows if row.name.startswith(layer))
    ours = outputs_of((model,), inputs)
    assert heard or what == "replaced projection"
    assert_all_near(ours + outputs_of((eager, copy.deepcopy(eager).double()), inputs))
