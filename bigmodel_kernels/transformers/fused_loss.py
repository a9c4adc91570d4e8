"""The loss of a language model straight from its hidden states: `patch(model, fused_loss=True)`.

transformers returns the logits next to the loss, so a model that fuses the two gives another output: in
training mode with labels, `logits` is None. It is therefore asked for, and everything else about the model
stays: evaluation and calls without labels return logits, and its class goes by the name that transformers
knows (saved configs, Trainer and pipelines look a model up by the name of its class).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_kernels.ops.cross_entropy import linear_cross_entropy
from bigmodel_kernels.transformers import attention_interface, checks
from bigmodel_kernels.transformers.generic import BigmodelLinear

NOTE = "in training, with labels, no logits are made: logits is None"


def check(model: nn.Module) -> str | None:
    """Why a model that is exactly of a known class keeps its logits."""
    if "_loss_function" in model.__dict__:
        return "it has a loss function of the user's own, which takes logits"
    return None


def named_like_its_original(cls: type) -> type:
    """Gives a patched model class the name of the class that it stands for; pickle finds it by the qualified
    one.
    """
    cls.__name__ = cls.__bases__[0].__name__
    return cls


def wanted(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a model is one for the loss alone."""
    return (
        model.training
        and isinstance(kwargs.get("labels"), Tensor)
        and len(args) <= 1  # labels are given by name, and so is whatever else matters here
        and not kwargs.get("logits_to_keep")
        and kwargs.get("return_dict", model.config.return_dict) is not False
        and "_loss_function" not in model.__dict__
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
