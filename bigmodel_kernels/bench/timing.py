"""Times several contenders of one case in turn, so that a change of the machine's mood meets all of them.

One round runs every contender once; the order moves by one with each round. Fast contenders are called
several times within a sample, so that the clock's own cost does not count. On a GPU the clock is a pair of
CUDA events around the sample, and nothing else runs in between; on demand the calls of a sample are replayed
from a CUDA graph, so that the time is that of the kernels.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bigmodel_kernels.ops.cuda_library import captured

#: A sample shorter than this is made of several calls.
SHORTEST_SAMPLE_S = 2e-3
#: A first call that took longer than this is not repeated for being a warm-up.
LONG_S = 20.0
FEWEST_ROUNDS = 3
MOST_ROUNDS = 101


class LeftOut(Exception):
    """Raised by a contender that cannot take part in a case; the message is the whole reason."""


def reason(error: Exception) -> str:
    """One line for the document."""
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, LeftOut) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Contender:
    """One way to compute a case. `run` returns the result, or None where there is nothing to compare.

    A contender that is `optional` is left out, with the reason, when it raises: a peer that this machine
    does not have. With `before`, every call is `run(before())`, and only `run` is timed: a backward needs a
    forward first.
    """

    name: str
    run: Callable[..., Any]
    optional: bool = False
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest, quartiles, and from how many samples of how many calls."""

    median_s: float
    min_s: float
    q1_s: float
    q3_s: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """Interquartile range as a part of the median."""
        return (self.q3_s - self.q1_s) / self.median_s if self.median_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Measured:
    """Timings by name, the first result of each, and who could not run.

    The clock is around "calls", or around the replay of a "graph" of them.
    """

    timings: dict[str, Timing]
    results: dict[str, Any]
    left_out: dict[str, str]
    clock: str = "calls"


def summarize(seconds: Sequence[float], calls: int = 1) -> Timing:
    """Statistics of samples, each the time of one call."""
    if not seconds:
        raise ValueError("seconds is empty; it must hold at least one sample")
    ordered = sorted(seconds)
    q1, median, q3 = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else (ordered[0],) * 3
    )
    return Timing(median, ordered[0], q1, q3, len(ordered), calls)


def once(run: Callable[[], Any], device: str, calls: int = 1) -> tuple[float, Any]:
    """Seconds of one call, averaged over `calls`, and the result of the last."""
    result = None
    if device.startswith("cuda"):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            result = run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls, result
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    return (time.perf_counter() - start) / calls, result


def _sample(contender: Contender, device: str, calls: int = 1) -> tuple[float, Any]:
    """`once` of a contender: what it needs before a call is not timed."""
    run, before = contender.run, contender.before
    if before is None:
        return once(run, device, calls)
    total, result = 0.0, None
    for _ in range(calls):
        seconds, result = once(functools.partial(run, before()), device)
        total += seconds
    return total / calls, result


def _captures(turns: Sequence[Contender], calls: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """A graph for each, or none at all where one cannot be captured."""
    try:
        return {c.name: captured(c.run, calls[c.name]) for c in turns if c.before is None}
    except Exception as error:  # a peer's reason not to be captured is its own
        warnings.warn(f"timed without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=3)
        torch.cuda.synchronize()
        return {}


def measure(contenders: Sequence[Contender], device: str, budget_s: float, graphs: bool = False) -> Measured:
    """Times the contenders within about `budget_s` seconds, warm-up apart.

    The first call of each is a warm-up: it packs weights, compiles and tunes. The second one tells how long a
    call takes. A contender that needs more than the whole budget keeps that call as its only sample (or even
    the first one, where that took so long that a warm-up cannot matter); the others run interleaved, at least
    three rounds, until the budget is used. With `graphs`, on a GPU, samples are replays of CUDA graphs.
    """
    results: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    samples: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    turns: list[Contender] = []
    for contender in contenders:
        name = contender.name
        try:
            seconds, results[name] = _sample(contender, device)
            if contender.optional or seconds <= max(LONG_S, budget_s):
                seconds = _sample(contender, device)[0]
        except Exception as error:  # whatever a peer raises, its reason goes into the document
            if not contender.optional:
                raise
            left_out[name] = reason(error)
            continue
        slow = seconds > budget_s
        samples[name] = [seconds] if slow else []
        calls[name] = 1 if slow else max(1, round(SHORTEST_SAMPLE_S / max(seconds, 1e-7)))
        if not slow:
            turns.append(contender)
    replays = _captures(turns, calls) if graphs and device.startswith("cuda") else {}
    start = time.perf_counter()
    for round_number in range(MOST_ROUNDS):
        if not turns or (round_number >= FEWEST_ROUNDS and time.perf_counter() - start > budget_s):
            break
        shift = round_number % len(turns)
        for contender in turns[shift:] + turns[:shift]:
            name = contender.name
            if name in replays:
                samples[name].append(once(replays[name], device)[0] / calls[name])
            else:
                samples[name].append(_sample(contender, device, calls[name])[0])
    timings = {name: summarize(values, calls[name]) for name, values in samples.items()}
    return Measured(timings, results, left_out, "graph" if replays else "calls")


def race(
    contenders: Mapping[str, Callable[[Any], Any]],
    batches: Sequence[Any],
    device: str,
    *,
    fewest: int = FEWEST_ROUNDS,
    budget_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Timing], dict[str, list[Any]]]:
    """Times passes over all batches, each batch by all contenders in turn.

    At least `fewest` passes, and on until `budget_s` seconds are used. The warm-up is the caller's. Returns
    the time of a pass, and the results of the last pass.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, list[Any]] = {}
    turn = list(contenders)
    start = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= fewest and time.perf_counter() - start >= budget_s:
            break
        totals = dict.fromkeys(contenders, 0.0)
        results = {name: [] for name in contenders}
        for i, batch in enumerate(batches):
            say(f"round {number + 1}, batch {i + 1} of {len(batches)}")
            shift = (number + i) % len(turn)
            for name in turn[shift:] + turn[:shift]:
                seconds, result = once(functools.partial(contenders[name], batch), device)
                totals[name] += seconds
                results[name].append(result)
        for name, seconds in totals.items():
            samples[name].append(seconds)
    return {name: summarize(values) for name, values in samples.items()}, results
