"""A decoder goes on with a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.generation import Causal


@dataclass
class Generate(Causal):
    """Goes on with texts. Tokens are shown as they come, unless --batch-size, --beams, --compare or --json is
    given.
    """

    stop: Annotated[
        list[str] | None, typer.Option(help="End where this text comes up (may be repeated).")
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is what a user says, in the model's own chat template.")
    ] = False

    name = "generate"

    def stops(self) -> list[str]:
        return self.stop or []

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        self.adds_special_tokens = not self.chat  # a chat template has them
        if self.chat and tokenizer.chat_template is None:
            raise ValueError(f"model={source!r}: its tokenizer has no chat template; --chat needs one")

    def prompts(self, texts: Sequence[str]) -> list[str]:
        if not self.chat:
            return super().prompts(texts)
        chats = [[{"role": "user", "content": text}] for text in texts]
        return list(self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))

    def shown_before(self, text: str) -> str:
        return "" if self.chat else text
