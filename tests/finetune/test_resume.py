"""A run that is killed goes on as if nothing had happened: every loss and every weight, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from bigmodel_kernels import files
from bigmodel_kernels.finetune import Settings, checkpoint, finetune

KILLED = """
import json, os, signal, sys
from bigmodel_kernels.finetune import Listener, Settings, checkpoint, finetune
import torch
torch.set_num_threads(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(Listener):
    def step(self, record):
        if where == "step" and record["step"] == 8:
            die()

if (where := sys.argv[2]) == "writing":
    real = os.replace
    def replace(source, target):
        if str(target).endswith("step-00000006.pt"):
            die()  # everything is written, and not yet renamed
        real(source, target)
    os.replace = replace
finetune(Settings.from_dict(json.loads(sys.argv[1])), listener=Killer())
"""


@pytest.mark.parametrize(("where", "left"), [("step", [3, 6]), ("writing", [3])])
def test_kill_9_and_resume(tiny: Callable[..., Settings], where: str, left: list[int]) -> None:
    changes = {"steps": 10, "checkpoint_every": 3, "evaluate_every": 4, "layers": 2}
    unbroken = tiny("unbroken", **changes)
    killed = tiny("killed", **changes)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(killed.to_dict()), where], capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert [step for step, _ in checkpoint.find(killed.folder / "checkpoints")] == left
    expected = finetune(unbroken)
    resumed = finetune(killed, resume=True)
    assert resumed.losses == expected.losses
    assert resumed.metrics == expected.metrics
    ours, theirs = (
        checkpoint.load(checkpoint.find(run.folder / "checkpoints")[-1][1]) for run in (killed, unbroken)
    )
    assert ours["step"] == theirs["step"] == 10
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    moments = theirs["optimiser"]["state"]
    assert moments
    for i, state in moments.items():
        assert all(torch.equal(ours["optimiser"]["state"][i][name], value) for name, value in state.items())
    assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])
    lines = [files.read_lines(run.folder / "metrics.jsonl") for run in (killed, unbroken)]
    for a, b in zip(*lines, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_random_state_round_trip(tmp_path: Path) -> None:
    import random

    path = checkpoint.save(tmp_path, 1, {"random": checkpoint.random_state()}, keep=1)
    drawn = (torch.rand(3).tolist(), random.random(), numpy.random.rand())
    checkpoint.set_random_state(checkpoint.load(path)["random"])
    assert (torch.rand(3).tolist(), random.random(), numpy.random.rand()) == drawn


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def fails(file: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        files.write_atomically(path, fails)
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]
    assert files.read_lines(tmp_path / "none.jsonl") == []
