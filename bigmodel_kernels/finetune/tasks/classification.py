"""A label for a text. By default: the opinion of Chinese reviews, with all-MiniLM-L6-v2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from bigmodel_kernels.finetune import metrics, models, texts
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.tasks.base import Batch, Example, Task, with_mask


class Classification(Task):
    name = "classification"
    summary = "A label for a text; by default the opinion of Chinese reviews, with MiniLM."
    defaults: ClassVar = {"model": "minilm", "max_length": 128, "lr": 5e-5, "epochs": 1.0}
    columns = ("text", "label")
    main_metric = "f1"
    classes: list[str]

    def own_records(self) -> list[Record]:
        return texts.reviews()

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record["text"] for record in records)

    def prepare(self, records: Sequence[Record], saved_tokenizer: Path) -> None:
        super().prepare(records, saved_tokenizer)
        self.classes = sorted({str(record["label"]) for record in records})
        if len(self.classes) < 2:
            raise ValueError(
                f"column 'label' has one value alone, {self.classes[0]!r}; there is nothing to learn"
            )

    def build(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        names = dict(enumerate(self.classes))
        return models.build(
            self.settings,
            AutoModelForSequenceClassification,
            self.tokenizer,
            self.max_length,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def encode(self, records: Sequence[Record]) -> list[Example]:
        known = {name: i for i, name in enumerate(self.classes)}
        kept = [record for record in records if str(record["label"]) in known]
        ids = self.tokenizer([r["text"] for r in kept], truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return [{"ids": i, "label": known[str(r["label"])]} for i, r in zip(ids, kept, strict=True)]

    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        batch = with_mask([example["ids"] for example in examples], self.tokenizer.pad_token_id)
        return {**batch, "labels": torch.tensor([example["label"] for example in examples])}

    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        predicted: list[int] = []
        total = 0.0
        for batch in self.batches(examples):
            out = model(**batch)
            total += out.loss.item() * len(batch["labels"])
            predicted += out.logits.argmax(-1).tolist()
        scores = metrics.classification(predicted, [e["label"] for e in examples], self.classes)
        return {"loss": total / len(examples), **scores}
