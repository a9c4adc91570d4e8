"""Other runtimes for CPUs as contenders: ONNX Runtime, OpenVINO and CTranslate2, each with the same weights.

People leave PyTorch for these to be faster, so a table without them says little. A model of transformers is
taken as it is in memory and given to each as its own documentation tells a user to; docs/benchmarks.md says
how and why that is fair. Nothing here is needed by the package: a runtime that is not installed, or that
cannot take a model, raises, and the document says why it was left out.

Every builder returns a function that takes torch's inputs once and returns the call to be timed; what that
returns has the shape of torch's own result. All runtimes get as many threads as torch has, and may not
quantise anything.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_kernels import extras
from bigmodel_kernels.bench.machine import RUNTIMES
from bigmodel_kernels.bench.suite import Setting
from bigmodel_kernels.bench.timing import Contender, LeftOut

NAMES = RUNTIMES

#: A call to be timed, and what makes one of torch's inputs.
Call = Callable[[], Tensor]
Bind = Callable[..., Call]

#: The operator set of an exported model. In 20 the fusions of ONNX Runtime know the layers of a transformer;
#: 23 is the first that has attention as one operator.
_OPSET, _OPSET_WITH_ATTENTION = 20, 23


def contenders(
    setting: Setting,
    builders: Mapping[str, Callable[[], Bind]],
    key: Sequence[Any],
    *inputs: Tensor,
) -> list[Contender]:
    """Each runtime on these inputs; what `builders` make serves the next cases too, if their `key` is equal.

    A runtime is built by its first call, which is a warm-up: only one that will be measured takes memory.
    """

    def contender(name: str, build: Callable[[], Bind]) -> Contender:
        @functools.cache
        def bound() -> Call:
            with _plain():
                bind = setting.shared.get(name, tuple(key), build)
                return bind(*inputs)

        return Contender(name, lambda: bound()(), optional=True)

    return [contender(name, build) for name, build in builders.items()]


def encoders(model: nn.Module, dtype: str) -> dict[str, Callable[[], Bind]]:
    """BERT: (input_ids, attention_mask), padded at the right, to the last hidden state."""
    return {
        "onnxruntime": lambda: _onnx_encoder(model, dtype),
        "openvino": lambda: _openvino_encoder(model, dtype),
        "ctranslate2": lambda: _ctranslate2_encoder(model, dtype),
    }


def prefills(model: nn.Module, dtype: str) -> dict[str, Callable[[], Bind]]:
    """GPT-2: input_ids to the logits of all tokens."""
    return {
        "onnxruntime": lambda: _onnx_prefill(model, dtype),
        "openvino": lambda: _openvino_prefill(model, dtype),
        "ctranslate2": lambda: _ctranslate2_prefill(model, dtype),
    }


def generators(model: nn.Module, dtype: str, new: int) -> dict[str, Callable[[], Bind]]:
    """GPT-2: input_ids to them and `new` tokens more, the likeliest each time."""
    return {
        "onnxruntime": lambda: _onnx_generator(model, dtype, new),
        "openvino": lambda: _openvino_generator(model, dtype, new),
        "ctranslate2": lambda: _ctranslate2_generator(model, dtype, new),
    }


def translators(model: nn.Module, dtype: str, new: int) -> dict[str, Callable[[], Bind]]:
    """Marian, T5, BART: input_ids to the decoder's first token and `new` more, the likeliest each time."""
    return {"ctranslate2": lambda: _ctranslate2_translator(model, dtype, new)}


def attentions(heads: int, head_dim: int, is_causal: bool, dtype: str) -> dict[str, Callable[[], Bind]]:
    """Attention alone: query, key and value (B, H, S, D) to the output."""
    return {
        "onnxruntime": lambda: _onnx_attention(heads, head_dim, is_causal, dtype),
        "openvino": lambda: _openvino_attention(heads, head_dim, is_causal, dtype),
        "ctranslate2": _ctranslate2_attention,
    }


# What is exported


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.last_hidden_state  # type: ignore[no-any-return]


class _Prefill(nn.Module):
    """With a `mask`, which hides nothing: without one transformers looks for several texts in a sequence, by
    an operator that OpenVINO does not have.
    """

    def __init__(self, model: nn.Module, mask: bool = False) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids) if self.mask else None
        output = self.model(input_ids, attention_mask=mask, use_cache=False)
        return output.logits  # type: ignore[no-any-return]


class _Step(nn.Module):
    """A step of generation: `past` are keys and values of each layer, and so is what follows the logits of
    the last token. transformers' own cache would start from an empty tensor of one dimension, which cannot
    be traced.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # the older name

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: cache},
        )
        layers: Any = cache.layers
        states = [state for layer in layers for state in (layer.keys, layer.values)]
        return output.logits[:, -1], *states


class _Attention(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)


def _step_names(model: Any) -> tuple[list[str], list[str], list[str]]:
    """Names of what all steps take, of the keys and values they take, and of those they give."""
    count = 2 * model.config.n_layer
    return (
        ["input_ids", "attention_mask", "position_ids"],
        [f"past.{i}" for i in range(count)],
        [f"present.{i}" for i in range(count)],
    )


def _step_example(model: Any) -> tuple[Tensor, ...]:
    """Two sequences of three tokens that come after five; no size is 0 or 1, which an export would fix."""
    config = model.config
    ids = torch.randint(0, config.vocab_size, (2, 3))
    mask = torch.ones(2, 8, dtype=torch.int64)
    positions = torch.arange(5, 8).expand(2, 3)
    state = (2, config.n_head, 5, config.n_embd // config.n_head)
    return ids, mask, positions, *(torch.randn(state) for _ in range(2 * config.n_layer))


def _step_inputs(ids: Any, seen: int) -> dict[str, Any]:
    """What goes with tokens `ids` (numpy) of which the last is the `seen`-th of its sequence."""
    import numpy

    batch, length = ids.shape
    return {
        "input_ids": ids,
        "attention_mask": numpy.ones((batch, seen), dtype=numpy.int64),
        "position_ids": numpy.tile(numpy.arange(seen - length, seen, dtype=numpy.int64), (batch, 1)),
    }


def _greedy(step: Callable[[Any, int], Any], ids: Tensor, new: int) -> Tensor:
    """The tokens and `new` more. `step` takes tokens and how many there are in all, and returns logits."""
    import numpy

    tokens = [ids.numpy()]
    for i in range(new):
        logits = step(tokens[-1], ids.shape[1] + i)
        tokens.append(logits.argmax(-1)[:, None].astype(numpy.int64))
    return torch.from_numpy(numpy.concatenate(tokens, axis=1))


def _example_ids(model: Any) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (2, 9))


def _example_mask() -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0  # with padding, or an export may take masks for superfluous
    return mask


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Exporters trace ordinary tensors, not those of inference mode, and have much to tell."""
    disabled = logging.root.manager.disable
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _twin(model: Any, attention: str) -> Any:
    """A copy in float32 (the numbers stay those of the model's dtype) that no inference mode has made."""
    twin = copy.deepcopy(model).float()
    twin.config.dtype = torch.float32
    twin.set_attn_implementation(attention)
    return twin.eval()


# ONNX Runtime


def _onnxruntime(dtype: str) -> Any:
    runtime = extras.package("onnxruntime", "onnxruntime", "bench")
    for name in ("onnx", "onnxscript"):
        extras.package(name, name, "bench")
    if dtype != "float32":
        raise LeftOut(f"its provider for CPUs has no kernels for {dtype} products")
    return runtime


def _onnx_session(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: tuple[Any, ...],
    opset: int,
    fusions: Mapping[str, Any] | None = None,
) -> Any:
    """Exports, applies the fusions of ONNX Runtime's script for transformers where they are named, and those
    that it has for every graph when the session is made. The script's for GPT-2 raise IndexError on what
    torch exports; with attention as one operator it is faster anyway.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads may spin within a call, as they do by default, but not on into the next contender's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            module,
            example,
            path,
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            external_data=False,
            verbose=False,
        )
        if fusions:
            from onnxruntime.transformers import optimizer

            optimized = optimizer.optimize_model(path, opt_level=0, use_gpu=False, **fusions)
            path = str(Path(folder) / "fused.onnx")
            optimized.save_model_to_file(path)
            del optimized
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _dynamic(*axes: int) -> dict[int, Any]:
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def _onnx_encoder(model: Any, dtype: str) -> Bind:
    _onnxruntime(dtype)
    config = model.config
    session = _onnx_session(
        _Encoder(_twin(model, "eager")),
        (_example_ids(model), _example_mask()),
        ["input_ids", "attention_mask"],
        ["output"],
        (_dynamic(0, 1), _dynamic(0, 1)),
        _OPSET,
        {"model_type": "bert", "num_heads": config.num_attention_heads, "hidden_size": config.hidden_size},
    )
    return functools.partial(_onnx_call, session)


def _onnx_prefill(model: Any, dtype: str) -> Bind:
    _onnxruntime(dtype)
    example = (_example_ids(model),)
    module = _Prefill(_twin(model, "sdpa"))
    shapes = (_dynamic(0, 1),)
    session = _onnx_session(module, example, ["input_ids"], ["logits"], shapes, _OPSET_WITH_ATTENTION)
    return functools.partial(_onnx_call, session)


def _onnx_attention(heads: int, head_dim: int, is_causal: bool, dtype: str) -> Bind:
    _onnxruntime(dtype)
    names = ["query", "key", "value"]
    example = tuple(torch.randn(3, 2, heads, 9, head_dim))
    shapes = (_dynamic(0, 2),) * 3
    session = _onnx_session(_Attention(is_causal), example, names, ["output"], shapes, _OPSET_WITH_ATTENTION)
    return functools.partial(_onnx_call, session)


def _onnx_call(session: Any, *inputs: Tensor) -> Call:
    names = [given.name for given in session.get_inputs()]
    feed = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _onnx_generator(model: Any, dtype: str, new: int) -> Bind:
    runtime = _onnxruntime(dtype)
    import numpy

    given, pasts, presents = _step_names(model)
    example = _step_example(model)
    shapes = (*(_dynamic(0, 1),) * len(given), (_dynamic(0, 2),) * len(pasts))
    session = _onnx_session(
        _Step(_twin(model, "sdpa")),
        example,
        [*given, *pasts],
        ["logits", *presents],
        shapes,
        _OPSET_WITH_ATTENTION,
    )
    needed = {node.name for node in session.get_inputs()}  # an export drops what a graph does not read
    heads, _, dim = example[-1].shape[1:]

    def bind(ids: Tensor) -> Call:
        empty = numpy.zeros((ids.shape[0], heads, 0, dim), dtype=numpy.float32)

        def generate() -> Tensor:
            states = [runtime.OrtValue.ortvalue_from_numpy(empty) for _ in pasts]

            def step(tokens: Any, seen: int) -> Any:
                nonlocal states
                feed = {
                    name: runtime.OrtValue.ortvalue_from_numpy(value)
                    for name, value in _step_inputs(tokens, seen).items()
                    if name in needed
                }
                feed.update(zip(pasts, states, strict=True))
                logits, *states = session.run_with_ort_values(["logits", *presents], feed)
                return logits.numpy()

            return _greedy(step, ids, new)

        return generate

    return bind


# OpenVINO

#: dtype -> what a CPU must be capable of, and the name of the precision.
_PRECISIONS = {"float32": ("FP32", "f32"), "bfloat16": ("BF16", "bf16")}


def _openvino(dtype: str) -> Any:
    runtime = extras.package("openvino", "openvino", "bench")
    able = runtime.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype not in _PRECISIONS or _PRECISIONS[dtype][0] not in able:
        raise LeftOut(f"it has no {dtype} on this CPU, only {', '.join(sorted(able))}")
    return runtime


def _openvino_request(model: Any, dtype: str) -> Any:
    """Compiled for the shortest time of one call. Its cache of keys and values would be of 8 bits."""
    import openvino

    _, precision = _PRECISIONS[dtype]
    properties = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", properties).create_infer_request()


def _openvino_call(request: Any, *inputs: Tensor) -> Call:
    """Memory is shared both ways: the result is the runtime's own until the next call, which writes the same
    numbers into it.
    """
    kept = [value.contiguous() for value in inputs]
    feed = dict(enumerate(map(_to_openvino, kept)))

    def run(kept: list[Tensor] = kept) -> Tensor:  # the feed is no more than a view of them
        request.infer(feed, share_inputs=True)
        return _from_openvino(request.get_output_tensor(0))

    return run


def _to_openvino(value: Tensor) -> Any:
    """The same memory; numpy, between the two, knows no bfloat16."""
    import openvino

    if value.dtype != torch.bfloat16:
        return openvino.Tensor(value.numpy(), shared_memory=True)
    return openvino.Tensor(value.view(torch.int16).numpy(), list(value.shape), openvino.Type.bf16)


def _from_openvino(value: Any) -> Tensor:
    import openvino

    if value.element_type == openvino.Type.bf16:
        return torch.from_numpy(value.data.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(value.data)


def _openvino_encoder(model: Any, dtype: str) -> Bind:
    runtime = _openvino(dtype)
    example = {"input_ids": _example_ids(model), "attention_mask": _example_mask()}
    converted = runtime.convert_model(_Encoder(_twin(model, "sdpa")), example_input=example)
    return functools.partial(_openvino_call, _openvino_request(converted, dtype))


def _openvino_prefill(model: Any, dtype: str) -> Bind:
    runtime = _openvino(dtype)
    module = _Prefill(_twin(model, "sdpa"), mask=True)
    converted = runtime.convert_model(module, example_input=(_example_ids(model),))
    return functools.partial(_openvino_call, _openvino_request(converted, dtype))


def _openvino_attention(heads: int, head_dim: int, is_causal: bool, dtype: str) -> Bind:
    runtime = _openvino(dtype)
    example = tuple(torch.randn(3, 2, heads, 9, head_dim, dtype=getattr(torch, dtype)))
    converted = runtime.convert_model(_Attention(is_causal), example_input=example)
    shape = runtime.PartialShape([-1, heads, -1, head_dim])
    converted.reshape(dict.fromkeys(range(3), shape))
    return functools.partial(_openvino_call, _openvino_request(converted, dtype))


def _openvino_generator(model: Any, dtype: str, new: int) -> Bind:
    runtime = _openvino(dtype)
    import numpy

    converted = runtime.convert_model(_Step(_twin(model, "sdpa")), example_input=_step_example(model))
    request = _openvino_request(_stateful(converted, model), dtype)

    def bind(ids: Tensor) -> Call:
        order = numpy.arange(ids.shape[0], dtype=numpy.int32)

        def step(tokens: Any, seen: int) -> Any:
            request.infer({**_step_inputs(tokens, seen), "beam_idx": order}, share_inputs=True)
            return request.get_output_tensor(0).data

        def generate() -> Tensor:
            request.reset_state()
            return _greedy(step, ids, new)

        return generate

    return bind


def _stateful(converted: Any, model: Any) -> Any:
    """Keys and values become states that stay inside of the runtime, as in OpenVINO's own pipelines.

    Its attention with a cache is chosen only where the order of the sequences may change from step to step,
    as in a beam search: so there is an input for that order, and greedy decoding always gives the same one.
    A state is without tokens at first, for as many sequences as are asked for.
    """
    import numpy
    import openvino
    from openvino import opset13 as ops
    from openvino.passes import MakeStateful, Manager

    given, pasts, presents = _step_names(model)
    heads, _, dim = _step_example(model)[-1].shape[1:]
    for node, name in zip(converted.inputs, [*given, *pasts], strict=True):
        node.get_tensor().set_names({name})
    for node, name in zip(converted.outputs, ["logits", *presents], strict=True):
        node.get_tensor().set_names({name})
    states = dict.fromkeys(pasts, openvino.PartialShape([-1, heads, -1, dim]))
    converted.reshape({**dict.fromkeys(given, openvino.PartialShape([-1, -1])), **states})

    def numbers(*values: int) -> Any:
        return ops.constant(list(values), dtype=numpy.int64)

    order = ops.parameter([-1], openvino.Type.i32, name="beam_idx")
    order.output(0).get_tensor().set_names({"beam_idx"})
    converted.add_parameters([order])
    first_axis = ops.constant(0, dtype=numpy.int64)
    for name in pasts:
        past = converted.input(name)
        readers = past.get_target_inputs()
        ordered = ops.gather(past, order, first_axis)
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    converted.validate_nodes_and_infer_types()

    manager = Manager()
    manager.register_pass(MakeStateful(dict(zip(pasts, presents, strict=True))))
    manager.run_passes(converted)
    batch = ops.gather(ops.shape_of(converted.input("input_ids"), "i64"), numbers(0), first_axis)
    empty = ops.concat([batch, numbers(heads, 0, dim)], 0)
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            zero = ops.constant(0.0, dtype=numpy.float32)
            node.set_arguments([ops.broadcast(zero, empty).output(0)])
    converted.validate_nodes_and_infer_types()
    return converted


# CTranslate2


def _ctranslate2(dtype: str) -> Any:
    runtime = extras.package("ctranslate2", "ctranslate2", "bench")
    able = runtime.get_supported_compute_types("cpu")
    if dtype not in able:
        raise LeftOut(f"it does not compute in {dtype} on this CPU, only in {', '.join(sorted(able))}")
    return runtime


#: What its converters ask a config for, and transformers has one of by now.
_NOT_SAID = {
    "position_embedding_type": "absolute",
    "normalize_before": False,
    "normalize_embedding": True,
    "add_final_layer_norm": False,
}


def _ctranslate2_model(kind: str, model: Any, dtype: str) -> Any:
    """Saves the model with a tokenizer whose token number i is "t<i>", and converts that folder, as
    CTranslate2 takes no model from memory.
    """
    runtime = _ctranslate2(dtype)
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging as talk

    twin = _twin(model, "sdpa")
    config = twin.config
    for name, value in _NOT_SAID.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    names = [f"t{i}" for i in range(config.vocab_size)]
    special = {"unk_token": "t0", "bos_token": "t0", "eos_token": "t0"}
    if config.is_encoder_decoder:
        names[config.pad_token_id] = "<pad>"  # which the converter of Marian looks for
        special |= {"bos_token": "<pad>", "pad_token": "<pad>", "eos_token": names[config.eos_token_id]}
        special["unk_token"] = names[-2]
    words = models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=special["unk_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)
    bar = talk.is_progress_bar_enabled()
    talk.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, target = (str(Path(folder) / name) for name in ("transformers", "converted"))
            twin.save_pretrained(source)
            del twin
            tokenizer.save_pretrained(source)
            TransformersConverter(source).convert(target)
            return getattr(runtime, kind)(
                target,
                device="cpu",
                compute_type=dtype,
                inter_threads=1,
                intra_threads=torch.get_num_threads(),
            )
    finally:
        if bar:
            talk.enable_progress_bar()


def _words(ids: Tensor) -> list[list[str]]:
    """Tokens by their names in such a tokenizer."""
    return [[f"t{i}" for i in row] for row in ids.tolist()]


def _ctranslate2_encoder(model: Any, dtype: str) -> Bind:
    encoder = _ctranslate2_model("Encoder", model, dtype)

    def bind(ids: Tensor, mask: Tensor) -> Call:
        texts = without_padding(ids, mask)
        return lambda: _from_ctranslate2(encoder.forward_batch(texts).last_hidden_state)

    return bind


def without_padding(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real tokens of each sequence, whose padding is at the right."""
    lengths = mask.sum(1).tolist()
    return [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]


def _ctranslate2_prefill(model: Any, dtype: str) -> Bind:
    generator = _ctranslate2_model("Generator", model, dtype)

    def bind(ids: Tensor) -> Call:
        texts = ids.tolist()
        return lambda: _from_ctranslate2(generator.forward_batch(texts))

    return bind


def _from_ctranslate2(view: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(view))


def _ctranslate2_generator(model: Any, dtype: str, new: int) -> Bind:
    generator = _ctranslate2_model("Generator", model, dtype)

    def bind(ids: Tensor) -> Call:
        texts = _words(ids)

        def generate() -> Tensor:
            found = generator.generate_batch(
                texts,
                beam_size=1,
                sampling_topk=1,
                min_length=new,
                max_length=new,
                end_token=[],  # as the contenders here: no token ends a text
                include_prompt_in_result=False,
            )
            return torch.cat([ids, torch.tensor([text.sequences_ids[0] for text in found])], dim=1)

        return generate

    return bind


def _ctranslate2_translator(model: Any, dtype: str, new: int) -> Bind:
    translator = _ctranslate2_model("Translator", model, dtype)
    first = model.config.decoder_start_token_id

    def bind(ids: Tensor) -> Call:
        texts = _words(ids)

        def translate() -> Tensor:
            found = translator.translate_batch(
                texts,
                beam_size=1,
                sampling_topk=1,
                min_decoding_length=new,
                max_decoding_length=new,
            )
            return torch.tensor([[first, *map(_number, text.hypotheses[0])] for text in found])

        return translate

    def _number(token: str) -> int:
        return model.config.pad_token_id if token == "<pad>" else int(token[1:])  # type: ignore[no-any-return]

    return bind


def _ctranslate2_attention() -> Bind:
    extras.package("ctranslate2", "ctranslate2", "bench")
    raise LeftOut("it runs whole models only, not attention alone")
