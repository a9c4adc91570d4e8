"""Each word of csrc/arch on the GPU against its emulation, bit for bit; the CUDA kernels against float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

import bigmodel_kernels as bk
from bigmodel_kernels import _native, backends
from bigmodel_kernels.ops import feed_forward, linear
from bigmodel_kernels.ops.attention import decode, prepare, reference
from bigmodel_kernels.ops.linear import reference as linear_reference
from bigmodel_kernels.ops.norm import reference as norm_reference
from bigmodel_kernels.transformers import whole_layer
from bigmodel_kernels.verify import attention_formula, compare, evaluate, feed_forward_formula

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _native.cuda_reason() is not None,
    reason="needs a GPU and the CUDA library",
)

# name -> 32-bit words in, words out, oldest capability
WORDS = {
    "ldmatrix": (128, 128, 8),
    "ldmatrix_transposed": (128, 128, 8),
    "stmatrix": (128, 128, 9),
    "stmatrix_transposed": (128, 128, 9),
    "mma_bfloat16": (320, 128, 8),
    "mma_float16": (320, 128, 8),
    "shuffle": (32, 64, 8),
    "count": (1, 35, 8),
    "copy_async": (128, 128, 8),
    "bulk_add": (256, 128, 9),
    "philox": (192, 128, 8),
    "pack_bfloat16": (64, 32, 8),
    "pack_float16": (64, 32, 8),
    "wgmma_bfloat16_64": (4096, 4096, 9),
    "wgmma_bfloat16_64_transposed": (4096, 4096, 9),
    "wgmma_float16_128_transposed": (6144, 8192, 9),
    "wgmma_bfloat16_32": (3072, 2048, 9),
    "wgmma_float16_192_transposed": (8192, 12288, 9),
    "wgmma_bfloat16_256_transposed": (10240, 16384, 9),
    "wgmma_bfloat16_96_registers": (5120, 6144, 9),
    "wgmma_bfloat16_32_transposed_registers": (3072, 2048, 9),
    "wgmma_float16_192_transposed_registers": (8192, 12288, 9),
    "wgmma_bfloat16_256_transposed_registers": (10240, 16384, 9),
}


def words(name: str, count: int) -> torch.Tensor:
    """Small integers where the word multiplies, so that no order of summation shows; else any bits."""
    if name.startswith(("mma", "wgmma")):
        dtype = torch.float16 if "float16" in name and "bfloat16" not in name else torch.bfloat16
        halves = torch.randint(-4, 5, (2 * count,)).to(dtype).view(torch.int32).clone()
        if name.startswith("mma"):
            halves.view(32, 10)[:, 6:] = torch.randint(-4, 5, (32, 4)).float().view(torch.int32)
        return halves
    if name.startswith(("pack", "bulk_add")):
        return torch.randn(count).view(torch.int32)
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int64).to(torch.int32)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every word in the emulator, from another process: both define the op."""
    library = subprocess.run(
        [sys.executable, str(ROOT / "csrc" / "build.py"), "emulator"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    inputs = {name: words(name, count) for name, (count, _, _) in WORDS.items()}
    folder = tmp_path_factory.mktemp("words")
    torch.save(inputs, folder / "in.pt")
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); folder = sys.argv[2]\n"
        "sizes = eval(sys.argv[3]); out = {}\n"
        "for name, given in torch.load(folder + '/in.pt').items():\n"
        "    out[name] = torch.zeros(sizes[name], dtype=torch.int32)\n"
        "    torch.ops.bigmodel_testing.run(name, given, out[name])\n"
        "torch.save(out, folder + '/out.pt')\n"
    )
    sizes = repr({name: size for name, (_, size, _) in WORDS.items()})
    subprocess.run([sys.executable, "-c", script, library, str(folder), sizes], check=True)
    outputs = torch.load(folder / "out.pt")
    return {name: (inputs[name], outputs[name]) for name in WORDS}


@pytest.fixture(scope="module")
def run_on_gpu() -> Any:
    torch.ops.load_library(str(ROOT / "build" / "cuda" / "libbigmodel_words.so"))
    return torch.ops.bigmodel_testing.run


@pytest.mark.parametrize("name", WORDS)
def test_the_gpu_does_what_the_emulator_says(
    emulated: dict[str, tuple[torch.Tensor, torch.Tensor]], run_on_gpu: Any, name: str
) -> None:
    major = torch.cuda.get_device_capability()[0]
    oldest = WORDS[name][2]
    if major < oldest or (name.startswith("wgmma") and major != 9):
        pytest.skip(f"the instruction is not in capability {major}")
    given, expected = emulated[name]
    out = torch.zeros(expected.shape, dtype=torch.int32, device="cuda")
    run_on_gpu(name, given.cuda(), out)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (127, 129), (512, 512), (1000, 1000)])
def test_attention(dtype: torch.dtype, dim: int, causal: bool, queries: int, keys: int) -> None:
    query, key, value = (torch.randn(2, 4, n, dim, device="cuda", dtype=dtype) for n in (queries, keys, keys))
    args, options = prepare(query, key, value, is_causal=causal)
    with backends.use("native"):
        out, lse = torch.ops.bigmodel.attention.default(*args, **options)
    ref, ref_lse = reference.run(query.double(), key.double(), value.double(), *args[3:], **options)
    visible = (
        torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries) if causal else None
    )
    eager = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    verdict = compare(out, eager, ref)
    assert verdict.ok, verdict
    assert torch.allclose(lse.double(), ref_lse, atol=1e-4)


@pytest.mark.parametrize(
    "extra", ["bias", "mask", "softcap", "window", "alibi", "sinks", "dropout", "packed"]
)
def test_attention_features(extra: str) -> None:
    """Against the reference in float64, in bfloat16's tolerance; the emulator's tests hold the exact rule."""
    query, key, value = (torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options: dict[str, Any] = {
        "bias": {"bias": torch.randn(4, 200, 200, device="cuda")},
        "mask": {"key_padding_mask": torch.rand(2, 200, device="cuda") < 0.5},
        "softcap": {"softcap": 10.0},
        "window": {"window": (50, 3)},
        "alibi": {"alibi_slopes": torch.rand(4, device="cuda")},
        "sinks": {"sinks": torch.randn(4, device="cuda")},
        "dropout": {"dropout_p": 0.2},
        "packed": {},
    }[extra]
    tensors = (query, key, value)
    if extra == "packed":
        cu = torch.tensor([0, 3, 130, 400], dtype=torch.int32, device="cuda")
        tensors = tuple(t.transpose(1, 2).reshape(400, 4, 64) for t in tensors)
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "is_causal": True}
    args, kwargs = prepare(*tensors, **options)
    with backends.use("native"):
        out, lse = torch.ops.bigmodel.attention.default(*args, **kwargs)
    ref, ref_lse = reference.run(*(t.double() for t in tensors), *args[3:], **kwargs)
    assert torch.allclose(out.double(), ref, atol=4e-2, rtol=2e-2)
    assert torch.allclose(lse.double(), ref_lse, atol=1e-3)


def gradients(grad: torch.Tensor, tensors: tuple[torch.Tensor, ...], **call: Any) -> list[list[Any]]:
    """Of query, key, value, bias and sinks: the library's deterministic ones twice, those that it adds up in
    any order, and the reference's in float64."""
    args, options = prepare(*tensors, **call)
    extra = {"bias_requires_grad": args[4] is not None, "sinks_require_grad": args[9] is not None}
    with backends.use("native"):
        out, lse = torch.ops.bigmodel.attention.default(*args, **options)
        backward = torch.ops.bigmodel.attention_backward.default
        mine = [
            backward(grad, None, *args[:3], out, lse, *args[3:], **options, **extra, deterministic=wanted)
            for wanted in (True, True, False)
        ]
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    exact = reference.run(*wide, **options)
    ref = reference.run_backward(grad.double(), None, *wide[:3], *exact, *wide[3:], **options, **extra)
    return [list(result) for result in (*mine, ref)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (127, 129), (512, 512), (1000, 1000)])
def test_attention_backward(dtype: torch.dtype, dim: int, causal: bool, queries: int, keys: int) -> None:
    query = torch.randn(2, 4, queries, dim, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, 2, keys, dim, device="cuda", dtype=dtype) for _ in range(2))
    given = {"query": query, "key": key, "value": value}
    grad = torch.randn_like(query)
    found = gradients(grad, tuple(given.values()), is_causal=causal)
    upstream = (grad, torch.zeros(query.shape[:3], device="cuda"))
    _, eager = evaluate(attention_formula, (), {**given, "is_causal": causal}, None, upstream)
    for name, got, again, free, exact in zip(given, *found, strict=False):
        assert torch.equal(got, again), f"the gradient of {name} varies"
        for mine in (got, free):
            verdict = compare(mine, eager[name], exact, "gradient")
            assert verdict.ok, (name, verdict)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "extra", ["bias", "mask", "softcap", "window", "alibi", "sinks", "dropout", "packed"]
)
def test_attention_backward_features(extra: str, dim: int) -> None:
    query = torch.randn(2, 4, 200, dim, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(2, 2, 200, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    call: dict[str, Any] = {
        "bias": {"bias": torch.randn(4, 200, 200, device="cuda")},
        "mask": {"key_padding_mask": torch.rand(2, 200, device="cuda") < 0.5},
        "softcap": {"softcap": 10.0},
        "window": {"window": (50, 3)},
        "alibi": {"alibi_slopes": torch.rand(4, device="cuda")},
        "sinks": {"sinks": torch.randn(4, device="cuda")},
        "dropout": {"dropout_p": 0.2},
        "packed": {},
    }[extra]
    tensors = (query, key, value)
    if extra == "packed":
        cu = torch.tensor([0, 3, 130, 400], dtype=torch.int32, device="cuda")
        tensors = tuple(t.transpose(1, 2).reshape(400, t.shape[1], dim) for t in tensors)
        call = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "is_causal": True}
    found = gradients(torch.randn_like(tensors[0]), tensors, **call)
    for got, again, free, exact in zip(*found, strict=True):
        assert torch.equal(got, again)
        for mine in (got, free):
            atol = 2e-2 * float(1 + exact.abs().max()) if exact.numel() else 0
            assert torch.allclose(mine.double(), exact, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(8, 8, 1), (8, 2, 1), (32, 1, 1), (8, 2, 5)])
def test_decode(
    dtype: torch.dtype, dim: int, page_size: int | None, heads: int, kv_heads: int, queries: int
) -> None:
    """Ragged lengths up to many splits; the same bits from the same counters in every run."""
    lengths = torch.tensor([0, 1, 300, 4000], dtype=torch.int32, device="cuda")
    query = torch.randn(4, heads, queries, dim, device="cuda", dtype=dtype)
    key, value = (torch.randn(4, kv_heads, 4096, dim, device="cuda", dtype=dtype) for _ in range(2))
    tensors: tuple[torch.Tensor, ...] = (query, key, value, lengths)
    if page_size is not None:
        table = torch.randperm(4 * 4096 // page_size, device="cuda").view(4, -1)
        pages = [
            torch.empty(table.numel(), kv_heads, page_size, dim, device="cuda", dtype=dtype) for _ in "kv"
        ]
        for held, cache in zip(pages, (key, value), strict=True):
            held[table] = cache.view(4, kv_heads, -1, page_size, dim).transpose(1, 2)
        tensors = (query, *pages, lengths, table.to(torch.int32))
    args, options = decode.prepare(*tensors)
    with backends.use("native"):
        out, lse = torch.ops.bigmodel.attention_decode.default(*args, **options)
        again = [torch.ops.bigmodel.attention_decode.default(*args, **options) for _ in range(5)]
    assert all(torch.equal(out, o) and torch.equal(lse, n) for o, n in again)
    ref, ref_lse = reference.run_decode(
        query.double(), key.double(), value.double(), lengths, *([None] * 3), **options
    )
    offset = lengths.view(4, 1, 1, 1) - queries + torch.arange(queries, device="cuda").view(1, 1, -1, 1)
    visible = torch.arange(4096, device="cuda") <= offset
    group = heads // kv_heads
    eager = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), attn_mask=visible
    ).nan_to_num(0)
    verdict = compare(out, eager, ref)
    assert verdict.ok, verdict
    assert torch.allclose(lse.double(), ref_lse, atol=1e-4)


def test_decode_in_a_graph_follows_the_lengths() -> None:
    """A captured call reads lengths and leaves its counters so that it can be replayed as sequences grow."""
    query, key, value = (
        torch.randn(2, 4, n, 64, device="cuda", dtype=torch.float16) for n in (1, 4096, 4096)
    )
    lengths = torch.tensor([5, 3000], dtype=torch.int32, device="cuda")
    args, options = decode.prepare(query, key, value, lengths)
    with backends.use("native"):
        torch.ops.bigmodel.attention_decode.default(*args, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = torch.ops.bigmodel.attention_decode.default(*args, **options)
        for _ in range(3):
            lengths += 500
            graph.replay()
            expected, _ = torch.ops.bigmodel.attention_decode.default(*args, **options)
            assert torch.equal(out, expected)


LINEAR_CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "silu": {"activation": "silu"},
    "residual": {"residual": True},
    "dropout": {"residual": True, "dropout_p": 0.2},
    "norm": {"residual": True, "norm_weight": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize(("rows", "size_in", "size_out"), [(1, 768, 768), (127, 64, 136), (4096, 768, 3072)])
@pytest.mark.parametrize("call", LINEAR_CALLS.values(), ids=LINEAR_CALLS.keys())
def test_linear(
    dtype: torch.dtype, layout: str, rows: int, size_in: int, size_out: int, call: dict[str, Any]
) -> None:
    x = torch.randn(rows, size_in, device="cuda", dtype=dtype)
    size = (size_in, size_out) if layout == "conv1d" else (size_out, size_in)
    weight = (torch.randn(size, device="cuda") / size_in**0.5).to(dtype)
    bias = torch.randn(size_out, device="cuda", dtype=dtype)
    given = dict(call)
    if "residual" in given:
        given["residual"] = torch.randn(rows, size_out, device="cuda", dtype=dtype)
    if "norm_weight" in given:
        given["norm_weight"] = torch.randn(size_out, device="cuda", dtype=dtype)
    args, options = linear.prepare(x, weight, bias, weight_layout=layout, **given)
    with backends.use("native"):
        out = torch.ops.bigmodel.linear.default(*args, **options)
        training = torch.ops.bigmodel.linear_training.default(*args, **options)
    wide = [
        [t.double() for t in a] if isinstance(a, list)
        else a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]  # fmt: skip
    ref = linear_reference.run_training(*wide, **options)
    eager = list(linear_reference.run_training(*args, **options))
    if "norm_weight" in call:  # plain PyTorch norms what it has rounded to the dtype, as the kernel does
        eager[0] = torch.nn.functional.layer_norm(eager[2], (size_out,), given["norm_weight"])
    assert torch.equal(out, training[0])
    for mine, exact, usual in zip(training, ref, eager, strict=True):
        verdict = compare(mine, usual, exact)
        assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"])
@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 64, 72), (127, 64, 264), (4096, 768, 3072)])
def test_feed_forward_backward(
    dtype: torch.dtype, layout: str, activation: str, rows: int, width: int, hidden: int
) -> None:
    """All gradients, from what the forward kept."""
    shapes = {"x": (rows, width), "w_in": (hidden, width), "b_in": (hidden,), "w_out": (width, hidden)}
    tensors = {name: torch.randn(shape, device="cuda") for name, shape in shapes.items()}
    tensors["w_in"] /= width**0.5
    tensors["w_out"] /= hidden**0.5
    if layout == "conv1d":
        tensors |= {name: tensors[name].t().contiguous() for name in ("w_in", "w_out")}
    given = {name: t.to(dtype) for name, t in tensors.items()}
    given["b_out"] = torch.randn(width, device="cuda", dtype=dtype)
    call = {"activation": activation, "weight_layout": layout}
    args, options = feed_forward.prepare(*given.values(), **call)
    grad = torch.randn_like(given["x"])
    with backends.use("native"):
        kept = torch.ops.bigmodel.feed_forward_training.default(*args, **options)[1]
        got = torch.ops.bigmodel.feed_forward_backward.default(
            grad, *args, None, None, None, kept, **options, needs=[True] * 5 + [False] * 5
        )
    _, eager = evaluate(feed_forward_formula, (), {**given, **call}, None, (grad,))
    _, exact = evaluate(feed_forward_formula, (), {**given, **call}, torch.float64, (grad,))
    for name, mine in zip(given, got, strict=False):
        verdict = compare(mine, eager[name], exact[name], "gradient")
        assert verdict.ok, (name, verdict)


def test_several_weights_side_by_side() -> None:
    x = torch.randn(300, 768, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(768, 768, device="cuda", dtype=torch.bfloat16) * 0.03 for _ in range(3)]
    args, options = linear.prepare(x, weights)
    with backends.use("native"):
        out = torch.ops.bigmodel.linear.default(*args, **options)
    expected = torch.cat([x.double() @ w.double().t() for w in weights], 1)
    assert torch.allclose(out.double(), expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (8192, 768), (300, 1024), (77, 2056), (40, 4096)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_norm_backward(kind: str, rows: int, columns: int, dropout_p: float) -> None:
    """Against the reference in float64; the same bits again, and of the sums for a bias before the norm."""
    grad, x, residual = torch.randn(3, rows, columns, device="cuda").bfloat16()
    weight = torch.randn(columns, device="cuda").bfloat16()
    bias = torch.randn(columns, device="cuda").bfloat16() if kind == "layer_norm" else None
    seed = torch.tensor(77, device="cuda") if dropout_p else None
    needs = [True, True, True, bias is not None]
    args, options = (
        (grad, x, weight, bias, residual, seed),
        {"kind": kind, "eps": 1e-5, "dropout_p": dropout_p},
    )
    with backends.use("native"):
        mine, again = (
            torch.ops.bigmodel.norm_backward.default(*args, **options, needs=needs) for _ in range(2)
        )
    wide = (None if t is None else t.double() for t in args[:5])
    exact = norm_reference.run_backward(*wide, seed, **options, needs=needs)
    usual = norm_reference.run_backward(*args, **options, needs=needs)
    for got, same, ref, eager in zip(mine, again, exact, usual, strict=True):
        assert torch.equal(got, same)
        verdict = compare(got, eager, ref, "gradient")
        assert verdict.ok, verdict
    sums = torch.ops.bigmodel.cuda_column_sums(mine[0])[0]
    assert torch.allclose(sums.double(), mine[0].double().sum(0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_layer_in_training(family: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of autograd against the steps, after the same seeds, in bfloat16's tolerance."""
    model: Any
    torch.manual_seed(0)
    if family == "bert":
        model = BertModel(BertConfig(num_hidden_layers=2, vocab_size=999), add_pooling_layer=False)
    else:
        model = GPT2Model(GPT2Config(n_layer=2, vocab_size=999, use_cache=False))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout_p
    model = model.to("cuda", torch.bfloat16).train()
    bk.patch(model)
    ids = torch.randint(0, 999, (4, 128), device="cuda")
    ends, run = [], whole_layer.end

    def end(*args: Any) -> torch.Tensor:
        ends.append(args[-1])
        return run(*args)

    monkeypatch.setattr(whole_layer, "end", end)

    def gradients_of() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        model(input_ids=ids).last_hidden_state.float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    together = gradients_of()
    assert len(ends) == (2 if torch.cuda.get_device_capability() == (9, 0) else 0)
    monkeypatch.setattr(whole_layer, "held", lambda *args: None)
    apart = gradients_of()
    assert together.keys() == apart.keys()
    largest = max(float(g.abs().max()) for g in apart.values())
    for name, gradient in together.items():
        wrong = float((gradient.double() - apart[name].double()).norm())
        assert wrong <= 0.05 * float(apart[name].double().norm()) + 1e-3 * largest, name
