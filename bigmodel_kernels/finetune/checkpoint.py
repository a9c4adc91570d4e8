"""Checkpoints: one file each, whole or absent, with all that the next step depends on."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy
import torch

from bigmodel_kernels.files import write_atomically

_NAME = re.compile(r"step-(\d+)\.pt$")


def random_state() -> dict[str, Any]:
    """The state of every generator that a step may draw from."""
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numbers = state["numpy"]
    key = numpy.array(numbers["state"]["key"], dtype=numpy.uint32)
    numpy.random.set_state({**numbers, "state": {**numbers["state"], "key": key}})


def find(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the checkpoints of a run, oldest first."""
    found = [(int(match.group(1)), path) for path in folder.glob("*.pt") if (match := _NAME.match(path.name))]
    return sorted(found)


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes the checkpoint of a step, then removes all but the newest `keep`."""
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save({**state, "step": step}, file))
    for _, old in find(folder)[:-keep]:
        old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; nothing in the file is run as code."""
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
