"""All layers of a decoder behind an encoder in one call: only where it may, and then nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_checks import CACHE
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import SEQ2SEQ, inputs_of, left_padding, right_padding, seq2seq, token_ids
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import growing_cache, layer_stack, whole_layer

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

#: One of each form and order, and Whisper, whose keys have no bias.
KINDS = ("T5", "UMT5", "Bart", "MBart", "Whisper")


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    model = seq2seq(request.param)
    bk.patch(model)
    return model


@pytest.fixture
def together(watch: Any) -> list[int]:
    """How many layers each call of all of them was for."""
    seen: list[int] = []
    watch("tokens", lambda x, layers: seen.append(len(layers)))
    return seen


def decoder_of(model: Any) -> Any:
    return getattr(model, "model", model).decoder


def layers_of(model: Any) -> Any:
    decoder = decoder_of(model)
    return decoder.block if hasattr(decoder, "block") else decoder.layers


def cache() -> EncoderDecoderCache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def encoded(model: Any, padding: Callable[[], torch.Tensor] | None = None) -> dict[str, Any]:
    """What a step of the decoder is given of the encoder, the same each time."""
    torch.manual_seed(0)
    given = {k: v for k, v in inputs_of(model, padding or right_padding).items() if not k.startswith("dec")}
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        states = model.get_encoder()(**given)
    audio = "Whisper" in type(model).__name__  # whose forward takes no mask
    return {"encoder_outputs": states, **({} if audio else {"attention_mask": given["attention_mask"]})}


def steps(
    model: Any, lengths: Any = (1, 1, 1), held: Any = None, mask: Any = None, **options: Any
) -> torch.Tensor:
    """Logits of these many tokens, one call after the other."""
    held, start, found, given = cache() if held is None else held, 0, [], encoded(model)
    ids = token_ids(3, sum(lengths))
    with torch.inference_mode():
        for length in lengths:
            now = {} if mask is None else {"decoder_attention_mask": mask[:, : start + length]}
            out = model(
                decoder_input_ids=ids[:, start : start + length], **{CACHE: held}, **now, **given, **options
            )
            found.append(out.logits)
            start += length
    return torch.cat(found, dim=1)


def separately(model: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(whole_layer, "tokens", lambda *args: None)
        return steps(model, *args, **options)


@pytest.mark.parametrize("padding", [left_padding, right_padding])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("prefix", SEQ2SEQ)
def test_a_generation(
    prefix: str, beams: int, padding: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seq2seq(prefix)
    original = copy.deepcopy(model)
    bk.patch(model)
    given = {k: v for k, v in inputs_of(model, padding).items() if not k.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    ours = model.generate(**given, **options)
    assert together == [2] * 5  # the first token's layers ask the encoder for keys
    assert torch.equal(ours, original.generate(**given, **options))
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, model.generate(**given, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_and_caches_are_those_of_the_layers(
    dtype: torch.dtype, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.to(dtype)
    one, other = cache(), cache()
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 2)
    lengths = (1,) * 9  # more than a cache first has room for
    ours = steps(model, lengths, one)
    clamps = hasattr(decoder_of(model), "block") and dtype is torch.float16
    assert together == ([] if clamps else [2] * (len(lengths) - 1))
    assert torch.equal(ours, separately(model, monkeypatch, lengths, other))
    for mine, its in ((one.self_attention_cache, other.self_attention_cache),):
        for layer, expected in zip(mine.layers, its.layers, strict=True):
            assert layer.keys.shape[2] == len(lengths)
            assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(4, 1, 1), (1, 3, 1), (4, 2, 1)], ids=str)
def test_several_tokens(
    lengths: tuple[int, ...], padded: bool, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.ones(3, sum(lengths), dtype=torch.long)
    if padded:
        mask[1, :2] = 0
        mask[2, 0] = 0
    ours = steps(model, lengths, mask=mask)
    assert torch.equal(ours, separately(model, monkeypatch, lengths, mask=mask))


def test_a_decoder_alone(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = seq2seq("Bart", "ForCausalLM")
    bk.patch(model)
    ids = token_ids(3, 6)

    def run() -> torch.Tensor:
        held, found = DynamicCache(), []
        with torch.inference_mode():
            for i in range(6):
                found.append(model(ids[:, i : i + 1], **{CACHE: held}).logits)
        return torch.cat(found, dim=1)

    ours = run()
    assert together == [2] * 6
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, run())


def _pre_hook(module: Any, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def _part(layer: Any, *names: str) -> Any:
    return next(part for name, part in layer.named_modules() if name.split(".")[-1] in names)


def _replace_a_projection(layer: Any) -> None:
    attention = _part(layer, "EncDecAttention", "encoder_attn")
    name = "q" if hasattr(attention, "q") else "q_proj"
    out, features = getattr(attention, name).weight.shape
    setattr(attention, name, type("Other", (torch.nn.Linear,), {})(features, out))


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook before a layer": lambda layers: layers[1].register_forward_pre_hook(_pre_hook),
    "a hook within": lambda layers: _part(layers[1], "fc1", "wi", "wi_1").register_forward_hook(
        lambda *a: a[2] * 2
    ),
    "a hook on an attention": lambda layers: _part(
        layers[1], "EncDecAttention", "encoder_attn"
    ).register_forward_hook(lambda *a: (a[2][0] * 2, *a[2][1:])),
    "a hook on a norm": lambda layers: [
        part for name, part in layers[1].named_modules() if name.endswith("layer_norm")
    ][1].register_forward_hook(lambda *a: a[2] * 2),
    "a replaced projection": lambda layers: _replace_a_projection(layers[1]),
}


@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_layer_sees_it_run(
    name: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    WATCHED[name](layers_of(model))
    ours = steps(model)
    assert together == []
    assert torch.equal(ours, separately(model, monkeypatch))


@pytest.mark.parametrize("kind", ["output_hidden_states", "output_attentions"])
def test_outputs_of_each_layer(
    kind: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = steps(model, **{kind: True})
    assert together == []
    assert torch.equal(ours, separately(model, monkeypatch, **{kind: True}))
    steps(model)
    assert together == [2, 2]  # whose hooks stay, and are idle


def test_other_caches(model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> EncoderDecoderCache:
        config = decoder_of(model).config
        return EncoderDecoderCache(StaticCache(config=config, max_cache_len=8), DynamicCache())

    ours = steps(model, held=made())
    assert together == []
    assert torch.equal(ours, separately(model, monkeypatch, held=made()))


def test_layers_whose_keys_of_the_encoder_are_not_there(
    model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> torch.Tensor:
        held = cache()
        first = steps(model, (1, 1), held)
        held.is_updated[1] = False
        held.cross_attention_cache.layers[1] = type(held.cross_attention_cache.layers[1])()
        return torch.cat((first, steps(model, (1,), held)), dim=1)

    ours = run()
    assert together == [2]
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, run())


def test_copies_do_the_same(model: Any, together: list[int]) -> None:
    expected = steps(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(steps(copied), expected)
    assert together == [2] * 6


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.add_(torch.rand_like(weight) / 8),
    "through data": lambda weight: weight.data.add_(torch.rand_like(weight) / 8),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_weights_are_seen(
    edit: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = steps(model)
    for name, parameter in layers_of(model)[0].named_parameters():
        with torch.no_grad():
            EDITS[edit](parameter)
        after = steps(model)
        assert torch.equal(after, separately(model, monkeypatch)), name
        # a bias of keys moves all logits of a row
        assert not torch.equal(before, after) or name.endswith("k_proj.bias"), name
        before = after
    assert set(together) == {2}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_positions_are_seen(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seq2seq("T5")
    bk.patch(model)
    table = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before = steps(model)
    with torch.no_grad():
        EDITS[edit](table[3])
    after = steps(model)
    assert torch.equal(after, separately(model, monkeypatch)) and torch.equal(before[:, 0], after[:, 0])


def test_in_training_and_with_gradients(model: Any, together: list[int]) -> None:
    given = encoded(model)
    model(decoder_input_ids=token_ids(3, 1), **{CACHE: cache()}, **given)
    model.train()
    with torch.no_grad():
        model(decoder_input_ids=token_ids(3, 1), **{CACHE: cache()}, **given)
    assert together == [] and layer_stack.current() is None
