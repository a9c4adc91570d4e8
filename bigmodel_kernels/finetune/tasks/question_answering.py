"""An answer that stands in the text. By default: cloze questions over Python's help topics, with MiniLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from bigmodel_kernels.finetune import metrics, models, texts
from bigmodel_kernels.finetune.data import Record
from bigmodel_kernels.finetune.tasks.base import Batch, Example, Task, pad, with_mask

#: The longest answer in tokens that is looked for.
LONGEST_ANSWER = 30


class QuestionAnswering(Task):
    """SQuAD's form: `answers` is {"text": [...], "answer_start": [...]}, or an answer as a plain text, which
    is then looked for in the context. Questions whose answer was cut off are left out of the training.
    """

    name = "question-answering"
    summary = "An answer that stands in the text; by default cloze questions over Python's help topics."
    defaults: ClassVar = {"model": "minilm", "max_length": 256, "lr": 1e-4, "epochs": 3.0}
    columns = ("question", "context", "answers")
    main_metric = "f1"

    def own_records(self) -> list[Record]:
        return texts.questions()

    def key(self, record: Record) -> str:
        return str(record["context"])  # all questions about a text stay on one side

    def texts(self, records: Sequence[Record]) -> Iterator[str]:
        return (record[name] for record in records for name in ("question", "context"))

    def build(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return models.build(self.settings, AutoModelForQuestionAnswering, self.tokenizer, self.max_length)

    def encode(self, records: Sequence[Record]) -> list[Example]:
        # A question that takes more than half of the length leaves too little of the context.
        asked = self.tokenizer([record["question"] for record in records])["input_ids"]
        records = [r for r, ids in zip(records, asked, strict=True) if 2 * len(ids) <= self.max_length]
        if not records:
            raise ValueError(f"max_length={self.max_length}; every question alone is longer than half of it")
        answers = [_answers(record) for record in records]
        rows = self.tokenizer(
            [record["question"] for record in records],
            [record["context"] for record in records],
            truncation="only_second",
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        found = []
        for i, (record, (accepted, starts)) in enumerate(zip(records, answers, strict=True)):
            # Where each token of the context lies in it; (0, 0) for tokens of the question and special ones.
            parts, offsets = rows.sequence_ids(i), rows["offset_mapping"][i]
            inside = [k for k, part in enumerate(parts) if part == 1]
            place = None
            if accepted and starts[0] >= 0:
                first, last = starts[0], starts[0] + len(accepted[0])
                covering = [k for k in inside if offsets[k][0] < last and offsets[k][1] > first]
                if covering and offsets[covering[-1]][1] >= last:
                    place = (covering[0], covering[-1])
            if place:
                found.append(
                    {
                        "ids": rows["input_ids"][i],
                        "types": rows["token_type_ids"][i],
                        "place": place,
                        "inside": inside,
                        "offsets": offsets,
                        "context": record["context"],
                        "accepted": accepted,
                    }
                )
        if not found:
            raise ValueError("no answer was found in its context within max_length tokens")
        return found

    def collate(self, examples: Sequence[Example], seed: int) -> Batch:
        batch = with_mask([example["ids"] for example in examples], self.tokenizer.pad_token_id)
        if "token_type_ids" in self.tokenizer.model_input_names:
            batch["token_type_ids"] = pad([example["types"] for example in examples], 0)
        places = torch.tensor([example["place"] for example in examples])
        return {**batch, "start_positions": places[:, 0], "end_positions": places[:, 1]}

    @staticmethod
    def labelled(batch: Batch) -> int:
        return len(batch["start_positions"])

    def evaluate(self, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
        total, exact, overlap = 0.0, 0.0, 0.0
        remaining = iter(examples)
        for batch in self.batches(examples):
            out = model(**batch)
            total += out.loss.item() * self.labelled(batch)
            for start, end in zip(out.start_logits.cpu(), out.end_logits.cpu(), strict=True):
                example = next(remaining)
                scores = metrics.answer(best_span(start, end, example), example["accepted"])
                exact, overlap = exact + scores[0], overlap + scores[1]
        number = len(examples)
        return {"loss": total / number, "exact_match": exact / number, "f1": overlap / number}


def _answers(record: Record) -> tuple[list[str], list[int]]:
    value = record["answers"]
    if isinstance(value, str):
        return [value], [record["context"].find(value)]
    if isinstance(value, dict) and {"text", "answer_start"} <= set(value):
        return list(value["text"]), list(value["answer_start"])
    raise ValueError(f"answers={value!r}; it must be a text, or an object with text and answer_start")


def best_span(start: torch.Tensor, end: torch.Tensor, example: Example) -> str:
    """The likeliest answer: the largest start + end logit of the context, in order, not too long."""
    inside = torch.tensor(example["inside"])
    scores = start[inside][:, None] + end[inside][None, :]
    fits = torch.ones_like(scores).triu().tril(LONGEST_ANSWER - 1).bool()
    best = int(scores.masked_fill(~fits, -torch.inf).argmax())
    first, last = divmod(best, len(inside))
    offsets = example["offsets"]
    begin, finish = offsets[example["inside"][first]][0], offsets[example["inside"][last]][1]
    return str(example["context"][begin:finish]).strip()
