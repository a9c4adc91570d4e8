"""What a command says of a model that cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigmodel_kernels.extras import loading


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./gone", "there is no such folder"),
        ("/gone/model", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("a.txt", "it is a file; allowed are a folder and a name on the Hugging Face hub"),
        ("empty", "the folder is empty"),
    ],
)
def test_what_can_be_no_model_is_not_looked_for(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    sentence = f"^model={re.escape(repr(model))} cannot be loaded: {message}$"
    with pytest.raises(ValueError, match=sentence), loading(model):
        raise AssertionError("looked for")


@pytest.mark.parametrize("model", ["some-name", "owner/some.name"])
def test_a_name_is_looked_for_and_the_answer_is_one_sentence(model: str) -> None:
    sentence = "no such folder; of a model by that name transformers says: a b$"
    with pytest.raises(ValueError, match=sentence), loading(model):
        raise OSError("a\n b")


def test_a_folder_is_told_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"cannot be loaded: no model type$"), loading(str(tmp_path)):
        raise ValueError("no model type")
