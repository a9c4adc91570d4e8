"""What goes past a model's own forward: whether it did, and what the forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def calls_of(form: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a model of this form, whether it went past its forward."""
    seen: list[bool] = []
    run = form.at_once

    def at_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = run(self, *args, **kwargs)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(form, "at_once", at_once)
    return seen


def result(model: Any, *args: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model(*args, **options)


def own_of(form: Any, model: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    """The same by the model's own forward."""
    with monkeypatch.context() as patch:
        patch.setattr(form, "at_once", lambda *args, **kwargs: None)
        return result(model, *args, **options)
