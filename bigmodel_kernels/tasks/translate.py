"""A text in another language, by a model of encoder and decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from bigmodel_kernels.tasks.generation import SequenceToSequence, task_settings

_PAIR = re.compile(r"translation_(\w+)_to_(\w+)$")


@dataclass
class Translate(SequenceToSequence):
    """Translates texts. A model of one pair (Marian) needs no languages; one of many (mBART, NLLB, M2M100)
    needs both, in its own codes; T5 needs them, or its prefix.
    """

    source_language: Annotated[str | None, typer.Option("--from", help="Language of the texts.")] = None
    target_language: Annotated[str | None, typer.Option("--to", help="Language to translate into.")] = None
    prefix: Annotated[
        str | None,
        typer.Option(help="Put before every text, such as 'translate English to German: '."),
    ] = None

    name = "translate"

    def check(self) -> None:
        super().check()
        if (self.source_language is None) != (self.target_language is None):
            raise ValueError("--from and --to need each other")
        if self.prefix is not None and self.source_language is not None:
            raise ValueError("--prefix and --from, --to exclude each other")

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        pair = (self.source_language, self.target_language)
        known = {
            match.groups(): settings
            for name, settings in task_settings(model.config).items()
            if (match := _PAIR.match(name))
        }
        self.before, self.first_token = self.prefix or "", None
        if hasattr(tokenizer, "src_lang"):
            self.first_token = target_code(tokenizer, *pair, source)
            tokenizer.src_lang = self.source_language
        elif pair in known:
            self.before = known[pair].get("prefix", "")
        elif known and self.prefix is None:
            pairs = ", ".join(f"--from {a} --to {b}" for a, b in known)
            said = "" if pair == (None, None) else f"knows no pair {pair[0]} to {pair[1]}, and "
            raise ValueError(f"model={source!r} {said}needs to know the languages: {pairs}; or --prefix")
        elif self.source_language is not None:
            raise ValueError(
                f"source_language={self.source_language!r}: model={source!r} does not choose between "
                "languages (its tokenizer has no codes and its config no prefixes for them); leave --from "
                "and --to away, or give --prefix"
            )

    def settings(self) -> dict[str, Any]:
        return {} if self.first_token is None else {"forced_bos_token_id": self.first_token}


def target_code(tokenizer: Any, source_language: str | None, target_language: str | None, model: str) -> int:
    """The token that the decoder begins with. Raises ValueError for a language that is not known."""
    m2m100 = getattr(tokenizer, "lang_code_to_token", None)
    named = m2m100 or getattr(tokenizer, "lang_code_to_id", None) or tokenizer.all_special_tokens
    codes = {code for code in named if not code.startswith("<")}  # NLLB's are among its special tokens
    for option, code in (("--from", source_language), ("--to", target_language)):
        if code not in codes:
            what = "is needed" if code is None else f"{code} is not known"
            raise ValueError(f"model={model!r}: {option} {what}; allowed are {', '.join(sorted(codes))}")
    return int(tokenizer.convert_tokens_to_ids(m2m100[target_language] if m2m100 else target_language))
