"""Encoders that loop over their layers themselves, without padding: results of eager, and when they pack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import assert_as_near, eager_of, float64_of
from bigmodel_kernels.models.tiny import encoder, holes, left_padding, right_padding, seq2seq, token_ids
from bigmodel_kernels.transformers import attention_interface, whole_layer

#: With norms behind, with norms before and one at the end, and with windows and rotary embedding.
KINDS = ["Bart", "MBart", "ModernBert"]


def model_of(prefix: str, **changes: Any) -> Any:
    if prefix == "ModernBert":
        return encoder(prefix, "Model", **changes)
    return seq2seq(prefix, "Model", **changes).get_encoder()


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each attention without padding has been given."""
    found: list[int] = []
    run, run_all = attention_interface.packed_attention, whole_layer.encoded

    def counted(query: torch.Tensor, *args: Any) -> torch.Tensor:
        found.append(query.shape[2])
        return run(query, *args)

    def counted_all(x: Any, layers: Any, scale: Any, padding: Any, cu_seqlens: Any, *args: Any) -> Any:
        out = run_all(x, layers, scale, padding, cu_seqlens, *args)
        if out is not None and cu_seqlens is not None:
            found.extend([len(x)] * len(layers))
        return out

    monkeypatch.setattr(attention_interface, "packed_attention", counted)
    monkeypatch.setattr(whole_layer, "encoded", counted_all)
    return found


def one_token_each(batch: int = 3, length: int = 17) -> torch.Tensor:
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[:, 0] = 1
    return mask


@pytest.mark.parametrize("padding", [right_padding, left_padding, holes, one_token_each])
@pytest.mark.parametrize("prefix", KINDS)
def test_padded_batches(prefix: str, padding: Any, lengths: list[int]) -> None:
    ids, mask = token_ids(), padding()
    model = model_of(prefix)
    if prefix == "ModernBert":  # no query of theirs is without a key, for which float64 has NaN
        model = model_of(prefix, local_attention=40)
    eager, reference = eager_of(model), float64_of(model)
    report = bk.patch(model)
    assert report.rows[0].reason == "runs its layers without padding"
    with torch.no_grad():
        out, *expected = (m(ids, attention_mask=mask).last_hidden_state for m in (model, eager, reference))
    assert_as_near(out, *expected, where=mask.bool())
    packs = padding is not left_padding and (prefix, padding) != ("ModernBert", holes)
    assert lengths == ([int(mask.sum())] * len(model.layers) if packs else [])
    assert bool((out[mask == 0] == 0).all()) == packs


def test_windows_of_packed_tokens(lengths: list[int]) -> None:
    model, ids = model_of("ModernBert"), token_ids()
    mask = right_padding()
    bk.patch(model)
    with torch.no_grad():
        out = model(ids, attention_mask=mask).last_hidden_state
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = model(ids[row : row + 1, :length]).last_hidden_state
            torch.testing.assert_close(out[row, :length], alone[0], atol=1e-5, rtol=1e-5)
    assert len(lengths) == 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prefix", KINDS)
def test_gradients(prefix: str, checkpointing: bool, lengths: list[int]) -> None:
    model = model_of(prefix).train()
    inputs = {"input_ids": token_ids(), "attention_mask": right_padding()}
    plain = copy.deepcopy(model)
    bk.patch(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for network in (model, plain):
        out = network(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert len(lengths) == len(model.layers) * (1 + checkpointing)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("prefix", KINDS)
def test_a_layer_that_runs_by_its_own_code(prefix: str, lengths: list[int]) -> None:
    model = model_of(prefix)
    plain = copy.deepcopy(model)
    bk.patch(model)
    for network in (model, plain):
        layer = network.layers[1]
        attention = layer.attn if prefix == "ModernBert" else layer.self_attn
        cls = type(attention)
        attention.__class__ = type(
            "Same", (cls,), {"forward": lambda self, *a, _cls=cls, **k: _cls.forward(self, *a, **k)}
        )
    ids, mask = token_ids(), right_padding()
    with torch.no_grad():
        outputs = [m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, plain)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert len(lengths) == len(model.layers) - 1


@pytest.mark.parametrize("prefix", KINDS)
def test_what_is_asked_for_beside_the_result_keeps_the_padding(prefix: str, lengths: list[int]) -> None:
    model = model_of(prefix)
    plain = copy.deepcopy(model)
    bk.patch(model)
    given = {"input_ids": token_ids(), "attention_mask": right_padding()}
    with torch.no_grad():
        ours, theirs = (m(**given, output_hidden_states=True).hidden_states for m in (model, plain))
        assert not lengths
        real = given["attention_mask"].bool()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=1e-5)
        (states,) = model(**given, return_dict=False)
        torch.testing.assert_close(states[real], ours[-1][real], atol=1e-5, rtol=1e-5)
    assert lengths


def test_layers_that_are_skipped(lengths: list[int]) -> None:
    model = model_of("Bart", encoder_layerdrop=1.0).train()
    plain = copy.deepcopy(model)
    bk.patch(model)
    outputs = [m(token_ids(2), attention_mask=right_padding(2)).last_hidden_state for m in (model, plain)]
    assert outputs[0].shape == outputs[1].shape and not lengths


def test_question_answering_keeps_the_padding(lengths: list[int]) -> None:
    model = encoder("ModernBert", "ForQuestionAnswering")
    plain = copy.deepcopy(model)
    bk.patch(model)
    given = {"input_ids": token_ids(), "attention_mask": right_padding()}
    with torch.no_grad():
        ours, theirs = (m(**given).start_logits for m in (model, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not lengths


def test_a_model_that_packs_keeps_its_name(tmp_path: Any) -> None:
    model = model_of("ModernBert")
    bk.patch(model)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["ModernBertModel"]
    assert bk.unpatch(model) and type(model).__module__.startswith("transformers.")
