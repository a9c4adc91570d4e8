"""The method: statistics, budgets, turns, contenders that cannot run."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bigmodel_kernels.bench import timing as timing_module
from bigmodel_kernels.bench.timing import FEWEST_ROUNDS, MOST_ROUNDS, Contender, measure, race, summarize


def test_summary_is_median_and_quartiles() -> None:
    timing = summarize([4.0, 1.0, 2.0, 3.0, 100.0], calls=7)
    assert (timing.median_s, timing.min_s, timing.q1_s, timing.q3_s) == (3.0, 1.0, 2.0, 4.0)
    assert (timing.samples, timing.calls) == (5, 7)
    assert timing.spread == pytest.approx(2 / 3)


def test_summary_of_one_sample_and_of_none() -> None:
    assert summarize([2.0]).spread == 0.0
    with pytest.raises(ValueError, match="seconds is empty"):
        summarize([])


def test_contenders_run_in_turn() -> None:
    order: list[str] = []

    def contender(name: str) -> Contender:
        def run() -> str:
            order.append(name)
            time.sleep(0.003)  # longer than the shortest sample, so one call each
            return name

        return Contender(name, run)

    measured = measure([contender(name) for name in "abc"], "cpu", budget_s=0.05)
    assert order[:6] == list("aabbcc")  # warm-up
    rounds = ["".join(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert rounds[:4] == ["abc", "bca", "cab", "abc"]
    assert measured.results == {name: name for name in "abc"}
    assert {t.samples for t in measured.timings.values()} == {len(rounds)}
    assert FEWEST_ROUNDS <= len(rounds) <= MOST_ROUNDS


def test_fast_calls_are_gathered_into_one_sample() -> None:
    timing = measure([Contender("fast", lambda: None)], "cpu", budget_s=0.01).timings["fast"]
    assert timing.calls > 100
    assert timing.median_s < 1e-4


def test_what_comes_before_a_call_is_not_timed() -> None:
    given: list[int] = []

    def before() -> int:
        time.sleep(0.001)
        return len(given)

    measured = measure([Contender("step", given.append, before=before)], "cpu", budget_s=0.01)
    assert given == list(range(len(given))) and len(given) > FEWEST_ROUNDS  # every call has its own
    assert measured.timings["step"].median_s < 0.0005


def test_a_contender_slower_than_the_budget_is_timed_once() -> None:
    measured = measure(
        [Contender("slow", lambda: time.sleep(0.05)), Contender("fast", lambda: None)], "cpu", budget_s=0.02
    )
    assert measured.timings["slow"].samples == 1
    assert measured.timings["slow"].median_s >= 0.05
    assert measured.timings["fast"].samples >= FEWEST_ROUNDS


def test_a_very_slow_contender_is_not_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_module, "LONG_S", 0.01)
    calls = []

    def run() -> None:
        calls.append(1)
        time.sleep(0.03)

    measure([Contender("slow", run)], "cpu", budget_s=0.005)
    assert len(calls) == 1
    measure([Contender("compiles", run, optional=True)], "cpu", budget_s=0.005)
    assert len(calls) == 3


def test_an_optional_contender_that_raises_is_left_out_with_its_reason() -> None:
    def broken() -> None:
        raise RuntimeError("no such backend\nand more")

    measured = measure([Contender("ok", lambda: 1), Contender("peer", broken, optional=True)], "cpu", 0.01)
    assert measured.left_out == {"peer": "RuntimeError: no such backend"}
    assert set(measured.timings) == {"ok"}
    with pytest.raises(RuntimeError, match="no such backend"):
        measure([Contender("ours", broken)], "cpu", 0.01)


def test_a_race_runs_every_batch_by_all_in_turn_and_keeps_the_last_results() -> None:
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Callable[[int], tuple[int, int]]:
        def run(batch: int) -> tuple[int, int]:
            calls.append((name, batch))
            return batch, len(calls)

        return run

    names = ("a", "b", "c")
    timings, results = race({name: contender(name) for name in names}, [1, 2], "cpu", fewest=4)
    assert len(calls) == 4 * 2 * 3
    for k in range(0, len(calls), 3):  # each batch by all, before the next batch
        assert {name for name, _ in calls[k : k + 3]} == set(names)
        assert len({batch for _, batch in calls[k : k + 3]}) == 1
    for batch in (1, 2):  # nobody is always the first
        assert {name for name, of in calls[::3] if of == batch} == set(names)
    assert all(found.samples == 4 and found.median_s > 0 for found in timings.values())
    for found in results.values():
        assert [batch for batch, _ in found] == [1, 2] and all(call > 3 * 2 * 3 for _, call in found)


def test_a_race_goes_on_for_its_budget() -> None:
    timings, _ = race({"a": lambda batch: time.sleep(0.002)}, [1], "cpu", fewest=2, budget_s=0.05)
    assert 5 <= timings["a"].samples <= 25
    assert timings["a"].median_s >= 0.002
