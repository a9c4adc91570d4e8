"""What a process may do around a call: fork, call from many threads, be interrupted, run beside others."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and forks")


class Block:
    """Weights of a small layer, the calls that share them, and their inputs."""

    def __init__(self) -> None:
        r = torch.Generator().manual_seed(0)
        self.x = torch.randn(3, 17, 48, generator=r)
        self.query = torch.randn(3, 4, 17, 12, generator=r)
        self.w_in, self.b_in = torch.randn(96, 48, generator=r) / 7, torch.randn(96, generator=r)
        self.w_out, self.b_out = torch.randn(48, 96, generator=r) / 10, torch.randn(48, generator=r)
        self.norm, self.table = torch.randn(48, generator=r), torch.randn(50, 48, generator=r)
        self.ids = torch.randint(50, (3, 17), generator=r)
        self.angles = torch.randn(3, 17, 6, generator=r)
        self.target = torch.randint(50, (51,), generator=r)
        self.calls: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: bk.linear(self.x, self.w_in, self.b_in, activation="gelu"),
            "feed_forward": lambda: bk.feed_forward(
                self.x, self.w_in, self.b_in, self.w_out, self.b_out, activation="gelu_tanh", residual=self.x
            ),
            "attention": lambda: bk.attention(self.query, self.query, self.query, is_causal=True),
            "layer_norm": lambda: bk.layer_norm(self.x, self.norm, None, residual=self.x),
            "rms_norm": lambda: bk.rms_norm(self.x, self.norm),
            "embedding": lambda: bk.embedding(self.ids, self.table),
            "rotary": lambda: bk.rotary(self.query, self.query, self.angles, self.angles)[0],
            "linear_cross_entropy": lambda: bk.linear_cross_entropy(
                self.x.reshape(51, 48), self.table, self.target, reduction="none"
            ),
            "training": self.training,
        }

    def training(self) -> Tensor:
        """Through the training forms and gradients of the products and of attention."""
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (self.x, self.w_in, self.w_out, self.query)]
            x, w_in, w_out, query = leaves
            y = bk.feed_forward(x, w_in, self.b_in, w_out, self.b_out, activation="gelu").square().mean()
            (y + bk.attention(query, query, query).square().mean()).backward()
        return torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])

    def results(self) -> dict[str, Tensor]:
        with torch.no_grad(), backends.use("native"):
            return {name: call() for name, call in self.calls.items()}


def digest(results: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in results.values())).hexdigest()


def different(results: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name, result in results.items() if not torch.equal(result, expected[name])]


@linux
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_calls_after_fork() -> None:
    """A child of a process that has used the library goes on with its packed weights, on one thread."""
    block = Block()
    expected = digest(block.results())
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"failed"
        try:
            torch.set_num_threads(1)  # torch's own pool does not outlive a fork
            said = digest(block.results()).encode()
        finally:
            os.write(write, said)
            os._exit(0)  # neither pytest's clean-up nor the parent's at-exit functions are the child's
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert said == expected
    assert digest(block.results()) == expected


def together(block: Block, rounds: int) -> list[dict[str, Tensor]]:
    """The results of four threads that start at the same time."""
    results: list[dict[str, Tensor]] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        results.extend(block.results() for _ in range(rounds))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 * rounds, "a thread has failed"
    return results


def test_threads_share_weights() -> None:
    block = Block()
    expected = block.results()
    assert not any(different(each, expected) for each in together(block, 10))


def test_threads_pack_together() -> None:
    """The first calls of all threads come at once, before anything is packed."""
    expected = Block().results()
    assert not any(different(each, expected) for each in together(Block(), 1))


def test_processes_give_the_same_bits() -> None:
    here = Path(__file__)
    code = "import torch; torch.set_num_threads(1); from test_robustness import Block, digest; "
    code += "print(digest(Block().results()))"
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)
    ]
    said = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 2
    assert said == [digest(Block().results())] * 2


@linux
def test_interrupt_in_a_call() -> None:
    """SIGINT while a kernel runs raises KeyboardInterrupt behind the call; the next calls are as before."""
    block = Block()
    expected = block.results()
    long = torch.randn(1, 8, 3000, 64, generator=torch.Generator().manual_seed(0))
    entered = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        entered.wait()
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), torch.no_grad(), backends.use("native"):
            entered.set()
            for _ in range(1000):
                bk.attention(long, long, long)
    finally:
        other.join()
        signal.signal(signal.SIGINT, before)
    assert not different(block.results(), expected)


class Allocated(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
glibc = pytest.mark.skipif(
    not hasattr(libc, "mallinfo2"), reason="asks glibc 2.33 or newer what is allocated"
)


def held() -> tuple[int, int]:
    """Bytes that the C library has given out, and bytes of this process in memory."""
    gc.collect()
    assert libc is not None
    libc.mallinfo2.restype = Allocated
    given = libc.mallinfo2()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return given.uordblks + given.hblkhd, resident


CALLS = list(Block().calls)


@glibc
@pytest.mark.parametrize("calls", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_memory_stays_flat(name: str, calls: int) -> None:
    """Thousands of calls, a quarter of that through autograd, hold no more than a few: nothing stays."""
    call = Block().calls[name]
    count, traced = calls // 4 if name == "training" else calls, 300
    with torch.no_grad(), backends.use("native"):
        for _ in range(200):
            call()
        before = held()
        for _ in range(count):
            call()
        after = held()
        tracemalloc.start()
        # Autograd keeps a pool of nodes, which fills ever more slowly; what stays of every call never ends.
        python, last = traced * 20, 0
        for _ in range(12):
            for _ in range(traced):
                call()
            gc.collect()
            python, last = tracemalloc.get_traced_memory()[0] - last, tracemalloc.get_traced_memory()[0]
            if python < traced * 20:
                break
        tracemalloc.stop()
    given, resident = (a - b for a, b in zip(after, before, strict=True))
    assert given < 3 * count, f"{given / count:.1f} bytes a call stay"  # the smallest block has 32 bytes
    assert resident < 4 << 20, f"the process has grown by {resident} bytes"
    assert python < traced * 20, f"{python / traced:.0f} bytes of Python objects a call stay"
