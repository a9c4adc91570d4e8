"""Labels of texts, by transformers' own pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.base import Record, Runner, Task, require_positive, same


@dataclass
class Classify(Task):
    """Labels of texts with their probabilities, the likeliest first."""

    top_k: Annotated[int, typer.Option(help="How many labels of each text.")] = 1

    name = "classify"
    auto_class = "AutoModelForSequenceClassification"
    head = "a head for sequence classification"

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

    def agreement(self, expected: Sequence[Record], found: Sequence[Record]) -> dict[str, Any]:
        first = [[record["labels"][0]["label"] for record in records] for records in (expected, found)]
        scores = [
            {
                (i, label["label"]): label["score"]
                for i, record in enumerate(records)
                for label in record["labels"]
            }
            for records in (expected, found)
        ]
        return agree_on_best(first, scores, "labels")

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        for record in results:
            labels = "  ".join(f"{found['label']} {found['score']:.4f}" for found in record["labels"])
            yield f"{labels}  {record['text']}"


def agree_on_best(best: list[list[Any]], scores: list[dict[Any, float]], what: str) -> dict[str, Any]:
    """Agreement of the best answers, and of the scores of all answers that both have."""
    number, total = same(*best), len(best[0])
    apart = max(
        (abs(scores[0][key] - scores[1][key]) for key in scores[0].keys() & scores[1].keys()), default=0.0
    )
    return {
        "same": number,
        "of": total,
        "largest_difference_of_a_score": apart,
        "text": f"{number} of {total} {what} are the same, scores differ by {apart:.1e} at most",
    }
