"""The Triton kernels compile ahead of time, without a GPU, to matrix instructions and without spills."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

import bigmodel_kernels.ops
from bigmodel_kernels import triton_build, triton_runtime
from bigmodel_kernels.ops.linear.triton_gemm import gemm_tiles
from bigmodel_kernels.ops.product_triton import PART

ROOT = Path(__file__).parents[2]
WITH_PRODUCTS = (
    "linear_kernel", "hidden_backward_kernel", "attention_kernel", "attention_decode_kernel",
    "attention_backward_keys_kernel", "attention_backward_rows_kernel", "attention_backward_bias_kernel",
)  # fmt: skip


def _build(*arguments: str, timeout: int = 120) -> list[dict[str, Any]]:
    """A process of its own: this one may be the interpreter's, which cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bigmodel_kernels.triton_build", "--json", *arguments]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def test_matrix_instructions() -> None:
    """A product, attention and the three kernels of its gradient, by one process, which takes seconds to
    start; ``test_every_target_uses_its_matrix_unit`` has more, and Blackwell.
    """
    wanted = {"sm_80": "mma.m16n8k16", "sm_90": "wgmma", "gfx942": "v_mfma"}
    kernels = {
        "linear bf16 512x768x768": ["linear_kernel"],
        "attention bf16 d32": ["attention_kernel"],
        "attention backward bf16 d32": [
            f"attention_{name}_kernel" for name in ("delta", "backward_rows", "backward_keys")
        ],
    }
    options = [("--target", target) for target in wanted] + [("--case", case) for case in kernels]
    results = _build("--jobs", "1", *(argument for option in options for argument in option))
    for target in wanted:
        for case, names in kernels.items():
            found = [r for r in results if (r["target"], r["case"]) == (target, case)]
            assert [r["kernel"] for r in found] == names
    for result in results:
        assert result["spilled_bytes"] == 0 and result["registers"] > 0, result
        assert result["shared_bytes"] <= triton_build.TARGETS[result["target"]][1].shared_memory, result
        if result["kernel"] in WITH_PRODUCTS:
            assert wanted[result["target"]] in result["mma"] and result["shared_bytes"] > 0, result
            assert "bf16" in result["mma"], result


def _kernels() -> set[str]:
    """Names of the package's kernels: what a launch can name, by this package's convention."""
    names: set[str] = set()
    for module in pkgutil.walk_packages(bigmodel_kernels.ops.__path__, "bigmodel_kernels.ops."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                names.add(name)
    return names


def test_every_kernel_is_in_a_case() -> None:
    """Recorded, not compiled: ``make triton-build`` leaves no kernel out."""
    launched: set[str] = set()
    with triton_build.recorded() as launches, triton_runtime.pretend(triton_runtime.HOPPER):
        for run in triton_build.CASES.values():
            run()
            launched.update(launch.kernel.__name__ for launch in launches)
            launches.clear()
    assert launched == _kernels()


def _ttir(launch: triton_build.Launch, gpu: GPUTarget) -> str:
    """The kernel after Triton's own passes, which know no target: a tenth of a second."""
    source, options = launch.source()
    backend = make_backend(gpu)
    parsed = backend.parse_options({**options, **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(gpu, parsed, functions, backend.get_module_map(), context)
    return str(stages["ttir"](module, {}))


@pytest.mark.parametrize(
    "case", ["linear fp32 4096x768x3072 gelu", "feed_forward fp32 768x3072 gelu gated", "decode fp32 d64"]
)
def test_float32_products_are_summed_in_parts(case: str) -> None:
    """Every step's product starts from zero: Triton has not made one chain of roundings of them all."""
    gpu, target = triton_build.TARGETS["sm_90"]
    with triton_build.recorded() as launches, triton_runtime.pretend(target):
        triton_build.CASES[case]()
    products = 0
    for launch in launches:
        if launch.kernel.__name__ in WITH_PRODUCTS:
            text = _ttir(launch, gpu)
            zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", text))
            starts = re.findall(r"tt\.dot %[\w#]+, %[\w#]+, (%[\w#]+)", text)
            assert set(starts) <= zeros, text
            products += len(starts)
    assert products > 0
    tile = gemm_tiles(4096, 3072, 768, 4, target)[0]
    assert tile.tile_k <= PART  # and no step is a long chain itself


# The instructions that the devices are bought for. A decoding step has fewer rows than the 64 of a
# warpgroup's product: there NVIDIA's warps multiply each for itself.
_OWN = {"sm_80": "mma.m16n8k16", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
_OF_A_WARP = {**_OWN, "sm_90": "mma.m16n8k16", "sm_100": "mma.m16n8k16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("linear bf16 4096x768x3072 training", _OWN),
        ("feed_forward backward bf16 768x3072 gelu", _OWN),
        ("cross_entropy bf16 768x50257", _OWN),
        ("attention bf16 d64 causal", _OWN),
        ("attention bf16 d128 causal gqa", _OWN),
        ("attention backward bf16 d64 bias", _OWN),
        ("attention backward fp16 d64 causal", _OWN),
        ("attention backward bf16 d128 causal gqa", _OWN),
        ("decode bf16 d128 gqa paged", _OF_A_WARP),
    ],
)
def test_every_target_uses_its_matrix_unit(case: str, wanted: dict[str, str]) -> None:
    """Tensor descriptors on Hopper and Blackwell included: the wanted instruction, and no spill."""
    results = _build("--case", case, "--jobs", "2", timeout=600)
    assert {r["target"] for r in results} == set(wanted)
    for result in results:
        if result["kernel"] in WITH_PRODUCTS:
            assert wanted[result["target"]] in result["mma"], result


def test_a_case_that_is_not_there() -> None:
    with pytest.raises(SystemExit):
        triton_build.main(["--case", "no such case"])


def test_a_spill_and_a_failure_are_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit status and what is said of them, without a compiler."""

    def build(case: str, target: str) -> list[triton_build.Result]:
        if case == "broken":
            raise ValueError("no such instruction")
        spilled = 8 if case == "spilling" else 0
        shared = 232_449 if case == "sharing" else 232_448
        return [triton_build.Result(case, "kernel", target, 32, shared, spilled, "-", 0.1)]

    monkeypatch.setattr(triton_build, "build", build)
    monkeypatch.setattr(triton_build, "CASES", dict.fromkeys(("fine", "spilling", "sharing", "broken")))
    options = ["--target", "sm_90", "--jobs", "1"]
    assert triton_build.main([*options, "--case", "fine"]) == 0
    assert "1 kernels in" in capsys.readouterr().out
    assert triton_build.main([*options, "--case", "spilling"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    assert triton_build.main([*options, "--case", "sharing"]) == 1
    assert "needs 232449 bytes of shared memory" in capsys.readouterr().err
    assert triton_build.main([*options, "--case", "broken"]) == 1
    assert "broken on sm_90: ValueError: no such instruction" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_on_every_target() -> None:
    """Takes minutes; a spill or a failure makes the exit status 1."""
    results = _build(timeout=1800)
    assert {r["target"] for r in results} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for result in results:
        half = " fp32 " not in result["case"]
        if half and result["kernel"] in WITH_PRODUCTS:
            assert result["mma"] != "-", result


def test_an_interpreting_process_refuses() -> None:
    code = "from bigmodel_kernels import triton_build as b; b.build('norm bf16 384', 'sm_90')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and "TRITON_INTERPRET" in result.stderr
