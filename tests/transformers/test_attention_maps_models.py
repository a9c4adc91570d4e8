"""What the heads of a model look at, against the probabilities of its eager code."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from transformers import BertModel, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import assert_as_near, assert_gradients, eager_of, float64_of
from bigmodel_kernels.models.tiny import (
    SIZES,
    bert_config,
    build,
    gpt2_config,
    left_padding,
    right_padding,
    token_ids,
)
from bigmodel_kernels.ops import attention_maps as op

LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, Any]] = {
    "bert": ("BertModel", bert_config),
    "gpt2": ("GPT2LMHeadModel", gpt2_config),
    "distilbert": (
        "DistilBertModel",
        lambda: transformers.DistilBertConfig(vocab_size=101, dim=48, n_layers=2, n_heads=4, hidden_dim=72),
    ),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**LLAMA)),
    "gpt_oss": (
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(
            **{**LLAMA, "attn_implementation": "eager"},
            head_dim=12,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**LLAMA, sliding_window=5)),
}


def model_of(kind: str) -> Any:
    name, config = MODELS[kind]
    return build(getattr(transformers, name), config())


def prepared(model: Any) -> Any:
    """The model with its attention on ours: patched where its family is known."""
    if not bk.patch(model).patched:
        model.set_attn_implementation("bigmodel")
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padding", [None, right_padding, left_padding], ids=["none", "right", "left"])
def test_against_eager(kind: str, padding: Any) -> None:
    model = model_of(kind)
    eager = eager_of(model)
    ids, mask = token_ids(), None if padding is None else padding()
    prepared(model)
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, output_attentions=True).attentions
        before = model(ids, attention_mask=mask)[0]
    maps = bk.attention_maps(model, input_ids=ids, attention_mask=mask, probabilities=True, top_k=2)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(maps.output[0][real], before[real], atol=1e-4, rtol=1e-4)
    assert [layer.layer for layer in maps] == [0, 1] and {layer.kind for layer in maps} == {"self"}
    where = real[:, None].expand(-1, 4, -1)
    for layer, eager_p in zip(maps, expected, strict=True):
        p, found = layer.probabilities, layer.statistics
        assert p is not None and found is not None
        torch.testing.assert_close(p[where], eager_p[where], atol=1e-5, rtol=1e-4)
        assert (p[~where] == 0).all() and (found.entropy[~where] == 0).all()
        if mask is not None:
            assert (p * (1 - mask[:, None, None])).abs().max() == 0  # nothing for keys that are padding
        entropy = torch.special.entr(eager_p).sum(-1)
        if kind == "gpt_oss":  # the sink has the rest
            entropy += torch.special.entr((1 - eager_p.sum(-1)).clamp(0, 1))
            assert (found.mass.sum(-1) < real.sum(-1)[:, None]).all()
        else:
            torch.testing.assert_close(found.mass.sum(-1), real.sum(-1)[:, None].float().expand(-1, 4))
        torch.testing.assert_close(found.entropy[where], entropy[where], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.mass, p.sum(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.top_probabilities, p.topk(2, -1).values, atol=1e-5, rtol=1e-4)
        counts = real.sum(-1)[:, None]
        torch.testing.assert_close(
            layer.head_entropy(), (entropy * where).sum(-1) / counts, atol=1e-4, rtol=1e-4
        )


def test_layers_heads_and_what_is_asked_for() -> None:
    model = prepared(model_of("bert"))
    ids = token_ids()
    everything = bk.attention_maps(model, input_ids=ids, probabilities=True, top_k=1)
    some = bk.attention_maps(
        model, input_ids=ids, probabilities=True, statistics=False, layers=[1], heads=[3, -4]
    )
    assert len(some) == 1 and some.layers[0].heads == (3, 0) and some.layers[0].statistics is None
    assert some.layers[0].name == everything.layers[1].name == "encoder.layer.1.attention.self"
    p, whole = some.layers[0].probabilities, everything.layers[1].probabilities
    assert p is not None and whole is not None and torch.equal(p, whole[:, [3, 0]])
    few = bk.attention_maps(model, input_ids=ids, heads=[2])
    of_few, of_all = few.layers[0].statistics, everything.layers[0].statistics
    assert of_few is not None and of_all is not None
    assert torch.equal(of_few.entropy, of_all.entropy[:, [2]]) and few.layers[0].probabilities is None
    with pytest.raises(ValueError, match="collect with statistics=True"):
        some.layers[0].head_entropy()
    with pytest.raises(ValueError, match="allowed are -4 to 3"):
        bk.attention_maps(model, input_ids=ids, heads=[4])
    with pytest.raises(ValueError, match=r"layers=\[7\] are not there; those of the model are 0, 1"):
        bk.attention_maps(model, input_ids=ids, layers=[7])


def test_a_model_whose_attention_runs_elsewhere() -> None:
    model = model_of("bert")
    with pytest.raises(ValueError, match=r"model=BertModel has no attention that runs here; patch it"):
        bk.attention_maps(model, input_ids=token_ids())


def test_collecting_ends_with_the_block_and_sees_one_model() -> None:
    model, other = prepared(model_of("gpt2")), prepared(model_of("bert"))
    ids = token_ids()
    with torch.no_grad(), bk.collect_attention(model) as maps:
        other(ids)
        assert len(maps) == 0
        model(ids)
        model(ids)
        thread = threading.Thread(target=lambda: model(ids))
        thread.start()
        thread.join()
    assert [layer.layer for layer in maps] == [0, 1, 0, 1]
    with torch.no_grad():
        model(ids)
    assert len(maps) == 4 and maps.output is None


def test_generation_is_collected_step_by_step() -> None:
    model = prepared(model_of("gpt2"))
    with bk.collect_attention(model, layers=[0]) as maps:
        model.generate(token_ids(2, 5), max_new_tokens=3, do_sample=False)
    shapes = [layer.statistics.mass.shape for layer in maps if layer.statistics is not None]
    assert shapes == [(2, 4, 5), (2, 4, 6), (2, 4, 7)]


def test_training_is_not_disturbed() -> None:
    """Collected numbers hold no graph, and the gradients are the same."""
    model = prepared(model_of("bert"))
    ids, mask = token_ids(), right_padding()

    def gradient() -> Any:
        model.zero_grad()
        model(ids, attention_mask=mask).last_hidden_state[mask.bool()].square().mean().backward()
        return model.encoder.layer[0].attention.self.query.weight.grad.clone()

    expected = gradient()
    with bk.collect_attention(model, probabilities=True, attention_mask=mask) as maps:
        torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-3)
    assert maps.layers[0].probabilities is not None and not maps.layers[0].probabilities.requires_grad


def test_encoder_and_decoder_have_paddings_of_their_own() -> None:
    config = transformers.BartConfig(
        vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.BartModel._from_config(config, attn_implementation="bigmodel").eval()
    source, target = right_padding(3, 17), right_padding(3, 11)
    maps = bk.attention_maps(
        model,
        input_ids=token_ids(3, 17),
        attention_mask=source,
        decoder_input_ids=token_ids(3, 11),
        decoder_attention_mask=target,
    )
    assert [layer.kind for layer in maps] == ["self", "self", "cross"]
    for layer, counted in zip(maps, (source, target, target), strict=True):
        assert layer.statistics is not None and layer.counted is not None
        torch.testing.assert_close(
            layer.statistics.mass.sum(-1), counted.sum(-1)[:, None].float().expand(-1, 4)
        )
    cross = maps.layers[2].statistics
    assert cross is not None and (cross.mass * (1 - source[:, None])).abs().max() == 0


@pytest.mark.parametrize("cls, config", [(BertModel, bert_config), (GPT2LMHeadModel, gpt2_config)])
def test_output_attentions_are_the_operator_s(cls: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = op.backends.run

    def spy(name: str, *args: Any) -> Any:
        calls.append(name)
        return run(name, *args)

    monkeypatch.setattr(op.backends, "run", spy)
    model = build(cls, config())
    eager, exact = eager_of(model), float64_of(model)
    bk.patch(model)
    ids = token_ids()
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
        expected = [other(ids, output_attentions=True).attentions for other in (eager, exact)]
    assert calls.count("attention_probabilities") == 2
    for ours, of_eager, reference in zip(found, *expected, strict=True):
        assert_as_near(ours, of_eager, reference)
    # Where a gradient is wanted they are plain PyTorch, and the output hangs on them.
    gradients = []
    for network in (model, eager, exact):
        output = network(ids, output_attentions=True)
        found = torch.autograd.grad(output[0].square().mean(), output.attentions)
        gradients.append({f"attentions.{i}": gradient for i, gradient in enumerate(found)})
    assert_gradients(*gradients)
    assert calls.count("attention_probabilities") == 2


def test_statistics_of_a_long_text_need_no_probabilities() -> None:
    """A forward with statistics makes no tensor of S x S elements."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    config = bert_config(max_position_embeddings=1600, num_hidden_layers=1)
    model = prepared(build(BertModel, config))
    with Largest() as sizes:
        bk.attention_maps(model, input_ids=token_ids(1, 1600))
    assert sizes.elements < 4 * 1600 * 1600 / 8
