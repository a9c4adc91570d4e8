"""Triton's interpreter, made quicker for the tests of the kernels."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _language_exchanged_once_a_launch() -> Iterator[None]:
    """Exchanges `triton.language` for NumPy's once a launch, and not again at each call of a function in it.

    The interpreter does both, and the second costs more than what most functions compute. `triton.language`
    and its `core` are exchanged each when the first function that names it runs.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    exchange = interpreter._patch_lang
    exchanged: set[str] = set()
    scopes: list[Any] = []  # of the launch that runs: its own, and those of functions in it

    @functools.cache
    def names(fn: Any) -> frozenset[str]:
        values = list(fn.__globals__.values())
        return frozenset(m.__name__ for m in (language, language.core) if any(v is m for v in values))

    class Launch:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()
            exchanged.clear()

    def once(fn: Any) -> Launch:
        if not names(fn) <= exchanged:
            scopes.append(exchange(fn))
            exchanged.update(names(fn))
        return Launch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
