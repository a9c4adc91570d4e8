"""What the heads of a model look at, collected in one forward of a patched model.

Statistics of all heads are small - a few numbers for each token - and are made without a tensor of
probabilities; those themselves are collected on request.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_kernels.ops.attention_maps import (
    AttentionStatistics,
    attention_probabilities,
    attention_statistics,
)
from bigmodel_kernels.transformers import attention_interface
from bigmodel_kernels.transformers.attention_interface import Visibility

#: Names of modules that look at another sequence than their own, as transformers has them.
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


@dataclass
class LayerAttention:
    """One call of one attention module.

    name: the module's, in the model; layer: its number, from 0; kind: "self" or "cross". heads: the numbers
    of the heads that are here, in the order of the tensors. statistics: see `bk.attention_statistics`, of
    (B, heads, ...); probabilities: (B, heads, Sq, Sk), in the dtype of the model. Each is None unless asked
    for. counted: bool (B, Sq), False for queries that are padding, whose numbers are 0; None if all count.
    """

    name: str
    layer: int
    kind: str
    heads: tuple[int, ...]
    statistics: AttentionStatistics | None = None
    probabilities: Tensor | None = None
    counted: Tensor | None = None

    def head_entropy(self) -> Tensor:
        """(B, heads): the mean over the queries that count, in nats."""
        if self.statistics is None:
            raise ValueError(f"statistics of {self.name} is None; collect with statistics=True")
        entropy = self.statistics.entropy
        if self.counted is None:
            return entropy.mean(-1)
        return entropy.sum(-1) / self.counted.sum(-1, keepdim=True).clamp_min(1)


@dataclass
class AttentionMaps:
    """All calls of attention in a forward, in their order, and the model's output (`attention_maps` only)."""

    layers: list[LayerAttention] = field(default_factory=list)
    output: Any = None

    def __iter__(self) -> Iterator[LayerAttention]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@contextlib.contextmanager
def collect_attention(
    model: nn.Module,
    *,
    statistics: bool = True,
    probabilities: bool = False,
    top_k: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[AttentionMaps]:
    """Collects from every call of attention of `model` inside the `with`, in this thread.

    model: patched by `bk.patch`, or loaded with attn_implementation="bigmodel": modules whose attention runs
    elsewhere are not seen, and not compiled code either. Results are detached, and taken before dropout.
    While it collects, layers run one by one with their padding in. Gradient checkpointing runs layers again
    in the backward, and what they look at is collected again.

    statistics, probabilities: what to collect. top_k: how many keys to name for each query.
    layers, heads: only those, numbered from 0; None for all.
    attention_mask: (B, S), True or not 0 for real tokens: other queries count nothing. Without it, in
    self-attention a query is padding where its key is.

    Raises ValueError for a head or a top_k out of range, when the forward comes to it.
    """
    collector = _Collector(
        names={id(module): name for name, module in model.named_modules()},
        statistics=statistics,
        probabilities=probabilities,
        top_k=top_k,
        layers=None if layers is None else tuple(layers),
        heads=None if heads is None else tuple(heads),
        masks={"self": attention_mask},
        maps=AttentionMaps(),
    )
    token = attention_interface.observing.set(collector)
    try:
        yield collector.maps
    finally:
        attention_interface.observing.reset(token)


def attention_maps(
    model: nn.Module,
    *,
    statistics: bool = True,
    probabilities: bool = False,
    top_k: int = 0,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **inputs: Any,
) -> AttentionMaps:
    """One forward of `model` on `inputs`, without gradients, and what its heads looked at.

    The options are those of `collect_attention`. `inputs` are the model's own, by name (input_ids,
    attention_mask, ...): queries that are padding there count nothing. The model's output is in `output`.

    Raises ValueError where no attention of the model is seen.
    """
    with (
        torch.no_grad(),
        collect_attention(
            model,
            statistics=statistics,
            probabilities=probabilities,
            top_k=top_k,
            layers=layers,
            heads=heads,
        ) as maps,
    ):
        collector = attention_interface.observing.get()
        assert isinstance(collector, _Collector)
        collector.masks = _masks_of(inputs)
        maps.output = model(**inputs)
    if not collector.numbers:
        raise ValueError(
            f"model={type(model).__name__} has no attention that runs here; patch it with bk.patch(model), "
            "or load it with attn_implementation='bigmodel'"
        )
    if not maps.layers:
        allowed = ", ".join(map(str, sorted(collector.numbers)))
        raise ValueError(f"layers={list(layers or ())} are not there; those of the model are {allowed}")
    return maps


def _masks_of(inputs: dict[str, Any]) -> dict[str, Tensor | None]:
    """Which queries count, by the kind of attention and the part of the model."""
    decoder = inputs.get("decoder_attention_mask")
    if "decoder_input_ids" not in inputs and "decoder_inputs_embeds" not in inputs:
        return {"self": inputs.get("attention_mask")}
    return {"self": inputs.get("attention_mask"), "decoder": decoder, "cross": decoder}


@dataclass
class _Collector:
    """The observer of one `collect_attention`."""

    names: dict[int, str]
    statistics: bool
    probabilities: bool
    top_k: int
    layers: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    masks: dict[str, Tensor | None]
    maps: AttentionMaps
    numbers: set[int] = field(default_factory=set)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        seen: Visibility,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        name = self.names.get(id(module))
        if name is None:  # of another model
            return
        layer = _number(module, name, len(self.numbers))
        self.numbers.add(layer)
        if self.layers is not None and layer not in self.layers:
            return
        kind = "cross" if _CROSS.search(name) or getattr(module, "is_cross_attention", False) else "self"
        counted = self._counted(name, kind, query, seen)
        every = query.shape[1]
        heads = tuple(range(every)) if self.heads is None else self.heads
        if any(not -every <= head < every for head in heads):
            raise ValueError(f"heads={list(heads)} has one out of range; allowed are {-every} to {every - 1}")
        found = LayerAttention(name, layer, kind, tuple(head % every for head in heads), counted=counted)
        options = attention_interface.of_operator(query, seen, scale, softcap, sinks)
        options["query_padding_mask"] = counted
        with torch.no_grad():
            self._collect(found, query, key, options)

    def _collect(self, found: LayerAttention, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        if self.statistics:
            statistics = attention_statistics(query, key, top_k=self.top_k, **options)
            if self.heads is not None:
                statistics = AttentionStatistics(*(part[:, list(found.heads)] for part in statistics))
            found.statistics = statistics
        if self.probabilities:
            chosen = None if self.heads is None else found.heads
            found.probabilities = attention_probabilities(query, key, heads=chosen, **options)
        self.maps.layers.append(found)

    def _counted(self, name: str, kind: str, query: Tensor, seen: Visibility) -> Tensor | None:
        """bool (B, Sq): the queries that are no padding; None if all count."""
        batch, rows = query.shape[0], query.shape[2]
        part = kind
        if kind == "self" and "decoder" in self.masks and "decoder" in name:
            part = "decoder"
        mask = self.masks.get(part)
        if mask is None and kind == "self":
            mask = seen.padding
        if mask is None or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < rows:
            return None
        counted = mask[:, -rows:].to(device=query.device, dtype=torch.bool)
        return None if bool(counted.all()) else counted


def _number(module: nn.Module, name: str, default: int) -> int:
    """A layer's number: the first in its name, or what the module says."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    index = getattr(module, "layer_idx", None)
    return index if isinstance(index, int) else default
