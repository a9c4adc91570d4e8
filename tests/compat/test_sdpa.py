"""torch's scaled_dot_product_attention on our kernels: exactly torch's meaning, and torch for the rest."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends, verify
from bigmodel_kernels.compat import sdpa as door
from bigmodel_kernels.ops.philox import keep_attention

OPERATORS = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_efficient_attention_backward",
)
BACKENDS = ["reference", *([] if _native.reason() else ["native"])]


def dispatcher() -> list[str]:
    return [torch._C._dispatch_dump_table(name) for name in OPERATORS]


UNTOUCHED = dispatcher()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    assert dispatcher() == UNTOUCHED
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of ours that ran; plain PyTorch of ours may, for a test where nothing is built."""
    names: list[str] = []
    run = backends.run

    def spy(op: str, *args: Any) -> Any:
        names.append(op)
        return run(op, *args)

    monkeypatch.setattr(backends, "run", spy)
    monkeypatch.setenv("BIGMODEL_BACKEND", BACKENDS[-1])
    return names


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    keep: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """scaled_dot_product_attention by torch's documentation, in any dtype."""
    if query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.to(logits.dtype)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    return (weights if keep is None else weights * keep) @ value


def check(call: dict[str, Any], out: Tensor, grads: tuple[Tensor, ...], upstream: Tensor) -> None:
    """Result and gradients by the numerics rule: as near to float64 as the formula in the dtype is."""
    results = {}
    for dtype in (torch.float64, out.dtype):
        inside = {
            name: value.detach().to(dtype).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in call.items()
        }
        expected = formula(**inside)
        leaves = [t for t in inside.values() if isinstance(t, Tensor) and t.requires_grad]
        wanted = torch.autograd.grad(expected, leaves, upstream.to(dtype)) if leaves else ()
        results[dtype] = (expected.detach(), *wanted)
    for n, ours in enumerate((out, *grads)):
        exact, eager = results[torch.float64][n], results[out.dtype][n]
        assert ours.shape == exact.shape
        verdict = verify.compare(ours, eager, exact, "forward" if n == 0 else "gradient")
        # The operator is held to the limits by its own tests. A few rows may be above them by chance.
        assert verdict.max_error <= 3 * verdict.max_limit, (n, verdict)
        assert verdict.mean_error <= 3 * verdict.mean_limit, (n, verdict)


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Calls that ours take: any rank, mask, scale, and strides."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    lead = draw(st.sampled_from([(), (3,), (2, 4), (2, 4), (1, 6), (2, 3, 2), (2, 1, 2, 4)]))
    rows, keys, dim = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([1, 8, 17, 64])),
    )
    kv_lead = lead
    if lead and lead[-1] % 2 == 0 and draw(st.booleans()):
        kv_lead = (*lead[:-1], lead[-1] // 2)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    query, key, value = (
        torch.randn(*size).to(dtype) for size in ((*lead, rows, dim), *[(*kv_lead, keys, dim)] * 2)
    )
    if draw(st.booleans()):  # neither dense nor with a contiguous last dimension
        query = query.mT.contiguous().mT
        key = torch.cat([key, key], -1)[..., :dim]
    call: dict[str, Any] = {"query": query, "key": key, "value": value, "enable_gqa": kv_lead != lead}
    call["scale"] = draw(st.sampled_from([None, None, 0.3, -0.5]))
    kind = draw(st.sampled_from(["none", "causal", "bool", "float", "blind"]))
    if kind == "causal":
        call["is_causal"] = True
    elif kind != "none":
        size = [n if draw(st.booleans()) else 1 for n in (*lead, rows)] + [draw(st.sampled_from([1, keys]))]
        size = size[draw(st.integers(0, len(lead))) :]
        mask = torch.rand(size) < 0.6
        if kind == "blind":
            mask[..., 0, :] = False
        call["attn_mask"] = mask
        if kind == "float":
            call["attn_mask"] = torch.randn(size).to(draw(st.sampled_from([dtype, torch.float32])))
    for name in ("query", "key", "value", "attn_mask"):
        if name == "attn_mask" and name in call and call[name].shape[-1] == 1:
            continue  # the same for all keys changes nothing: its gradient is what rounding leaves
        if name in call and call[name].is_floating_point() and draw(st.booleans()):
            call[name].requires_grad_()
    return call


@settings(max_examples=150)
@given(call=calls(), backend=st.sampled_from(BACKENDS))
def test_any_call_means_what_torch_says(call: dict[str, Any], backend: str) -> None:
    leaves = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    with backends.use(backend):
        assert bk.sdpa_reason(**call) is None
        with bk.sdpa():
            out = scaled_dot_product_attention(**call)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream) if leaves else ()
    check(call, out.detach(), grads, upstream)


@settings(max_examples=100)
@given(call=calls())
def test_it_is_as_torch_has_it(call: dict[str, Any]) -> None:
    """Against torch itself, where the formula of this file would be wrong in the same way as ours."""
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernel gives nan for a negative scale with is_causal
        expected = scaled_dot_product_attention(
            **{k: v.double() if _floats(v) else v for k, v in call.items()}
        )
    with backends.use(BACKENDS[-1]), bk.sdpa():
        out = scaled_dot_product_attention(**call)
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[out.dtype]
    torch.testing.assert_close(out.double(), expected, atol=bound, rtol=bound)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def tensors(*size: int, grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_(grad) for t in torch.randn(3, *(size or (2, 4, 9, 16))).unbind())


# ------------------------------------------------------------------------------------------------------------
# what is torch's


Q, K, V = torch.randn(3, 2, 4, 9, 16)
STAYS: dict[str, tuple[str, tuple[Tensor, ...], dict[str, Any]]] = {
    "float64": ("dtype torch.float64", (Q.double(), K.double(), V.double()), {}),
    "value of another size": ("one shape for both", (Q, K, V[..., :8]), {}),
    "heads above 256": ("up to 256", tuple(torch.randn(3, 1, 1, 2, 257).unbind()), {}),
    "no rows": ("empty", (Q[:, :, :0], K, V), {}),
    "no keys": ("empty", (Q, K[:, :, :0], V[:, :, :0]), {}),
    "no batch": ("empty", (Q[:0], K[:0], V[:0]), {}),
    "no elements": ("empty", (Q[..., :0], K[..., :0], V[..., :0]), {}),
    "one batch for all": ("leading dimensions", (Q, K[:1], V[:1]), {}),
    "one head for all": ("leading dimensions", (Q, K[:, :1], V[:, :1]), {}),
    "ranks": ("number of dimensions", (Q, K[0], V[0]), {}),
    "everything dropped": ("dropout_p=1", (Q, K, V), {"dropout_p": 1.0}),
    "mask and causal": ("is_causal", (Q, K, V), {"attn_mask": torch.randn(9, 9), "is_causal": True}),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_ours_do_not_take_is_torchs(name: str, ran: list[str]) -> None:
    match, args, options = STAYS[name]
    expected = scaled_dot_product_attention(*args, **options)
    with bk.sdpa():
        out = scaled_dot_product_attention(*args, **options)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    assert match in str(bk.sdpa_reason(*args, **options)) and not ran


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((Q, K[:, :2], V[:, :2]), {}),  # no enable_gqa
        ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}),
        ((Q, K, V), {"dropout_p": 1.5}),
        ((Q, K, V.double()), {}),
        ((Q, K, V), {"attn_mask": torch.ones(9, 9, dtype=torch.int32)}),
        ((Q, K, V), {"attn_mask": torch.zeros(9, 8)}),
        ((Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0]), {}),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(args: Any, options: Any) -> None:
    try:
        expected: Any = scaled_dot_product_attention(*args, **options)
    except Exception as error:
        expected = error
    assert bk.sdpa_reason(*args, **options) is not None
    with bk.sdpa():
        if isinstance(expected, Tensor):
            torch.testing.assert_close(scaled_dot_product_attention(*args, **options), expected)
            return
        with pytest.raises(type(expected)) as raised:
            scaled_dot_product_attention(*args, **options)
    assert str(raised.value).splitlines()[0] == str(expected).splitlines()[0]


def test_without_a_kernel_of_ours_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = backends.TABLE["attention", "cpu"][-1:]
    monkeypatch.setitem(backends.TABLE, ("attention", "cpu"), reference)
    monkeypatch.delenv("BIGMODEL_BACKEND", raising=False)
    assert "no kernel of ours" in str(bk.sdpa_reason(Q, K, V))
    monkeypatch.setattr(backends, "run", lambda *args: pytest.fail("ours ran"))
    with bk.sdpa():
        scaled_dot_product_attention(Q, K, V)
    with backends.use("reference"):
        assert bk.sdpa_reason(Q, K, V) is None


def test_the_choice_of_torchs_backends_is_heard(ran: list[str]) -> None:
    """Under MATH the call is torch's, with its second derivative."""
    query, key, value = tensors(grad=True)
    with bk.sdpa(), sdpa_kernel(SDPBackend.MATH):
        assert "leaves out FLASH_ATTENTION" in str(bk.sdpa_reason(query, key, value))
        out = scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        grad.square().sum().backward()
    assert not ran
    with bk.sdpa(), sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]):
        scaled_dot_product_attention(query, key, value)
    assert ran == ["attention"]


def test_a_second_derivative_says_what_to_do() -> None:
    query, key, value = tensors(grad=True)
    with backends.use(BACKENDS[-1]), bk.sdpa():
        out = scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(NotImplementedError, match="MATH"):
            grad.sum().backward()


# ------------------------------------------------------------------------------------------------------------
# dropout


@pytest.mark.parametrize("lead", [(2, 4), (5,), (2, 3, 4)])
def test_dropout_drops_by_torchs_generator(lead: tuple[int, ...], ran: list[str]) -> None:
    query, key, value = (t.requires_grad_() for t in torch.randn(3, *lead, 19, 16).unbind())
    torch.manual_seed(5)
    seed = torch.randint(0, 2**62, ())
    torch.manual_seed(5)
    with bk.sdpa():
        out = scaled_dot_product_attention(query, key, value, dropout_p=0.3)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, (query, key, value), upstream)
    four = (1,) * (2 - len(lead)) + lead if len(lead) < 3 else (math.prod(lead[:-1]), lead[-1])
    like = torch.empty(*four, 19, 19)
    keep = keep_attention(seed, 0.3, 0, four[1], slice(0, 19), slice(0, 19), like).view(*lead, 19, 19)
    call = {"query": query, "key": key, "value": value, "keep": keep}
    check(call, out.detach(), grads, upstream)
    assert ran == ["attention", "attention_backward"]


def test_a_fused_kernel_leaves_dropout_to_torch() -> None:
    """Its backward would have to know whose seed it was given."""
    with bk.sdpa():
        assert door._ours(Q, K, V, None, 0.1, False, None) is None


# ------------------------------------------------------------------------------------------------------------
# the switch


def test_on_and_off(ran: list[str]) -> None:
    bk.activate_sdpa()
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "bigmodel"
        bk.activate_sdpa()
        scaled_dot_product_attention(Q, K, V)
        thread = threading.Thread(target=scaled_dot_product_attention, args=(Q, K, V))
        thread.start()
        thread.join()
        assert ran == ["attention"] * 2
        with bk.sdpa():
            bk.deactivate_sdpa()
            scaled_dot_product_attention(Q, K, V)
            assert len(ran) == 3
    finally:
        bk.deactivate_sdpa()
    bk.deactivate_sdpa()
    scaled_dot_product_attention(Q, K, V)
    assert len(ran) == 3


def test_torchs_registry_switches_it(ran: list[str]) -> None:
    assert "bigmodel" in torch.nn.attention.list_flash_attention_impls()
    torch.nn.attention.activate_flash_attention_impl("bigmodel")
    try:
        scaled_dot_product_attention(Q, K, V)
        torch.nn.attention.activate_flash_attention_impl("bigmodel")
        scaled_dot_product_attention(Q, K, V)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    scaled_dot_product_attention(Q, K, V)
    assert ran == ["attention"] * 2


def test_another_implementation_of_the_registry_is_not_put_out_of_place() -> None:
    class Handle:
        removed = False

        def remove(self) -> None:
            self.removed = True

    from torch.nn.attention import _registry

    handle = Handle()
    torch.nn.attention.register_flash_attention_impl("other", register_fn=lambda: handle)
    torch.nn.attention.activate_flash_attention_impl("other")
    try:
        with pytest.raises(RuntimeError, match="'other' is active"), bk.sdpa():
            pass
        assert dispatcher() == UNTOUCHED
        bk.activate_sdpa()  # as for every implementation, torch restores its own kernels first
        assert handle.removed
        torch.nn.attention.activate_flash_attention_impl("other")
        assert dispatcher() == UNTOUCHED
        bk.deactivate_sdpa()  # is off already
        assert torch.nn.attention.current_flash_attention_impl() == "other"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        del _registry._FLASH_ATTENTION_IMPLS["other"]


def test_a_block_is_of_its_thread_and_task(ran: list[str]) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with bk.sdpa():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    scaled_dot_product_attention(Q, K, V)
    assert not ran
    with bk.sdpa():
        done.set()
        thread.join()
        scaled_dot_product_attention(Q, K, V)
    assert ran == ["attention"]

    async def task(on: bool) -> None:
        if not on:
            await asyncio.sleep(0.01)
            scaled_dot_product_attention(Q, K, V)
            return
        with bk.sdpa():
            await asyncio.sleep(0.05)

    async def both() -> None:
        await asyncio.gather(task(True), task(False))

    asyncio.run(both())
    assert ran == ["attention"]


def test_threads_may_switch_while_others_call() -> None:
    expected = scaled_dot_product_attention(Q, K, V)
    wrong: list[Any] = []

    def work(n: int) -> None:
        try:
            for i in range(30):
                if n % 2 and i % 3 == 0:
                    with bk.sdpa():
                        out = scaled_dot_product_attention(Q, K, V)
                else:
                    out = scaled_dot_product_attention(Q, K, V)
                torch.testing.assert_close(out, expected)
                (bk.activate_sdpa if n == 0 and i % 2 else bk.deactivate_sdpa)()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bk.deactivate_sdpa()
    assert not wrong


def test_a_registration_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = torch.library.Library.impl

    def fails_late(self: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            raise RuntimeError("no more room")
        impl(self, name, *args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", fails_late)
    for switch in (bk.activate_sdpa, bk.sdpa().__enter__):
        with pytest.raises(RuntimeError, match="no more room"):
            switch()
        assert dispatcher() == UNTOUCHED
        assert door._users == 0 and door._everywhere is None
    scaled_dot_product_attention(Q, K, V)


def test_an_error_inside_a_block_closes_it() -> None:
    with pytest.raises(KeyError), bk.sdpa():
        raise KeyError
    assert dispatcher() == UNTOUCHED


# ------------------------------------------------------------------------------------------------------------
# the rest of torch


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True) * 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_follows_the_switch(backend: str, ran: list[str]) -> None:
    torch._dynamo.reset()
    query, key, value = tensors(grad=True)
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    expected = attend(query, key, value)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    for on in (False, True, False):
        if on:
            bk.activate_sdpa()
        try:
            out = compiled(query, key, value)
            grads = torch.autograd.grad(out, (query, key, value), upstream)
        finally:
            bk.deactivate_sdpa()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grads, gradients)
        assert ran == (["attention", "attention_backward"] if on else [])
        ran.clear()


def test_compiling_while_it_is_on(ran: list[str]) -> None:
    torch._dynamo.reset()
    query, key, value = tensors()
    with bk.sdpa():
        out = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)(query, key, value)
        program = torch.export.export(_Attend(), (query, key, value))
    assert ran == ["attention"]
    torch.testing.assert_close(out, attend(query, key, value))
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in names
    torch.testing.assert_close(program.module()(query, key, value), out)


class _Attend(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_torchs_with_our_fused_kernels(ran: list[str]) -> None:
    query, key, value = tensors(3, 2, 4, 9, 16)
    expected = torch.vmap(attend)(query, key, value)
    with bk.sdpa():
        torch.testing.assert_close(torch.vmap(attend)(query, key, value), expected)
    assert ran == ["attention"] * 3

    def loss(query: Tensor) -> Tensor:
        return attend(query, key[0], value[0]).sum()

    expected = torch.func.grad(loss)(query[0])
    with bk.sdpa():
        torch.testing.assert_close(torch.func.grad(loss)(query[0]), expected)
        with sdpa_kernel(SDPBackend.MATH):
            hessian = torch.func.jvp(torch.func.grad(loss), (query[0],), (query[1],))[1]
    assert torch.isfinite(hessian).all()


def test_forward_mode_is_torchs() -> None:
    query, key, value = tensors(3, 9, 16)  # torch's formula, which has a forward derivative
    with bk.sdpa(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
        assert "forward-mode" in str(bk.sdpa_reason(dual, key, value))
        out = torch.autograd.forward_ad.unpack_dual(scaled_dot_product_attention(dual, key, value))
    assert out.tangent is not None


def test_a_mode_sees_torchs_operators(ran: list[str]) -> None:
    class Names(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with bk.sdpa(), Names() as mode:
        scaled_dot_product_attention(Q, K, V)
    assert mode.names == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    assert ran == ["attention"]


def test_autocast_casts_as_torch_does(ran: list[str]) -> None:
    query, key, value = tensors(grad=True)
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16), bk.sdpa():
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out.sum().backward()
    assert out.dtype == torch.bfloat16 and query.grad is not None and query.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), formula(query, key, value, mask), atol=0.05, rtol=0.05)
    assert ran == ["attention", "attention_backward"]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compiled(query, key, value)
        with bk.sdpa():
            assert compiled(query, key, value).dtype == inside.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), bk.sdpa():
        # A fused kernel that is called below autocast keeps the types that it was given.
        outs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(Q, K, V)
    assert outs[0].dtype == torch.float32


def test_inference_script_checkpoint_and_trace(ran: list[str]) -> None:
    query, key, value = tensors(grad=True)
    expected = attend(query, key, value)
    scripted = torch.jit.script(_scripted)
    with bk.sdpa():
        with torch.inference_mode():
            torch.testing.assert_close(attend(query, key, value), expected)
        torch.testing.assert_close(scripted(query, key, value), expected)
        assert ran == ["attention"] * 2
        out = checkpoint(attend, query, key, value, use_reentrant=False)
        out.sum().backward()
        assert ran[2:] == ["attention", "attention", "attention_backward"]
        with torch.no_grad():
            traced = torch.jit.trace(attend, (query, key, value))
    torch.testing.assert_close(traced(query, key, value), expected)
    assert "bigmodel" not in str(traced.graph)


def _scripted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True) * 2


@pytest.mark.parametrize("masked", [False, True])
def test_modules_of_torch(masked: bool, ran: list[str]) -> None:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4]) if masked else None
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def run() -> tuple[Tensor, Tensor]:
        return (
            attention(x, x, x, key_padding_mask=padding, need_weights=False)[0],
            layer(x, src_key_padding_mask=padding),
        )

    expected = run()
    with bk.sdpa():
        torch.testing.assert_close(run(), expected)
    assert ran == ["attention"] * 2
    layer.self_attn.dropout = 0.1
    with bk.sdpa():
        layer(x).sum().backward()
    assert ran[2:] == ["attention", "attention_backward"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_other_classes_are_torchs() -> None:
    query, (key, value) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 4, 9, 8)
    masks = [bias(5, 9) for bias in (causal_lower_right, causal_upper_left)]
    cases = [((query, key, value), {"attn_mask": mask}) for mask in masks]
    parts = [torch.randn(4, 3, 8), torch.randn(4, 5, 8)]
    jagged = torch.nested.nested_tensor([t.transpose(0, 1) for t in parts], layout=torch.jagged).transpose(
        1, 2
    )
    cases += [((nested,) * 3, {}) for nested in (jagged, torch.nested.nested_tensor(parts))]
    for args, options in cases:
        expected = scaled_dot_product_attention(*args, **options)
        assert "class of its own" in str(bk.sdpa_reason(*args, **options))
        with bk.sdpa():
            out = scaled_dot_product_attention(*args, **options)
        if out.is_nested:
            out, expected = out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0)
        torch.testing.assert_close(out, expected)


def test_a_model_of_transformers(ran: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50)
    model = transformers.BertModel._from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = model(ids, attention_mask=mask).last_hidden_state
    with bk.sdpa():
        out = model(ids, attention_mask=mask).last_hidden_state
        assert ran == ["attention"] * 2
        model.train()(ids, attention_mask=mask).last_hidden_state.sum().backward()
    assert ran[2:] == ["attention"] * 2 + ["attention_backward"] * 2
    torch.testing.assert_close(out, expected)


def test_the_layout_is_that_of_torchs_fused_kernels(ran: list[str]) -> None:
    heads_last = torch.randn(2, 9, 4, 16).transpose(1, 2)
    with bk.sdpa():
        out = scaled_dot_product_attention(heads_last, K, V)
        flat = scaled_dot_product_attention(Q[0], K[0], V[0])
    assert out.transpose(1, 2).is_contiguous() and flat.is_contiguous()
    assert len(ran) == 2


# ------------------------------------------------------------------------------------------------------------
# the fused kernels

FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.mark.parametrize("keys", [9, 14, 5])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "blind", "gqa", "scale"])
def test_forward_and_backward_of_either_hand_go_together(kind: str, keys: int, ran: list[str]) -> None:
    """Every output of the fused kernels is torch's, strides and logsumexp too."""
    query, (key, value) = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 4, keys, 16)
    options: dict[str, Any] = {}
    if kind == "gqa":
        key, value = key[:, :2], value[:, :2]
    if kind == "scale":
        options["scale"] = 0.7
    if kind in ("mask", "blind"):
        options["attn_mask"] = torch.randn(2, 1, 9, keys)
        if kind == "blind":
            options["attn_mask"][0, 0, 3] = -torch.inf
    causal = kind == "causal"
    out, logsumexp = FUSED(query, key, value, 0.0, causal, **options)
    with bk.sdpa():
        ours = FUSED(query, key, value, 0.0, causal, **options)
    grad = torch.randn_like(out)
    torch.testing.assert_close(ours, (out, logsumexp))
    assert [t.stride() for t in ours] == [out.stride(), logsumexp.stride()]
    if kind == "gqa":
        return  # torch takes no backward of it here; autograd's is repeated heads
    args = (grad, query, key, value)
    expected = FUSED_BACKWARD(*args, out, logsumexp, 0.0, causal, **options)
    with bk.sdpa():
        results = [FUSED_BACKWARD(*args, out, logsumexp, 0.0, causal, **options)]
    results.append(FUSED_BACKWARD(*args, *ours, 0.0, causal, **options))
    for result in results:
        torch.testing.assert_close(result, expected)
        assert [t.stride() for t in result] == [t.stride() for t in expected]
    assert ran == ["attention", "attention_backward"]


class _Torchs:
    """Stands for torch's own kernel, and counts its calls."""

    calls = 0

    def call_boxed(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1


def _leaves() -> tuple[list[Tensor], Tensor]:
    leaves = [t.requires_grad_() for t in torch.randn(3, 2, 9, 4, 16).transpose(2, 3)]
    return leaves, torch.randn(2, 4, 9, 16)


def _like_torchs(op: Any, results: Any, *args: Any) -> None:
    """Shapes, strides and dtypes are those that a compiled graph counts on, by torch's own rule."""
    expected = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    for ours, theirs in zip(results, expected, strict=True):
        if theirs is None or isinstance(theirs, int):
            assert ours == theirs
        else:
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


# The kernels for CUDA, called with tensors of the CPU: what they compute and return does not depend on the
# device.


@pytest.mark.parametrize("causal", [False, True])
def test_the_flash_kernel_for_cuda(causal: bool, ran: list[str]) -> None:
    leaves, grad = _leaves()
    query, key, value = (t.detach() for t in leaves)
    expected = formula(*leaves, is_causal=causal)
    torchs = _Torchs()
    with bk.sdpa():
        out, logsumexp, *rest = door._flash_forward(torchs, None, query, key, value, 0.0, causal)
        assert out.stride() == query.stride() and logsumexp.shape == (2, 4, 9)
        assert rest[:4] == [None, None, 9, 9] and rest[4].dtype == torch.uint64
        given = (grad, query, key, value, out, logsumexp, *rest[:4], 0.0, causal, rest[4], rest[5])
        grads = door._flash_backward(torchs, None, *given)
        assert torchs.calls == 0 and ran == ["attention", "attention_backward"]
        door._flash_forward(torchs, None, query, key, value, 0.1)
        door._flash_forward(torchs, None, query, key[:, :, :5], value[:, :, :5], 0.0, True)
        door._flash_forward(torchs, None, query, key, value, 0.0, False, True)
        assert torchs.calls == 3
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, grad))
    assert [g.stride() for g in grads] == [t.stride() for t in (query, key, value)]
    door._flash_forward(torchs, None, query, key, value)
    assert torchs.calls == 4  # off


@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_the_other_fused_kernels_for_cuda(name: str, kind: str, ran: list[str]) -> None:
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention_backward").default
    ours, ours_backward = getattr(door, f"_{name}_forward"), getattr(door, f"_{name}_backward")
    leaves, grad = _leaves()
    query, key, value = (t.detach() for t in leaves)
    bias = torch.randn(2, 1, 9, 9) if kind == "mask" else None
    causal = kind == "causal"
    expected = formula(*leaves, attn_mask=bias, is_causal=causal)
    torchs = _Torchs()
    with bk.sdpa():
        given = (query, key, value, bias, True, 0.0, causal)
        results = ours(torchs, None, *given)
        _like_torchs(forward, results, *given)
        out, logsumexp, *rest = results
        if name == "cudnn":
            given = (grad, query, key, value, out, logsumexp, *rest[4:6], bias, *rest[:4], 0.0, causal)
        else:
            wanted = [True, True, True, False]
            given = (grad, query, key, value, bias, out, logsumexp, *rest, 0.0, wanted, causal)
        grads = ours_backward(torchs, None, *given)
        _like_torchs(backward, grads, *given)
        assert torchs.calls == 0 and ran == ["attention", "attention_backward"]
        ours(torchs, None, query, key, value, bias, True, 0.1, causal)
        ours(torchs, None, query, key[:, :, :5], value[:, :, :5], None, True, 0.0, True)
        if name == "cudnn":
            ours(torchs, None, query, key, value, bias, True, 0.0, causal, True)
        else:
            assert ours(torchs, None, query, key, value, bias, False, 0.0, causal)[1].shape == (2, 4, 0)
            ours_backward(torchs, None, *given[:10], [True] * 4, causal)  # the mask wants a gradient
        assert torchs.calls == 3
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads[:3], torch.autograd.grad(expected, leaves, grad))
    ours(torchs, None, query, key, value, None, True)
    assert torchs.calls == 4  # off
