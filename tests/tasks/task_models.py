"""Tiny models with random weights, each with the head of a task and a tokenizer of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from bigmodel_kernels.finetune import models
from bigmodel_kernels.finetune.settings import Settings

TEXTS = [
    "The cat sat on the mat and slept.",
    "A dog ran after the ball in the park, and came back with a stick.",
    "Rain.",
    "def add(a, b):\n    return a + b\n",
    "The night was long and the street was wet.",
]

#: kind -> class of transformers, tokenizer of `finetune`, and what the config has beside the sizes.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classifier": ("BertForSequenceClassification", "small-bert", {"num_labels": 3}),
    "reader": ("BertForQuestionAnswering", "small-bert", {}),
    "tagger": ("BertForTokenClassification", "small-bert", {"num_labels": 3}),
    "masked": ("BertForMaskedLM", "small-bert", {}),
    "encoder": ("BertModel", "small-bert", {}),
    "distil": ("DistilBertForSequenceClassification", "small-bert", {"num_labels": 2}),
    "decoder": ("GPT2LMHeadModel", "small-gpt2", {}),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "small-gpt2", {"num_labels": 2}),
    "t5": ("T5ForConditionalGeneration", "small-t5", {}),
    "bart": ("BartForConditionalGeneration", "small-bart", {}),
}

Folder = Callable[[str], str]


def build(kind: str, folder: Path) -> None:
    """Writes model and tokenizer of a kind."""
    torch.manual_seed(0)
    name, words, changes = KINDS[kind]
    cls = getattr(transformers, name)
    tokenizer = models.train_tokenizer(words, TEXTS, 320)
    ends = {"small-bert": tokenizer.sep_token_id}
    special = {
        "size": len(tokenizer),
        "pad": tokenizer.pad_token_id,
        "end": ends.get(words, tokenizer.eos_token_id),
    }
    settings = Settings(task="classification", output="unused", hidden=32, layers=2, heads=2)
    if kind == "distil":
        config = transformers.DistilBertConfig(
            vocab_size=special["size"], dim=32, n_layers=2, n_heads=2, hidden_dim=64, **changes
        )
    else:
        config = models.SMALL[words](settings, special, 96)
        for key, value in changes.items():
            setattr(config, key, value)
    model = cls(config)
    for parameter in model.parameters():  # away from the tiny initial values, so that answers are no ties
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if words == "small-bert":  # as BERT's own tokenizer
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    tokenizer.save_pretrained(folder)
