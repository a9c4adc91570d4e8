"""What every patched encoder has to do as eager does; each check takes an unpatched model, and patches it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoder_checks import Doubled
from tiny_models import assert_all_near, assert_gradients, eager_of, float64_of, tensors_of

import bigmodel_kernels as bk


def gradients_of(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the sum of squares of what the model gives."""
    model.zero_grad()
    made = tensors_of(model(**_of_its_type(model, inputs))).values()
    torch.stack([t.double().square().mean() for t in made]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def outputs_of(models: tuple[Any, ...], inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        return [tensors_of(m(**_of_its_type(m, inputs))) for m in models]


def _of_its_type(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs in float64 for a model in float64."""
    double = next(model.parameters()).dtype == torch.float64
    return {
        name: value.double() if double and torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def check_gradients(model: Any, inputs: dict[str, Any]) -> None:
    models = (model.train(), eager_of(model), float64_of(model).train())
    bk.patch(model)
    _assert_gradients(models, inputs)


def check_lora(model: Any, targets: list[str], inputs: dict[str, Any]) -> None:
    """With adapters on the projections `targets`."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    expected = copy.deepcopy(adapted)
    report = bk.patch(adapted)
    assert any("LoRA" in row.reason for row in report.patched)
    _assert_gradients((adapted, expected, copy.deepcopy(expected).double()), inputs)


def _assert_gradients(models: tuple[Any, Any, Any], inputs: dict[str, Any]) -> None:
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
