"""transformers' own pipeline objects on a patched model: nothing to change, the same answers."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import transformers
from task_models import TEXTS, Folder

import bigmodel_kernels as bk

#: task -> model, inputs, and arguments of the call.
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "text-classification": ("classifier", TEXTS, {"top_k": 3}),
    "token-classification": ("tagger", TEXTS, {"aggregation_strategy": "simple"}),
    "fill-mask": ("masked", ["The [MASK] sat.", "A dog ran [MASK] the ball in the park."], {}),
    "zero-shot-classification": ("classifier", TEXTS, {"candidate_labels": ["rain", "cats"]}),
    "feature-extraction": ("encoder", TEXTS[:1], {}),
    "text-generation": ("decoder", TEXTS, {"max_new_tokens": 6, "do_sample": False}),
}


def flat(value: Any) -> list[Any]:
    """All words and numbers of an answer, in order."""
    if isinstance(value, dict):
        value = [(key, value[key]) for key in sorted(value)]
    return [x for each in value for x in flat(each)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("task", CASES)
def test_a_pipeline_answers_the_same(folder: Folder, task: str, batch_size: int) -> None:
    kind, inputs, arguments = CASES[task]
    pipe = transformers.pipeline(task, model=folder(kind), device="cpu")
    if pipe.tokenizer.pad_token is None:
        pipe.tokenizer.pad_token = pipe.tokenizer.eos_token
    expected = flat(pipe(inputs, batch_size=batch_size, **arguments))
    report = bk.patch(pipe.model)
    assert report.patched
    found = flat(pipe(inputs, batch_size=batch_size, **arguments))
    assert len(found) == len(expected) > len(inputs)
    for a, b in zip(found, expected, strict=True):
        assert a == (pytest.approx(b, abs=2e-4, rel=1e-4) if isinstance(b, float | numpy.floating) else b)


def test_features_of_a_padded_batch_are_the_same_at_real_tokens(folder: Folder) -> None:
    """At padding eager has numbers that mean nothing, and a patched model has zeros."""
    pipe = transformers.pipeline(
        "feature-extraction", model=folder("encoder"), device="cpu", return_tensors=True
    )
    expected = pipe(TEXTS, batch_size=len(TEXTS))
    bk.patch(pipe.model)
    found = pipe(TEXTS, batch_size=len(TEXTS))
    for text, a, b in zip(TEXTS, found, expected, strict=True):
        real = len(pipe.tokenizer(text)["input_ids"])
        assert torch.allclose(a[:, :real], b[:, :real], atol=2e-4, rtol=1e-4)
        assert not a[:, real:].any()
