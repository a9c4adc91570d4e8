"""The feed-forward block in one call, against torch's calls: BERT's (post-norm) and GPT-2's (pre-norm)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite


def build(case: Case, setting: Setting) -> Prepared:
    rows, hidden, inner, kind = (case.sizes[name] for name in ("rows", "hidden", "inner", "kind"))
    options: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, case.dtype)}
    x = torch.randn(rows, hidden, **options)
    w_in, w_out = torch.randn(inner, hidden, **options) * 0.03, torch.randn(hidden, inner, **options) * 0.03
    b_in, b_out = torch.randn(inner, **options), torch.randn(hidden, **options)
    gamma, beta = torch.randn(2, hidden, **options)
    conv1d_in, conv1d_out = w_in.t().contiguous(), w_out.t().contiguous()

    def plain() -> Any:
        if kind == "bert":
            return F.layer_norm(
                F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out) + x, (hidden,), gamma, beta, 1e-12
            )
        h = torch.addmm(b_in, F.layer_norm(x, (hidden,), gamma, beta), conv1d_in)
        return torch.addmm(b_out, F.gelu(h, approximate="tanh"), conv1d_out) + x

    def ours() -> Any:
        norm = {"norm_weight": gamma, "norm_bias": beta, "residual": x}
        if kind == "bert":
            return bk.feed_forward(
                x, w_in, b_in, w_out, b_out, activation="gelu", norm_position="post", norm_eps=1e-12, **norm
            )
        return bk.feed_forward(
            x,
            conv1d_in,
            b_in,
            conv1d_out,
            b_out,
            activation="gelu_tanh",
            weight_layout="conv1d",
            norm_position="pre",
            **norm,
        )

    contenders = [Contender("torch", plain), Contender("bigmodel", ours)]
    if setting.compile:
        contenders.append(Contender("compile", torch.compile(plain), optional=True))
    work = Stage(4 * rows * hidden * inner, (2 * hidden * inner + 2 * rows * hidden) * x.element_size())
    return Prepared(contenders, "torch", [work], items=rows, unit="rows")


def case(rows: int, hidden: int, inner: int, kind: str, dtype: str) -> Case:
    sizes = {"rows": rows, "hidden": hidden, "inner": inner, "kind": kind}
    return Case(f"{kind} {rows} rows {hidden}/{inner}", dtype, sizes)


SUITE = Suite(
    "feed_forward",
    build,
    cases=tuple(
        case(rows, hidden, 4 * hidden, kind, dtype)
        for dtype in ("float32", "bfloat16")
        for kind, hidden in (("bert", 768), ("gpt2", 768), ("bert", 384))
        for rows in (1, 16, 128, 1024)
    ),
    gpu=tuple(
        case(rows, hidden, 4 * hidden, kind, "bfloat16")
        for kind, hidden in (("bert", 768), ("gpt2", 768), ("bert", 1024))
        for rows in (128, 1024, 8192, 32768)
    ),
    kernels=True,
    quick=(
        case(8, 64, 256, "bert", "float32"),
        case(8, 64, 256, "gpt2", "float32"),
        case(8, 64, 256, "bert", "bfloat16"),
    ),
)
