"""The loss of a language model straight from its hidden states: `patch(model, fused_loss=True)`.

transformers returns the logits next to the loss, so a model that fuses the two gives another output: in
training mode with labels, `logits` is None. It is therefore asked for, and everything else about the model
stays: evaluation and calls without labels return logits, and its class goes by the name that transformers
knows (saved configs, Trainer and pipelines look a model up by the name of its class).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from bigmodel_kernels.ops.cross_entropy import linear_cross_entropy
from bigmodel_kernels.transformers import attention_interface, checks
from bigmodel_kernels.transformers.families import Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear


def rule(original: type[nn.Module], patched: type[nn.Module]) -> Rule:
    """Of `Family.losses`: models of this class can do without logits."""
    note = "in training, with labels, no logits are made: logits is None"
    return Rule(original, patched, ("linear_cross_entropy",), check, note=note)


def check(model: nn.Module) -> str | None:
    """Why a model that is exactly of a known class keeps its logits."""
    if "_loss_function" in model.__dict__:
        return "it has a loss function of the user's own, which takes logits"
    return _reason_for_logits(model)


def _reason_for_logits(model: Any) -> str | None:
    """What a model does to its logits before the loss."""
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return "final_logit_softcapping bends the logits before the loss"
    if getattr(model.config, "logits_scaling", 1) != 1:
        return "logits_scaling divides the logits before the loss"
    return None


def named_like_its_original(cls: type) -> type:
    """Gives a patched model class the name of the class that it stands for; pickle finds it by the qualified
    one.
    """
    cls.__name__ = cls.__bases__[0].__name__
    return cls


def causal_lm(output: type) -> Callable[[type], type]:
    """Makes a patched form of a causal language model's class: in training mode, with labels, the loss
    without logits, returned as an `output`.

    The class has its projection to the vocabulary in `lm_head` and the rest in `base_model_prefix`.
    """

    def decorate(cls: type) -> type:
        original: Any = cls.__bases__[0]

        @functools.wraps(original.forward)  # Trainer reads the names of the arguments
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not wanted(self, args, kwargs) or self.loss_type not in (None, "ForCausalLM"):
                return original.forward(self, *args, **kwargs)
            labels, shifted = kwargs["labels"], kwargs.get("shift_labels")
            ignore_index = kwargs.get("ignore_index", -100)
            outputs = getattr(self, self.base_model_prefix)(*args, **of_the_body(kwargs))
            states = outputs.last_hidden_state
            held = head(self.lm_head, checks.dtype_of(states))
            if held is None:  # an adapter or a hook on the head: the logits are what it makes of the states
                value = self.loss_function(self.lm_head(states), vocab_size=self.config.vocab_size, **kwargs)
            else:
                if shifted is None:
                    shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
                rows, target = labelled(states, shifted, ignore_index)
                value = loss(rows, *held, target, kwargs.get("num_items_in_batch"), ignore_index)
            rest = {name: part for name, part in outputs.items() if name != "last_hidden_state"}
            return output(loss=value, **rest)

        cls.forward = forward  # type: ignore[attr-defined]
        return named_like_its_original(cls)

    return decorate


def causal_lm_of(kin: Any, output: type = CausalLMOutputWithPast) -> Callable[[type], type]:
    """`causal_lm` for a class among `kin` (see `generic.Form`), which learns the form."""

    def decorate(cls: type) -> type:
        kin.forms[cls.__bases__[0]] = cls
        return causal_lm(output)(cls)

    return decorate


def wanted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a model is one for the loss alone."""
    return (
        model.training
        and isinstance(kwargs.get("labels"), Tensor)
        and len(args) <= 1  # labels are given by name, and so is whatever else matters here
        and not kwargs.get("logits_to_keep")
        and kwargs.get("return_dict", model.config.return_dict) is not False
        and check(model) is None
        and not checks.watched_globally()
    )


def of_the_body(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model under the head gets."""
    return {k: v for k, v in kwargs.items() if k not in ("labels", "return_dict", "logits_to_keep")}


def head(projection: Any, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the projection to the vocabulary, if they can be read."""
    cls = type(projection)
    return checks.parameters(projection, cls, dtype) if cls in (nn.Linear, BigmodelLinear) else None


def labelled(x: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Rows (N, K) of hidden states (B, S, K) that have a label, and the labels: all rows where values may not
    be looked at.
    """
    x, target = x.flatten(0, -2), target.flatten().to(x.device)
    if attention_interface.is_tracing(target):
        return x, target
    rows = (target != ignore_index).nonzero().flatten()
    return (x, target) if len(rows) == len(target) else (x.index_select(0, rows), target[rows])


def loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
) -> Tensor:
    """transformers' loss of rows: the mean, or with `num_items_in_batch` the sum over that."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    total = linear_cross_entropy(x, weight, target, bias, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
