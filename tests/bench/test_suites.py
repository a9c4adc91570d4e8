"""The suites of benchmarks/, and the document that they give."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, document, machine, suite
from bigmodel_kernels.bench.timing import Timing

NAMES = (
    "attention",
    "attention_maps",
    "embedding",
    "feed_forward",
    "linear",
    "norm",
    "cross_entropy",
    "bert",
    "gpt2",
    "training",
    "translation",
    "decoders",
    "encoders",
)


def _timing(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, seconds, 1, 1)


CALIBRATION = machine.Calibration({"float32": 100.0}, {"float32": _timing(1.0)}, 10.0, _timing(1.0))


def toy(difference: float = 0.0) -> Suite:
    def build(case: Case, setting: Setting) -> Prepared:
        x = torch.full((case.sizes["n"],), 1000.0)  # so that a quarter is a rounding
        return Prepared(
            [Contender("torch", lambda: x), Contender("bigmodel", lambda: x + difference)],
            "torch",
            [Stage(flops=200.0, bytes=1.0)],
            items=case.sizes["n"],
        )

    case = Case("n=4", "float32", {"n": 4})
    return Suite("toy", build, (case,), (case,))


@pytest.fixture(scope="module")
def run_of_all() -> dict[str, Any]:
    torch.set_num_threads(1)
    return suite.run(
        [suite.load(name) for name in NAMES], Setting(), quick=True, budget_s=0.01, dtypes=["float32"]
    )


def test_the_folder_has_these_suites() -> None:
    assert set(suite.find()) == set(NAMES)


def test_every_quick_case_runs_and_agrees(run_of_all: dict[str, Any]) -> None:
    assert {row["suite"] for row in run_of_all["rows"]} == set(NAMES)
    for row in run_of_all["rows"]:
        assert {"bigmodel", row["peer"]} <= set(row["times"])
        if row["sizes"].get("dropout") or row["sizes"].get("phase") in ("AdamW", "whole step"):
            assert row["max_difference"] is None, row["case"]
        else:
            assert row["max_difference"] < 1e-5, row["case"]
        assert row["floor_s"] > 0


def test_the_document_is_as_its_schema_says_also_as_json(run_of_all: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.json"
    document.write(run_of_all, path)
    assert document.read(path) == json.loads(json.dumps(run_of_all))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("trust"), "document has no 'trust'"),
        (lambda d: d.update(more=1), "document has 'more'"),
        (lambda d: d.update(schema=2), "document.schema is 2"),
        (lambda d: d.update(quick=1), "document.quick is 1; allowed is boolean"),
        (lambda d: d["rows"][0].update(floor_s="fast"), r"document.rows\[0\].floor_s is 'fast'"),
        (lambda d: d["rows"][0].update(noisy=True, floor_s=True), r"floor_s is True; allowed is number"),
        (lambda d: d["rows"][0]["times"]["bigmodel"].pop("min_s"), "times.bigmodel has no 'min_s'"),
        (lambda d: d["machine"].update(gpu="H100"), "document.machine.gpu is 'H100'"),
    ],
)
def test_a_document_that_is_not_is_refused(run_of_all: dict[str, Any], change: Any, words: str) -> None:
    value = copy.deepcopy(run_of_all)
    change(value)
    with pytest.raises(ValueError, match=words):
        document.check(value)


def test_committed_results_are_as_the_schema_says() -> None:
    for path in (suite.default_folder() / "results").glob("*.json"):
        document.read(path)


def test_ratios_floor_and_throughput() -> None:
    row = suite.run_case(toy(difference=0.25), toy().cases[0], Setting(), CALIBRATION, budget_s=0.01)
    assert (row["floor_s"], row["floor_by"]) == (2.0, "compute")
    assert row["max_difference"] == 0.25
    times = {name: t["median_s"] for name, t in row["times"].items()}
    assert row["speedup"]["bigmodel"] == times["torch"] / times["bigmodel"]
    assert row["to_floor"]["torch"] == times["torch"] / 2.0
    assert row["throughput"]["torch"] == 4 / times["torch"]


def test_the_floor_is_a_sum_of_stages_each_by_its_own_limit() -> None:
    stages = [Stage(flops=100.0, bytes=1.0), Stage(flops=1.0, bytes=50.0)]
    prepared = Prepared([], "torch", stages)
    assert suite.floor(prepared, "float32", "cpu", CALIBRATION) == (6.0, "memory")


def test_full_cases_are_declared_for_float32_and_bfloat16() -> None:
    for name in NAMES:
        cases = suite.load(name).cases
        assert {case.dtype for case in cases} == {"float32", "bfloat16"}
        assert len({(case.label, case.dtype) for case in cases}) == len(cases)


def test_bert_lengths_are_a_seeded_ragged_batch() -> None:
    path = suite.find()["bert"]
    bert = suite._import(path)
    case = bert.SUITE.cases[0]
    lengths = bert.lengths_of(case)
    assert lengths == bert.lengths_of(case)
    assert len(lengths) == 32
    assert 8 <= min(lengths) < max(lengths) <= 256


def test_a_text_in_a_half_type_is_judged_by_how_likely_its_tokens_are() -> None:
    gpt2 = suite._import(suite.find()["gpt2"])
    case = gpt2.case("tiny", "bfloat16", 2, 8, 6, tiny=True)
    with torch.inference_mode():
        prepared = gpt2.build(case, Setting())
        text = prepared.contenders[0].run()
        likely = prepared.comparable(text)
        other = torch.cat([text[:, :8], torch.randint(0, 500, (2, 6))], dim=1)
        unlikely = prepared.comparable(other)
    assert likely.shape == (2, 6) and likely.min() > 1 - 2**-6 and likely.max() <= 1
    assert (unlikely - likely).abs().max() > suite.AGREES["bfloat16"]


def test_missing_folder_and_unknown_suite_say_so(tmp_path: Path) -> None:
    with pytest.raises(suite.SuitesNotFound, match="they come with the source tree"):
        suite.find(tmp_path)
    with pytest.raises(suite.SuitesNotFound, match="suite='nope' is unknown; allowed are attention"):
        suite.load("nope")


def test_an_interrupted_run_keeps_its_rows() -> None:
    whole = toy()

    def build(case: Case, setting: Setting) -> Prepared:
        if case is last:
            raise KeyboardInterrupt
        return whole.build(case, setting)

    first, last = (Case(label, "float32", whole.quick[0].sizes) for label in ("first", "last"))
    found = suite.run([Suite("cut", build, (first,), (first, last))], Setting(), quick=True, budget_s=0.01)
    document.check(found)
    assert found["interrupted"] and [row["case"] for row in found["rows"]] == ["first"]
    with pytest.raises(KeyboardInterrupt):  # nothing to keep
        suite.run([Suite("cut", build, (last,), (last,))], Setting(), quick=True, budget_s=0.01)


def test_a_gpu_has_cases_of_its_own() -> None:
    both = Suite("both", toy().build, (Case("cpu", "float32", {}),), (), gpu=(Case("gpu", "float32", {}),))
    for device, label in (("cpu", "cpu"), ("cuda", "gpu"), ("cuda:1", "gpu")):
        assert [case.label for _, case in suite.select([both], device=device)] == [label]
