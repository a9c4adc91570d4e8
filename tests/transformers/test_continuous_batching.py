"""transformers' continuous batching with our attention: packed requests, pages, and what is left behind."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import assert_as_near
from bigmodel_kernels.models.tiny import TINY
from bigmodel_kernels.transformers import attention_interface, continuous_batching, paged
from bigmodel_kernels.transformers.autoregister import FLASH_NAME

needs_paging = pytest.mark.skipif(paged.CACHE is None, reason=f"needs transformers {paged.SINCE}")

#: Of mixed lengths; two begin with the same pages, and one is longer than a batch.
PROMPTS = [
    [5, 6, 7],
    [11, 12, 13, 14, 15, 16, 17, 18, 19],
    [11, 12, 13, 14, 15, 16, 17, 18, 21, 22, 23],
    [*range(30, 49)],
    [8],
]
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
SDPA = "sdpa"


@pytest.fixture(autouse=True)
def _quick_and_quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A manager that stops collects garbage, which takes a second among all that the tests have imported."""
    caplog.set_level(logging.CRITICAL, "ContinuousBatchingLogger")
    gc.freeze()
    yield
    gc.unfreeze()


def settings(**changes: Any) -> ContinuousBatchingConfig:
    """Small pages, and room for three requests and 16 tokens in a batch."""
    sizes = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16, "max_requests_per_batch": 3}
    return ContinuousBatchingConfig(**{**sizes, **changes})


def served(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> list[list[int]]:
    """The tokens that continuous batching gives each prompt."""
    out = model.generate_batch(
        prompts, generation_config=GREEDY, continuous_batching_config=settings(**changes)
    ).values()
    assert len(out) == len(prompts) and not any(result.error for result in out), [r.error for r in out]
    return [result.generated_tokens for result in out]


def generated(model: Any, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    """Those of `generate`, a prompt at a time."""
    return [
        model.generate(torch.tensor([p]), generation_config=GREEDY)[0, len(p) :].tolist() for p in prompts
    ]


class Calls(list[paged.Sequences]):
    @property
    def with_tables(self) -> int:
        return sum(requests.pages is not None for requests in self)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The requests of every packed call of our attention. A dense mask, or any other call, is an error."""
    found, own = Calls(), paged.packed_attention

    def packed_attention(*args: Any, **kwargs: Any) -> Tensor:
        found.append(args[3])
        return own(*args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a dense mask, or attention that is not packed")

    monkeypatch.setattr(paged, "packed_attention", packed_attention)
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.input_outputs.build_attention_mask", forbidden
    )
    monkeypatch.setattr(attention_interface, "attend", forbidden)
    return found


# ------------------------------------------------------------------------------------------------------------
# the tokens are those of generate


@needs_paging
@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "mistral", "qwen2", "gemma2", "gpt_oss", "stablelm"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3", "gemma3", "phi3", "phi", "gpt_neox")
        ),
    ],
)
def test_a_patched_model(family: str, calls: Calls) -> None:
    """The layers of GPT-NeoX and StableLM drop what continuous batching tells them; patched ones do not."""
    changes = {"gemma2": {"attn_logit_softcapping": 1.0}}  # low enough to choose other tokens
    model = TINY[family].model(**changes.get(family, {}))
    kind = model.config._attn_implementation
    expected = generated(model)
    report = bk.patch(model)
    assert continuous_batching.note() in report.notes
    assert served(model) == expected
    windows = getattr(model.config, "sliding_window", None) is not None
    assert len(calls) % model.config.num_hidden_layers == 0 and bool(calls.with_tables) is not windows
    assert any(len(requests.cu_seqlens_q) == 4 for requests in calls)  # three requests in one call
    assert model.config._attn_implementation == kind


@needs_paging
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_attn_implementation_bigmodel(family: str, calls: Calls) -> None:
    plain = TINY[family].model()
    expected = generated(plain)
    model = type(plain)._from_config(copy.deepcopy(plain.config), attn_implementation="bigmodel").eval()
    model.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="Implementation bigmodel is not supported for continuous batching"):
        model.generate_batch(PROMPTS, generation_config=GREEDY)
    bk.enable_continuous_batching(model)
    assert served(model) == expected and calls
    assert model.config._attn_implementation == "bigmodel"
    assert bk.unpatch(model) == 0 and continuous_batching.ATTRIBUTE not in model.__dict__


@needs_paging
@pytest.mark.parametrize("blocks", [None, 0, 4])
def test_block_tables_and_indices(blocks: int | None, calls: Calls) -> None:
    """4 pages of 4: requests that grow past them go on without a table."""
    model = TINY["llama"].model()
    expected = generated(model)
    bk.patch(model)
    assert served(model, max_blocks_per_request=blocks) == expected
    assert bool(calls.with_tables) is (blocks != 0) and calls.with_tables < len(calls)


@needs_paging
def test_prefixes_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    found, own = [], paged.CACHE.search_prefix_match

    def search(*args: Any) -> int:
        found.append(own(*args))
        return found[-1]

    model = TINY["llama"].model()
    expected = generated(model)
    bk.patch(model)
    monkeypatch.setattr(paged.CACHE, "search_prefix_match", search)
    assert served(model, max_requests_per_batch=1) == expected
    assert 8 in found


@needs_paging
def test_several_answers_to_a_prompt() -> None:
    """Forks of a request share its pages, and go on in their own."""
    model = TINY["llama"].model()
    expected = generated(model)
    bk.patch(model)
    twice = copy.deepcopy(GREEDY)
    twice.do_sample, twice.top_k, twice.num_return_sequences = True, 1, 2
    out = model.generate_batch(PROMPTS, generation_config=twice, continuous_batching_config=settings())
    assert [result.generated_tokens for result in out.values()] == [
        text for text in expected for _ in range(2)
    ]


@needs_paging
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_bfloat16(family: str, calls: Calls) -> None:
    """Log-probabilities of the first tokens are as near to those in float32 as sdpa's are."""
    model = TINY[family].model().to(torch.bfloat16)
    first = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def found(model: Any) -> Tensor:
        options = {"generation_config": first, "continuous_batching_config": settings(return_logprobs=True)}
        return torch.tensor([r.logprobs for r in model.generate_batch(PROMPTS, **options).values()])

    exact = copy.deepcopy(model).float()
    for each in (exact, model):
        bk.patch(each)
    torch.testing.assert_close(found(model), found(exact), rtol=0.05, atol=0.05)
    assert calls[0].cu_seqlens_q.dtype == torch.int32


@needs_paging
def test_dense_masks_of_a_manager_that_is_not_ours() -> None:
    """Who makes transformers' own manager for a patched model gets sdpa's masks, and the same tokens."""
    model = TINY["mistral"].model()
    expected = generated(model)
    bk.patch(model)
    del model.__dict__[continuous_batching.ATTRIBUTE]
    assert served(model) == expected


# ------------------------------------------------------------------------------------------------------------
# what is left behind


@needs_paging
@pytest.mark.parametrize("kind", ["eager", "bigmodel"])
def test_everything_else_is_as_before(kind: str) -> None:
    plain, model = (TINY["gemma2"].model(attn_implementation=kind) for _ in range(2))
    state, config, ids = set(vars(model)), model.config, torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        before = plain(ids).logits
        bk.patch(model)
        patched = model(ids).logits
        assert served(model) == (expected := generated(plain))
        assert torch.equal(model(ids).logits, patched)
        assert generated(model, PROMPTS[:2]) == expected[:2]
        assert bk.patch(model).patched and served(model, PROMPTS[:2]) == expected[:2]
        assert bk.unpatch(model) > 0
        assert torch.equal(model(ids).logits, before)
    assert set(vars(model)) == state
    assert model.config is config and config._attn_implementation == kind
    assert all(module.config is config for module in model.modules() if "config" in vars(module))


@needs_paging
def test_the_manager_by_hand() -> None:
    """A manager that the model keeps; the model runs other things in its pauses, and between its sessions."""
    model = TINY["llama"].model()
    expected, ids = generated(model), torch.tensor([PROMPTS[1]])
    bk.patch(model)
    with torch.no_grad():
        logits = model(ids).logits
    for _ in range(2):  # the second time it is the one of the first
        manager = model.init_continuous_batching(GREEDY, settings())
        assert model.config._attn_implementation == FLASH_NAME
        manager.start()
        with manager.pause(), torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
            assert generated(model, PROMPTS[:1]) == expected[:1]
        names = manager.add_requests(PROMPTS, max_new_tokens=GREEDY.max_new_tokens)
        results: dict[str, list[int]] = {}
        while len(results) < len(names):
            result = manager.get_result(timeout=5)
            assert result is not None and result.error is None
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
        manager.stop(keep_for_next_session=True)
        assert model.config._attn_implementation == SDPA
        assert [results[name] for name in names] == expected
    assert model.init_continuous_batching() is manager
    manager.stop()  # not started
    assert model.config._attn_implementation == SDPA
    model.destroy_cached_continuous_batching_manager()


@needs_paging
def test_two_managers_of_a_model() -> None:
    model = TINY["llama"].model()
    bk.patch(model)
    first, second = (model.init_continuous_batching(GREEDY, settings()) for _ in range(2))
    for manager in (first, second):
        manager.stop()
    assert model.config._attn_implementation == SDPA


@needs_paging
def test_copies_serve_themselves() -> None:
    model = TINY["llama"].model()
    expected = generated(model)
    bk.patch(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    seen = weakref.ref(model)
    del model
    assert seen() is None  # what is enabled does not keep the model
    for each in copies:
        assert served(each) == expected


# ------------------------------------------------------------------------------------------------------------
# what is refused


@needs_paging
@pytest.mark.parametrize("family", ["opt", "gpt_neo"])
def test_models_that_continuous_batching_does_not_know(family: str) -> None:
    def errors(model: Any) -> list[str]:
        out = model.generate_batch(
            PROMPTS[:1], generation_config=GREEDY, continuous_batching_config=settings()
        )
        return [result.error for result in out.values()]

    model = TINY[family].model()
    expected = errors(model)
    assert all(expected)
    bk.patch(model)
    assert errors(model) == expected


@needs_paging
@pytest.mark.parametrize(
    "asked",
    [
        {"use_cuda_graph": True},
        {"use_cuda_graph": (False, True)},
        {"varlen_compile_config": CompileConfig()},
        {"decode_compile_config": CompileConfig()},
        {"default_compile_level": 1},
        {"q_padding_interval_size": 64},
    ],
)
def test_padded_batches_are_refused(asked: dict[str, Any]) -> None:
    model = TINY["llama"].model()
    bk.patch(model)
    with pytest.raises(ValueError, match=next(iter(asked))):
        model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=settings(**asked))
    assert model.config._attn_implementation == SDPA


@needs_paging
def test_a_compile_config_of_the_model_is_refused() -> None:
    model = TINY["llama"].model()
    model.config.compile_config = CompileConfig()
    bk.patch(model)
    with pytest.raises(ValueError, match=r"compile_config=.* in the model's config"):
        model.init_continuous_batching(GREEDY, settings())
    assert model.config._attn_implementation == SDPA


@needs_paging
def test_a_kept_manager_is_not_for_other_attention() -> None:
    model = TINY["llama"].model()
    expected = generated(model, PROMPTS[:2])
    options = {"generation_config": GREEDY, "continuous_batching_config": settings()}
    with bk.patched(model):
        model.generate_batch(PROMPTS[:2], persistent_manager=True, **options)
    with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"):
        model.init_continuous_batching()
    bk.patch(model)
    bk.unpatch(model)
    assert served(model, PROMPTS[:2]) == expected


def test_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama"].model()
    monkeypatch.setattr(paged, "CACHE", None)
    report = bk.patch(model)
    assert any(paged.SINCE in line for line in report.notes)
    with pytest.raises(NotImplementedError, match=rf"needs transformers {paged.SINCE}"):
        model.generate_batch(PROMPTS, generation_config=GREEDY)
    bk.unpatch(model)
    assert continuous_batching.ATTRIBUTE not in model.__dict__


@pytest.mark.parametrize("family", ["bert", "t5", "bloom"])
def test_models_that_are_no_decoders_with_an_interface(family: str) -> None:
    model = TINY[family].model()
    with pytest.raises(TypeError, match=type(model).__name__):
        bk.enable_continuous_batching(model)
    bk.patch(model)
    assert continuous_batching.ATTRIBUTE not in model.__dict__


def test_the_name_is_not_for_loading() -> None:
    """transformers would look for a package of flash-attention behind it, and says that there is none."""
    model = TINY["llama"].model()
    with pytest.raises(ValueError, match=FLASH_NAME):
        model.set_attn_implementation(FLASH_NAME)


# ------------------------------------------------------------------------------------------------------------
# the attention function

LENGTHS = [
    (3, 3),
    (1, 9),
    (5, 7),
    (0, 0),
    (4, 4),
]  # of queries and keys: prompts, one that goes on, a decoding one


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[tuple[int, int]], **options: Any
) -> Tensor:
    """Causal attention, request by request, in the precision of its arguments; (1, total_q, H, D)."""
    window, softcap, sinks = (options.get(name) for name in ("sliding_window", "softcap", "s_aux"))
    rows, keys = zip(*lengths, strict=True)
    out = []
    for q, k, v in zip(*(t.split(n, 2) for t, n in ((query, rows), (key, keys), (value, keys))), strict=True):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])
        logits = logits.masked_fill((distance < 0) | (distance >= (window or 100)), float("-inf"))
        if sinks is not None:
            column = sinks.to(logits.dtype)[:, None, None].expand(1, -1, q.shape[2], 1)
            logits = torch.cat([logits, column], -1)
        out.append((torch.softmax(logits, -1)[..., : k.shape[2]] @ v).transpose(1, 2))
    return torch.cat(out, 1)


def heads(
    dtype: torch.dtype, lengths: list[tuple[int, int]], head: int = 16, of_value: int = 16
) -> list[Tensor]:
    rows, keys = (sum(n) for n in zip(*lengths, strict=True))
    shapes = [(1, 4, rows, head), (1, 2, keys, head), (1, 2, keys, of_value)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attended(parts: list[Tensor], lengths: list[tuple[int, int]], **options: Any) -> Tensor:
    module = SimpleNamespace(training=False, is_causal=True)
    rows, keys = zip(*lengths, strict=True)
    told = {
        "cu_seq_lens_q": starts(rows),
        "cu_seq_lens_k": starts(keys),
        "max_length_q": max(rows),
        "max_length_k": max(keys),
    }
    return attention_interface.attention_forward(module, *parts, None, **{**told, **options})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 4, "softcap": 5.0}, {"sinks": True}])
def test_packed_requests_against_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = {k: v for k, v in options.items() if k != "sinks"} | (
        {"s_aux": torch.randn(4)} if "sinks" in options else {}
    )
    parts = heads(dtype, LENGTHS)
    eager = by_definition(*parts, LENGTHS, **options)
    exact = by_definition(*(t.double() for t in parts), LENGTHS, **options)
    assert_as_near(attended(parts, LENGTHS, **options), eager, exact)


@pytest.mark.parametrize(("head", "of_value"), [(16, 8), (264, 264)])
def test_heads_that_the_operator_does_not_take(head: int, of_value: int) -> None:
    parts = heads(torch.float32, LENGTHS, head, of_value)
    options = {"sliding_window": 4}
    torch.testing.assert_close(attended(parts, LENGTHS, **options), by_definition(*parts, LENGTHS, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_table_against_float64(dtype: torch.dtype) -> None:
    """Four requests, of which two begin a page; their pages lie in any order, as in transformers' cache."""
    lengths = [(1, 3), (1, 9), (1, 4), (1, 5)]
    query, key, value = heads(dtype, lengths)
    keys, new = [n for _, n in lengths], starts([n for _, n in lengths])[1:] - 1
    table = torch.tensor([[5, -1, -1], [2, 7, 1], [3, -1, -1], [6, 4, -1]], dtype=torch.int32)
    pages = torch.full((2, 8, 4, 2, 16), float("nan"), dtype=dtype)  # never read past the end of a request
    for request, parts in enumerate(
        zip(*(t[0].transpose(0, 1).split(keys) for t in (key, value)), strict=True)
    ):
        for place in range(keys[request] - 1):
            page = table[request, place // 4]
            pages[:, page, place % 4] = torch.stack([part[place] for part in parts])
    out = attended(
        [query, key[:, :, new], value[:, :, new]],
        lengths,
        block_table=table,
        k_cache=pages[0],
        v_cache=pages[1],
    )
    exact = by_definition(*(t.double() for t in (query, key, value)), lengths)
    assert_as_near(out, by_definition(query, key, value, lengths), exact)
    assert torch.equal(pages[0, 1, 0], key[0, :, 11]) and torch.equal(pages[1, 4, 0], value[0, :, -1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1, 4, 13, 23)}, "position_bias"),
        ({"cu_seq_lens_k": {"full_attention": starts([3])}}, "cu_seq_lens_k is a dict"),
        ({"cu_seq_lens_k": None}, "cu_seq_lens_k is a NoneType"),
    ],
)
def test_calls_that_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        attended(heads(torch.float32, LENGTHS), LENGTHS, **options)


def test_a_module_that_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        bk.enable_continuous_batching(nn.Linear(2, 2))
