"""Registration of the operators of the `bigmodel` namespace and the small checks that they share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from bigmodel_kernels.ops.packed_weight import PackedWeight

LIBRARY = torch.library.Library("bigmodel", "FRAGMENT")

#: Floating types an operator accepts. float64 runs in the reference only.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def public(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a public function: an argument of another type than the annotated one is a TypeError that
    names it. Types are looked at once a call has failed, so that others pay nothing for it. A derivative in
    forward mode is refused.
    """

    @functools.wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        _refuse_tangents(function.__name__, (*args, *kwargs.values()))
        try:
            return function(*args, **kwargs)
        except (AttributeError, RuntimeError, TypeError) as error:
            _require_annotated(function, args, kwargs, error)
            raise

    return checked


def _require_annotated(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> None:
    """Raises TypeError, from `error`, for the first argument of a wrong type."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return  # Python has said what is wrong with the call
    expected = get_type_hints(function)
    for name, value in given.items():
        if not _is_a(value, expected[name]):
            if isinstance(error, TypeError) and str(error).startswith(name):
                return  # a check has said more
            shown = "" if isinstance(value, Tensor) else f"={value!r:.60}"
            allowed = function.__annotations__[name]
            raise TypeError(
                f"{name}{shown} is of type {type(value).__name__}; it must be {allowed}"
            ) from error


def _is_a(value: Any, expected: Any) -> bool:
    origin, parts = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(map(_is_a, value, parts))
    if origin is not None:
        return isinstance(value, origin) and all(_is_a(item, parts[0]) for item in value)
    if expected in (int, float):  # numbers of compiled graphs are ones too
        return isinstance(value, (int, torch.SymInt)) or (
            expected is float and isinstance(value, (float, torch.SymFloat))
        )
    return isinstance(value, expected)


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_PLAIN = frozenset((Tensor, torch.nn.Parameter, PackedWeight))


def call(name: str, *args: Any, **options: Any) -> Any:
    """The operator, by the shortest way that is right, for callers that make many small calls.

    Where nobody listens - no gradient, autocast, tracing, mode, function transform or tensor subclass - the
    implementation is called, checks and all, without the dispatcher, whose Python parts cost tens of
    microseconds a call. Otherwise this is `torch.ops.bigmodel.<name>.default`.
    """
    _refuse_tangents(name, args)
    if not torch.is_grad_enabled():
        for option in _TRAINING.get(name, ()):
            options.pop(option, None)
        if nobody_listens(args[0].device.type) and all(map(plain, args)):
            return _IMPLEMENTATIONS[name](*args, **options)
        return getattr(torch.ops.bigmodel, name).default(*args, **options)
    return differentiable(name, args, options)


def _refuse_tangents(name: str, values: Any) -> None:
    """torch takes an operator without a forward-mode derivative for a constant, without a word."""
    if forward_ad._current_level >= 0 and any(map(_has_tangent, values)):
        raise NotImplementedError(
            f"bigmodel_kernels.{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, "
            "torch.autograd.forward_ad); use plain PyTorch for that"
        )


def _has_tangent(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tangent, value))
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


#: Operators with a form `<name>_training`, which keeps what the backward would have to compute again, and the
#: options that only that form has.
_TRAINING: dict[str, tuple[str, ...]] = {
    "linear": (),
    "feed_forward": ("recompute",),
}


def differentiable(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The operator in its training form where a gradient is wanted, else plain; the first result alone."""
    if name in _TRAINING:
        if wants_gradient(args):
            return getattr(torch.ops.bigmodel, name + "_training").default(*args, **options)[0]
        options = {key: value for key, value in options.items() if key not in _TRAINING[name]}
    return getattr(torch.ops.bigmodel, name).default(*args, **options)


def wants_gradient(values: Any) -> bool:
    """Whether autograd will record a call with these arguments."""
    return torch.is_grad_enabled() and _any_requires_grad(values)


def _any_requires_grad(values: Any) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, (list, tuple)) and _any_requires_grad(value):
            return True
    return False


def given(defaults: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The options that differ from their defaults: what a call does not use is not passed."""
    return {key: value for key, value in options.items() if value != defaults[key]}


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed for one call with dropout, None without.

    It is a tensor drawn from torch's own generator: manual_seed, checkpointing and compile see it.
    """
    return torch.randint(0, 2**62, (), device=device) if dropout_p else None


def implementation(name: str) -> Callable[..., Any]:
    """What the operator runs, with its checks, for a caller below autograd and autocast."""
    return _IMPLEMENTATIONS[name]


def nobody_listens(device_type: str) -> bool:
    """No autocast, tracing, mode or function transform is there, which a call past the dispatcher would not
    meet; gradients and tensor subclasses aside.
    """
    return (
        not torch.compiler.is_compiling()
        and device_type in ("cpu", "cuda")
        and unobserved()
        and torch._C._len_torch_function_stack() == 0
        and not torch.is_autocast_enabled(device_type)
    )


def unobserved() -> bool:
    """No dispatch mode, function transform or jit.trace is there to see which operators run."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
    )


def plain(value: Any) -> bool:
    """No tensor whose class answers for itself."""
    if isinstance(value, Tensor):
        return type(value) in _PLAIN
    return not isinstance(value, list) or all(map(plain, value))


def define(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autocast: str | None = None,
    rows: Sequence[int] | None = None,
    row_results: Sequence[int] | None = None,
) -> None:
    """Defines `bigmodel::<schema>` with one implementation for CPU and CUDA and one for fake tensors.

    Both get the same checks, so that a raw `torch.ops.bigmodel` call with bad arguments raises as the public
    function does. Under torch.autocast, `autocast="lower"` casts the floating arguments to the autocast
    dtype, as torch does for linear and scaled_dot_product_attention, and `"float32"` to float32, as torch
    does for layer_norm.

    Under torch.vmap, a map over arguments `rows` alone, whose leading dimensions are free, is one call with
    one dimension more, if of the results asked for by `needs` all are `row_results`, which have those
    dimensions too. Any other map is a call for each element. Without `rows` there is no rule for vmap.
    """
    name = schema.split("(")[0]
    _IMPLEMENTATIONS[name] = run
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"bigmodel::{name}", fake, lib=LIBRARY)
    if autocast:
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast_kernel(name, device, autocast), f"Autocast{device.upper()}")
    if rows is not None:
        torch.library.register_vmap(f"bigmodel::{name}", _vmap_rule(name, rows, row_results), lib=LIBRARY)


def _vmap_rule(
    name: str, rows: Sequence[int], row_results: Sequence[int] | None
) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.bigmodel, name).default
        if not _maps_rows(in_dims, options, rows, row_results):
            return map_elements(operator, info.batch_size, in_dims, args, options)
        folded = list(args)
        for i in rows:
            if i < len(args) and isinstance(args[i], Tensor):
                dim = in_dims[i]
                folded[i] = (
                    args[i].expand(info.batch_size, *args[i].shape)
                    if dim is None
                    else args[i].movedim(dim, 0)
                )
        result = operator(*folded, **options)
        if isinstance(result, Tensor):
            return result, 0
        # What is not there is an empty vector, and not mapped.
        return result, type(result)(0 if r.dim() > 1 else None for r in result)

    return rule


def map_elements(
    operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, Any]:
    """A rule for vmap of whatever cannot be one call: a call for each element."""
    results = [
        operator(*(_element(a, d, i) for a, d in zip(args, in_dims, strict=True)), **options)
        for i in range(size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    kind = type(results[0])
    return kind(map(torch.stack, zip(*results, strict=True))), kind([0] * len(results[0]))


def _maps_rows(
    in_dims: tuple[Any, ...],
    options: dict[str, Any],
    rows: Sequence[int],
    row_results: Sequence[int] | None,
) -> bool:
    def mapped(dim: Any) -> bool:
        return any(map(mapped, dim)) if isinstance(dim, (list, tuple)) else dim is not None

    # With dropout, each element of a map has its own rows, which begin at 0.
    return (
        not options.get("dropout_p", 0.0)
        and not any(mapped(dim) for i, dim in enumerate(in_dims) if i not in rows)
        and (
            row_results is None or not any(n for i, n in enumerate(options["needs"]) if i not in row_results)
        )
    )


def _element(value: Any, dim: Any, index: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_element(v, d, index) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)


def _autocast_kernel(name: str, device: str, rule: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if rule == "float32" else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.bigmodel, name).default(*(_cast(a, dtype) for a in args), **kwargs)

    return kernel


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        # Autocast leaves float64 alone, as torch's own rules do.
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    return value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a result of `dtype` is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def require_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; allowed are float32, bfloat16, float16 and float64"
        )


def require_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Same dtype and same device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must have that of {other_name}, {other.dtype}")
    require_device(name, tensor, other_name, other)


def require_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}; it must be on the device of {other_name}, {other.device}"
        )


def require_vector(name: str, tensor: Tensor, size: Any, what: str, x: Tensor) -> None:
    """A parameter of shape (size,) with the dtype and device of x."""
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"{name} has shape {shape(tensor)}; it must be ({size},), {what}")
    require_like(name, tensor, "x", x)


def require_dropout(dropout_p: float, dropout_seed: Tensor | None, name: str, like: Tensor) -> None:
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} is out of range; allowed is 0 <= dropout_p < 1")
    if dropout_p and dropout_seed is None:
        raise ValueError(
            f"dropout_seed is None with dropout_p={dropout_p}; it must be an int64 tensor of one element"
        )
    if dropout_seed is not None:
        if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise ValueError(
                f"dropout_seed has dtype {dropout_seed.dtype} and shape {shape(dropout_seed)}; "
                "it must be an int64 tensor of one element"
            )
        require_device("dropout_seed", dropout_seed, name, like)


def require_shape(name: str, tensor: Tensor | None, size: Sequence[Any], x: Tensor) -> None:
    """A tensor of this shape with the dtype and device of x, or None."""
    if tensor is not None:
        if list(tensor.shape) != list(size):
            raise ValueError(f"{name} has shape {shape(tensor)}; it must be {tuple(size)}")
        require_like(name, tensor, "x", x)


def require_needs(needs: Sequence[bool], names: Sequence[str], absent: Sequence[str] = ()) -> None:
    """One value for each name, and no gradient of what is `absent`."""
    if len(needs) != len(names):
        raise ValueError(
            f"needs holds {len(needs)} values; it must hold {len(names)}, for {', '.join(names)}"
        )
    for name, need in zip(names, needs, strict=True):
        if need and name in absent:
            raise ValueError(f"needs asks for the gradient of {name}, which is None")


def broadcasts(size: Sequence[Any], full: Sequence[Any]) -> bool:
    """Whether a tensor of this size expands to the full one.

    Sizes that a compiled graph learns at run time cannot be compared with 1: they are compared with each
    other first.
    """
    return len(size) <= len(full) and all(
        (type(a) is int and a == 1) or a == b or a == 1
        for a, b in zip(reversed(size), reversed(full), strict=False)
    )


def require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")


def backward_formula(count: int) -> Callable[..., Any]:
    """Decorates `formula(ctx, saved, needs, *grads) -> count gradients` for register_autograd.

    The dispatcher leaves out trailing arguments that equal their defaults, and with them their places in
    `ctx.needs_input_grad` and in the gradients. This gives the formula all of them,
    and the saved tensors, which checkpointing lets a backward read once only. Autocast is off inside,
    because the formula chooses its types itself.
    """

    def decorate(formula: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            given = len(ctx.needs_input_grad)
            needs = (*ctx.needs_input_grad, *(False,) * (count - given))
            saved = ctx.saved_tensors
            with torch.autocast(saved[0].device.type, enabled=False):
                return formula(ctx, saved, needs, *grads)[:given]

        return backward

    return decorate


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] = lambda *_: None
) -> None:
    """torch.library.register_autograd for an operator of tensors and lists of tensors, with less in the way.

    Torch's reads the operator's schema anew in every call that wants a gradient, to complete the arguments by
    their defaults, and takes arguments with lists apart by its general trees, which for the twenty arguments
    of attention costs more than all else around a kernel. Here the schema is read once, and lists are flat.
    """
    op = getattr(torch.ops.bigmodel, name).default
    arguments = op._schema.arguments
    defaults = tuple(a.default_value for a in arguments if not a.kwarg_only)
    option_defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
    listed = isinstance(op._schema.returns[0].type, torch.ListType)

    def below(keyset: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *flat, (lengths, keyset, options) = inputs
        args = _nested(flat, lengths)
        with _outer_levels():
            result = below(keyset, args, options)
        ctx.lengths = lengths
        setup_context(ctx, (*args, *defaults[len(args) :]), {**option_defaults, **options}, result)
        return tuple(result) if listed else result

    def gradient(ctx: Any, *grads: Any) -> Any:
        given = ctx.needs_input_grad
        ctx.needs_input_grad = _nested(given[:-1], ctx.lengths)
        try:
            return (*_flat(backward(ctx, *grads), ctx.lengths), None)
        finally:
            ctx.needs_input_grad = given

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    node = _Node(f"Backward_{name}", methods)

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        _refuse_tangents(name.removesuffix("_training"), args)
        if wants_gradient(args):
            lengths = tuple(len(a) if isinstance(a, (list, tuple)) else None for a in args)
            result = node.apply(*_flat(args, lengths), (lengths, keyset, options))
            return list(result) if listed else result
        return below(keyset, args, options)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


class _Node:
    """An autograd.Function of these methods.

    Under function transforms (torch.func.grad, vjp, vmap of these) torch wants one that goes through all of
    their levels. The dispatcher has come to one of them when it calls us, and goes on to the next below: that
    is a function of a single level, as torch makes them itself.
    """

    def __init__(self, name: str, methods: dict[str, Any]) -> None:
        self._function: Any = type(name, (torch.autograd.Function,), methods)
        self._of_one_level: Any = type(name, (torch.autograd.function._SingleLevelFunction,), methods)

    def apply(self, *args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return self._function.apply(*args)
        with enable_single_level_autograd_function():
            return self._of_one_level.apply(*args)


def _outer_levels() -> contextlib.AbstractContextManager[Any]:
    """For what a node's forward calls: torch records nothing there, but the levels of function transforms
    around this one have to.
    """
    return _recording() if torch._C._are_functorch_transforms_active() else contextlib.nullcontext()


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # type: ignore[no-untyped-call]
        yield


#: Of each argument the length of a list, or None where it is none.
_Lengths = tuple[int | None, ...]


def _flat(values: Sequence[Any], lengths: _Lengths) -> list[Any]:
    """The values with those of lists in their place; None for a list is as many."""
    flat: list[Any] = []
    for value, length in zip(values, lengths, strict=True):
        if length is None:
            flat.append(value)
        else:
            flat.extend([None] * length if value is None else value)
    return flat


def _nested(flat: Sequence[Any], lengths: _Lengths) -> tuple[Any, ...]:
    """What `_flat` was given, but for None in the place of a list."""
    values, at = [], 0
    for length in lengths:
        values.append(flat[at] if length is None else list(flat[at : at + length]))
        at += 1 if length is None else length
    return tuple(values)


def no_second_derivative(name: str, instead: str) -> None:
    """Registers that `bigmodel::<name>` has no derivative: `instead` says what to use for one."""

    operator = name.removesuffix("_backward").removesuffix("_scaled")

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"bigmodel::{operator} has no second derivative (create_graph=True and then backward again); "
            f"use {instead} for that"
        )

    register_gradient(name, backward)


def placeholder(like: Tensor, size: Sequence[Any]) -> Tensor:
    """A tensor of this shape without memory, for an argument whose values are not read.

    A backward that computes no gradient of a weight needs the shape of the input and no more, and the input
    need not be kept for it.
    """
    return like.new_empty(()).expand(size)


def gradients(results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Results of a backward operator as autograd wants them: None where none is needed."""
    return [result if need else None for result, need in zip(results, needs, strict=True)]


def fake_gradients(like: Tensor, sizes: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    """What a backward operator returns, for fake tensors: results of these sizes, empty where not needed."""
    return [like.new_empty(size if need else (0,)) for size, need in zip(sizes, needs, strict=True)]


def filled(gradients: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """Gradients as a backward operator returns them, in the dtype of `like`: empty where not needed."""
    return [
        like.new_empty(0) if gradient is None or not need else gradient.to(like.dtype)
        for gradient, need in zip(gradients, needs, strict=True)
    ]
