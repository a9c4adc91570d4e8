"""Triton's interpreter, made quicker for the tests of the kernels."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="session")
def _language_exchanged_once() -> Iterator[None]:
    """Exchanges `triton.language` for NumPy's once in a process that interprets.

    The interpreter does so at each launch and at each call of a function in it, which costs half as much as
    all that the kernels compute. `triton.language` and its `core` are exchanged each when the first function
    that names it runs, and stay so: nothing is compiled in such a process.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    exchange = interpreter._patch_lang
    exchanged: set[str] = set()
    scopes: list[Any] = []

    @functools.cache
    def names(fn: Any) -> frozenset[str]:
        values = list(fn.__globals__.values())
        return frozenset(m.__name__ for m in (language, language.core) if any(v is m for v in values))

    def once(fn: Any) -> Any:
        if not names(fn) <= exchanged:
            scopes.append(exchange(fn))
            exchanged.update(names(fn))
        return interpreter._LangPatchScope()  # an empty one, for the launch to restore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
    while scopes:
        scopes.pop().restore()
