"""What every task has: texts, a model, batches with labels, and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigmodel_kernels.extras import package
from bigmodel_kernels.finetune import data
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.settings import Settings

Batch = dict[str, Tensor]
Example = dict[str, Any]


class Task(ABC):
    """A task on one data set. `prepare` comes first: it makes the tokenizer and `build` the model."""

    name: ClassVar[str]
    #: A sentence for the command's help.
    summary: ClassVar[str]
    #: Settings for what the user left open.
    defaults: ClassVar[dict[str, Any]]
    #: The names of the columns of a record.
    columns: ClassVar[tuple[str, ...]]
    #: The score to look at, and the name of its axis.
    main_metric: ClassVar[str]

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer: Any = None
        #: Held-out examples for `sample`.
        self.shown: Sequence[Example] = ()

    # ---- data

    def records(self) -> list[Record]:
        """All records: of the data set given, or the task's own texts."""
        if self.settings.dataset is None:
            return self.own_records()
        found = data.load(self.settings.dataset, self.settings.split)
        return data.rename(found, self.settings.column_names(), self.columns)

    @abstractmethod
    def own_records(self) -> list[Record]:
        """The texts that need no network."""

    def key(self, record: Record) -> str:
        """What the split hashes; records with one key stay together."""
        return str(record[self.columns[0]])

    @abstractmethod
    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        """What a tokenizer is trained on."""

    # ---- model

    def prepare(self, records: Sequence[Record], saved_tokenizer: Path) -> None:
        """Makes the tokenizer, from the training part alone."""
        from bigmodel_kernels.finetune import models

        self.tokenizer = models.tokenizer(self.settings, self.texts(records), saved_tokenizer)

    @abstractmethod
    def build(self) -> Any:
        """The model, not yet patched."""

    # ---- batches

    @abstractmethod
    def encode(self, records: Sequence[Record]) -> list[Example]:
        """Token ids of records; may drop a record that does not fit, and may cut many from one."""

    @abstractmethod
    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        """A padded batch with labels; what is random in it comes from `seed` alone."""

    @staticmethod
    def labelled(batch: Batch) -> int:
        """Over how many items the model's loss is a mean."""
        return int((batch["labels"] != -100).sum())

    @staticmethod
    def tokens(batch: Batch) -> int:
        """Real tokens of a batch."""
        return int(batch["attention_mask"].sum())

    # ---- scores

    @abstractmethod
    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        """Scores on held-out examples, with the mean `loss` among them. The model is in evaluation mode."""

    def sample(self, model: Any) -> str | None:
        """Something to read at the end."""
        return None

    def check(self) -> None:
        """Raises MissingPackage for what only evaluation and curve need, before hours of training."""
        package("matplotlib", "matplotlib", "finetune")

    # ---- helpers

    @property
    def device(self) -> str:
        return self.settings.device

    @property
    def max_length(self) -> int:
        assert self.settings.max_length is not None
        return self.settings.max_length

    def batches(self, examples: Sequence[Example], seed: int = 0) -> Iterator[Batch]:
        """Evaluation batches, in order, on the device."""
        size = self.settings.batch_size
        for start in range(0, len(examples), size):
            batch = self.collate(examples[start : start + size], seed + start)
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def mean_loss(self, model: Any, examples: Sequence[Example]) -> float:
        """The loss over all labelled items."""
        total, items = 0.0, 0
        for batch in self.batches(examples):
            number = self.labelled(batch)
            if number:
                total += model(**batch).loss.item() * number
                items += number
        if not items:
            raise ValueError("the held-out examples have no label to score")
        return total / items


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of one length, filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def with_mask(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    """input_ids and attention_mask of rows."""
    return {"input_ids": pad(rows, padding), "attention_mask": pad([[1] * len(row) for row in rows], 0)}
