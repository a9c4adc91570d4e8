"""Records of a data set, their split, and the order in which training takes them.

A record is a dictionary. Split and order depend on the seed and the records alone, so that a resumed run goes
on with the very example that was next.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from bigmodel_kernels.extras import package

Record = dict[str, Any]
FORMATS = (".csv", ".json", ".jsonl", ".txt")


def load(dataset: str, split: str = "train") -> list[Record]:
    """Reads a local file, or a data set by its name in the package `datasets` (`name` or
    `name:configuration`, a folder of data files, or a folder that it saved).

    .csv has a line of column names; .json is a list of objects or {"data": the list}; .jsonl has an object a
    line; .txt gives one record {"text"} a line. Raises ValueError, and MissingPackage without `datasets`.
    """
    path = Path(dataset)
    if path.suffix.lower() in FORMATS:
        if not path.is_file():
            raise ValueError(f"dataset={dataset!r}: there is no such file")
        records = _read(path)
    else:
        hub = package("datasets", "datasets", "finetune")
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            found = hub.load_from_disk(dataset)
            if isinstance(found, dict):  # a folder of several splits
                if split not in found:
                    raise ValueError(f"split={split!r} is not in {dataset!r}; it has {', '.join(found)}")
                found = found[split]
        else:
            name, _, configuration = dataset.partition(":")
            found = hub.load_dataset(name, configuration or None, split=split)
        records = [dict(row) for row in found]
    if not records:
        raise ValueError(f"dataset={dataset!r} has no record")
    return records


def _read(path: Path) -> list[Record]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        if path.suffix == ".txt":
            return [{"text": line.strip()} for line in file if line.strip()]
        if path.suffix == ".jsonl":
            found: Any = [json.loads(line) for line in file if line.strip()]
        else:
            whole = json.load(file)
            found = whole.get("data") if isinstance(whole, dict) else whole
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ValueError(f"dataset={str(path)!r}: it must hold objects, one for each record")
    return found


def rename(records: list[Record], columns: dict[str, str], needed: Sequence[str]) -> list[Record]:
    """Records with the task's own names of columns. A dot in a name goes one level down (translation.en).

    Raises ValueError for a column that is not there.
    """
    if unknown := sorted(set(columns) - set(needed)):
        raise ValueError(
            f"columns={', '.join(unknown)}: this task has no such column; it has {', '.join(needed)}"
        )
    names = {ours: columns.get(ours, ours) for ours in needed}
    result = []
    for record in records:
        chosen = {}
        for ours, theirs in names.items():
            value: Any = record
            for part in theirs.split("."):
                if not isinstance(value, dict) or part not in value:
                    raise ValueError(
                        f"column {theirs!r} for {ours!r} is not in the data, which has "
                        f"{', '.join(map(str, record))}; name it with --column {ours}=NAME"
                    )
                value = value[part]
            chosen[ours] = value
        result.append(chosen)
    return result


def fraction(seed: int, key: str) -> float:
    """A number in [0, 1) from a key, the same on every machine."""
    digest = blake2b(key.encode("utf-8"), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(
    records: list[Record], keys: Sequence[str], seed: int, held_out: float, most: int | None = None
) -> tuple[list[Record], list[Record]]:
    """(training, held out), by a hash of the seed and each record's key: equal keys go to the same side.

    Both are in the order of their hashes, so that the first N of them are a fair sample. `most`
    keeps the records of smallest hash, of a second hash so that the parts stay in proportion.
    """
    places = list(range(len(records)))
    if most is not None and most < len(records):
        places = sorted(sorted(places, key=lambda i: fraction(seed + 1, keys[i]))[:most])
    sides: tuple[list[Record], list[Record]] = ([], [])
    for place, i in sorted((fraction(seed, keys[i]), i) for i in places):
        sides[place < held_out].append(records[i])
    for name, side in zip(("training", "held-out"), sides, strict=True):
        if not side:
            raise ValueError(
                f"the {name} part is empty: {len(records)} records with held_out={held_out} and seed={seed}"
            )
    return sides


def fingerprint(keys: Sequence[str]) -> str:
    """Tells whether a resumed run sees the same data in the same order."""
    digest = blake2b(digest_size=16)
    for key in keys:
        digest.update(key.encode("utf-8") + b"\0")
    return digest.hexdigest()


class Order:
    """The endless order of training: a new permutation for each pass, from the seed and the pass's number."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._pass = -1
        self._permutation: list[int] = []

    def take(self, position: int, number: int) -> list[int]:
        """The indices of the examples at position, position + 1, ..."""
        return [self._at(p) for p in range(position, position + number)]

    def _at(self, position: int) -> int:
        which, place = divmod(position, self.size)
        if which != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + which)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._pass = which
        return self._permutation[place]
