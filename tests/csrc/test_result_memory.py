"""Memory of large results on the CPU: used again, given back, and torch's to all who look; and of weights."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native

pytestmark = [
    pytest.mark.skipif(_native.reason() is not None, reason="needs the compiled library"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux"),
    pytest.mark.skipif(
        torch.__version__ < "2.11" or "BIGMODEL_SANITIZE" in os.environ, reason="results are torch's own here"
    ),
]

WEIGHT = torch.randn(512, 64)


def result(rows: int = 256) -> Tensor:
    """Half a megabyte for 256 rows."""
    return bk.linear(torch.ones(rows, 64), WEIGHT)


def test_a_freed_result_is_the_next_ones_memory() -> None:
    first = result()
    place = first.data_ptr()
    del first
    assert result().data_ptr() == place


def test_results_that_live_together_share_nothing() -> None:
    expected = torch.ones(256, 64) @ WEIGHT.t()
    kept = [result(256 + i) for i in range(40)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    for t in kept:
        torch.testing.assert_close(t[:256], expected)


def test_a_result_behaves_as_torchs_own() -> None:
    with torch.inference_mode():
        assert result().is_inference()
    t = result()
    assert t._version == 0 and not t.is_inference() and t.is_contiguous() and t.data_ptr() % 64 == 0
    view = t[3:5]
    values = view.clone()
    del t
    for _ in range(5):
        result()
    assert torch.equal(view, values)  # a view holds the whole
    assert torch.equal(view.share_memory_(), values)
    assert torch.from_numpy(view.numpy()).data_ptr() == view.data_ptr()


def test_threads_take_and_give() -> None:
    expected = result()
    wrong: list[str] = []

    def work() -> None:
        held: list[Tensor] = []
        for i in range(60):
            held.append(result(256 + i % 7))
            if len(held) > 3:
                t = held.pop(0)
                if not torch.equal(t[:256], expected):
                    wrong.append("another thread's numbers")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _child(queue: multiprocessing.Queue[bool]) -> None:
    torch.set_num_threads(1)
    queue.put(bool(result().isfinite().all()))


def test_a_forked_child_can_go_on() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        process = context.Process(target=_child, args=(queue,))
        process.start()
        assert queue.get(timeout=60)
        process.join()
    finally:
        torch.set_num_threads(before)


def test_what_waits_can_be_asked_back() -> None:
    for t in [result() for _ in range(3)]:
        del t
    assert torch.ops.bigmodel.cpu_release_memory() >= 3 * 256 * 512 * 4
    assert torch.ops.bigmodel.cpu_release_memory() == 0
    torch.testing.assert_close(result(), torch.ones(256, 64) @ WEIGHT.t())


def printed_by(script: str) -> list[int]:
    """The numbers that it prints in a process of its own, where resident() is its memory in MB."""
    before = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, bigmodel_kernels as bk\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
    )
    command = [sys.executable, "-c", before + script, str(Path(__file__).resolve().parents[2])]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in out.split()]


def test_memory_that_is_no_longer_needed_goes_back_to_the_system() -> None:
    """In a process of its own, whose memory is nobody else's."""
    script = (
        "x, w = torch.ones(256, 16), torch.ones(1024, 16)\n"
        "bk.linear(x, w)\n"
        "before = resident()\n"
        "kept = [bk.linear(x, w) for _ in range(400)]\n"
        "most = resident()\n"
        "del kept\n"
        "freed = resident()\n"
        "for _ in range(60): bk.linear(x, w)\n"
        "print(most - before, freed - before, resident() - before)\n"
    )
    most, freed, later = printed_by(script)
    assert 380 < most < 480  # 400 of a megabyte
    assert freed > most - 20  # it waits for the next ones
    assert later < 100  # which need no more than `least`, 64 MB


def test_packed_weights_lie_one_behind_the_other() -> None:
    """In a process of its own: where a slab ends the next weight is in another."""
    script = (
        "pack = lambda n: torch.ops.bigmodel.cpu_pack_weight([w[:n]], 'linear')\n"
        "w, x = torch.randn(1024, 256), torch.ones(2, 256)\n"
        "bk.linear(x, w)\n"
        "before = resident()\n"
        "held = [pack(1024 - 32 * (i % 3)) for i in range(200)]\n"
        "gaps = [b.data_ptr() - a.data_ptr() - a.numel() for a, b in zip(held, held[1:])]\n"
        "most = resident()\n"
        "for i, t in enumerate(held): assert t[-4:].any()\n"
        "half = held[::2]\n"
        "del held, t\n"
        "freed = resident()\n"
        "del half\n"
        "print(sum(gap == 0 for gap in gaps), most - before, freed - before, resident() - before)\n"
    )
    together, most, half, none = printed_by(script)
    assert together >= 190  # four slabs of 64 MB
    assert 180 < most < 230 and half < 0.6 * most and none < 20


def test_threads_pack_and_free() -> None:
    weights = [torch.randn(512 + i, 256) for i in range(4)]
    expected = [torch.ops.bigmodel.cpu_pack_weight([w], "linear") for w in weights]
    wrong: list[int] = []

    def work() -> None:
        for i in range(40):
            packed = torch.ops.bigmodel.cpu_pack_weight([weights[i % 4]], "linear")
            if not torch.equal(packed, expected[i % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
