"""The next token. By default: a small GPT-2 on the source of Python's standard library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from bigmodel_kernels.finetune import models, texts
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.tasks.base import Batch, Example, Task


class LanguageModel(Task):
    name = "language-model"
    summary = "The next token; by default a small GPT-2 on the source of Python's standard library."
    defaults: ClassVar = {"model": "small-gpt2", "max_length": 256, "lr": 1e-3, "steps": 1000}
    columns = ("text",)
    main_metric = "perplexity"
    #: What the sample goes on from.
    prompt = "def "

    def own_records(self) -> list[Record]:
        return texts.source_files()

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record["text"] for record in records)

    def build(self) -> Any:
        from transformers import AutoModelForCausalLM

        return models.build(self.settings, AutoModelForCausalLM, self.tokenizer, self.max_length)

    def encode(self, records: Sequence[Record]) -> list[Example]:
        """All texts one after the other, an end-of-text token between them, cut into blocks of one length."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(f"model={self.settings.model!r}: its tokenizer has no end-of-text token")
        rows = self.tokenizer([r["text"] for r in records], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        flat = [token for row in rows for token in (*row, end)]
        length = min(self.max_length, len(flat))
        starts = range(0, len(flat) - length + 1, length)
        return [{"ids": flat[start : start + length]} for start in starts]

    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        ids = torch.tensor([example["ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    @staticmethod
    def labelled(batch: Batch) -> int:
        return batch["labels"][:, 1:].numel()  # the first token has nothing before it

    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        loss = self.mean_loss(model, examples)
        return {"loss": loss, "perplexity": math.exp(loss)}

    def sample(self, model: Any) -> str | None:
        ids = torch.tensor(
            [self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"]], device=self.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(1, min(64, self.max_length - ids.shape[1])),
            do_sample=True,
            top_k=20,
            temperature=0.8,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return str(self.tokenizer.decode(out[0]))
