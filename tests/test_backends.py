"""The table of backends: choice, reasons, and what forces one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends

QUERY = torch.randn(1, 2, 5, 16)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A row of made-up implementations of linear on a device "cuda", and what their `supports` answer."""
    answers: dict[str, Any] = {"native": "no native", "triton": "no triton", "calls": []}
    implementations = []
    for name in ("native", "triton", "reference"):
        module = ModuleType(f"made_up_{name}")

        def run(*args: Any, _name: str = name, **kwargs: Any) -> str:
            answers["calls"].append(_name)
            return _name

        def supports(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            return answers[_name]

        module.run, module.supports = run, supports  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        implementations.append(backends.Implementation(name, module.__name__))
    monkeypatch.setitem(backends.TABLE, ("linear", "cuda"), tuple(implementations))
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    return answers


def test_first_that_can(row: dict[str, Any]) -> None:
    row["triton"] = None
    assert backends.run("linear", "cuda", (), {}) == "triton"
    row["native"] = None
    assert backends.run("linear", "cuda", (), {}) == "native"


def test_reference_on_a_gpu_warns_once_for_each_reason(row: dict[str, Any]) -> None:
    with pytest.warns(RuntimeWarning, match="no native.*no triton"):
        assert backends.run("linear", "cuda", (), {}) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.run("linear", "cuda", (), {})
    row["triton"] = "something else"
    with pytest.warns(RuntimeWarning, match="something else"):
        backends.run("linear", "cuda", (), {})


def test_forced_by_the_environment(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.run("linear", "cuda", (), {}) == "reference"
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    with pytest.raises(backends.BackendError, match="cannot run linear on cuda: no triton"):
        backends.run("linear", "cuda", (), {})
    monkeypatch.setenv(backends.ENVIRONMENT, "cuda")
    with pytest.raises(
        ValueError, match="BIGMODEL_BACKEND='cuda' is unknown; allowed are native, triton, reference"
    ):
        backends.run("linear", "cuda", (), {})


def test_use_wins_over_the_environment(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, "triton")
    row["native"] = None
    with backends.use("native"):
        assert backends.run("linear", "cuda", (), {}) == "native"
        with backends.use("reference"):
            assert backends.run("linear", "cuda", (), {}) == "reference"
        with backends.use(None):
            assert backends.run("linear", "cuda", (), {}) == "native"
        seen: list[str | None] = []
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
        assert seen == ["triton"]  # another thread is not forced
    with pytest.raises(ValueError, match="backend='fast' is unknown"), backends.use("fast"):
        pass


def test_explanation(row: dict[str, Any]) -> None:
    row["triton"] = None
    explanation = backends.explain_call("linear", "cuda", (), {})
    assert explanation.chosen == "triton" and not row["calls"]
    assert explanation.reasons == {
        "native": "no native",
        "triton": "runs this call",
        "reference": "can run it, but comes later in the order of preference",
    }
    assert str(explanation).startswith("linear on cuda: triton\n")


def test_a_backend_whose_library_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends.Implementation("triton", "a_module_that_is_not_there")
    monkeypatch.setitem(backends.TABLE, ("linear", "cuda"), (missing,))
    for _ in range(2):
        with pytest.raises(backends.BackendError, match="a_module_that_is_not_there cannot be imported"):
            backends.select("linear", "cuda", (), {})


def test_unknown_operator_and_device() -> None:
    with pytest.raises(ValueError, match="op='softmax' is unknown; allowed are attention, "):
        bk.explain("softmax", QUERY)
    with pytest.raises(
        backends.BackendError, match="attention has no implementation on 'mps'; it has on cpu, cuda"
    ):
        backends.select("attention", "mps", (), {})
    with pytest.raises(ValueError, match="op='x' is unknown"):
        backends.select("x", "cpu", (), {})


def test_every_row_ends_in_the_reference() -> None:
    for (op, device), row in backends.TABLE.items():
        assert row[-1].name == "reference", (op, device)
        function, _ = row[-1].load()
        assert callable(function)


def test_explain_names_reasons_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    explanation = bk.explain("attention", QUERY, QUERY, QUERY, is_causal=True)
    assert explanation.chosen == ("native" if _native.available() else "reference")
    assert "only interprets" in explanation.reasons["triton"]
    double = QUERY.double()
    assert bk.explain("attention", double, double, double).chosen == "reference"
    with backends.use("native"):
        refused = bk.explain("attention", double, double, double)
    assert refused.chosen is None and refused.error is not None and "no backend" in str(refused)
    assert bk.explain("layer_norm", QUERY, None, None).op == "layer_norm"


@pytest.mark.parametrize("op", ["attention", "attention_decode", "linear"])
def test_float32_on_a_gpu_is_triton_s(op: str) -> None:
    """The CUDA library has no float32: it says who has, and forcing it is an error."""
    calls = {
        "attention": (QUERY, QUERY, QUERY),
        "attention_decode": (QUERY, QUERY, QUERY, torch.ones(QUERY.shape[0], dtype=torch.int32)),
        "linear": (torch.zeros(4, 16), torch.zeros(8, 16)),
    }
    module = importlib.import_module(f"bigmodel_kernels.ops.{'attention.decode' if op.endswith('e') else op}")
    args, options = module.prepare(*calls[op])
    assert [row.name for row in backends.TABLE[op, "cuda"]] == ["native", "triton", "reference"]
    reason = (
        "it has no torch.float32, for its tensor cores take bfloat16 and float16; Triton's kernels take it"
    )
    assert backends.explain_call(op, "cuda", args, options).reasons["native"].startswith(reason)
    with backends.use("native"), pytest.raises(backends.BackendError, match=reason):
        backends.select(op, "cuda", args, options)


def test_forced_native_refuses_what_it_cannot_run() -> None:
    double = QUERY.double()
    with backends.use("native"), pytest.raises(backends.BackendError, match="cannot run attention on cpu: "):
        bk.attention(double, double, double)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backends.use("triton"), pytest.raises(backends.BackendError, match="only interprets"):
        bk.attention(QUERY, QUERY, QUERY)


def test_without_the_compiled_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigmodel_kernels import _native

    monkeypatch.setattr(_native, "reason", lambda: "it is not built")
    assert bk.explain("attention", QUERY, QUERY, QUERY).reasons["native"] == "it is not built"
    assert bk.attention(QUERY, QUERY, QUERY).shape == QUERY.shape


def test_import_is_light() -> None:
    """No transformers, no Triton, no compiled library, no CUDA."""
    script = """
import sys, torch
import bigmodel_kernels as bk
assert "transformers" not in sys.modules and "triton" not in sys.modules
assert not torch.cuda.is_initialized()
assert not torch.ops.loaded_libraries
assert "patch" in dir(bk)
try:
    bk.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_checks_are_cheap() -> None:
    """A call is checked each time it runs: that must cost microseconds (the limit is for a busy machine)."""
    import timeit

    from bigmodel_kernels.ops.attention import prepare
    from bigmodel_kernels.ops.attention.checks import check

    args, options = prepare(QUERY, QUERY, QUERY)
    assert min(timeit.repeat(lambda: check(*args, **options), number=200, repeat=5)) / 200 < 60e-6
