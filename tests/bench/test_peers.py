"""Other runtimes as contenders: what they are given, what they answer, and why one is left out. The runtimes
themselves are tested where they are installed.
"""

from __future__ import annotations

import io
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console

from bigmodel_kernels.bench import (
    Case,
    Contender,
    Prepared,
    Setting,
    Stage,
    Suite,
    document,
    machine,
    suite,
    tables,
)
from bigmodel_kernels.bench.timing import LeftOut, Timing, measure

transformers = pytest.importorskip("transformers")
from bigmodel_kernels.bench import peers, texts  # noqa: E402

PACKAGES = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "ctranslate2": ("ctranslate2",),
}


def bert(dtype: torch.dtype = torch.float32) -> Any:
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.BertModel._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def gpt2(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    """Random weights whose head is the embedding repeat one token for ever; these have something to say."""
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=2, vocab_size=300, initializer_range=0.3, tie_word_embeddings=tied
    )
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def ragged(batch: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.linspace(longest, 2, batch).long()
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return torch.randint(0, 300, (batch, longest)) * mask, mask


def built(maker: Callable[[], Any]) -> Any:
    with peers._plain():
        return maker()


def all_builders() -> dict[str, dict[str, Callable[[], Any]]]:
    return {
        "encoders": peers.encoders(bert(), "float32"),
        "prefills": peers.prefills(gpt2(), "float32"),
        "generators": peers.generators(gpt2(), "float32", 4),
        "attentions": peers.attentions(2, 32, False, "float32"),
    }


# Without any runtime


def test_every_kind_of_work_has_a_builder_for_every_runtime() -> None:
    for builders in all_builders().values():
        assert tuple(builders) == peers.NAMES


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_runtime_that_is_not_installed_is_left_out_with_the_command_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES[name]:
        monkeypatch.setitem(sys.modules, package, None)
    for kind, builders in all_builders().items():
        contenders = peers.contenders(Setting(), {name: builders[name]}, (kind,), torch.zeros(1, 2).long())
        left_out = measure(contenders, "cpu", 0.01).left_out
        assert "pip install 'bigmodel_kernels[bench]'" in left_out[name], kind


class _Openvino(types.SimpleNamespace):
    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]


@pytest.mark.parametrize(
    ("name", "fake", "words"),
    [
        ("onnxruntime", types.SimpleNamespace(), "no kernels for bfloat16"),
        ("openvino", _Openvino(), "no bfloat16 on this CPU, only FP32, INT8"),
        (
            "ctranslate2",
            types.SimpleNamespace(get_supported_compute_types=lambda device: {"int8", "float32"}),
            "does not compute in bfloat16 on this CPU, only in float32, int8",
        ),
    ],
)
def test_a_runtime_without_bfloat16_says_so(
    name: str, fake: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES[name]:
        monkeypatch.setitem(sys.modules, package, fake)
    for builders in (peers.encoders(bert(), "bfloat16"), peers.generators(gpt2(), "bfloat16", 4)):
        with pytest.raises(LeftOut, match=words):
            builders[name]()


def test_attention_alone_is_not_for_ctranslate2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", types.SimpleNamespace())
    with pytest.raises(LeftOut, match="whole models only"):
        peers.attentions(2, 32, True, "float32")["ctranslate2"]()


def test_cases_of_a_key_share_what_is_built_and_nothing_is_built_before_it_is_called() -> None:
    built: list[str] = []

    def build() -> Any:
        built.append("once")
        return lambda x: lambda: x + 1

    setting = Setting()
    cases = [
        peers.contenders(setting, {"runtime": build}, key, torch.ones(2))
        for key in ((64,), (64,), (32,), (32,))
    ]
    assert built == []
    for contenders in cases[:2]:
        assert contenders[0].run().tolist() == [2, 2] and contenders[0].optional
    assert len(built) == 1
    cases[2][0].run()
    assert len(built) == 2
    setting.shared.clear()
    cases[3][0].run()
    assert len(built) == 3


def test_of_each_runtime_one_build_is_held() -> None:
    class Session:
        pass

    shared = suite.Shared()
    first = weakref.ref(shared.get("one", 64, Session))
    other = weakref.ref(shared.get("two", 64, Session))
    assert first() is not None
    shared.get("one", 32, lambda: Session() if first() is None else None)
    assert first() is None and other() is not None
    shared.clear()
    assert other() is None


def test_what_cannot_be_built_is_tried_once_and_keeps_its_reason() -> None:
    tries: list[int] = []

    def build() -> Any:
        tries.append(1)
        raise KeyError("no such operator")

    setting = Setting()
    for _ in range(2):
        contenders = peers.contenders(setting, {"runtime": build}, (), torch.ones(2))
        assert measure(contenders, "cpu", 0.01).left_out == {"runtime": "KeyError: 'no such operator'"}
    assert len(tries) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_runtime_gets_a_copy_in_float32_with_the_same_numbers(dtype: torch.dtype) -> None:
    with torch.inference_mode():  # as the suites build their models
        model = gpt2(dtype, tied=True)
    with torch.inference_mode(), peers._plain():
        twin = peers._twin(model, "eager")
    assert not any(t.is_inference() for t in [*twin.parameters(), *twin.buffers()])
    assert twin.lm_head.weight is twin.transformer.wte.weight
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert theirs.dtype == torch.float32 and ours.dtype == dtype
        assert torch.equal(ours.float(), theirs) and ours.data_ptr() != theirs.data_ptr()
    assert model.config._attn_implementation == "sdpa" and twin.config._attn_implementation == "eager"


def test_texts_without_padding() -> None:
    ids, mask = torch.tensor([[5, 0, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert peers.without_padding(ids, mask) == [[5, 0, 7], [8]]


def test_steps_with_keys_and_values_give_the_text_of_transformers() -> None:
    model = gpt2()
    ids, new = torch.randint(0, 300, (3, 7)), 12
    step_of, states = peers._Step(model), [torch.zeros(3, 2, 0, 32)] * 4

    def step(tokens: Any, seen: int) -> Any:
        given = peers._step_inputs(tokens, seen)
        assert list(given) == peers._step_names(model)[0]
        logits, *states[:] = step_of(*map(torch.from_numpy, given.values()), *states)
        return logits.numpy()

    with torch.no_grad():
        text = peers._greedy(step, ids, new)
    assert torch.equal(text, texts.greedy(model, ids, new))
    assert len(set(text[0, 7:].tolist())) > 4  # or the comparison says little


def test_the_inputs_of_a_step_end_with_the_last_token() -> None:
    given = peers._step_inputs(numpy.zeros((2, 3), dtype=numpy.int64), 8)
    assert given["attention_mask"].shape == (2, 8)
    assert given["position_ids"].tolist() == [[5, 6, 7]] * 2


def _timing(seconds: float) -> Timing:
    return Timing(seconds, seconds, seconds, seconds, 1, 1)


CALIBRATION = machine.Calibration({"float32": 100.0}, {"float32": _timing(1.0)}, 10.0, _timing(1.0))


def row_of(*contenders: Contender, dtype: str = "float32", result: Any = None) -> dict[str, Any]:
    expected = torch.tensor([1.0, -4.0]) if result is None else result

    def build(case: Case, setting: Setting) -> Prepared:
        return Prepared(
            [Contender("sdpa", lambda: expected), Contender("bigmodel", lambda: expected), *contenders],
            "sdpa",
            [Stage(200.0, 1.0)],
        )

    case = Case("toy", dtype, {})
    return suite.run_case(Suite("toy", build, (case,), (case,)), case, Setting(), CALIBRATION, 0.01)


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        (torch.tensor([1.0, -4.0]) + 0.125, 0.125),
        (torch.tensor([1.0, float("nan")]), None),
        (torch.tensor([1.0, float("inf")]), None),
        (torch.tensor([1.0]), None),
    ],
)
def test_the_time_of_another_result_does_not_count(theirs: torch.Tensor, difference: float | None) -> None:
    row = row_of(Contender("runtime", lambda: theirs, optional=True))
    assert row["disagree"] == ["runtime"] and "runtime" in row["times"] and "runtime" not in row["speedup"]
    assert row["differences"].get("runtime") == difference
    assert row["max_difference"] == 0.0 and "bigmodel" in row["speedup"]


def test_roundings_of_the_dtype_are_no_other_result() -> None:
    near = torch.tensor([1.0, -4.0]) + 1e-3
    assert row_of(Contender("runtime", lambda: near))["disagree"] == []
    far = torch.tensor([1.0, -4.0]) + 0.1
    assert row_of(Contender("runtime", lambda: far))["disagree"] == ["runtime"]
    assert row_of(Contender("runtime", lambda: far), dtype="bfloat16")["disagree"] == []


def test_tokens_must_be_the_same() -> None:
    tokens = torch.tensor([[1000, 2000]])
    assert row_of(Contender("runtime", lambda: tokens.clone()), result=tokens)["disagree"] == []
    assert row_of(Contender("runtime", lambda: tokens + 1), result=tokens)["disagree"] == ["runtime"]


def test_part_of_the_peak_counts_every_contender() -> None:
    row = row_of()
    for name, timing in row["times"].items():
        assert row["of_peak"][name] == pytest.approx(200.0 / timing["median_s"] / 100.0)


def test_the_table_says_who_is_left_out_and_who_computes_something_else() -> None:
    def missing() -> Any:
        raise LeftOut("it is not here")

    row = row_of(
        Contender("openvino", lambda: torch.tensor([1.0, -3.0]), optional=True),
        Contender("onnxruntime", missing, optional=True),
    )
    calibration = CALIBRATION.to_dict()
    whole = {
        "schema": 1,
        "created": "now",
        "quick": True,
        "peers": True,
        "budget_s": 0.01,
        "machine": {**machine.facts("cpu"), "load_at_start": None, "other_load": None},
        "calibration": {"start": calibration, "end": calibration},
        "trust": machine.Trust(True, []).to_dict(),
        "rows": [row],
    }
    document.check(whole)
    text = io.StringIO()
    tables.show(whole, Console(file=text, width=200))
    shown = text.getvalue()
    assert "left out: toy onnxruntime: it is not here" in shown
    assert "differs by 1.0e+00" in shown
    assert "toy, toy float32: openvino computes something else than sdpa" in shown
    header = next(line for line in shown.splitlines() if line.startswith("case"))
    assert header.split() == [
        "case",
        "sdpa",
        "onnxruntime",
        "openvino",
        "ctranslate2",
        "bigmodel",
        "difference",
    ]


@pytest.mark.parametrize("name", ["bert", "gpt2", "attention"])
def test_no_runtime_is_dropped_without_a_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (package for packages in PACKAGES.values() for package in packages):
        monkeypatch.setitem(sys.modules, package, None)
    found = suite.run([suite.load(name)], Setting(peers=True), quick=True, budget_s=0.01)
    document.check(found)
    assert found["peers"]
    for row in found["rows"]:
        assert set(row["left_out"]) == set(peers.NAMES)
        assert {"eager", "sdpa", "bigmodel"} <= set(row["times"]) and row["disagree"] == []


# Each runtime


def installed(name: str) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", peers.NAMES)
def test_an_encoder_gives_the_hidden_states_of_transformers(name: str) -> None:
    installed(name)
    model = bert()
    bind = built(peers.encoders(model, "float32")[name])
    for shape in ((3, 11), (1, 6), (5, 40)):
        ids, mask = ragged(*shape)
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
            found = bind(ids, mask)()
        assert found.shape == expected.shape
        assert (found - expected)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_prefill_gives_the_logits_of_transformers(name: str) -> None:
    installed(name)
    model = gpt2()
    bind = built(peers.prefills(model, "float32")[name])
    for shape in ((3, 11), (1, 40)):
        ids = torch.randint(0, 300, shape)
        with torch.inference_mode():
            expected, found = model(ids).logits, bind(ids)()
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_generator_gives_the_text_of_transformers(name: str) -> None:
    installed(name)
    model, new = gpt2(), 12
    bind = built(peers.generators(model, "float32", new)[name])
    for shape in ((3, 7), (1, 5), (3, 7)):
        ids = torch.randint(0, 300, shape)
        expected = texts.greedy(model, ids, new)
        assert len(set(expected[0, shape[1] :].tolist())) > 4
        generate = bind(ids)
        assert torch.equal(generate(), expected)
        assert torch.equal(generate(), expected)  # nothing is left of the first


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_attention_alone_gives_what_torch_gives(name: str, causal: bool) -> None:
    installed(name)
    bind = built(peers.attentions(2, 32, causal, "float32")[name])
    for batch, length in ((2, 17), (1, 64)):
        # Views of one projection, as the suite has them.
        query, key, value = torch.randn(batch, length, 3, 2, 32).permute(2, 0, 3, 1, 4)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        assert (bind(query, key, value)() - expected).abs().max() < 1e-5


def test_openvino_in_bfloat16() -> None:
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    model = bert(torch.bfloat16)
    ids, mask = ragged(3, 11)
    query, key, value = torch.randn(3, 2, 2, 17, 32, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].float()
        found = built(peers.encoders(model, "bfloat16")["openvino"])(ids, mask)()[mask.bool()].float()
        assert (found - expected).abs().max() < 2**-5 * expected.abs().max()
        right = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
        found = built(peers.attentions(2, 32, False, "bfloat16")["openvino"])(query, key, value)().float()
        assert (found - right).abs().max() < 2**-5
