"""A training step of BERT with a classification head, as transformers has it (sdpa) and patched: forward,
backward and AdamW apart, and all in one. Weights are random: speed does not depend on them.

All contenders share one set of weights in memory. Without dropout the losses, and the gradients of the first
layer's query weights, must agree; with dropout each draws its own. AdamW is torch's fused one for everybody,
so its two columns differ by noise alone. Peak memory is that of one whole step (bench/memory.py) over the
weights and AdamW's moments: activations and gradients. "activations" is forward and backward into gradients
that are there already, with a small vocabulary, whose table's gradient is no activation: its peak is what the
layers keep for the backward, and what the backward takes. There transformers' eager has its turn, and ours
with `recompute=True`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite

PHASES = ("forward", "backward", "AdamW", "whole step")
ACTIVATIONS = "activations"


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    hidden, layers, batch, length = sizes["hidden"], sizes["layers"], sizes["batch"], sizes["length"]
    config = BertConfig(
        vocab_size=2000 if sizes["phase"] == ACTIVATIONS else 30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * hidden,
        max_position_embeddings=max(512, length),
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
    )
    dtype = getattr(torch, case.dtype)
    with torch.device(setting.device):  # made there, in the dtype
        model = BertForSequenceClassification._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    inputs = {
        "input_ids": torch.randint(1000, config.vocab_size, (batch, length), device=setting.device),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64, device=setting.device),
        "labels": torch.randint(0, 2, (batch,), device=setting.device),
    }

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def zeros() -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def loss_of(twin: Any) -> Tensor:
        clear()
        return twin(**inputs).loss  # type: ignore[no-any-return]

    def contender(name: str, twin: Any, optional: bool = False) -> Contender:
        def backward(loss: Tensor) -> Tensor:
            loss.backward()
            return model.bert.encoder.layer[0].attention.self.query.weight.grad

        def gradients() -> None:
            if parameters[0].grad is None:
                backward(loss_of(twin))

        def step(_: None) -> None:
            backward(loss_of(twin))
            optimizer.step()

        if sizes["phase"] == "forward":
            return Contender(name, lambda: loss_of(twin).detach(), optional)
        if sizes["phase"] == "backward":
            return Contender(name, backward, optional, before=lambda: loss_of(twin))
        if sizes["phase"] == "AdamW":
            return Contender(name, lambda _: optimizer.step(), optional, before=gradients)
        if sizes["phase"] == ACTIVATIONS:
            return Contender(name, lambda _: backward(twin(**inputs).loss), optional, before=zeros)
        return Contender(name, step, optional, before=clear)

    def twin_of() -> Any:
        return copy.deepcopy(model, {id(p): p for p in parameters})

    def patched(recompute: bool) -> Any:
        twin = twin_of()
        bk.patch(twin, recompute=recompute)
        return twin

    contenders = [contender("sdpa", model), contender("bigmodel", patched(recompute=False))]
    if sizes["phase"] == ACTIVATIONS:
        eager = twin_of()
        eager.set_attn_implementation("eager")
        contenders = [contender("eager", eager), *contenders, contender("recompute", patched(recompute=True))]
    if setting.compile:
        contenders.append(contender("compile", torch.compile(twin_of()), optional=True))
    compared = sizes["dropout"] == 0 and sizes["phase"] in ("forward", "backward", ACTIVATIONS)
    return Prepared(
        contenders,
        "sdpa",
        _work(parameters, sizes),
        comparable=(lambda result: result) if compared else None,
        items=batch * length,
        memory=bool(sizes["memory"]),
    )


def _work(parameters: list[Tensor], sizes: Any) -> list[Stage]:
    """At least: two products a weight and token forward and four backward; AdamW reads weight, gradient and
    two moments, and writes all but the gradient.
    """
    hidden, tokens, length = sizes["hidden"], sizes["batch"] * sizes["length"], sizes["length"]
    products = sizes["layers"] * 12 * hidden * hidden  # 4 of attention, 8 of feed-forward
    forward = 2.0 * tokens * products + sizes["layers"] * 4.0 * tokens * length * hidden
    itemsize = parameters[0].element_size()
    stages = {
        "forward": Stage(forward, products * itemsize),
        "backward": Stage(2 * forward, 2 * products * itemsize),
        "AdamW": Stage(0, 7 * itemsize * sum(p.numel() for p in parameters)),
    }
    whole = {"whole step": list(stages.values()), ACTIVATIONS: [stages["forward"], stages["backward"]]}
    return whole.get(sizes["phase"]) or [stages[sizes["phase"]]]


def case(
    phase: str,
    batch: int,
    length: int,
    dropout: float,
    hidden: int = 768,
    layers: int = 12,
    heads: int = 12,
    memory: bool = False,
    dtype: str = "float32",
) -> Case:
    label = f"{batch}x{length}, dropout {dropout:g}: {phase}"
    sizes = {"phase": phase, "batch": batch, "length": length, "dropout": dropout, "memory": memory}
    return Case(label, dtype, {**sizes, "hidden": hidden, "layers": layers, "heads": heads})


#: Two layers: what eager keeps of twelve does not fit into many machines.
LONG = tuple(
    case(ACTIVATIONS, 1, 2048, dropout, layers=2, memory=True, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for dropout in (0.0, 0.1)
)

SUITE = Suite(
    "training",
    build,
    cases=(
        *(case(phase, 4, 128, dropout) for dropout in (0.0, 0.1) for phase in PHASES),
        *(case("whole step", 1, 2048, dropout, memory=True) for dropout in (0.0, 0.1)),
        case("whole step", 4, 128, 0.1, dtype="bfloat16"),
        *LONG,
    ),
    gpu=(
        *(case("whole step", 64, 128, dropout, memory=True, dtype="bfloat16") for dropout in (0.0, 0.1)),
        case("whole step", 16, 512, 0.1, memory=True, dtype="bfloat16"),
        case("whole step", 32, 128, 0.1, memory=True),
        *LONG,
    ),
    quick=(
        *(case(phase, 2, 9, dropout, 32, 2, 2) for dropout in (0.0, 0.1) for phase in PHASES),
        case("whole step", 1, 40, 0.0, 32, 2, 2, memory=True),
        case(ACTIVATIONS, 1, 40, 0.1, 32, 2, 2, memory=True),
    ),
    training=True,
)
