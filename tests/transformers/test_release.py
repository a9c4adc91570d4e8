"""Weights given up for their packed copies: the same bits, half the memory, and everything else as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import (
    bert_config,
    build,
    decoder,
    gpt2_config,
    token_ids,
)
from bigmodel_kernels.ops.linear import native
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.ops.packed_weight import PackedWeight

if unavailable(torch.float32) is not None or backends.forced() not in (None, "native"):
    pytest.skip("the compiled library does not run", allow_module_level=True)

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: build(BertModel, bert_config()),
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config()),
    "llama": lambda: decoder("Llama"),
    "qwen2": lambda: decoder("Qwen2"),
}
IDS = token_ids()


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(model(IDS).values()))  # type: ignore[no-any-return]


def released(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, torch.Tensor]:
    """A model without its large weights, and its result before."""
    model = MODELS[kind]().to(dtype)
    bk.patch(model)
    expected = run(model)
    bk.release_weights(model)
    return model, expected


def packed_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, PackedWeight)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bits_and_state(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind]().to(dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    bk.patch(model)
    expected = run(model)
    copies = native.packed_bytes(model)
    matrices = {
        name
        for name, p in model.named_parameters()
        if p.dim() == 2
        and "embed" not in name
        and "wte" not in name
        and "wpe" not in name
        and "head" not in name
    }
    freed = bk.release_weights(model)
    assert packed_names(model) >= matrices - {"pooler.dense.weight"}
    assert freed == sum(model.get_parameter(n).numel() * dtype.itemsize for n in packed_names(model))
    assert torch.equal(run(model), expected) and native.packed_bytes(model) == copies
    found = model.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    assert not any(isinstance(value, PackedWeight) for value in found.values())
    assert bk.restore_weights(model) == len(matrices | packed_names(model)) or not packed_names(model)
    assert not packed_names(model) and torch.equal(run(model), expected)
    assert all(torch.equal(p, state[name]) and p.requires_grad for name, p in model.named_parameters())


def test_copies_and_files(tmp_path: Path) -> None:
    model, expected = released("bert")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin), expected)
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    bk.patch(loaded)
    assert torch.equal(run(loaded), expected)
    assert type(pickle.loads(pickle.dumps(model)).encoder.layer[0].output.dense.weight) is torch.nn.Parameter
    shared = copy.deepcopy(model)
    ours, theirs = (m.encoder.layer[0].output.dense.weight for m in (model, shared))
    assert ours.packed is theirs.packed


def test_loading_other_weights_is_refused() -> None:
    model, expected = released("bert")
    other = build(BertModel, bert_config())
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="released weight"):
        model.load_state_dict(other.state_dict())
    bk.restore_weights(model)
    model.load_state_dict(other.state_dict())
    bk.patch(other)
    assert torch.equal(run(model), run(other)) and not torch.equal(run(model), expected)


def test_in_place_operations_say_what_to_call() -> None:
    model, _ = released("bert")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"released weight \(72, 48\).*restore_weights"):
        model.encoder.layer[0].intermediate.dense.weight.mul_(2)


def test_unpatch_and_other_types_give_the_weights_back() -> None:
    model, _ = released("bert")
    bk.unpatch(model)
    assert not packed_names(model) and type(model) is BertModel
    model, _ = released("gpt2")
    lower = model.to(torch.bfloat16)
    assert not packed_names(lower) and run(lower).dtype == torch.bfloat16


def test_gradients_of_what_is_left() -> None:
    model = build(BertForSequenceClassification, bert_config())
    bk.patch(model)
    run(model)
    bk.release_weights(model)
    plain = copy.deepcopy(model)
    bk.restore_weights(plain)
    for m in (model, plain):
        m(IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if isinstance(ours, PackedWeight):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend: str) -> None:
    model, expected = released("bert")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled), expected)


def test_other_backends_read_the_weight_itself() -> None:
    model, expected = released("gpt2")
    with backends.use("reference"):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


def test_shared_parameters_stay() -> None:
    model, _ = released("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" not in packed_names(model) and packed_names(model)


def test_nothing_packed_is_an_error() -> None:
    model = build(BertModel, bert_config())
    bk.patch(model)
    native.clear()
    with pytest.raises(RuntimeError, match="run it once on the CPU first"):
        bk.release_weights(model)
    assert not packed_names(model)


def test_a_weight_edited_since_it_was_packed_stays() -> None:
    model = build(BertModel, bert_config())
    bk.patch(model)
    run(model)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.data.mul_(2)
    bk.release_weights(model)
    assert "encoder.layer.0.output.dense.weight" not in packed_names(model)
    assert "encoder.layer.1.output.dense.weight" in packed_names(model)


@pytest.mark.parametrize("isa", torch.ops.bigmodel.cpu_isas().split(", "))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_unpacked_is_what_was_packed(isa: str, dtype: torch.dtype, layout: str) -> None:
    before = torch.ops.bigmodel.cpu_isa()
    torch.ops.bigmodel.cpu_set_isa(isa)
    try:
        weights = [torch.randn(n, 37).to(dtype) for n in (5, 70, 33)]
        if layout == "conv1d":
            weights = [w.T.contiguous() for w in weights]
        packed = native.packed(weights, layout)
        held = native.releasable(weights)
        assert [w is given for (w, _), given in zip(held, weights, strict=True)] == [True] * 3
        for given, copied in held:
            assert copied.packed is packed and torch.equal(copied.unpacked(), given)
            assert torch.equal(copied + 0, given)  # any operation
    finally:
        torch.ops.bigmodel.cpu_set_isa(before)
        native.clear()
