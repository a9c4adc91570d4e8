"""Sentence embeddings, as sentence-transformers makes them from the same model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bigmodel_kernels.extras import minilm
from bigmodel_kernels.tasks.base import Record, Runner, Task

POOLINGS = ("mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken")
#: How older versions of sentence-transformers say it.
_OLD_NAMES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
#: Two embeddings with a larger cosine are the same for any use.
SAME_COSINE = 0.9999


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """A vector for each text.

    hidden: (texts, length, width); mask: (texts, length), 1 at real tokens; how: one of POOLINGS, with the
    meaning that sentence-transformers gives it. Returns (texts, width). Raises ValueError for another.
    """
    if how == "cls":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(1)]
    if how == "lasttoken":
        return hidden[
            torch.arange(len(hidden), device=hidden.device), mask.shape[1] - 1 - mask.flip(1).argmax(1)
        ]
    if how == "max":
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
    weights = mask[..., None].to(hidden.dtype)
    total, count = (hidden * weights).sum(1), weights.sum(1)
    if how == "mean":
        return total / count
    if how == "mean_sqrt_len_tokens":
        return total / count.sqrt()
    raise ValueError(f"pooling={how!r} is unknown; allowed are {', '.join(POOLINGS)}")


@dataclass(frozen=True)
class Recipe:
    """What sentence-transformers does around a model."""

    pooling: str = "mean"
    normalise: bool = True
    max_length: int | None = None
    lower: bool = False


def recipe(source: str) -> Recipe:
    """From the files that sentence-transformers saves with a model; without them mean and normalised.

    Raises ValueError for a part that is not known here.
    """

    def read(name: str) -> Any:
        from transformers.utils import cached_file

        path = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))

    modules = read("modules.json")
    if modules is None:
        return Recipe()
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(
            f"model={source!r} has the part {', '.join(unknown)} of sentence-transformers; supported are "
            "Transformer, Pooling and Normalize"
        )
    settings = read("sentence_bert_config.json") or {}
    pooling = read(f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else {}
    how = (
        pooling.get("pooling_mode")
        or [name for old, name in _OLD_NAMES.items() if pooling.get(old)]
        or "mean"
    )
    names = [how] if isinstance(how, str) else list(how)
    if len(names) != 1 or names[0] not in POOLINGS:
        raise ValueError(
            f"model={source!r} has pooling={'+'.join(names)!r}; supported is one of {', '.join(POOLINGS)}"
        )
    return Recipe(
        names[0],
        "Normalize" in kinds,
        settings.get("max_seq_length"),
        bool(settings.get("do_lower_case")),
    )


@dataclass
class Embed(Task):
    """Embeddings of texts, pooled as sentence-transformers would; shows the nearest other text of each."""

    pooling: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(POOLINGS)}; default: what was saved with the model, or mean."),
    ] = None
    normalise: Annotated[
        bool | None,
        typer.Option(
            "--normalise/--no-normalise", help="To length 1; default: as saved with the model, or yes."
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.npy", help="All embeddings as a float32 matrix of NumPy.")
    ] = None

    name = "embed"
    auto_class = "AutoModel"
    head = "an encoder"
    spare_weights = re.compile(r"(^|\.)pooler\.")
    batch_size = 32

    def default_model(self) -> str:
        return str(minilm("demo"))

    def check(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is unknown; allowed are {', '.join(POOLINGS)}")
        if self.output is not None and self.output.suffix != ".npy":
            raise ValueError(f"output={str(self.output)!r}; its name must end in .npy")

    def check_config(self, config: Any) -> None:
        if config.is_encoder_decoder:
            raise ValueError(
                f"a {config.model_type} model has an encoder and a decoder; embed needs {self.head}"
            )

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        super().prepare(model, tokenizer, source)
        self.recipe = recipe(source)
        if self.recipe.max_length:
            tokenizer.model_max_length = min(tokenizer.model_max_length, self.recipe.max_length)

    def runner(self, model: Any) -> Runner:
        how = self.pooling or self.recipe.pooling
        normalise = self.recipe.normalise if self.normalise is None else self.normalise

        def run(texts: list[str]) -> list[Record]:
            words = [text.lower() for text in texts] if self.recipe.lower else texts
            limited = self.longest() is not None
            batch = self.tokenizer(words, padding=len(texts) > 1, truncation=limited, return_tensors="pt")
            batch = batch.to(model.device)
            vectors = pool(model(**batch).last_hidden_state, batch["attention_mask"], how).float()
            if normalise:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return [
                {"text": text, "embedding": vector}
                for text, vector in zip(texts, vectors.tolist(), strict=True)
            ]

        return run

    def agreement(self, expected: Sequence[Record], found: Sequence[Record]) -> dict[str, Any]:
        a, b = matrix(expected), matrix(found)
        cosines = torch.nn.functional.cosine_similarity(a.double(), b.double())
        lowest, apart = cosines.min().item(), (a - b).abs().max().item()
        number, total = int((cosines > SAME_COSINE).sum()), len(cosines)
        return {
            "same": number,
            "of": total,
            "lowest_cosine": lowest,
            "largest_difference": apart,
            "text": f"{number} of {total} embeddings have a cosine above {SAME_COSINE}, the lowest is "
            f"{lowest:.7f}, numbers differ by {apart:.1e} at most",
        }

    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        vectors = torch.nn.functional.normalize(matrix(results), dim=-1)
        yield f"{len(results)} x {vectors.shape[1]} numbers"
        if len(results) < 2:
            return
        for i, record in enumerate(results):
            near = vectors @ vectors[i]
            near[i] = -torch.inf
            yield f"{near.max():.4f}  {record['text']}  ~  {results[int(near.argmax())]['text']}"

    def save(self, results: Sequence[Record]) -> Path | None:
        if self.output is not None:
            import numpy

            self.output.parent.mkdir(parents=True, exist_ok=True)
            numpy.save(self.output, matrix(results).numpy())
        return self.output


def matrix(results: Sequence[Record]) -> Tensor:
    """All embeddings, float32 (texts, width)."""
    return torch.tensor([record["embedding"] for record in results])
