"""Inference with packed weights alone: `release_weights` gives the originals up, `restore_weights` makes them
again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from bigmodel_kernels.ops.linear.native import releasable
from bigmodel_kernels.ops.packed_weight import PackedWeight, frozen

_HOOK = "_bigmodel_released"


def release_weights(model: nn.Module) -> int:
    """Gives up the weights of which the CPU library has made packed copies, and returns the bytes they took.

    On the CPU a patched model holds its large weights twice once it has run: as they are, and packed. For
    inference the packed ones are enough. Each parameter that has one becomes a `PackedWeight` of the same
    shape and dtype, without gradient; its memory is free once nobody else holds it. Results keep their bits.
    Call it when the model has run once, for until then nothing is packed.

    `state_dict` and `save_pretrained` of the model, pickles and deep copies give the weights as they were.
    What would write to one (`load_state_dict`, an optimizer) raises RuntimeError; `restore_weights(model)`
    makes all of them plain parameters again, as `unpatch` and `.to(dtype)` do. Under torch.compile weights
    are unpacked at each call.

    Kept are parameters that several modules share (an embedding tied to a head), or that are packed twice.

    Raises RuntimeError where no weight of the model has a packed copy.
    """
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    given = [p for p in model.parameters() if places[id(p)] == 1]
    copies = {id(weight): copy for weight, copy in releasable(given)}
    released = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in copies:
                released += parameter.numel() * parameter.element_size()
                module._parameters[name] = frozen(copies[id(parameter)])
    if not released:
        raise RuntimeError(
            "no weight of the model has a packed copy: patch the model and run it once on the CPU first"
            + ("; others are released already" if any(map(_is_released, model.parameters())) else "")
        )
    if _HOOK not in model.__dict__:
        model.__dict__[_HOOK] = model.register_state_dict_post_hook(_unpack)
    return released


def restore_weights(model: nn.Module) -> int:
    """Makes every released weight of the model a plain parameter again, and returns how many there were."""
    restored = 0
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, PackedWeight):
                module._parameters[name] = nn.Parameter(parameter.unpacked(), parameter.place.trainable)
                restored += 1
        hook = module.__dict__.pop(_HOOK, None)
        if hook is not None:
            hook.remove()
    return restored


def _is_released(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, PackedWeight)


def _unpack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, value in state.items():
        if isinstance(value, PackedWeight):
            state[name] = value.unpacked()
