"""Triton's interpreter, made quicker for the tests of the kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _language_exchanged_once_a_launch() -> Iterator[None]:
    """Exchanges `triton.language` for NumPy's at each launch, and not again at each call of a function in it.

    The interpreter does both, and the second costs more than what most functions compute: inside a launch the
    language is exchanged already.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    exchange = interpreter._patch_lang
    inside = False

    def once(fn: Any) -> Any:
        nonlocal inside
        if inside:
            return None  # only a launch asks for what to restore
        scope = exchange(fn)
        restore = scope.restore

        def leave() -> None:
            nonlocal inside
            inside = False
            restore()

        scope.restore, inside = leave, True
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
