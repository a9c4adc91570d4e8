"""All layers of a prompt or a token in one call: only where it may, and then nothing else changes."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_checks import CACHE
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.tiny import build, decoder, gpt2_config, gpt_like, left_padding, token_ids
from bigmodel_kernels.ops.linear import native
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import growing_cache, layer_stack, token_model, whole_layer

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

IDS = token_ids()


SIZE = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
OPT = {"vocab_size": 101, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 72, "num_hidden_layers": 2}
OPT |= {"num_attention_heads": 4, "max_position_embeddings": 64}
KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config()),
    "llama": lambda: build(LlamaForCausalLM, LlamaConfig(**SIZE, **HEADS)),
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config(**SIZE, **HEADS)),
    "qwen3": lambda: build(Qwen3ForCausalLM, Qwen3Config(**SIZE, **HEADS, head_dim=8)),
    "opt": lambda: build(OPTForCausalLM, OPTConfig(**OPT)),
    "mistral": lambda: build(MistralForCausalLM, MistralConfig(**SIZE, **HEADS, sliding_window=None)),
    "mistral, a window": lambda: build(MistralForCausalLM, MistralConfig(**SIZE, **HEADS, sliding_window=40)),
    "gemma": lambda: decoder("Gemma"),
    "gemma2": lambda: decoder("Gemma2", sliding_window=40),
    "gemma3": lambda: decoder("Gemma3", sliding_window=40),
    "olmo2": lambda: decoder("Olmo2"),
    "olmo3": lambda: decoder("Olmo3", sliding_window=40),
    "granite": lambda: decoder("Granite", hidden_size=64),
    "phi3": lambda: decoder("Phi3", sliding_window=40),
    "smollm3": lambda: decoder("SmolLM3"),
    "gpt_neox": lambda: gpt_like("GPTNeoX"),
    "gpt_neox, one behind the other": lambda: gpt_like("GPTNeoX", use_parallel_residual=False),
    "gptj": lambda: gpt_like("GPTJ"),
    "codegen": lambda: gpt_like("CodeGen"),
    "phi": lambda: gpt_like("Phi"),
    "starcoder2": lambda: gpt_like("Starcoder2", sliding_window=None),
    "stablelm": lambda: gpt_like("StableLm"),
    "stablelm, side by side": lambda: gpt_like("StableLm", use_parallel_residual=True),
    "gpt_neo": lambda: gpt_like("GPTNeo", window_size=40),
    "bloom": lambda: gpt_like("Bloom"),
    "falcon-7b": lambda: gpt_like("Falcon", new_decoder_architecture=False, multi_query=True),
}
#: Of those that pass by the model's own forward for a token.
PAST = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "mistral, a window")
WAYS = [*((kind, "by its forward") for kind in KINDS), *((kind, "past its forward") for kind in PAST)]


@pytest.fixture(params=WAYS, ids=", ".join)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Patched; a token comes to its layers in one of two ways."""
    kind, way = request.param
    if way == "by its forward":
        monkeypatch.setattr(token_model.Model, "states", lambda *args, **kwargs: None)
    model = KINDS[kind]()
    bk.patch(model)
    return model


def inner(model: Any) -> Any:
    return getattr(model.base_model, "decoder", model.base_model)


def layers_of(model: Any) -> Any:
    return inner(model).h if hasattr(inner(model), "h") else inner(model).layers


@pytest.fixture
def together(watch: Any) -> list[int]:
    """How many layers each call for a token was for."""
    seen: list[int] = []
    watch("tokens", lambda x, layers: seen.append(len(layers)) if x.shape[1] == 1 else None)
    return seen


@pytest.fixture
def prompts(watch: Any) -> list[int]:
    """How many tokens each other call of all layers was for."""
    seen: list[int] = []
    watch("tokens", lambda x, layers: seen.append(x.shape[1]) if x.shape[1] > 1 else None)
    return seen


def continued(model: Any, cache: Any = None, **options: Any) -> Any:
    """The output for a token after a prompt."""
    cache = DynamicCache() if cache is None else cache
    with torch.inference_mode():
        model(IDS[:, :9], past_key_values=cache)
        return model(IDS[:, 9:10], past_key_values=cache, **options)


def separately(model: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(whole_layer, "tokens", lambda *args: None)
        return continued(model, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_generation(padded: bool, beams: int, model: Any, together: list[int]) -> None:
    options = {"attention_mask": left_padding() if padded else torch.ones_like(IDS), "num_beams": beams}
    options |= {"max_new_tokens": 6, "do_sample": False}
    ours = model.generate(IDS, **options)
    assert together == [2] * 5
    bk.unpatch(model)
    assert torch.equal(ours, model.generate(IDS, **options))


def test_the_cache_has_what_the_layers_would_have_put_there(
    model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = DynamicCache(), DynamicCache()
    logits = continued(model, one).logits
    assert together == [2]
    assert torch.equal(logits, separately(model, monkeypatch, cache=other).logits)
    for layer, expected in zip(one.layers, other.layers, strict=True):
        assert layer.keys.shape[2] == 10
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


def read(model: Any, cache: Any, lengths: Any, mask: Any = None, **options: Any) -> torch.Tensor:
    """Logits of these many tokens, one call after the other."""
    found, start = [], 0
    with torch.inference_mode():
        for length in lengths:
            seen = None if mask is None else mask[:, : start + length]
            ids = IDS[:, start : start + length]
            found.append(model(ids, attention_mask=seen, **{CACHE: cache}, **options).logits)
            start += length
    return torch.cat(found, dim=1)


def assert_same_caches(one: Any, other: Any) -> None:
    assert len(one.layers) == len(other.layers)
    for layer, expected in zip(one.layers, other.layers, strict=True):
        assert layer.get_seq_length() == expected.get_seq_length()
        assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("made", "lengths"), [("by the config", [9]), ("layer by layer", [2, 7, 1, 4])])
def test_a_prompt_and_what_follows_it(
    made: str,
    lengths: list[int],
    padded: bool,
    dtype: torch.dtype,
    model: Any,
    prompts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model.to(dtype)
    config = {"config": model.config} if made == "by the config" else {}
    caches = DynamicCache(**config), DynamicCache(**config)
    mask = left_padding() if padded else torch.ones_like(IDS)
    ours = read(model, caches[0], lengths, mask)
    assert prompts == [length for length in lengths if length > 1]
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, read(model, caches[1], lengths, mask))
    assert_same_caches(*caches)


def test_a_prompt_that_no_mask_goes_with(
    model: Any, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = DynamicCache(), DynamicCache()
    ours = read(model, caches[0], [5, 3, 1])
    assert prompts[0] == 5
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, read(model, caches[1], [5, 3, 1]))
    assert_same_caches(*caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache(
    kind: str, padded: bool, dtype: torch.dtype, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KINDS[kind]().to(dtype)
    bk.patch(model)
    mask = left_padding() if padded else None
    for length in (17, 1):
        inputs = {"attention_mask": None if mask is None else mask[:, -length:], "use_cache": False}
        prompts.clear()
        with torch.no_grad():
            ours = model(IDS[:, :length], **inputs)
            assert prompts == ([] if length == 1 else [17]) and ours.past_key_values is None
            with monkeypatch.context() as patch:
                patch.setattr(whole_layer, "tokens", lambda *args: None)
                assert torch.equal(ours.logits, model(IDS[:, :length], **inputs).logits)


def test_a_long_prompt_goes_layer_by_layer(
    model: Any, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 9 * len(IDS))
    ours = read(model, DynamicCache(), [9]), read(model, DynamicCache(), [10])
    assert prompts == [9]
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours[0], read(model, DynamicCache(), [9]))
    assert torch.equal(ours[1], read(model, DynamicCache(), [10]))


def test_texts_one_behind_the_other_in_a_prompt(
    model: Any, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sees them by their positions, and hides each from the next."""
    positions = torch.arange(9).remainder(5)[None].expand(len(IDS), -1)
    ours = read(model, DynamicCache(), [9], position_ids=positions)
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, read(model, DynamicCache(), [9], position_ids=positions))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("gpt2", "gpt_neo")])
def test_layers_that_look_ahead(kind: str, prompts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = KINDS[kind]()
    bk.patch(model)
    before = read(model, DynamicCache(), [9])
    assert prompts == [9]
    attention_of(layers_of(model)[1]).is_causal = False
    ours = read(model, DynamicCache(), [9])
    assert prompts == [9] and not torch.equal(ours, before)
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, read(model, DynamicCache(), [9]))


def test_what_cannot_be_one_call_leaves_the_cache_to_the_layers(
    model: Any, prompts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = DynamicCache(), DynamicCache()
    monkeypatch.setattr(whole_layer.Layers, "tensors", lambda self: None)  # the last that can be in the way
    ours = read(model, caches[0], [9, 1])
    assert prompts == []
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert torch.equal(ours, read(model, caches[1], [9, 1]))
    assert_same_caches(*caches)


def _pre_hook(module: Any, args: Any) -> Any:
    return (args[0] * 2, *args[1:])


def _feed_forward(layer: Any) -> Any:
    names = ("c_fc", "up_proj", "gate_up_proj", "fc1", "fc_in", "dense_h_to_4h")
    return next(module for name, module in layer.named_modules() if name.split(".")[-1] in names)


def attention_of(layer: Any) -> Any:
    names = ("attn", "self_attn", "attention", "self_attention")
    found = next(getattr(layer, name) for name in names if hasattr(layer, name))
    return getattr(found, "attention", found)


def _replace_a_projection(layer: Any) -> None:
    attention = attention_of(layer)
    name = next(name for name in ("c_proj", "o_proj", "out_proj", "dense") if hasattr(attention, name))
    out, features = getattr(attention, name).weight.shape
    setattr(attention, name, type("Other", (torch.nn.Linear,), {})(features, out))


def _doubled(layer: Any) -> Callable[..., Any]:
    """A forward of a user's own that gives what those of these layers give."""
    return lambda x, *args, **kwargs: layer.gives(2 * x)


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook before a layer": lambda layers: layers[1].register_forward_pre_hook(_pre_hook),
    "a hook behind a layer": lambda layers: layers[1].register_forward_hook(lambda *a: a[2] * 2),
    "a hook within": lambda layers: _feed_forward(layers[1]).register_forward_hook(lambda *a: a[2] * 2),
    "a replaced projection": lambda layers: _replace_a_projection(layers[1]),
    "a forward of its own": lambda layers: setattr(layers[1], "forward", _doubled(layers[1])),
    "a layer that is not ours": lambda layers: setattr(
        layers[1], "__class__", next(c for c in type(layers[1]).__mro__ if c.__module__.startswith("transf"))
    ),
    "a layer in training with dropout": lambda layers: [
        setattr(part, "p", 0.5) or part.train()
        for part in layers[1].modules()
        if isinstance(part, torch.nn.Dropout)
    ],
}


@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_block_sees_it_run(
    name: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "a layer in training with dropout" and type(inner(model)).__name__ != "GPT2Model":
        pytest.skip("it has no dropouts of its own")
    WATCHED[name](layers_of(model))
    torch.manual_seed(0)
    ours = continued(model).logits
    assert together == []
    torch.manual_seed(0)
    assert torch.equal(ours, separately(model, monkeypatch).logits)


def test_a_block_that_comes_twice(model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if model.config.model_type == "bloom":
        pytest.skip("its ALiBi is for the tokens that a cache would have of one layer")
    layers_of(model)[1] = layers_of(model)[0]
    assert torch.equal(continued(model).logits, separately(model, monkeypatch).logits) and together == []


@pytest.mark.parametrize("kind", ["output_hidden_states", "output_attentions"])
def test_outputs_of_each_layer(
    kind: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = continued(model, **{kind: True})
    assert together == []
    expected = separately(model, monkeypatch, **{kind: True})
    name = kind.removeprefix("output_")
    assert len(ours[name]) == len(expected[name]) >= 2
    for one, other in zip(ours[name], expected[name], strict=True):
        assert torch.equal(one, other)
    continued(model)
    assert together == [2]  # whose hooks stay, and are idle


def test_layers_of_a_caller_are_its_own(together: list[int]) -> None:
    """Who calls blocks without the model may stop after any of them."""
    model = KINDS["gpt2"]()
    bk.patch(model)
    cache = DynamicCache()
    with torch.inference_mode():
        model(IDS[:, :9], past_key_values=cache)
        x = torch.randn(len(IDS), 1, model.config.n_embd)
        first = model.transformer.h[0](x, cache)
        assert not torch.equal(first, model.transformer.h[1](first, cache))
    assert [layer.keys.shape[2] for layer in cache.layers] == [10, 10] and together == []


def test_a_forward_of_the_users_own(together: list[int]) -> None:
    model = KINDS["gpt2"]()
    bk.patch(model)
    inner = model.transformer

    def only_the_first(input_ids: Any, **kwargs: Any) -> Any:
        x = inner.wte(input_ids) + inner.wpe.weight[: input_ids.shape[1]]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return BaseModelOutputWithPastAndCrossAttentions(inner.ln_f(inner.h[0](x, cache)))

    inner.forward = only_the_first
    cache = DynamicCache()
    continued(model, cache)
    assert len(cache.layers) == 1 and together == []


def test_a_model_that_runs_fewer_layers_than_it_has(
    together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KINDS["llama"]()
    bk.patch(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[1]))
    ours = continued(model).logits
    assert together == [2] and torch.equal(ours, separately(model, monkeypatch).logits)


KINDS_OF_LAYERS = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, Callable[[], Any]] = {
    "mistral": lambda: build(MistralForCausalLM, MistralConfig(**SIZE, **HEADS, sliding_window=4)),
    "gemma2": lambda: decoder("Gemma2", sliding_window=4),
    "gemma3": lambda: decoder("Gemma3", sliding_window=4, layer_types=KINDS_OF_LAYERS),
    "olmo3": lambda: decoder("Olmo3", sliding_window=4),
    "phi3": lambda: decoder("Phi3", sliding_window=4),
    "qwen2": lambda: build(
        Qwen2ForCausalLM,
        Qwen2Config(**SIZE, **HEADS, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "starcoder2": lambda: gpt_like("Starcoder2", sliding_window=4),
    "gpt_neo": lambda: gpt_like("GPTNeo", window_size=4),
}


@pytest.mark.parametrize("prompt", [(2,), (9,), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 7])
@pytest.mark.parametrize("kind", WINDOWED)
def test_windows(
    kind: str,
    padding: int,
    prompt: tuple[int, ...],
    together: list[int],
    prompts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From before windows hide something until all that is padding is hidden, and buffers have been full."""
    model = WINDOWED[kind]()
    bk.patch(model)
    monkeypatch.setattr(growing_cache, "_LEAST_ROOM", 3)
    mask = torch.ones_like(IDS)
    mask[0, : min(padding, prompt[0] - 1)] = 0
    starts = list(itertools.accumulate((*prompt, *[1] * 12), initial=0))

    def run() -> list[torch.Tensor]:
        cache = DynamicCache(config=model.config)
        found, handed_out = [], []
        with torch.inference_mode():
            for first, last in itertools.pairwise(starts):
                seen = torch.nn.functional.pad(mask[:, :last], (0, max(0, last - mask.shape[1])), value=1)
                ids = IDS[:, [i % IDS.shape[1] for i in range(first, last)]]
                positions = (seen.cumsum(-1) - 1).clamp(0)[:, first:]
                out = model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache)
                found += [
                    out.logits,
                    *(t.clone() for layer in cache.layers for t in (layer.keys, layer.values)),
                ]
                handed_out += [t for layer in cache.layers for t in (layer.keys, layer.values)]
                assert cache.get_seq_length() == last
        held = [t for step in range(len(starts) - 1) for t in found[step * 5 + 1 : step * 5 + 5]]
        assert all(torch.equal(a, b) for a, b in zip(handed_out, held, strict=True))
        return found

    ours = run()
    assert together == [2] * 12 and prompts == list(prompt)
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(), strict=True))
    bk.unpatch(model)
    real = mask[:, : prompt[0]].bool()
    for step, (a, b) in enumerate(zip(ours[::5], run()[::5], strict=True)):
        torch.testing.assert_close(a if step else a[real], b if step else b[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_window_that_the_model_has_no_masks_for(kind: str, sliding: bool, together: list[int]) -> None:
    """A config may name one all the same, which caches made from it read."""
    model = KINDS[kind]()
    model.config.sliding_window = 4
    make = lambda: DynamicCache(config=model.config if sliding else None)  # noqa: E731
    expected = continued(model, make()).logits
    bk.patch(model)
    torch.testing.assert_close(continued(model, make()).logits, expected, rtol=1e-4, atol=1e-5)
    assert together == [2]


MASKS: dict[str, tuple[Any, bool]] = {
    "all that is there": ({"full_attention": None, "sliding_attention": None}, True),
    "some of it": (
        {
            "full_attention": None,
            "sliding_attention": torch.arange(10).ge(8).expand(len(IDS), 1, 1, 10),
        },
        True,
    ),
    "padding": (
        dict.fromkeys(("full_attention", "sliding_attention"), torch.arange(10).ge(2).expand(len(IDS), 10)),
        True,
    ),
    "different padding": (
        {
            "full_attention": torch.arange(10).ge(2).expand(len(IDS), 10),
            "sliding_attention": torch.arange(10).ge(3).expand(len(IDS), 10),
        },
        True,
    ),
    "of heads": (
        {
            "full_attention": None,
            "sliding_attention": torch.arange(10).ge(3).expand(len(IDS), 4, 1, 10),
        },
        False,
    ),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_masks_of_the_callers_own(
    kind: str, masks: str, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not have the windows that the layers have."""
    model = WINDOWED[kind]()
    bk.patch(model)
    given, at_once = MASKS[masks]
    ours = continued(model, attention_mask=given).logits
    assert together == [2] * at_once
    assert torch.equal(ours, separately(model, monkeypatch, attention_mask=given).logits)
    assert not torch.equal(ours, continued(model).logits)


def test_a_model_within_another(together: list[int]) -> None:
    """One that sees images makes the masks of its text model, one for each type of layers."""
    text = Gemma3TextConfig(**SIZE, **HEADS, head_dim=16, sliding_window=8, layer_types=KINDS_OF_LAYERS)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"image_token_index": 98, "boi_token_index": 97, "eoi_token_index": 96, "mm_tokens_per_image": 4}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    model = build(
        Gemma3ForConditionalGeneration, Gemma3Config(text_config=text, vision_config=vision, **tokens)
    )
    options = {"attention_mask": left_padding(), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS % 96, **options)
    bk.patch(model)
    assert torch.equal(model.generate(IDS % 96, **options), expected)
    assert together == [2] * 11


def test_other_caches(model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    make = lambda: StaticCache(config=model.config, max_cache_len=16)  # noqa: E731
    ours = continued(model, make()).logits
    assert together == []
    assert torch.equal(ours, separately(model, monkeypatch, cache=make()).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_the_same(copied: Callable[[Any], Any], model: Any, together: list[int]) -> None:
    expected = continued(model).logits
    other = copied(model)
    with torch.no_grad():
        for parameter in layers_of(model).parameters():
            parameter.zero_()
    assert torch.equal(continued(other).logits, expected) and together == [2, 2]


EDITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.mul_(0.5 + torch.rand_like(weight)),
    "through data": lambda weight: weight.data.mul_(0.5 + torch.rand_like(weight)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_weights_are_seen(
    edit: str, model: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = continued(model).logits
    for parameter in layers_of(model)[1].parameters():
        with torch.no_grad():
            EDITS[edit](parameter)
        after = continued(model).logits
        assert torch.equal(after, separately(model, monkeypatch).logits)
        # zero biases stay zero, and a bias of keys moves all logits of a row
        assert parameter.dim() == 1 or not torch.equal(before, after)
        before = after
    assert set(together) == {2}


@pytest.mark.parametrize("kind", ["phi3", "codegen"])
def test_weights_that_are_read_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules are looked at once, and copies of pieces count as those of the weights."""
    model = KINDS[kind]()
    bk.patch(model)
    expected = continued(model).logits
    with monkeypatch.context() as patch:
        patch.setattr(layer_stack, "read_all", lambda *args: pytest.fail("looked at again"))
        assert torch.equal(continued(model).logits, expected)
    weights = [p for p in layers_of(model).parameters() if p.dim() == 2]
    assert native.packed_bytes(layers_of(model)) >= sum(w.numel() * w.element_size() for w in weights)
    layers_of(model)[1].mlp.register_parameter("another", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(pytest.fail.Exception), monkeypatch.context() as patch:
        patch.setattr(layer_stack, "read_all", lambda *args: pytest.fail("looked at again"))
        continued(model)


def test_an_error_leaves_nothing_behind(model: Any) -> None:
    with torch.inference_mode(), pytest.raises(IndexError):
        model(IDS + 10**6)
    assert layer_stack.current() is None
    with torch.enable_grad():
        model(IDS)
    assert layer_stack.current() is None


def test_threads_have_stacks_of_their_own(model: Any, together: list[int]) -> None:
    expected = [continued(model).logits, model.generate(IDS[:1], max_new_tokens=6, do_sample=False)]
    found: list[Any] = []

    def work() -> None:
        for _ in range(5):
            found.append(
                [continued(model).logits, model.generate(IDS[:1], max_new_tokens=6, do_sample=False)]
            )

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))


def test_the_class_keeps_its_name_and_goes_with_unpatching(model: Any, tmp_path: Any) -> None:
    name = type(inner(model)).__name__
    assert not name.startswith("Bigmodel")
    inner(model).save_pretrained(tmp_path)
    assert f'"{name}"' in (tmp_path / "config.json").read_text()
    bk.unpatch(model)
    assert type(inner(model)).__module__.startswith("transformers.models.")
