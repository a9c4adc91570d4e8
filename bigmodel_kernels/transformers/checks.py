"""What makes a module other than it seems: reasons to leave it alone, in words, and a quick check for every
call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Parameters of these dtypes have kernels (float64 runs in plain PyTorch).
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "LinearActivation": "none",
}
_ACTIVATION_HOMES = ("transformers.activations", "torch.nn.modules.activation")


def activation(function: Any) -> str | None:
    """The operators' name for an activation module, or None for one they do not have."""
    cls = type(function)
    if cls.__module__ not in _ACTIVATION_HOMES or not intact(function, cls):
        return None
    if cls is nn.GELU and function.approximate == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(cls.__name__)


def reason_for_class(module: nn.Module, cls: type) -> str | None:
    """Why `module` is not plainly a `cls`."""
    if type(module) is cls:
        return None
    actual = f"{type(module).__module__}.{type(module).__qualname__}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"its {cls.__name__} is parametrized"
    if isinstance(module, cls):
        return f"{actual} is a subclass of {cls.__name__} that is not known"
    return f"{actual} stands in the place of {cls.__name__} (quantised, LoRA or another replacement)"


def reason_for_hooks(module: nn.Module) -> str | None:
    """Hooks and forwards that a fused call would pass by."""
    if "forward" in module.__dict__:
        return "forward is replaced on the instance (offloading or another wrapper)"
    if module._forward_pre_hooks:
        return "it has a forward pre-hook"
    if any(not _is_capture_hook(hook) for hook in module._forward_hooks.values()):
        return "it has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has a backward hook"
    return None


def reason_for_parameters(module: nn.Module) -> str | None:
    """Weights that the operators cannot read."""
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__qualname__}"
        if parameter.device.type == "meta":
            return f"{name} is on the meta device (not loaded, or offloaded)"
        if parameter.dtype not in DTYPES:
            return f"{name} has dtype {parameter.dtype}"
    return None


def reason(module: nn.Module, cls: type) -> str | None:
    """Any of the above, the first that holds."""
    return reason_for_class(module, cls) or reason_for_hooks(module) or reason_for_parameters(module)


def reason_for_parts(module: nn.Module, parts: dict[str, type]) -> str | None:
    """The first submodule (dotted name -> class) that is not plainly what it should be."""
    for name, cls in parts.items():
        try:
            part = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        why = reason(part, cls)
        if why is not None:
            return f"{name}: {why}"
    return None


def _is_capture_hook(hook: Any) -> bool:
    """transformers' own hooks for output_hidden_states and output_attentions; idle unless a call asks for
    those.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def intact(module: Any, cls: type) -> bool:
    """Whether a fused call may still read the parameters of `module`, decided again at every call."""
    if type(module) is not cls:
        return False
    state = module.__dict__
    if (
        "forward" in state
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return False
    hooks = state["_forward_hooks"]
    return not hooks or all(_is_capture_hook(hook) for hook in hooks.values())


def parameters(module: Any, cls: type, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """(weight, bias) of an intact module whose parameters are plain tensors of `dtype`; else None."""
    if not intact(module, cls):
        return None
    held = module.__dict__["_parameters"]
    weight = held.get("weight")
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.dtype != dtype:
        return None
    bias = held.get("bias")
    if bias is not None and (type(bias) not in (nn.Parameter, torch.Tensor) or bias.dtype != dtype):
        return None
    return weight, bias


def dropping(dropout: Any) -> bool:
    """Whether a dropout module would drop something now. Any but a plain nn.Dropout counts as dropping."""
    return type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0)


def original_code_needed(device_type: str) -> bool:
    """Whether the process is in a state that the fused calls do not reproduce: autocast, or global module
    hooks.
    """
    return torch.is_autocast_enabled(device_type) or bool(
        nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
        or nn.modules.module._global_backward_hooks
        or nn.modules.module._global_backward_pre_hooks
    )
