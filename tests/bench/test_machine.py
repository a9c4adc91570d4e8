"""Facts, ceilings and the verdict whether a run is to be trusted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bigmodel_kernels import _native
from bigmodel_kernels.bench import machine
from bigmodel_kernels.bench.timing import Timing


def calibration(gemm: float = 1.0, copy: float = 1.0, spread: float = 0.0) -> machine.Calibration:
    def timing(median: float) -> Timing:
        return Timing(median, median, median * (1 - spread / 2), median * (1 + spread / 2), 9, 1)

    return machine.Calibration({"float32": 1e11}, {"float32": timing(gemm)}, 1e10, timing(copy))


def test_a_steady_and_quiet_run_is_trusted() -> None:
    verdict = machine.trust(calibration(), calibration(gemm=1.05, copy=0.95), 0.02)
    assert verdict == machine.Trust(True, [])


@pytest.mark.parametrize(
    ("end", "load", "words"),
    [
        (calibration(gemm=1.3), 0.0, "float32 GEMM speed moved by 30%"),
        (calibration(gemm=0.7), 0.0, "float32 GEMM speed moved by 30%"),
        (calibration(copy=1.2), 0.0, "copy speed moved by 20%"),
        (calibration(spread=0.4), 0.0, "samples spread by 40%"),
        (calibration(), 0.5, "other processes used 50% of the processors"),
    ],
)
def test_every_disturbance_is_named(end: machine.Calibration, load: float, words: str) -> None:
    verdict = machine.trust(calibration(), end, load)
    assert not verdict.trusted
    assert any(words in reason for reason in verdict.reasons)


def test_a_system_that_counts_no_load_can_still_be_trusted() -> None:
    assert machine.trust(calibration(), calibration(), None).trusted


def test_calibration_measures_every_dtype() -> None:
    measured = machine.calibrate("cpu", ["float32", "bfloat16"], quick=True)
    assert set(measured.gemm_flops) == {"float32", "bfloat16"}
    assert min(measured.gemm_flops.values()) > 0
    assert measured.copy_bytes > 1e8


def test_the_ceiling_of_a_half_on_a_cpu_is_the_best_product_of_any_dtype() -> None:
    both = dataclasses.replace(calibration(), gemm_flops={"float32": 1e11, "bfloat16": 2e9})
    assert both.peak("bfloat16", "cpu") == 1e11
    assert both.peak("bfloat16", "cuda") == 2e9


def test_facts_and_file_name() -> None:
    facts = machine.facts("cpu")
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cores"] >= 1
    slug = machine.slug({**facts, "cpu": "Intel(R) Xeon(R) @ 2.1GHz", "cores": 4, "isa": "avx512"})
    assert slug == "intel-xeon-2-1ghz-4-cores-avx512"
    assert machine.slug({**facts, "gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"


@pytest.mark.skipif(not _native.available(), reason=str(_native.reason()))
def test_finding_instruction_sets_leaves_the_chosen_one() -> None:
    before = machine.instruction_set()
    assert before in machine.instruction_sets()
    assert machine.instruction_sets()[-1] in ("portable", "neon")  # what every CPU of the machine has
    assert machine.instruction_set() == before
