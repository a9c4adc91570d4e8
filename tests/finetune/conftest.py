"""Tiny data and tiny models: a run of a few steps takes less than a second."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from bigmodel_kernels.finetune import Settings

# Without the extra `finetune` there is nothing to test here.
collect_ignore_glob = ["test_*.py"] if None in map(find_spec, ("transformers", "matplotlib")) else []

WORDS = {
    "good": ["lovely", "warm", "bright", "kind", "fresh", "happy", "sweet"],
    "bad": ["broken", "cold", "late", "dirty", "rude", "loud", "stale"],
}
NOUNS = ["room", "meal", "street", "song", "film", "chair", "garden", "letter"]

#: Sizes that a task takes for a tiny run.
TINY: dict[str, Any] = {
    "layers": 1,
    "hidden": 16,
    "heads": 2,
    "vocabulary": 400,
    "batch_size": 4,
    "steps": 4,
    "max_length": 24,
    "evaluate_examples": 8,
    "lr": 1e-3,
}


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 sentences with a label, as a .csv with columns of other names than ours."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        for i in range(120):
            label = ("good", "bad")[i % 2]
            words = " ".join(rng.sample(WORDS[label], 1 + i % 4))
            writer.writerow([f"the {rng.choice(NOUNS)} was {words}", label])
    return path


@pytest.fixture
def tiny(reviews: Path, tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a tiny run on the reviews."""

    def make(output: str = "run", **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "task": "classification",
            "model": "small-bert",
            "dataset": str(reviews),
            "columns": ("text=review", "label=stars"),
            "output": str(tmp_path / output),
            **TINY,
            **changes,
        }
        return Settings(**values)

    return make
