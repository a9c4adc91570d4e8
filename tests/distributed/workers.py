"""What each of two processes does; the results of rank 0 and the errors of both go to a folder."""

from __future__ import annotations

import copy
import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels.models.tiny import (
    bert_config,
    build,
    decoder,
    gpt2_config,
    token_ids,
)
from bigmodel_kernels.transformers import blocks

WORLD = 2
Result = dict[str, Any]


def model(kind: str) -> Any:
    if kind == "bert":
        config = bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return build(BertForSequenceClassification, config).train()
    if kind == "llama":
        return decoder("Llama").train()
    return build(GPT2LMHeadModel, gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()


def batch(kind: str, seed: int) -> dict[str, Tensor]:
    """Four sequences, of which each process takes two; as many labels in each half."""
    torch.manual_seed(seed)
    ids, mask = token_ids(4, 9), torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:], mask[3, 5:] = 0, 0
    labels = torch.randint(0, 2, (4,)) if kind == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def half(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    rank = dist.get_rank()
    return {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(network: Any, kind: str, take: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Result:
    """Three steps: the gradients of the first, and the weights after the last."""
    steps = torch.optim.SGD(network.parameters(), lr=0.01)
    gradients: dict[str, Tensor] = {}
    for seed in range(3):
        network(**take(batch(kind, seed))).loss.backward()
        if seed == 0:
            gradients = {
                n.removeprefix("module."): whole(p.grad)
                for n, p in network.named_parameters()
                if p.grad is not None
            }
        steps.step()
        steps.zero_grad()
    weights = {n.removeprefix("module."): whole(p) for n, p in network.named_parameters()}
    return {"gradients": gradients, "weights": weights}


def alone(kind: str) -> Result:
    return train(model(kind), kind, lambda inputs: inputs)


def ddp(kind: str) -> Result:
    network = model(kind)
    bk.patch(network)
    return {
        "ours": train(nn.parallel.DistributedDataParallel(network), kind, half),
        "expected": alone(kind),
    }


def fsdp(kind: str) -> Result:
    """Each layer's parameters are gathered for its call, and the fused calls read them as plain tensors."""
    from torch.distributed.fsdp import fully_shard

    network = model(kind)
    bk.patch(network)
    layers = {
        "bert": lambda: network.bert.encoder.layer,
        "gpt2": lambda: network.transformer.h,
        "llama": lambda: network.model.layers,
    }[kind]()
    names = ("post_norm_layer", "pre_norm_layer", "gated_layer")
    kept = {name: getattr(blocks, name) for name in names}
    seen: list[tuple[int, bool]] = []

    def watched(run: Any) -> Any:
        def layer(x: Tensor, parts: Any, *args: Any) -> Tensor:
            held = (*getattr(parts, "qkv", ()), parts.attention_out, parts.ffn_norm)
            read = all(isinstance(part, (blocks.Affine, blocks.Scale)) for part in held)
            fused = parts.ffn is not None and read
            seen.append((x.shape[:-1].numel(), fused))
            return run(x, parts, *args)

        return layer

    for layer in layers:
        fully_shard(layer)
    fully_shard(network)
    for name in names:
        setattr(blocks, name, watched(kept[name]))
    try:
        ours = train(network, kind, half)
    finally:
        for name in names:
            setattr(blocks, name, kept[name])
    before = [type(layer).__name__ for layer in layers]
    report = bk.explain(network)
    bk.unpatch(network)
    return {
        "ours": ours,
        "expected": alone(kind),
        "seen": seen,
        "classes": (before[0], type(layers[0]).__name__),
        "patched": len(report.patched),
        "still trains": bool(torch.isfinite(network(**half(batch(kind, 0))).loss)),
    }


def tensor_parallel(kind: str) -> Result:
    """Projections split by column, then by row: called as modules, attention on each process's heads."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    network = model(kind)
    bk.patch(network)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in network.bert.encoder.layer:
        parallelize_module(
            layer,
            mesh,
            {
                **{f"attention.self.{name}": ColwiseParallel() for name in ("query", "key", "value")},
                "attention.output.dense": RowwiseParallel(),
                "intermediate.dense": ColwiseParallel(),
                "output.dense": RowwiseParallel(),
            },
        )
    shapes: list[tuple[int, ...]] = []
    from bigmodel_kernels.transformers import blocks

    run = blocks.attention

    def watched(terms: blocks.Terms, *args: Any) -> Tensor:
        shapes.append(tuple(terms.query.shape))
        return run(terms, *args)

    blocks.attention = watched
    try:
        ours = train(network, kind, lambda inputs: inputs)
    finally:
        blocks.attention = run
    later = [row.reason for row in bk.explain(network).rows if row.name.endswith("attention.self")]
    bk.unpatch(network)
    return {
        "ours": ours,
        "expected": alone(kind),
        "shapes": shapes,
        "now": later,
        "before": [row.reason for row in bk.explain(network).left_alone],
    }


def attention_shards(_: str) -> Result:
    """The operator on DTensors, forward and backward, against the same without them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from bigmodel_kernels.distributed import register_sharding_rules

    register_sharding_rules()
    mesh = init_device_mesh("cpu", (WORLD,))
    result: Result = {}
    torch.manual_seed(4)
    query, key, value = (
        torch.randn(2, heads, 7, 8, requires_grad=True, dtype=torch.float64) for heads in (4, 2, 2)
    )
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, 5:] = False
    biases = {
        "one for all": torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True),
        "each its own": torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True),
    }
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    for split in ("batch", "heads"):
        for name, bias in biases.items():
            leaves = (query, key, value, bias, sinks)
            out = torch.ops.bigmodel.attention(
                query, key, value, padding, bias, None, None, None, None, sinks, softmax_scale=0.3
            )[0]
            expected = [out, *torch.autograd.grad((out * grad).sum(), leaves)]
            row = Shard(0) if split == "batch" else Shard(1)

            def spread(tensor: Tensor, placement: Any) -> Any:
                return distribute_tensor(tensor.detach(), mesh, [placement]).requires_grad_(
                    tensor.is_floating_point()
                )

            shared = Replicate() if split == "batch" and name == "one for all" else row
            spread_leaves = [spread(t, row) for t in (query, key, value)]
            spread_leaves.append(spread(bias, shared))
            spread_leaves.append(spread(sinks, Replicate() if split == "batch" else Shard(0)))
            mask = spread(padding, Shard(0) if split == "batch" else Replicate())
            q, k, v, b, s = spread_leaves
            out = torch.ops.bigmodel.attention(
                q, k, v, mask, b, None, None, None, None, s, softmax_scale=0.3
            )[0]
            placed = str(out.placements)
            (out * distribute_tensor(grad, mesh, [row])).sum().full_tensor().backward()
            got = [out, *(leaf.grad for leaf in spread_leaves)]
            errors = [float((whole(a) - e).abs().max()) for a, e in zip(got, expected, strict=True)]
            result[f"{split}, {name}"] = {"placed": placed, "errors": errors}
    return result


SCENARIOS: dict[str, Callable[[], Result]] = {
    "ddp bert": lambda: ddp("bert"),
    "ddp gpt2": lambda: ddp("gpt2"),
    "ddp llama": lambda: ddp("llama"),
    "fsdp bert": lambda: fsdp("bert"),
    "fsdp gpt2": lambda: fsdp("gpt2"),
    "fsdp llama": lambda: fsdp("llama"),
    "tensor parallel bert": lambda: tensor_parallel("bert"),
    "attention shards": lambda: attention_shards(""),
}


def main(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=90)
    )
    for name, scenario in SCENARIOS.items():
        try:
            result: Any = copy.deepcopy(scenario())
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, Path(folder) / f"{name}.{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
