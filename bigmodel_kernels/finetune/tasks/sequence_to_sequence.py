"""A text from a text: translation and summarisation, with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from bigmodel_kernels.extras import package
from bigmodel_kernels.finetune import metrics, models, texts
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.tasks.base import Batch, Example, Task, pad, with_mask


class SequenceToSequence(Task):
    columns = ("source", "target")
    #: Generated texts in an evaluation: generation is slow.
    generated: ClassVar[int] = 64

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record[name] for record in records for name in self.columns)

    def build(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return models.build(self.settings, AutoModelForSeq2SeqLM, self.tokenizer, self.max_length)

    def encode(self, records: Sequence[Record]) -> list[Example]:
        limits = {"truncation": True, "max_length": self.max_length}
        sources = self.tokenizer([record["source"] for record in records], **limits)["input_ids"]
        targets = self.tokenizer(text_target=[record["target"] for record in records], **limits)["input_ids"]
        return [
            {"ids": ids, "labels": labels, "source": record["source"], "target": record["target"]}
            for ids, labels, record in zip(sources, targets, records, strict=True)
        ]

    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        batch = with_mask([example["ids"] for example in examples], self.tokenizer.pad_token_id)
        return {**batch, "labels": pad([example["labels"] for example in examples], -100)}

    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        some = examples[: self.generated]
        return {
            "loss": self.mean_loss(model, examples),
            **self.score(self.generate(model, some), [example["target"] for example in some]),
        }

    def score(self, predicted: list[str], expected: list[str]) -> dict[str, float]:
        raise NotImplementedError

    def generate(self, model: Any, examples: Sequence[Example]) -> list[str]:
        """Greedy texts."""
        found: list[str] = []
        for batch in self.batches(examples):
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=min(self.max_length, int(1.2 * batch["labels"].shape[1]) + 2),
                do_sample=False,
                num_beams=1,
            )
            found += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return found

    def sample(self, model: Any) -> str | None:
        if not self.shown:
            return None
        lines = []
        for example, text in zip(self.shown, self.generate(model, self.shown), strict=True):
            source = " ".join(example["source"].split())
            lines.append(f"{source[:120]}\n  -> {text}\n  ({example['target']})")
        return "\n".join(lines)


class Translation(SequenceToSequence):
    """By default: a small T5 on messages of programs and their translations in gettext catalogues."""

    name = "translation"
    summary = "A text in another language; by default messages of programs, from gettext catalogues."
    defaults: ClassVar = {"model": "small-t5", "max_length": 64, "lr": 3e-3, "epochs": 3.0}
    main_metric = "bleu"

    def own_records(self) -> list[Record]:
        return texts.catalogue_pairs(self.settings.language)

    def score(self, predicted: list[str], expected: list[str]) -> dict[str, float]:
        return metrics.translation(predicted, expected, self.settings.language)

    def check(self) -> None:
        super().check()
        package("sacrebleu", "sacrebleu", "finetune")


class Summarisation(SequenceToSequence):
    """By default: a small T5 that says what a function of Python's standard library does, from its code: the
    first sentence of its docstring.
    """

    name = "summarisation"
    summary = "A short text from a long one; by default what a Python function does, from its code."
    defaults: ClassVar = {"model": "small-t5", "max_length": 256, "lr": 3e-3, "epochs": 5.0}
    main_metric = "rougeL"

    def own_records(self) -> list[Record]:
        return texts.functions()

    def score(self, predicted: list[str], expected: list[str]) -> dict[str, float]:
        return metrics.summarisation(predicted, expected)

    def check(self) -> None:
        super().check()
        package("rouge_score", "rouge-score", "finetune")
