"""A layer in training as two nodes of autograd over the CUDA library's calls, in the emulator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from emulated_library import stand_in
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.rule import assert_gradients, eager_of
from bigmodel_kernels.ops.linear import cuda_choice
from bigmodel_kernels.transformers import checks, training_layer, whole_layer

pytestmark = pytest.mark.usefixtures("library")
FORWARD = ("cuda_layer_begin", "cuda_layer_end_training")
BACKWARD = ("cuda_layer_end_backward", "cuda_layer_begin_backward")
NAMES = (
    *(*FORWARD, *BACKWARD, "cuda_linear", "cuda_norm"),
    *("cuda_attention", "cuda_attention_backward"),
)


ON_HOPPER = pytest.mark.parametrize("architecture", [90], indirect=True)


@pytest.fixture
def calls(library: Any, architecture: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return stand_in(monkeypatch, NAMES, cuda_choice.OWN)


def bert(dropout_p: float = 0.0, attention_p: float | None = None) -> Any:
    config = BertConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    config.hidden_dropout_prob = dropout_p
    config.attention_probs_dropout_prob = dropout_p if attention_p is None else attention_p
    return _in_training(BertModel(config, add_pooling_layer=False))


def gpt2(dropout_p: float = 0.0, attention_p: float | None = None) -> Any:
    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, use_cache=False)
    config.embd_pdrop = config.resid_pdrop = dropout_p
    config.attn_pdrop = dropout_p if attention_p is None else attention_p
    return _in_training(GPT2Model(config))


def _in_training(model: Any) -> Any:
    """Patched, with attention that is far from uniform, and biases and norms that are not all the same."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter.data, mean=float(is_norm_weight), std=0.2)
    model = model.bfloat16().train()
    bk.patch(model)
    return model


MODELS: list[Callable[..., Any]] = [bert, gpt2]
IDS = torch.arange(2 * 9).view(2, 9)
PADDED = (torch.arange(9) < torch.tensor([[9], [5]])).long()


def trained(model: Any, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of real tokens and the gradients, after seeds of their own."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    out = out if mask is None else out[mask.bool()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_layer, "held", lambda *args: None)


def equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("make", "form"), [(bert, "dense"), (bert, "packed"), (gpt2, "dense")])
def test_results_and_gradients(
    make: Any, form: str, dropout_p: float, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward has the bits of the steps, whose gradients are as near to float64, and so are eager's."""
    model, mask = make(dropout_p), PADDED if form == "packed" else None
    out, ours = trained(model, mask)
    assert [name for name in calls if name in FORWARD] == list(FORWARD)
    assert [name for name in calls if name in BACKWARD] == list(BACKWARD)
    in_steps(monkeypatch)
    with backends.use("native"):  # attention with dropout would be Triton's
        apart, theirs = trained(model, mask)
    assert torch.equal(out, apart)
    with backends.use("reference"):
        _, want = trained(copy.deepcopy(model).double(), mask)
    assert_gradients(ours, theirs, want)
    if not dropout_p:
        assert_gradients(ours, trained(eager_of(model), mask)[1], want)


@ON_HOPPER
@pytest.mark.parametrize("make", MODELS)
def test_what_is_frozen_has_no_gradient_and_the_rest_the_same(make: Any, calls: list[str]) -> None:
    model = make(0.2)
    _, whole = trained(model)
    names = [name for name, _ in model.named_parameters()]
    for part in (("bias",), ("weight",), ("embeddings", "wte", "wpe")):
        frozen = [name for name in names if any(some in name for some in part)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        _, some = trained(model)
        assert equal(some, {name: whole[name] for name in names if name not in frozen}), part
    # Only the last of the layer is trained: nothing before it is computed.
    last = names[-1]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == last)
    _, some = trained(model)
    assert equal(some, {last: whole[last]})


@ON_HOPPER
def test_a_hidden_layer_that_is_made_again(calls: list[str]) -> None:
    for make in MODELS:
        model = make(0.2)
        once, ours = trained(model)
        for module in model.modules():
            setattr(module, checks.RECOMPUTE, True)
        again, theirs = trained(model)
        assert torch.equal(once, again) and equal(ours, theirs)


class Seen:
    """Counts what hooks on saved tensors are given."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def pack(t: Tensor) -> Tensor:
            self.count += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield


@ON_HOPPER
@pytest.mark.parametrize(
    "how", ["on the CPU", "hooks", "checkpoint", "reentrant checkpoint", "autocast behind"]
)
def test_what_is_saved_may_be_elsewhere(how: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2(0.2) if how == "checkpoint" else bert(0.2)
    out, ours = trained(model)
    around: AbstractContextManager[Any] = nullcontext()
    seen = Seen()
    if how == "on the CPU":
        around = save_on_cpu()
    elif how == "hooks":
        around = seen.hooks()
    elif how == "autocast behind":
        run = Tensor.backward

        def backward(loss: Tensor) -> None:
            with torch.autocast("cpu", torch.float16):
                run(loss)

        monkeypatch.setattr(Tensor, "backward", backward)
    else:
        reentrant = how == "reentrant checkpoint"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    with around:
        again, theirs = trained(model)
    assert torch.equal(out, again) or how == "reentrant checkpoint"  # whose first pass is in steps
    assert equal(ours, theirs)
    assert seen.count > 20 or how != "hooks"


@ON_HOPPER
def test_a_second_derivative_is_refused(calls: list[str]) -> None:
    model = bert()
    out = model(input_ids=IDS).last_hidden_state
    weight = model.encoder.layer[0].intermediate.dense.weight
    (first,) = torch.autograd.grad(out.double().square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        first.double().square().sum().backward()


@ON_HOPPER
def test_long_rows_with_dropout_go_on_in_steps(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention with padding does: the first node is there, and the gradients come back through it."""
    model = bert(0.0, attention_p=0.2)
    out, whole = trained(model)
    monkeypatch.setattr(training_layer, "MOST_KEYS_WITH_DROPOUT", 8)
    calls.clear()
    again, some = trained(model)
    assert "cuda_layer_end_training" not in calls and "cuda_layer_begin_backward" in calls
    assert whole.keys() == some.keys()
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        assert torch.allclose(gradient, some[name], rtol=0.1, atol=0.01 * largest), name
    assert torch.allclose(out, again, atol=0.1)


# ------------------------------------------------------------------------------------------------------------
# the raw operators


def _half(value: Any) -> Any:
    if isinstance(value, list):
        return [_half(v) for v in value]
    return value.half() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _arguments(changes: dict[str, Any], **given: Any) -> dict[str, Any]:
    return {name: _half(value) for name, value in (given | changes).items()}


def begin_backward(**changes: Any) -> dict[str, Any]:
    """Arguments for x (5, 16) and two weights."""
    return _arguments(
        changes, grad=torch.randn(5, 40), x=None, states=torch.randn(5, 16), norm_weight=None, norm_eps=1e-5,
        weights=[torch.randn(24, 16), torch.randn(16, 16)], weight_layout="linear",
        needs=[True, False, False, True, True, True, True],
    )  # fmt: skip


def _attention() -> dict[str, Any]:
    """Of two heads of 8, and no dropout anywhere."""
    return dict(
        **{name: torch.randn(2, 2, 3, 8) for name in ("query", "key", "value")},
        lengths=None, longest=0, softmax_scale=0.5, is_causal=False, window_left=-1, window_right=-1,
        attention_seed=None, attention_p=0.0, context_seed=None, context_p=0.0, ffn_seed=None, ffn_p=0.0,
    )  # fmt: skip


def end_training(**changes: Any) -> dict[str, Any]:
    """Arguments for x (2 * 3, 16) and a feed-forward block of 24."""
    return _arguments(
        changes, x=torch.randn(6, 16), **_attention(),
        w_context=torch.randn(16, 16), b_context=torch.randn(16),
        attention_norm_weight=None, attention_norm_bias=None, attention_norm_eps=1e-5,
        w_in=torch.randn(24, 16), b_in=None, w_out=torch.randn(16, 24), b_out=torch.randn(16),
        weight_layout="linear", activation="gelu", norm_position="pre",
        norm_weight=torch.ones(16), norm_bias=None, norm_eps=1e-5, by_torch=[False, False], recompute=False,
    )  # fmt: skip


def end_backward(**changes: Any) -> dict[str, Any]:
    """Arguments for the same."""
    found = _arguments(
        changes, grad=torch.randn(6, 16), **_attention(), context=torch.randn(6, 16),
        logsumexp=torch.randn(2, 2, 3).double(), sum=torch.randn(6, 16), normalised=torch.randn(6, 16),
        preactivation=torch.randn(6, 24), ffn_sum=None, w_context=torch.randn(16, 16),
        attention_norm_weight=None, attention_norm_eps=1e-5, w_in=torch.randn(24, 16), b_in=None,
        w_out=torch.randn(16, 24), weight_layout="linear", activation="gelu", norm_position="pre",
        norm_weight=torch.ones(16), norm_eps=1e-5, needs=[True] * 6 + [False] * 2 + [True] * 6,
    )  # fmt: skip
    return found | {"logsumexp": found["logsumexp"].float()}


def run(arguments: Callable[..., dict[str, Any]], **changes: Any) -> list[Tensor]:
    operator = getattr(torch.ops.bigmodel_emulator, f"cuda_layer_{arguments.__name__}")
    return list(operator(**arguments(**changes)))


RAW = (begin_backward, end_training, end_backward)
SEED = torch.tensor(3)
BAD: list[tuple[Callable[..., dict[str, Any]], dict[str, Any], str]] = [
    (begin_backward, {"needs": [True]}, "must hold 7 values, not 1"),
    (begin_backward, {"weights": [], "needs": [True] * 3}, "weights: 0 tensors"),
    (begin_backward, {"grad": torch.randn(5, 32)}, r"grad: shape \(5, 32\) must have 40 columns"),
    (begin_backward, {"grad": torch.randn(40)}, "must have 2 dimensions"),
    (begin_backward, {"states": None}, "states: must be given"),
    (begin_backward, {"states": torch.randn(4, 16)}, r"states: shape \(4, 16\) does not fit"),
    (begin_backward, {"x": torch.randn(5, 16)}, "x: must be given with norm_weight, and only with it"),
    (
        begin_backward,
        {"x": torch.randn(4, 16), "norm_weight": torch.randn(16)},
        r"grad: shape \(5, 16\) must be \(4, 16\)",
    ),
    (begin_backward, {"weight_layout": "rows"}, "is unknown"),
    (end_training, {"by_torch": [True]}, "must hold 2 values, not 1"),
    (end_training, {"by_torch": [True] * 2, "ffn_p": 0.5, "ffn_seed": SEED}, "must be false with dropout"),
    (end_training, {"attention_seed": SEED}, "dropout_seed: must be given with dropout_p, and only with it"),
    (end_training, {"norm_position": "post"}, "attention_norm_weight: must be given"),
    (end_training, {"x": torch.randn(5, 16)}, r"residual: shape \(5, 16\) must be \(6, 16\)"),
    (end_backward, {"needs": [True]}, "must hold 14 values, not 1"),
    (end_backward, {"needs": [True] * 14}, "there is no norm behind attention"),
    (end_backward, {"norm_position": "around"}, "'around' must be 'pre' or 'post'"),
    (end_backward, {"norm_position": "post"}, "attention_norm_weight: must be given"),
    (end_backward, {"ffn_sum": torch.randn(6, 16)}, "ffn_sum: must be given"),
    (end_backward, {"grad": torch.randn(5, 16)}, r"must be \(5, 24\)"),
    (end_backward, {"sum": torch.randn(6, 8)}, r"shape \(6, 16\) must be \(6, 8\)"),
    (
        end_backward,
        {"preactivation": torch.randn(6, 16)},
        r"preactivation: shape \(6, 16\) must be \(6, 24\)",
    ),
    (end_backward, {"context_p": 0.5}, "dropout_seed: must be given with dropout_p"),
    (end_backward, {"activation": "tanh"}, "'tanh' is unknown"),
    (end_backward, {"logsumexp": torch.randn(2, 2, 4)}, "logsumexp: shape"),
    (end_backward, {"key": torch.randn(2, 2, 3, 16)}, "key: head_dim 16"),
    (end_backward, {"context": torch.randn(4, 16)}, r"context: shape \(4, 16\) does not fit"),
    (end_backward, {"normalised": torch.randn(5, 16)}, r"normalised: shape \(5, 16\) does not fit"),
    (
        end_backward,
        {"w_context": torch.randn(16, 24)},
        r"w_context: shape \(6, 24\) does not fit query's",
    ),
    (
        end_backward,
        {"w_in": torch.randn(16, 16)},
        r"w_in: shape \(16, 16\) does not fit: \(6, 24\) times \(16, 16\)",
    ),
]


@pytest.mark.parametrize(("arguments", "change", "words"), BAD)
def test_bad_input_is_refused(
    arguments: Callable[..., dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(arguments, **change)


@pytest.mark.parametrize("arguments", RAW)
def test_nothing_is_written_to_and_no_result_is_an_argument(
    arguments: Callable[..., dict[str, Any]],
) -> None:
    """As the schemas say."""
    operator = getattr(torch.ops.bigmodel_emulator, f"cuda_layer_{arguments.__name__}").default
    torch.library.opcheck(operator, (), arguments(), test_utils="test_schema")


def test_gradients_of_no_rows() -> None:
    empty = {name: torch.randn(0, 16) for name in ("grad", "context", "sum", "normalised")}
    empty |= {name: torch.randn(0, 2, 3, 8) for name in ("query", "key", "value")}
    found = run(end_backward, **empty, preactivation=torch.randn(0, 24), logsumexp=torch.randn(0, 2, 3))
    for mine, other in zip(found, run(end_backward), strict=True):
        assert mine.shape[1:] == other.shape[1:] and not mine.any()
    found = run(begin_backward, grad=torch.randn(0, 40), states=torch.randn(0, 16))
    sizes = [[0, 16], [0], [0], [24, 16], [16, 16], [24], [16]]
    assert [list(t.shape) for t in found] == sizes and not any(t.any() for t in found)
