"""BERT's embedding (word + position + type + LayerNorm) in one pass, against torch's calls."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite


def build(case: Case, setting: Setting) -> Prepared:
    batch, length, hidden, vocabulary = (
        case.sizes[name] for name in ("batch", "length", "hidden", "vocabulary")
    )
    options: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, case.dtype)}
    word = torch.randn(vocabulary, hidden, **options)
    position, kind = torch.randn(512, hidden, **options), torch.randn(2, hidden, **options)
    gamma, beta = torch.randn(2, hidden, **options)
    ids = torch.randint(0, vocabulary, (batch, length), device=setting.device)
    places = torch.arange(length, device=setting.device)[None]
    types = torch.zeros_like(ids)

    def plain() -> Any:
        y = F.embedding(ids, word) + F.embedding(places, position) + F.embedding(types, kind)
        return F.layer_norm(y, (hidden,), gamma, beta, 1e-12)

    def ours() -> Any:
        return bk.embedding(ids, word, places, position, types, kind, gamma, beta, 1e-12)

    contenders = [Contender("torch", plain), Contender("bigmodel", ours)]
    if setting.compile:
        contenders.append(Contender("compile", torch.compile(plain), optional=True))
    tokens = batch * length
    work = Stage(10 * tokens * hidden, 2 * tokens * hidden * word.element_size() + 16 * tokens)
    return Prepared(contenders, "torch", [work], items=tokens)


def case(batch: int, length: int, hidden: int, dtype: str, vocabulary: int = 30522) -> Case:
    sizes = {"batch": batch, "length": length, "hidden": hidden, "vocabulary": vocabulary}
    return Case(f"{batch}x{length} hidden {hidden}", dtype, sizes)


SUITE = Suite(
    "embedding",
    build,
    cases=tuple(
        case(batch, length, hidden, dtype)
        for dtype in ("float32", "bfloat16")
        for hidden in (384, 768)
        for batch, length in ((1, 16), (8, 128), (32, 256))
    ),
    kernels=True,
    quick=(case(2, 16, 64, "float32", 100), case(2, 16, 64, "bfloat16", 100)),
)
