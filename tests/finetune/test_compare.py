from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_kernels.finetune import Settings, compare
from bigmodel_kernels.finetune.compare import arguments, distance, plan, summarise

Tiny = Callable[..., Settings]


def test_the_plan_changes_what_is_compared_and_nothing_else(tiny: Tiny) -> None:
    runs = plan(tiny(threads=1), [3, 5])
    kinds = ("eager", "patched", "eager-2-threads")
    assert list(runs) == [f"{kind}-{seed}" for seed in (3, 5) for kind in kinds]
    for name, run in runs.items():
        assert run.dropout == 0.0
        assert (run.implementation, run.seed) == (name.split("-")[0], int(name.split("-")[-1]))
    eager, patched = runs["eager-3"], runs["patched-3"]
    assert replace(patched, implementation="eager", output=eager.output) == eager
    assert replace(runs["eager-2-threads-3"], threads=1, output=eager.output) == eager
    assert plan(tiny(threads=4), [0])["eager-1-threads-0"].threads == 1
    ours = plan(tiny(fused_loss=True, recompute=True), [0])
    assert {name for name, run in ours.items() if run.fused_loss and run.recompute} == {"patched-0"}


def test_comparison(tiny: Tiny) -> None:
    settings = tiny(steps=3, threads=1)
    found = compare(settings, [0, 1], isolated=False)
    assert found == json.loads((settings.folder / "compare.json").read_text())
    assert (settings.folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert found["steps"] == 3 and found["seeds"] == [0, 1] and found["metric"] == "f1"
    assert set(found["distance"]) == set(found["yardstick"]["distance"]) == {"0", "1"}
    assert all(numbers["max"] < 1e-4 for numbers in found["distance"].values())
    assert found["yardstick"]["kind"] == "eager-2-threads"
    assert all(numbers["max"] < 1e-4 for numbers in found["yardstick"]["distance"].values())
    eager, patched = found["runs"]["eager"], found["runs"]["patched"]
    assert len(eager["score"]["all"]) == 2
    assert eager["score"]["least"] <= eager["score"]["mean"] <= eager["score"]["most"]
    assert found["speedup"] == eager["step_s"] / patched["step_s"]
    assert "patched" in found["patch_report"]
    with pytest.raises(ValueError, match=r"is not empty, and nothing is overwritten.*--resume"):
        compare(settings, [0, 1], isolated=False)
    # Nothing is trained again: the same numbers, times too.
    assert compare(settings, [0, 1], isolated=False, resume=True) == found
    with pytest.raises(ValueError, match="is of a run with other settings"):
        compare(replace(settings, steps=4), [0, 1], isolated=False, resume=True)


def test_what_agrees_and_what_does_not() -> None:
    def judged(patched: list[float], yardstick: list[float], score: float) -> tuple[bool, bool]:
        facts = {"median_step_s": 1.0, "tokens_per_second": 1.0, "peak_memory_bytes": 1, "threads": 1}
        facts |= {"patch_report": "", "versions": {}}

        def run(loss: float, f1: float) -> dict[str, Any]:
            return {"losses": [1.0, loss], "metrics": {"f1": f1}, "facts": facts, "settings": {"task": "t"}}

        results = {}
        for seed in range(2):
            results[f"eager-{seed}"] = run(0.5, 0.6 + 0.1 * seed)
            results[f"patched-{seed}"] = run(0.5 + patched[seed], score)
            results[f"sdpa-{seed}"] = run(0.5 + yardstick[seed], 0.6)
        found = summarise(results, [0, 1], "sdpa", "f1", True)
        return found["losses_agree"], found["scores_agree"]

    # One seed may be further than its own yardstick, but none than the furthest.
    assert judged([0.02, 0.0], [0.01, 0.03], 0.70) == (True, True)
    assert judged([0.0, -0.04], [0.01, 0.03], 0.56) == (False, True)
    assert judged([0.0, 0.0], [0.01, 0.03], 0.54) == (True, False)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_wrong_seeds_are_named(tiny: Tiny, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="it must hold different numbers, one at least"):
        compare(tiny(), seeds)


curves = st.lists(st.floats(-10, 10), min_size=1, max_size=20)


@given(curves, st.data())
def test_distance(a: list[float], draw: st.DataObject) -> None:
    b = draw.draw(st.lists(st.floats(-10, 10), min_size=len(a), max_size=len(a)))
    found = distance(a, b)
    assert found == distance(b, a)
    assert distance(a, a) == {"max": 0.0, "mean": 0.0, "last": 0.0}
    assert found["last"] == abs(a[-1] - b[-1]) <= found["max"]
    assert found["mean"] <= found["max"] * (1 + 1e-12)
    with pytest.raises(ValueError, match="they must have as many"):
        distance(a, [*b, 0.0])


def test_settings_become_options_that_give_them_back(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from bigmodel_kernels import cli
    from bigmodel_kernels.finetune import command, run

    seen: list[Any] = []

    def catch(settings: Settings, **kwargs: Any) -> None:
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(command, "finetune", catch)
    settings = run.complete(tiny(autocast=True, lora=3, warmup=0.25, implementation="sdpa", dropout=0.0))
    CliRunner().invoke(cli.app, ["finetune", *arguments(settings)])
    assert seen == [settings]


@pytest.mark.slow
def test_runs_in_processes_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    settings = tiny(steps=2, threads=1)
    words = [w for w in arguments(settings) if w != "--patched"]
    command = [
        sys.executable,
        "-m",
        "bigmodel_kernels.cli",
        "finetune",
        "compare",
        *words,
        "--seeds",
        "0",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["runs"]["eager"]["peak_memory_bytes"] > 2**20
    assert found["distance"]["0"]["max"] < 1e-4
    assert (settings.folder / "patched-0.log").is_file()
