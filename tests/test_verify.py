"""The verifier itself: it must pass what is right and find what is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels import verify

REF = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EAGER = REF.to(torch.bfloat16) * (1 + 2**-7)


def test_passes_a_rounded_result() -> None:
    verdict = verify.compare(REF.to(torch.bfloat16), EAGER, REF)
    assert verdict.ok and verdict.max_error <= verdict.max_limit and "mean" in str(verdict)


@pytest.mark.parametrize("kind", ["forward", "gradient"])
def test_finds_errors(kind: str) -> None:
    rounded = REF.to(torch.bfloat16)
    one_wrong, biased, poisoned, infinite = rounded.clone(), rounded * 1.05, rounded.clone(), rounded.clone()
    one_wrong[500] += 1
    poisoned[3] = math.nan
    infinite[3] = math.inf
    for bad in (one_wrong, biased, poisoned, infinite, rounded[:-1]):
        assert not verify.compare(bad, EAGER, REF, kind).ok


def test_numbers_of_any_size_have_no_allowance_for_numbers_near_one() -> None:
    """Gradients of a model: small ones are held to their own rounding, or to what is negligible by others."""
    small, wrong = REF * 1e-6, REF * 1e-6
    wrong = torch.where(REF.abs() == REF.abs().max(), 1.1 * wrong, wrong)
    arguments = (wrong.to(torch.bfloat16), small.to(torch.bfloat16), small, "gradient")
    assert verify.compare(*arguments).ok
    assert not verify.compare(*arguments, 0.0).ok
    assert verify.compare(*arguments, 1e-6).ok


def test_both_limits_allow_what_chance_does() -> None:
    ref = torch.full((20,), 4.5, dtype=torch.float64)
    out = (ref + 2**-20).float()
    assert not verify.compare(out, ref.float(), ref).ok
    assert verify.compare(out, ref.float(), ref, chance=2**-19).ok
    assert not verify.compare(out, ref.float(), ref, chance=2**-21).ok


def test_infinities_must_be_where_they_belong() -> None:
    ref = torch.tensor([1.0, -math.inf], dtype=torch.float64)
    good, bad = ref.float(), torch.tensor([-math.inf, 1.0])
    assert verify.compare(good, good, ref).ok
    assert not verify.compare(bad, good, ref).ok
    assert not verify.compare(torch.tensor([1.0, math.inf]), good, ref).ok
    assert not verify.compare(torch.tensor([1.0, math.nan]), good, ref).ok


def test_empty_and_exact_results() -> None:
    empty = torch.zeros(0)
    assert verify.compare(empty, empty, empty.double()).ok
    exact = torch.zeros(5)
    assert verify.compare(exact, exact, exact.double()).ok
    with pytest.raises(ValueError, match="kind='x' is unknown"):
        verify.compare(empty, empty, empty, "x")


def test_cases_of_every_operator() -> None:
    everything = list(verify.cases())
    assert {c.op for c in everything} == set(verify.FUNCTIONS)
    assert {c.dtype for c in everything} == set(verify.DTYPES)
    assert len({str(c) for c in everything}) == len(everything)
    with pytest.raises(ValueError, match="op='x' is unknown"):
        next(verify.cases("x"))


def test_poisoned_memory() -> None:
    with verify.poisoned():
        assert torch.empty(7).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_run_reports_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [c for c in verify.cases("layer_norm", [torch.float32]) if c.label == "N=17"]
    seen: list[verify.Result] = []
    assert verify.run(cases, "reference", progress=seen.append) == seen
    assert seen[0].ok and seen[0].backend == "reference" and str(seen[0]).endswith("ok")

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return bk.layer_norm(*args, **kwargs) * 1.001

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(verify.FUNCTIONS, "layer_norm", (wrong, verify.layer_norm_formula))
    (result,) = verify.run(cases, "reference")
    assert not result.ok and "above the limit" in str(result)
    monkeypatch.setitem(verify.FUNCTIONS, "layer_norm", (broken, verify.layer_norm_formula))
    (result,) = verify.run(cases, "reference")
    assert not result.ok and "no such kernel" in str(result)


def test_a_backend_that_cannot_run_is_skipped_and_says_why() -> None:
    (case,) = (c for c in verify.cases("attention", [torch.float64]) if c.label == "S=17")
    result = verify.run_case(case, "native")
    assert result.skipped is not None and "native" in result.skipped
