"""A short text from a long one, by a model of encoder and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.generation import SequenceToSequence, task_settings

#: Of the settings of a model for the task, what there is an option for that always has a value.
_OPTIONS = ("max_length", "prefix")


@dataclass
class Summarise(SequenceToSequence):
    """Summarises texts: one a line of a file, or with --whole a file."""

    prefix: Annotated[
        str | None,
        typer.Option(
            help="Put before every text; default: what the model was trained with ('summarize: ', T5)."
        ),
    ] = None

    name = "summarise"

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        own = task_settings(model.config).get("summarization", {})
        self.before = own.get("prefix", "") if self.prefix is None else self.prefix
        self.own = {name: value for name, value in own.items() if name not in _OPTIONS}
        if self.beams is not None:
            self.own.pop("num_beams", None)

    def settings(self) -> dict[str, Any]:
        return self.own
