"""Hidden words. By default: all-MiniLM-L6-v2 on the English of Python's documentation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from bigmodel_kernels.finetune import models, texts
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.tasks.base import Batch, Example, Task, with_mask

HIDDEN = 0.15


class MaskedLM(Task):
    """BERT's objective (arXiv:1810.04805): of 15 % of the tokens 80 % are masked, 10 % random, 10 % kept."""

    name = "masked-lm"
    summary = "Hidden words; by default MiniLM on the English of Python's documentation."
    defaults: ClassVar = {"model": "minilm", "max_length": 128, "lr": 2e-4, "epochs": 3.0}
    columns = ("text",)
    main_metric = "perplexity"

    def own_records(self) -> list[Record]:
        return texts.paragraphs()

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record["text"] for record in records)

    def build(self) -> Any:
        from transformers import AutoModelForMaskedLM

        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"model={self.settings.model!r}: its tokenizer has no mask token")
        return models.build(self.settings, AutoModelForMaskedLM, self.tokenizer, self.max_length)

    def encode(self, records: Sequence[Record]) -> list[Example]:
        rows = self.tokenizer([r["text"] for r in records], truncation=True, max_length=self.max_length)
        return [{"ids": ids} for ids in rows["input_ids"]]

    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        batch = with_mask([example["ids"] for example in examples], self.tokenizer.pad_token_id)
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(seed)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        chance = torch.rand(ids.shape, generator=generator).masked_fill(special, 2.0)
        hidden = chance < HIDDEN
        if not hidden.any():  # a batch of a few short texts has one hidden token all the same
            hidden.view(-1)[chance.argmin()] = True
        labels = ids.masked_fill(~hidden, -100)
        fate = torch.rand(ids.shape, generator=generator)
        others = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        ids = torch.where(hidden & (fate < 0.8), self.tokenizer.mask_token_id, ids)
        ids = torch.where(hidden & (fate >= 0.9), others, ids)
        return {**batch, "input_ids": ids, "labels": labels}

    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        total, right, items = 0.0, 0, 0
        for batch in self.batches(examples):
            out, labels = model(**batch), batch["labels"]
            hidden = labels != -100
            number = int(hidden.sum())
            total += out.loss.item() * number
            right += int((out.logits.argmax(-1)[hidden] == labels[hidden]).sum())
            items += number
        return {"loss": total / items, "perplexity": math.exp(total / items), "accuracy": right / items}
