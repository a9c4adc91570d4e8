"""The rule that a patched model must meet: it is as near to the same model in float64 as eager is.

The rule is that of the operators (`bigmodel_kernels.verify.compare`), with the output of the float64 model as
`ref` and that of transformers' eager code in the dtype at hand as `eager`. The errors of a model's outputs
are not independent of each other, as that rule takes them to be: all have come through the same layers. Of
fewer than 1000 numbers chance decides how near eager is, and 8 ulps of the largest are allowed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels.transformers.attention_interface import set_implementation
from bigmodel_kernels.verify import Verdict, compare

FEW, ULPS = 1000, 8


class CheckFailed(AssertionError):
    """A patched model does not do what it has to; the message has the numbers."""


def require(condition: bool, message: str) -> None:
    """Raises CheckFailed with the message unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def eager_of(model: Any) -> Any:
    """A copy of the model, not patched, with transformers' eager attention."""
    eager = copy.deepcopy(model)
    bk.unpatch(eager)
    set_implementation(eager, "eager")
    return eager


def float64_of(model: Any) -> Any:
    """The same model in float64 with eager attention: the definition of right."""
    reference = eager_of(model).double()
    for module in reference.modules():
        if getattr(module, "reorder_and_upcast_attn", False):
            module.reorder_and_upcast_attn = False  # it refuses float64, where it has no meaning
    return reference.eval()


def call(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """The output of a model for inputs, of which floating ones are converted to the dtype of its weights."""
    converted = {
        name: value.to(model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    return model(**converted, **options)


def real_of(inputs: Mapping[str, Any]) -> Tensor:
    """Which of the tokens that have logits are no padding: bool (batch, sequence)."""
    part = "decoder_" if "decoder_input_ids" in inputs else ""
    mask = inputs.get(f"{part}attention_mask")
    return torch.ones_like(inputs[f"{part}input_ids"]).bool() if mask is None else mask.bool()


def at_real_tokens(out: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The rows of real tokens, of an output that has a row for each token; else all of it."""
    if "input_ids" not in inputs and "decoder_input_ids" not in inputs:
        return out
    real = real_of(inputs)
    return out[real] if out.shape[:2] == real.shape else out


def tensors_of(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """All floating tensors of a model output, by name; tuples by position, outputs in it by their names."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}.{inner}": part for inner, part in tensors_of(value).items()}
        elif isinstance(value, tuple):
            for i, part in enumerate(value):
                if isinstance(part, Tensor):
                    found[f"{name}.{i}"] = part
    return found


# ------------------------------------------------------------------------------------------------------------
# outputs


def assert_as_near(
    out: Tensor, eager: Tensor, reference: Tensor, where: Tensor | None = None, name: str = ""
) -> float:
    """`out` is as near to the float64 `reference` as `eager` is, in the maximum and in the mean.

    where: the elements that count, a mask of the leading dimensions; None for all.
    Returns the largest error as a part of what is allowed. Raises CheckFailed.
    """
    require(out.shape == eager.shape, f"{name}: shape {tuple(out.shape)} is not {tuple(eager.shape)}")
    require(out.dtype == eager.dtype, f"{name}: {out.dtype} is not {eager.dtype}")
    if where is not None:
        out, eager, reference = out[where], eager[where], reference[where]
    out, eager, reference = out.detach(), eager.detach(), reference.detach()
    return _held(compare(out, eager, reference, chance=_chance(reference, out.dtype)), name)


def _chance(reference: Tensor, dtype: torch.dtype) -> float:
    if not 0 < reference.numel() < FEW:
        return 0.0
    return ULPS * torch.finfo(dtype).eps * float(reference.abs().max())


def _held(verdict: Verdict, name: str) -> float:
    """The largest error as a part of what is allowed; raises CheckFailed for one above."""
    eager = f"eager has {verdict.eager_max:.3g} and {verdict.eager_mean:.3g}"
    require(verdict.ok, f"{name}: {verdict}; {eager}")
    return verdict.max_error / verdict.max_limit if verdict.max_limit else 0.0


def runs(model: Any, **inputs: Any) -> list[dict[str, Tensor]]:
    """Outputs of the patched model, of eager and of eager in float64; the model stays patched."""
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    with torch.no_grad():
        return [tensors_of(call(m, inputs)) for m in (model, eager, reference)]


def assert_all_near(outputs: list[dict[str, Tensor]], tokens: Tensor | None = None) -> float:
    """`assert_as_near` for all outputs of `runs`; those with a row for each token only at these tokens.

    tokens: bool (batch, sequence), or None for all.
    """
    require(
        outputs[0].keys() == outputs[1].keys(), f"outputs {sorted(outputs[0])} are not {sorted(outputs[1])}"
    )
    worst = 0.0
    for name in outputs[0]:
        per_token = tokens is not None and outputs[0][name].shape[:2] == tokens.shape
        out, eager, reference = (each[name] for each in outputs)
        found = assert_as_near(out, eager, reference, tokens if per_token else None, name)
        worst = max(worst, found)
    return worst


def without_padding(reference: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of real tokens, each sequence on its own: in float64, eager masks with finfo.min give NaN."""
    logits = []
    for row, real in zip(ids, mask.bool(), strict=True):
        # OPT makes positions of its own from the mask.
        positions = {} if "OPT" in type(reference).__name__ else {"position_ids": real.nonzero().T}
        logits.append(reference(row[real][None], use_cache=False, **positions).logits[0])
    return torch.cat(logits)


# ------------------------------------------------------------------------------------------------------------
# gradients


def gradients(model: Any, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Those of the mean square of the logits of real tokens."""
    return gradients_of(model, {"input_ids": ids, **({} if mask is None else {"attention_mask": mask})})


def gradients_of(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of the mean square of the model's first output, at real tokens."""
    model.zero_grad()
    at_real_tokens(call(model, inputs)[0], inputs).double().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    reference: dict[str, Tensor],
    computed_in: torch.dtype | None = None,
) -> float:
    """The numerics rule for gradients, by the names of their parameters. `computed_in` is the type that
    autocast computes in, if it does.

    Returns the largest error as a part of what is allowed. Raises CheckFailed.
    """
    require(
        ours.keys() == eager.keys(), f"other parameters have gradients: {sorted(ours.keys() ^ eager.keys())}"
    )
    # Some gradients are zero but for rounding (that of a key's bias): what counts is the size of the others.
    negligible = 1e-7 * max(float(gradient.abs().max()) for gradient in reference.values())
    worst = 0.0
    for name, gradient in ours.items():
        require(gradient.dtype == eager[name].dtype, f"{name}: {gradient.dtype} is not {eager[name].dtype}")
        chance = _chance(reference[name], computed_in or gradient.dtype)
        verdict = compare(gradient, eager[name], reference[name], "gradient", negligible, chance)
        worst = max(worst, _held(verdict, f"gradient of {name}"))
    return worst
