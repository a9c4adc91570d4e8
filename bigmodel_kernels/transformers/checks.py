"""What makes a module other than it seems: reasons to leave it alone, in words, and a quick check for every
call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bigmodel_kernels.ops.packed_weight import PackedWeight

#: Parameters of these dtypes have kernels (float64 runs in plain PyTorch).
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: The attribute of a module that makes its hidden layer again in the backward.
RECOMPUTE = "_bigmodel_recompute"

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
    "BloomGelu": "gelu_tanh",
}
_ACTIVATION_HOMES = (
    "transformers.activations",
    "torch.nn.modules.activation",
    "transformers.models.bloom.modeling_bloom",
)


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
    if is_sharded_class(type(module)) and unsharded_class(module) is cls:
        return "fully_shard has taken it already: patch before sharding"
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
    hooks = module._forward_hooks
    if any(not _is_capture_hook(hook) for hook in hooks.values()) and not _is_marked_table(
        type(module), hooks
    ):
        return "it has a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has a backward hook"
    return None


def reason_for_parameters(module: nn.Module) -> str | None:
    """Weights that the operators cannot read."""
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) not in (nn.Parameter, PackedWeight):
            return f"{name} is a {type(parameter).__qualname__}"
        if parameter.device.type == "meta":
            return f"{name} is on the meta device (not loaded, or offloaded)"
        if parameter.dtype not in DTYPES:
            return f"{name} has dtype {parameter.dtype}"
    return None


def reason(module: nn.Module, cls: type) -> str | None:
    """Any of the above, the first that holds."""
    return reason_for_class(module, cls) or reason_for_hooks(module) or reason_for_parameters(module)


def reason_for_parts(module: nn.Module, parts: dict[str, type], lora: bool = False) -> str | None:
    """The first submodule (dotted name -> class) that is not plainly what it should be; with `lora`, a
    projection may have an adapter.
    """
    for name, cls in parts.items():
        try:
            part = module.get_submodule(name)
        except AttributeError:
            return f"it has no {name}"
        why = reason_for_hooks(part) if lora and is_lora(part) else reason(part, cls)
        if why is not None:
            return f"{name}: {why}"
    return None


def reason_for_activation(function: Any) -> str | None:
    """Why there is no kernel for an activation module."""
    if activation(function) is not None:
        return None
    name = getattr(function, "__name__", None) or type(function).__name__
    if isinstance(function, nn.Module) and (why := reason_for_hooks(function)) is not None:
        return f"activation {name}: {why}"
    return f"activation {name} has no kernel; known are {', '.join(sorted(set(ACTIVATIONS.values())))}"


def inside(part: Any, name: str, cls: type, patched: type, check: Callable[[Any], str | None]) -> str | None:
    """Why a submodule, patched already or not, cannot run fused."""
    why = None if type(part) is patched else reason_for_class(part, cls)
    return prefixed(name, why or reason_for_hooks(part) or check(part))


def prefixed(name: str, why: str | None) -> str | None:
    return None if why is None else f"{name}: {why}"


def _is_capture_hook(hook: Any) -> bool:
    """transformers' own hooks for output_hidden_states and output_attentions; idle unless a call asks for
    those.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _is_sharding_hook(hook: Any) -> bool:
    """What fully_shard (FSDP2) hangs on a module that it gathers and frees around the call."""
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def is_sharded_class(cls: type) -> bool:
    """Whether fully_shard made this class, whose forward is that of its second base."""
    bases = cls.__bases__
    return (
        len(bases) == 2
        and bases[0].__name__ == "FSDPModule"
        and bases[0].__module__.startswith("torch.distributed.fsdp")
    )


def unsharded_class(module: Any) -> type:
    """The class of a module, and for one that fully_shard has taken the one that it had before."""
    cls = type(module)
    return cls.__bases__[1] if is_sharded_class(cls) else cls


def sharded_like(module: Any, cls: type) -> type:
    """`cls`, as fully_shard would have it for a module that it has taken."""
    kind = type(module)
    if not is_sharded_class(kind):
        return cls
    own = {name: kind.__dict__[name] for name in ("__deepcopy__",) if name in kind.__dict__}
    return type(f"FSDP{cls.__name__}", (kind.__bases__[0], cls), own)


def marks_its_output(table: Any) -> bool:
    """Whether transformers or peft has hung a hook on this embedding that makes its output require a gradient
    (reentrant checkpointing of a frozen model starts there).
    """
    return any(map(_is_marking_hook, table.__dict__["_forward_hooks"].values()))


def _is_marking_hook(hook: Any) -> bool:
    home = (getattr(hook, "__module__", None) or "").split(".")[0]
    name = getattr(hook, "__name__", "")
    return home in ("transformers", "peft") and name in (
        "make_inputs_require_grads",
        "make_inputs_require_grad",
    )


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
    return not hooks or all(map(_is_capture_hook, hooks.values())) or _is_marked_table(cls, hooks)


def _is_marked_table(cls: type, hooks: Any) -> bool:
    return cls is nn.Embedding and all(_is_capture_hook(h) or _is_marking_hook(h) for h in hooks.values())


def callable_as(module: Any, cls: type) -> bool:
    """Whether a module that is called may get its input in another shape than usual: a `cls`, sharded or not,
    with no hooks but those of sharding and of transformers' own capture.
    """
    state = module.__dict__
    return (
        unsharded_class(module) is cls
        and "forward" not in state
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
        and all(_is_sharding_hook(hook) for hook in state["_forward_pre_hooks"].values())
        and all(_is_sharding_hook(h) or _is_capture_hook(h) for h in state["_forward_hooks"].values())
    )


def is_lora(module: Any) -> bool:
    """Whether peft has put this in the place of a projection, as a sum of it and of a product of low rank."""
    cls = type(module)
    return cls.__name__ == "Linear" and cls.__module__ == "peft.tuners.lora.layer"


def without_adapter(projection: Any) -> Any:
    """The projection itself, which peft may have put an adapter around."""
    return projection.get_base_layer() if is_lora(projection) else projection


def row_wise(module: Any, cls: type) -> bool:
    """Whether a projection treats every row alone: it may be called on tokens without their padding."""
    return callable_as(module, type(module) if is_lora(module) else cls)


def parameters(module: Any, cls: type, dtype: torch.dtype | None) -> tuple[Any, Any] | None:
    """(weight, bias) of an intact module whose parameters are plain tensors of `dtype`; else None.

    A dtype of None (see `dtype_of`) allows all but float64, which autocast does not touch.
    """
    if not intact(module, cls):
        return None
    held = module.__dict__["_parameters"]
    weight = held.get("weight")
    if not _readable(weight, dtype):
        return None
    bias = held.get("bias")
    if bias is not None and not _readable(bias, dtype):
        return None
    return weight, bias


def _readable(tensor: Any, dtype: torch.dtype | None) -> bool:
    if type(tensor) not in (nn.Parameter, torch.Tensor, PackedWeight):
        return False
    return tensor.dtype in DTYPES[:3] if dtype is None else tensor.dtype == dtype


def dtype_of(x: torch.Tensor) -> torch.dtype | None:
    """The type that parameters must have for a call on x; None under autocast, which casts them."""
    return None if torch.is_autocast_enabled(x.device.type) else x.dtype


def plain_dropout(module: Any) -> bool:
    """Whether this drops as nn.Dropout does. A probability of 1 is left to torch: operators stay below."""
    return intact(module, nn.Dropout) and module.p < 1


def dropout_p(dropout: Any) -> float:
    """The probability with which a plain nn.Dropout drops now."""
    return float(dropout.p) if dropout.training else 0.0


def probability(module: Any, name: str) -> float | None:
    """With what probability a dropout of this (dotted) name, a module or a number, drops now; None if that
    is not plain. No name is no dropout.
    """
    if not name:
        return 0.0
    found: Any = module
    for step in name.split("."):
        found = getattr(found, step)
    if isinstance(found, nn.Module):
        if intact(found, nn.Identity):
            return 0.0
        return dropout_p(found) if plain_dropout(found) else None
    p = float(found) if module.training else 0.0
    return p if p < 1 else None


def recomputes(module: Any) -> bool:
    """Whether `patch(model, recompute=True)` asked this module not to keep its hidden layer."""
    return RECOMPUTE in module.__dict__


def watched_globally() -> bool:
    """Whether hooks on all modules of the process are set: fused calls would pass them by."""
    return bool(
        nn.modules.module._global_forward_hooks
        or nn.modules.module._global_forward_pre_hooks
        or nn.modules.module._global_backward_hooks
        or nn.modules.module._global_backward_pre_hooks
    )
