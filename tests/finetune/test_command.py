"""The command `bigmodel-kernels finetune`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bigmodel_kernels import cli
from bigmodel_kernels.finetune import Settings
from bigmodel_kernels.finetune.compare import arguments
from bigmodel_kernels.finetune.tasks import TASKS

Tiny = Callable[..., Settings]


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["finetune", *words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def plain(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_names_tasks_and_every_option() -> None:
    text = run("--help").output
    assert all(name in text for name in (*TASKS, "compare"))
    text = run("classification", "--help").output
    for field in fields(Settings):
        if field.name not in ("task", "implementation", "columns"):
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"].split()[0] in text
    assert all(flag in text for flag in ("--column", "--resume", "--patched", "--eager", "--sdpa"))


def test_a_run_and_its_end(tiny: Tiny) -> None:
    settings = tiny(steps=2)
    text = plain(run(*arguments(settings)).output)
    assert "f1" in text and "time per step" in text and "tokens per second" in text
    assert "is patched" in text and "good" in text
    text = plain(run(*arguments(settings), code=2).output)
    assert "nothing is overwritten" in text
    # The settings of a run need not be said again.
    done = run("classification", "--output", settings.output, "--resume", "--json")
    assert json.loads(done.stdout)["settings"]["steps"] == 2
    text = plain(
        run("classification", "--output", settings.output, "--resume", "--steps", "3", code=2).output
    )
    assert "holds a run with other settings: steps (was 2, is 3)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("classification",), "--output is needed"),
        (("classification", "--output", "x", "--eager", "--sdpa"), "--eager and --sdpa exclude each other"),
        (("classification", "--output", "x", "--steps", "0"), "steps=0; it must be positive"),
        (("classification", "--output", "x", "--column", "text"), "columns='text'; it must be OURS=THEIRS"),
        (("masked-lm", "--output", "none-such", "--resume"), "holds no run to resume"),
        (("compare", "poetry", "--output", "x"), "task='poetry' is unknown"),
        (("compare", "masked-lm"), "--output is needed"),
    ],
)
def test_wrong_arguments_are_named(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in plain(run(*words, code=2).output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "model", "module", "package"),
    [
        ("classification", "small-bert", "matplotlib", "matplotlib"),
        ("translation", "small-t5", "sacrebleu", "sacrebleu"),
        ("summarisation", "small-t5", "rouge_score", "rouge-score"),
    ],
)
def test_a_missing_package_names_the_extra_before_training(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, task: str, model: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    settings = tiny(task=task, model=model)
    text = plain(run(*arguments(settings), code=2).output)
    assert f"needs the package {package}" in text
    assert "pip install 'bigmodel_kernels[finetune]'" in text
    assert not settings.folder.exists()
