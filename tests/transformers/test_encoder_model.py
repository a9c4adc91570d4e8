"""BERT and its kin past their own forward: only where nobody could tell, and to the same bits."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from past_forward import calls_of, own_of, result
from test_token_model import LISTENERS
from transformers import BertModel, CamembertModel, RobertaModel, XLMRobertaModel

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import bert_config, build, right_padding, token_ids
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import encoder_model, whole_layer

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

IDS = token_ids()
ONES = torch.ones_like(IDS)
KINDS: dict[str, type[Any]] = {
    "bert": BertModel,
    "roberta": RobertaModel,
    "xlm-roberta": XLMRobertaModel,
    "camembert": CamembertModel,
}


def patched(cls: type[Any], **changes: Any) -> Any:
    config = cls.config_class.from_dict(bert_config(**changes).to_dict())
    model = build(cls, config)
    bk.patch(model)
    return model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return patched(KINDS[request.param], pad_token_id=0, hidden_dropout_prob=0.1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a model, whether it went past its forward."""
    return calls_of(encoder_model.Model, monkeypatch)


own = partial(own_of, encoder_model.Model)


def assert_same(ours: Any, expected: Any) -> None:
    assert type(ours) is type(expected) and len(ours) == len(expected)
    if not isinstance(ours, tuple):
        assert list(ours.keys()) == list(expected.keys())
        ours, expected = ours.to_tuple(), expected.to_tuple()
    for one, other in zip(ours, expected, strict=True):
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (one, other)), strict=True):
            assert torch.equal(a, b)


CALLS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "a mask of ones": {"attention_mask": ONES},
    "a mask of truths": {"attention_mask": ONES.bool()},
    "a mask of floats": {"attention_mask": ONES.float()},
    "types": {"token_type_ids": IDS % 2},
    "positions": {"position_ids": IDS % 19},
    "positions for all": {"position_ids": torch.arange(IDS.shape[1]).flip(0)[None] + 2},
    "all of them": {"attention_mask": ONES, "token_type_ids": IDS % 2, "position_ids": IDS % 19},
    "a dictionary": {"return_dict": True, "use_cache": True, "output_attentions": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_of_the_models_own_forward(
    call: str, dtype: torch.dtype, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(dtype)
    assert_same(result(model, IDS, **CALLS[call]), own(model, monkeypatch, IDS, **CALLS[call]))
    assert calls == [True]


def test_other_shapes(model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for ids in (IDS[:1], IDS[:, :1], IDS.T.contiguous().T, IDS.repeat(5, 1)):
        assert_same(result(model, ids), own(model, monkeypatch, ids))
        assert_same(result(model, ids, torch.ones_like(ids)), own(model, monkeypatch, ids))
    assert calls == [True] * 8
    monkeypatch.setattr(whole_layer, "MOST_ROWS", IDS.numel() - 1)
    assert_same(result(model, IDS), own(model, monkeypatch, IDS))
    assert_same(result(model, IDS.int()), own(model, monkeypatch, IDS))
    assert calls[8:] == [False] * 2


@pytest.mark.parametrize("cls", KINDS.values())
def test_without_a_pooler(cls: type[Any], calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = cls(cls.config_class.from_dict(bert_config().to_dict()), add_pooling_layer=False).eval()
    bk.patch(model)
    ours = result(model, IDS)
    assert calls == [True] and "pooler_output" not in ours
    assert_same(ours, own(model, monkeypatch, IDS))


OTHER_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "padding": ((IDS, right_padding()), {}),
    "a tuple": ((IDS,), {"return_dict": False}),
    "hidden states": ((IDS,), {"output_hidden_states": True}),
    "attentions": ((IDS,), {"output_attentions": True}),
    "a mask of three dimensions": ((IDS, ONES[:, None, :] * ONES[:, :, None]), {}),
    "types by position": ((IDS, ONES, IDS % 2), {}),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_what_else_a_call_asks_for(
    call: str, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    args, options = OTHER_CALLS[call]
    if call == "a mask of three dimensions":
        args = (IDS, (args[1][:, None] != 0))  # what transformers takes has four
    assert_same(result(model, *args, **options), own(model, monkeypatch, *args, **options))
    assert calls == [False]


def test_embeddings_of_the_callers(model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    states = model.get_input_embeddings()(IDS).detach()
    assert_same(result(model, inputs_embeds=states), own(model, monkeypatch, inputs_embeds=states))
    assert calls == [False]


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def twice(*args: Any) -> Any:
    return args[-1] * 2


def of_result(module: Any, args: Any, out: Any) -> Any:
    out["last_hidden_state"] = out["last_hidden_state"] * 2
    return out


def drop(m: Any) -> None:
    m.embeddings.dropout.p = 0.5
    m.embeddings.dropout.train()


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook on the words": lambda m: m.embeddings.word_embeddings.register_forward_hook(twice),
    "a hook on the embeddings": lambda m: m.embeddings.register_forward_hook(twice),
    "a hook on the encoder": lambda m: m.encoder.register_forward_hook(of_result),
    "a hook in the encoder": lambda m: m.encoder.layer[1].output.dense.register_forward_hook(twice),
    "a hook on the pooler": lambda m: m.pooler.register_forward_hook(twice),
    "a hook in the pooler": lambda m: m.pooler.activation.register_forward_hook(twice),
    "a hook on the model": lambda m: m.register_forward_hook(of_result),
    "a hook on all modules": lambda m: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if module is m.embeddings else None
    ),
    "another activation": lambda m: setattr(m.pooler, "activation", torch.nn.ReLU()),
    "another pooler": lambda m: setattr(m, "pooler", Twice()),
    "another norm": lambda m: setattr(m.embeddings, "LayerNorm", Twice()),
    "a forward of its own": lambda m: setattr(m.pooler, "forward", lambda x: x[:, 0] * 2),
    "a dropout in training": drop,
    "a layer more": lambda m: m.encoder.layer.append(m.encoder.layer[0]),
}


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_part_sees_it_run(
    name: str, seen_before: bool, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result(model, IDS) if seen_before else None
    calls.clear()
    handle = WATCHED[name](model)
    results = []
    for of in (result, lambda *args: own(model, monkeypatch, IDS)):
        torch.manual_seed(0)
        results.append(of(model, IDS))
    if hasattr(handle, "remove"):
        handle.remove()
    assert_same(*results)
    assert calls == [name == "a layer more"]
    assert before is None or not all(map(torch.equal, results[0].to_tuple(), before.to_tuple()))


@pytest.mark.parametrize("listener", [*LISTENERS, "training"])
def test_who_listens_gets_the_operators(listener: str, model: Any, calls: list[bool]) -> None:
    model.train(listener == "training")
    with torch.no_grad(), LISTENERS.get(listener, nullcontext)():
        model(IDS)
    assert not any(calls)


@pytest.mark.parametrize("name", ["output_hidden_states", "is_decoder"])
def test_what_the_config_asks_for(
    name: str, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    result(model, IDS)
    monkeypatch.setattr(model.config, name, True)
    ours = result(model, IDS, use_cache=False)
    assert calls == [True, False]
    assert_same(ours, own(model, monkeypatch, IDS, use_cache=False))


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "part",
    ["embeddings.word_embeddings", "embeddings.LayerNorm", "encoder.layer.0.output.dense", "pooler.dense"],
)
def test_edited_weights_are_seen(
    part: str, edit: str, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = result(model, IDS)
    with torch.no_grad():
        EDITS[edit](model.get_submodule(part).weight)
    ours = result(model, IDS)
    assert_same(ours, own(model, monkeypatch, IDS))
    assert calls == [True, True] and not torch.equal(ours.pooler_output, before.pooler_output)


def test_buffers_are_read_at_each_call(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(BertModel)
    before = result(model, IDS)
    model.embeddings.token_type_ids.fill_(1)
    ours = result(model, IDS)
    assert_same(ours, own(model, monkeypatch, IDS))
    assert calls == [True, True] and not torch.equal(ours[0], before[0])


def test_wrong_ids_are_told_of(model: Any) -> None:
    with torch.no_grad():
        for wrong in ({"token_type_ids": IDS + 7}, {"position_ids": IDS + 10**6}):
            with pytest.raises((IndexError, RuntimeError), match=r"out of|allowed"):
                model(IDS, **wrong)
        with pytest.raises(IndexError):
            model(IDS + 10**6)


def test_a_model_of_another_type_or_left_alone(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    double = patched(BertModel).double()
    assert_same(result(double, IDS), own(double, monkeypatch, IDS))
    mixed = patched(BertModel)
    mixed.encoder.layer[0].output.dense.double()
    with torch.no_grad(), pytest.raises(RuntimeError):
        mixed(IDS)
    assert not any(calls)
    model = build(BertModel, bert_config(hidden_act="mish"))
    assert next(row for row in bk.patch(model).rows if row.name == "").status == "left alone"


def test_copies_and_names(model: Any, calls: list[bool], tmp_path: Any) -> None:
    expected, name = result(model, IDS), type(model).__name__
    assert not name.startswith("Bigmodel")
    assert_same(result(pickle.loads(pickle.dumps(model)), IDS), expected)
    model.save_pretrained(tmp_path)
    assert f'"{name}"' in (tmp_path / "config.json").read_text()
    assert calls == [True, True]
    bk.unpatch(model)
    assert type(model).__module__.startswith("transformers.models.")


def test_a_model_that_is_not_as_known_is_looked_at_once(
    calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a call would gather in vain takes as long as a short text."""
    model, looked = patched(BertModel), 0
    gather = encoder_model._pooler

    def counted(*args: Any) -> Any:
        nonlocal looked
        looked += 1
        return gather(*args)

    monkeypatch.setattr(encoder_model, "_pooler", counted)
    plain = model.encoder.layer[0].output.dense
    model.encoder.layer[0].output.dense = type("Other", (torch.nn.Linear,), {})(72, 48)
    for _ in range(3):
        result(model, IDS)
    assert calls == [False] * 3 and looked == 1
    model.encoder.layer[0].output.dense = plain
    for _ in range(3):
        result(model, IDS)
    assert calls[3:] == [True] * 3 and looked == 2
    model.pooler.dense.double()  # the very same parameters, of another type
    for _ in range(2):
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(IDS)
    assert not any(calls[6:]) and looked == 3
    model.pooler.dense.float()
    result(model, IDS)
    assert calls[-1]
