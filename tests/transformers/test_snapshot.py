from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertModel, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels import _native
from bigmodel_kernels.models.tiny import bert_config, build, gpt2_config
from bigmodel_kernels.transformers import whole_layer
from bigmodel_kernels.transformers.snapshot import Snapshot

CPU = torch.device("cpu")


def layer() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))


def swap(module: nn.Module, name: str) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(old.detach().clone()))


class Other(nn.Linear):
    pass


def other_class(m: Any) -> None:
    m[0].__class__ = Other


def no_bias(m: Any) -> None:
    m[0].bias = None
    gc.collect()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter": lambda m: swap(m[0], "weight"),
    "a bias that goes": no_bias,
    "a bias that comes": lambda m: setattr(m[3], "bias", nn.Parameter(torch.zeros(4))),
    "a parameter of its own name": lambda m: m[2].register_parameter("gate", nn.Parameter(torch.ones(4))),
    "memory of another dtype": lambda m: setattr(m[2].weight, "data", m[2].weight.data.bfloat16()),
    "a module": lambda m: m.__setitem__(1, nn.Dropout(0.1)),
    "one module more": lambda m: m.append(nn.Identity()),
    "a class": other_class,
    "a probability": lambda m: setattr(m[1], "p", 0.2),
    "an epsilon": lambda m: setattr(m[2], "eps", 1e-3),
    "training": lambda m: m[1].train(),
    "a hook": lambda m: m[0].register_forward_hook(lambda *a: None),
    "a hook before": lambda m: m[0].register_forward_pre_hook(lambda *a: None),
    "a hook of gradients": lambda m: m[0].register_full_backward_hook(lambda *a: None),
    "a forward of its own": lambda m: setattr(m[3], "forward", lambda x: x),
    "a weight that is computed": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    module = layer().eval()
    snapshot = Snapshot([module])
    held = snapshot.parameters(torch.float32, CPU)
    assert held is not None
    assert [id(p) for p in held if p is not None] == [id(p) for p in module.parameters()]
    CHANGES[name](module)
    assert snapshot.parameters(torch.float32, CPU) is None


def test_what_comes_back_is_the_same() -> None:
    module = layer().eval()
    snapshot = Snapshot([module])
    hook = module[0].register_forward_hook(lambda *a: None)  # type: ignore[index]
    module.train()
    assert snapshot.parameters(torch.float32, CPU) is None
    hook.remove()
    module.eval()
    assert snapshot.parameters(torch.float32, CPU) is not None
    assert snapshot.parameters(torch.bfloat16, CPU) is None
    assert snapshot.parameters(torch.float32, torch.device("meta")) is None


def test_parameters_are_not_kept_alive() -> None:
    module = layer()
    snapshot = Snapshot([module])
    dead = weakref.ref(module[0].weight)  # type: ignore[index]
    swap(module[0], "weight")  # type: ignore[index]
    gc.collect()
    assert dead() is None and snapshot.parameters(torch.float32, CPU) is None


# ---- of models, whose layers are one call ----


def bert() -> Any:
    return build(BertModel, bert_config(num_hidden_layers=3))


def gpt2() -> Any:
    return build(GPT2LMHeadModel, gpt2_config(n_layer=3))


def run(model: Any) -> torch.Tensor:
    ids = torch.arange(7)[None] + 5
    with torch.no_grad():
        if isinstance(model, BertModel):
            return model(input_ids=ids).last_hidden_state
        cache = model(ids, use_cache=True).past_key_values
        return model(ids[:, -1:], past_key_values=cache, use_cache=True).logits


def last(model: Any) -> Any:
    """The last layer's feed-forward and its last projection."""
    return model.encoder.layer[2].output if isinstance(model, BertModel) else model.transformer.h[2].mlp


def projection(model: Any) -> tuple[Any, str]:
    return (last(model), "dense") if isinstance(model, BertModel) else (last(model), "c_proj")


def other_projection(model: Any) -> None:
    owner, name = projection(model)
    new = copy.deepcopy(getattr(owner, name))
    with torch.no_grad():
        new.weight.mul_(3)
    setattr(owner, name, new)


def scale_data(model: Any) -> None:
    owner, name = projection(model)
    getattr(owner, name).weight.data.mul_(3)


def other_weight(model: Any) -> None:
    owner, name = projection(model)
    part = getattr(owner, name)
    part.weight = nn.Parameter(part.weight.detach() * 3)


def other_bias(model: Any) -> None:
    owner, name = projection(model)
    getattr(owner, name).bias.data = torch.ones(48)


def doubled(model: Any) -> None:
    owner, name = projection(model)
    getattr(owner, name).register_forward_hook(lambda module, args, out: 2 * out)


def epsilon(model: Any) -> None:
    norm = (
        model.encoder.layer[1].output.LayerNorm
        if isinstance(model, BertModel)
        else model.transformer.h[1].ln_2
    )
    norm.eps = 0.5


def fewer_layers(model: Any) -> None:
    if isinstance(model, BertModel):
        del model.encoder.layer[1]
    else:
        del model.transformer.h[1]
        model.config.n_layer = 2
        model.transformer.h[1].attn.layer_idx = 1


EDITS = (other_projection, scale_data, other_weight, other_bias, doubled, epsilon, fewer_layers)


@pytest.mark.skipif(not _native.available(), reason="needs the compiled library")
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_a_model_is_what_it_is_at_each_call(make: Callable[[], Any], edit: Callable[[Any], Any]) -> None:
    model, expected = make(), make()
    bk.patch(model)
    before = run(model)
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    for each in (model, expected):
        edit(each)
    after = run(model)
    torch.testing.assert_close(after, run(expected), rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)


@pytest.mark.skipif(not _native.available(), reason="needs the compiled library")
@pytest.mark.parametrize("make", [bert, gpt2], ids=lambda make: make.__name__)
def test_layers_are_looked_at_once_and_die_with_their_model(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    bk.patch(model)
    run(model)
    made = []
    monkeypatch.setattr(whole_layer, "Snapshot", lambda modules: made.append(modules) or Snapshot(modules))
    run(model)
    assert not made
    model.train()
    model.eval()
    run(model)
    assert not made
    run(copy.deepcopy(model))
    assert len(made) == (1 if isinstance(model, BertModel) else 2)  # its layers, and for a token all of it
    dead = weakref.ref(model.encoder.layer[0] if isinstance(model, BertModel) else model.transformer.h[0])
    del model
    made.clear()
    gc.collect()
    assert dead() is None
