"""A layer in two calls of the CUDA library, in the emulator: the bits of the calls that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from emulated_library import stand_in
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.rule import assert_as_near
from bigmodel_kernels.ops import cuda_library
from bigmodel_kernels.ops.linear import cuda_choice
from bigmodel_kernels.transformers import whole_layer

pytestmark = pytest.mark.usefixtures("library")
NAMES = ("cuda_linear", "cuda_norm", "cuda_attention", "cuda_layer_begin", "cuda_layer_end")


@pytest.fixture(params=[cuda_choice.OWN, cuda_choice.TORCH], ids=["own", "torch"])
def product(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def calls(library: Any, architecture: int, product: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that run, of the emulator where the CUDA library would be, on tensors that seem to be on
    a GPU that it was measured on.
    """
    return stand_in(monkeypatch, NAMES, product)


def bert() -> Any:
    config = BertConfig(
        vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    return BertModel(config, add_pooling_layer=False).bfloat16().eval()


def gpt2() -> Any:
    config = GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=2)
    return GPT2Model._from_config(config, dtype=torch.bfloat16).eval()


INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "dense": {"input_ids": torch.arange(2 * 9).view(2, 9)},
    "padded": {
        "input_ids": torch.arange(2 * 9).view(2, 9),
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [5]])).long(),
    },
}


@pytest.mark.parametrize("form", ["dense", "padded"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_the_bits_of_the_separate_calls(
    make: Any, form: str, product: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make(), INPUTS[form]
    exact = copy.deepcopy(model).double()
    bk.patch(model)
    with torch.no_grad():
        out = model(**inputs).last_hidden_state
        together = list(calls)
        monkeypatch.setattr(whole_layer, "held", lambda *args: None)
        apart = model(**inputs).last_hidden_state
        want, eager = exact(**inputs).last_hidden_state, copy.deepcopy(exact).bfloat16()
    real = inputs.get("attention_mask", torch.ones(2, 9)).bool()
    if product == cuda_choice.OWN:  # torch's is asked for more of the products apart
        assert torch.equal(out[real], apart[real])
    if make is gpt2 and form == "padded":  # with key padding Triton's attention comes first: no second call
        assert together.count("cuda_layer_begin") == 2 and "cuda_layer_end" not in together
    else:
        assert together == ["cuda_layer_begin", "cuda_layer_end"] * 2
    assert_as_near(out[real], eager(**inputs).last_hidden_state[real], want[real])


@pytest.mark.parametrize(
    "change",
    ["gate", "deterministic", "frozen", "float32", "odd width", "dropout", "forced"],
    ids=lambda c: c.replace(" ", "_"),
)
def test_what_the_separate_calls_do(change: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(
        vocab_size=90, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96
    )
    if change == "odd width":
        config.intermediate_size = 92
    model = BertModel._from_config(config, dtype=torch.float32 if change == "float32" else torch.bfloat16)
    model.train(change == "dropout")
    bk.patch(model)
    layer = model.encoder.layer[0]
    parts = layer.parts(layer.gather(), model.dtype)
    if change == "gate":
        parts = parts._replace(ffn=parts.ffn._replace(w_gate=parts.ffn.w_in))
    x = torch.randn(3, 64, dtype=model.dtype)
    model.requires_grad_(change != "frozen")
    if change == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with (
        torch.set_grad_enabled(change in ("deterministic", "frozen")),
        backends.use("triton" if change == "forced" else None),
    ):
        if change == "float32":
            monkeypatch.setattr(cuda_library, "lacking", lambda x: "it has no float32")
        assert whole_layer.held(x, parts, "linear") is None
        assert not calls


def test_wrong_arguments_are_refused(calls: list[str]) -> None:
    begin = torch.ops.bigmodel_emulator.cuda_layer_begin.default
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    begin(x, None, None, 1e-5, [weight], [], "linear")
    for bad, reason in (
        ({"x": x.float()}, "float16 or bfloat16"),
        ({"x": x[:, :8]}, "takes 16 features"),
        ({"weights": []}, "1 to 4 are allowed"),
        ({"weight_layout": "rows"}, "is unknown"),
        ({"norm_weight": weight[0, :8]}, r"must be \(16,\)"),
    ):
        call = {
            "x": x,
            "norm_weight": None,
            "norm_bias": None,
            "norm_eps": 1e-5,
            "weights": [weight],
            "biases": [],
        }
        with pytest.raises(RuntimeError, match=reason):
            begin(**{**call, "weight_layout": "linear", **bad})
