"""Attention alone against torch's scaled_dot_product_attention, on a GPU with each of its backends too, and
beside other runtimes with the plain formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, peers
from bigmodel_kernels.bench.timing import LeftOut

#: The plain formula is not run where its scores take more.
MOST_SCORES = 2**30


def build(case: Case, setting: Setting) -> Prepared:
    batch, heads, length, dim = (case.sizes[name] for name in ("batch", "heads", "length", "head_dim"))
    causal = case.sizes["causal"]
    dtype = getattr(torch, case.dtype)
    # One projection gives Q, K and V side by side, as a model has them: views, not copies.
    qkv = torch.randn(batch, length, 3, heads, dim, device=setting.device, dtype=dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)

    def sdpa() -> Any:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def by(backend: SDPBackend) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel(backend):
                return sdpa()

        return run

    contenders = [
        Contender("sdpa", sdpa),
        Contender("bigmodel", lambda: bk.attention(query, key, value, is_causal=causal)),
    ]
    if setting.device.startswith("cuda"):

        def triton() -> Any:
            with backends.use("triton"):
                return bk.attention(query, key, value, is_causal=causal)

        contenders += [
            Contender("bigmodel_triton", triton, optional=True),
            Contender("sdpa_cudnn", by(SDPBackend.CUDNN_ATTENTION), optional=True),
            Contender("sdpa_flash", by(SDPBackend.FLASH_ATTENTION), optional=True),
        ]
    if setting.compile:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = None
        if causal:
            mask = create_block_mask(
                lambda b, h, q, k: q >= k, None, None, length, length, device=setting.device
            )
        flex = torch.compile(flex_attention)
        contenders.append(
            Contender("flex_attention", lambda: flex(query, key, value, block_mask=mask), optional=True)
        )
    if setting.peers:

        def eager() -> Any:
            size = batch * heads * length * length * dtype.itemsize
            if size > MOST_SCORES:
                raise LeftOut(f"its scores take {size / 2**30:.1f} GiB, and their softmax again")
            scores = query @ key.mT / math.sqrt(dim)
            if causal:
                future = torch.ones(length, length, dtype=torch.bool, device=setting.device).triu(1)
                scores.masked_fill_(future, -math.inf)
            return torch.softmax(scores, -1) @ value

        contenders.insert(0, Contender("eager", eager, optional=True))
        makers = peers.attentions(heads, dim, causal, case.dtype)
        shape = (heads, dim, causal, case.dtype)
        contenders += peers.contenders(setting, makers, shape, query, key, value)
    pairs = length * (length + 1) / 2 if causal else length * length
    work = Stage(4 * batch * heads * pairs * dim, 4 * batch * heads * length * dim * query.element_size())
    return Prepared(contenders, "sdpa", [work], items=batch * length)


def case(batch: int, heads: int, length: int, dim: int, causal: bool, dtype: str) -> Case:
    label = f"{batch}x{heads} S={length} D={dim}{' causal' if causal else ''}"
    sizes = {"batch": batch, "heads": heads, "length": length, "head_dim": dim, "causal": causal}
    return Case(label, dtype, sizes)


SUITE = Suite(
    "attention",
    build,
    cases=tuple(
        case(batch, heads, length, dim, causal, dtype)
        for dtype in ("float32", "bfloat16")
        for heads, dim, shapes in (
            (12, 64, ((8, 128), (4, 512), (1, 2048))),
            (6, 64, ((1, 8192),)),  # few heads, as ONNX Runtime makes all their scores
            (12, 32, ((8, 128), (4, 512), (1, 2048))),
        )
        for causal in (False, True)
        for batch, length in shapes
    ),
    # Of 16 thousand tokens and more, for the GPU has to be full.
    gpu=tuple(
        case(batch, heads, length, dim, causal, "bfloat16")
        for heads, dim, shapes in (
            (12, 64, ((128, 128), (64, 256), (32, 512), (8, 2048), (2, 8192))),
            (16, 128, ((16, 512), (4, 2048), (1, 16384))),
            (8, 256, ((4, 2048),)),
        )
        for batch, length in shapes
        for causal in (False, True)
    ),
    kernels=True,
    quick=(
        case(1, 2, 64, 32, False, "float32"),
        case(1, 2, 65, 64, True, "float32"),
        case(1, 2, 64, 64, False, "bfloat16"),
    ),
)
