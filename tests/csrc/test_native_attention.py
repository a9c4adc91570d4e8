"""The compiled attention on every instruction set, held to float64 by the numerics rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel_kernels import _native, verify

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

from attention_cases import Call, Shape, arguments, forward, make, plain

native = torch.ops.bigmodel
ISAS = native.cpu_isas().split(", ")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = {
    "one": Shape(queries=1, keys=1, dim=1),
    "decode": Shape(queries=1, keys=300, heads=6, causal=True, dim=64),
    "decode, grouped": Shape(queries=2, keys=300, heads=8, dim=128, batch=4, scale=0.26),
    "decode, all": Shape(queries=2, keys=129, causal=True, alibi=1, sinks=True, dropout=0.3, dim=33),
    "square": Shape(queries=129, keys=129, dim=64),
    "causal": Shape(queries=127, keys=127, causal=True, dim=80),
    "causal, few keys": Shape(queries=130, keys=17, causal=True),
    "window": Shape(queries=300, keys=300, batch=1, window=(40, 9)),
    "causal window": Shape(queries=140, keys=290, batch=1, window=(70, -1), causal=True),
    "padding": Shape(queries=19, keys=270, padding=True),
    "softcap": Shape(queries=33, keys=65, softcap=5.0, scale=1.0),
    "bias": Shape(queries=33, keys=127, bias=(1, 2, 33, 127)),
    "row bias, padding": Shape(queries=33, keys=127, bias=(2, 1, 1, 127), padding=True, softcap=20.0),
    "negative scale": Shape(scale=-0.3),
    "grouped": Shape(heads=6, queries=49, keys=300, dim=40),
    "grouped, alibi": Shape(heads=6, queries=17, keys=65, alibi=2, causal=True, padding=True),
    "alibi, bias": Shape(queries=65, keys=129, alibi=1, bias=(129,), softcap=30.0),
    "sinks": Shape(queries=65, keys=65, sinks=True, causal=True, heads=4),
    "sinks, nothing visible": Shape(queries=40, keys=17, sinks=True, causal=True, padding=True),
    "dropout": Shape(queries=129, keys=127, dropout=0.1, heads=3, kv_heads=3),
    "dropout, grouped": Shape(queries=41, keys=300, dropout=0.5, heads=6, causal=True),
    "dropout, window": Shape(queries=290, keys=301, batch=1, dropout=0.2, window=(33, 20)),
    "packed": Shape(lengths=((5, 5), (0, 3), (129, 129), (1, 1), (7, 0), (33, 40)), causal=True),
    "packed, all": Shape(
        lengths=((40, 40), (1, 17), (90, 127)), heads=4, alibi=2, sinks=True, dropout=0.2, window=(60, 60)
    ),
    "strided": Shape(queries=65, keys=65, heads=4, strided=True, dim=24),
    "large head": Shape(queries=17, keys=33, dim=256, causal=True),
    "no keys": Shape(queries=3, keys=0),
    "blocks": Shape(queries=97, keys=530, batch=1, dim=72, softcap=8.0, bias=(1, 1, 97, 530), sinks=True),
    "blocks, grouped": Shape(
        queries=70, keys=600, batch=1, heads=3, kv_heads=1, dim=33, causal=True, window=(290, -1)
    ),
    "packed, long": Shape(lengths=((130, 130), (70, 300), (64, 64), (63, 65)), causal=True, dim=64),
}


def check_forward(call: Call) -> None:
    with verify.poisoned():
        out, lse = forward(call)
    with torch.no_grad():
        ref, ref_lse = plain(call, {n: t.double() for n, t in call.tensors.items()})
        eager, _ = plain(call, call.tensors)
        _, single_lse = plain(call, {n: t.float() for n, t in call.tensors.items()})
    verdict = verify.compare(out, eager, ref)
    assert verdict.ok, str(verdict)
    # The logsumexp is float32 whatever the inputs are.
    verdict = verify.compare(lse, single_lse, ref_lse)
    assert verdict.ok, f"logsumexp: {verdict}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    check_forward(make(shape, dtype))


@st.composite
def shapes(draw: Any) -> Shape:
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    broadcast = [draw(st.booleans()) for _ in range(4)]
    full = (2, heads, queries, keys)
    packed = draw(st.booleans())
    lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3)
    return Shape(
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        dim=draw(st.integers(1, 70)),
        causal=draw(st.booleans()),
        window=(draw(st.integers(-1, 60)), draw(st.integers(-1, 60))),
        softcap=draw(st.sampled_from([0.0, 3.0])),
        padding=not packed and draw(st.booleans()),
        bias=None
        if packed or draw(st.booleans())
        else tuple(1 if b else n for b, n in zip(broadcast, full, strict=True)),
        alibi=draw(st.integers(0, 2)),
        sinks=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.4])),
        lengths=tuple(draw(lengths)) if packed else None,
    )


@settings(max_examples=60)
@given(shape=shapes())
def test_any_mixture(shape: Shape) -> None:
    """A result of a few elements says too little of mean errors: here float32 is near, or wrong."""
    call = make(shape, torch.float32)
    ref, ref_lse = plain(call, {n: t.double() for n, t in call.tensors.items()})
    before = native.cpu_isa()
    try:
        for isa in ISAS:
            native.cpu_set_isa(isa)
            with verify.poisoned():
                out, lse = forward(call)
            torch.testing.assert_close(out.double(), ref, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse.double(), ref_lse, rtol=1e-5, atol=1e-5)
    finally:
        native.cpu_set_isa(before)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4028234e38, 3.4e38, 1e-42])
def test_extreme_numbers(isa: str, value: float, where: str) -> None:
    """Not finite where float32 by definition is not, and near elsewhere: one panel of many has the number."""
    call = make(Shape(queries=100, keys=300, batch=1, dim=72), torch.float32)
    call.tensors["query"] /= 1e20 if where == "key" else 1  # so that logits of the largest number stay finite
    call.tensors["key"] /= 1e20 if where == "query" else 1
    call.tensors[where][:, 1, 70, 40] = value
    out, lse = forward(call)
    with torch.no_grad():
        eager, eager_lse = plain(call, call.tensors)
        ref, ref_lse = plain(call, {n: t.double() for n, t in call.tensors.items()})
    for ours, theirs, exact in ((out, eager, ref), (lse, eager_lse, ref_lse)):
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        torch.testing.assert_close(ours[finite].double(), exact[finite], rtol=1e-5, atol=1e-5)


def test_large_sink_takes_everything(isa: str) -> None:
    call = make(Shape(sinks=True), torch.float32)
    call.tensors["sinks"] = torch.tensor([1e4, -1e4])
    out, lse = forward(call)
    assert out[:, 0].abs().max() == 0 and torch.all(lse[:, 0] == 1e4)
    without = make(Shape(), torch.float32)
    torch.testing.assert_close(out[:, 1], forward(without)[0][:, 1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": torch.rand(3)}, "alibi_slopes: shape"),
        ({"alibi": torch.rand(1, 2)}, "alibi_slopes: shape"),
        ({"alibi": torch.rand(2).double()}, "alibi_slopes: dtype"),
        ({"sinks": torch.rand(3)}, "sinks: shape"),
        ({"sinks": torch.rand(2).half()}, "sinks: dtype"),
        ({"seed": torch.tensor(1)}, "dropout_seed: must be given when"),
        ({"dropout": 0.5}, "dropout_seed: must be given when"),
        ({"dropout": 0.5, "seed": torch.tensor([1, 2])}, "dropout_seed: shape"),
        ({"dropout": 1.5, "seed": torch.tensor(1)}, r"dropout_p: 1\.5"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    call = make(Shape(), torch.float32)
    args = list(arguments(call))
    for name, at in (("seed", 4), ("alibi", 5), ("sinks", 6), ("dropout", -1)):
        if name in change:
            args[at] = change[name]
    t = call.tensors
    with pytest.raises(RuntimeError, match=message):
        native.cpu_attention(t["query"], t["key"], t["value"], *args)
