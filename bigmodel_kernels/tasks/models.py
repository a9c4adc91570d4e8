"""Loads a model with the head that a task needs, and its tokenizer; nothing else is taken for it."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigmodel_kernels.doctor import DTYPES
from bigmodel_kernels.extras import loading, package

if TYPE_CHECKING:
    from bigmodel_kernels.tasks.base import Task


def load(task: Task, source: str, device: str, dtype: str) -> tuple[Any, Any]:
    """(model in evaluation mode on the device, tokenizer). Texts are cut at the model's last position.

    Raises ValueError where it cannot be loaded, and where it has not the head that the task needs: another
    kind of model, or a checkpoint without the weights of the head, which transformers would make up.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r} is unknown; allowed are auto, {', '.join(DTYPES)}")
    transformers = package("transformers", "transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    auto_class = getattr(transformers, task.auto_class)
    with loading(source):
        config = transformers.AutoConfig.from_pretrained(source)
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"model={source!r} is a {config.model_type} model, for which transformers has no "
            f"{task.auto_class}; {task.name} needs {task.head}"
        )
    try:
        task.check_config(config)
    except ValueError as error:
        raise ValueError(f"model={source!r}: {error}") from error
    with loading(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, info = auto_class.from_pretrained(
            source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
    if missing := missing_weights(info["missing_keys"], task.spare_weights):
        was = ", ".join(config.architectures or ["a model without a head"])
        raise ValueError(
            f"model={source!r} was saved as {was}, without the weights {missing}; "
            f"{task.name} needs {task.head}"
        )
    limit_inputs(model, tokenizer)
    return model.eval().to(device), tokenizer


def missing_weights(keys: Any, spare: re.Pattern[str] | None) -> str:
    """The names of weights that the checkpoint should have had, three at most; empty where there are all."""
    found = sorted(key for key in keys if spare is None or not spare.search(key))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def limit_inputs(model: Any, tokenizer: Any) -> None:
    """Makes the tokenizer cut at the model's last position, return only what the model takes, and pad with
    the end of a text where it has no token for padding.
    """
    if limit := positions(model):
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    taken = inspect.signature(type(model).forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def positions(model: nn.Module) -> int | None:
    """How many tokens the model takes; None where nothing limits them (T5)."""
    most = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa counts its positions from behind the one for padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings) - int(module.padding_idx) - 1  # type: ignore[arg-type]
    return most
