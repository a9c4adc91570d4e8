"""Everything that a training run can be told, in one place: the command's options are made from this."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("patched", "eager", "sdpa")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """One training run. None means what the task takes by default (`Task.defaults`)."""

    task: str
    output: str = _option("", "Folder of the run: checkpoints, metrics, curve, model. Must be new or empty.")
    model: str | None = _option(
        None, "Name or folder of a model; minilm (packaged); or small-bert, small-gpt2, small-t5, small-bart."
    )
    dataset: str | None = _option(
        None, "Local .csv, .json, .jsonl or .txt, or a name of the datasets package (name:configuration)."
    )
    split: str = _option("train", "Split of a named data set.")
    columns: tuple[str, ...] = _option((), "ours=theirs, such as text=review or source=translation.en.")
    language: str = _option("zh_CN", "Target language of the default texts for translation.")
    max_examples: int | None = _option(None, "Use no more of the data; a seeded sample.")
    held_out: float = _option(0.1, "Part of the data kept for evaluation, chosen by a seeded hash.")
    max_length: int | None = _option(None, "Longest sequence in tokens; longer ones are cut.")

    layers: int = _option(4, "Of a small-... model.")
    hidden: int = _option(256, "Of a small-... model.")
    heads: int = _option(4, "Of a small-... model.")
    vocabulary: int = _option(8000, "Of a small-... model, whose tokenizer is trained on the data.")

    implementation: str = _option("patched", "patched, eager or sdpa.")
    fused_loss: bool = _option(False, "Patched: the loss of a language model without its logits.")
    recompute: bool = _option(False, "Patched: make the hidden layers of feed-forward again in the backward.")
    steps: int | None = _option(None, "Optimizer steps; before epochs.")
    epochs: float | None = _option(None, "Passes over the data.")
    batch_size: int = _option(16, "Examples in a micro-batch.")
    accumulate: int = _option(1, "Micro-batches in a step.")
    lr: float | None = _option(None, "Largest learning rate.")
    warmup: float = _option(0.1, "Part of the steps with a rising learning rate; it falls linearly after.")
    weight_decay: float = _option(0.01, "Of AdamW, on matrices.")
    clip: float = _option(1.0, "Largest norm of the gradient; 0: no limit.")
    dropout: float | None = _option(None, "Every dropout of the model; default: the model's own.")
    freeze_layers: int = _option(0, "Train neither the embeddings nor the first N layers.")
    lora: int = _option(0, "Rank of LoRA adapters (needs peft); 0: train all weights.")
    seed: int = _option(0, "Of split, order, weights and dropout.")
    device: str = _option("cpu", "cpu, cuda or cuda:N.")
    threads: int | None = _option(None, "Threads of torch and of our kernels.")
    autocast: bool = _option(False, "Train under autocast in bfloat16.")

    evaluate_every: int | None = _option(None, "Steps between evaluations; default: a fifth of the run.")
    evaluate_examples: int = _option(500, "Held-out examples at most in an evaluation.")
    checkpoint_every: int | None = _option(None, "Steps between checkpoints; default: a tenth of the run.")
    keep: int = _option(2, "Checkpoints to keep.")

    def __post_init__(self) -> None:
        for name in ("max_examples", "steps", "epochs", "lr", "max_length", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}; it must be positive")
        for name in ("batch_size", "accumulate", "keep", "evaluate_examples", "layers", "hidden", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be 1 or more")
        for name in ("evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be 1 or more")
        for name in ("warmup", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value}; it must be at least 0 and less than 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}; it must be between 0 and 1, both excluded")
        for name in ("weight_decay", "clip", "freeze_layers", "lora"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; it must not be negative")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={self.implementation!r} is unknown; allowed are {', '.join(IMPLEMENTATIONS)}"
            )
        for name in ("fused_loss", "recompute"):
            if getattr(self, name) and self.implementation != "patched":
                raise ValueError(
                    f"{name}=True; it needs implementation='patched', not {self.implementation!r}"
                )
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden} is no multiple of heads={self.heads}")
        if self.vocabulary < 300:
            raise ValueError(f"vocabulary={self.vocabulary}; it must be 300 or more")
        if not self.output:
            raise ValueError("output='' ; it must name the folder of the run")
        self.column_names()

    def column_names(self) -> dict[str, str]:
        """`columns` as a dictionary: our name of a column -> its name in the data."""
        pairs = [text.partition("=") for text in self.columns]
        for (ours, sign, theirs), text in zip(pairs, self.columns, strict=True):
            if not (ours and sign and theirs):
                raise ValueError(f"columns={text!r}; it must be OURS=THEIRS, such as text=review")
        return {ours: theirs for ours, _, theirs in pairs}

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def with_defaults(self, defaults: dict[str, Any]) -> Settings:
        """Fills what is None from the defaults of the task."""
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "columns": list(self.columns)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Settings:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"settings {', '.join(unknown)} are unknown; a newer version wrote them")
        return cls(**{**value, "columns": tuple(value.get("columns", ()))})

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """The settings of the run in `folder`."""
        path = folder / "settings.json"
        if not path.is_file():
            raise ValueError(f"output={str(folder)!r} holds no run to resume: {path.name} is not there")
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
