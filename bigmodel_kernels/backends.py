"""Which implementation runs an operator: one table, with the reasons against each row.

The order of a row is the order of preference. An implementation is a module with a function `run` that takes
the operator's own arguments, and a function `supports` that takes the same and returns None, or the reason
why it cannot run this call. A function `only_when_forced`, where there is one, likewise says why a call that
it can run is better left to the next. Modules are imported on first use, so that importing the package
compiles and loads nothing. An operator's training form and its gradient are rows of their own, of the same
modules: `run_training` and `run_backward` with `supports_training` and `supports_backward`.

`BIGMODEL_BACKEND=native|triton|reference` forces one for every operator that it has code for and that has
more than one, and a call that it cannot run is an error.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

ENVIRONMENT = "BIGMODEL_BACKEND"
NAMES = ("native", "triton", "reference")


class BackendError(RuntimeError):
    """No implementation can run the call, or the forced one cannot."""


@dataclass
class Implementation:
    """One way to run an operator: `module.run`, guarded by `module.supports`."""

    name: str
    module: str
    suffix: str = ""
    #: Says why the implementation must not be chosen on its own, or None.
    only_when_forced: str | None = None
    _loaded: tuple[Callable[..., Any], Callable[..., str | None] | None] | None = field(
        default=None, repr=False
    )
    _load_error: str | None = field(default=None, repr=False)
    _not_unasked: Callable[..., str | None] | None = field(default=None, repr=False)

    def load(self) -> tuple[Callable[..., Any], Callable[..., str | None] | None]:
        if self._loaded is None:
            module = importlib.import_module(self.module)
            run = getattr(module, "run" + self.suffix, None)
            if run is None:
                raise NotImplementedError(f"{self.module} has no run{self.suffix}")
            supports = None if self.name == "reference" else getattr(module, "supports" + self.suffix)
            self._not_unasked = getattr(module, "only_when_forced" + self.suffix, None)
            self._loaded = (run, supports)
        return self._loaded

    def exists(self) -> bool:
        """Whether the backend has code for the operator at all."""
        try:
            self.load()
        except ImportError:
            return True  # the code is there, and what it needs is not: `why_not` says what
        except NotImplementedError:
            return False
        return True

    def why_not(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The reason why this implementation cannot run the call; None when it can."""
        if self._load_error is not None:
            return self._load_error
        try:
            _, supports = self.load()
        except (
            ImportError
        ) as error:  # the library behind the backend is not installed; remembered, and reported
            self._load_error = f"{self.module} cannot be imported: {error}"
            return self._load_error
        except NotImplementedError as error:
            self._load_error = str(error)
            return self._load_error
        return None if supports is None else supports(*args, **kwargs)

    def why_not_unasked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The reason why this implementation does not run the call on its own; None when it may."""
        # The interpreter, on the CPU, is not loaded to be asked; other modules say so themselves.
        reason = self.only_when_forced or self.why_not(args, kwargs)
        if reason is None and self._not_unasked is not None:
            reason = self._not_unasked(*args, **kwargs)
        return reason

    def detail(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """What the implementation has to say about how it would run the call; most have nothing."""
        say = getattr(importlib.import_module(self.module), "detail" + self.suffix, None)
        return "" if say is None else f": {say(*args, **kwargs)}"


#: (folder, suffix) of the operators that have CUDA C++ kernels -> their file
_CUDA = {("attention", s): "cuda" for s in ("", "_backward", "_decode")}
_CUDA |= {(folder, s): "cuda" for folder in ("linear", "feed_forward") for s in ("", "_training")}
_CUDA |= {("feed_forward", "_backward"): "cuda_backward", ("norm", "_backward"): "cuda"}


#: folders of the operators that a backend has no code for at all
_LACKING = {"attention_maps": ("triton",)}


def _implementations(folder: str, suffix: str, device: str) -> tuple[Implementation, ...]:
    """The row of an operator: `run<suffix>` of the modules of a folder, best first."""

    def one(name: str, only_when_forced: str | None = None, file: str = "") -> Implementation:
        return Implementation(name, f"bigmodel_kernels.ops.{folder}.{file or name}", suffix, only_when_forced)

    if device == "cuda":
        file = _CUDA.get((folder, suffix))
        native = () if file is None else (one("native", file=file),)
        row = (*native, one("triton"), one("reference"))
    else:
        interpreted = "on the CPU it only interprets; see TRITON_INTERPRET and BIGMODEL_BACKEND"
        row = (one("native"), one("triton", interpreted), one("reference"))
    return tuple(backend for backend in row if backend.name not in _LACKING.get(folder, ()))


#: operator -> (folder, suffix of its functions there)
_OPERATORS = {
    "attention": ("attention", ""),
    "attention_backward": ("attention", "_backward"),
    "attention_decode": ("attention", "_decode"),
    "attention_statistics": ("attention_maps", "_statistics"),
    "attention_probabilities": ("attention_maps", "_probabilities"),
    "rotary": ("rotary", ""),
    "linear": ("linear", ""),
    "linear_training": ("linear", "_training"),
    "linear_backward": ("linear", "_backward"),
    "feed_forward": ("feed_forward", ""),
    "feed_forward_training": ("feed_forward", "_training"),
    "feed_forward_backward": ("feed_forward", "_backward"),
    "layer_norm": ("norm", ""),
    "rms_norm": ("norm", "_rms_norm"),
    "norm_backward": ("norm", "_backward"),
    "embedding": ("embedding", ""),
    "embedding_backward": ("embedding", "_backward"),
    "linear_cross_entropy": ("cross_entropy", ""),
    "linear_cross_entropy_training": ("cross_entropy", "_training"),
    "linear_cross_entropy_backward": ("cross_entropy", "_backward"),
}

#: operator of the public surface -> (folder, function that makes the operator's arguments)
_PUBLIC = {
    "attention": ("attention", "prepare"),
    "attention_decode": ("attention.decode", "prepare"),
    "attention_statistics": ("attention_maps", "prepare"),
    "attention_probabilities": ("attention_maps", "prepare_probabilities"),
    "rotary": ("rotary", "prepare"),
    "linear": ("linear", "prepare"),
    "feed_forward": ("feed_forward", "prepare"),
    "layer_norm": ("norm", "prepare"),
    "rms_norm": ("norm", "prepare_rms_norm"),
    "embedding": ("embedding", "prepare"),
    "linear_cross_entropy": ("cross_entropy", "prepare"),
}

#: (operator, device type) -> implementations, best first.
TABLE: dict[tuple[str, str], tuple[Implementation, ...]] = {
    (op, device): _implementations(folder, suffix, device)
    for op, (folder, suffix) in _OPERATORS.items()
    for device in ("cpu", "cuda")
}


def operators() -> list[str]:
    """Names of the operators that the table knows."""
    return sorted({op for op, _ in TABLE})


def _row_of(op: str, device_type: str) -> tuple[Implementation, ...]:
    try:
        return TABLE[op, device_type]
    except KeyError:
        devices = sorted(device for name, device in TABLE if name == op)
        if not devices:
            raise ValueError(f"op={op!r} is unknown; allowed are {', '.join(operators())}") from None
        raise BackendError(
            f"{op} has no implementation on {device_type!r}; it has on {', '.join(devices)}"
        ) from None


_override: ContextVar[str | None] = ContextVar("backend", default=None)


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Forces a backend inside the block, in this thread, in place of the environment's; None forces none."""
    token = _override.set(_checked("backend", name) if name else "")
    try:
        yield
    finally:
        _override.reset(token)


def forced() -> str | None:
    """The backend that `use` or the environment forces, checked; None when neither does."""
    name = _override.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT)
    return _checked(ENVIRONMENT, name) if name else None


def _checked(what: str, name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{what}={name!r} is unknown; allowed are {', '.join(NAMES)}")
    return name


def select(op: str, device_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Implementation:
    """The implementation that runs this call.

    Raises BackendError when none can, or when the forced one cannot. On a device other than the CPU, falling
    back to the reference warns once for each reason.
    """
    row = _row_of(op, device_type)
    force = forced()
    if force is not None and any(i.name == force and i.exists() for i in row):
        return _forced(op, device_type, force, row, args, kwargs)
    # A backend may have no code for gradients, or for an operator at all: these then take the table's order.
    lacking = _LACKING.get(_OPERATORS[op][0], ()) if op in _OPERATORS else ()
    may_lack = op.endswith(("_training", "_backward")) or force in lacking
    if force is not None and not may_lack and len(row) > 1:
        raise BackendError(
            f"{ENVIRONMENT}={force} cannot run {op} on {device_type}: it has no such implementation"
        )
    reasons: list[str] = []
    for implementation in row:
        reason = implementation.why_not_unasked(args, kwargs)
        if reason is None:
            if reasons and implementation.name == "reference" and device_type != "cpu":
                _warn_once(
                    f"{op} on {device_type} runs in plain PyTorch, which is slow. " + "; ".join(reasons)
                )
            return implementation
        reasons.append(f"{implementation.name}: {reason}")
    raise BackendError(f"no implementation can run {op} on {device_type}: " + "; ".join(reasons))


def _forced(
    op: str,
    device_type: str,
    name: str,
    row: tuple[Implementation, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Implementation:
    implementation = next(i for i in row if i.name == name)
    if name == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(
            f"{ENVIRONMENT}={name} cannot run {op} on {device_type}: {implementation.only_when_forced}"
        )
    reason = implementation.why_not(args, kwargs)
    if reason is not None:
        raise BackendError(f"{ENVIRONMENT}={name} cannot run {op} on {device_type}: {reason}")
    return implementation


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def run(op: str, device_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs the call on the implementation that `select` picks, in the types of its arguments.

    What autocast casts has been cast when a call comes here: the plain PyTorch of an implementation would be
    seen by it once more, and its products rounded.
    """
    function, _ = select(op, device_type, args, kwargs).load()
    if not torch.is_autocast_enabled(device_type):
        return function(*args, **kwargs)
    with torch.autocast(device_type, enabled=False):
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and for every other one the reason why it does not."""

    op: str
    device: str
    chosen: str | None
    reasons: dict[str, str]
    error: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.chosen or 'no backend'}"]
        if self.error:
            lines.append(f"  error      {self.error}")
        lines += [f"  {name:<10} {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain_call(op: str, device_type: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Explanation:
    """What `select` would do for this call, without running it."""
    row = _row_of(op, device_type)
    chosen, error = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            chosen = select(op, device_type, args, kwargs).name
        except BackendError as problem:
            error = str(problem)
    reasons = {}
    for implementation in row:
        if implementation.name == chosen:
            reasons[implementation.name] = "runs this call" + implementation.detail(args, kwargs)
        else:
            cannot = implementation.why_not_unasked(args, kwargs)
            reasons[implementation.name] = cannot or "can run it, but comes later in the order of preference"
    return Explanation(op, device_type, chosen, reasons, error)


def explain(what: Any, *args: Any, **kwargs: Any) -> Any:
    """Says which backend would run, and why the others would not. Runs nothing.

    explain("attention", query, key, value, is_causal=True) takes the name of an operator and the arguments of
    its public function, and returns an Explanation. explain(model) takes a transformers model and returns the
    report that `patch` would give.
    """
    if isinstance(what, str):
        if what not in _PUBLIC:
            raise ValueError(f"op={what!r} is unknown; allowed are {', '.join(sorted(_PUBLIC))}")
        folder, function = _PUBLIC[what]
        prepare = getattr(importlib.import_module(f"bigmodel_kernels.ops.{folder}"), function)
        op_args, op_kwargs = prepare(*args, **kwargs)
        return explain_call(what, op_args[0].device.type, op_args, op_kwargs)
    from bigmodel_kernels import transformers  # the only import upwards: explain(model) belongs to that layer

    return transformers.explain(what, *args, **kwargs)
