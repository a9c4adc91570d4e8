"""docs/support.md: which backend runs which operator, dtype, size and feature, and what `patch` replaces.

Nothing here is known by heart. Each example is a small call of an operator's public function. It runs once in
plain PyTorch, forward and backward, and what the dispatcher is asked on the way is recorded; then every
backend of the dispatcher's table is asked whether it could run them. The compiled libraries and the GPU
need not be there: they count as present while the backends are asked. So the text is the same on any machine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends
from bigmodel_kernels.extras import package

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HEAD_DIMS = range(1, 257)


@dataclass(frozen=True)
class Backend:
    """A column: its title, and where it stands in the dispatcher's table."""

    title: str
    device: str
    name: str

    def implementation(self, op: str) -> backends.Implementation | None:
        """None where the backend has no code for the operator."""
        for implementation in backends.TABLE[op, self.device]:
            if implementation.name == self.name and implementation.exists():
                return implementation
        return None


COMPILED = (
    Backend("CPU C++", "cpu", "native"),
    Backend("CUDA C++", "cuda", "native"),
    Backend("Triton", "cuda", "triton"),
)
BACKENDS = (*COMPILED, Backend("PyTorch", "cpu", "reference"))

#: What an operator of the table is to its public function.
_FORMS = (("_training", "training"), ("_backward", "backward"))


def form_of(op: str) -> str:
    """forward, training or backward."""
    return next((form for suffix, form in _FORMS if op.endswith(suffix)), "forward")


# ------------------------------------------------------------------------------------------------------------
# examples


class Maker:
    """Makes the tensors of an example, of one dtype; floating ones want a gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, requires_grad=True)

    def constant(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)


Build = Callable[[Maker], Any]


def _attention(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    rows: int = 4,
    keys: int = 4,
    dim: int = 64,
    **options: Any,
) -> Build:
    """`options` that are functions make tensors."""

    def run(m: Maker) -> Any:
        query, key, value = (
            m(batch, heads, rows, dim),
            m(batch, kv_heads, keys, dim),
            m(batch, kv_heads, keys, dim),
        )
        return bk.attention(query, key, value, **_made(options, m))

    return run


def _made(options: dict[str, Any], m: Maker) -> dict[str, Any]:
    return {name: value(m) if callable(value) else value for name, value in options.items()}


def _packed(**options: Any) -> Build:
    def run(m: Maker) -> Any:
        ends = torch.tensor([0, 3, 8], dtype=torch.int32)
        query, key, value = m(8, 3, 2, 64).unbind(1)
        return bk.attention(query, key, value, cu_seqlens_q=ends, cu_seqlens_k=ends, **_made(options, m))

    return run


def _fused(m: Maker) -> Any:
    query, key, value = m(1, 4, 3, 2, 64).permute(2, 0, 3, 1, 4)
    return bk.attention(query, key, value)


def _reversed(m: Maker) -> Any:
    return bk.attention(*(m(1, 2, 64, 4).transpose(2, 3) for _ in range(3)))


ATTENTION: dict[str, Build] = {
    "plain": _attention(),
    "causal": _attention(is_causal=True),
    "causal, more keys than queries": _attention(keys=9, is_causal=True),
    "sliding window": _attention(window=(2, 0)),
    "window to both sides": _attention(window=(2, 1)),
    "key padding mask": _attention(key_padding_mask=lambda m: m.constant(1, 4, dtype=torch.bool)),
    "packed sequences (`cu_seqlens`)": _packed(),
    "packed sequences, causal, window": _packed(is_causal=True, window=(2, None)),
    "GQA": _attention(heads=4, kv_heads=2),
    "MQA": _attention(heads=4, kv_heads=1),
    "additive bias": _attention(bias=lambda m: m(1, 2, 4, 4)),
    "additive bias of one row": _attention(bias=lambda m: m(1, 2, 1, 4)),
    "additive bias in fp32": _attention(bias=lambda m: m(1, 2, 4, 4, dtype=torch.float32)),
    "ALiBi slopes": _attention(alibi_slopes=lambda m: m.constant(2, dtype=torch.float32)),
    "softcap": _attention(softcap=5.0),
    "sinks": _attention(sinks=lambda m: m(2)),
    "dropout": _attention(dropout_p=0.1),
    "Q, K and V of one projection, in place": _fused,
    "a last dimension that is not contiguous": _reversed,
    "no keys": _attention(keys=0),
}


def _decode(rows: int = 1, kv_heads: int = 2, paged: bool = False, dim: int = 64, **options: Any) -> Build:
    def run(m: Maker) -> Any:
        cache = m(3, kv_heads, 8, dim)
        length = torch.ones(1, dtype=torch.int32)
        table = torch.zeros(1, 3, dtype=torch.int32) if paged else None
        keys = cache if paged else cache[:1]
        return bk.attention_decode(m(1, 4, rows, dim), keys, keys, length, table, **_made(options, m))

    return run


DECODE: dict[str, Build] = {
    "one token": _decode(),
    "several tokens": _decode(rows=3),
    "MQA": _decode(kv_heads=1),
    "paged cache (`block_table`)": _decode(paged=True),
    "sliding window": _decode(window=(2, 0)),
    "ALiBi slopes": _decode(alibi_slopes=lambda m: m.constant(4, dtype=torch.float32)),
    "softcap": _decode(softcap=5.0),
    "sinks": _decode(sinks=lambda m: m(4)),
}


def _linear(size_in: int = 64, sizes: tuple[int, ...] = (64,), bias: bool = True, **options: Any) -> Build:
    def run(m: Maker) -> Any:
        conv1d = options.get("weight_layout") == "conv1d"
        weights = [m(size_in, n) if conv1d else m(n, size_in) for n in sizes]
        return bk.linear(m(4, size_in), weights, [m(n) for n in sizes] if bias else None, **_made(options, m))

    return run


_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
LINEAR: dict[str, Build] = {
    "plain": _linear(),
    "no bias": _linear(bias=False),
    **{f"activation {name}": _linear(activation=name) for name in _ACTIVATIONS},
    "weights as Conv1D has them": _linear(weight_layout="conv1d"),
    "several weights side by side": _linear(sizes=(64, 32, 32)),
    "five weights side by side": _linear(sizes=(64,) * 5),
    "residual": _linear(residual=lambda m: m(4, 64)),
    "residual, LayerNorm": _linear(residual=lambda m: m(4, 64), norm_weight=lambda m: m(64)),
    "RMSNorm": _linear(norm_weight=lambda m: m(64), norm_kind="rms_norm"),
    "LayerNorm of 100,000 features": _linear(8, (100_000,), norm_weight=lambda m: m(100_000)),
    "dropout": _linear(dropout_p=0.1),
    "dropout over several weights": _linear(sizes=(64, 64), dropout_p=0.1),
    "sizes that are no multiples of 8": _linear(30, (35,)),
}


def _feed_forward(
    activation: str = "gelu", gated: bool = False, bias: bool = True, size: int = 64, **options: Any
) -> Build:
    def run(m: Maker) -> Any:
        conv1d = options.get("weight_layout") == "conv1d"
        w_in, w_out = (m(size, 128), m(128, size)) if conv1d else (m(128, size), m(size, 128))
        b_in, b_out = (m(128), m(size)) if bias else (None, None)
        given = _made(options, m)
        if gated:
            given["w_gate"] = m(*w_in.shape)
        return bk.feed_forward(m(4, size), w_in, b_in, w_out, b_out, activation=activation, **given)

    return run


FEED_FORWARD: dict[str, Build] = {
    **{f"activation {name}": _feed_forward(name) for name in _ACTIVATIONS},
    "no biases": _feed_forward(bias=False),
    "gated (SwiGLU)": _feed_forward("silu", gated=True, bias=False),
    "weights as Conv1D has them": _feed_forward(weight_layout="conv1d"),
    "LayerNorm before, residual": _feed_forward(
        norm_position="pre", norm_weight=lambda m: m(64), residual=lambda m: m(4, 64)
    ),
    "residual, LayerNorm behind": _feed_forward(
        norm_position="post", norm_weight=lambda m: m(64), residual=lambda m: m(4, 64)
    ),
    "RMSNorm before": _feed_forward(norm_position="pre", norm_weight=lambda m: m(64), norm_kind="rms_norm"),
    "dropout": _feed_forward(dropout_p=0.1),
    "the hidden layer again in the backward": _feed_forward(recompute=True),
    "sizes that are no multiples of 8": _feed_forward(size=35),
}


def _layer_norm(size: int = 64, bias: bool = True, **options: Any) -> Build:
    return lambda m: bk.layer_norm(m(4, size), m(size), m(size) if bias else None, **_made(options, m))


def _rms_norm(size: int = 64, **options: Any) -> Build:
    return lambda m: bk.rms_norm(m(4, size), m(size), **_made(options, m))


LAYER_NORM: dict[str, Build] = {
    "plain": _layer_norm(),
    "no bias": _layer_norm(bias=False),
    "residual": _layer_norm(residual=lambda m: m(4, 64)),
    "dropout before the residual": _layer_norm(residual=lambda m: m(4, 64), dropout_p=0.1),
    "100,000 features": _layer_norm(100_000),
}
RMS_NORM: dict[str, Build] = {
    "plain": _rms_norm(),
    "weights as the distance from 1": _rms_norm(weight_offset=1.0),
    "residual": _rms_norm(residual=lambda m: m(4, 64)),
    "100,000 features": _rms_norm(100_000),
}


def _embedding(
    tables: int = 3, norm: bool = True, ids: torch.dtype = torch.int64, size: int = 64, **options: Any
) -> Build:
    def run(m: Maker) -> Any:
        arguments: list[Any] = []
        for table in range(3):
            there = table < tables
            arguments += [m.constant(1, 4, dtype=ids), m(8, size)] if there else [None, None]
        arguments += [m(size), m(size)] if norm else [None, None]
        return bk.embedding(*arguments, **options)

    return run


EMBEDDING: dict[str, Build] = {
    "word + position + type, LayerNorm": _embedding(),
    "word alone": _embedding(1, norm=False),
    "word + position": _embedding(2, norm=False),
    "ids in int32": _embedding(ids=torch.int32),
    "dropout": _embedding(dropout_p=0.1),
    "`padding_idx`": _embedding(padding_idx=0),
    "100,000 features": _embedding(size=100_000),
}


def _rotary(pairs: int = 32, **options: Any) -> Build:
    return lambda m: bk.rotary(
        m(1, 2, 4, 64), m(1, 2, 4, 64), *(m.constant(4, pairs, dtype=torch.float32) for _ in "cs"), **options
    )


ROTARY: dict[str, Build] = {
    "halves": _rotary(),
    "neighbours (`interleaved`)": _rotary(interleaved=True),
    "a part of the head": _rotary(16, rotary_dim=32),
}


def _cross_entropy(bias: bool = False, **options: Any) -> Build:
    return lambda m: bk.linear_cross_entropy(
        m(4, 64), m(8, 64), m.constant(4, dtype=torch.int64), m(8) if bias else None, **options
    )


CROSS_ENTROPY: dict[str, Build] = {
    "plain": _cross_entropy(),
    "bias": _cross_entropy(True),
    "label smoothing": _cross_entropy(label_smoothing=0.1),
    "a loss for each row": _cross_entropy(reduction="none"),
}


def _maps(function: Callable[..., Any], **options: Any) -> Build:
    def run(m: Maker) -> Any:
        query = m.constant(1, 2, 4, 64, dtype=m.dtype)
        return function(query, query, **options)

    return run


STATISTICS: dict[str, Build] = {
    "plain": _maps(bk.attention_statistics, top_k=2),
    "more than 64 top keys": _maps(bk.attention_statistics, top_k=65),
}
PROBABILITIES: dict[str, Build] = {
    "plain": _maps(bk.attention_probabilities),
    "of some heads and queries": _maps(bk.attention_probabilities, heads=[1], queries=[0, 2]),
}


#: Title, examples by feature.
GROUPS: dict[str, dict[str, Build]] = {
    "Attention": ATTENTION,
    "Attention over a key-value cache": DECODE,
    "Entropy, mass and top keys of attention": STATISTICS,
    "Probabilities of attention": PROBABILITIES,
    "Linear": LINEAR,
    "Feed-forward": FEED_FORWARD,
    "LayerNorm": LAYER_NORM,
    "RMSNorm": RMS_NORM,
    "Embedding": EMBEDDING,
    "Rotary embedding": ROTARY,
    "Linear cross-entropy": CROSS_ENTROPY,
}


# ------------------------------------------------------------------------------------------------------------
# asking


Call = tuple[Sequence[Any], Mapping[str, Any]]


def calls_of(build: Build, dtype: torch.dtype) -> dict[str, Call]:
    """The arguments of each operator that an example runs: without a gradient, with one, and backward.

    They are those that the dispatcher gets, after what operators do to them before they ask it.
    """
    calls: dict[str, Call] = {}
    run = backends.run

    def recording(op: str, device_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        calls.setdefault(op, (args, kwargs))
        return run(op, device_type, args, kwargs)

    with backends.use("reference"), mock.patch.object(backends, "run", recording):
        with torch.no_grad():
            build(Maker(dtype))
        outputs = build(Maker(dtype))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum(o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
        if isinstance(total, Tensor) and "attention_decode" not in calls:  # which has no gradient
            total.backward()
    return calls


@dataclass(frozen=True)
class Answer:
    """Whether a backend runs a call: of itself, only when it is asked for by name, or not, and why."""

    runs: bool
    reason: str | None = None


def ask(backend: Backend, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Answer:
    """What the dispatcher's table would be told."""
    from bigmodel_kernels.triton_runtime import HOPPER, pretend

    implementation = backend.implementation(op)
    if implementation is None:
        return Answer(False, "it has no such kernel")
    with _native.pretend_loaded(), pretend(HOPPER):
        reason = implementation.why_not(args, kwargs)
        if reason is not None:
            return Answer(False, reason)
        return Answer(True, implementation.why_not_unasked(args, kwargs))


# ------------------------------------------------------------------------------------------------------------
# the text


def markdown() -> str:
    """The whole of docs/support.md.

    Raises MissingPackage without Triton or transformers, whose parts of the text would be missing.
    """
    package("triton", "triton", "triton")
    package("transformers", "transformers", "transformers")
    return "\n".join([_HEAD, *_operators(), *_head_dims(), *_features(), *_models()])


_HEAD = """# Support

Written by `make support`, from the answers of the backends themselves; a test keeps the two equal. Which
backend runs a call of yours, and why the others do not, is told by `bk.explain`.

CPU C++ and CUDA C++ are the compiled libraries (CUDA from sm_80 on), Triton runs on NVIDIA and AMD GPUs,
PyTorch is the plain definition that runs anywhere. "asked" is what a backend runs only when
`BIGMODEL_BACKEND` names it. The answers are those for a Hopper GPU; on other GPUs CUDA C++, not yet measured
there, runs only when asked.
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _operators() -> list[str]:
    builds = [build for group in GROUPS.values() for build in group.values()]
    calls: dict[str, dict[str, Call]] = {name: {} for name in DTYPES}
    for name, dtype in DTYPES.items():
        for build in builds:  # of each operator the first example, which is the plain one
            calls[name] = {**calls_of(build, dtype), **calls[name]}
    missing = sorted(set(backends.operators()) - set(calls["fp32"]))
    if missing:
        raise RuntimeError(f"no example runs {', '.join(missing)}: bigmodel_kernels/support.py needs one")
    rows = []
    for op in backends.operators():
        cells = []
        for backend in BACKENDS:
            able = [name for name, found in calls.items() if ask(backend, op, *found[op]).runs]
            cells.append(" ".join(able) or "-")
        rows.append([f"`{op}`", *cells])
    title = "## Operators and dtypes\n"
    return [title, *_table(["operator", *(backend.title for backend in BACKENDS)], rows)]


def _head_dims() -> list[str]:
    rows = []
    calls = {
        dim: {**calls_of(_attention(dim=dim), torch.bfloat16), **calls_of(_decode(dim=dim), torch.bfloat16)}
        for dim in HEAD_DIMS
    }
    for op in calls[HEAD_DIMS[0]]:
        cells = [
            _sizes([dim for dim in HEAD_DIMS if ask(backend, op, *calls[dim][op]).runs])
            for backend in BACKENDS
        ]
        rows.append([f"`{op}`", *cells])
    header = ["head_dim", *(backend.title for backend in BACKENDS)]
    return ["## Head sizes\n", *_table(header, rows)]


def _sizes(able: list[int]) -> str:
    if not able:
        return "-"
    step = able[0]
    if able != list(range(step, able[-1] + 1, step)):
        raise RuntimeError(f"head sizes {able} are no multiples of one number; say so in another way")
    return f"{step} to {able[-1]}" if step == 1 else f"multiples of {step} to {able[-1]}"


def _features() -> list[str]:
    lines = ["## Features\n", "In bf16. PyTorch runs all of it.\n"]
    for title, group in GROUPS.items():
        calls = {feature: calls_of(build, torch.bfloat16) for feature, build in group.items()}
        ops = list(dict.fromkeys(op for found in calls.values() for op in found))
        columns = [
            (backend, op) for backend in COMPILED for op in ops if backend.implementation(op) is not None
        ]
        notes: dict[str, int] = {}
        rows = []
        for feature, found in calls.items():
            cells = [
                _cell(ask(backend, op, *found[op]), notes) if op in found else "" for backend, op in columns
            ]
            rows.append([feature, *cells])
        names = [f"{backend.title} {form_of(op)}" for backend, op in columns]
        lines += [f"### {title}\n", *_table(["", *names], rows)]
        lines += [f"{number}. {reason}" for reason, number in notes.items()] + ([""] if notes else [])
    return lines


def _cell(answer: Answer, notes: dict[str, int]) -> str:
    if answer.reason is None:
        return "yes"
    number = notes.setdefault(answer.reason, len(notes) + 1)
    return f"{'asked' if answer.runs else 'no'} ({number})"


def _models() -> list[str]:
    """From the rules of each family."""
    from bigmodel_kernels.transformers import families

    rows = []
    for name in families.names():
        family = importlib.import_module(f"{families.__name__}.{name}").FAMILY
        runs = [f"{rule.original.__name__}: {' + '.join(rule.ops)}" for rule in family.rules if rule.ops]
        runs += [
            f"{rule.parent.__name__}.{rule.attribute}: {' + '.join(rule.ops)}" for rule in family.children
        ]
        losses = ", ".join(rule.original.__name__ for rule in family.losses)
        left = "; ".join(f"{cls.__name__}: {reason}" for cls, reason in family.left.items())
        rows.append([name, "<br>".join(dict.fromkeys(runs)), losses or "-", left or "-"])
    header = ["family", "module: operators", "`fused_loss`", "left alone"]
    about = (
        "What `bk.patch` replaces, by the rules of each family. docs/transformers.md has the conditions.\n"
    )
    return ["## Models\n", about, *_table(header, rows)]
