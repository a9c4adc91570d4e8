"""What is installed, what this machine has, which backends are live, and what would make the others so."""

from __future__ import annotations

import itertools
import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends
from bigmodel_kernels.ops.examples import OPERATORS, example

DTYPES = ("float32", "bfloat16", "float16")
LIVE, OFF, BROKEN = "live", "off", "broken"

#: The oldest transformers that `patch` knows; pyproject.toml says so too.
OLDEST_TRANSFORMERS = (5, 16)

_REINSTALL = "install a wheel, or build with g++ 11 or clang++ 14 and ninja on PATH (docs/building.md)"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    status is "live"; "off" for what has no place here, such as CUDA kernels with no GPU; or "broken" for what
    should work here and does not. fix says what to do about it.
    """

    name: str
    status: str
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Gpus:
    """What torch sees, and whether the system has NVIDIA's driver."""

    names: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    driver: bool = False


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows; "ok" is False where something is broken."""
    from bigmodel_kernels.bench import machine

    gpus = find_gpus()
    forced_error = _forced_error()
    devices = ["cpu", *(["cuda"] if gpus.names else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of libraries: the checks say the same
        checks = list(_checks(gpus, machine.version_of("transformers"), forced_error))
        isa_works = next(check for check in checks if check.name == "native, cpu").status == LIVE
        build = _native.cuda_build()
        return {
            "ok": all(check.status != BROKEN for check in checks),
            "versions": {
                "bigmodel_kernels": machine.version_of("bigmodel_kernels") or bk.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": machine.version_of("transformers"),
                "triton": machine.version_of("triton"),
            },
            "cpu": {
                "name": machine.cpu_name(),
                "cores": machine.cores(),
                "threads": torch.get_num_threads(),
                "isa": machine.instruction_set() if isa_works else None,
                "isa_available": machine.instruction_sets() if isa_works else [],
                "torch_isa": torch.backends.cpu.get_cpu_capability(),
            },
            "native_library": {"loaded": _native.available(), "reason": _native.reason()},
            "cuda_library": {
                "loaded": _native.cuda_reason() is None,
                "reason": _native.cuda_reason(),
                "built_for": None if build is None else asdict(build),
            },
            "gpu": {
                "names": list(gpus.names),
                "reason": None if gpus.names else no_gpu(),
                "torch_cuda": torch.version.cuda,
            },
            "environment": {
                name: os.environ[name]
                for name in ("BIGMODEL_BACKEND", "BIGMODEL_CPU_ISA", "TRITON_INTERPRET", "OMP_NUM_THREADS")
                if name in os.environ
            },
            "problem": forced_error,
            "checks": [asdict(check) for check in checks],
            "backends": {} if forced_error else {device: _backend_rows(device) for device in devices},
        }


def find_gpus() -> Gpus:
    """The GPUs of this machine."""
    driver = Path("/proc/driver/nvidia/version").exists()
    if not torch.cuda.is_available():
        return Gpus(driver=driver)
    names = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Gpus(names, torch.cuda.get_device_capability(), driver)


def no_gpu() -> str:
    """Why there is no GPU to use."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "torch sees no GPU (torch.cuda.is_available() is False)"


# ---- checks ----


def _forced_error() -> str | None:
    try:
        backends.forced()
    except ValueError as error:
        return str(error)
    return None


def _checks(gpus: Gpus, transformers: str | None, forced_error: str | None) -> Iterator[Check]:
    if forced_error is not None:
        yield Check(backends.ENVIRONMENT, BROKEN, forced_error, f"unset {backends.ENVIRONMENT}")
    yield native_cpu(_native.reason())
    yield native_cuda(gpus, torch.version.cuda, _native.cuda_build(), _native.cuda_reason())
    yield triton(gpus)
    yield Check("reference", LIVE, "plain PyTorch, on every device")
    yield installed_transformers(transformers)


def native_cpu(reason: str | None) -> Check:
    """The CPU kernels, which every machine can have; reason is why the library is not loaded."""
    name = "native, cpu"
    if reason is not None:
        return Check(name, BROKEN, reason, _REINSTALL)
    try:
        isa = torch.ops.bigmodel.cpu_isa()
    except RuntimeError as error:  # the library's answer to BIGMODEL_CPU_ISA
        return Check(name, BROKEN, str(error), "unset BIGMODEL_CPU_ISA, or set it to one that is supported")
    if failure := run_operators("native", "cpu"):
        return Check(name, BROKEN, failure, _REINSTALL)
    return Check(name, LIVE, f"instruction set {isa}")


def native_cuda(
    gpus: Gpus, torch_cuda: str | None, build: _native.CudaBuild | None, reason: str | None
) -> Check:
    """The CUDA library. torch_cuda is torch's CUDA version; reason is why the library is not loaded."""
    name = "native, cuda"
    if not gpus.names:
        detail = no_gpu()
        if build is not None:
            detail += (
                f"; {reason}" if torch_cuda and reason else f"; the library here is for CUDA {build.cuda}"
            )
        if build is None or not gpus.driver:
            return Check(name, OFF, detail, "an NVIDIA GPU of sm_80 or newer, and a torch with CUDA")
        wanted = f"install a torch for CUDA {build.cuda.partition('.')[0]}, or a driver that it can use"
        return Check(name, BROKEN, f"{detail}; the machine has NVIDIA's driver", wanted)
    if torch_cuda is None:
        return Check(name, OFF, "it is for NVIDIA GPUs", "Triton's kernels serve this GPU")
    wanted = _native.how_to_have_cuda(torch_cuda)
    if reason is not None:
        # A wheel without the library is whole: Triton's kernels run in its place.
        return Check(name, OFF if build is None else BROKEN, reason, wanted)
    assert gpus.capability is not None
    if gpus.capability < (8, 0):
        return Check(name, OFF, f"{gpus.names[0]} is older than sm_80", "Triton's kernels serve it")
    if failure := run_operators("native", "cuda"):
        return Check(name, BROKEN, failure, wanted)
    archs = (
        "" if build is None else f"built for CUDA {build.cuda}, architectures {' '.join(build.architectures)}"
    )
    return Check(name, LIVE, archs or "built from older sources, which do not say for what")


def triton(gpus: Gpus) -> Check:
    """Triton, which should be there where a GPU is."""
    if not gpus.names:
        how = "a GPU; for tests without one: TRITON_INTERPRET=1 BIGMODEL_BACKEND=triton"
        return Check("triton", OFF, f"{no_gpu()}; on the CPU it only interprets", how)
    failure = run_operators("triton", "cuda", only="layer_norm")
    if failure:
        return Check(
            "triton", BROKEN, failure, "pip install 'bigmodel_kernels[triton]'; it needs a C compiler too"
        )
    return Check("triton", LIVE, "compiles for this GPU and runs")


def installed_transformers(version: str | None) -> Check:
    """What `bk.patch` needs."""
    fix = "pip install 'bigmodel_kernels[transformers]'"
    if version is None:
        return Check("transformers", OFF, "not installed: the operators work, bk.patch does not", fix)
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        return Check("transformers", BROKEN, f"{version} is older than {oldest}, which bk.patch needs", fix)
    return Check("transformers", LIVE, version)


def run_operators(backend: str, device: str, only: str | None = None) -> str | None:
    """Runs the operators that this backend takes, one small call each; the first error, or None.

    Whether results are right is for `bigmodel-kernels verify` to say.
    """
    for dtype in (torch.float32, torch.bfloat16):
        for op in OPERATORS if only is None else (only,):
            args, kwargs = example(op, dtype, device)
            try:
                with backends.use(backend):
                    answer = bk.explain(op, *args, **kwargs)
                    if answer.chosen == backend:
                        getattr(bk, op)(*args, **kwargs)
                    elif only:
                        return answer.error
            except Exception as error:  # whatever it is, it is what the user would see
                return f"{op} in {dtype}: {type(error).__name__}: {error}"
    return None


# ---- operators ----


def _backend_rows(device: str) -> list[dict[str, Any]]:
    """For each operator and dtype which backend runs a plain call, and why the others do not."""
    rows = []
    for op, dtype in itertools.product(OPERATORS, DTYPES):
        args, kwargs = example(op, getattr(torch, dtype), device)
        answer = bk.explain(op, *args, **kwargs)
        rows.append(
            {
                "op": op,
                "dtype": dtype,
                "backend": answer.chosen,
                "gradient": _gradient_backend(op, device, answer.chosen),
                "reasons": answer.reasons,
                "error": answer.error,
            }
        )
    return rows


#: operator -> the operator of its gradient, where its name does not say it. The linear cross-entropy makes
#: its gradient in its training form.
_GRADIENTS = {
    "layer_norm": "norm_backward",
    "rms_norm": "norm_backward",
    "linear_cross_entropy": "linear_cross_entropy_training",
}


def _gradient_backend(op: str, device: str, forward: str | None) -> str | None:
    """The first backend with code for the gradient; None where there is no operator of it."""
    if op == "rotary":  # its gradient is a rotation
        return forward
    for implementation in backends.TABLE.get((_GRADIENTS.get(op, f"{op}_backward"), device), ()):
        if implementation.only_when_forced is None:
            try:
                implementation.load()
            except (ImportError, NotImplementedError):
                continue
            return implementation.name
    return None
