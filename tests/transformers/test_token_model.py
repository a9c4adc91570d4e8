"""A token past the forwards of model and language model: only where nobody could tell, to the same bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from decoder_checks import CACHE
from test_layer_stack import IDS, KINDS, PAST
from test_whole_layer import Counting
from transformers import DynamicCache, GPT2LMHeadModel
from transformers.utils import logging

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import build, gpt2_config, left_padding
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import token_model

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

TOKEN = IDS[:, 9:10]
ONES = torch.ones(len(IDS), 10, dtype=torch.int64)


def patched(kind: str) -> Any:
    model = KINDS[kind]()
    bk.patch(model)
    return model


@pytest.fixture(params=PAST)
def model(request: pytest.FixtureRequest) -> Any:
    return patched(request.param)


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a model for a token, whether it went past its forward."""
    seen: list[bool] = []
    run = token_model.Model.states

    def states(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        found = run(self, input_ids, *args, **kwargs)
        if input_ids is not None and input_ids.shape[-1] == 1:
            seen.append(found is not None)
        return found

    monkeypatch.setattr(token_model.Model, "states", states)
    return seen


def prefilled(model: Any) -> Any:
    cache = DynamicCache()
    with torch.inference_mode():
        model(IDS[:, :9], **{CACHE: cache})
    return cache


def after(model: Any, ids: torch.Tensor = TOKEN, **options: Any) -> Any:
    """The output for a token after a prompt."""
    cache = prefilled(model)
    with torch.inference_mode():
        return model(ids, **{CACHE: cache}, **options)


def own(model: Any, monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor = TOKEN, **options: Any) -> Any:
    """The same by the forwards of model and language model."""
    with monkeypatch.context() as patch:
        patch.setattr(token_model.Model, "states", lambda *args, **kwargs: None)
        return after(model, ids, **options)


def assert_same(ours: Any, expected: Any) -> None:
    assert type(ours) is type(expected)
    if isinstance(ours, tuple):
        assert torch.equal(ours[0], expected[0]) and len(ours) == len(expected)
        return
    assert list(ours.keys()) == list(expected.keys())
    assert torch.equal(ours[0], expected[0])
    for layer, other in zip(ours[CACHE].layers, expected[CACHE].layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


CALLS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "a mask of ones": {"attention_mask": ONES},
    "a mask with padding": {"attention_mask": left_padding()[:, :10]},
    "a boolean mask": {"attention_mask": left_padding()[:, :10].bool()},
    "positions": {"position_ids": torch.tensor([[3], [7], [1]])},
    "a position for all": {"position_ids": torch.tensor([[5]])},
    "a cache that is used": {"use_cache": True},
    "the last logits": {"logits_to_keep": 1},
    "a dictionary": {"return_dict": True},
    "no attentions": {"output_attentions": False, "output_hidden_states": None},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_of_the_models_own_forward(
    call: str, dtype: torch.dtype, model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(dtype)
    assert_same(after(model, **CALLS[call]), own(model, monkeypatch, **CALLS[call]))
    assert tokens == [True]
    inner = {name: value for name, value in CALLS[call].items() if name != "logits_to_keep"}
    assert_same(after(model.base_model, **inner), own(model.base_model, monkeypatch, **inner))
    assert tokens == [True, True]


OTHER_CALLS: dict[str, dict[str, Any]] = {
    "a tuple": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True},
    "no cache behind it": {"use_cache": False},
    "a mask of four dimensions": {"attention_mask": ONES[:, None, None].bool()},
    "labels": {"labels": TOKEN},
    "chosen logits": {"logits_to_keep": torch.tensor([0])},
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_what_else_a_call_asks_for(
    call: str, model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = after(model, **OTHER_CALLS[call])
    # What the language model refuses its model may still take: the product is then the language model's own.
    assert not any(tokens) or call in ("a tuple", "labels", "chosen logits")
    expected = own(model, monkeypatch, **OTHER_CALLS[call])
    if isinstance(ours, tuple):
        assert_same(ours, expected)
    else:
        assert list(ours.keys()) == list(expected.keys()) and torch.equal(ours.logits, expected.logits)


def embedding(model: Any) -> Any:
    return model.get_input_embeddings()


def norm(model: Any) -> Any:
    return getattr(model.base_model, "ln_f", getattr(model.base_model, "norm", None))


def twice(*args: Any) -> Any:
    return args[-1] * 2


def of_result(module: Any, args: Any, out: Any) -> Any:
    name = "logits" if "logits" in out else "last_hidden_state"
    out[name] = out[name] * 2
    return out


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook on the embedding": lambda m: embedding(m).register_forward_hook(twice),
    "a hook on the last norm": lambda m: norm(m).register_forward_hook(twice),
    "a hook on the head": lambda m: m.lm_head.register_forward_hook(twice),
    "a hook on the model": lambda m: m.base_model.register_forward_hook(of_result),
    "a hook on the language model": lambda m: m.register_forward_hook(of_result),
    "a hook on all modules": lambda m: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if module is norm(m) else None
    ),
    "another norm": lambda m: setattr(
        m.base_model, "norm" if hasattr(m.base_model, "norm") else "ln_f", Twice()
    ),
    "another head": lambda m: setattr(m, "lm_head", torch.nn.Linear(48, 101)),
    "another embedding": lambda m: m.set_input_embeddings(Shifted(101, 48)),
    "a forward of its own": lambda m: setattr(norm(m), "forward", lambda x: x * 2),
}


class Twice(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Shifted(torch.nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_part_sees_it_run(
    name: str, seen_before: bool, model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = after(model).logits if seen_before else None
    tokens.clear()
    handle = WATCHED[name](model)
    ours = after(model).logits
    expected = own(model, monkeypatch).logits
    if hasattr(handle, "remove"):
        handle.remove()
    assert torch.equal(ours, expected)
    # The language model's own forward may be around a model that goes past its own.
    assert not any(tokens) or name in ("a hook on the head", "another head", "a hook on the language model")
    assert before is None or not torch.equal(ours, before)


LISTENERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another backend": lambda: backends.use("reference"),
    "a mode": Counting,
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_who_listens_gets_the_operators(listener: str, model: Any, tokens: list[bool]) -> None:
    cache = prefilled(model)
    with torch.no_grad(), LISTENERS[listener]():
        model(TOKEN, **{CACHE: copy.deepcopy(cache)})
    assert not any(tokens)
    model.train()
    with torch.no_grad():
        model(TOKEN, **{CACHE: cache})
    assert not any(tokens)


CONFIGS: dict[str, Any] = {
    "output_hidden_states": True,
    "use_cache": False,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_config_asks_for(
    name: str, model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    after(model)
    tokens.clear()
    monkeypatch.setattr(model.config, name, CONFIGS[name])
    ours, expected = after(model), own(model, monkeypatch)
    assert not any(tokens) and len(ours) == len(expected) and torch.equal(ours[0], expected[0])


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("part", [embedding, norm, lambda m: m.lm_head], ids=["embedding", "norm", "head"])
def test_edited_weights_are_seen(
    part: Callable[[Any], Any], edit: str, model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = after(model).logits
    with torch.no_grad():
        EDITS[edit](part(model).weight)
    ours = after(model).logits
    assert torch.equal(ours, own(model, monkeypatch).logits) and not torch.equal(ours, before)
    assert tokens == [True, True]


def test_wrong_ids_and_positions_are_told_of(model: Any) -> None:
    cache = prefilled(model)
    with torch.inference_mode():
        with pytest.raises(IndexError):
            model(TOKEN + 10**6, **{CACHE: cache})
        if hasattr(model.base_model, "wpe"):
            with pytest.raises(IndexError):
                model(TOKEN, **{CACHE: cache}, position_ids=torch.tensor([[10**6]]))
    assert all(layer.keys.shape[2] == 9 for layer in cache.layers)


def test_gpt2_warns_of_padding_that_no_mask_tells_of(
    tokens: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(GPT2LMHeadModel, gpt2_config(pad_token_id=int(TOKEN[0, 0])))
    bk.patch(model)
    warned: list[str] = []
    monkeypatch.setattr(logging.get_logger("transformers.modeling_utils"), "warning_once", warned.append)
    after(model, TOKEN)
    assert any("attention_mask" in text for text in warned) and tokens == [True]
    warned.clear()
    after(model, TOKEN, attention_mask=ONES)
    assert not warned


def test_other_ids(model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    across = IDS[:, 9:11][:, ::2]
    assert not across.is_contiguous()
    assert torch.equal(after(model, across).logits, own(model, monkeypatch).logits) and tokens == [True]
    tokens.clear()
    assert torch.equal(after(model, TOKEN.int()).logits, own(model, monkeypatch).logits)
    assert not any(tokens)


def test_a_model_without_logits_in_training_runs_tokens_too(
    model: Any, tokens: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Of the two forms of a language model each goes over into the other, and back."""
    form, expected = type(model), after(model).logits
    report = bk.patch(model, fused_loss=True)
    fused = type(model)
    assert fused is not form and [row.ops for row in report.rows if row.name == ""] == [
        ("linear_cross_entropy",)
    ]
    assert torch.equal(after(model).logits, expected) and tokens == [True, True]
    bk.patch(model)
    assert type(model) is fused  # until it is unpatched
    assert torch.equal(after(pickle.loads(pickle.dumps(model))).logits, expected)
    model.save_pretrained(tmp_path)
    assert f'"{form.__name__}"' in (tmp_path / "config.json").read_text()
    bk.unpatch(model)
    assert type(model).__module__.startswith("transformers.models.")
    bk.patch(model)
    assert type(model) is form
    with bk.patched(model, fused_loss=True):
        assert type(model) is fused
    assert type(model) is form
