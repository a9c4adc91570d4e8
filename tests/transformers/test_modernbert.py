"""ModernBERT past its own forward: only where nobody could tell, and to the same bits."""

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

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.rule import assert_as_near, eager_of, float64_of
from bigmodel_kernels.models.tiny import encoder, holes, left_padding, right_padding, token_ids
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import whole_layer
from bigmodel_kernels.transformers.families.modernbert import BigmodelModernBertModel

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

IDS = token_ids()
ONES = torch.ones_like(IDS)


def patched(head: str = "Model", **changes: Any) -> Any:
    model = encoder("ModernBert", head, **changes)
    bk.patch(model)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a model, whether it went past its forward."""
    return calls_of(BigmodelModernBertModel, monkeypatch)


own = partial(own_of, BigmodelModernBertModel)


def assert_same(ours: Any, expected: Any) -> None:
    assert type(ours) is type(expected) and len(ours) == len(expected)
    assert torch.equal(ours[0], expected[0])


CALLS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "a mask of ones": {"attention_mask": ONES},
    "padding on the right": {"attention_mask": right_padding()},
    "padding on the left": {"attention_mask": left_padding().bool()},
    "holes": {"attention_mask": holes().float()},
    "positions": {"position_ids": IDS % 19},
    "positions for all": {"position_ids": torch.arange(IDS.shape[1]).flip(0)[None] + 2},
    "positions and padding": {"position_ids": IDS % 19, "attention_mask": right_padding()},
    "a dictionary": {"return_dict": True, "output_attentions": False},
}
#: Some layers with a window that hides keys, all of them with one that hides none, and biases everywhere.
KINDS: dict[str, dict[str, Any]] = {
    "windows": {"local_attention": 8},
    "wide windows": {"local_attention": 64},
    "biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_models_own_forward(
    kind: str, call: str, dtype: torch.dtype, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched(**KINDS[kind]).to(dtype)
    assert_same(result(model, IDS, **CALLS[call]), own(model, monkeypatch, IDS, **CALLS[call]))
    assert calls == [kind != "biases"]  # one weight with a bias of gate and up is not read as two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_as_near_as_eager(call: str, dtype: torch.dtype, calls: list[bool]) -> None:
    # A query at padding that sees no key has NaN in float64's eager.
    window = 64 if "attention_mask" in CALLS[call] else 8
    model = encoder("ModernBert", "Model", local_attention=window).to(dtype)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    mask = CALLS[call].get("attention_mask", ONES).bool()
    outputs = (result(m, IDS, **CALLS[call])[0] for m in (model, eager, reference))
    assert_as_near(*outputs, where=mask)
    assert calls == [True]


def test_a_window_that_the_config_changes(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of the model's own forward are made of the config."""
    model = patched(local_attention=8)
    before = result(model, IDS)
    model.config.sliding_window = 2
    ours = result(model, IDS)
    assert calls == [True, True] and not torch.equal(ours[0], before[0])
    assert_same(ours, own(model, monkeypatch, IDS))


def test_layers_that_change_their_type(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched(local_attention=8)
    before = result(model, IDS)
    kinds = [layer.attention_type for layer in model.layers]
    for layer, kind in zip(model.layers, reversed(kinds), strict=True):
        layer.attention_type = kind
    ours = result(model, IDS)
    assert kinds != kinds[::-1] and not torch.equal(ours[0], before[0])
    assert_same(ours, own(model, monkeypatch, IDS))


def test_other_shapes(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    for ids in (IDS[:1], IDS[:, :1], IDS.T.contiguous().T, IDS.repeat(5, 1)):
        assert_same(result(model, ids), own(model, monkeypatch, ids))
    assert calls == [True] * 4
    monkeypatch.setattr(whole_layer, "MOST_ROWS", IDS.numel() - 1)
    assert_same(result(model, IDS), own(model, monkeypatch, IDS))
    assert_same(result(model, IDS.int()), own(model, monkeypatch, IDS))
    assert calls[4:] == [False] * 2


@pytest.mark.parametrize("mask", [None, right_padding()], ids=["whole", "padded"])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
def test_heads(head: str, mask: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Question answering has its padding in."""
    model = patched(head)
    ours = result(model, IDS, attention_mask=mask)
    assert calls == [True]
    assert_same(ours, own(model, monkeypatch, IDS, attention_mask=mask))


OTHER_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "a tuple": ((IDS,), {"return_dict": False}),
    "hidden states": ((IDS,), {"output_hidden_states": True}),
    "attentions": ((IDS,), {"output_attentions": True}),
    "a mask of four dimensions": ((IDS, (ONES[:, None, :] * ONES[:, :, None])[:, None] != 0), {}),
    "positions by position": ((IDS, ONES, IDS % 19), {}),
}


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_what_else_a_call_asks_for(call: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (args, options) = patched(), OTHER_CALLS[call]
    assert_same(result(model, *args, **options), own(model, monkeypatch, *args, **options))
    assert calls == [False]


def test_embeddings_of_the_callers(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    states = model.get_input_embeddings()(IDS).detach()
    assert_same(result(model, inputs_embeds=states), own(model, monkeypatch, inputs_embeds=states))
    assert calls == [False]


def twice(*args: Any) -> Any:
    return args[-1] * 2


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook on the words": lambda m: m.embeddings.tok_embeddings.register_forward_hook(twice),
    "a hook on the embeddings": lambda m: m.embeddings.register_forward_hook(twice),
    "a hook on a layer": lambda m: m.layers[1].register_forward_hook(twice),
    "a hook in a layer": lambda m: m.layers[1].mlp.Wo.register_forward_hook(twice),
    "a hook on an activation": lambda m: m.layers[1].mlp.act.register_forward_hook(twice),
    "a hook on the last norm": lambda m: m.final_norm.register_forward_hook(twice),
    "a hook on all modules": lambda m: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if module is m.embeddings else None
    ),
    "another activation": lambda m: setattr(m.layers[0].mlp, "act", torch.nn.ReLU()),
    "another norm": lambda m: setattr(m, "final_norm", torch.nn.Identity()),
    "a forward of its own": lambda m: setattr(m.final_norm, "forward", lambda x: x * 2),
    "a dropout in training": lambda m: setattr(m.embeddings.drop, "p", 0.5) or m.embeddings.drop.train(),
}


@pytest.mark.parametrize("seen_before", [False, True])
@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_part_sees_it_run(
    name: str, seen_before: bool, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched()
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
    assert calls == [False]
    assert before is None or not torch.equal(results[0][0], before[0])


def test_a_rotary_embedding_that_is_watched(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called as it is."""
    model = patched()
    before = result(model, IDS)
    model.rotary_emb.register_forward_hook(lambda module, args, out: (out[1], out[0]))
    ours = result(model, IDS)
    assert_same(ours, own(model, monkeypatch, IDS))
    assert not torch.equal(ours[0], before[0])


@pytest.mark.parametrize("listener", [*LISTENERS, "training"])
def test_who_listens_gets_the_operators(listener: str, calls: list[bool]) -> None:
    model = patched()
    model.train(listener == "training")
    with torch.no_grad(), LISTENERS.get(listener, nullcontext)():
        model(IDS)
    assert not any(calls)


@pytest.mark.parametrize("edit", ["in place", "through data"])
@pytest.mark.parametrize(
    "part",
    [
        *("embeddings.tok_embeddings", "embeddings.norm", "final_norm"),
        "layers.0.attn.Wqkv",
        "layers.1.mlp.Wi",
    ],
)
def test_edited_weights_are_seen(
    part: str, edit: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patched()
    before = result(model, IDS)
    weight = model.get_submodule(part).weight
    with torch.no_grad():
        (weight if edit == "in place" else weight.data).add_(torch.rand_like(weight) / 8)
    ours = result(model, IDS)
    assert_same(ours, own(model, monkeypatch, IDS))
    assert calls == [True, True] and not torch.equal(ours[0], before[0])


def test_wrong_ids_are_told_of() -> None:
    with torch.no_grad(), pytest.raises(IndexError):
        patched()(IDS + 10**6)


def test_copies_and_names(calls: list[bool], tmp_path: Any) -> None:
    model = patched()
    expected = result(model, IDS)
    assert type(model).__name__ == "ModernBertModel"
    assert_same(result(pickle.loads(pickle.dumps(model)), IDS), expected)
    model.save_pretrained(tmp_path)
    assert '"ModernBertModel"' in (tmp_path / "config.json").read_text()
    assert calls == [True, True]
    bk.unpatch(model)
    assert type(model).__module__.startswith("transformers.models.")
