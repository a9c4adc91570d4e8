"""Training forms and gradients of the compiled library, called as they are registered, for every instruction
set: against autograd in float64, no further from it than autograd in the dtype under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_kernels import _native, verify
from bigmodel_kernels.ops.philox import keep_elements

if not _native.available():
    pytest.skip(f"needs the compiled library: {_native.reason()}", allow_module_level=True)

native = torch.ops.bigmodel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor(0x1234_5678_9ABC_DEF)
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Inputs:
    """Fresh random tensors of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale + shift).to(self.dtype)

    def weight(self, k: int, n: int, layout: str = "linear") -> Tensor:
        weight = self(n, k, scale=k**-0.5)
        return weight if layout == "linear" else weight.t().contiguous()


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, offset: float = 0.0) -> Tensor:
    if kind == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    return y if weight is None else y * (weight + offset)


def drop(x: Tensor, p: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows * keep_elements(SEED, p, *rows.shape, x.dtype, x.device)).reshape(x.shape) if p else x


def judge(
    formula: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    grad: Tensor,
    out: Tensor | None,
    gradients: Sequence[Tensor],
) -> None:
    """The output (None: a single number, which this rule has nothing to say on) and the gradients of all
    tensors, against the formula in float64 and in the dtype itself."""

    def autograd(dtype: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors]
        y = formula(*leaves)
        given = [t for t in leaves if t is not None]
        results = torch.autograd.grad(y, given, grad.to(dtype))
        return [*results] if out is None else [y.detach(), *results]

    present = [g for g, t in zip(gradients, tensors, strict=True) if t is not None]
    absent = [g for g, t in zip(gradients, tensors, strict=True) if t is None]
    assert all(g.numel() == 0 for g in absent)
    results = present if out is None else [out, *present]
    references = zip(results, autograd(results[0].dtype), autograd(torch.float64), strict=True)
    for i, (got, eager, ref) in enumerate(references):
        verdict = verify.compare(got, eager, ref, "forward" if got is out else "gradient")
        assert verdict.ok, f"result {i}: {verdict}"


LINEAR_CASES = [
    # rows, in, outs, activation, norm, residual, dropout
    (1, 7, (3,), "relu", None, False, 0.0),
    (40, 19, (5, 33), "gelu", "layer_norm", True, 0.25),
    (130, 129, (100, 30, 17), "gelu_tanh", None, True, 0.1),
    (300, 64, (48,), "silu", "rms_norm", False, 0.0),
    (517, 48, (64,), "none", None, False, 0.0),
    (65, 96, (40,), "quick_gelu", "layer_norm", False, 0.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
def test_linear(isa: str, dtype: torch.dtype, layout: str, case: tuple) -> None:
    rows, k, outs, activation, kind, has_residual, p = case
    make, n = Inputs(dtype), sum(outs)
    x, weights, biases = make(rows, k), [make.weight(k, o, layout) for o in outs], [make(o) for o in outs]
    residual = make(rows, n) if has_residual else None
    norm_weight = make(n, scale=0.1, shift=1.0) if kind else None
    norm_bias = make(n) if kind == "layer_norm" else None
    grad = make(rows, n)
    options = {"weight_layout": layout, "activation": activation, "dropout_p": p}
    options["norm_kind"] = kind or "layer_norm"
    tensors = (x, weights, biases, residual, norm_weight, norm_bias, SEED if p else None)
    order = (x, residual, norm_weight, norm_bias, *weights, *biases)
    needs = [t is not None for t in order]
    with verify.poisoned():
        out, preactivation, prenorm = native.cpu_linear_training(*tensors, **options)
        gradients = native.cpu_linear_backward(grad, *tensors, preactivation, prenorm, **options, needs=needs)
        recomputed = native.cpu_linear_backward(grad, *tensors, None, None, **options, needs=needs)
        packed = native.cpu_linear_training(
            x, [native.cpu_pack_weight(weights, layout)], *tensors[2:], **options
        )
    assert all(torch.equal(a, b) for a, b in zip(packed, (out, preactivation, prenorm), strict=True))
    assert (preactivation.numel() == 0) == (activation == "none")
    assert (prenorm.numel() == 0) == (kind is None)

    def formula(x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, *rest: Tensor) -> Tensor:
        weights, biases = rest[: len(outs)], rest[len(outs) :]
        w = torch.cat([w.t() if layout == "conv1d" else w for w in weights])
        y = drop(ACTIVATIONS[activation](F.linear(x, w, torch.cat(biases))), p)
        y = y if residual is None else y + residual
        return norm(y, norm_weight, norm_bias, kind) if kind else y

    judge(formula, order, grad, out, gradients)
    judge(formula, order, grad, out, recomputed)


FEED_FORWARD_CASES = [
    # rows, hidden, inner, columns, activation, norm position, norm kind, gated, residual, dropout
    (1, 16, 40, 17, "relu", "none", "layer_norm", False, False, 0.0),
    (37, 19, 50, 33, "gelu", "post", "layer_norm", False, True, 0.3),
    (300, 64, 100, 64, "silu", "pre", "rms_norm", True, True, 0.0),
    (129, 33, 65, 48, "gelu_tanh", "post", "rms_norm", True, False, 0.2),
    (517, 48, 96, 48, "quick_gelu", "pre", "layer_norm", False, False, 0.1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("case", FEED_FORWARD_CASES, ids=str)
def test_feed_forward(isa: str, dtype: torch.dtype, layout: str, case: tuple) -> None:
    rows, hidden, inner, columns, activation, position, kind, gated, has_residual, p = case
    make, normed = Inputs(dtype), hidden if position == "pre" else columns
    x, grad = make(rows, hidden), make(rows, columns)
    w_in, b_in = make.weight(hidden, inner, layout), make(inner)
    w_out, b_out = make.weight(inner, columns, layout), make(columns)
    w_gate, b_gate = (make.weight(hidden, inner, layout), make(inner)) if gated else (None, None)
    residual = make(rows, columns) if has_residual else None
    norm_weight = None if position == "none" else make(normed, scale=0.1, shift=1.0)
    norm_bias = None if position == "none" or kind == "rms_norm" else make(normed)
    options = {"activation": activation, "weight_layout": layout, "norm_position": position}
    options |= {"norm_kind": kind, "dropout_p": p}
    order = (x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias, w_gate, b_gate)
    tensors = (*order, SEED if p else None)
    needs = [t is not None for t in order]
    with verify.poisoned():
        out, *saved = native.cpu_feed_forward_training(*tensors, **options)
        light, *kept = native.cpu_feed_forward_training(*tensors, **options, recompute=True)
        gradients = native.cpu_feed_forward_backward(grad, *tensors, *saved, **options, needs=needs)
        recomputed = native.cpu_feed_forward_backward(
            grad, *tensors, None, None, None, **options, needs=needs
        )
        plain = native.cpu_feed_forward(
            x, native.cpu_pack_weight([w_in], layout), b_in, native.cpu_pack_weight([w_out], layout), b_out,
            activation, residual, position, norm_weight, norm_bias, 1e-5,
            native.cpu_pack_weight([w_gate], layout) if gated else None, b_gate, tensors[-1],
            norm_kind=kind, dropout_p=p,
        )  # fmt: skip
    assert torch.equal(out, light) and torch.equal(out, plain)
    assert kept[0].numel() == kept[1].numel() == 0 and torch.equal(kept[2], saved[2])

    def formula(*tensors: Tensor) -> Tensor:
        x, w_in, b_in, w_out, b_out, residual, norm_weight, norm_bias, w_gate, b_gate = tensors
        if layout == "conv1d":
            w_in, w_out, w_gate = (None if w is None else w.t() for w in (w_in, w_out, w_gate))
        rows = norm(x, norm_weight, norm_bias, kind) if position == "pre" else x
        z = F.linear(rows, w_in, b_in)
        h = (
            ACTIVATIONS[activation](F.linear(rows, w_gate, b_gate)) * z
            if gated
            else ACTIVATIONS[activation](z)
        )
        y = drop(F.linear(h, w_out, b_out), p)
        y = y if residual is None else y + residual
        return norm(y, norm_weight, norm_bias, kind) if position == "post" else y

    judge(formula, order, grad, out, gradients)
    judge(formula, order, grad, out, recomputed)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "none"])
def test_derivatives_over_the_whole_range(isa: str, activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-3e38, -1e5, -90.0, 90.0, 1e5, 3e38])])[
        :, None
    ]
    one = torch.ones(1, 1)
    (dx, *_) = native.cpu_linear_backward(
        torch.ones_like(x), x, [one], [], None, None, None, None, x, None, activation=activation,
        needs=[True, False, False, False, False],
    )  # fmt: skip
    leaf = x.double().requires_grad_()
    inside = ACTIVATIONS[activation](leaf)
    expected = torch.autograd.grad(inside.sum(), leaf)[0]
    expected = (
        expected.nan_to_num(0.0) if activation == "gelu_tanh" else expected
    )  # inf * 0 in float64's formula
    assert dx.isfinite().all()
    torch.testing.assert_close(dx[:-6].double(), expected[:-6], rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(dx[-6:, 0].double(), (x[-6:, 0] > 0).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.3e38])
def test_gradients_of_extreme_numbers(isa: str, value: float, where: str, made: bool, layout: str) -> None:
    """One such number changes the rows or columns that it is in, as float32 has it, and no other; whether the
    gradient before the activation is the one that was given or has to be made.
    """
    generator = torch.Generator().manual_seed(3)
    dtype, features = torch.bfloat16, (40, 37)
    tensors = {
        "x": torch.rand(70, 50, generator=generator) + 0.5,
        "weight": torch.rand(sum(features), 50, generator=generator) * 1e-2 + 1e-3,
        "grad": torch.rand(70, sum(features), generator=generator) * 1e-2 + 1e-3,
    }
    tensors[where][41, 21] = value
    x, weight, grad = (tensors[name].to(dtype) for name in ("x", "weight", "grad"))
    weights = [w if layout == "linear" else w.t().contiguous() for w in weight.split(features)]
    activation = "relu" if made else "none"
    dx, _, _, _, *dw = native.cpu_linear_backward(
        grad, x, weights, [], None, None, None, None, torch.ones_like(grad) if made else None, None,
        activation=activation, weight_layout=layout, needs=[True, False, False, False, True, True],
    )  # fmt: skip
    x, weight, grad = x.double(), weight.double(), grad.double()
    largest = torch.finfo(dtype).max  # beyond it float32's sums are as good as infinite
    assert_close = lambda a, b: torch.testing.assert_close(  # noqa: E731
        a.double().clamp(-largest, largest), b.clamp(-largest, largest), rtol=1e-2, atol=1e-3, equal_nan=True
    )
    assert_close(dx, grad @ weight)
    for part, part_grad in zip(dw, grad.split(features, 1), strict=True):
        expected = part_grad.t() @ x
        assert_close(part, expected if layout == "linear" else expected.t())


def test_only_what_is_needed_is_made_and_is_the_same() -> None:
    make = Inputs(torch.float32)
    x, w_in, w_out, residual, grad = (
        make(70, 24),
        make.weight(24, 40),
        make.weight(40, 24),
        make(70, 24),
        make(70, 24),
    )
    b_in, b_out, weight, bias = make(40), make(24), make(24), make(24)
    tensors = (x, w_in, b_in, w_out, b_out, residual, weight, bias, None, None, None)
    for position in ("none", "pre", "post"):
        given = (*tensors[:6], *((None, None) if position == "none" else (weight, bias)), *tensors[8:])
        options = {"activation": "gelu", "norm_position": position}
        saved = native.cpu_feed_forward_training(*given, **options)[1:]
        together = native.cpu_feed_forward_backward(grad, *given, *saved, **options, needs=[True] * 10)
        for i in range(10):
            needs = [i == j for j in range(10)]
            alone = native.cpu_feed_forward_backward(grad, *given, *saved, **options, needs=needs)
            assert torch.equal(alone[i], together[i])
            assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


def test_no_rows_give_zero_gradients() -> None:
    make = Inputs(torch.float32)
    empty, weight, bias = make(0, 8), make.weight(8, 8), make(8)
    linear = native.cpu_linear_backward(
        empty, empty, [weight], [bias], None, None, None, None, None, None, needs=[True] * 6
    )
    block = native.cpu_feed_forward_backward(
        empty, empty, weight, bias, weight, bias, None, None, None, None, None, None, None, None, None,
        activation="gelu", needs=[True] * 10,
    )  # fmt: skip
    for gradient in (*linear[4:], *block[1:5]):
        assert gradient.shape in (weight.shape, bias.shape) and not gradient.any()


def test_backward_is_the_same_in_every_run() -> None:
    make = Inputs(torch.float32)
    x, grad, w_in, w_out = make(333, 40), make(333, 40), make.weight(40, 72), make.weight(72, 40)
    arguments = (grad, x, w_in, make(72), w_out, make(40), x, None, None, None, None, None, None, None, None)
    runs = [
        native.cpu_feed_forward_backward(*arguments, activation="gelu", needs=[True] * 10) for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


X, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(4, 6)}, "grad: shape"),
        ({"grad": torch.zeros(4, 5).half()}, "grad: dtype"),
        ({"x": torch.zeros(4, 7)}, "x: shape"),
        ({"x": torch.zeros(6, 4).t()}, "x: must be contiguous"),
        ({"weights": [torch.zeros(6, 5)], "biases": []}, "x: shape"),
        ({"weights": [W, torch.zeros(5, 7)], "biases": []}, "weights: shape"),
        ({"weights": [W[:, 0]]}, "weights: shape"),
        ({"weights": [torch.zeros(0, 6)]}, "weights: shape"),
        ({"weights": []}, "weights: is empty"),
        ({"biases": [torch.zeros(6)]}, "biases: shape"),
        ({"biases": [B, B]}, "biases: 2"),
        ({"residual": torch.zeros(4, 6)}, "residual: shape"),
        ({"norm_weight": torch.zeros(6)}, "norm_weight: shape"),
        ({"norm_weight": B, "norm_bias": torch.zeros(4)}, "norm_bias: shape"),
        ({"norm_weight": B, "norm_bias": B, "norm_kind": "rms_norm"}, "norm_bias: must be None"),
        ({"preactivation": torch.zeros(4, 4)}, "preactivation: shape"),
        ({"prenorm": torch.zeros(4, 4)}, "prenorm: shape"),
        ({"dropout_p": 0.5}, "dropout_seed"),
        ({"dropout_p": 1.5, "dropout_seed": SEED}, "dropout_p"),
        ({"activation": "tanh"}, "activation: 'tanh'"),
        ({"norm_kind": "batch"}, "norm_kind: 'batch'"),
        ({"weight_layout": "rows"}, "weight_layout: 'rows'"),
        ({"needs": [True]}, "needs: has 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_linear_backward_refuses_what_does_not_fit(changes: dict, message: str) -> None:
    arguments = {"grad": torch.zeros(4, 5), "x": X, "weights": [W], "biases": [B], "residual": None}
    arguments |= dict.fromkeys(("norm_weight", "norm_bias", "dropout_seed", "preactivation", "prenorm"))
    arguments |= {"needs": [True] * 6} | changes
    with pytest.raises(RuntimeError, match=message):
        native.cpu_linear_backward(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.zeros(4, 5)}, "grad: shape"),
        ({"w_out": torch.zeros(6, 6)}, "w_out: in_features"),
        ({"w_gate": torch.zeros(6, 6)}, "w_gate: shape"),
        ({"b_gate": B}, "b_gate: must be None"),
        ({"b_in": torch.zeros(6)}, "b_in: shape"),
        ({"b_out": B}, "b_out: shape"),
        ({"norm_position": "post", "norm_weight": B}, "norm_weight: shape"),
        ({"norm_position": "before"}, "norm_position: 'before'"),
        ({"preactivation": torch.zeros(4, 6)}, "preactivation: shape"),
        ({"needs": [True] * 9}, "needs: has 9"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_feed_forward_backward_refuses_what_does_not_fit(changes: dict, message: str) -> None:
    names = ("residual", "norm_weight", "norm_bias", "w_gate", "b_gate", "dropout_seed")
    arguments = {"grad": torch.zeros(4, 6), "x": X, "w_in": W, "b_in": B, "w_out": W.t().contiguous()}
    arguments |= {"b_out": torch.zeros(6), "activation": "gelu", "needs": [True] * 10}
    arguments |= dict.fromkeys((*names, "preactivation", "gate_preactivation", "prenorm")) | changes
    with pytest.raises(RuntimeError, match=message):
        native.cpu_feed_forward_backward(**arguments)


# ---- norms ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    "case", [(1, 3, False, 0.0), (19, 7, True, 0.2), (300, 129, True, 0.0), (5, 768, False, 0.5)]
)
def test_norms(isa: str, dtype: torch.dtype, kind: str, case: tuple) -> None:
    rows, n, has_residual, p = case
    make = Inputs(dtype)
    x, residual, grad = make(rows, n, shift=1.0), make(rows, n) if has_residual else None, make(rows, n)
    weight, bias = make(n, scale=0.1, shift=1.0), make(n) if kind == "layer_norm" else None
    seed, offset = SEED if p else None, 0.0 if kind == "layer_norm" else 1.0
    options = {"kind": kind, "eps": 1e-5, "dropout_p": p, "weight_offset": offset}
    with verify.poisoned():
        if kind == "layer_norm":
            out = native.cpu_layer_norm(x, weight, bias, 1e-5, residual, seed, dropout_p=p)
        else:
            out = native.cpu_rms_norm(x, weight, 1e-5, residual, seed, dropout_p=p, weight_offset=offset)
        gradients = native.cpu_norm_backward(
            grad, x, weight, bias, residual, seed, **options, needs=[True] * 4
        )

    def formula(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = drop(x, p)
        return norm(y if residual is None else y + residual, weight, bias, kind, offset)

    judge(formula, (x, residual, weight, bias), grad, out, gradients)


def test_norm_without_weight(isa: str) -> None:
    make = Inputs(torch.float32)
    x, grad = make(33, 40), make(33, 40)
    for kind in ("layer_norm", "rms_norm"):
        leaf = x.double().requires_grad_()
        expected = torch.autograd.grad(norm(leaf, None, None, kind), leaf, grad.double())[0]
        dx, *rest = native.cpu_norm_backward(grad, x, None, None, kind=kind, eps=1e-5, needs=[True] * 4)
        torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-6)
        assert all(t.numel() == 0 for t in rest)


# ---- embedding ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 24, 129])
@pytest.mark.parametrize(("normed", "p"), [(True, 0.25), (True, 0.0), (False, 0.1), (False, 0.0)])
def test_embedding(isa: str, dtype: torch.dtype, hidden: int, normed: bool, p: float) -> None:
    make, generator = Inputs(dtype), torch.Generator().manual_seed(1)
    shape = (3, 90)
    ids = torch.randint(0, 17, shape, generator=generator)
    ids[:, -5:] = 2
    positions, types = (
        torch.arange(90).expand(shape).contiguous(),
        torch.randint(0, 2, shape, generator=generator),
    )
    word, position, token_type = make(23, hidden), make(90, hidden), make(2, hidden)
    weight, bias = (make(hidden, scale=0.1, shift=1.0), make(hidden)) if normed else (None, None)
    grad, seed = make(*shape, hidden), SEED if p else None
    tensors = (ids, word, positions, position, types, token_type, weight, bias)
    with verify.poisoned():
        out = native.cpu_embedding(*tensors, 1e-5, seed, dropout_p=p)
        gradients = native.cpu_embedding_backward(
            grad, *tensors, seed, norm_eps=1e-5, dropout_p=p, padding_idx=2, needs=[True] * 5
        )

    def formula(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = (
            F.embedding(ids, word, padding_idx=2)
            + F.embedding(positions, position)
            + F.embedding(types, token_type)
        )
        return drop(norm(y, weight, bias, "layer_norm") if normed else y, p)

    if hidden > 1 or not normed:  # the norm of a single number is its bias: nothing to compare but rounding
        judge(formula, (word, position, token_type, weight, bias), grad, out, gradients)
    assert not gradients[0][2].any() and not gradients[0][17:].any()


def test_embedding_of_words_alone_and_of_nothing(isa: str) -> None:
    make = Inputs(torch.float32)
    word, grad = make(5, 8), make(4, 8)
    ids = torch.tensor([4, 0, 4, 4])
    nothing = (None,) * 6
    needs = [True, True, True, True, True]
    dword, *rest = native.cpu_embedding_backward(grad, ids, word, *nothing, norm_eps=1e-5, needs=needs)
    torch.testing.assert_close(dword, torch.zeros(5, 8).index_add(0, ids, grad))
    assert all(t.numel() == 0 for t in rest)
    empty = native.cpu_embedding_backward(grad[:0], ids[:0], word, *nothing, norm_eps=1e-5, needs=needs)
    assert torch.equal(empty[0], torch.zeros(5, 8))
    with pytest.raises(RuntimeError, match="input_ids: index out of range: value 5"):
        native.cpu_embedding_backward(grad, ids + 1, word, *nothing, norm_eps=1e-5, needs=needs)
    with pytest.raises(RuntimeError, match="grad: shape"):
        native.cpu_embedding_backward(grad[:2], ids, word, *nothing, norm_eps=1e-5, needs=needs)


# ---- cross-entropy ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("case", [(40, 5, 3, False), (70, 33, 100, True), (130, 24, 4500, True)], ids=str)
def test_linear_cross_entropy(isa: str, dtype: torch.dtype, smoothing: float, case: tuple) -> None:
    rows, k, classes, has_bias = case
    make, generator = Inputs(dtype), torch.Generator().manual_seed(1)
    x, weight = make(rows, k), make.weight(k, classes)
    bias = make(classes) if has_bias else None
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1::3] = -100
    options, needs = {"label_smoothing": smoothing}, [True] * 3
    for reduction in ("mean", "sum"):
        with verify.poisoned():
            loss, _ = native.cpu_linear_cross_entropy(x, weight, target, bias, **options, reduction=reduction)
            training = native.cpu_linear_cross_entropy_training(
                x, weight, target, bias, **options, reduction=reduction, needs=needs
            )

        def formula(x: Tensor, weight: Tensor, bias: Tensor, reduction: str = reduction) -> Tensor:
            logits = F.linear(x, weight, bias)
            return F.cross_entropy(logits, target, reduction=reduction, label_smoothing=smoothing)

        torch.testing.assert_close(training[0], loss, rtol=1e-6, atol=0)
        judge(formula, (x, weight, bias), torch.ones(()), None, training[2:])
        exact = formula(*(None if t is None else t.double() for t in (x, weight, bias)))
        torch.testing.assert_close(loss.double(), exact, rtol=5e-7, atol=1e-7)

    grad = torch.randn(rows, generator=generator)
    with verify.poisoned():
        losses, _ = native.cpu_linear_cross_entropy(x, weight, target, bias, **options, reduction="none")
        gradients = native.cpu_linear_cross_entropy_backward(
            grad, x, weight, target, bias, **options, needs=needs
        )

    def each(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    judge(each, (x, weight, bias), grad, losses.to(dtype), gradients)
    assert not losses[1::3].any() and not gradients[0][1::3].any()


def test_cross_entropy_over_several_chunks_of_rows(isa: str) -> None:
    """More rows than one chunk holds: sums over chunks are carried on."""
    make, generator = Inputs(torch.float32), torch.Generator().manual_seed(1)
    rows, k, classes = 2100, 8, 20
    x, weight, bias = make(rows, k), make.weight(k, classes), make(classes)
    target = torch.randint(0, classes, (rows,), generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        half = [t.to(dtype) for t in (x, weight, bias)]
        loss, _, *gradients = native.cpu_linear_cross_entropy_training(
            *half[:2], target, half[2], needs=[True] * 3
        )

        def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight, bias), target)

        judge(formula, half, torch.ones(()), None, gradients)
        torch.testing.assert_close(loss.double(), formula(*(t.double() for t in half)), rtol=5e-7, atol=0)


def test_cross_entropy_with_masked_and_huge_logits(isa: str) -> None:
    x, weight = torch.eye(4), torch.zeros(5000, 4)
    bias = torch.full((5000,), -torch.inf)
    bias[3], bias[4000] = 0.0, 1.0
    weight[3] = torch.tensor([1e4, -1e4, 0.0, 3.0])
    target = torch.tensor([3, 4000, 3, 4000])
    loss, logsumexp, dx, dweight, dbias = native.cpu_linear_cross_entropy_training(
        x, weight, target, bias, reduction="none", needs=[True] * 3
    )
    logits = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(logits, target, reduction="none"), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert all(t.isfinite().all() for t in (dx, dweight, dbias))
    alone = native.cpu_linear_cross_entropy_backward(torch.ones(4), x, weight, target, bias, needs=[True] * 3)
    assert all(map(torch.equal, alone, (dx, dweight, dbias)))


def test_a_large_logsumexp_does_not_round_the_gradients_of_single_losses(isa: str) -> None:
    """Logits are whole numbers near 30,000, exact in float32; their logsumexp is rounded by up to 1e-3."""
    x, weight, bias = torch.eye(5), torch.arange(35.0).view(7, 5) % 4, torch.full((7,), 3e4)
    target, grad = torch.tensor([0, 3, 6, 2, 2]), torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])

    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction="none")

    gradients = native.cpu_linear_cross_entropy_backward(grad, x, weight, target, bias, needs=[True] * 3)
    exact = torch.func.vjp(formula, *(t.double() for t in (x, weight, bias)))[1](grad.double())
    for ours, wanted in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-6, atol=2e-6)


def test_cross_entropy_without_rows_that_count(isa: str) -> None:
    x, weight, target = torch.randn(3, 4), torch.randn(7, 4), torch.full((3,), -100)
    loss, logsumexp, *gradients = native.cpu_linear_cross_entropy_training(
        x, weight, target, torch.randn(7), needs=[True] * 3
    )
    assert loss.isnan() and not logsumexp.any() and not any(g.any() for g in gradients)
    with pytest.raises(RuntimeError, match="target: index out of range: value 7 at position 0"):
        native.cpu_linear_cross_entropy(x, weight, torch.full((3,), 7))
    with pytest.raises(RuntimeError, match="target: shape"):
        native.cpu_linear_cross_entropy(x, weight, target[:2])
    with pytest.raises(RuntimeError, match="bias: shape"):
        native.cpu_linear_cross_entropy(x, weight, target, torch.zeros(6))
    with pytest.raises(RuntimeError, match="x: shape"):
        native.cpu_linear_cross_entropy(torch.randn(3, 5), weight, target)
