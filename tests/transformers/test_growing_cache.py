"""Keys and values that grow in place: the same as transformers' own, whoever else holds them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
)

import bigmodel_kernels as bk
from bigmodel_kernels.transformers import growing_cache


def tokens(count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values of new tokens, (batch, 3, count, 8)."""
    return torch.randn(batch, 3, count, 8), torch.randn(batch, 3, count, 8)


class Pair:
    """A cache that grows in place beside one of transformers' own."""

    def __init__(self, prompt: int = 5) -> None:
        self.ours, self.own = DynamicCache(), DynamicCache()
        self.add(prompt)

    def add(self, count: int, layer: int = 0) -> bool:
        """Whether the tokens went into a buffer; what the caches hold and return is compared."""
        key, value = tokens(count)
        grown = growing_cache.append(self.ours, key, value, layer)
        got = grown or self.ours.update(key, value, layer)
        expected = self.own.update(key, value, layer)
        held = self.ours.layers[layer].keys, self.ours.layers[layer].values
        for a, b, c in zip(got, expected, held, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            assert a is c
        return grown is not None


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def test_tokens_are_written_behind_those_that_are_there() -> None:
    pair = Pair()
    assert pair.add(1)
    begin = pair.ours.layers[0].keys.data_ptr()
    for count in (1, 1, 3, 1, 20):
        assert pair.add(count)
        assert pair.ours.layers[0].keys.data_ptr() == begin
    assert pair.ours.get_seq_length() == pair.own.get_seq_length() == 32


@pytest.mark.parametrize("first", [2, 7, 12])
def test_layers_with_a_window(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 5)
    config = MistralConfig(num_hidden_layers=1, sliding_window=10)
    ours, own = DynamicCache(config=config), DynamicCache(config=config)
    grown, places, handed_out = [], set(), []
    for count in (first, 1, 1, 3, *[1] * 9, 14, 1, 1):
        key, value = tokens(count)
        found = growing_cache.append(ours, key, value, 0)
        grown.append(found is not None)
        got = found or ours.update(key, value, 0)
        for a, b in zip(got, own.update(key, value, 0), strict=True):
            assert torch.equal(a, b)
        for name in ("keys", "values"):
            assert torch.equal(getattr(ours.layers[0], name), getattr(own.layers[0], name))
        assert ours.get_seq_length() == own.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == own.get_mask_sizes(1, 0)
        handed_out += [(t, t.clone()) for t in (*got, ours.layers[0].keys)]
        places.add(ours.layers[0].keys.untyped_storage().data_ptr())
    assert grown == [False, *[True] * (len(grown) - 1)]  # first tokens are the cache's own work
    assert 3 <= len(places) < len(grown) - 4
    assert all(torch.equal(t, before) for t, before in handed_out)


def test_a_full_buffer_makes_room_for_a_share_more() -> None:
    pair = Pair(500)
    places = set()
    for _ in range(200):
        pair.add(1)
        places.add(pair.ours.layers[0].keys.data_ptr())
    assert len(places) == 2  # 501 tokens and 125 more, 627 and 156 more


def test_nothing_that_was_handed_out_changes() -> None:
    pair = Pair()
    pair.add(1)
    seen = [(t, t.clone()) for t in (pair.ours.layers[0].keys, pair.ours.layers[0].values)]
    pair.add(1)
    pair.ours.crop(-2)
    pair.own.crop(-2)
    pair.add(1)  # other tokens in the place of those that were dropped
    for now, then in seen:
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_a_second_cache_of_the_same_tensors_has_its_own_room() -> None:
    pair = Pair()
    pair.add(1)
    other = DynamicCache()
    other.update(*tokens(1), 0)
    other.layers[0].keys, other.layers[0].values = pair.ours.layers[0].keys, pair.ours.layers[0].values
    key, value = tokens(1)
    assert growing_cache.append(other, key, value, 0) is not None
    assert pair.add(1)
    torch.testing.assert_close(other.layers[0].keys[:, :, -1:], key, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["in place", "data", "set_"])
def test_tokens_that_are_edited(kind: str) -> None:
    pair = Pair()
    pair.add(1)
    for cache in (pair.ours, pair.own):
        keys = cache.layers[0].keys
        if kind == "in place":
            keys.mul_(2)
        elif kind == "data":
            keys.data = keys * 2
        else:
            keys.set_(keys * 2)
    assert pair.add(1)
    assert pair.add(1)


def test_tokens_that_are_edited_when_room_has_been_made_and_not_used() -> None:
    pair = Pair()
    kind = growing_cache.Kind((2, 3, 1, 8), torch.float32, torch.device("cpu"))
    assert growing_cache.room(pair.ours, 0, kind, kind) is not None
    for cache in (pair.ours, pair.own):
        cache.layers[0].keys.mul_(2)
    assert pair.add(1)


def test_copies_and_files_of_a_cache_are_its_own() -> None:
    pair = Pair()
    pair.add(1)
    for twin in (copy.deepcopy(pair.ours), _reloaded(pair.ours)):
        before = twin.layers[0].keys.clone()
        pair.add(1)
        torch.testing.assert_close(twin.layers[0].keys, before, rtol=0, atol=0)
        key, value = tokens(1)
        assert growing_cache.append(twin, key, value, 0) is not None
        torch.testing.assert_close(twin.layers[0].keys[:, :, :-1], before, rtol=0, atol=0)


def _reloaded(cache: DynamicCache) -> DynamicCache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def test_inference_mode_and_its_end() -> None:
    with torch.inference_mode():
        pair = Pair()
        assert pair.add(1)
    assert pair.add(1)
    with torch.inference_mode():
        assert pair.add(1)


def test_the_cache_does_it_where_a_gradient_may_be_wanted() -> None:
    pair = Pair()
    with torch.enable_grad():
        assert not pair.add(1)
    assert pair.add(1)


@pytest.mark.parametrize(
    "layer", ["of one key", "recording", "not what it has seen", "empty", "another batch"]
)
def test_what_is_left_to_the_cache(layer: str) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2)
    if layer in ("of one key", "recording", "not what it has seen"):
        config.sliding_window = 1 if layer == "of one key" else 4
    cache: Any = DynamicCache(config=config)
    if layer == "recording":
        cache.layers[0].record_past = True
    if layer != "empty":
        cache.update(*tokens(3), 0)
    if layer == "not what it has seen":
        cache.layers[0].keys = cache.layers[0].keys[:, :, 1:]
    batch = 1 if layer == "another batch" else 2
    assert growing_cache.append(cache, *tokens(1, batch), 0) is None


GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("beams", [1, 3])
def test_a_generation_grows_in_place(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 60, (2, 5))
    expected = model.generate(ids, num_beams=beams, **GREEDY)
    grown = _counting(monkeypatch)
    bk.patch(model)
    assert torch.equal(model.generate(ids, num_beams=beams, **GREEDY), expected)
    assert grown == [True] * (2 * 9)  # layers times the prompt and the new tokens


def test_a_decoder_beside_an_encoder_grows_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=60, d_model=32, **size, **heads)).eval()
    ids = torch.randint(3, 60, (2, 5))
    expected = model.generate(ids, num_beams=1, **GREEDY)
    grown = _counting(monkeypatch)
    bk.patch(model)
    assert torch.equal(model.generate(ids, num_beams=1, **GREEDY), expected)
    assert grown.count(True) >= 2 * 7


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    grown: list[bool] = []
    own = growing_cache.rooms

    def rooms(cache: Any, wanted: Any, **options: Any) -> Any:
        wanted = list(wanted)
        result = own(cache, wanted, **options)
        grown.extend([result is not None] * len(wanted))
        return result

    monkeypatch.setattr(growing_cache, "rooms", rooms)
    return grown
