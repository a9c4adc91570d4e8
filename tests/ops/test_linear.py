"""Linear: against float64, its gradients, its arguments, and the cache of packed weights."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import (
    Sizes,
    check_case,
    check_checkpointed,
    check_compiled,
    check_each_gradient_alone,
    check_gradients,
    check_operator,
    check_refused,
    kept_or_dropped,
    require,
    with_seed,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.ops.linear import native, prepare, reference
from bigmodel_kernels.ops.philox import keep_elements

X, W, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((X, [W]), {}),
    "one weight": ((X, W, B), {"activation": "gelu"}),
    "all": (
        (X[None], [W, torch.randn(2, 4)], [B, torch.randn(2)]),
        {
            "activation": "gelu_tanh",
            "residual": torch.randn(1, 3, 7),
            "norm_weight": torch.randn(7),
            "norm_bias": torch.randn(7),
        },
    ),
    "conv1d, norm without bias": (
        (X, [W.t().contiguous()]),
        {"weight_layout": "conv1d", "activation": "quick_gelu", "norm_weight": torch.randn(5)},
    ),
    "silu": ((X, [W], [B]), {"activation": "silu", "residual": torch.randn(3, 5)}),
    "RMSNorm": ((X, W), {"activation": "relu", "norm_weight": torch.randn(5), "norm_kind": "rms_norm"}),
}
#: Of the raw operator, with a seed, as far as the backends have it.
DROPOUT: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    name: (args, {**kwargs, "dropout_p": 0.4}) for name, (args, kwargs) in CALLS.items()
}
calls = pytest.mark.parametrize("name", CALLS)


@pytest.mark.parametrize("case", list(verify.cases("linear")), ids=str)
def test_against_float64(case: verify.Case, cpu_backend: str) -> None:
    check_case(case, cpu_backend)


@given(
    rows=st.integers(0, 70),
    size_in=st.integers(1, 150),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    layout=st.sampled_from(["linear", "conv1d"]),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]),
    extras=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_any_shape(
    backend: str,
    rows: int,
    size_in: int,
    sizes: list[int],
    layout: str,
    activation: str,
    extras: tuple[bool, bool, bool],
    seed: int,
) -> None:
    if backend == "native" and (reason := _native.reason()):
        pytest.skip(reason)
    torch.manual_seed(seed)
    weights = [torch.randn((size_in, n) if layout == "conv1d" else (n, size_in)) for n in sizes]
    options: dict[str, Any] = {"weight_layout": layout, "activation": activation}
    bias, residual, norm = extras
    biases = [torch.randn(n) for n in sizes] if bias else None
    if residual:
        options["residual"] = torch.randn(rows, sum(sizes))
    if norm and sum(sizes) > 2:  # of one or two features nothing but a sign is left
        options |= {
            "norm_weight": torch.randn(sum(sizes)),
            "norm_bias": torch.randn(sum(sizes)),
            "norm_eps": 1e-3,
        }
    x = torch.randn(rows, size_in)
    with backends.use(backend):
        out = bk.linear(x, weights, biases, **options)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    doubles = [[t.double() for t in ts] if ts else None for ts in (weights, biases)]
    expected = verify.linear_formula(x.double(), *doubles, **double)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)


@calls
def test_gradients(name: str) -> None:
    check_gradients(bk.linear, CALLS[name], second=True)
    check_each_gradient_alone(bk.linear, CALLS[name])


@pytest.mark.parametrize("operator", ["linear", "linear_training"])
@calls
def test_gradients_with_dropout(name: str, operator: str) -> None:
    """The forward and the backward drop the same elements; the plain operator computes all again."""
    function = with_seed(getattr(torch.ops.bigmodel, operator), prepare)
    check_gradients(function, DROPOUT[name])
    check_each_gradient_alone(function, DROPOUT[name])


@calls
def test_opcheck(name: str, cpu_backend: str) -> None:
    args, kwargs = CALLS[name]
    args, kwargs = prepare(*args, **kwargs)
    require(cpu_backend, "linear", args, kwargs)
    check_operator(torch.ops.bigmodel.linear.default, (args, kwargs), cpu_backend)
    check_operator(torch.ops.bigmodel.linear_training.default, (args, kwargs), cpu_backend)


@kept_or_dropped(CALLS, DROPOUT)
@calls
def test_opcheck_of_the_gradient(name: str, stored: bool, calls_of: Any, cpu_backend: str) -> None:
    args, kwargs = calls_of[name]
    args, kwargs = prepare(*args, **kwargs)
    args = (*args, *[None] * (7 - len(args)))
    require(cpu_backend, "linear_training", args, kwargs)
    out, preactivation, prenorm = torch.ops.bigmodel.linear_training(*args, **kwargs)
    saved = (preactivation if preactivation.numel() else None, prenorm if prenorm.numel() else None)
    _, weights, biases, residual, norm_weight, norm_bias, _ = args
    needs = [True, residual is not None, norm_weight is not None, norm_bias is not None]
    needs += [True] * len(weights) + [False] * len(biases)
    call = ((torch.randn_like(out), *args, *(saved if stored else ())), {**kwargs, "needs": needs})
    check_operator(torch.ops.bigmodel.linear_backward.default, call, cpu_backend)


def test_opcheck_with_gradients(cpu_backend: str) -> None:
    args, kwargs = prepare(
        X.clone().requires_grad_(), [W.clone().requires_grad_()], [B.clone().requires_grad_()]
    )
    check_operator(torch.ops.bigmodel.linear.default, (args, kwargs), cpu_backend)


@calls
def test_compiled_and_checkpointed(name: str) -> None:
    check_compiled(bk.linear, CALLS[name])
    check_checkpointed(bk.linear, CALLS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, cpu_backend: str) -> None:
    weight = W.clone().requires_grad_()
    with backends.use(cpu_backend), torch.autocast("cpu", dtype):
        out = bk.linear(X, weight, B)
        assert torch.equal(out, bk.linear(X.to(dtype), W.to(dtype), B.to(dtype)))
        out.float().sum().backward()
    assert out.dtype == dtype
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_as_asked(p: float) -> None:
    x = torch.zeros(400, 3)
    out = bk.linear(x, torch.zeros(100, 3), torch.ones(100), dropout_p=p)
    kept = out != 0
    assert abs(kept.float().mean() - (1 - p)) < 4 * (p * (1 - p) / 40_000) ** 0.5
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    torch.manual_seed(1)
    first = bk.linear(x, torch.zeros(100, 3), torch.ones(100), dropout_p=p)
    second = bk.linear(x, torch.zeros(100, 3), torch.ones(100), dropout_p=p)
    torch.manual_seed(1)
    assert torch.equal(bk.linear(x, torch.zeros(100, 3), torch.ones(100), dropout_p=p), first)
    assert not torch.equal(first, second)


def test_dropout_is_that_of_elements_before_the_residual() -> None:
    """With the mask of ops/philox.py applied by hand, forward and gradients are those of torch."""
    x, w, residual = (t.double().requires_grad_() for t in (X, W, torch.randn(3, 5)))
    args, kwargs = prepare(x, w, residual=residual, dropout_p=0.3, activation="gelu", norm_weight=B.double())
    keep = keep_elements(args[6], 0.3, 3, 5, torch.float64, "cpu")
    out = torch.ops.bigmodel.linear(*args, **kwargs)
    expected = F.layer_norm(F.gelu(F.linear(x, w)) * keep + residual, (5,), B.double())
    torch.testing.assert_close(out, expected)
    leaves = (x, w, residual)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def test_dropout_checkpointed_and_compiled() -> None:
    layer = nn.Linear(4, 5)

    def step(x: Tensor) -> Tensor:
        return bk.linear(x, layer.weight, layer.bias, activation="gelu", dropout_p=0.5)

    gradients = []
    for function in (step, lambda x: checkpoint(step, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(3)
        function(X).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outs = [compiled(X) for _ in range(2)]
    assert not torch.equal(*outs)
    outs[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_steps(dtype: torch.dtype, cpu_backend: str) -> None:
    """A training step of three projections against the same by torch, in the dtype, as the rule allows."""
    case = verify.Case(
        "linear",
        "three projections",
        dtype,
        lambda m: verify._linear(m, (4, 33), 96, (96, 32, 32), activation="gelu_tanh", norm=True),
    )
    check_case(case, cpu_backend)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("needs, products", [("x", 1), ("w", 1), ("xw", 2), ("b", 0), ("r", 0), ("n", 0)])
def test_only_what_is_needed_is_computed(needs: str, products: int, stored: bool) -> None:
    args = (X, [W], [B], torch.randn(3, 5), torch.randn(5), torch.randn(5))
    options = {"activation": "gelu"}
    out, *saved = reference.run_training(*args, **options)
    asked = ["x" in needs, "r" in needs, "n" in needs, "n" in needs, "w" in needs, "b" in needs]
    with Sizes() as sizes:
        results = reference.run_backward(
            torch.randn_like(out), *args, None, *(saved if stored else (None, None)), **options, needs=asked
        )
    assert sizes.products == products + (0 if stored else 1)  # the projection again
    assert [r.numel() > 0 for r in results] == asked


def test_frozen_weights_keep_no_input() -> None:
    """As in torch: x is kept for the gradient of the weight alone."""
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.untyped_storage().nbytes() for tensor in (tensor,)))
        return tensor

    x = torch.randn(50, 40, requires_grad=True)
    w = torch.randn(30, 40)
    for frozen in (True, False):
        kept.clear()
        w.requires_grad_(not frozen)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = bk.linear(x, w, activation="gelu")
        assert ((50 * 40 * 4,) in kept) != frozen
        (gradient,) = torch.autograd.grad(out.sum(), x)
        expected = torch.autograd.grad(F.gelu(F.linear(x, w)).sum(), x)[0]
        torch.testing.assert_close(gradient, expected)


def test_under_vmap() -> None:
    x = torch.randn(6, 3, 4)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return bk.linear(x, w, B, activation="gelu", norm_weight=B)

    expected = torch.stack([function(x[:, i], W) for i in range(3)])
    torch.testing.assert_close(torch.vmap(function, in_dims=(1, None))(x, W), expected)
    weights = torch.randn(3, 5, 4)
    expected = torch.stack([function(x[:, i], weights[i]) for i in range(3)])
    torch.testing.assert_close(torch.vmap(function, in_dims=(1, 0))(x, weights), expected)
    grads = torch.randn(6, 3, 5)

    def backward(grad: Tensor, x: Tensor, needs: list[bool]) -> list[Tensor]:
        return torch.ops.bigmodel.linear_backward(grad, x, [W], [B], activation="silu", needs=needs)

    for needs in ([True] + [False] * 5, [True, False, False, False, True, False]):
        mapped = torch.vmap(lambda g, x, n=needs: backward(g, x, n))(grads, x)
        for i in range(6):
            for one, all_of_them in zip(backward(grads[i], x[i], needs), mapped, strict=True):
                if one.numel():
                    torch.testing.assert_close(all_of_them[i], one)


def test_inputs_of_any_strides(cpu_backend: str) -> None:
    x, residual = torch.randn(4, 3).t(), torch.randn(5, 6)[:, ::2].t()
    with backends.use(cpu_backend):
        out = bk.linear(x, W, B, residual=residual)
    torch.testing.assert_close(out, F.linear(x, W, B) + residual)
    assert out.is_contiguous()


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X.int(), W), {}, TypeError, "x has dtype torch.int32; allowed are"),
    ((torch.tensor(1.0), W), {}, ValueError, r"x has shape \(\)"),
    ((X, W.half()), {}, TypeError, "weight has dtype torch.float16; it must have that of x, torch.float32"),
    ((X, W.to("meta")), {}, ValueError, "weight is on meta; it must be on the device of x, cpu"),
    ((X, W[:, :3]), {}, ValueError, r"weight has shape \(5, 3\), which .* takes 3 features; its input has 4"),
    ((X, W), {"weight_layout": "conv1d"}, ValueError, "takes 5 features; its input has 4"),
    ((X, W[0]), {}, ValueError, r"weight has shape \(4,\); it must have 2 dimensions"),
    ((X, []), {}, ValueError, "weight is an empty list"),
    ((X, [W, W], [B]), {}, ValueError, "bias holds 1 tensors; it must hold none or as many as weight, 2"),
    ((X, W, B[:4]), {}, ValueError, r"bias has shape \(4,\); it must be \(5,\)"),
    ((X, W, B[None]), {}, ValueError, r"bias has shape \(1, 5\)"),
    ((X, W, B.double()), {}, TypeError, "bias has dtype torch.float64"),
    ((X, W), {"activation": "gelo"}, ValueError, "activation='gelo' is unknown; allowed are 'none', 'gelu'"),
    (
        (X, W),
        {"weight_layout": "nn"},
        ValueError,
        "weight_layout='nn' is unknown; allowed are 'linear', 'conv1d'",
    ),
    (
        (X, W),
        {"residual": X},
        ValueError,
        r"residual has shape \(3, 4\); it must be that of the result, \(3, 5\)",
    ),
    ((X, W), {"residual": torch.zeros(3, 5).half()}, TypeError, "residual has dtype torch.float16"),
    ((X, W), {"norm_weight": B[:3]}, ValueError, r"norm_weight has shape \(3,\); it must be \(5,\)"),
    ((X, W), {"norm_bias": B}, ValueError, "norm_bias is given and norm_weight is None"),
    ((X, W), {"norm_weight": B, "norm_eps": -1.0}, ValueError, "norm_eps=-1.0 is out of range"),
    ((X, W), {"norm_kind": "batch"}, ValueError, "norm_kind='batch' is unknown; allowed are 'layer_norm'"),
    (
        (X, W),
        {"norm_weight": B, "norm_bias": B, "norm_kind": "rms_norm"},
        ValueError,
        "norm_bias is given with norm_kind='rms_norm', which has none",
    ),
    ((X, W), {"dropout_p": 1.0}, ValueError, "dropout_p=1.0 is out of range; allowed is 0 <= dropout_p < 1"),
    ((X, W), {"dropout_p": -0.1}, ValueError, "dropout_p=-0.1 is out of range"),
]


@pytest.mark.parametrize("args, kwargs, kind, message", BAD, ids=[b[3][:40] for b in BAD])
def test_bad_arguments(args: Any, kwargs: Any, kind: type[Exception], message: str) -> None:
    check_refused(bk.linear, args, kwargs, kind, message)
    args, kwargs = prepare(*args, **kwargs)
    check_refused(torch.ops.bigmodel.linear, args, kwargs, kind, message)


RAW: list[tuple[dict[str, Any], str]] = [
    ({"dropout_p": 0.5}, "dropout_seed is None with dropout_p=0.5"),
    ({"grad": torch.ones(3, 4)}, r"grad has shape \(3, 4\); it must be \(3, 5\)"),
    ({"preactivation": torch.ones(3, 4)}, r"preactivation has shape \(3, 4\); it must be \(3, 5\)"),
    ({"prenorm": torch.ones(5)}, r"prenorm has shape \(5,\); it must be \(3, 5\)"),
    ({"needs": [True]}, "needs holds 1 values; it must hold 6, for x, residual"),
    ({"needs": [False] * 2 + [True] + [False] * 3}, "asks for the gradient of norm_weight, which is None"),
    ({"dropout_seed": torch.ones(2)}, "dropout_seed has dtype torch.float32"),
]


@pytest.mark.parametrize("changes, message", RAW, ids=[r[1][:30] for r in RAW])
def test_the_gradient_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"grad": torch.ones(3, 5), "x": X, "weights": [W], "biases": [B], "needs": [True] * 2}
    arguments["needs"] = [True, False, False, False, True, True]
    with pytest.raises(ValueError, match=message):
        torch.ops.bigmodel.linear_backward(**(arguments | changes))


# The cache of packed weights. Packing is replaced by a copy, which shows what was packed.


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layouts of the packings made, in order."""
    if reason := _native.reason():
        pytest.skip(reason)
    made: list[str] = []

    def pack(weights: list[Tensor], layout: str) -> Tensor:
        made.append(layout)
        return torch.cat([w.detach().reshape(-1).clone() for w in weights])

    monkeypatch.setattr(native, "_pack", pack)
    native.clear()
    yield made  # type: ignore[misc]
    native.clear()


def assert_current(layer: nn.Linear, packings: list[str], count: int) -> None:
    for _ in range(2):  # the second time from the cache
        packed = native.packed([layer.weight], "linear")
        assert torch.equal(packed, layer.weight.detach().reshape(-1))
    assert len(packings) == count


def test_cache_follows_the_weight(packings: list[str]) -> None:
    layer = nn.Linear(20, 30)
    assert_current(layer, packings, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    assert_current(layer, packings, 2)
    layer.load_state_dict(nn.Linear(20, 30).state_dict())
    assert_current(layer, packings, 3)
    layer.to(torch.bfloat16)
    assert_current(layer, packings, 4)
    layer.weight.data.mul_(2)  # leaves the version as it is
    assert_current(layer, packings, 5)
    layer.weight.data = torch.randn(20, 20)
    assert_current(layer, packings, 6)
    with torch.no_grad():
        layer.weight[3, 3] = 7.0
    assert_current(layer, packings, 7)
    layer.weight = nn.Parameter(torch.randn(20, 20))
    assert_current(layer, packings, 8)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_cache_under_fused_and_foreach_optimizers(packings: list[str], optimizer: Any) -> None:
    for extra in ({"foreach": True}, {"fused": True}):
        native.clear()
        packings.clear()
        layer = nn.Linear(8, 9)
        steps = optimizer(layer.parameters(), lr=0.1, **extra)
        assert_current(layer, packings, 1)
        layer(torch.randn(2, 8)).sum().backward()
        steps.step()
        assert_current(layer, packings, 2)


def test_cache_of_several_weights_and_layouts(packings: list[str]) -> None:
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    for _ in range(2):
        assert native.packed([first, second], "linear").numel() == 32
        native.packed([second, first], "linear")
        native.packed([first], "linear")
        native.packed([first], "conv1d")
    assert packings == ["linear", "linear", "linear", "conv1d"]
    second.add_(1)
    native.packed([first], "linear")
    native.packed([first, second], "linear")
    assert len(packings) == 5


def test_cache_sees_not_a_number_once(packings: list[str]) -> None:
    weight = torch.full((4, 4), torch.nan)
    native.packed([weight], "linear")
    native.packed([weight], "linear")
    assert len(packings) == 1


def test_cache_of_inference_tensors(packings: list[str]) -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 4)
        native.packed([weight], "linear")
        native.packed([weight], "linear")
        assert len(packings) == 1
        weight.mul_(2)
        native.packed([weight], "linear")
        assert len(packings) == 2


def test_cache_of_transposed_and_empty_weights(packings: list[str]) -> None:
    for weight in (torch.randn(6, 9).t(), torch.randn(8, 8)[::2, ::2], torch.zeros(0, 5), torch.zeros(1, 1)):
        native.packed([weight], "linear")
        native.packed([weight], "linear")
    assert len(packings) == 4


def test_cache_dies_with_the_weights(packings: list[str]) -> None:
    weight, other = torch.randn(4, 4), torch.randn(4, 4)
    native.packed([weight, other], "linear")
    native.packed([other], "linear")
    assert native.packed_bytes([weight]) == 128 and native.packed_bytes([other]) == 192
    layer = nn.Linear(4, 4)
    native.packed([layer.weight], "linear")
    assert native.packed_bytes(layer) == 64
    del weight, layer
    gc.collect()
    assert len(native._entries) == 1 and native.packed_bytes([other]) == 64
    del other
    gc.collect()
    assert not native._entries


def test_cache_with_threads(packings: list[str]) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(50):
                weight = torch.randn(5, 5, generator=generator)
                for tensor in (weight, shared):
                    assert torch.equal(native.packed([tensor], "linear"), tensor.reshape(-1))
        except BaseException as problem:
            failures.append(problem)

    shared = torch.randn(5, 5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert len(native._entries) == 1


def test_native_linear_follows_the_weight() -> None:
    if reason := _native.reason():
        pytest.skip(reason)
    layer = nn.Linear(20, 30)
    x = torch.randn(3, 20)
    with backends.use("native"), torch.no_grad():
        for change in (lambda: None, lambda: layer.weight.data.mul_(2), lambda: layer.weight.add_(1)):
            change()
            torch.testing.assert_close(bk.linear(x, layer.weight, layer.bias), layer(x), atol=1e-4, rtol=1e-4)


def test_native_linear_packs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, without them and compiled, the operator sees the same tensor and finds its copy."""
    if reason := _native.reason():
        pytest.skip(reason)
    count, pack = [0], native._pack

    def counted(weights: list[Tensor], layout: str) -> Tensor:
        count[0] += 1
        return pack(weights, layout)

    monkeypatch.setattr(native, "_pack", counted)
    layer, x = nn.Linear(20, 30), torch.randn(3, 20)

    def forward(x: Tensor) -> Tensor:
        return bk.linear(x, layer.weight, layer.bias)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with backends.use("native"):
        for _ in range(2):
            forward(x).sum().backward()
            compiled(x).sum().backward()
            with torch.no_grad():
                forward(x)
                compiled(x)
    assert count == [1]
