"""A layer in two calls of the library: the bits of the separate calls, and only where nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel, DistilBertConfig, DistilBertModel, DynamicCache, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import (
    bert_config,
    build,
    gpt2_config,
    right_padding,
    token_ids,
)
from bigmodel_kernels.ops.linear.native import packed_bytes
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import whole_layer

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the norms are, of each layer that ran in two calls."""
    seen: list[str] = []
    run = whole_layer.end

    def end(x: Any, terms: Any, w: Any, held: Any, position: str) -> torch.Tensor:
        seen.append(position)
        return run(x, terms, w, held, position)

    monkeypatch.setattr(whole_layer, "end", end)
    return seen


IDS = token_ids()


def bert(**changes: Any) -> Any:
    return build(BertModel, bert_config(**changes))


def distilbert() -> Any:
    return build(
        DistilBertModel, DistilBertConfig(vocab_size=101, dim=48, n_layers=2, n_heads=4, hidden_dim=72)
    )


def gpt2() -> Any:
    return build(GPT2LMHeadModel, gpt2_config())


def hidden(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(**inputs).values()))  # type: ignore[no-any-return]


def decoded(model: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits of a prompt and of three tokens after it, from the cache."""
    cache, found = DynamicCache(), []
    with torch.inference_mode():
        for start, stop in ((0, 14), (14, 15), (15, 17)):
            seen = None if mask is None else mask[:, :stop]
            found.append(model(IDS[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(found, 1)


def separate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("held", "tokens"):
        monkeypatch.setattr(whole_layer, name, lambda *args: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("maker", [bert, distilbert])
def test_bits_of_the_separate_calls_after_the_norm(
    maker: Callable[[], Any],
    padded: bool,
    dtype: torch.dtype,
    ends: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = maker().to(dtype)
    bk.patch(model)
    inputs = {"input_ids": IDS, "attention_mask": right_padding() if padded else None}
    run, together = whole_layer.encoded, []

    def encoded(x: Any, layers: Any, *args: Any) -> Any:
        out = run(x, layers, *args)
        together.append((len(layers), x.dim(), out is not None))
        return out

    monkeypatch.setattr(whole_layer, "encoded", encoded)
    ours = hidden(model, **inputs)
    assert together == [(2, 2 if padded else 3, True)] and not ends
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 0)
    assert torch.equal(ours, hidden(model, **inputs))
    assert ends == ["post", "post"] and len(together) == 1
    separate(monkeypatch)
    assert torch.equal(ours, hidden(model, **inputs)) and len(ends) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_bits_of_the_separate_calls_before_the_norm(
    padded: bool, dtype: torch.dtype, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2().to(dtype)
    bk.patch(model)
    mask = right_padding().flip(1) if padded else None
    ours = decoded(model, mask)
    assert not ends
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, decoded(model, mask))
    separate(monkeypatch)
    count = len(ends)
    assert count >= 4 and torch.equal(ours, decoded(model, mask)) and len(ends) == count


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def training(model: Any) -> Iterator[None]:
    model.train()
    yield
    model.eval()


LISTENERS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda model: backends.use("reference"),
    "a mode": lambda model: Counting(),
    "dropout": training,
    "gradients": lambda model: torch.enable_grad(),
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_who_listens_gets_the_operators(listener: str, ends: list[str]) -> None:
    model = bert(hidden_dropout_prob=0.1)
    bk.patch(model)
    with torch.no_grad(), LISTENERS[listener](model):
        model(IDS)
    assert not ends


LAYERS_WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook before a layer": lambda m: m.encoder.layer[1].register_forward_pre_hook(lambda *a: 2 * a[1][0]),
    "a hook behind a layer": lambda m: m.encoder.layer[1].register_forward_hook(lambda *a: a[2] * 2),
    "a hook within": lambda m: m.encoder.layer[1].output.dense.register_forward_hook(lambda *a: a[2] * 2),
    "a layer in training": lambda m: m.encoder.layer[1].train(),
}


@pytest.mark.parametrize("name", LAYERS_WATCHED)
def test_who_watches_a_layer_sees_it_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert(hidden_dropout_prob=0.3)
    bk.patch(model)
    before = hidden(model, input_ids=IDS)
    LAYERS_WATCHED[name](model)
    torch.manual_seed(0)
    after = hidden(model, input_ids=IDS)
    separate(monkeypatch)
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 0)
    torch.manual_seed(0)
    assert torch.equal(after, hidden(model, input_ids=IDS)) and not torch.equal(after, before)


def test_nothing_of_float64_or_with_a_foreign_projection(ends: list[str]) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    double, replaced = bert().double(), bert()
    for model in (double, replaced):
        bk.patch(model)
    replaced.encoder.layer[0].intermediate.dense = Doubled(48, 72)
    for model in (double, replaced):
        hidden(model, input_ids=IDS)
    assert ends == ["post"]  # of the layer that is as it was


def test_a_library_without_the_ops(ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    bk.patch(model)
    expected = hidden(model, input_ids=IDS)
    ends.clear()
    monkeypatch.setattr(whole_layer, "lacking", lambda name, dtype: f"it has no {name}")
    assert torch.equal(hidden(model, input_ids=IDS), expected) and not ends


EDITS: dict[str, Callable[[Any], Any]] = {
    "in place": lambda linear: linear.weight.mul_(2),
    "through data": lambda linear: linear.weight.data.mul_(2),
    "another parameter": lambda linear: setattr(linear, "weight", torch.nn.Parameter(2 * linear.weight)),
    "no bias": lambda linear: setattr(linear, "bias", None),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "name", ["attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense"]
)
def test_edited_weights_are_seen(name: str, edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    bk.patch(model)
    before = hidden(model, input_ids=IDS)
    with torch.no_grad():
        EDITS[edit](model.encoder.layer[1].get_submodule(name))
    after = hidden(model, input_ids=IDS)
    separate(monkeypatch)
    assert torch.equal(after, hidden(model, input_ids=IDS)) and not torch.equal(after, before)


def test_packed_copies_are_those_of_the_separate_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    bk.patch(model)
    decoded(model, None)
    held = packed_bytes(model)
    separate(monkeypatch)
    decoded(model, None)
    assert held == packed_bytes(model)


# ------------------------------------------------------------------------------------------------------------
# the raw ops


def arguments(**changes: Any) -> list[Any]:
    """Those of `cpu_layer_end` for x (2, 3, 8), two heads of 4, and a feed-forward block of 6."""

    def pack(features: int, inputs: int) -> torch.Tensor:
        weight = torch.randn(features, inputs)
        return torch.ops.bigmodel.cpu_pack_weight([weight], "linear")  # type: ignore[no-any-return]

    given: dict[str, Any] = {
        "x": torch.randn(2, 3, 8),
        **{name: torch.randn(2, 2, 3, 4) for name in ("query", "key", "value")},
        **dict.fromkeys(("key_padding_mask", "attention_bias", "lengths")),
        **{
            "longest": 0,
            "sinks": None,
            "softmax_scale": 0.5,
            "is_causal": False,
            "window_left": -1,
            "window_right": -1,
            "softcap": 0.0,
        },
        **{"packed_context": pack(8, 8), "b_context": torch.randn(8)},
        **{"attention_norm_weight": None, "attention_norm_bias": None, "attention_norm_eps": 1e-5},
        **{"packed_in": pack(6, 8), "b_in": torch.randn(6), "packed_out": pack(8, 6), "b_out": None},
        **{"packed_gate": None, "b_gate": None, "activation": "gelu", "norm_position": "pre"},
        **{
            "norm_weight": torch.ones(8),
            "norm_bias": torch.zeros(8),
            "norm_eps": 1e-5,
            "norm_kind": "layer_norm",
        },
    }
    return list({**given, **changes}.values())


#: What is wrong, and what the error names.
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "rows": ("query", {name: torch.randn(2, 2, 4, 4) for name in ("query", "key", "value")}),
    "batch of keys": ("key", {name: torch.randn(1, 2, 3, 4) for name in ("key", "value")}),
    "batch": ("query", {name: torch.randn(1, 2, 3, 4) for name in ("query", "key", "value")}),
    "heads": ("x", {name: torch.randn(2, 3, 3, 4) for name in ("query", "key", "value")}),
    "mask": ("key_padding_mask", {"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}),
    "residual": ("residual", {"x": torch.randn(2, 3, 7)}),
    "scalar": ("x", {"x": torch.tensor(1.0)}),
    "bias": ("b_in", {"b_in": torch.randn(7)}),
    "norm": ("norm_weight", {"norm_weight": torch.ones(9)}),
    "norm after attention": ("norm_weight", {"attention_norm_weight": torch.ones(9)}),
    "weight": ("packed", {"packed_in": torch.zeros(100, dtype=torch.uint8)}),
    "lengths of dense rows": ("query", {"lengths": torch.tensor([0, 3, 6], dtype=torch.int32), "longest": 3}),
    "activation": ("activation", {"activation": "tanh"}),
    "kind of norm": ("norm_kind", {"norm_kind": "batch_norm"}),
    "position": ("norm_position", {"norm_position": "around"}),
    "dtype": ("key", {"query": torch.randn(2, 2, 3, 4).bfloat16()}),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_of_the_raw_op(what: str, threads: int) -> None:
    """The error says so wherever it comes from: within a parallel region torch would lose its words."""
    names, changes = BAD[what]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(RuntimeError, match=names):
            torch.ops.bigmodel.cpu_layer_end(*arguments(**changes))
    finally:
        torch.set_num_threads(before)


def test_bad_arguments_of_the_other_raw_op() -> None:
    packed = torch.ops.bigmodel.cpu_pack_weight([torch.randn(6, 8)], "linear")
    for x, weight, name in (
        (torch.randn(2, 7), None, "x"),
        (torch.randn(2, 8), torch.ones(7), "norm_weight"),
    ):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.bigmodel.cpu_layer_begin(x, weight, None, 1e-5, "layer_norm", packed, None)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_the_raw_op_by_definition(form: str) -> None:
    """Against float64: rows of two sequences, dense or one after the other."""
    given = arguments(is_causal=True)
    x, query, key, value = given[:4]
    torch.manual_seed(1)
    weights = [torch.randn(8, 8), torch.randn(6, 8), torch.randn(8, 6)]
    given[14], given[19], given[21] = (
        torch.ops.bigmodel.cpu_pack_weight([weight], "linear") for weight in weights
    )
    context = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in (query, key, value)), is_causal=True, scale=0.5
    )
    projection, w_in, w_out = (weight.double() for weight in weights)
    y = x + context.transpose(1, 2).flatten(2) @ projection.T + given[15]
    inner = torch.nn.functional.gelu(torch.nn.functional.layer_norm(y, (8,)) @ w_in.T + given[20])
    expected = y + inner @ w_out.T
    if form == "packed":
        given[0] = x.flatten(0, 1)
        given[1:4] = (t.transpose(1, 2).flatten(0, 1).contiguous() for t in (query, key, value))
        given[6], given[7] = torch.tensor([0, 3, 6], dtype=torch.int32), 3
        expected = expected.flatten(0, 1)
    out = torch.ops.bigmodel.cpu_layer_end(*given)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
