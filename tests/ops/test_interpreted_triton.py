"""The Triton tests of every operation, run on the CPU in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests of this process may need the compiler or
may have imported Triton already (torch.compile does). So the interpreter gets a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
#: Files of a process, which takes seconds to start; four of about the same time, for the processes of xdist.
TOGETHER = (
    ("attention_backward", "philox"),
    ("attention", "attention_decode"),
    ("linear", "norm", "rotary"),
    ("feed_forward", "embedding", "cross_entropy"),
)


@pytest.mark.parametrize("names", TOGETHER, ids="-".join)
def test_the_interpreter_agrees(names: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process is the interpreter's own")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(["-m", marks] if (marks := request.config.getoption("markexpr")) else []),
        *(str(HERE / f"test_{name}_triton.py") for name in names),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("BIGMODEL_BACKEND", None)
    result = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_file_is_run() -> None:
    kernels = {path.name[len("test_") : -len("_triton.py")] for path in HERE.glob("test_*_triton.py")}
    kernels -= {"build", "interpreted"}  # which are about Triton's compiler and about this process
    assert sorted(name for names in TOGETHER for name in names) == sorted(kernels)
