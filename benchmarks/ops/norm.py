"""LayerNorm, alone and with the residual, against torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite


def build(case: Case, setting: Setting) -> Prepared:
    rows, size, residual = case.sizes["rows"], case.sizes["size"], case.sizes["residual"]
    options: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, case.dtype)}
    x = torch.randn(rows, size, **options)
    added = torch.randn(rows, size, **options) if residual else None
    gamma, beta = torch.randn(2, size, **options)

    def plain() -> Any:
        return F.layer_norm(x if added is None else x + added, (size,), gamma, beta)

    contenders = [
        Contender("torch", plain),
        Contender("bigmodel", lambda: bk.layer_norm(x, gamma, beta, residual=added)),
    ]
    if setting.compile:
        contenders.append(Contender("compile", torch.compile(plain), optional=True))
    work = Stage(8 * rows * size, (3 if residual else 2) * rows * size * x.element_size())
    return Prepared(contenders, "torch", [work], items=rows, unit="rows")


def case(rows: int, size: int, residual: bool, dtype: str) -> Case:
    label = f"{rows} rows of {size}{' + residual' if residual else ''}"
    return Case(label, dtype, {"rows": rows, "size": size, "residual": residual})


SUITE = Suite(
    "norm",
    build,
    cases=tuple(
        case(rows, size, residual, dtype)
        for dtype in ("float32", "bfloat16")
        for rows, size in ((1, 768), (1024, 768), (8192, 768), (1024, 4096))
        for residual in (False, True)
    ),
    kernels=True,
    quick=(case(16, 96, False, "float32"), case(16, 96, True, "float32"), case(16, 96, True, "bfloat16")),
)
