"""Texts that suites generate, the likeliest token each time, and how those of half types are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def greedy(model: Any, ids: Tensor, new: int, **options: Any) -> Tensor:
    """`ids` (B, S) and as many tokens more, by the `generate` of a decoder of transformers."""
    return model.generate(  # type: ignore[no-any-return]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def beside_the_largest(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logit of each of these tokens (B, S), of logits (B, S, vocabulary), as a part of the largest.

    In half types two tokens may be equally likely but for rounding; then both are right.
    """
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) / logits.amax(-1)
