"""torch.nn.functional.scaled_dot_product_attention on our kernels, while it is switched on.

While it is on, kernels of ours stand in the dispatcher at two places, with torch's own kept to fall back on:

1. `aten::scaled_dot_product_attention` itself, on the CPU and on CUDA, above autograd. Every eager call comes
   by, and what `bigmodel::attention` can compute it does: dropout, a mask that wants a gradient, 2, 3, 5 or
   more dimensions, all of which torch computes with the whole matrix of probabilities on the CPU.
2. The fused kernels that torch chooses below autograd, forward and backward. Graphs of torch.compile, maps of
   vmap, calls under dispatch modes and calls of function transforms hold these operators, and keep torch's
   rules for gradients and maps. What the kernels return is what torch's return, to the logsumexp, so that the
   forward of one goes with the backward of the other, and a compiled graph follows the switch when it runs.

torch's registry of flash attention implementations knows this one as "bigmodel".
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import backends
from bigmodel_kernels.ops.attention import prepare
from bigmodel_kernels.ops.registration import (
    broadcasts,
    call,
    draw_seed,
    implementation,
    shape,
    unobserved,
)

NAME = "bigmodel"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)

# ------------------------------------------------------------------------------------------------------------
# the switch

_lock = threading.RLock()
_users = 0  # the blocks that are open, and one for the process
_library: torch.library.Library | None = None
_everywhere: _Process | None = None
_here: ContextVar[bool] = ContextVar("sdpa", default=False)
# What has stood in the dispatcher. A thread may have picked a kernel and not entered it yet while another
# thread takes it out: torch would free it under that call.
_kept: list[Any] = []


def activate_sdpa() -> None:
    """From now on scaled_dot_product_attention runs on our kernels where it can, in the whole process.

    Affects `torch.nn.functional.scaled_dot_product_attention` on CPU and CUDA tensors, from Python, from
    TorchScript and from C++, and what calls it, such as nn.MultiheadAttention with need_weights=False.
    Results mean what torch says they mean: `is_causal` is aligned top-left, a bool mask is True where a key
    takes part, a query without a key gets zeros. `sdpa_reason` says what still goes to torch. Graphs of
    torch.compile follow the switch when they run, in the calls for which torch chose its fused kernel when
    they were compiled. What is dropped is not what torch drops at the same seed. There is no second
    derivative, as in torch's fused kernels; a call under sdpa_kernel(SDPBackend.MATH) is torch's and has one.

    The same as torch.nn.attention.activate_flash_attention_impl("bigmodel"), which restores torch's own
    kernels first where another implementation was active. On twice is on; thread-safe.

    Raises RuntimeError where torch lacks what this needs; then nothing is changed.
    """
    with _lock:
        if _everywhere is not None:
            return
        if (attention := _registry()) is None:
            _switch_on()
        else:
            attention.activate_flash_attention_impl(NAME)


def deactivate_sdpa() -> None:
    """Takes `activate_sdpa` back. Off twice is off; blocks of `sdpa` that are open stay on."""
    with _lock:
        if _everywhere is None:
            return
        attention = _registry()
        if attention is not None and attention.current_flash_attention_impl() == NAME:
            attention.restore_flash_attention_impl()
        else:
            _everywhere.remove()


@contextmanager
def sdpa() -> Iterator[None]:
    """Inside the block, scaled_dot_product_attention runs on our kernels where it can, as `activate_sdpa` has
    it for the whole process; here for this thread, or this task of asyncio, alone.

    A backward outside the block, or on a thread of autograd, gives the same gradients.
    """
    _enter()
    token = _here.set(True)
    try:
        yield
    finally:
        _here.reset(token)
        _leave()


def _active() -> bool:
    return _everywhere is not None or _here.get()


class _Process:
    """What torch's registry holds, and removes, while the whole process runs on our kernels."""

    def remove(self) -> None:
        global _everywhere
        with _lock:
            if _everywhere is self:
                _everywhere = None
                _leave()


def _switch_on() -> _Process:
    global _everywhere
    with _lock:
        _enter()
        _everywhere = _Process()
        return _everywhere


def _enter() -> None:
    global _users, _library
    with _lock:
        if _users == 0:
            _library = _registered()
        _users += 1


def _leave() -> None:
    global _users, _library
    with _lock:
        _users -= 1
        if _users == 0 and _library is not None:
            _library._destroy()
            _library = None


def _registered() -> torch.library.Library:
    """Our kernels in the dispatcher, all of them or none."""
    attention = _registry()
    other = None if attention is None else attention.current_flash_attention_impl()
    if other not in (None, NAME):
        raise RuntimeError(
            f"the flash attention implementation {other!r} is active; "
            "torch.nn.attention.restore_flash_attention_impl() must be called first"
        )
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.library.get_kernel; install a newer torch"
        )
    # Torch's own are all looked up first: a kernel of ours on the CPU hides the composite one of AutogradCPU.
    kernels = []
    for operator, key, kernel in _KERNELS:
        name = f"aten::{operator}"
        composite = not operator.startswith("_")
        if composite or torch._C._dispatch_has_kernel_for_dispatch_key(
            name, key
        ):  # not in a torch without CUDA
            kernels.append((operator, key, functools.partial(kernel, torch.library.get_kernel(name, key))))
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():  # torch warns of every override; these are asked for
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for operator, key, ours in kernels:
                library.impl(operator, ours, key, with_keyset=True, allow_override=True)
                _kept.append(torch.library.get_kernel(f"aten::{operator}", key))
    except BaseException:
        library._destroy()
        raise
    return library


def _registry() -> Any:
    """torch.nn.attention, where it has the registry of flash attention implementations."""
    import torch.nn.attention as attention

    return attention if hasattr(attention, "restore_flash_attention_impl") else None


if (_torchs := _registry()) is not None:
    _torchs.register_flash_attention_impl(NAME, register_fn=_switch_on)


# ------------------------------------------------------------------------------------------------------------
# what we take


def sdpa_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Why torch itself would compute this call of scaled_dot_product_attention; None where we would.

    The arguments are those of torch's function. The answer is for an eager call where `activate_sdpa` or
    `sdpa` is on, whether it is on now or not; nothing runs, and no random number is drawn. float64, value
    heads of another size than the key's, heads above 256, empty tensors, leading dimensions that differ, a
    mask together with `is_causal`, nested tensors, tensor subclasses, tracing, function transforms, dispatch
    modes and forward-mode derivatives are torch's, and so are calls where torch.nn.attention.sdpa_kernel
    leaves out FLASH_ATTENTION, and calls that no kernel of ours runs.
    """
    return (
        _why_not_now(query, key, value, attn_mask)
        or _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        or _no_kernel(*_call(query, key, value, attn_mask, dropout_p, is_causal, scale))
    )


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """What dtypes, shapes and options tell."""
    if query.device.type not in ("cpu", "cuda"):
        return f"query is on {query.device}; our kernels are for cpu and cuda"
    if query.dtype not in _DTYPES:
        return f"query has dtype {query.dtype}; our kernels are for float32, bfloat16 and float16"
    rank = query.dim()
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device or tensor.dim() != rank:
            return f"{name} has another dtype, device or number of dimensions than query"
    if rank < 2:
        return f"query has shape {shape(query)}; it must have at least 2 dimensions"
    if value.shape != key.shape:
        return f"value has shape {shape(value)} and key {shape(key)}; our kernels take one shape for both"
    dim = query.shape[-1]
    if key.shape[-1] != dim or dim > 256:
        return f"query has head_dim {dim} and key {key.shape[-1]}; our kernels take the same, up to 256"
    if 0 in query.shape or 0 in key.shape:
        return "a tensor is empty"
    heads, kv_heads = (t.shape[-3] if rank > 2 else 1 for t in (query, key))
    same_heads = heads == kv_heads or (enable_gqa and heads % kv_heads == 0)
    if query.shape[:-3] != key.shape[:-3] or not same_heads:
        return f"query has shape {shape(query)} and key {shape(key)}; leading dimensions must be the same"
    if not 0 <= dropout_p < 1:
        return f"dropout_p={dropout_p}; our kernels take 0 <= dropout_p < 1"
    if scale is not None and not abs(scale) < float("inf"):
        return f"scale={scale} is not finite"
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask is given together with is_causal"
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) or attn_mask.device != query.device:
        return f"attn_mask is {attn_mask.dtype} on {attn_mask.device}, query {query.dtype} on {query.device}"
    full = (*query.shape[:-1], key.shape[-2])
    if not broadcasts(tuple(attn_mask.shape), full):
        return f"attn_mask has shape {shape(attn_mask)}; it must broadcast to {full}"
    return None


def _why_not_now(*tensors: Tensor | None) -> str | None:
    """What the place of the call tells."""
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.nn.attention.sdpa_kernel leaves out FLASH_ATTENTION"
    if any(type(t) not in _PLAIN or t.is_nested for t in tensors if t is not None):
        return "a tensor is nested, or of a class of its own"
    if torch.compiler.is_compiling() or not unobserved():
        return "the call is traced, or under a function transform or a mode: torch's operator is what it sees"
    if torch.autograd.forward_ad._current_level >= 0:
        return "our operators have no forward-mode derivative"
    return None


def _no_kernel(args: tuple[Any, ...], options: dict[str, Any]) -> str | None:
    """Plain PyTorch of ours is no gain over torch's kernel, unless it is asked for."""
    if backends.forced() is not None:
        return None  # what cannot run there is an error, as for every operator
    reasons = []
    for row in backends.TABLE["attention", args[0].device.type]:
        reason = row.why_not_unasked(args, options)
        if reason is None and row.name != "reference":
            return None
        reasons.append(f"{row.name}: {reason or 'plain PyTorch'}")
    return "no kernel of ours runs it: " + "; ".join(reasons)


# ------------------------------------------------------------------------------------------------------------
# the call in our terms


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `bigmodel::attention`, with no seed for dropout yet."""
    attn_mask = None if attn_mask is None else _four(_spread(attn_mask, query))
    query, key, value = map(_four, (query, key, value))
    rows, keys = query.shape[2], key.shape[2]
    window = None
    if is_causal and keys >= rows:  # top-left: no query sees a key past the last query
        key, value = key[:, :, :rows], value[:, :, :rows]
    elif is_causal:  # ours is bottom-right; query i sees key j <= i + keys - rows + right
        is_causal, window = False, (None, rows - keys)
    padding, bias = _visible(attn_mask, query, key)
    args, options = prepare(
        query,
        key,
        value,
        is_causal=is_causal,
        softmax_scale=scale,
        window=window,
        key_padding_mask=padding,
        bias=bias,
    )
    return args, {**options, "dropout_p": dropout_p}


def _four(tensor: Tensor) -> Tensor:
    """A tensor of any rank as (B, H, S, D), or a mask as what broadcasts to (B, H, Sq, Sk)."""
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor[(None,) * (4 - tensor.dim())]


def _visible(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A mask (four dimensions) as key_padding_mask, or as bias."""
    if mask is None or mask.dtype != torch.bool:
        return None, mask
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0].expand(query.shape[0], key.shape[2]), None
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
    return None, bias.masked_fill_(~mask, float("-inf"))


def _spread(mask: Tensor, query: Tensor) -> Tensor:
    """A mask whose leading dimensions can be joined as those of a query of more than four dimensions are."""
    if query.dim() <= 4 or all(n == 1 for n in mask.shape[:-3]):
        return mask
    return mask.expand(*query.shape[:-3], *mask.shape[-3:])


# ------------------------------------------------------------------------------------------------------------
# the kernels. The first argument is torch's own, the second what the dispatcher passes on.


def _attention(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten::scaled_dot_product_attention."""
    if (
        _active()
        and _why_not_now(query, key, value, attn_mask) is None
        and _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) is None
    ):
        args, options = _call(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if _no_kernel(args, options) is None:
            if dropout_p:
                args = (*args[:7], draw_seed(dropout_p, query.device), *args[8:])
            out: Tensor = call("attention", *args, **options)[0]
            # The layout of torch's fused kernels where it may have run one, that of its formula otherwise.
            return out if query.dim() == 4 else out.reshape(query.shape).contiguous()
    options = {"scale": scale, "enable_gqa": enable_gqa}
    return torchs.call_boxed(keys, query, key, value, attn_mask, dropout_p, is_causal, **options)  # type: ignore[no-any-return]


def _ours(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal: bool, scale: Any
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of `bigmodel::attention` for a call of a fused kernel; None where it stays torch's.

    Dropout does, because its backward must be of the same hand as its forward.
    """
    if not _active() or query.dim() != 4 or dropout_p:
        return None
    if _why_not(query, key, value, mask, dropout_p, causal, scale, enable_gqa=True) is not None:
        return None
    args, options = _call(query, key, value, mask, dropout_p, causal, scale)
    return (args, options) if _no_kernel(args, options) is None else None


def _forward(args: tuple[Any, ...], options: dict[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    # Not through the dispatcher: these calls are below autocast, whose rule for our operator would cast anew.
    with torch.autocast(like.device.type, enabled=False):
        out, logsumexp = implementation("attention")(*args, **options)
    # torch's backward takes the logsumexp of a query without a key to be 0; ours takes both.
    return _laid_out_as(torch.empty_like(like), out), logsumexp.masked_fill_(logsumexp == -torch.inf, 0.0)


def _backward(
    grad_out: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(key.device.type, enabled=False):
        grads = implementation("attention_backward")(
            *(grad_out, None, *args[:3], out, logsumexp, *args[3:]),
            **options,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    dq, dk, dv = grads[:3]
    if dk.shape != key.shape:  # the keys that no query sees were left out
        dk, dv = (torch.nn.functional.pad(g, (0, 0, 0, key.shape[2] - g.shape[2])) for g in (dk, dv))
    return dq, dk, dv


def _laid_out_as(empty: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with the strides of the empty one: compiled graphs count on those of torch's kernels."""
    return tensor if tensor.stride() == empty.stride() else empty.copy_(tensor)


def _rows_first(tensor: Tensor) -> Tensor:
    """(B, H, S, ..) laid out in memory as (B, S, H, ..)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu."""
    ours = _ours(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if ours is None:
        return torchs.call_boxed(  # type: ignore[no-any-return]
            keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    out, logsumexp = _forward(*ours, query)
    return out, _rows_first(logsumexp)


def _cpu_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_for_cpu_backward."""
    ours = _ours(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if ours is None:
        given = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
        return torchs.call_boxed(keys, *given, attn_mask=attn_mask, scale=scale)  # type: ignore[no-any-return]
    return tuple(map(_rows_first, _backward(grad_out, key, value, out, logsumexp, *ours)))


def _flash_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention."""
    ours = _ours_on_gpu(not return_debug_mask, query, key, value, None, dropout_p, is_causal, scale)
    if ours is None:
        given = (query, key, value, dropout_p, is_causal, return_debug_mask)
        return torchs.call_boxed(keys, *given, scale=scale)  # type: ignore[no-any-return]
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    unmade = query.new_empty(0)  # the probabilities
    return (*_forward(*ours, query), None, None, query.shape[2], key.shape[2], seed, offset, unmade)


def _flash_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward."""
    ours = _ours_on_gpu(cum_seq_q is None, query, key, value, None, dropout_p, is_causal, scale)
    if ours is None:
        given = (grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k)
        return torchs.call_boxed(keys, *given, dropout_p, is_causal, seed, offset, scale=scale)  # type: ignore[no-any-return]
    return _gradients(grad_out, query, key, value, out, logsumexp, *ours)


def _cudnn_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_cudnn_attention, which torch prefers on Hopper and Blackwell."""
    ours = _ours_on_gpu(not return_debug_mask, query, key, value, attn_bias, dropout_p, is_causal, scale)
    if ours is None:
        given = (query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask)
        return torchs.call_boxed(keys, *given, scale=scale)  # type: ignore[no-any-return]
    out, logsumexp = _forward(*ours, query)
    return (out, logsumexp.unsqueeze(-1), None, None, query.shape[2], key.shape[2], *_no_seed(query), None)


def _cudnn_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_cudnn_attention_backward."""
    ours = _ours_on_gpu(cum_seq_q is None, query, key, value, attn_bias, dropout_p, is_causal, scale)
    if ours is None:
        given = (grad_out, query, key, value, out, logsumexp, seed, offset, attn_bias, cum_seq_q, cum_seq_k)
        return torchs.call_boxed(keys, *given, max_q, max_k, dropout_p, is_causal, scale=scale)  # type: ignore[no-any-return]
    return _gradients(grad_out, query, key, value, out, logsumexp.squeeze(-1), *ours)


def _efficient_forward(
    torchs: Any,
    keys: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_efficient_attention, which torch takes in float32 and for most masks."""
    ours = _ours_on_gpu(True, query, key, value, attn_bias, dropout_p, is_causal, scale)
    if ours is None:
        given = (query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal)
        return torchs.call_boxed(keys, *given, scale=scale)  # type: ignore[no-any-return]
    out, logsumexp = _forward(*ours, query)
    rows = query.shape[2]
    if compute_log_sumexp:  # torch's has room for a multiple of 32 rows, infinite where there is none
        logsumexp = torch.nn.functional.pad(logsumexp, (0, -rows % 32), value=torch.inf)
    else:
        logsumexp = logsumexp[..., :0]
    return (_rows_first(out), logsumexp, *_no_seed(query))


def _efficient_backward(
    torchs: Any,
    keys: Any,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """aten::_scaled_dot_product_efficient_attention_backward. The gradient of a mask stays torch's."""
    ours = _ours_on_gpu(not grad_input_mask[3], query, key, value, attn_bias, dropout_p, is_causal, scale)
    if ours is None:
        given = (grad_out, query, key, value, attn_bias, out, logsumexp, seed, offset, dropout_p)
        return torchs.call_boxed(keys, *given, grad_input_mask, is_causal, scale=scale)  # type: ignore[no-any-return]
    logsumexp = logsumexp[..., : query.shape[2]].contiguous()
    return (*map(_rows_first, _backward(grad_out, key, value, out, logsumexp, *ours)), None)


def _no_seed(like: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of a call without dropout."""
    seed = torch.zeros((), dtype=torch.int64, device=like.device)
    return seed, torch.zeros_like(seed)


def _ours_on_gpu(
    takes: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """As `_ours`, of a call that we take otherwise."""
    if not takes or not _square(query, key, is_causal):
        return None
    return _ours(query, key, value, mask, dropout_p, is_causal, scale)


def _gradients(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Of query, key and value, laid out as torch's kernels do."""
    grads = _backward(grad_out, key, value, *rest)
    like = (query, key, value)
    return tuple(_laid_out_as(torch.empty_like(t), g) for t, g in zip(like, grads, strict=True))


def _square(query: Tensor, key: Tensor, is_causal: bool) -> bool:
    """Not causal, or of one length. Torch gives its flash kernel no other call: its corner would be open."""
    return not is_causal or query.shape[2] == key.shape[2]


_Kernel = tuple[str, str, Callable[..., Any]]
#: operator of aten, dispatch key, kernel
_KERNELS: list[_Kernel] = [
    ("scaled_dot_product_attention", key, _attention)
    for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA")
]
_KERNELS += [
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU", _cpu_forward),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", _cpu_backward),
]
if torch.version.hip is None:  # seeds have another form there
    _KERNELS += [
        ("_scaled_dot_product_flash_attention", "CUDA", _flash_forward),
        ("_scaled_dot_product_flash_attention_backward", "CUDA", _flash_backward),
        ("_scaled_dot_product_cudnn_attention", "CUDA", _cudnn_forward),
        ("_scaled_dot_product_cudnn_attention_backward", "CUDA", _cudnn_backward),
        ("_scaled_dot_product_efficient_attention", "CUDA", _efficient_forward),
        ("_scaled_dot_product_efficient_attention_backward", "CUDA", _efficient_backward),
    ]
