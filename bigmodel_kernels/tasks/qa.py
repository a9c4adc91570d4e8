"""Answers that stand in a document. transformers 5 has no pipeline for this any more, but it has the choice
of the span from the logits, which is used here; windows over a long document are the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer

from bigmodel_kernels.tasks.base import Ranked, Ranking, Record, Runner, require_positive
from bigmodel_kernels.tasks.inputs import read

#: The window and the overlap of two windows that SQuAD's models are trained with.
WINDOW, STRIDE = 384, 128
#: How many windows go through the model at once.
TOGETHER = 16


@dataclass
class QuestionAnswering(Ranked):
    """Answers that stand in a document, which may be longer than the model: windows over it overlap."""

    context: Annotated[str | None, typer.Option(help="The document itself.")] = None
    document: Annotated[Path | None, typer.Option(metavar="FILE", help="The document as a file.")] = None
    top_k: Annotated[int, typer.Option(help="How many answers to a question.")] = 1
    max_answer_tokens: Annotated[int, typer.Option(help="Longer answers are not looked for.")] = 15
    stride: Annotated[
        int | None,
        typer.Option(help=f"Tokens that two windows share; default: {STRIDE}, half a window at most."),
    ] = None
    window: Annotated[
        int, typer.Option(help="Tokens of question and document together; at most the model's positions.")
    ] = WINDOW
    impossible: Annotated[
        bool, typer.Option("--impossible", help="Also allow that there is no answer (SQuAD 2.0).")
    ] = False

    name = "qa"
    auto_class = "AutoModelForQuestionAnswering"
    head = "a head for question answering"
    answers_are = "answers"
    argument = "QUESTION"

    def check(self) -> None:
        require_positive(self, "top_k", "max_answer_tokens", "window")
        if self.stride is not None and self.stride < 0:
            raise ValueError(f"stride={self.stride}; it must not be negative")
        if (self.context is None) == (self.document is None):
            raise ValueError("qa needs the text with the answers: --context TEXT or --document FILE")
        if self.document is not None:
            self.text = read(self.document, "document")
        else:
            self.text = self.context or ""
        if not self.text.strip():
            name = "context" if self.document is None else f"document={str(self.document)!r}"
            raise ValueError(f"{name} is empty; there must be a text to look in")

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        if not tokenizer.is_fast:
            raise ValueError(
                f"model={source!r}: its {type(tokenizer).__name__} does not say where tokens lie in the "
                "text; qa needs a fast tokenizer"
            )

    def longest(self) -> int:
        return min(self.window, super().longest() or self.window)

    def shared(self) -> int:
        """How many tokens two windows share."""
        return min(STRIDE, self.longest() // 2) if self.stride is None else self.stride

    def cut(self, texts: Sequence[str]) -> int:
        return 0  # windows leave nothing out, and a question that is too long is refused

    def check_texts(self, texts: Sequence[str]) -> None:
        room = self.longest() - self.tokenizer.num_special_tokens_to_add(pair=True)
        for text in texts:
            own = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if room - own <= self.shared():
                raise ValueError(
                    f"question={text!r} has {own} tokens: in a window of {self.longest()} it leaves "
                    f"{max(0, room - own)} for the document, which must be more than stride={self.shared()}"
                )

    def runner(self, model: Any) -> Runner:
        def run(questions: list[str]) -> list[Record]:
            rows = self.tokenizer(
                questions,
                [self.text] * len(questions),
                truncation="only_second",
                max_length=self.longest(),
                stride=self.shared(),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                padding=self.tokenizer.pad_token is not None,
            )
            names = [name for name in self.tokenizer.model_input_names if name in rows]
            windows: list[list[Window]] = [[] for _ in questions]
            for k in range(0, len(rows["input_ids"]), TOGETHER):
                batch = {
                    name: torch.tensor(rows[name][k : k + TOGETHER], device=model.device) for name in names
                }
                out = model(**batch)
                starts, ends = (row.float().cpu().numpy() for row in (out.start_logits, out.end_logits))
                for i, (start, end) in enumerate(zip(starts, ends, strict=True), k):
                    inside = numpy.array([part == 1 for part in rows.sequence_ids(i)])
                    windows[rows["overflow_to_sample_mapping"][i]].append(
                        Window(start, end, inside, rows["offset_mapping"][i])
                    )
            return [
                {"text": question, "answers": self.answers(found)}
                for question, found in zip(questions, windows, strict=True)
            ]

        return run

    def answers(self, windows: list[Window]) -> list[Record]:
        """The best answers of all windows."""
        from transformers.pipelines.document_question_answering import select_starts_ends

        spans: dict[tuple[int, int], float] = {}
        nothing = 1.0
        for window in windows:
            possible = window.inside.copy()
            possible[0] = True  # the first token stands for no answer, and is taken out of the spans there
            starts, ends, scores, nothing = select_starts_ends(
                window.start[None],
                window.end[None],
                1 - possible[None].astype(int),
                possible[None].astype(int),
                nothing,
                self.top_k,
                self.impossible,
                self.max_answer_tokens,
            )
            for first, last, score in zip(starts, ends, scores, strict=True):
                if window.inside[first] and window.inside[last]:
                    place = (window.offsets[first][0], window.offsets[last][1])
                    # Where two windows have it, the one that sees more around it is surer of it.
                    spans[place] = max(spans.get(place, 0.0), float(score))
        found: list[Record] = [
            {"answer": self.text[begin:end], "score": score, "start": begin, "end": end}
            for (begin, end), score in spans.items()
        ]
        if self.impossible:
            found.append({"answer": "", "score": float(nothing), "start": 0, "end": 0})
        return sorted(found, key=lambda answer: -answer["score"])[: self.top_k]

    def ranked(self, results: Sequence[Record]) -> list[Ranking]:
        return [
            [((answer["start"], answer["end"]), answer["score"]) for answer in record["answers"]]
            for record in results
        ]

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        for record in results:
            yield record["text"]
            for answer in record["answers"]:
                yield f"  {answer['score']:.4f}  {answer['answer'] or '(no answer)'}"


@dataclass
class Window:
    """Logits of start and end, which tokens are of the document, and where each lies in it."""

    start: Any
    end: Any
    inside: Any
    offsets: list[tuple[int, int]]
