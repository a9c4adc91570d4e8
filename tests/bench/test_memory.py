"""Peak memory of a call: what it holds at once, however much it lets go."""

from __future__ import annotations

import pytest
import torch

from bigmodel_kernels.bench import memory
from bigmodel_kernels.bench.timing import Contender

MIB = 2**20


def filled(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


def measured(run: object, before: object = None) -> float:
    size = memory.peak(Contender("contender", run, before=before), "cpu")  # type: ignore[arg-type]
    if size is None:
        pytest.skip("this system does not tell the peak of a process")
    return size / MIB


def test_peak_of_what_is_held_at_once() -> None:
    def run() -> None:
        a = filled(40)
        del a
        b, c = filled(30), filled(50)
        del b, c

    measured(run)  # the allocator's first growth
    assert measured(run) == pytest.approx(80, abs=4)
    assert measured(lambda: filled(100)) == pytest.approx(100, abs=4)  # the result counts too
    assert measured(lambda: None) < 4


def test_small_pieces_that_were_freed_before_are_counted() -> None:
    def run() -> None:
        pieces = [torch.ones(4000) for _ in range(4000)]
        del pieces

    measured(run)
    assert measured(run) == pytest.approx(4000 * 16000 / MIB, rel=0.15)


def test_what_comes_before_is_held_already() -> None:
    assert measured(lambda given: given + 1, before=lambda: filled(60)) == pytest.approx(60, abs=4)
