"""BERT as transformers has it (eager, sdpa), and patched. Weights are random: speed does not depend on them.

A padded batch goes to all contenders as it is (to CTranslate2, which takes lists of tokens, without the
padding). Its floor counts the real tokens alone, as nobody has to compute padding. Results are compared at
real tokens.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import BertConfig, BertModel

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, peers


def lengths_of(case: Case) -> list[int]:
    """Given ones, or a seeded sample between the shortest and the longest.

    Even over the lengths, or, as in most corpora, over their logarithms: many short texts and few long ones.
    """
    sizes = case.sizes
    if "length" in sizes:
        return [sizes["length"]] * sizes["batch"]
    generator = torch.Generator().manual_seed(sizes["seed"])
    if sizes.get("logarithmic"):
        low, high = math.log(sizes["shortest"]), math.log(sizes["longest"])
        drawn = torch.exp(low + (high - low) * torch.rand(sizes["batch"], generator=generator)).round()
    else:
        drawn = torch.randint(sizes["shortest"], sizes["longest"] + 1, (sizes["batch"],), generator=generator)
    return [int(n) for n in drawn]


def sharing(model: Any, implementation: str) -> Any:
    """The same model with the same weights in memory, and another attention implementation."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    twin.set_attn_implementation(implementation)
    return twin


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    hidden, layers, heads = sizes["hidden"], sizes["layers"], sizes["heads"]
    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    with torch.device(setting.device):  # made there, in the dtype
        model = BertModel._from_config(config, attn_implementation="sdpa", dtype=getattr(torch, case.dtype))
    model.eval()
    lengths = lengths_of(case)
    longest = max(lengths)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long().to(setting.device)
    ids = torch.randint(1000, config.vocab_size, (len(lengths), longest), device=setting.device) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}

    def runs(twin: Any) -> Any:
        return lambda: twin(**inputs).last_hidden_state

    ours = sharing(model, "sdpa")
    bk.patch(ours)
    contenders = [
        Contender("eager", runs(sharing(model, "eager"))),
        Contender("sdpa", runs(model)),
        Contender("bigmodel", runs(ours)),
    ]
    if setting.compile:
        contenders.append(Contender("compile", runs(torch.compile(sharing(model, "sdpa"))), optional=True))
    if setting.peers:
        key = (hidden, layers, heads, case.dtype)
        contenders += peers.contenders(setting, peers.encoders(model, case.dtype), key, ids, mask)
    tokens = sum(lengths)
    parameters = layers * 12 * hidden * hidden  # 4 of attention, 8 of feed-forward
    flops = 2 * tokens * parameters + layers * sum(4 * n * n * hidden for n in lengths)
    work = Stage(flops, parameters * model.dtype.itemsize)
    real = mask.bool()
    return Prepared(
        contenders, "sdpa", [work], comparable=lambda out: out[real], items=tokens, unit="real tokens"
    )


def case(label: str, dtype: str, hidden: int = 768, layers: int = 12, heads: int = 12, **sizes: int) -> Case:
    return Case(label, dtype, {"hidden": hidden, "layers": layers, "heads": heads, **sizes})


SUITE = Suite(
    "bert",
    build,
    cases=tuple(
        c
        for dtype in ("float32", "bfloat16")
        for c in (
            case("ragged batch of 32, 8-256", dtype, batch=32, shortest=8, longest=256, seed=0),
            case(
                "ragged batch of 32, 8-256, mostly short",
                dtype,
                **{"batch": 32, "shortest": 8, "longest": 256, "seed": 0, "logarithmic": 1},
            ),
            case("8x128, no padding", dtype, batch=8, length=128),
            case("1x16", dtype, batch=1, length=16),
            case("1x512", dtype, batch=1, length=512),
        )
    ),
    gpu=tuple(
        c
        for dtype in ("bfloat16", "float32")
        for c in (
            case("ragged batch of 256, 8-256", dtype, batch=256, shortest=8, longest=256, seed=0),
            case("64x128, no padding", dtype, batch=64, length=128),
            case("32x512, no padding", dtype, batch=32, length=512),
            case("1x16", dtype, batch=1, length=16),
        )
    ),
    quick=(
        case("tiny ragged", "float32", 64, 2, 2, batch=4, shortest=3, longest=24, seed=0),
        case("tiny 2x16", "float32", 64, 2, 2, batch=2, length=16),
        case("tiny 1x8", "bfloat16", 64, 2, 2, batch=1, length=8),
    ),
)
