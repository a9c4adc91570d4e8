"""A decoder trained on code goes on with a piece of code, or fills a gap in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.generation import Causal
from bigmodel_kernels.tasks.inputs import read

#: What follows a whole Python function: the stops of HumanEval (Chen et al., arXiv:2107.03374, section 2.1).
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
#: How models mark what stands before and behind a gap, and where they are to fill it: StarCoder; Qwen and
#: CodeGemma; DeepSeek.
GAPS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


@dataclass
class Complete(Causal):
    """Goes on with code; a file is one piece of code. Prints the completion alone, as it comes, unless
    --batch-size, --beams, --compare or --json is given.
    """

    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End where this text comes up (may be repeated; '' for never); default: where the next "
            "statement of a Python module begins, or never with --suffix."
        ),
    ] = None
    suffix: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The code behind the gap, for a model that is trained to fill gaps."
        ),
    ] = None

    name = "complete"
    argument = "CODE"
    whole = True

    def check(self) -> None:
        super().check()
        self.behind = None if self.suffix is None else read(self.suffix, "suffix")

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        known = tokenizer.get_vocab()
        self.marks = next((marks for marks in GAPS if all(mark in known for mark in marks)), None)
        if self.behind is not None and self.marks is None:
            raise ValueError(
                f"suffix={str(self.suffix)!r}: the tokenizer of {source!r} has no tokens for a gap; known "
                "are " + "; ".join(", ".join(marks) for marks in GAPS)
            )

    def check_texts(self, texts: Sequence[str]) -> None:
        if self.behind is not None and self.cut(texts):
            raise ValueError(
                f"suffix={str(self.suffix)!r}: code and suffix have more than the {self.longest()} "
                "tokens that the model reads; with a gap nothing is cut off"
            )

    def stops(self) -> list[str]:
        default = list(STOPS) if self.behind is None else []
        return default if self.stop is None else [stop for stop in self.stop if stop]

    def prompts(self, texts: Sequence[str]) -> list[str]:
        if self.behind is None:
            return super().prompts(texts)
        assert self.marks is not None
        before, gap, end = self.marks
        return [f"{before}{text}{gap}{self.behind}{end}" for text in texts]
