"""The loss of a language model straight from its hidden states: `patch(model, fused_loss=True)`.

transformers returns the logits next to the loss, so a model that fuses the two gives another output: in
training mode with labels, `logits` is None. It is therefore asked for, and everything else about the model
stays: evaluation and calls without labels return logits, and its class goes by the name that transformers
knows (saved configs, Trainer and pipelines look a model up by the name of its class).

One way for all models: the model's own forward runs on `_Passing`, a stand-in whose head gives back what it
gets, so that the output has hidden states where its logits would be, with whatever the model does before its
head (T5 scales them) and after it (Granite does). What a head does before its projection to the vocabulary is
done for labelled tokens alone. A family says no more than `Head` has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from bigmodel_kernels.ops.cross_entropy import linear_cross_entropy
from bigmodel_kernels.transformers import attention_interface, checks
from bigmodel_kernels.transformers.families import Rule
from bigmodel_kernels.transformers.generic import BigmodelLinear, stands_for

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """How the models of a class come from hidden states to their loss.

    `projection` is the (dotted) linear layer of the vocabulary. `passed` are the model's own children that
    make logits of hidden states, the projection or what holds it among them. `before` gives what they do
    before the projection, as a function of rows of hidden states, and None where they are not as known.
    """

    projection: str = "lm_head"
    passed: tuple[str, ...] = ("lm_head",)
    before: Callable[[Any], Rows | None] = lambda model: _pass_on
    #: The `loss_type` of models that call transformers' `loss_function`; None: they take the mean themselves.
    loss_type: str | None = None
    #: The arguments that a model derives from its labels, before it makes hidden states.
    inputs: Callable[[Any, Tensor, dict[str, Any]], dict[str, Any]] = lambda model, labels, kwargs: {}


CAUSAL = Head(loss_type="ForCausalLM")


def rules(*forms: Any) -> tuple[Rule, ...]:
    """`Family.losses` of those among `forms` that `language_model` made: they can do without logits."""
    note = "in training, with labels, no logits are made: logits is None"
    return tuple(
        Rule(form.__bases__[-1], form, ("linear_cross_entropy",), partial(_check, form.fused_loss), note=note)
        for form in forms
        if isinstance(form.__dict__.get("fused_loss"), Head)
    )


def _check(head: Head, model: nn.Module) -> str | None:
    """Why a model that is exactly of a known class keeps its logits."""
    if "_loss_function" in model.__dict__ or not _plain(model._modules.get("mlm_loss_fct")):
        return "it has a loss function of the user's own, which takes logits"
    if head.before(model) is None:
        return "its head is not the one that is known, or has a hook"
    return _reason_for_logits(model)


def _plain(loss: Any) -> bool:
    """Whether a model's module for its loss, if it has one, is the cross-entropy that ours stands for."""
    return loss is None or (
        type(loss) is nn.CrossEntropyLoss
        and (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
        == (None, -100, "mean", 0.0)
    )


def _reason_for_logits(model: Any) -> str | None:
    """What a model does to its logits, or to its labels, before the loss."""
    config = model.config
    if getattr(config, "final_logit_softcapping", None) is not None:
        return "final_logit_softcapping bends the logits before the loss"
    if getattr(config, "sparse_prediction", False) and config.sparse_pred_ignore_index != -100:
        return f"sparse_pred_ignore_index={config.sparse_pred_ignore_index} leaves out labels beside -100"
    return None


def language_model(kin: Any = None, head: Head = CAUSAL) -> Callable[[type], type]:
    """Makes a patched form of a language model's class: in training mode, with labels, its loss without
    logits. `kin` (see `generic.Form`), if the family has it, learns the form.
    """

    def decorate(cls: type) -> type:
        original: Any = cls.__bases__[-1]

        @wraps(original.forward)  # Trainer reads the names of the arguments
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = head.before(self) if _wanted(self, head, args, kwargs) else None
            held = None if before is None else _projection(self, head)
            if before is None or held is None:
                return original.forward(self, *args, **kwargs)
            labels = kwargs["labels"]
            given = {name: value for name, value in kwargs.items() if name not in ("labels", "return_dict")}
            given |= head.inputs(self, labels, given)
            outputs = original.forward(_Passing(self, head), *args, **given, return_dict=True)
            weight, bias = held
            items, ignore_index = None, -100
            if head.loss_type is not None:  # read by transformers' loss functions alone
                items, ignore_index = kwargs.get("num_items_in_batch"), kwargs.get("ignore_index", -100)
            if head.loss_type == "ForCausalLM":
                labels = _next_of(labels, kwargs.get("shift_labels"), ignore_index)
            rows, target = labelled(outputs.logits, labels, ignore_index)
            value = loss(before(rows), weight, bias, target, items, ignore_index)
            rest = {name: part for name, part in outputs.items() if name != "logits"}
            return type(outputs)(loss=value, **rest)

        cls.forward = forward  # type: ignore[attr-defined]
        cls.fused_loss = head  # type: ignore[attr-defined]
        if kin is not None:
            kin.forms[original] = cls
        return stands_for(original)(cls)

    return decorate


class _Passing:
    """A language model, to its own forward: the parts that make logits give back the states they get."""

    def __init__(self, model: Any, head: Head) -> None:
        self._model, self._head = model, head

    def __getattr__(self, name: str) -> Any:
        if name in self._head.passed:
            return _pass_on
        found = getattr(self._model, name)
        # A bias of the vocabulary beside the projection (BART's) is added with that of the projection.
        return found.new_zeros(()) if name == "final_logits_bias" else found


def _pass_on(states: Tensor) -> Tensor:
    return states


def _wanted(model: Any, head: Head, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a model is one for the loss alone."""
    labels = kwargs.get("labels")
    routed = kwargs.get("output_router_logits")
    return (
        model.training
        and isinstance(labels, Tensor)
        and len(args) <= 1  # labels are given by name, and so is whatever else matters here
        and not kwargs.get("logits_to_keep")
        and kwargs.get("return_dict", model.config.return_dict) is not False
        # With these another term comes to the loss.
        and not (getattr(model.config, "output_router_logits", False) if routed is None else routed)
        and (head.loss_type is None or model.loss_type in (None, head.loss_type))
        and labels.shape[-1] <= getattr(model, "max_target_positions", math.inf)  # Whisper refuses these
        and _check(head, model) is None
        and not checks.watched_globally()
    )


def _projection(model: Any, head: Head) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the projection to the vocabulary; None where an adapter or a hook hides them."""
    projection = model.get_submodule(head.projection)
    cls = type(projection)
    if cls not in (nn.Linear, BigmodelLinear):
        return None
    dtype = checks.dtype_of(projection.weight)
    held = checks.parameters(projection, cls, dtype)
    added = getattr(model, "final_logits_bias", None)
    if held is None or added is None:
        return held
    weight, bias = held
    added = added.flatten().to(weight)
    return weight, added if bias is None else bias + added


def _next_of(labels: Tensor, shifted: Tensor | None, ignore_index: int) -> Tensor:
    """The label of each position is the next token's, if they do not come shifted."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shifted is None else shifted


def encoder_decoder(
    shifted: Callable[[Any, Tensor], Tensor], projection: str = "lm_head", caches: bool = True
) -> Head:
    """`Head` of an encoder with a decoder, which reads the labels `shifted` by one unless it is given what to
    read. `caches`: whether calls with labels make a cache.
    """

    def inputs(model: Any, labels: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        derived: dict[str, Any] = {} if caches else {"use_cache": False}
        if given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
            derived["decoder_input_ids"] = shifted(model, labels)
        return derived

    return Head(projection, (projection,), inputs=inputs)


def labelled(x: Tensor, target: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Rows (N, K) of hidden states (B, S, K) that have a label, and the labels: all rows where values may not
    be looked at.
    """
    if x.shape[:-1].numel() != target.numel():
        raise ValueError(
            f"labels have shape {tuple(target.shape)}; there must be one for each of the model's positions, "
            f"{tuple(x.shape[:-1])}"
        )
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
