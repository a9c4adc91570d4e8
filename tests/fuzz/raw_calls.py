"""Valid calls of every raw CPU operator, and ways to spoil them.

A maker draws the arguments of a call that its operator must accept; `spoil` then changes some of them into
what a careless or hostile caller could pass instead. Small sizes around the kernels' vector and tile widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

native = torch.ops.bigmodel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 130)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
LAYOUTS = ("linear", "conv1d")


@dataclass
class Packed:
    """A weight that is packed for the call: what it looks like then depends on the instruction set."""

    weights: list[Tensor]
    layout: str = "linear"


class Inputs:
    """Draws sizes and choices from hypothesis, and the numbers in tensors from a generator of their own."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.dtype = self.among(DTYPES)
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def among(self, values: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(values))

    def chance(self) -> bool:
        return bool(self.draw(st.booleans()))

    def size(self, most: int = 130) -> int:
        return int(self.among([size for size in SIZES if size <= most]))

    def rows(self) -> tuple[int, ...]:
        return tuple(self.among(((), (1,), (0,), (5,), (2, 9), (33,), (2, 0), (1, 3, 6))))

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def maybe(self, *shape: int) -> Tensor | None:
        return self.tensor(*shape) if self.chance() else None

    def weight(self, k: int, n: int, layout: str = "linear") -> Tensor:
        return self.tensor(*((n, k) if layout == "linear" else (k, n)), scale=k**-0.5)

    def ids(self, rows: int, *shape: int) -> Tensor:
        return torch.randint(rows, shape, generator=self.generator)

    def dropout(self) -> dict[str, Any]:
        p = self.among((0.0, 0.0, 0.1, 0.5, 1.0))
        return {
            "dropout_seed": torch.tensor(self.draw(st.integers(-(2**63), 2**63 - 1))) if p else None,
            "dropout_p": p,
        }

    def norm(
        self, n: int, prefix: str = "norm_", kind: str | None = None, there: bool | None = None
    ) -> dict[str, Any]:
        """weight, bias and, where `kind` is None, eps and kind too."""
        chosen = kind or self.among(("layer_norm", "rms_norm"))
        there = self.chance() if there is None else there
        bias = self.maybe(n) if there and chosen == "layer_norm" else None
        result = {f"{prefix}weight": self.tensor(n) if there else None, f"{prefix}bias": bias}
        return (
            result if kind else {**result, f"{prefix}eps": self.among((1e-5, 0.1)), f"{prefix}kind": chosen}
        )

    def needs(self, count: int) -> list[bool]:
        return [self.chance() for _ in range(count)]


# ---- products ----


def pack_weight(i: Inputs) -> dict[str, Any]:
    k, layout = i.size(), i.among(LAYOUTS)
    return {
        "weights": [i.weight(k, i.size(), layout) for _ in range(i.among((1, 1, 3)))],
        "weight_layout": layout,
    }


def fingerprint(i: Inputs) -> dict[str, Any]:
    weights = pack_weight(i)["weights"]
    return {"weights": [weight.t() if i.chance() else weight for weight in weights]}


def linear(i: Inputs) -> dict[str, Any]:
    k, n, rows, layout = i.size(), i.size(), i.rows(), i.among(LAYOUTS)
    return {
        "x": i.tensor(*rows, k),
        "packed": Packed([i.weight(k, n, layout)], layout),
        "bias": i.maybe(n),
        "activation": i.among(ACTIVATIONS),
        "residual": i.maybe(*rows, n),
        **i.norm(n),
        **i.dropout(),
    }


def linear_parts(i: Inputs) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """What the training form and its backward share; the shape of x's rows and all columns."""
    k, rows, layout = i.size(), i.rows(), i.among(LAYOUTS)
    columns = [i.size(48) for _ in range(i.among((1, 1, 3)))]
    n, biased = sum(columns), i.chance()
    shared = {
        "x": i.tensor(*rows, k),
        "weights": [i.weight(k, part, layout) for part in columns],
        "biases": [i.tensor(part) for part in columns] if biased else [],
        "residual": i.maybe(*rows, n),
        **i.norm(n),
        **i.dropout(),
        "weight_layout": layout,
        "activation": i.among(ACTIVATIONS),
    }
    return shared, rows, n


def linear_training(i: Inputs) -> dict[str, Any]:
    shared, _, _ = linear_parts(i)
    if i.chance():
        shared["weights"] = [Packed(shared["weights"], shared["weight_layout"])]
    return shared


def linear_backward(i: Inputs) -> dict[str, Any]:
    shared, rows, n = linear_parts(i)
    return {
        **shared,
        "grad": i.tensor(*rows, n),
        "preactivation": i.maybe(*rows, n),
        "prenorm": i.maybe(*rows, n),
        "needs": i.needs(4 + len(shared["weights"]) + len(shared["biases"])),
    }


def feed_forward_parts(i: Inputs) -> tuple[dict[str, Any], tuple[int, ...], tuple[int, int, int]]:
    k, inner, rows, position = i.size(), i.size(), i.rows(), i.among(("none", "pre", "post"))
    n = i.size()
    gated = i.chance()
    shared = {
        "x": i.tensor(*rows, k),
        "b_in": i.maybe(inner),
        "b_out": i.maybe(n),
        "residual": i.maybe(*rows, n),
        **i.norm(k if position == "pre" else n, there=position != "none"),
        "b_gate": i.maybe(inner) if gated else None,
        **i.dropout(),
        "activation": i.among(ACTIVATIONS),
        "norm_position": position,
    }
    return shared, rows, (k, inner, n)


def feed_forward_weights(i: Inputs, sizes: tuple[int, int, int], layout: str, gated: bool) -> dict[str, Any]:
    k, inner, n = sizes
    gate = i.weight(k, inner, layout) if gated else None
    return {"in": i.weight(k, inner, layout), "out": i.weight(inner, n, layout), "gate": gate}


def feed_forward(i: Inputs) -> dict[str, Any]:
    shared, _, sizes = feed_forward_parts(i)
    layout, gated = i.among(LAYOUTS), shared["b_gate"] is not None or i.chance()
    weights = feed_forward_weights(i, sizes, layout, gated)
    return {
        **shared,
        **{f"packed_{k}": None if w is None else Packed([w], layout) for k, w in weights.items()},
    }


def feed_forward_training(i: Inputs) -> dict[str, Any]:
    shared, _, sizes = feed_forward_parts(i)
    layout, gated = i.among(LAYOUTS), shared["b_gate"] is not None or i.chance()
    weights = feed_forward_weights(i, sizes, layout, gated)
    packed = i.chance()
    given = {f"w_{k}": Packed([w], layout) if packed and w is not None else w for k, w in weights.items()}
    return {**shared, **given, "weight_layout": layout, "recompute": i.chance()}


def feed_forward_backward(i: Inputs) -> dict[str, Any]:
    shared, rows, sizes = feed_forward_parts(i)
    layout, gated = i.among(LAYOUTS), shared["b_gate"] is not None or i.chance()
    weights = feed_forward_weights(i, sizes, layout, gated)
    return {
        **shared,
        **{f"w_{k}": w for k, w in weights.items()},
        "grad": i.tensor(*rows, sizes[2]),
        "preactivation": i.maybe(*rows, sizes[1]),
        "gate_preactivation": i.maybe(*rows, sizes[1]) if gated else None,
        "prenorm": i.maybe(*rows, sizes[2]) if shared["norm_position"] == "post" else None,
        "weight_layout": layout,
        "needs": i.needs(10),
    }


# ---- rows ----


def layer_norm(i: Inputs) -> dict[str, Any]:
    n, rows = i.size(), i.rows()
    both = {"x": i.tensor(*rows, n), "residual": i.maybe(*rows, n), "eps": 1e-5}
    return {**both, "weight": i.maybe(n), "bias": i.maybe(n), **i.dropout()}


def rms_norm(i: Inputs) -> dict[str, Any]:
    n, rows = i.size(), i.rows()
    both = {"x": i.tensor(*rows, n), "residual": i.maybe(*rows, n), "eps": 1e-5}
    return {**both, "weight": i.maybe(n), "weight_offset": i.among((0.0, 1.0)), **i.dropout()}


def norm_backward(i: Inputs) -> dict[str, Any]:
    n, rows = i.size(), i.rows()
    kind = i.among(("layer_norm", "rms_norm"))
    return {
        "grad": i.tensor(*rows, n),
        "x": i.tensor(*rows, n),
        "residual": i.maybe(*rows, n),
        **i.norm(n, "", kind),
        **i.dropout(),
        "kind": kind,
        "eps": 1e-5,
        "weight_offset": i.among((0.0, 1.0)),
        "needs": i.needs(4),
    }


def embedding(i: Inputs) -> dict[str, Any]:
    shape, n = i.rows(), i.size()
    call: dict[str, Any] = {"input_ids": i.ids(11, *shape), "word_weight": i.tensor(11, n)}
    for name, rows in (("position", 40), ("token_type", 2)):
        there = i.chance()
        call[f"{name}_ids"] = i.ids(rows, *shape) if there else None
        call[f"{name}_weight"] = i.tensor(rows, n) if there else None
    return {**call, **i.norm(n, kind="layer_norm"), "norm_eps": 1e-5, **i.dropout()}


def embedding_backward(i: Inputs) -> dict[str, Any]:
    call = embedding(i)
    grad = i.tensor(*call["input_ids"].shape, call["word_weight"].shape[1])
    return {**call, "grad": grad, "padding_idx": i.among((-1, 0, 3)), "needs": i.needs(5)}


def rotary(i: Inputs) -> dict[str, Any]:
    batch, rows, dim = i.among((1, 2, 0)), i.size(33), i.size(97)
    angles = i.draw(st.integers(0, dim // 2))
    heads = [i.tensor(batch, rows, i.among((1, 3)), dim).transpose(1, 2) for _ in range(2)]
    cosine, sine = (i.tensor(i.among((1, batch)) if k else batch, rows, angles) for k in range(2))
    sine = i.tensor(*cosine.shape)
    return {"query": heads[0], "key": heads[1], "cos": cosine, "sin": sine, "interleaved": i.chance()}


# ---- attention ----


def attention(i: Inputs) -> dict[str, Any]:
    dim, kv_heads, group = i.size(97), i.among((1, 2)), i.among((1, 3))
    heads, packed = kv_heads * group, i.chance()
    p: dict[str, Any] = {"key_padding_mask": None, "bias": None, "cu_seqlens_q": None, "cu_seqlens_k": None}
    if packed:
        lengths = [[i.among((0, 1, 5, 17, 40)) for _ in range(i.among((1, 3)))]]
        lengths.append([length if i.chance() else i.among((0, 3, 33)) for length in lengths[0]])
        for side, own in zip("qk", lengths, strict=True):
            total = [sum(own[:n]) for n in range(len(own) + 1)]
            p[f"cu_seqlens_{side}"] = torch.tensor(total, dtype=torch.int32)
        batch, queries, keys = len(lengths[0]), max(lengths[0]), max(lengths[1])
        tensors = [
            i.tensor(sum(own), h, dim)
            for own, h in ((lengths[0], heads), (lengths[1], kv_heads), (lengths[1], kv_heads))
        ]
    else:
        batch, queries, keys = i.among((1, 2, 0)), i.size(65), i.among((0, *SIZES))
        shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
        tensors = [i.tensor(batch, rows, h, dim).transpose(1, 2) for rows, h in shapes]
        if i.chance():
            p["key_padding_mask"] = torch.rand(batch, keys, generator=i.generator) < 0.7
        if i.chance():
            p["bias"] = i.tensor(
                *i.among(
                    ((batch, heads, queries, keys), (1, heads, queries, keys), (queries, 1), (keys,), ())
                )
            )
    if i.chance():
        slopes = torch.rand(*i.among(((heads,), (batch, heads))), generator=i.generator)
        p["alibi_slopes"] = slopes
    else:
        p["alibi_slopes"] = None
    return {
        **dict(zip(("query", "key", "value"), tensors, strict=True)),
        **p,
        "sinks": i.maybe(heads),
        "max_seqlen_q": queries if packed else 0,
        "max_seqlen_k": keys if packed else 0,
        "softmax_scale": i.among((0.125, 1.0, -0.3)),
        "is_causal": i.chance(),
        "window_left": i.among((-1, -1, 0, 9, 200)),
        "window_right": i.among((-1, -1, 0, 9, 200)),
        "softcap": i.among((0.0, 0.0, 5.0)),
        **i.dropout(),
    }


def attention_backward(i: Inputs) -> dict[str, Any]:
    call = attention(i)
    out, logsumexp = native.cpu_attention(**call)
    grads = {
        "grad_out": i.tensor(*out.shape),
        "grad_logsumexp": torch.zeros_like(logsumexp) if i.chance() else None,
    }
    needs = {"bias_requires_grad": i.chance(), "sinks_require_grad": i.chance()}
    query, key, rows = call["query"], call["key"], 2 if out.dim() == 4 else 0
    side_by_side = query.shape[rows] == key.shape[rows] and i.chance()
    return {**grads, **call, "out": out, "logsumexp": logsumexp, **needs, "side_by_side": side_by_side}


def attention_maps(i: Inputs) -> dict[str, Any]:
    call = attention(i)
    for name in ("value", "dropout_seed", "dropout_p"):
        del call[name]
    query, packed = call["query"], call["cu_seqlens_q"] is not None
    mask = None
    if not packed and i.chance():
        mask = torch.rand(query.shape[0], query.shape[2], generator=i.generator) < 0.7
    return {**call, "query_padding_mask": mask}


def attention_statistics(i: Inputs) -> dict[str, Any]:
    return {**attention_maps(i), "top_k": i.among((0, 1, 5, 64))}


def attention_probabilities(i: Inputs) -> dict[str, Any]:
    call = attention_maps(i)
    total = call["query"].shape[0 if call["cu_seqlens_q"] is not None else 2]
    queries = None
    if total and i.chance():
        queries = torch.randint(total, i.among(((0,), (1,), (7,))), generator=i.generator)
    return {**call, "queries": queries}


def philox(i: Inputs) -> dict[str, Any]:
    return {
        "seed": torch.tensor(i.draw(st.integers(-(2**63), 2**63 - 1))),
        "rows": i.among((0, *SIZES)),
        "columns": i.among((0, *SIZES)),
        "rule": i.among(("attention", "elements")),
        "first_row": i.among((0, 8, 16, 2**33)),
        "head": i.among((0, 5)),
        "sequence": i.among((0, 5)),
        "dropout_p": i.among((0.1, 0.5, 1.0)),
    }


# ---- a layer in two calls ----


def layer_begin(i: Inputs) -> dict[str, Any]:
    k, n, rows = i.size(), i.size(), i.rows()
    return {"x": i.tensor(*rows, k), **i.norm(k), "packed": Packed([i.weight(k, n)]), "bias": i.maybe(n)}


def layer_end(i: Inputs) -> dict[str, Any]:
    apart = ("dropout_seed", "dropout_p", "alibi_slopes")
    heads = {k: v for k, v in attention(i).items() if k not in apart}
    lengths, longest = heads.pop("cu_seqlens_q"), heads.pop("max_seqlen_q")
    heads.pop("cu_seqlens_k"), heads.pop("max_seqlen_k")
    if lengths is not None:  # as many keys as queries
        kv = heads["key"].shape[1]
        heads["key"], heads["value"] = (
            i.tensor(len(heads["query"]), kv, heads["query"].shape[-1]) for _ in range(2)
        )
    query = heads["query"]
    rows = (len(query),) if lengths is not None else (query.shape[0], query.shape[2])
    hidden, inner, position = i.size(), i.size(), i.among(("none", "pre", "post"))
    kind, gated = i.among(("layer_norm", "rms_norm")), i.chance()
    return {
        "x": i.tensor(*rows, hidden),
        **{"attention_bias" if k == "bias" else k: v for k, v in heads.items()},
        "lengths": lengths,
        "longest": longest,
        "packed_context": Packed([i.weight(query.shape[1] * query.shape[-1], hidden)]),
        "b_context": i.maybe(hidden),
        **i.norm(hidden, "attention_norm_", kind),
        "attention_norm_eps": 1e-5,
        "packed_in": Packed([i.weight(hidden, inner)]),
        "b_in": i.maybe(inner),
        "packed_out": Packed([i.weight(inner, hidden)]),
        "b_out": i.maybe(hidden),
        "packed_gate": Packed([i.weight(hidden, inner)]) if gated else None,
        "b_gate": i.maybe(inner) if gated else None,
        "activation": i.among(ACTIVATIONS),
        "norm_position": position,
        **i.norm(hidden, kind=kind, there=position != "none"),
        "norm_eps": 1e-5,
        "norm_kind": kind,
    }


def layer_parts(
    i: Inputs, hidden: int, inner: int, queries: int, features: int, there: bool | None, kind: str
) -> list[Any]:
    """Those of one layer; its second norm is there, its first one too where it is the attention's own."""
    parts: list[Any] = list(i.norm(hidden, kind=kind, there=there).values())
    each = (queries, (features - queries) // 2, (features - queries) // 2)
    biases = [i.tensor(n) for n in each] if i.chance() else [i.maybe(features), None, None]
    parts += (Packed([i.weight(hidden, features)]), *biases)
    parts += (Packed([i.weight(queries, hidden)]), i.maybe(hidden))
    parts += i.norm(hidden, kind=kind, there=True).values()
    gated = i.chance()
    for k, n in ((hidden, inner), (inner, hidden), *([(hidden, inner)] if gated else [])):
        parts += (Packed([i.weight(k, n)]), i.maybe(n))
    return parts if gated else [*parts, None, None]


def head_norms(i: Inputs, head_dim: int, heads: tuple[int, int]) -> list[Any]:
    """Of each head, or of all of queries and all of keys."""
    if i.chance():
        return [None, None]
    whole = i.chance()
    return [i.tensor(head_dim * count if whole else head_dim) for count in heads]


def crossed_parts(i: Inputs, hidden: int, queries: int, kind: str) -> list[Any]:
    """Those of the attention of one layer on what an encoder has made."""
    query, out = Packed([i.weight(hidden, queries)]), Packed([i.weight(queries, hidden)])
    return [*i.norm(hidden, kind=kind).values(), query, i.maybe(queries), out, i.maybe(hidden)]


def layers(i: Inputs) -> dict[str, Any]:
    """Tokens for each of a batch, through layers with room for them in their keys and values, in every order.
    A decoder may attend to an encoder, or to the last tokens alone.
    """
    batch, hidden, head_dim, kv_heads = i.among((1, 1, 3)), i.size(), i.size(64), i.among((1, 2, 3))
    count, length, rows = i.among((1, 2, 3)), i.among((0, 1, 33)), i.among((1, 1, 2, 7))
    room, slides, windowed = rows + i.among((0, 6)), i.chance(), i.chance()
    lengths = [i.among((length, length // 2)) if slides else length for _ in range(count)]
    heads = kv_heads * i.among((1, 1, 2))
    features = (heads + 2 * kv_heads) * head_dim
    mask = torch.rand(batch, length + rows, generator=i.generator) > 0.3
    kind, turned = i.among(("layer_norm", "rms_norm")), head_dim > 1 and i.chance()
    angles = torch.rand(i.among((1, batch)), rows, head_dim // 2, generator=i.generator)
    turns = i.among((1, count)) if turned else 0
    order, keys = i.among(("pre", "post", "parallel")), i.among((1, 5, 33))
    crosses, joined = order != "parallel" and i.chance(), (heads == kv_heads or kv_heads == 1) and i.chance()
    summed = order == "pre" and not crosses
    outer = [i.tensor(hidden) for _ in range(2 * count)] if summed and i.chance() else []
    crossing = count if crosses else 0
    state = (batch, i.among((kv_heads, 1)), keys, head_dim)
    hides = torch.rand(batch, keys, generator=i.generator) > 0.3
    bias = (i.among((1, batch)), i.among((1, heads)), rows, length + rows)
    return {
        "x": i.tensor(batch, rows, hidden),
        "parts": [
            part
            for _ in range(count)
            for part in (
                *layer_parts(i, hidden, i.size(), heads * head_dim, features, None, kind),
                *([None, None] if joined else head_norms(i, head_dim, (heads, kv_heads))),
            )
        ],
        "epsilons": [1e-5] * (3 * count),
        "buffers": [i.tensor(batch, kv_heads, length + room, head_dim) for _ in range(2 * count)],
        "lengths": lengths,
        "windows": [i.among((0, 1, 5, 40)) for _ in range(count)] if windowed else [],
        "key_padding_masks": [i.among((mask, None)) for _ in range(i.among((0, 1, count)))],
        "attention_biases": [i.tensor(*bias) for _ in range(0 if slides else i.among((0, 0, 1, count)))],
        "cos": [angles.cos()] * turns,
        "sin": [angles.sin()] * turns,
        "interleaved": i.chance(),
        "head_by_head": joined,
        "crossed": [
            part for _ in range(crossing) for part in crossed_parts(i, hidden, heads * head_dim, kind)
        ],
        "crossed_epsilons": [1e-5] * crossing,
        "states": [i.tensor(*state) for _ in range(2 * crossing)],
        "states_padding_mask": hides if crosses and i.chance() else None,
        "softmax_scales": [head_dim**-0.5] * (count + crossing),
        "softcap": i.among((0.0, 0.0, 3.0)),
        "outer": outer,
        "outer_epsilons": [1e-5] * len(outer),
        "factor": i.among((1.0, 0.5)) if summed else 1.0,
        "norm_kind": kind,
        "norm_offset": i.among((0.0, 1.0)),
        "order": order,
        "activation": i.among(ACTIVATIONS),
    }


def encoder(i: Inputs) -> dict[str, Any]:
    """Packed rows, or a batch with a mask or without."""
    hidden, head_dim, heads, count = i.size(), i.size(64), i.among((1, 2, 3)), i.among((1, 2, 3))
    batch, length, packed = i.among((1, 3)), i.among((1, 5, 33)), i.chance()
    lengths = torch.randint(0, length + 1, (batch,), generator=i.generator)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    mask = torch.rand(batch, length, generator=i.generator) > 0.3
    rows = (int(ends[-1]),) if packed else (batch, length)
    kind = i.among(("layer_norm", "rms_norm"))
    bias = (i.among((1, batch)), i.among((1, heads)), length, length)
    biases = 0 if packed else i.among((0, 0, 1, count))
    turns = i.among((1, count)) if head_dim > 1 and i.chance() else 0
    angles = torch.rand(
        *(1 if packed else i.among((1, batch)), rows[-1], head_dim // 2), generator=i.generator
    )
    cos = [angles.cos() if turns == 1 or i.chance() else None for _ in range(turns)]
    return {
        "x": i.tensor(*rows, hidden),
        "parts": [
            part
            for _ in range(count)
            for part in (
                *layer_parts(i, hidden, i.size(), heads * head_dim, 3 * heads * head_dim, None, kind),
                *(None, None),
            )
        ],
        "epsilons": [1e-5] * (3 * count),
        "head_dim": head_dim,
        "lengths": ends if packed else None,
        "longest": length,
        "key_padding_mask": mask if not packed and i.chance() else None,
        "is_causal": i.chance(),
        "windows": [i.among((0, 1, 4, 40)) for _ in range(count)] if i.chance() else [],
        "attention_biases": [i.tensor(*bias) for _ in range(biases)],
        "cos": cos,
        "sin": [None if c is None else angles.sin() for c in cos],
        "interleaved": i.chance(),
        "softmax_scale": head_dim**-0.5,
        "norm_kind": kind,
        "order": i.among(("pre", "post")),
        "activation": i.among(ACTIVATIONS),
    }


# ---- cross-entropy ----


def cross_entropy(i: Inputs) -> dict[str, Any]:
    rows, k, classes = i.among((1, 5, 33, 130)), i.size(), i.size()
    target = i.ids(classes, rows)
    if rows > 1 and i.chance():
        target[::2] = -100
    return {
        "x": i.tensor(rows, k),
        "weight": i.weight(k, classes),
        "target": target if int((target >= 0).sum()) else i.ids(classes, rows),
        "bias": i.maybe(classes),
        "ignore_index": -100,
        "label_smoothing": i.among((0.0, 0.1, 1.0)),
        "reduction": i.among(("mean", "sum", "none")),
    }


def cross_entropy_training(i: Inputs) -> dict[str, Any]:
    return {**cross_entropy(i), "needs": i.needs(3)}


def cross_entropy_backward(i: Inputs) -> dict[str, Any]:
    call = cross_entropy(i)
    del call["reduction"]
    grad = torch.randn(len(call["x"]), generator=i.generator)
    return {**call, "grad": grad, "needs": i.needs(3)}


def nothing(_: Inputs) -> dict[str, Any]:
    return {}


def set_isa(i: Inputs) -> dict[str, Any]:
    return {"name": i.among(native.cpu_isas().split(", "))}


MAKERS: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "cpu_attention": attention,
    "cpu_attention_backward": attention_backward,
    "cpu_attention_probabilities": attention_probabilities,
    "cpu_attention_statistics": attention_statistics,
    "cpu_embedding": embedding,
    "cpu_embedding_backward": embedding_backward,
    "cpu_feed_forward": feed_forward,
    "cpu_feed_forward_backward": feed_forward_backward,
    "cpu_feed_forward_training": feed_forward_training,
    "cpu_encoder": encoder,
    "cpu_fingerprint": fingerprint,
    "cpu_isa": nothing,
    "cpu_isas": nothing,
    "cpu_release_memory": nothing,
    "cpu_layer_begin": layer_begin,
    "cpu_layer_end": layer_end,
    "cpu_layer_norm": layer_norm,
    "cpu_layers": layers,
    "cpu_linear": linear,
    "cpu_linear_backward": linear_backward,
    "cpu_linear_cross_entropy": cross_entropy,
    "cpu_linear_cross_entropy_backward": cross_entropy_backward,
    "cpu_linear_cross_entropy_training": cross_entropy_training,
    "cpu_linear_training": linear_training,
    "cpu_norm_backward": norm_backward,
    "cpu_pack_weight": pack_weight,
    "cpu_philox": philox,
    "cpu_rms_norm": rms_norm,
    "cpu_rotary": rotary,
    "cpu_set_isa": set_isa,
}


def resolved(value: Any) -> Any:
    """The argument as the instruction set in use takes it."""
    if isinstance(value, Packed):
        return native.cpu_pack_weight(value.weights, value.layout)
    return [resolved(element) for element in value] if isinstance(value, list) else value


# ---- spoiling ----


def _misaligned(x: Tensor) -> Tensor:
    size = x.element_size()
    memory = torch.zeros(x.numel() * size + 1, dtype=torch.uint8)
    if x.numel() and size > 1:
        moved = torch.frombuffer(memory.numpy(), dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
        return moved.copy_(x)
    return x


def _damaged(x: Tensor, at: int, value: int) -> Tensor:
    """One byte of the contents changed: a packed weight's header is bytes too."""
    y = x.clone(memory_format=torch.contiguous_format)
    if y.numel():
        memory = y.reshape(-1).view(torch.uint8)
        memory[at % len(memory)] = value
    return y


TENSORS: dict[str, Callable[[Tensor, int], Any]] = {
    "none": lambda x, _: None,
    "a number": lambda x, n: n,
    "float64": lambda x, _: x.double(),
    "other float": lambda x, n: x.to(DTYPES[n % 3]),
    "int32": lambda x, _: x.to(torch.int32),
    "int64": lambda x, _: x.to(torch.int64),
    "uint8": lambda x, _: x.to(torch.uint8),
    "bool": lambda x, _: x.to(torch.bool),
    "complex": lambda x, _: x.to(torch.complex64),
    "float8": lambda x, _: x.float().to(torch.float8_e4m3fn),
    "one dimension more": lambda x, _: x.unsqueeze(0),
    "five dimensions more": lambda x, _: x[None, None, None, None, None],
    "flat": lambda x, _: x.reshape(-1),
    "scalar": lambda x, _: x.reshape(-1)[:1].sum(),
    "no rows": lambda x, _: x[:0] if x.dim() else x.reshape(1)[:0],
    "no columns": lambda x, _: x[..., :0] if x.dim() else x.reshape(1)[:0],
    "a row less": lambda x, _: x[:-1].contiguous() if x.dim() else x,
    "a column less": lambda x, _: x[..., :-1].contiguous() if x.dim() else x,
    "a row more": lambda x, _: torch.cat([x, x[:1]]) if x.dim() else x,
    "a column more": lambda x, _: torch.cat([x, x[..., :1]], -1) if x.dim() else x,
    "every other column": lambda x, _: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "transposed": lambda x, _: x.transpose(0, -1) if x.dim() else x,
    "dimensions moved": lambda x, _: x.transpose(0, -1).contiguous() if x.dim() else x,
    "broadcast rows": lambda x, _: x[:1].expand(x.shape) if x.dim() and len(x) else x,
    "broadcast columns": lambda x, _: x[..., :1].expand(x.shape) if x.dim() and x.shape[-1] else x,
    "broadcast to 2^62": lambda x, _: x.reshape(-1)[:1].expand(2**31, 2**31) if x.numel() else x,
    "no rows of 2^62": lambda x, _: x.new_empty(0, 2**62),
    "2^62 rows of nothing": lambda x, _: x.new_empty(2**62, 0),
    "nan": lambda x, _: torch.full_like(x, float("nan")) if x.is_floating_point() else x,
    "inf": lambda x, n: torch.full_like(x, (-1) ** n * float("inf")) if x.is_floating_point() else x,
    "huge values": lambda x, n: (x * n).to(x.dtype) if x.dtype != torch.bool else x,
    "negative values": lambda x, _: -x if x.dtype not in (torch.bool, torch.uint8) else x,
    "zeros": lambda x, _: torch.zeros_like(x),
    "misaligned": lambda x, _: _misaligned(x),
    "damaged header": lambda x, n: _damaged(x, n % 64, n // 64 % 256),
    "damaged": lambda x, n: _damaged(x, n, n // 7 % 256),
    "meta": lambda x, _: x.to("meta"),
    "sparse": lambda x, _: x.to_sparse() if x.dim() else x,
    "leaf": lambda x, _: x.clone().requires_grad_() if x.is_floating_point() else x,
}  # fmt: skip


def _ordinary(x: Tensor) -> bool:
    types = (*DTYPES, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
    here = x.layout == torch.strided and x.device.type == "cpu"
    return here and x.dtype in types and max(x.shape, default=0) < 2**24


INTEGERS = (0, 1, -1, -2, 3, 64, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63), None, 0.5, "1")
FLOATS = (
    0.0,
    -0.0,
    0.5,
    1.0,
    -1.0,
    2.0,
    1e300,
    -1e300,
    1e-300,
    float("nan"),
    float("inf"),
    -float("inf"),
    None,
    "x",
)
TEXTS = (
    "",
    "none",
    "linear",
    "layer_norm",
    "gelu",
    "post",
    "sum",
    "attention",
    "Linear",
    "\0",
    "naïve",
    "x" * 5000,
    None,
    3,
)


def spoil(i: Inputs, arguments: dict[str, Any]) -> None:
    """Changes one argument, in place."""
    name = i.among(sorted(arguments))
    if name in ("rows", "columns") and isinstance(
        arguments[name], int
    ):  # a result of 2^31 rows would be made
        arguments[name] = i.among(
            [n for n in INTEGERS if not isinstance(n, int) or abs(n) < 99 or abs(n) > 2**60]
        )
        return
    with torch.no_grad():
        arguments[name] = _spoiled(i, arguments[name], arguments)


def _spoiled(i: Inputs, value: Any, arguments: dict[str, Any]) -> Any:
    if isinstance(value, Tensor):
        if not _ordinary(value):  # spoilt already, and in a way that torch's own functions do not take
            return value
        if i.draw(st.integers(0, 9)) == 0:  # another argument of the same call
            tensors = [name for name in sorted(arguments) if isinstance(arguments[name], Tensor)]
            return arguments[i.among(tensors)] if tensors else value
        return TENSORS[i.among(sorted(TENSORS))](value, i.draw(st.integers(0, 2**20)))
    if isinstance(value, bool):
        return i.among((not value, None, 2, "x"))
    if isinstance(value, int):
        return i.among(INTEGERS)
    if isinstance(value, float):
        return i.among(FLOATS)
    if isinstance(value, str):
        return i.among(TEXTS)
    if value is None:  # an optional tensor
        return i.among(
            (
                torch.ones(1),
                torch.ones(3, 5),
                torch.ones(0),
                torch.tensor(7),
                torch.ones(4, dtype=torch.int32),
                1,
            )
        )
    if not value or i.chance():
        return i.among(
            ([], value * 2, value[:-1], [None], None, [torch.ones(3, 5)], [True], value[0] if value else 1)
        )
    at = i.draw(st.integers(0, len(value) - 1))
    return [*value[:at], _spoiled(i, value[at], arguments), *value[at + 1 :]]
