"""transformers' continuous batching (`model.generate_batch`, `model.init_continuous_batching`) with our
attention.

transformers lets three kinds of attention in: `sdpa` and `paged|eager`, for which it makes a dense mask of
all tokens in a batch by all their keys, and implementations with "flash" in their name, which are told where
each request begins. Ours is of the third kind (see paged.py), under the name FLASH_NAME. A model has that
name only while a manager of continuous batching is at work: from `init_continuous_batching`, for which
`enable_continuous_batching` puts a door in front of the model's own, to the manager's `stop`. Every other
call of the model, and its masks, are what they were.

transformers takes block tables from packages of flash-attention alone; here they are switched on for our
attention, for models without windows, so that decoding reads the pages in place.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import transformers
from torch import nn
from transformers.generation.continuous_batching import ContinuousBatchingManager

from bigmodel_kernels.transformers import config_view, paged
from bigmodel_kernels.transformers.autoregister import FLASH_NAME, NAME, register

ATTRIBUTE = "init_continuous_batching"
_IMPLEMENTATION = "_attn_implementation_internal"  # where a config keeps it


def enable_continuous_batching(model: nn.Module) -> None:
    """Lets `model.generate_batch` and `model.init_continuous_batching` run `bigmodel::attention` and
    `bigmodel::attention_decode`, in place. `patch` does this too; this alone is for a model that is to keep
    its own layers, such as one made with `attn_implementation="bigmodel"`. `unpatch` undoes it.

    model: a decoder of transformers whose attention transformers lets be set.

    Raises TypeError for anything else. Continuous batching itself then raises NotImplementedError before
    transformers 5.24, and ValueError for CUDA graphs and compiled steps, which pad the batch.
    """
    if not isinstance(model, nn.Module) or not generates(model):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a decoder of transformers that generates, and "
            "whose attention calls transformers' attention interface"
        )
    register()
    model.__dict__[ATTRIBUTE] = Door(model)


def generates(module: Any) -> bool:
    """Whether this is a model for continuous batching, whose attention can be chosen."""
    return (
        hasattr(type(module), ATTRIBUTE)
        and isinstance(module, transformers.PreTrainedModel)
        and bool(module.can_generate())
        and not module.config.is_encoder_decoder
        and bool(module._can_set_attn_implementation())
    )


def is_enabled(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get(ATTRIBUTE), Door)


def disable(module: Any) -> None:
    """Undoes `enable_continuous_batching`. A manager that the model has kept from a session goes with it."""
    del module.__dict__[ATTRIBUTE]
    if isinstance(module.__dict__.get("_cached_continuous_batching_manager"), Manager):
        module.destroy_cached_continuous_batching_manager()


def has_our_attention(model: Any) -> bool:
    return bool(config_view.base_of(model.config)._attn_implementation == NAME)


def note() -> str:
    """What a report says of a model that is enabled."""
    if paged.CACHE is None:
        return f"continuous batching (generate_batch) needs transformers {paged.SINCE}, and is refused"
    return "continuous batching (generate_batch) runs bigmodel attention on packed requests and paged caches"


class Door:
    """`init_continuous_batching` of one model, in its `__dict__`. A copy of the model has its own, and none
    keeps its model alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(
        self,
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        **others: Any,
    ) -> Any:
        """As transformers' own, with the same arguments and result."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this init_continuous_batching is gone")
        if paged.CACHE is None:
            raise NotImplementedError(
                f"continuous batching with bigmodel attention needs transformers {paged.SINCE}; this is "
                f"{transformers.__version__}. Without it: bigmodel_kernels.unpatch(model)"
            )
        own = getattr(type(model), ATTRIBUTE)
        asked = _asked(model, generation_config, continuous_batching_config)
        switched = Switched(model)
        try:
            manager = own(
                model,
                generation_config=generation_config,
                continuous_batching_config=_without_graphs(asked),
                workload_hints=workload_hints,
                **others,
            )
            if not isinstance(manager, Manager):  # else the model has kept it from an earlier session
                _complete(manager, model, asked, workload_hints)
                manager.__class__ = Manager
        except BaseException:
            switched.undo()
            raise
        manager.bigmodel_switched = switched
        return manager

    def __reduce__(self) -> tuple[Any, ...]:
        return Door, (self._model(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> Door:
        model = self._model()
        copied: Any = memo.get(id(model), model)
        return Door(copied)


class Manager(ContinuousBatchingManager):
    """One that gives the model its implementation back when it stops."""

    bigmodel_switched: Switched

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any) -> None:
        """Called where the model has kept this manager, whose batches have no masks for other attention."""
        if model.config._attn_implementation != FLASH_NAME:
            raise RuntimeError(
                "the model has kept a manager from when it had bigmodel attention; give it up first, by "
                "model.destroy_cached_continuous_batching_manager()"
            )

    def stop(self, *args: Any, **kwargs: Any) -> None:
        super().stop(*args, **kwargs)
        self.bigmodel_switched.undo()


class Switched:
    """The configs of a model's text part, under the name for continuous batching until `undo`."""

    def __init__(self, model: Any) -> None:
        self._before = [
            (config, getattr(config, _IMPLEMENTATION))
            for config in _configs(model)
            if getattr(config, _IMPLEMENTATION) != FLASH_NAME  # another manager of the model is at work
        ]
        for config, _ in self._before:
            setattr(config, _IMPLEMENTATION, FLASH_NAME)

    def undo(self) -> None:
        """As before, but where somebody has chosen another implementation since."""
        while self._before:
            config, before = self._before.pop()
            if getattr(config, _IMPLEMENTATION) == FLASH_NAME:
                setattr(config, _IMPLEMENTATION, before)


def _configs(model: Any) -> list[Any]:
    """Those by which transformers and the modules of the text part choose attention; none is a view."""
    text = config_view.base_of(model.config).get_text_config()
    found = [config_view.base_of(model.config), text]
    found += [config_view.base_of(module.__dict__.get("config")) for module in model.modules()]
    kind = type(text)
    return list({id(c): c for c in found if c is found[0] or isinstance(c, kind)}.values())


#: What pads the batches of continuous batching, by its name in their config.
_PADDING = (
    *("use_cuda_graph", "q_padding_interval_size", "kv_padding_interval_size"),
    *("varlen_compile_config", "decode_compile_config", "default_compile_level"),
)


def _asked(model: Any, generation_config: Any, continuous_batching_config: Any) -> Any:
    """The config of continuous batching that transformers would take. It must not pad."""
    found = continuous_batching_config
    if found is None:
        found = getattr(generation_config or model.generation_config, "continuous_batching_config", None)
    if found is None:
        found = transformers.ContinuousBatchingConfig()
    for name in _PADDING:
        given = getattr(found, name)
        if any(given) if isinstance(given, tuple) else given:
            raise ValueError(f"{name}={given} {_REFUSED}; allowed is its default, and False for CUDA graphs")
    return found


_REFUSED = "pads the batch, which bigmodel attention does not take in continuous batching"


def _without_graphs(asked: Any) -> Any:
    """The same without CUDA graphs, which are the default for flash implementations and pad the batch, and
    without block tables, which transformers has for its own implementations alone, and warns.
    """
    changed = copy.copy(asked)
    changed.use_cuda_graph, changed.max_blocks_per_request = False, 0
    return changed


def _complete(manager: Any, model: Any, asked: Any, workload_hints: Any) -> None:
    """Switches block tables on, as transformers does for its own."""
    from transformers.generation.continuous_batching import cache, initialization, utils

    config, text = manager.continuous_batching_config, model.config.get_text_config()
    if config.varlen_compile_config is not None:
        raise ValueError(f"compile_config={config.varlen_compile_config} in the model's config {_REFUSED}")
    kinds = cache.group_layers_by_attn_type(text)
    tables = all(cache.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in kinds)
    if asked.max_blocks_per_request == 0 or not tables or utils.find_head_dim(text) > 256:
        return
    config.max_blocks_per_request = asked.max_blocks_per_request
    initialization.resolve_using_hints(config, workload_hints)
    initialization.resolve_without_hints(config)
