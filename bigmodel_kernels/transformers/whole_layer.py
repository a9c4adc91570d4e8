"""A layer in two calls of a compiled library: to query, key and value, and from them to the result.

The calls are those of `blocks`, without the Python between: for a few tokens that takes longer than the
arithmetic, and a GPU waits for it. On the CPU a token of a generation takes one call of as many layers as
follow each other, which writes its keys and values into the cache itself.

It is where nobody listens to the operators (see `ops.registration.call`): on GPUs whose kernels in the CUDA
library come before Triton's, where gradients are wanted too (`training_layer`), and without gradients and
dropout on the CPU. Everywhere else, and for what `held`, `takes` and `token` do not take, `blocks` makes its
calls.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel_kernels import backends
from bigmodel_kernels.ops import cuda_library
from bigmodel_kernels.ops.linear import cuda as cuda_linear
from bigmodel_kernels.ops.linear.cuda_choice import TORCH, Case
from bigmodel_kernels.ops.linear.native import empty, joined, packed_together
from bigmodel_kernels.ops.linear.pieces import known_pieces, pieces_of
from bigmodel_kernels.ops.native_library import contiguous, lacking
from bigmodel_kernels.ops.registration import nobody_listens, plain
from bigmodel_kernels.transformers import checks, growing_cache, training_layer
from bigmodel_kernels.transformers.snapshot import Snapshot

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.blocks import LayerParts, Part, Terms

    #: What is around layers: a tensor, or weights side by side.
    Around = Tensor | list[Tensor] | None
    #: Cosines and sines.
    Angles = tuple[Tensor, Tensor]
    #: The parts of all layers, what is `given` beside them, and where it is wanted what is around them.
    Gathered = tuple[Sequence[LayerParts], Any] | tuple[Sequence[LayerParts], Any, Sequence[Around]]


class Held(NamedTuple):
    """The weights of a layer as the CPU library reads them."""

    qkv: Tensor
    qkv_bias: Tensor | None
    context: Tensor
    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None


class HeldOnGpu(NamedTuple):
    """Those of query, key and value for the CUDA library, which takes all weights as they are."""

    qkv: list[Tensor]
    qkv_biases: list[Tensor]
    layout: str
    training: bool  # gradients are wanted


class Crossed(NamedTuple):
    """What tokens attend to in a second attention of each layer, keys and values that are there, but for what
    the mask (B, keys) hides.

    For each layer six `parts`, weights packed: the norm's weight and bias, the query's, and the output's.
    """

    parts: Sequence[Tensor | None]
    epsilons: list[float]
    states: list[Tensor]  # keys and values of each layer, (B, kv_heads, keys, head_dim)
    mask: Tensor | None
    scales: list[float]


class Cached(NamedTuple):
    """What a token attends to: its layer's in a cache, which may be None, and itself, but for what the mask
    (B, keys) hides.
    """

    cache: Any
    layer: int
    kv_heads: int
    mask: Tensor | None
    scale: float
    window: int | None = None  # it sees the last ones, no more than that
    turned: bool = True  # by the angles of a rotary embedding, if there are any


class How(NamedTuple):
    """What all layers of a call have that GPT-2's have not."""

    norm_kind: str = "layer_norm"
    norm_offset: float = 0.0  # added to the norms' weights
    #: Norms are before ("pre") or behind ("post") the halves, or these are side by side ("parallel"), behind
    #: one norm or two.
    order: str = "pre"
    interleaved: bool = False  # of a rotary embedding: pairs side by side
    #: One projection has of each key in turn the queries that share it, the key and the value.
    head_by_head: bool = False
    softcap: float = 0.0
    factor: float = 1.0  # of what attention and feed-forward add


class Outer(NamedTuple):
    """Norms of what attention and feed-forward add, two for each layer."""

    weights: Sequence[Tensor | None]
    epsilons: list[float]


def held(x: Tensor, w: LayerParts, layout: str) -> Held | HeldOnGpu | None:
    """The weights of the layer, if it can run so on x; else None."""
    ffn = w.ffn
    trains = torch.is_grad_enabled()
    if ffn is None or not _unobserved(x) or not _readable(w) or (not _on_gpu(x) if trains else _drops(w)):
        return None
    qkv: tuple[Any, ...] = w.qkv
    weights, biases = [part.weight for part in qkv], _biases(w)
    single: tuple[Any, ...] = (w.attention_out, ffn.w_in, ffn.w_out)
    if _on_gpu(x):
        return _held_on_gpu(x, w, weights, biases, single, layout)
    if lacking("cpu_layer_end", x.dtype) is not None:
        return None
    groups = _groups(w)
    if empty(*(weight for group in groups for weight in group)):
        return None
    first, context, w_in, w_out, *gate = packed_together(groups, layout)
    return Held(first, joined(biases), context, w_in, w_out, gate[0] if gate else None)


def _unobserved(x: Tensor) -> bool:
    """Gradients aside."""
    return nobody_listens(x.device.type) and plain(x) and backends.forced() in (None, "native")


def _drops(w: LayerParts) -> bool:
    """Whether there is dropout, that of the hidden layer aside."""
    return bool(w.attention_p or w.context_p or w.ffn_p)


def _readable(w: LayerParts, keys_may_lack: bool = False) -> bool:
    """Whether the parts are all tensors, with nothing to drop in the hidden layer, and all of query, key and
    value have a bias or none of them, or, if it may be so, all but the key (Whisper).
    """
    if w.ffn is None or w.ffn.hidden_p:
        return False
    if any(isinstance(part, nn.Module) for part in (*w.qkv, w.attention_out, w.attention_norm, w.ffn_norm)):
        return False
    lacks = [bias is None for bias in _biases_of(w)]
    return len(set(lacks)) == 1 or (keys_may_lack and lacks == [False, True, False])


def _biases_of(w: LayerParts) -> list[Tensor | None]:
    """Of query, key and value."""
    qkv: tuple[Any, ...] = w.qkv
    return [part.bias for part in qkv]


def _biases(w: LayerParts) -> list[Tensor]:
    """Those that there are."""
    return [bias for bias in _biases_of(w) if bias is not None]


def _groups(w: LayerParts) -> list[list[Tensor]]:
    """The weights that are packed together."""
    ffn, qkv, attention_out = w.ffn, w.qkv, w.attention_out
    assert ffn is not None
    projections: tuple[Any, ...] = (attention_out, ffn.w_in, ffn.w_out)
    if ffn.w_gate is not None:
        projections += (ffn.w_gate,)
    return [[part.weight for part in qkv], *([part.weight] for part in projections)]  # type: ignore[union-attr]


def _held_on_gpu(
    x: Tensor, w: LayerParts, qkv: list[Tensor], biases: list[Tensor], single: tuple[Any, ...], layout: str
) -> HeldOnGpu | None:
    ffn = w.ffn
    assert ffn is not None
    if (
        cuda_library.lacking(x)
        or cuda_library.unmeasured(x)
        or ffn.w_gate is not None
        or len(qkv) > cuda_linear.WEIGHTS
        or w.head_dim % 8
        or not x.shape[-1]
        or not x.numel()
    ):
        return None
    training = torch.is_grad_enabled()
    norms = (w.attention_norm, w.ffn_norm)
    tensors = [*qkv, *biases, *(t for part in (*single, *norms) for t in part if t is not None)]  # type: ignore[union-attr]
    for t in tensors:
        if t.data_ptr() % 16 or t.shape[0] % 8 or t.shape[-1] % 8 or not t.is_contiguous():
            return None
    if training and not training_layer.takes_layer(x, tensors):
        return None
    return HeldOnGpu(qkv, biases, layout, training)


def begin(
    x: Tensor, norm: Part | None, eps: float, held: Held | HeldOnGpu, head_dim: int
) -> tuple[Tensor, ...]:
    """Query, key and value of norm(x), each (..., heads, head_dim), side by side in one tensor."""
    weight, bias = (None, None) if norm is None else _affine(norm)
    if isinstance(held, Held):
        qkv = torch.ops.bigmodel.cpu_layer_begin.default(
            *(x.contiguous(), contiguous(weight), contiguous(bias)),
            *(eps, "layer_norm", held.qkv, held.qkv_bias),
        )
    elif held.training:
        return training_layer.begin(x, weight, bias, eps, held, head_dim)
    else:
        qkv = torch.ops.bigmodel.cuda_layer_begin.default(
            cuda_linear.rows_of(x), weight, bias, eps, held.qkv, held.qkv_biases, held.layout
        )
        qkv = qkv.view(*x.shape[:-1], qkv.shape[1])
    return training_layer.split_heads(qkv, head_dim)


def takes(terms: Terms, held: Held | HeldOnGpu, attention_p: float) -> bool:
    """Whether `end` has this attention, with this dropout."""
    if terms.packing is not None:
        return False
    if isinstance(held, Held):
        return True
    # The rest of the library's attention is behind Triton's.
    plain = terms.padding is None and terms.bias is None and not terms.softcap
    if not plain or not all(map(cuda_library.readable, (terms.query, terms.key, terms.value))):
        return False
    return not held.training or training_layer.takes_attention(terms, attention_p)


def end(x: Tensor, terms: Terms, w: LayerParts, held: Held | HeldOnGpu, position: str) -> Tensor:
    """The layer's result; `position` is where the norms of the two halves are, "pre" or "post"."""
    ffn = w.ffn
    assert ffn is not None
    first_norm = _affine(w.attention_norm) if position == "post" else (None, None)
    if isinstance(held, HeldOnGpu):
        attention_out, ffn_norm = _affine(w.attention_out), _affine(w.ffn_norm)
        width = x.shape[-1]
        features = (t.numel() // width for t in (attention_out[0], ffn.w_out.weight))
        by_torch = _by_torch(x.device, x.dtype, width, x.numel() // width, held.layout, *features)
        if held.training:
            return training_layer.end(x, terms, w, held, position, by_torch)
        out = torch.ops.bigmodel.cuda_layer_end.default(
            *(
                cuda_linear.rows_of(x),
                terms.query,
                terms.key,
                terms.value,
                terms.lengths,
                terms.longest,
                terms.sinks,
            ),
            *(terms.scale, terms.is_causal, terms.window_left, terms.window_right),
            *(*attention_out, *first_norm, w.attention_eps),
            *(ffn.w_in.weight, ffn.w_in.bias, ffn.w_out.weight, ffn.w_out.bias, held.layout),
            *(ffn.activation, position, *ffn_norm, w.ffn_eps, by_torch),
        )
        return out.view(x.shape)  # type: ignore[no-any-return]
    return torch.ops.bigmodel.cpu_layer_end.default(  # type: ignore[no-any-return]
        *(x.contiguous(), terms.query, terms.key, terms.value),
        *(contiguous(terms.padding), terms.bias, contiguous(terms.lengths), terms.longest, terms.sinks),
        *(terms.scale, terms.is_causal, terms.window_left, terms.window_right, terms.softcap),
        *(
            held.context,
            contiguous(_affine(w.attention_out)[1]),
            *map(contiguous, first_norm),
            w.attention_eps,
        ),
        *(held.w_in, contiguous(ffn.w_in.bias), held.w_out, contiguous(ffn.w_out.bias)),
        *(held.w_gate, None if ffn.w_gate is None else contiguous(ffn.w_gate.bias)),
        *(ffn.activation, position, *map(contiguous, _affine(w.ffn_norm)), w.ffn_eps, "layer_norm"),
    )


class Layers:
    """Layers one behind the other, as the CPU library reads them.

    `given` is what the caller wants to find again beside them; of what is `around` them a list is of weights
    to be packed as one.
    """

    def __init__(
        self, parts: Sequence[LayerParts], layout: str, given: Any, around: Sequence[Around] = ()
    ) -> None:
        self.given, self.layout, self.behind = given, layout, len(around)
        self.head_dims = [w.head_dim for w in parts]
        readable = [w for w in parts if _readable(w, keys_may_lack=True)]
        self.features = {_features(w) for w in readable if layout == "linear"}
        self.activation = "" if parts[0].ffn is None else parts[0].ffn.activation
        self.takes = len(readable) == len(parts) and all(
            not _drops(w) and _activation(w) == self.activation for w in parts
        )
        self.epsilons = [eps for w in parts for eps in (w.attention_eps, w.ffn_eps, w.head_eps)]
        self.groups: list[list[Tensor]] = []
        self.parts: list[Any] = []  # a packed weight's is its group
        self._tensors: list[Tensor | None] | None = None
        if self.takes:
            for w in parts:
                self._add(w)
            for item in around:
                self.parts.append(len(self.groups) if isinstance(item, list) else item)
                self.groups += [item] if isinstance(item, list) else []

    def __len__(self) -> int:
        return len(self.head_dims)

    def _add(self, w: LayerParts) -> None:
        ffn: Any = w.ffn
        first = len(self.groups)
        self.groups += _groups(w)
        qkv, context, w_in, w_out, *gate = range(first, len(self.groups))
        self.parts += (*_affine_or_none(w.attention_norm), qkv, *[*_biases_of(w), None, None][:3])
        self.parts += (context, _affine(w.attention_out)[1])
        self.parts += _affine_or_none(w.ffn_norm)
        self.parts += (w_in, ffn.w_in.bias, w_out, ffn.w_out.bias)
        self.parts += (*gate, ffn.w_gate.bias) if gate else (None, None)
        self.parts += w.head_norms

    def tensors(self) -> list[Tensor | None] | None:
        """Those of all layers, weights packed; None if a weight is empty."""
        found = self._all()
        return None if found is None else found[: len(found) - self.behind]

    def around(self) -> list[Tensor | None] | None:
        """Those around the layers, likewise."""
        found = self._all()
        return None if found is None else found[len(found) - self.behind :]

    def _all(self) -> list[Tensor | None] | None:
        if self._tensors is None and not empty(*chain.from_iterable(self.groups)):
            packed = packed_together(self.groups, self.layout)
            self._tensors = [packed[p] if type(p) is int else contiguous(p) for p in self.parts]
        return self._tensors


class _Known:
    """`Layers` of modules, without their tensors: these are found in the modules."""

    def __init__(self, modules: Sequence[nn.Module], layers: Layers, x: Tensor) -> None:
        self.modules, self.dtype, self.device = list(modules), x.dtype, x.device
        self._snapshot = Snapshot(modules)
        held = self._snapshot.parameters(x.dtype, x.device) or ()
        places = {id(tensor): _Place(i) for i, tensor in enumerate(held) if tensor is not None}
        for i, tensor in enumerate(held):
            pieces = () if tensor is None else known_pieces(tensor)
            places |= {id(piece): _Place(i, j, len(pieces)) for j, piece in enumerate(pieces)}
        # Not where other tensors than parameters are read, or some have another dtype.
        self.complete = all(
            id(t) in places
            for t in (*chain.from_iterable(layers.groups), *layers.parts)
            if isinstance(t, Tensor)
        )
        if not self.complete:
            return
        self._layers = copy.copy(layers)
        self._layers.groups, self._layers.parts, self._layers._tensors = [], [], None
        self._groups = [[places[id(weight)] for weight in group] for group in layers.groups]
        self._parts = [places[id(p)] if isinstance(p, Tensor) else p for p in layers.parts]

    def layers(self, modules: Sequence[nn.Module], x: Tensor) -> Layers | None:
        """With the tensors that the modules hold now, if these are the same modules and hold the same."""
        if not self.complete or x.dtype is not self.dtype or x.device != self.device:
            return None
        same = len(modules) == len(self.modules) and all(map(is_, modules, self.modules))
        held = self._snapshot.parameters(x.dtype, x.device) if same else None
        if held is None:
            return None
        found = copy.copy(self._layers)
        found.groups = [[place.of(held) for place in group] for group in self._groups]
        found.parts = [p.of(held) if type(p) is _Place else p for p in self._parts]
        return found


class _Place(NamedTuple):
    """Of a parameter among all, or of one of its pieces."""

    at: int
    piece: int = 0
    pieces: int = 0

    def of(self, held: Sequence[Tensor | None]) -> Any:
        whole: Any = held[self.at]
        return pieces_of(whole, self.pieces)[self.piece] if self.pieces else whole


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
#: The same of what is gathered with something around the layers.
_known_around: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def layers_of(
    owner: nn.Module,
    modules: Sequence[nn.Module],
    x: Tensor,
    layout: str,
    gather: Callable[[], Gathered | None],
    around: bool = False,
) -> Layers | None:
    """The layers for a call on x: what `gather` says, as long as the modules hold what they held when it said
    it. None if it says that they cannot run so.

    `owner` holds the modules, and is not within them.
    """

    def gathered() -> Layers | None:
        found = gather()
        return None if found is None else Layers(found[0], layout, *found[1:])

    if checks.dtype_of(x) is None:  # parameters of any dtype will do
        return gathered()
    remembered = _known_around if around else _known
    known = remembered.get(owner)
    layers = None if known is None else known.layers(modules, x)
    if layers is not None:
        return layers
    layers = gathered()
    if layers is None or not layers.takes:
        remembered.pop(owner, None)
    elif known is None or known.complete or known.dtype is not x.dtype:
        remembered[owner] = _Known(modules, layers, x)
    return layers


#: In one call: with more Python is a small part, and a call that nobody can interrupt a long one.
MOST_ROWS = 2048


def few(x: Tensor) -> bool:
    """Whether x (B, S, hidden), or packed rows, has no more than that."""
    return x.shape[:-1].numel() <= MOST_ROWS


_NOTHING = Crossed([], [], [], None, [])


def tokens(
    x: Tensor,
    layers: Layers,
    cached: Sequence[Cached],
    how: How = How(),  # noqa: B008  (immutable)
    angles: Sequence[Angles] = (),
    biases: Sequence[Tensor] = (),
    crossed: Crossed | None = None,
    outer: Outer = Outer((), []),  # noqa: B008  (immutable)
) -> Tensor | None:
    """The result of layers one behind the other for the next tokens of sequences.

    x is (B, tokens, hidden); the cache, if there is one, then has their keys and values. `angles` are cosines
    and sines (1 or B, tokens, half of what is turned of a head) of a rotary embedding, and `biases` (1 or B,
    1 or heads, tokens, all keys) are added to the logits: none, one for all layers, or one for each. None,
    and nothing done, for other calls and caches.
    """
    if x.dim() != 3 or not x.shape[1] or not few(x) or not takes_all(x, layers, "cpu_layers"):
        return None
    if len({each.layer for each in cached}) < len(cached):
        return None  # a layer that is called twice has more tokens
    (batch, new), cache = x.shape[:2], cached[0].cache
    if any(each.cache is not cache for each in cached):
        return None
    kinds = [
        growing_cache.Kind((batch, each.kv_heads, new, head_dim), x.dtype, x.device)
        for each, head_dim in zip(cached, layers.head_dims, strict=True)
    ]
    wanted = zip((each.layer for each in cached), kinds, kinds, strict=True)
    rooms = [] if cache is None else growing_cache.rooms(cache, wanted, first=True)
    if rooms is None:
        return None
    seen, lengths = rooms[0].seen if rooms else 0, [room.length for room in rooms] or [0] * len(cached)
    if any(room.seen != seen for room in rooms) or (biases and set(lengths) != {seen}):
        return None
    masks = _masks(cached, batch, new, seen, lengths)
    if masks is None:
        return None
    crossed = _NOTHING if crossed is None else crossed
    hides = crossed.mask
    if hides is not None:
        if hides.shape != (batch, crossed.states[0].shape[2]):
            return None
        hides = hides.to(torch.bool).contiguous()
    parts = layers.tensors()
    if parts is None:
        return None
    cos, sin = _turns(angles, cached)
    out = torch.ops.bigmodel.cpu_layers.default(
        *(x.contiguous(), parts, layers.epsilons),
        *([buffer for room in rooms for buffer in (room.keys, room.values)] or _passing(kinds), lengths),
        *([each.window or 0 for each in cached], masks, list(biases)),
        *(cos, sin, how.interleaved, how.head_by_head),
        *(crossed.parts, crossed.epsilons, crossed.states, hides),
        *([*(each.scale for each in cached), *crossed.scales], how.softcap),
        *(list(outer.weights), outer.epsilons, how.factor),
        *(how.norm_kind, how.norm_offset, how.order, layers.activation),
    )
    for room in rooms:
        room.written(new)
    return out  # type: ignore[no-any-return]


def _passing(kinds: Sequence[growing_cache.Kind]) -> list[Tensor]:
    """Keys and values of layers that keep none: each writes over those of the one before."""
    made = {kind: (kind.empty(kind.shape[2]), kind.empty(kind.shape[2])) for kind in set(kinds)}
    return [buffer for kind in kinds for buffer in made[kind]]


def _masks(
    cached: Sequence[Cached], batch: int, new: int, seen: int, lengths: Sequence[int]
) -> list[Tensor | None] | None:
    """Of all layers or of each, as the library reads them; None if one says something else."""
    if new > 1 and seen and any(each.mask is None for each in cached):
        return None  # each would see the first `new` keys alone
    known: dict[int, Tensor] = {}
    for each, length in zip(cached, lengths, strict=True):
        mask = each.mask
        if mask is not None and id(mask) not in known:
            if mask.shape not in ((batch, seen + new), (batch, length + new)):
                return None
            known[id(mask)] = mask.to(torch.bool).contiguous()
    if not known:
        return []
    masks = [None if each.mask is None else known[id(each.mask)] for each in cached]
    return masks[:1] if all(mask is masks[0] for mask in masks) else masks  # type: ignore[return-value]


def _turns(
    angles: Sequence[Angles], cached: Sequence[Cached]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Cosines and sines, of all layers or of each."""
    pairs = [(contiguous(cos), contiguous(sin)) for cos, sin in angles]
    if len(pairs) == 1 and not all(each.turned for each in cached):
        pairs = pairs * len(cached)
    if len(pairs) > 1:
        pairs = [pair if each.turned else (None, None) for pair, each in zip(pairs, cached, strict=True)]
    return [cos for cos, _ in pairs], [sin for _, sin in pairs]


def encoded(
    x: Tensor,
    layers: Layers,
    scale: float,
    padding: Tensor | None,
    lengths: Tensor | None,
    longest: int,
    how: How = How(order="post"),  # noqa: B008  (immutable)
    biases: Sequence[Tensor] = (),
    windows: Sequence[int | None] = (),
    angles: Sequence[Angles] = (),
    causal: bool = False,
) -> Tensor | None:
    """The result of layers one behind the other on rows of an encoder.

    x is (B, S, hidden), with the mask `padding` (B, S) or none, or packed rows (tokens, hidden) of `lengths`
    (`blocks.Terms`). `biases` and `angles` are as for `tokens`: of packed rows those (1 or B, 1 or heads,
    `longest`, `longest`), and these (1, tokens, angles). With `windows`, one for each layer, a row sees so
    many to each side, its own among them. In one call for few rows; for more, one for each layer. None for
    what it does not take.
    """
    if not takes_all(x, layers, "cpu_encoder"):
        return None
    if len(set(layers.head_dims)) > 1 or len(layers.features) > 1 or x.dim() != (3 if lengths is None else 2):
        return None
    parts = layers.tensors()
    if parts is None:
        return None
    x, count = x.contiguous(), len(layers)
    lengths, padding = contiguous(lengths), contiguous(padding)
    cos, sin = [contiguous(cos) for cos, _ in angles], [contiguous(sin) for _, sin in angles]
    each: list[Sequence[Any]] = [
        *(parts, layers.epsilons, [window or 0 for window in windows], list(biases), cos, sin)
    ]
    step = count if few(x) else 1
    for first in range(0, count, step):
        these = [_of_layers(of_all, first, step, count) for of_all in each]
        x = torch.ops.bigmodel.cpu_encoder.default(
            *(x, *these[:2], layers.head_dims[0], lengths, longest, padding, causal, *these[2:]),
            *(how.interleaved, scale, how.norm_kind, how.order, layers.activation),
        )
    return x


def _of_layers(of_all: Sequence[Any], first: int, some: int, count: int) -> Sequence[Any]:
    """Of what `count` layers have, as many for each: that of some. What they share is one, or none."""
    size = len(of_all) // count
    return of_all[first * size : (first + some) * size] if size else of_all


def takes_all(x: Tensor, layers: Layers, op: str) -> bool:
    """Whether one call of this operator may run all layers on x, as far as its shape does not say."""
    return (
        layers.takes
        and not _on_gpu(x)
        and lacking(op, x.dtype) is None
        and not torch.is_grad_enabled()
        and _unobserved(x)
    )


def _features(w: LayerParts) -> int:
    """Of query, key and value, where `_readable` has seen their weights, in the layout "linear"."""
    return sum(weight.shape[0] for weight in _groups(w)[0])


def _activation(w: LayerParts) -> str:
    assert w.ffn is not None
    return w.ffn.activation


@functools.lru_cache(maxsize=1024)
def _by_torch(
    device: torch.device, dtype: torch.dtype, out: int, rows: int, layout: str, *features: int
) -> tuple[bool, ...]:
    """Whether torch's product of so many features is the faster before a norm that adds the residual."""
    cases = (
        Case(str(dtype)[6:], count, out, layout, "none + residual + layer_norm", rows) for count in features
    )
    return tuple(cuda_linear.remembered(device, case) == TORCH for case in cases)


def _on_gpu(x: Tensor) -> bool:
    return not x.is_cpu


def _affine_or_none(part: Part | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if part is None else _affine(part)


def _affine(part: Part | None) -> tuple[Tensor, Tensor | None]:
    assert part is not None and not isinstance(part, nn.Module)  # as `held` has seen
    return part
