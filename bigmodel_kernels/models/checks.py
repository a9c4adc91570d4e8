"""What a patched model has to do as the unpatched one does.

Each check takes an unpatched model and the arguments of its forward, patches the model, and raises
CheckFailed with the numbers where they differ by more than the rule allows. Those that measure return the
largest error as a part of what is allowed.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bigmodel_kernels as bk
from bigmodel_kernels.models.rule import (
    assert_all_near,
    assert_as_near,
    assert_gradients,
    at_real_tokens,
    call,
    eager_of,
    float64_of,
    gradients_of,
    real_of,
    require,
    runs,
    without_padding,
)
from bigmodel_kernels.transformers.report import PatchReport

Inputs = Mapping[str, Any]

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no cache": {"do_sample": False, "use_cache": False},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


# ------------------------------------------------------------------------------------------------------------
# results


def check_report(model: Any) -> PatchReport:
    """Something is patched, or every other check would compare a model with itself."""
    report = bk.patch(model)
    reasons = "; ".join(dict.fromkeys(f"{row.name}: {row.reason}" for row in report.left_alone))
    require(bool(report.patched), f"no module is patched: {'; '.join([*report.notes, reasons])}")
    return report


def check_outputs(model: Any, inputs: Inputs, attentions: bool = False, **options: Any) -> float:
    """All outputs at real tokens, with the hidden states and, where asked for, attention probabilities."""
    asked = {"output_hidden_states": True, **({"output_attentions": True} if attentions else {})}
    outputs = runs(model, **inputs, **asked, **options)
    for what, wanted in (("hidden_states", True), ("attentions", attentions)):
        found = any(what in name for name in outputs[0])
        require(found == wanted, f"{what} are{'' if found else ' not'} among the outputs")
    return assert_all_near(outputs, real_of(inputs) if "attention_mask" in inputs else None)


def check_forward(
    model: Any, inputs: Inputs, *, alone: bool = False, compiled: bool = False, **options: Any
) -> float:
    """The first output, at real tokens; of a compiled model, which must trace without a break.

    alone: the reference is each sequence by itself, see `without_padding`.
    """
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    network = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        out, expected = (at_real_tokens(call(m, inputs, **options)[0], inputs) for m in (network, eager))
        if alone:
            exact = without_padding(reference, inputs["input_ids"], real_of(inputs))
        else:
            exact = at_real_tokens(call(reference, inputs, **options)[0], inputs)
    return assert_as_near(out, expected, exact, name="first output")


def check_generation(model: Any, inputs: Inputs, kind: str, new: int) -> None:
    """The tokens of eager, of `GENERATION[kind]`; `inputs` are those of `generate`."""
    eager = eager_of(model)
    bk.patch(model)
    made = []
    for network in (model, eager):
        torch.manual_seed(5)
        made.append(network.generate(**inputs, max_new_tokens=new, pad_token_id=0, **GENERATION[kind]))
    same = made[0].shape == made[1].shape and torch.equal(*made)
    require(same, f"{kind} generation makes {made[0].tolist()}, eager {made[1].tolist()}")


def check_gradients(model: Any, inputs: Inputs, training: bool = True, **options: Any) -> float:
    """Those of all parameters. The model has no dropout; `options` are those of `patch`."""
    models = (model.train(training), eager_of(model).train(training), float64_of(model).train(training))
    bk.patch(model, **options)
    ours, eager, reference = (gradients_of(m, inputs) for m in models)
    return assert_gradients(ours, eager, reference)


# ------------------------------------------------------------------------------------------------------------
# patching


def check_unpatching(model: Any, inputs: Inputs) -> None:
    """Patching again patches nothing more; unpatched, the model is the same to the last bit."""
    classes = [type(m) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(**inputs)[0]
        bk.patch(model)
        model(**inputs)
        again = [row.name for row in bk.patch(model).rows if row.status == "patched"]
        require(not again, f"patched a second time: {', '.join(again)}")
        require(model.state_dict().keys() == state.keys(), "the names of the state_dict have changed")
        for name, value in model.state_dict().items():
            require(torch.equal(value, state[name]), f"{name} has changed")
        require(bk.unpatch(model) > 0, "unpatch has restored nothing")
        changed = [
            new.__name__
            for new, old in zip(map(type, model.modules()), classes, strict=True)
            if new is not old
        ]
        require(not changed, f"still patched: {', '.join(changed)}")
        after = model(**inputs)[0]
    require(torch.equal(after, before), f"off by {(after - before).abs().max():.3e} after unpatch")


def check_copies(model: Any, inputs: Inputs) -> None:
    """deepcopy and pickle of a patched model give patched ones, with the same output."""
    bk.patch(model)
    with torch.no_grad():
        out = model(**inputs)[0]
        for name, copied in (
            ("deepcopy", copy.deepcopy(model)),
            ("pickle", pickle.loads(pickle.dumps(model))),
        ):
            require(
                [*map(type, copied.modules())] == [*map(type, model.modules())], f"{name} loses the patch"
            )
            difference = (copied(**inputs)[0] - out).abs().max()
            require(difference == 0, f"after {name} the output is off by {difference:.3e}")


def check_saving(model: Any, inputs: Inputs, folder: Path) -> None:
    """A patched model saves what the unpatched one does; loaded, that is unpatched, and can be patched."""
    model.save_pretrained(folder / "unpatched")
    bk.patch(model)
    model.save_pretrained(folder / "patched")
    # Both are loaded: what a config does not keep (an implementation of experts) is lost either way.
    expected, loaded = (
        type(model).from_pretrained(folder / name).eval() for name in ("unpatched", "patched")
    )
    ours = [type(m).__name__ for m in loaded.modules() if type(m).__module__.startswith("bigmodel_kernels.")]
    require(not ours, f"the loaded model is patched: {', '.join(ours)}")
    with torch.no_grad():
        for state in ("", " and patching"):
            difference = (loaded(**inputs)[0] - expected(**inputs)[0]).abs().max()
            require(difference == 0, f"after loading{state} the output is off by {difference:.3e}")
            bk.patch(loaded)
            bk.patch(expected)
