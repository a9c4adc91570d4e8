"""The loss of a language model from its last hidden states, with the gradients of both: linear_cross_entropy
against torch's linear and cross_entropy, which hold the logits of all rows. Time and peak memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite


def build(case: Case, setting: Setting) -> Prepared:
    tokens, hidden, classes = case.sizes["tokens"], case.sizes["hidden"], case.sizes["classes"]
    options: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, case.dtype)}
    x = torch.randn(tokens, hidden, **options).requires_grad_()
    weight = (torch.randn(classes, hidden, **options) * hidden**-0.5).requires_grad_()
    target = torch.randint(0, classes, (tokens,), device=setting.device)

    def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def clear() -> None:
        x.grad = weight.grad = None

    def contender(name: str, loss: Any, optional: bool = False) -> Contender:
        def run(_: None) -> Any:
            loss(x, weight, target).backward()
            return x.grad

        return Contender(name, run, optional, before=clear)

    contenders = [contender("torch", plain), contender("bigmodel", bk.linear_cross_entropy)]
    if setting.compile:
        contenders.append(contender("compile", torch.compile(plain), optional=True))
    # Logits, and the gradients of x and of the weight: three products.
    work = Stage(6 * tokens * hidden * classes, 2 * (tokens + classes) * hidden * x.element_size())
    return Prepared(contenders, "torch", [work], items=tokens, memory=True)


def case(tokens: int, hidden: int, classes: int, dtype: str) -> Case:
    label = f"{tokens} tokens {hidden}->{classes}, forward and backward"
    return Case(label, dtype, {"tokens": tokens, "hidden": hidden, "classes": classes})


SUITE = Suite(
    "cross_entropy",
    build,
    cases=(
        case(4096, 768, 50257, "float32"),
        case(512, 768, 50257, "float32"),
        case(4096, 768, 50257, "bfloat16"),
    ),
    quick=(case(40, 32, 517, "float32"),),
    training=True,
)
