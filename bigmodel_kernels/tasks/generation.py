"""What the tasks share that write text: `generate` of transformers on padded batches, its tokens, its stream.

transformers 5 has no pipeline for models of encoder and decoder, and the one for text generation gives back
texts and not the tokens, which are what `--compare` counts; so both kinds of model go through `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer

from bigmodel_kernels.tasks import models
from bigmodel_kernels.tasks.base import Record, Runner, Task, require_positive


@dataclass
class Generation(Task):
    """Options of `generate`. A task of one of the two kinds below."""

    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens for each text.")] = 128
    beams: Annotated[
        int | None, typer.Option(help="Beam search with so many; default: as the model's own settings say.")
    ] = None
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens, and do not take the likeliest.")] = (
        False
    )
    temperature: Annotated[float | None, typer.Option(help="With --sample: above 1 is bolder.")] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="With --sample: from the likeliest tokens of this probability together."),
    ] = None
    seed: Annotated[int, typer.Option(help="With --sample: of the draw, for each batch anew.")] = 0

    batch_size = 8
    unit = "tokens"
    #: False where the prompts already have them.
    adds_special_tokens = True
    #: Where tokens go as they come; then texts come one at a time.
    write: Callable[[str], object] | None = field(default=None, init=False, repr=False)

    def check(self) -> None:
        require_positive(self, "max_new_tokens", "beams", "temperature", "top_p")
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None and not self.sample:
                raise ValueError(f"{name}={getattr(self, name)} has a meaning with --sample alone")
        if self.top_p is not None and self.top_p > 1:
            raise ValueError(f"top_p={self.top_p}; it is a probability, at most 1")

    def prompts(self, texts: Sequence[str]) -> list[str]:
        """What the model reads for these texts."""
        return list(texts)

    def stops(self) -> list[str]:
        """Texts that end a generation, and are taken off its end."""
        return []

    def settings(self) -> dict[str, Any]:
        """More arguments for `generate`."""
        return {}

    def generated(self, out: torch.Tensor, read: int) -> torch.Tensor:
        """The new tokens in what `generate` returned for prompts of `read` tokens."""
        raise NotImplementedError

    def shown_before(self, text: str) -> str:
        """What stands before the generated text when it is shown."""
        return ""

    def cut(self, texts: Sequence[str]) -> int:
        return super().cut(self.prompts(texts))

    def runner(self, model: Any) -> Runner:
        stops = self.stops()
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.sample,
            "pad_token_id": self.tokenizer.pad_token_id,
            **{
                name: value
                for name, value in (
                    ("num_beams", self.beams),
                    ("temperature", self.temperature),
                    ("top_p", self.top_p),
                )
                if value is not None
            },
            **({"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}),
            **self.settings(),
        }
        end = chosen.get("eos_token_id", model.generation_config.eos_token_id)
        ends = set(end if isinstance(end, list) else [end])

        def run(texts: list[str]) -> list[Record]:
            limit = self.longest()
            batch = self.tokenizer(
                self.prompts(texts),
                padding=len(texts) > 1,
                truncation=limit is not None,
                max_length=limit,
                add_special_tokens=self.adds_special_tokens,
                return_tensors="pt",
            ).to(model.device)
            # Other inputs, such as token types, would stand for the prompt alone.
            ids, mask = batch["input_ids"], batch["attention_mask"]
            stream = {}
            if self.write is not None:
                self.write(self.shown_before(texts[0]))
                stream["streamer"] = streamer(self.tokenizer, self.write, stops)
            with torch.random.fork_rng(enabled=self.sample):
                if self.sample:
                    torch.manual_seed(self.seed)
                out = model.generate(input_ids=ids, attention_mask=mask, **chosen, **stream)
            found = []
            for text, row in zip(texts, self.generated(out, ids.shape[1]).tolist(), strict=True):
                # A text that a stop has ended is filled up with padding while others go on.
                tokens = without_end(row, ends, self.tokenizer.pad_token_id if stops else None)
                words = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found.append({"text": text, "generated": up_to(words, stops), "tokens": tokens})
            if self.write is not None:
                self.write("\n")
            return found

        return run

    def agreement(self, expected: Sequence[Record], found: Sequence[Record]) -> dict[str, Any]:
        pairs = [(a["tokens"], b["tokens"]) for a, b in zip(expected, found, strict=True)]
        agree = sum(alike(a, b) for a, b in pairs)
        total = sum(max(len(a), len(b)) for a, b in pairs)
        texts = sum(a == b for a, b in pairs)
        return {
            "same": texts,
            "of": len(found),
            "tokens_before_the_first_difference": agree,
            "tokens": total,
            "text": f"{agree} of {total} tokens agree (those before the first difference), "
            f"{texts} of {len(found)} texts are the same",
        }

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        for record in results:
            yield self.shown_before(record["text"]) + record["generated"]

    def units(self, results: Sequence[Record]) -> int:
        return sum(len(record["tokens"]) for record in results)


class Causal(Generation):
    """A decoder goes on with the text. Of a text that is too long it reads the end."""

    auto_class = "AutoModelForCausalLM"
    head = "a language model head (a decoder)"

    def check_config(self, config: Any) -> None:
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        if config.is_encoder_decoder:
            raise ValueError(
                f"a {config.model_type} model has an encoder and a decoder; {self.name} needs {self.head}, "
                "and translate and summarise take such a model"
            )
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            raise ValueError(f"a {config.model_type} model that is an encoder; {self.name} needs {self.head}")

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        self.longest()

    def longest(self) -> int | None:
        limit = super().longest()
        if limit is None:
            return None
        if self.max_new_tokens >= limit:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}; the model has {limit} positions for text and new "
                "tokens"
            )
        return limit - self.max_new_tokens

    def generated(self, out: torch.Tensor, read: int) -> torch.Tensor:
        return out[:, read:]


class SequenceToSequence(Generation):
    """An encoder reads the text, and a decoder writes another."""

    auto_class = "AutoModelForSeq2SeqLM"
    head = "an encoder and a decoder with a language model head"
    #: What stands before every text.
    before = ""

    def prompts(self, texts: Sequence[str]) -> list[str]:
        return [self.before + text for text in texts]

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        limit = models.positions(model)
        if limit is not None and self.max_new_tokens >= limit:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}; the decoder has {limit} positions")

    def generated(self, out: torch.Tensor, read: int) -> torch.Tensor:
        return out[:, 1:]  # the first is what the decoder starts from


def task_settings(config: Any) -> dict[str, dict[str, Any]]:
    """What models such as T5 keep in their config for each task: `prefix`, and arguments of `generate`."""
    return getattr(config, "task_specific_params", None) or {}


def without_end(tokens: list[int], ends: set[int | None], pad: int | None) -> list[int]:
    """The tokens before the first end of a text, without the padding `pad` behind them."""
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    while pad is not None and stop and tokens[stop - 1] == pad:
        stop -= 1
    return tokens[:stop]


def up_to(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def streamer(tokenizer: Any, write: Callable[[str], object], stops: Sequence[str]) -> Any:
    """transformers' streamer of text, without the prompt and without what a stop cuts off."""
    from transformers import TextStreamer

    class UpToStop(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.text, self.written = "", 0

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            kept = up_to(self.text, stops)
            if len(kept) == len(self.text) and not stream_end:
                # The last letters may be the beginning of a stop.
                kept = kept[: len(kept) - max(map(len, stops), default=1) + 1]
            if len(kept) > self.written:
                write(kept[self.written :])
                self.written = len(kept)

    return UpToStop()
