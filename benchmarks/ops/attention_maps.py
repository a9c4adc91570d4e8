"""What attention looks at, against the plain formula: probabilities, and entropy and mass without them."""

from __future__ import annotations

import math
from typing import Any

import torch

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite


def build(case: Case, setting: Setting) -> Prepared:
    batch, heads, length, dim = (case.sizes[name] for name in ("batch", "heads", "length", "head_dim"))
    qk = torch.randn(batch, length, 2, heads, dim, device=setting.device, dtype=getattr(torch, case.dtype))
    query, key = qk.permute(2, 0, 3, 1, 4)

    def probabilities() -> Any:
        scores = query @ key.mT / math.sqrt(dim)
        return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)

    def statistics() -> Any:
        p = probabilities().float()
        return torch.cat([torch.special.entr(p).sum(-1), p.sum(-2)], -1)

    if case.sizes["statistics"]:
        plain, ours = statistics, lambda: torch.cat(bk.attention_statistics(query, key)[:2], -1)
    else:
        plain, ours = probabilities, lambda: bk.attention_probabilities(query, key)
    contenders = [Contender("eager", plain), Contender("bigmodel", ours)]
    if setting.compile:
        contenders.append(Contender("compile", torch.compile(plain), optional=True))
    scores = batch * heads * length * length
    written = 0 if case.sizes["statistics"] else scores
    work = Stage(2 * scores * dim, (2 * batch * heads * length * dim + written) * query.element_size())
    return Prepared(contenders, "eager", [work], items=batch * length)


def case(batch: int, length: int, statistics: bool, dtype: str, heads: int = 12) -> Case:
    label = f"{'entropy, mass' if statistics else 'probabilities'} {batch}x{heads} S={length}"
    sizes = {"batch": batch, "heads": heads, "length": length, "head_dim": 64, "statistics": statistics}
    return Case(label, dtype, sizes)


SUITE = Suite(
    "attention_maps",
    build,
    cases=tuple(
        case(batch, length, statistics, dtype)
        for dtype in ("float32", "bfloat16")
        for statistics in (False, True)
        for batch, length in ((8, 128), (1, 512), (1, 2048))
    ),
    kernels=True,
    quick=(case(1, 40, False, "float32", 2), case(1, 40, True, "bfloat16", 2)),
)
