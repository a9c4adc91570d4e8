"""Words for the gaps of a text, by transformers' own pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.base import Ranked, Ranking, Record, Runner, require_positive


@dataclass
class FillMask(Ranked):
    """Words for every mask token in texts, such as "The cat [MASK] on the mat.", the likeliest first."""

    top_k: Annotated[int, typer.Option(help="How many words for each mask.")] = 5

    name = "fill-mask"
    auto_class = "AutoModelForMaskedLM"
    head = "a head for masked language modelling"
    answers_are = "words"

    def check(self) -> None:
        require_positive(self, "top_k")

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        if tokenizer.mask_token is None:
            raise ValueError(f"model={source!r}: its tokenizer has no mask token")
        if self.top_k > len(tokenizer):
            raise ValueError(f"top_k={self.top_k}; the model knows {len(tokenizer)} tokens")

    def check_texts(self, texts: Sequence[str]) -> None:
        limit, mask = self.longest(), self.tokenizer.mask_token_id
        for text in texts:
            ids = self.tokenizer(text, truncation=limit is not None, max_length=limit)["input_ids"]
            if mask not in ids:
                where = f" within its first {limit} tokens" if len(ids) == limit else ""
                raise ValueError(
                    f"text={text!r} has no mask{where}; the model's is {self.tokenizer.mask_token!r}"
                )

    def runner(self, model: Any) -> Runner:
        import transformers

        pipe = transformers.pipeline("fill-mask", model=model, tokenizer=self.tokenizer, device=model.device)
        limits = {"truncation": self.longest() is not None}

        def run(texts: list[str]) -> list[Record]:
            found: list[Any] = pipe(texts, batch_size=len(texts), top_k=self.top_k, tokenizer_kwargs=limits)
            if len(texts) == 1:  # the pipeline takes a list of one text for that text
                found = [found]
            return [{"text": text, "masks": masks(row)} for text, row in zip(texts, found, strict=True)]

        return run

    def ranked(self, results: Sequence[Record]) -> list[Ranking]:
        return [
            [(word["token"], word["score"]) for word in words]
            for record in results
            for words in record["masks"]
        ]

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        for record in results:
            yield record["text"]
            for words in record["masks"]:
                yield "  " + "  ".join(
                    f"{found['token_str'].strip()} {found['score']:.4f}" for found in words
                )


def masks(row: list[Any]) -> list[list[Record]]:
    """The words of each mask; the pipeline gives those of a single one alone."""
    return row if isinstance(row[0], list) else [row]
