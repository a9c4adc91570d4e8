"""A pytest plugin: other people's tests of transformers with our attention, or with every model patched.

    python -m pytest -p bigmodel_kernels.transformers.pytest_plugin --bigmodel=patch tests/models/bert

`--bigmodel=attention`: where a model is made without an attention implementation of its own, it gets
"bigmodel" instead of transformers' default, if it can have it. `--bigmodel=patch`: every model is patched
when it is made, and again when its weights are loaded. Without the option nothing changes. How many models
that concerned is said at the end of the run. `tools/transformers_tests.py` compares such runs.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

from bigmodel_kernels.transformers import patch, unpatch

MODES = ("none", "attention", "patch")
_changed = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bigmodel", choices=MODES, default="none", help="run models with our kernels")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--bigmodel")
    if mode == "attention":
        _use_attention()
    elif mode == "patch":
        _patch_models()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    mode = config.getoption("--bigmodel")
    if mode != "none":
        terminalreporter.write_line(f"bigmodel {mode}: {_changed} models")


def _count(model: nn.Module) -> None:
    global _changed
    _changed += 1


def _use_attention() -> None:
    from transformers import PreTrainedModel

    from bigmodel_kernels.transformers import register

    register()
    choose = PreTrainedModel._check_and_adjust_attn_implementation

    @functools.wraps(choose)
    def chosen(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        if attn_implementation is None:
            try:
                ours = choose(self, "bigmodel", *args, **kwargs)
            except ValueError:  # a model that does not call transformers' attention interface
                return choose(self, attn_implementation, *args, **kwargs)
            _count(self)
            return ours
        return choose(self, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = chosen  # type: ignore[method-assign]


def _patch_models() -> None:
    from transformers import PreTrainedModel

    finish, load = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(finish)
    def finished(self: Any) -> None:
        finish(self)  # type: ignore[no-untyped-call]
        # Models in it are patched by now; what one becomes may hang on the model around it.
        unpatch(self)
        if patch(self).patched:
            _count(self)

    @functools.wraps(load)
    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        found = load(cls, *args, **kwargs)
        # With output_loading_info it is the first of two. Made on the meta device, it could not be patched.
        model = found[0] if isinstance(found, tuple) else found
        unpatch(model)
        patch(model)
        return found

    PreTrainedModel.post_init = finished  # type: ignore[method-assign]
    PreTrainedModel.from_pretrained = classmethod(loaded)  # type: ignore[assignment]
