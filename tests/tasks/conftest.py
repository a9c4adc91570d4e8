"""Folders of tiny models, made once."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

# Without transformers there is nothing to test here.
collect_ignore_glob = ["test_*.py"] if find_spec("transformers") is None else []


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    """`folder(kind)`: the folder of a model of `task_models.KINDS`, as `from_pretrained` takes it."""
    from task_models import build

    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)
            build(kind, path)
            made[kind] = str(path)
        return made[kind]

    return make
