"""What every operator must stand, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from bigmodel_kernels import backends, verify

Call = tuple[tuple[Any, ...], dict[str, Any]]


def kept_or_dropped(calls: dict[str, Call], dropped: dict[str, Call]) -> pytest.MarkDecorator:
    """Parametrizes a gradient's opcheck with `calls_of`, without dropout or with, and `stored`, whether it is
    given what the training form kept. Neither changes how torch sees the other: the crossed pairs are slow.
    """
    return pytest.mark.parametrize(
        ("calls_of", "stored"),
        [
            pytest.param(calls, True, id="stored"),
            pytest.param(dropped, False, id="dropout"),
            pytest.param(calls, False, id="not stored", marks=pytest.mark.slow),
            pytest.param(dropped, True, id="dropout, stored", marks=pytest.mark.slow),
        ],
    )


def double_leaves(call: Call) -> tuple[Call, tuple[Tensor, ...]]:
    """The call in float64 with leaves that want gradients, and those leaves."""
    leaves: list[Tensor] = []

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().double().requires_grad_())
            return leaves[-1]
        if isinstance(value, (list, tuple)):
            return type(value)(walk(v) for v in value)
        return {k: walk(v) for k, v in value.items()} if isinstance(value, dict) else value

    changed = walk(call)
    return changed, tuple(leaves)


def rebuild(call: Call, tensors: list[Tensor]) -> Call:
    """The call with its floating tensors replaced, in order."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return tensors.pop(0)
        if isinstance(value, (list, tuple)):
            return type(value)(walk(v) for v in value)
        return {k: walk(v) for k, v in value.items()} if isinstance(value, dict) else value

    return walk(call)


def check_gradients(function: Callable[..., Any], call: Call, *, second: bool = False) -> None:
    """gradcheck in every floating argument; a second derivative raises, and says so."""
    call, leaves = double_leaves(call)

    def of_leaves(*tensors: Tensor) -> Any:
        args, kwargs = rebuild(call, list(tensors))
        return function(*args, **kwargs)

    assert torch.autograd.gradcheck(of_leaves, leaves)
    if second:
        gradient = torch.autograd.grad(of_leaves(*leaves).square().sum(), leaves[0], create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            gradient.sum().backward()


def check_each_gradient_alone(function: Callable[..., Any], call: Call) -> None:
    """Only one argument wants a gradient: it gets the same as when all do, and no other gets any."""
    call, leaves = double_leaves(call)
    args, kwargs = call
    together = torch.autograd.grad(function(*args, **kwargs).square().sum(), leaves)
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        args, kwargs = rebuild(call, list(alone))
        function(*args, **kwargs).square().sum().backward()
        torch.testing.assert_close(alone[i].grad, expected)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


def check_operator(op: Any, call: Call, backend: str) -> None:
    """opcheck: schema, autograd registration, fake tensors, and AOT with dynamic shapes."""
    with backends.use(backend):
        torch.library.opcheck(op, *call)


def check_compiled(function: Callable[..., Any], call: Call) -> None:
    """torch.compile with no graph break gives the same result and gradients."""
    torch._dynamo.reset()  # tests share code objects, and Dynamo limits how often one is compiled
    call, leaves = double_leaves(call)
    args, kwargs = call

    def scaled(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 2

    expected = scaled(*args, **kwargs)
    out = torch.compile(scaled, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    )


def check_checkpointed(function: Callable[..., Any], call: Call) -> None:
    """Gradient checkpointing gives the same gradients."""
    call, leaves = double_leaves(call)
    args, kwargs = call
    expected = torch.autograd.grad(function(*args, **kwargs).square().sum(), leaves)
    out = checkpoint(lambda: function(*args, **kwargs), use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected)


class Sizes(TorchDispatchMode):
    """Counts the matrix products, and keeps the number of elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = function.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_", "linear", "bmm")
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def require(backend: str, op: str, args: Any, options: Any) -> None:
    """The backend can run the call; if not, the test fails with the reason."""
    with backends.use(backend):
        error = backends.explain_call(op, args[0].device.type, args, options).error
    assert error is None, error


def with_seed(operator: Any, prepare: Callable[..., Any], seed: int = 7) -> Callable[..., Any]:
    """The raw operator's first result for the arguments of the public function, with this dropout seed."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        raw, options = prepare(*args, **kwargs)
        seeded = (torch.tensor(seed) if isinstance(a, Tensor) and a.shape == () else a for a in raw)
        result = operator(*seeded, **options)
        return result if isinstance(result, Tensor) else result[0]

    return function


def check_case(case: verify.Case, backend: str) -> None:
    """The case meets the numerics rule on the backend, which has to support it."""
    result = verify.run_case(case, backend)
    assert result.ok and result.skipped is None, str(result)


def check_refused(
    function: Callable[..., Any], args: Any, kwargs: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        function(*args, **kwargs)
