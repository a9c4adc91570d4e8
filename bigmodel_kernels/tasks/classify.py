"""Labels of texts, by transformers' own pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.base import Ranked, Ranking, Record, Runner, require_positive


@dataclass
class Classify(Ranked):
    """Labels of texts with their probabilities, the likeliest first."""

    top_k: Annotated[int, typer.Option(help="How many labels of each text.")] = 1

    name = "classify"
    auto_class = "AutoModelForSequenceClassification"
    head = "a head for sequence classification"
    answers_are = "labels"

    def check(self) -> None:
        require_positive(self, "top_k")

    def runner(self, model: Any) -> Runner:
        import transformers

        pipe = transformers.pipeline(
            "text-classification", model=model, tokenizer=self.tokenizer, device=model.device
        )

        def run(texts: list[str]) -> list[Record]:
            found = pipe(texts, batch_size=len(texts), top_k=self.top_k, truncation=True)
            return [{"text": text, "labels": labels} for text, labels in zip(texts, found, strict=True)]

        return run

    def ranked(self, results: Sequence[Record]) -> list[Ranking]:
        return [[(label["label"], label["score"]) for label in record["labels"]] for record in results]

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        for record in results:
            labels = "  ".join(f"{found['label']} {found['score']:.4f}" for found in record["labels"])
            yield f"{labels}  {record['text']}"
