"""What patched forms share, and those of torch's own modules, for places that families name (language model
heads, last norms).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from bigmodel_kernels.transformers import blocks, checks


class Form(nn.Module):
    """A patched form; goes before the class that it stands for, which is that of `super()`.

    `kin` says which classes belong together; it learns its forms from here.
    """

    kin: ClassVar[Any]

    def __init_subclass__(cls, kin: Any = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kin is not None:
            cls.kin = kin
            kin.forms[cls.__bases__[-1]] = cls

    if TYPE_CHECKING:  # attributes are those of the class that it stands for

        def __getattr__(self, name: str) -> Any: ...


class NamedForm(Form):
    """A form of a model's class, which goes by its name (see `stands_for`)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.__bases__[-1], Form):
            stands_for(cls.__bases__[-1])(cls)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Of the class that it stands for: what is loaded is not patched."""
        return cls.__bases__[-1].from_pretrained(*args, **kwargs)  # type: ignore[attr-defined]


def stands_for(original: Any) -> Callable[[type], type]:
    """Gives a patched form of a model's class the name of that class, and what transformers records of it;
    pickle finds the form by its qualified name.
    """

    def decorate(cls: type) -> type:
        cls.__name__ = original.__name__
        recorded = getattr(original, "_can_record_outputs", None)  # a part of a model has none
        if recorded is not None:
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), recorded)
        return cls

    return decorate


def is_form(module: Any, original: type | None) -> bool:
    """Whether a module is the patched form of `original`, and a fused call may pass it by."""
    kin: Any = getattr(type(module), "kin", None)
    return kin is not None and original in kin.forms and checks.intact(module, kin.forms[original])


class BigmodelLinear(nn.Linear):
    """nn.Linear by `bigmodel::linear`."""

    def forward(self, input: Tensor) -> Tensor:
        held = checks.parameters(self, BigmodelLinear, checks.dtype_of(input))
        if held is None or checks.watched_globally():
            return super().forward(input)
        return blocks.linear(input, (blocks.Affine(*held),), "linear")


class BigmodelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension by `bigmodel::layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        held = checks.parameters(self, BigmodelLayerNorm, checks.dtype_of(input))
        if held is None or len(self.normalized_shape) != 1 or checks.watched_globally():
            return super().forward(input)
        return blocks.layer_norm(input, blocks.Affine(*held), self.eps)
