"""What every patched decoder, with an encoder or without, does as eager does; each check takes an unpatched
model, and patches it.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import DynamicCache, StaticCache

import bigmodel_kernels as bk
from bigmodel_kernels.models import checks
from bigmodel_kernels.models.rule import (
    assert_as_near,
    assert_gradients,
    call,
    eager_of,
    float64_of,
    gradients_of,
    without_padding,
)
from bigmodel_kernels.models.tiny import (
    inputs_of,
    left_padding,
    right_padding,
    token_ids,
)


def crossed(name: str, every: Iterable[Any], prefixes: Iterable[str], different: Iterable[str]) -> Any:
    """Parametrizes a test with `prefix` and `name`: those of `different` with all values, and the other
    prefixes, which are one of these in other names, with the first value; the rest of the product is slow.
    """
    first, *rest = every
    pairs = [(prefix, value) for prefix in prefixes for value in (first, *rest)]
    return pytest.mark.parametrize(
        ("prefix", name),
        [
            pytest.param(*pair, marks=() if pair[0] in different or pair[1] == first else pytest.mark.slow)
            for pair in pairs
        ],
    )


class Doubled(nn.Linear):
    """As a quantised projection, in the place of a plain one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def logits_of(outputs: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{"logits": out["logits"]} for out in outputs]


#: The name of a cache in calls and in what they give; transformers before 5.24 has another.
CACHE = (
    "cache"
    if "cache" in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
    else "past_key_values"
)


def before(version: str) -> bool:
    """Whether transformers is older than this."""
    return Version(transformers.__version__) < Version(version)


def name_of_cache(model: Any) -> str:
    """The argument, under the name of the version of transformers."""
    return "cache" if "cache" in type(model.base_model).forward.__annotations__ else "past_key_values"


# ------------------------------------------------------------------------------------------------------------
# results


def check_padded_batch(model: Any, padding: Any, **options: Any) -> None:
    alone = not model.config.is_encoder_decoder  # whose attention has no softmax in float32: masks do no harm
    checks.check_forward(model, inputs_of(model, padding), alone=alone, **options)


def check_generation(model: Any, kind: str, padded: tuple[bool, ...], length: int, new: int) -> None:
    """The tokens of eager."""
    batch = 1 if kind == "prompt lookup" else 3
    for padding in padded:
        given = inputs_of(model, batch=batch)
        given.pop("decoder_input_ids", None)
        if "input_ids" in given:
            ids = token_ids(batch, length)
            mask = left_padding(batch, length) if padding else torch.ones_like(ids)
            given = {"input_ids": ids, "attention_mask": mask}
        checks.check_generation(model, given, kind, new)


def in_parts(
    network: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, stops: tuple[int, ...]
) -> torch.Tensor:
    """The logits of tokens that are given some at a time, each after what the cache has."""
    parts, start = [], 0
    with torch.no_grad():
        for stop in stops:
            seen = None if mask is None else mask[:, :stop]
            given = {"attention_mask": seen, name_of_cache(network): cache, "use_cache": True}
            parts.append(network(ids[:, start:stop], **given).logits)
            start = stop
    logits = torch.cat(parts, dim=1)
    return logits if mask is None else logits[mask.bool()]


def check_in_parts(model: Any, made_from: str, stops: tuple[int, ...]) -> None:
    """With a cache made from "nothing", from the "config", or "static"."""
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    ids, mask, outputs = token_ids(), left_padding(), []
    for network in (model, eager):
        cache: Any = DynamicCache() if made_from == "nothing" else DynamicCache(config=network.config)
        if made_from == "static":
            cache = StaticCache(config=network.config, max_cache_len=20)
        outputs.append(in_parts(network, ids, mask, cache, stops))
    with torch.no_grad():
        assert_as_near(*outputs, without_padding(reference, ids, mask))


def check_states_and_attentions(model: Any, attentions: bool) -> None:
    torch.manual_seed(1)
    checks.check_outputs(model, inputs_of(model, right_padding), attentions, use_cache=False)


def check_autocast(model: Any) -> None:
    """Types are those of eager, and the result is as near to float64."""
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected = call(reference, inputs, output_hidden_states=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a, b = (call(m, inputs, output_hidden_states=True) for m in (model, eager))
    for states in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
        if a.get(states) is not None:
            assert [t.dtype for t in a[states]] == [t.dtype for t in b[states]]
            assert_as_near(a[states][-1], b[states][-1], expected[states][-1])
    assert_as_near(a.logits, b.logits, expected.logits)


# ------------------------------------------------------------------------------------------------------------
# gradients


def check_gradients(model: Any, training: bool = True, **options: Any) -> None:
    checks.check_gradients(model, inputs_of(model), training, **options)


def check_gradients_under_autocast(model: Any) -> None:
    models = (model.train(), eager_of(model), float64_of(model).train())
    bk.patch(model)
    inputs = inputs_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = (gradients_of(m, inputs) for m in models[:2])
    assert_gradients(ours, eager, gradients_of(models[2], inputs))


def check_gradient_checkpointing(model: Any, reentrant: bool) -> None:
    models = (model.train(), eager_of(model), float64_of(model).train())
    bk.patch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    inputs = inputs_of(model)
    assert_gradients(*(gradients_of(m, inputs) for m in models))


def check_lora(model: Any, targets: list[str], after: bool, note: str) -> None:
    """With adapters on the projections `targets`, put there after patching or before."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    if after:
        bk.patch(model)
    adapted = peft.get_peft_model(model, config).train()
    reference = eager_of(adapted)
    report = bk.patch(adapted)
    assert any(note in row.reason for row in report.patched)
    inputs = inputs_of(model)
    models = (adapted, reference, copy.deepcopy(reference).double())
    assert_gradients(*(gradients_of(m, inputs) for m in models))


def check_dropout(model: Any, layer_of: Callable[[Any], Any]) -> None:
    """The same at the same seed, other at another; what a layer drops is what eager drops, in the mean."""
    eager = eager_of(model.train())
    bk.patch(model)
    inputs, made, states = (
        {k: v[:, :5] if v.dim() == 2 else v for k, v in inputs_of(model, batch=1).items()},
        [],
        [],
    )
    with torch.no_grad():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(call(model, inputs, use_cache=False).logits)
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
        many = {name: t.expand(2000, *t.shape[1:]) for name, t in inputs.items()}
        for network in (model, eager):
            found: list[torch.Tensor] = []
            handle = layer_of(network).register_forward_hook(
                lambda m, args, out, found=found: found.append(
                    torch.stack([args[0], out[0] if isinstance(out, tuple) else out])
                )
            )
            call(network, many, use_cache=False)
            handle.remove()
            states.append(found[0][1] - found[0][0])
    for moment in (torch.mean, torch.std):
        ours, theirs = (moment(s, dim=0) for s in states)
        assert (ours - theirs).abs().mean() < 0.1 * theirs.abs().mean()


# ------------------------------------------------------------------------------------------------------------
# compiled


def check_compiled(model: Any, padded: bool) -> None:
    inputs = inputs_of(model, left_padding if padded else None)
    alone = padded and not model.config.is_encoder_decoder
    # Without padding also with a cache, for which transformers copies the config of an encoder-decoder.
    checks.check_forward(model, inputs, alone=alone, compiled=True, use_cache=not padded)


def check_compiled_decoding(model: Any) -> None:
    """With a static cache."""
    eager = eager_of(model)
    bk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, outputs = token_ids(3, 9), []
    for network, decode in ((model, compiled), (eager, eager)):
        cache = StaticCache(config=network.config, max_cache_len=16)
        mask, parts = left_padding(3, 9), []
        name = name_of_cache(network)
        with torch.no_grad():
            network(ids, attention_mask=mask, use_cache=True, **{name: cache})
            for step in range(3):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                given = {"attention_mask": mask, "position_ids": torch.full((3, 1), 9 + step), name: cache}
                parts.append(decode(ids[:, step : step + 1], use_cache=True, **given).logits)
        outputs.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# patching


def check_unpatching_pickle_deepcopy_and_saving(model: Any, tmp_path: Path) -> None:
    inputs = inputs_of(model, left_padding)
    checks.check_unpatching(model, inputs)
    checks.check_copies(model, inputs)
    bk.unpatch(model)
    checks.check_saving(model, inputs, tmp_path)


def check_names_of_family(prefix: str, name: str) -> None:
    """A family names only classes with the prefix, and pickle finds their forms in its file."""
    family = importlib.import_module(f"bigmodel_kernels.transformers.families.{name}")
    for rule in (*family.FAMILY.rules, *family.FAMILY.losses):
        assert issubclass(rule.patched, rule.original) and rule.original.__name__.startswith(prefix)
        assert getattr(family, rule.patched.__qualname__) is rule.patched
