"""The short way to an operator gives what the dispatcher gives, and is taken only where nobody listens."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bigmodel_kernels as bk
from bigmodel_kernels.ops import registration


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


class Marked(Tensor):
    """A subclass that answers for itself."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the implementations that were called directly."""
    names: list[str] = []

    def watched(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: object, **options: object) -> Tensor:
            names.append(name)
            return run(*args, **options)

        return wrapper

    for name, run in list(registration._IMPLEMENTATIONS.items()):
        monkeypatch.setitem(registration._IMPLEMENTATIONS, name, watched(name, run))
    return names


def norm(x: Tensor) -> Tensor:
    weight = torch.linspace(1, 2, x.shape[-1])
    return registration.call("layer_norm", x, weight, None, 1e-5, None)


def x() -> Tensor:
    return torch.randn(3, 17, generator=torch.Generator().manual_seed(0))


def test_direct_without_gradients(taken: list[str]) -> None:
    expected = norm(x())
    assert taken == []
    with torch.no_grad():
        assert torch.equal(norm(x()), expected)
    with torch.inference_mode():
        assert torch.equal(norm(x()), expected)
    assert taken == ["layer_norm"] * 2


@pytest.mark.parametrize(
    "listener",
    [lambda: torch.autocast("cpu", dtype=torch.bfloat16), Functions, Dispatches, torch.enable_grad],
    ids=["autocast", "function mode", "dispatch mode", "gradients"],
)
def test_by_the_dispatcher_where_somebody_listens(
    taken: list[str], listener: Callable[[], AbstractContextManager[object]]
) -> None:
    with torch.no_grad(), listener():
        norm(x())
    assert taken == []


def test_by_the_dispatcher_for_other_tensors(taken: list[str]) -> None:
    with torch.no_grad():
        norm(x().as_subclass(Marked))
        meta = registration.call("layer_norm", x().to("meta"), None, None, 1e-5, None)
    with torch.no_grad(), FakeTensorMode():
        fake = registration.call("layer_norm", torch.empty(3, 17), None, None, 1e-5, None)
    assert taken == []
    assert meta.shape == fake.shape == (3, 17)


def test_a_weight_that_is_a_subclass_in_a_list(taken: list[str]) -> None:
    weights = [torch.ones(4, 17), torch.ones(4, 17).as_subclass(Marked)]
    with torch.no_grad():
        out = registration.call("linear", x(), weights, [], None, None, None)
    assert taken == []
    assert out.shape == (3, 8)


@pytest.mark.parametrize("mode", [torch.no_grad, nullcontext])
def test_bad_input_raises_on_both_ways(mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode(), pytest.raises(ValueError, match="weight has shape"):
        registration.call("layer_norm", x(), torch.ones(5), None, 1e-5, None)


@pytest.mark.parametrize("mode", [torch.no_grad, nullcontext])
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q: bk.attention(None, q, q), "query=None is of type NoneType; it must be Tensor"),
        (lambda q: bk.attention(q, q, q, bias=1.0), "bias=1.0 is of type float; it must be Tensor"),
        (lambda q: bk.attention(q, q, q, window=(1.5, 0)), "window=(1.5, 0) is of type tuple; it must be"),
        (lambda q: bk.attention(q, q, q, softcap=None), "softcap=None is of type NoneType; it must be float"),
        (lambda q: bk.attention_decode(q, q, q, [2]), "cache_seqlens=[2] is of type list; it must be Tensor"),
        (lambda q: bk.attention_probabilities(q, q, heads=1), "heads=1 is of type int; it must be Sequence"),
        (lambda q: bk.linear(q, [q, 3]), "weight=["),
        (lambda q: bk.feed_forward(q, q, None, q, None, activation=3), "activation=3 is of type int"),
        (lambda q: bk.layer_norm(q, None, None, "a"), "eps='a' is of type str; it must be float"),
        (lambda q: bk.rms_norm([1.0], None), "x=[1.0] is of type list; it must be Tensor"),
        (lambda q: bk.rotary(q, q, q, 1), "sin=1 is of type int; it must be Tensor"),
        (lambda q: bk.embedding([1], q), "input_ids=[1] is of type list; it must be Tensor"),
        (lambda q: bk.linear_cross_entropy(q, q, 1), "target=1 is of type int; it must be Tensor"),
    ],
)
def test_an_argument_of_another_type_is_named(
    call: Callable[[Tensor], object], message: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    with mode(), pytest.raises(TypeError, match=re.escape(message)):
        call(torch.ones(1, 2, 3, 8))


def test_an_error_of_another_kind_stays_as_it_is() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        bk.attention(x(), x())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"key has dtype torch\.float16"):
        bk.attention(x(), x().half(), x())


@pytest.mark.parametrize("mode", [torch.no_grad, nullcontext])
def test_a_derivative_in_forward_mode_is_refused(mode: Callable[[], AbstractContextManager[None]]) -> None:
    """An operator without one would be a constant to torch."""
    with mode(), pytest.raises(NotImplementedError, match="linear has no forward-mode derivative"):
        torch.func.jvp(lambda w: bk.linear(x(), [w]), (torch.ones(5, 17),), (torch.ones(5, 17),))
    with mode(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x(), x())
        with pytest.raises(NotImplementedError, match="layer_norm has no forward-mode derivative"):
            norm(dual)
        assert norm(x()).isfinite().all()  # others are not concerned
