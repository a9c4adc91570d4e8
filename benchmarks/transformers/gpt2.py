"""GPT-2 as transformers has it (sdpa, its default), and patched: prefill, and greedy generation with a cache.
Beside other runtimes eager is there too.

Weights are random: speed does not depend on them. Generated tokens must be the same in float32; the largest
difference of a generation is that of token numbers, so anything but 0 means another text. In the half types
two tokens may be equally likely but for rounding, so there each token's logit is compared with the largest.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, peers, texts


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    hidden, layers, heads, vocabulary = (sizes[name] for name in ("hidden", "layers", "heads", "vocabulary"))
    batch, prompt, new = sizes["batch"], sizes["prompt"], sizes["new"]
    config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocabulary)
    config.bos_token_id = config.eos_token_id = None  # generation never ends early
    dtype = getattr(torch, case.dtype)
    with torch.device(setting.device):  # made there, in the dtype
        model = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.eval()

    def twin() -> Any:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()})

    ours = twin()
    bk.patch(ours)
    ids = torch.randint(0, vocabulary, (batch, prompt), device=setting.device)

    def runs(twin: Any, **options: Any) -> Any:
        if not new:
            return lambda: twin(ids).logits
        return lambda: texts.greedy(twin, ids, new, **options)

    def compared(result: Any) -> Any:
        if not new or case.dtype == "float32":
            return result
        logits = model(result[:, :-1]).logits[:, prompt - 1 :]
        return texts.beside_the_largest(logits, result[:, prompt:])

    contenders = [Contender("sdpa", runs(model)), Contender("bigmodel", runs(ours))]
    if setting.compile:
        # A generation is compiled as transformers' documentation has it: a static cache keeps all shapes.
        compiled, options = twin(), {"cache_implementation": "static"} if new else {}
        compiled.forward = torch.compile(compiled.forward)
        contenders.append(Contender("compile", runs(compiled, **options), optional=True))
    if setting.peers:
        eager = twin()
        eager.set_attn_implementation("eager")
        contenders.insert(0, Contender("eager", runs(eager)))
        makers = peers.generators(model, case.dtype, new) if new else peers.prefills(model, case.dtype)
        key = (hidden, layers, heads, vocabulary, case.dtype, new)
        contenders += peers.contenders(setting, makers, key, ids)
    head, block = vocabulary * hidden, layers * 12 * hidden * hidden
    itemsize = model.dtype.itemsize
    attention = layers * 4 * hidden * batch

    def step(tokens: int, seen: int, logits: int) -> Stage:
        """`tokens` of each sequence, when `seen` are there with them; logits of the last `logits`."""
        pairs = tokens * (2 * seen - tokens + 1) / 2
        flops = 2 * batch * (tokens * block + logits * head) + attention * pairs
        return Stage(flops, (block + head + 2 * layers * batch * seen * hidden) * itemsize)

    stages = [step(prompt, prompt, 1 if new else prompt)]
    stages += [step(1, prompt + i, 1) for i in range(1, new)]
    return Prepared(contenders, "sdpa", stages, comparable=compared, items=batch * (new or prompt))


def case(label: str, dtype: str, batch: int, prompt: int, new: int, tiny: bool = False) -> Case:
    model = (
        {"hidden": 64, "layers": 2, "heads": 2, "vocabulary": 500}
        if tiny
        else {"hidden": 768, "layers": 12, "heads": 12, "vocabulary": 50257}
    )
    return Case(label, dtype, {**model, "batch": batch, "prompt": prompt, "new": new})


SUITE = Suite(
    "gpt2",
    build,
    cases=tuple(
        c
        for dtype in ("float32", "bfloat16")
        for c in (
            case("prefill 1x512", dtype, 1, 512, 0),
            case("generate 1x(32+64)", dtype, 1, 32, 64),
            case("generate 8x(32+64)", dtype, 8, 32, 64),
        )
    ),
    quick=(
        case("tiny prefill 1x32", "float32", 1, 32, 0, tiny=True),
        case("tiny generate 2x(8+4)", "float32", 2, 8, 4, tiny=True),
    ),
)
