"""Projections of BERT and GPT-2, with activation, residual and LayerNorm in the call, against torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite

GELU = {"none": lambda t: t, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


def build(case: Case, setting: Setting) -> Prepared:
    rows, size_in, size_out = case.sizes["rows"], case.sizes["in"], case.sizes["out"]
    activation, norm, layout = case.sizes["activation"], case.sizes["norm"], case.sizes["layout"]
    options: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, case.dtype)}
    x = torch.randn(rows, size_in, **options)
    weight = torch.randn(size_out, size_in, **options) * size_in**-0.5
    bias = torch.randn(size_out, **options)
    residual = torch.randn(rows, size_out, **options) if norm else None
    gamma, beta = torch.randn(2, size_out, **options)
    conv1d = weight.t().contiguous()

    def plain() -> Any:
        # GPT-2's Conv1D is addmm with the transposed weight.
        y = torch.addmm(bias, x, conv1d) if layout == "conv1d" else F.linear(x, weight, bias)
        y = GELU[activation](y)
        return F.layer_norm(y + residual, (size_out,), gamma, beta) if residual is not None else y

    def ours() -> Any:
        return bk.linear(
            x,
            conv1d if layout == "conv1d" else weight,
            bias,
            weight_layout=layout,
            activation=activation,
            residual=residual,
            norm_weight=gamma if norm else None,
            norm_bias=beta if norm else None,
        )

    contenders = [Contender("torch", plain), Contender("bigmodel", ours)]
    if setting.compile:
        contenders.append(Contender("compile", torch.compile(plain), optional=True))
    elements = rows * size_in + size_in * size_out + rows * size_out * (2 if norm else 1)
    work = Stage(2 * rows * size_in * size_out, elements * x.element_size())
    return Prepared(contenders, "torch", [work], items=rows, unit="rows")


def case(
    rows: int,
    size_in: int,
    out: int,
    dtype: str,
    activation: str = "none",
    norm: bool = False,
    layout: str = "linear",
) -> Case:
    label = f"{rows} rows {size_in}->{out}"
    label += "".join(
        f" {word}" for word, there in ((activation, activation != "none"), ("+residual+norm", norm)) if there
    )
    label += " conv1d" if layout == "conv1d" else ""
    sizes = {
        "rows": rows,
        "in": size_in,
        "out": out,
        "activation": activation,
        "norm": norm,
        "layout": layout,
    }
    return Case(label, dtype, sizes)


SUITE = Suite(
    "linear",
    build,
    cases=tuple(
        c
        for dtype in ("float32", "bfloat16")
        for rows in (1, 16, 1024)
        for c in (
            case(rows, 768, 2304, dtype),
            case(rows, 768, 3072, dtype, activation="gelu"),
            case(rows, 768, 768, dtype, norm=True),
            case(rows, 768, 2304, dtype, layout="conv1d"),
        )
    ),
    gpu=tuple(
        c
        for rows in (128, 1024, 8192, 32768)
        for c in (
            case(rows, 768, 2304, "bfloat16"),
            case(rows, 768, 3072, "bfloat16", activation="gelu"),
            case(rows, 768, 768, "bfloat16", norm=True),
            case(rows, 3072, 768, "bfloat16", norm=True),
            case(rows, 768, 2304, "bfloat16", layout="conv1d"),
        )
    ),
    kernels=True,
    quick=(
        case(8, 64, 96, "float32", activation="gelu"),
        case(8, 64, 64, "float32", norm=True),
        case(8, 64, 96, "bfloat16", layout="conv1d"),
    ),
)
