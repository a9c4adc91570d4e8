"""Linear by the compiled CPU library, and its cache of packed weights.

The library multiplies with weights laid out for its own tiles. A packed copy is made once, and found again by
the identity of the weights. It is made anew when a weight's version has changed or its fingerprint, which is
of its memory, shape, strides, dtype and 16 of its elements: optimizer steps, `load_state_dict`, `.to()` and
edits through `.data` (which leave the version as it is) are seen. An edit through `.data` that touches none
of these elements is not; `clear()` drops all. A copy dies with its weights.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels.ops.linear.pieces import known_pieces
from bigmodel_kernels.ops.native_library import contiguous, lacking, shaped
from bigmodel_kernels.ops.packed_weight import PackedWeight, Place, layout_of, whole


@dataclass(frozen=True)
class _Entry:
    weights: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int | None, ...]
    fingerprint: int
    packed: tuple[Tensor, ...]


_Key = tuple[Any, ...]
_entries: dict[_Key, _Entry] = {}
# Reentrant: a weak reference can die, and call back, while this thread holds the lock.
_lock = threading.RLock()


def packed(weights: Sequence[Tensor], weight_layout: str) -> Tensor:
    """The weights side by side in the library's own layout, from the cache when they have not changed."""
    return packed_together([weights], weight_layout)[0]


def _released(weights: Sequence[Tensor], weight_layout: str) -> Tensor:
    """The copy that released weights are; packed for the occasion where not all of it is asked for."""
    held = whole(weights)
    if held is not None and weights[0].place.layout == weight_layout:  # type: ignore[attr-defined]
        return held
    return _pack([w.unpacked() if isinstance(w, PackedWeight) else w for w in weights], weight_layout)


def packed_together(groups: Sequence[Sequence[Tensor]], weight_layout: str) -> tuple[Tensor, ...]:
    """`packed` of each group, the very same copies, found at once."""
    weights = [w for group in groups for w in group]
    if any(type(w) is PackedWeight for w in weights):
        if len(groups) > 1:
            return tuple(packed(group, weight_layout) for group in groups)
        return (_released(weights, weight_layout),)
    key = (weight_layout, *map(len, groups), *map(id, weights))
    versions = tuple(map(_version, weights))
    fingerprint = torch.ops.bigmodel.cpu_fingerprint.default(weights)
    with _lock:
        entry = _entries.get(key)
    if (
        entry is not None
        and entry.fingerprint == fingerprint
        and entry.versions == versions
        and all(ref() is w for ref, w in zip(entry.weights, weights, strict=True))
    ):
        return entry.packed
    if len(groups) == 1:
        result: tuple[Tensor, ...] = (_pack(weights, weight_layout),)
    else:
        result = tuple(packed(group, weight_layout) for group in groups)
    references = tuple(weakref.ref(w, _forget(key)) for w in weights)
    with _lock:
        _entries[key] = _Entry(references, versions, fingerprint, result)
    return result


def _pack(weights: list[Tensor], weight_layout: str) -> Tensor:
    return torch.ops.bigmodel.cpu_pack_weight([w.detach().contiguous() for w in weights], weight_layout)


def _forget(key: _Key) -> Any:
    def callback(dead: weakref.ref[Tensor]) -> None:
        with _lock:
            entry = _entries.get(key)
            # Another tensor may have got the same id since: its entry stays.
            if entry is not None and any(ref is dead for ref in entry.weights):
                del _entries[key]

    return callback


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version  # inference tensors count no versions


def packed_bytes(what: torch.nn.Module | Iterable[Tensor]) -> int:
    """Bytes of the packed copies made for these tensors, or for the parameters of this module."""
    tensors = list(what.parameters() if isinstance(what, torch.nn.Module) else what)
    wanted = {id(t) for whole in tensors for t in (whole, *known_pieces(whole))}
    with _lock:
        entries = list(_entries.values())
    total = sum({id(t.packed): t.packed.numel() for t in tensors if isinstance(t, PackedWeight)}.values())
    for entry in entries:
        if len(entry.packed) > 1:
            continue  # the copies of entries of their own
        if any(w is not None and id(w) in wanted for w in (ref() for ref in entry.weights)):
            total += entry.packed[0].numel() * entry.packed[0].element_size()
    return total


def releasable(tensors: Iterable[Tensor]) -> list[tuple[Tensor, PackedWeight]]:
    """Those of the tensors that have one packed copy, up to date and of no other tensors, each with what can
    stand for it.
    """
    wanted = {id(t) for t in tensors}
    with _lock:
        singles = [(key[0], entry) for key, entry in _entries.items() if len(entry.packed) == 1]
    held = [(layout, entry, [ref() for ref in entry.weights]) for layout, entry in singles]
    copies = Counter(id(w) for _, _, weights in held for w in weights)
    found: list[tuple[Tensor, PackedWeight]] = []
    for layout, entry, references in held:
        weights = [w for w in references if w is not None and id(w) in wanted and copies[id(w)] == 1]
        if (
            len(weights) < len(references)
            or entry.versions != tuple(map(_version, weights))
            or entry.fingerprint != torch.ops.bigmodel.cpu_fingerprint.default(weights)
        ):
            continue
        panel, pairs = layout_of(entry.packed[0])
        widths = [w.shape[1 if layout == "conv1d" else 0] for w in weights]
        for i, weight in enumerate(weights):
            place = Place(
                layout,
                first=sum(widths[:i]),
                of=sum(widths),
                shape=tuple(weight.shape),
                trainable=weight.requires_grad,
                panel=panel,
                pairs=pairs,
            )
            found.append((weight, PackedWeight(entry.packed[0], place, weight.dtype)))
    return found


def clear() -> None:
    """Drops all packed copies."""
    with _lock:
        _entries.clear()


def joined(biases: Sequence[Tensor]) -> Tensor | None:
    """The biases as one, or None when there are none."""
    if not biases:
        return None
    return biases[0].contiguous() if len(biases) == 1 else torch.cat(list(biases))


def for_training(weights: Sequence[Tensor], weight_layout: str) -> list[Tensor]:
    """The weights as a training form takes them: as they are where an optimizer will change them, for a kept
    copy would serve one step only; packed where they are frozen."""
    if any(w.requires_grad for w in weights):
        return [w.contiguous() for w in weights]
    return [packed(weights, weight_layout)]


def supports(x: Tensor, weights: Sequence[Tensor], *args: Any, **options: Any) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_linear_training", x.dtype) or empty(*weights)


def empty(*weights: Tensor | None) -> str | None:
    """The library's products have at least one row and one column of weight."""
    return (
        "it has no products with an empty weight"
        if any(w is not None and not w.numel() for w in weights)
        else None
    )


def run(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    activation: str = "none",
    norm_eps: float = 1e-5,
    norm_kind: str = "layer_norm",
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.linear`."""
    return torch.ops.bigmodel.cpu_linear(  # type: ignore[no-any-return]
        x.contiguous(),
        packed(weights, weight_layout),
        joined(biases),
        activation,
        contiguous(residual),
        contiguous(norm_weight),
        contiguous(norm_bias),
        norm_eps,
        dropout_seed,
        norm_kind=norm_kind,
        dropout_p=dropout_p,
    )


supports_training = supports


def run_training(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    *,
    weight_layout: str = "linear",
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `run`, and what the activation and the norm were given, empty where there is none."""
    return torch.ops.bigmodel.cpu_linear_training(  # type: ignore[no-any-return]
        x.contiguous(),
        for_training(weights, weight_layout),
        [b.contiguous() for b in biases],
        contiguous(residual),
        contiguous(norm_weight),
        contiguous(norm_bias),
        dropout_seed,
        weight_layout=weight_layout,
        **options,
    )


def supports_backward(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], *args: Any, **options: Any
) -> str | None:
    """None, or the reason why the library cannot run this call."""
    return lacking("cpu_linear_backward", x.dtype) or empty(*weights)


def run_backward(
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    preactivation: Tensor | None = None,
    prenorm: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Gradients of x, residual, norm_weight, norm_bias, weights and biases."""
    return torch.ops.bigmodel.cpu_linear_backward(  # type: ignore[no-any-return]
        grad.contiguous(),
        shaped(x),
        [w.contiguous() for w in weights],
        [b.contiguous() for b in biases],
        contiguous(residual),
        contiguous(norm_weight),
        contiguous(norm_bias),
        dropout_seed,
        contiguous(preactivation),
        contiguous(prenorm),
        **options,
    )
