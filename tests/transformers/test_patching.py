"""The mechanism: what patching touches, that it is undone exactly, what it leaves alone, and what survives
it.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomModel,
    CTRLConfig,
    CTRLModel,
    GPT2LMHeadModel,
)
from transformers.models.bert import modeling_bert
from transformers.pytorch_utils import Conv1D

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import eager_of
from bigmodel_kernels.models.tiny import (
    TINY,
    VOCABULARY,
    bert_config,
    build,
    gpt2_config,
    inputs_of,
    right_padding,
    token_ids,
)
from bigmodel_kernels.transformers import config_view, patching

MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: build(BertForMaskedLM, bert_config()),
    "bare bert": lambda: build(BertModel, bert_config()),
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config()),
}


def snapshot(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """Name, class and the very objects in the `__dict__` of each module."""
    return [(name, type(module), dict(module.__dict__)) for name, module in model.named_modules()]


def assert_same(before: list[Any], after: list[Any]) -> None:
    for (name, cls, state), (other_name, other_cls, other) in zip(before, after, strict=True):
        assert name == other_name and cls is other_cls, name
        assert list(state) == list(other), name
        assert all(state[key] is other[key] for key in state), name


def forward(model: Any, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(token_ids(), attention_mask=right_padding())[0][right_padding().bool()]


@pytest.mark.parametrize("kind", MODELS)
def test_unpatching_restores_everything(kind: str) -> None:
    model = MODELS[kind]()
    before, out = snapshot(model), forward(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    report = bk.patch(model)
    assert report.patched and report.applied
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    forward(model)
    assert bk.unpatch(model) == len(report.patched)
    assert_same(before, snapshot(model))
    assert torch.equal(forward(model), out)
    assert bk.unpatch(model) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_patching_twice_and_nested(kind: str) -> None:
    model = MODELS[kind]()
    before = snapshot(model)
    with bk.patched(model) as outer:
        once = snapshot(model)
        with bk.patched(model) as inner:
            assert {row.status for row in inner.patched} == {"already patched"}
            assert [row.name for row in inner.patched] == [row.name for row in outer.patched]
            assert_same(once, snapshot(model))
        assert_same(once, snapshot(model))
        bk.patch(model)
        assert_same(once, snapshot(model))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("kind", MODELS)
def test_recomputing_is_undone_too(kind: str) -> None:
    model = MODELS[kind]()
    before = snapshot(model)
    with bk.patched(model, recompute=True) as report:
        assert any("again in the backward" in row.reason for row in report.patched)
    assert_same(before, snapshot(model))
    bk.patch(model)
    once = snapshot(model)
    with bk.patched(model, recompute=True):
        pass
    assert_same(once, snapshot(model))


def test_patched_undoes_itself_after_an_error() -> None:
    model = MODELS["bert"]()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="boom"), bk.patched(model):
        raise RuntimeError("boom")
    assert_same(before, snapshot(model))


def test_only_what_it_has_patched_itself_is_undone() -> None:
    model = MODELS["bert"]()
    bk.patch(model.bert.encoder.layer[0])
    first = snapshot(model)
    with bk.patched(model):
        assert type(model.bert.encoder).__name__ == "BigmodelBertEncoder"
    assert_same(first, snapshot(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fails_at", [0, 1, 3, 7])
def test_a_failure_midway_rolls_back(kind: str, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[kind]()
    before = snapshot(model)
    apply, count = patching.Change.apply, [0]

    def failing(self: patching.Change) -> None:
        if count[0] == fails_at:
            raise RuntimeError("no")
        count[0] += 1
        apply(self)

    monkeypatch.setattr(patching.Change, "apply", failing)
    with pytest.raises(RuntimeError, match="no"):
        bk.patch(model)
    assert_same(before, snapshot(model))


def test_no_class_or_global_of_transformers_changes() -> None:
    before = dict(vars(modeling_bert).items())
    members = {
        name: dict(vars(v))
        for name, v in before.items()
        if isinstance(v, type) and v.__module__.endswith("bert")
    }
    forwards = modeling_bert.BertEncoder.forward
    other = MODELS["bert"]()
    bk.patch(MODELS["bert"]())
    assert vars(modeling_bert) == before
    assert {name: dict(vars(before[name])) for name in members} == members
    assert modeling_bert.BertEncoder.forward is forwards
    assert type(other.bert.encoder) is modeling_bert.BertEncoder


def test_two_models_that_share_a_config() -> None:
    config = bert_config()
    one, other = build(BertModel, config), build(BertModel, config)
    other.load_state_dict(one.state_dict())
    before = snapshot(other)
    expected = forward(other)
    bk.patch(one)
    assert config._attn_implementation == "sdpa"
    assert_same(before, snapshot(other))
    assert torch.equal(forward(other), expected)
    torch.testing.assert_close(forward(one), expected, atol=1e-5, rtol=1e-5)
    # What the user changes later is seen by both, and none of it is lost.
    one.config.output_hidden_states = True
    assert config.output_hidden_states and other.config.output_hidden_states
    with torch.no_grad():
        assert len(one(token_ids()).hidden_states) == 3
    build(BertModel, one.config)
    assert config._attn_implementation == "sdpa"
    bk.unpatch(one)
    assert one.config is config


@pytest.mark.parametrize("kind", ["eager code", "interface"])
@pytest.mark.parametrize("how", ["patched", "deepcopy", "pickle"])
def test_another_model_is_made_with_the_config_of_a_patched_one(kind: str, how: str) -> None:
    """It gets plain masks, which are the only ones that BLOOM's own code reads; the patched one keeps its."""
    if kind == "interface":
        one = build(BertModel, bert_config())
    else:
        one = build(BloomModel, BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=2))
    cls, config, expected = type(one), one.config, forward(one)
    with bk.patched(one):
        copies = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
        twin = copies[how](one) if how in copies else one
        ours = forward(twin)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        other = build(cls, twin.config)
        other.load_state_dict(one.state_dict())
        assert other.config._attn_implementation == config._attn_implementation
        assert torch.equal(forward(other), expected)
        assert config_view.is_complete(twin.config) == (how != "pickle")  # which knows no owner: full masks
        torch.testing.assert_close(forward(twin), ours, atol=1e-5, rtol=1e-5)
        assert bk.unpatch(other) == 0
        bk.patch(twin)
        assert config_view.is_complete(twin.config) and config_view.is_complete(one.config)
    assert one.config is config
    assert torch.equal(forward(one), expected) and torch.equal(forward(other), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_part_is_unpatched(kind: str) -> None:
    """The rest of the model then makes masks that the part can read, until the whole is patched again."""
    model = MODELS[kind]()
    # Of one length and of one sequence a small mask would pass as something else, and give wrong numbers.
    masks = [torch.ones(5, 5, dtype=torch.long).tril(), torch.tensor([[1, 1, 1, 0, 0]])]
    ids = [torch.arange(mask.numel()).view(mask.shape) % 90 for mask in masks]

    def logits(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(i, attention_mask=m)[0][m.bool()] for i, m in zip(ids, masks, strict=True)]

    expected = logits(model)
    bk.patch(model)
    classes = [type(module) for module in model.modules()]
    assert model.base_model.config._attn_implementation == "bigmodel"
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    assert bk.unpatch(layers[0]) > 0
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for out, right in zip(logits(twin), expected, strict=True):
            torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)
        assert twin.base_model.config._attn_implementation == "sdpa"
    bk.patch(model)
    assert model.base_model.config._attn_implementation == "bigmodel"
    assert [type(module) for module in model.modules()] == classes
    for out, right in zip(logits(model), expected, strict=True):
        torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)


def test_the_view_of_a_config() -> None:
    config = gpt2_config()
    view = config_view.view(config)
    assert isinstance(view, type(config)) and view == config and config == config_view.base_of(view)
    assert (view._attn_implementation, config._attn_implementation) == ("bigmodel", "sdpa")
    assert view.hidden_size == config.n_embd and view.to_dict() == config.to_dict()
    assert view.to_json_string() == config.to_json_string()
    assert type(type(view)(n_head=2)) is type(config) and type(view).from_dict({"n_head": 2}).n_head == 2
    view.n_head = 2
    assert config.n_head == 2
    of_a_model = copy.deepcopy([view])[0]
    for alone in (copy.deepcopy(view), copy.copy(view)):
        assert type(alone) is type(config) and alone == config and alone._attn_implementation == "sdpa"
    for again in (pickle.loads(pickle.dumps(view)), of_a_model):
        assert again._attn_implementation == "bigmodel" and again == config
        again.n_head = 3
        assert config_view.base_of(again).n_head == 3
    view._attn_implementation = "eager"
    assert (view._attn_implementation, config._attn_implementation) == ("bigmodel", "eager")


@pytest.mark.parametrize("kind", MODELS)
def test_state_dict_save_and_load(kind: str, tmp_path: Any) -> None:
    model = MODELS[kind]()
    plain = copy.deepcopy(model)
    bk.patch(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    for name, network in (("patched", model), ("plain", plain)):
        network.save_pretrained(tmp_path / name)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("patched", "plain")]
    assert configs[0] == configs[1]
    assert configs[0]["architectures"] == [type(plain).__name__]
    loaded = type(plain).from_pretrained(tmp_path / "patched").eval()
    assert type(loaded) is type(plain)
    assert torch.equal(forward(loaded), forward(plain))
    bk.patch(loaded)
    assert torch.equal(forward(loaded), forward(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_of_a_patched_model(kind: str, how: str, tmp_path: Any) -> None:
    model = MODELS[kind]()
    before = [(name, type(module)) for name, module in model.named_modules()]
    bk.patch(model)
    out = forward(model)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(forward(twin), out)
    assert isinstance(twin, type(model))
    bk.unpatch(twin)
    assert [(name, type(module)) for name, module in twin.named_modules()] == before
    assert torch.equal(forward(model), out)


def test_weights_replaced_after_patching_are_seen() -> None:
    def load(model: Any, donor: Any) -> None:
        model.load_state_dict(donor.state_dict())

    def in_place(model: Any, donor: Any) -> None:
        with torch.no_grad():
            for a, b in zip(model.parameters(), donor.parameters(), strict=True):
                a.copy_(b)

    def data(model: Any, donor: Any) -> None:
        for a, b in zip(model.parameters(), donor.parameters(), strict=True):
            a.data = b.data.clone()

    def data_in_place(model: Any, donor: Any) -> None:
        for a, b in zip(model.parameters(), donor.parameters(), strict=True):
            a.data.copy_(b.data)

    def reassign(model: Any, donor: Any) -> None:
        for (_, module), (_, other) in zip(model.named_modules(), donor.named_modules(), strict=True):
            for name, parameter in list(other.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))

    for kind in ("bare bert", "gpt2"):
        for replace in (load, in_place, data, data_in_place, reassign):
            model, donor = MODELS[kind](), MODELS[kind]()
            with torch.no_grad():
                for parameter in donor.parameters():
                    parameter.mul_(1.3)
            bk.patch(model)
            first = forward(model)
            replace(model, donor)
            assert not torch.allclose(forward(model), first)
            torch.testing.assert_close(forward(model), forward(donor), atol=2e-5, rtol=1e-4)
        model = MODELS[kind]()
        bk.patch(model)
        first = forward(model)
        low = forward(model.to(torch.bfloat16))
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), first, atol=0.2, rtol=0.1)
        torch.testing.assert_close(forward(model.to(torch.float64)).float(), low.float(), atol=0.2, rtol=0.1)


def test_fine_tuning_a_patched_model() -> None:
    """Optimizer steps are seen at each forward, and the loss goes where eager's goes."""
    losses = []
    for patch in (True, False):
        model = build(
            BertForSequenceClassification,
            bert_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        ).train()
        if patch:
            bk.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(0)
        ids, labels = token_ids(), torch.tensor([0, 1, 1])
        run = []
        for _ in range(5):
            loss = model(ids, attention_mask=right_padding(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


# ------------------------------------------------------------------------------------------------------------
# what is left alone


class Swapped(nn.Linear):
    """Stands for what LoRA and quantisation put in the place of nn.Linear."""


class OwnSelfAttention(modeling_bert.BertSelfAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out + 1, weights


class OwnBert(BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["token_type_ids"] = None
        return super().forward(*args, **kwargs)


def attention_of(model: Any) -> Any:
    return model.encoder.layer[1].attention.self


def swap(model: Any) -> None:
    attention_of(model).query.__class__ = Swapped


def subclass(model: Any) -> None:
    attention_of(model).__class__ = OwnSelfAttention


def hook(model: Any) -> None:
    attention_of(model).value.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(model: Any) -> None:
    attention_of(model).register_forward_pre_hook(lambda module, args: None)


def backward_hook(model: Any) -> None:
    attention_of(model).key.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def own_forward(model: Any) -> None:
    inner = attention_of(model).query
    inner.forward = lambda x: 2 * nn.Linear.forward(inner, x)


def parametrized(model: Any) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    nn.utils.parametrize.register_parametrization(attention_of(model).key, "weight", Half())


def pruned(model: Any) -> None:
    attention_of(model).pruned_heads = {1}


@pytest.mark.parametrize(
    "change, reason",
    [
        (swap, "query: test_patching.Swapped is a subclass of Linear that is not known"),
        (subclass, "test_patching.OwnSelfAttention is a subclass of BertSelfAttention that is not known"),
        (hook, "value: it has a forward hook"),
        (pre_hook, "it has a forward pre-hook"),
        (backward_hook, "key: it has a backward hook"),
        (own_forward, "query: forward is replaced on the instance (offloading or another wrapper)"),
        (parametrized, "key: its Linear is parametrized"),
        (pruned, "it has pruned heads"),
    ],
)
def test_an_attention_that_is_not_as_known(change: Callable[[Any], None], reason: str) -> None:
    """It is left alone, the rest is patched, and the result is the model's own."""
    model = build(BertModel, bert_config())
    change(model)
    expected = forward(model)
    report = bk.patch(model)
    rows = {row.name: row for row in report.rows}
    row = rows["encoder.layer.1.attention.self"]
    assert (row.status, row.reason) == ("left alone", reason)
    encoder = rows["encoder"]
    assert encoder.status == "left alone" and "run one by one" in encoder.reason
    assert rows["encoder.layer.0.attention.self"].status == "patched"
    assert rows["encoder.layer.1"].status == "patched"
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert", "gpt2", "opt", "bart"])
def test_norms_that_are_taken_out(family: str, when: str) -> None:
    """What stands in the place of a norm has no epsilon."""
    model = TINY[family].model()
    eager, inputs = eager_of(model), inputs_of(model)
    if when == "after":
        bk.patch(model)
    for network in (model, eager):
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.LayerNorm):
                network.set_submodule(name, nn.Identity())
    bk.patch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], eager(**inputs)[0], atol=1e-3, rtol=1e-3)


def test_a_subclass_of_the_model_with_its_own_forward() -> None:
    model = build(OwnBert, bert_config())
    expected = forward(model)
    bk.patch(model)
    assert not config_view.is_view(model.config)  # its masks stay dense: who knows what it does with them
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ["mish", "gelu_10"])
def test_an_activation_that_has_no_kernel(act: str) -> None:
    for model, name in (
        (build(BertForMaskedLM, bert_config(hidden_act=act)), "bert.encoder.layer.0"),
        (build(GPT2LMHeadModel, gpt2_config(activation_function=act)), "transformer.h.0.mlp"),
    ):
        expected = forward(model)
        row = next(row for row in bk.patch(model).rows if row.name == name)
        assert row.status == "left alone" and "has no kernel" in row.reason
        torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_loaded_or_not_plain() -> None:
    with torch.device("meta"):
        model = BertModel(bert_config())
    report = bk.patch(model)
    assert not report.patched
    assert "meta device" in next(row.reason for row in report.rows if row.module == "BertSelfAttention")

    class Quantised(torch.Tensor):
        pass

    model = build(BertModel, bert_config())
    weight = torch.Tensor._make_subclass(Quantised, attention_of(model).query.weight.data.clone())
    attention_of(model).query.weight = nn.Parameter(weight, requires_grad=False)
    row = next(row for row in bk.patch(model).rows if row.name == "encoder.layer.1.attention.self")
    assert row.status == "left alone" and "query: weight is a" in row.reason


def test_gpt2_parts_that_are_not_as_known() -> None:
    model = build(GPT2LMHeadModel, gpt2_config())

    class OwnConv1D(Conv1D):
        pass

    model.transformer.h[0].attn.c_attn.__class__ = OwnConv1D
    model.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    expected = forward(model)
    report = bk.patch(model)
    rows = {row.name: row for row in report.rows}
    assert "OwnConv1D is a subclass" in rows["transformer.h.0.attn"].reason
    assert rows["transformer.h.0"].status == "left alone" and "attn: c_attn" in rows["transformer.h.0"].reason
    assert rows["transformer.h.0.mlp"].status == "patched"
    assert rows["transformer.h.1.mlp"].reason == "it has a forward hook"
    torch.testing.assert_close(forward(model), expected, atol=1e-5, rtol=1e-5)


def test_a_model_of_no_known_family() -> None:
    model = build(CTRLModel, CTRLConfig(vocab_size=50, n_embd=16, dff=16, n_layer=1, n_head=2))
    before = snapshot(model)
    report = bk.patch(model)
    assert not report.patched and "attn_implementation='bigmodel'" in str(report)
    assert_same(before, snapshot(model))
    with pytest.raises(TypeError, match="model is a str"):
        bk.patch("bert-base-uncased")


# ------------------------------------------------------------------------------------------------------------
# reports


@pytest.mark.parametrize("kind", MODELS)
def test_explain_changes_nothing_and_says_what_patch_would(kind: str) -> None:
    model = MODELS[kind]()
    before = snapshot(model)
    explained = bk.explain(model)
    assert not explained.applied and "would be patched" in str(explained)
    assert_same(before, snapshot(model))
    done = bk.patch(model)
    assert [(r.name, r.status, r.ops, r.backends) for r in explained.rows] == [
        (r.name, r.status, r.ops, r.backends) for r in done.rows
    ]


def test_the_report() -> None:
    model = MODELS["bert"]()
    report = bk.patch(model)
    assert len(report.patched) == 1 + 1 + 1 + 3 * 2 + 2
    assert all(len(row.ops) == len(row.backends) for row in report.patched)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["patched"] == len(report.patched) and data["transformers_version"]
    assert data["rows"][0]["name"] == "bert"
    text = str(report)
    assert "BertSelfAttention" in text and "packed weights" in text and report.transformers_version in text
    forward(model)
    later = bk.explain(model)
    assert 0 <= later.packed_bytes <= 2 * later.packed_bytes_at_most + 1


def test_every_module_with_weights_is_accounted_for() -> None:
    for kind in MODELS:
        model = MODELS[kind]()
        names = {row.name for row in bk.explain(model).rows}
        for name, module in model.named_modules():
            if module._parameters and not module._modules:
                parts = name.split(".")
                assert any(".".join(parts[:i]) in names for i in range(1, len(parts) + 1)), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_asked_for_by_the_config_of_a_patched_model(implementation: str) -> None:
    """As the model's own config has it: eager allows it, and sdpa refuses."""
    model = build(BertModel, bert_config(attn_implementation=implementation))
    inputs = {"input_ids": token_ids(), "attention_mask": right_padding()}
    bk.patch(model)
    if implementation == "sdpa":
        with pytest.raises(ValueError, match="`attn_implementation` set to sdpa"):
            model.config.output_attentions = True
        return
    model.config.output_attentions = True
    with torch.no_grad():
        found = model(**inputs).attentions
        bk.unpatch(model)
        expected = model(**inputs).attentions
    assert model.config.output_attentions and len(found) == len(expected) == 2
    seen = right_padding().bool()[:, None].expand(-1, 4, -1)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[seen], eager[seen])
