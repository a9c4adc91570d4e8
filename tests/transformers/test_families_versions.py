"""A transformers where a class of a family has another name: a reason in the report, no wrong result."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import pytest
import torch
from transformers.models.olmo2 import modeling_olmo2

import bigmodel_kernels as bk
from bigmodel_kernels.models import table, tiny
from bigmodel_kernels.models.tiny import decoder, token_ids
from bigmodel_kernels.transformers import families

NAME = "bigmodel_kernels.transformers.families.olmo2"


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Olmo2MLP is called otherwise."""
    before = importlib.import_module(NAME)
    monkeypatch.setattr(modeling_olmo2, "Olmo2Mlp", modeling_olmo2.Olmo2MLP, raising=False)
    monkeypatch.delattr(modeling_olmo2, "Olmo2MLP")
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.delattr(families, "olmo2")
    families._load.cache_clear()
    yield
    families._load.cache_clear()
    assert before.FAMILY.name == "olmo2"


@pytest.fixture
def model() -> torch.nn.Module:
    return decoder("Olmo2")


def test_the_report_says_what_is_missing(model: torch.nn.Module, renamed: None) -> None:
    ids = token_ids()
    with torch.no_grad():
        before = model(ids).logits
        report = bk.patch(model)
        assert torch.equal(model(ids).logits, before)
    (row,) = report.rows
    assert row.module == "Olmo2ForCausalLM" and row.status == "left alone"
    assert "the family olmo2 does not fit this version of transformers" in row.reason
    assert "Olmo2MLP" in row.reason and not report.notes
    assert bk.unpatch(model) == 0


def test_a_model_in_another_has_a_row_of_its_own(model: torch.nn.Module, renamed: None) -> None:
    both = torch.nn.ModuleList([model, decoder("Llama")])
    report = bk.patch(both)
    assert [row.name for row in report.left_alone if "does not fit" in row.reason] == ["0"]
    assert any(row.name.startswith("1.model.layers.0") for row in report.patched)


def test_the_table_fails(model: torch.nn.Module, renamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Tiny, "model", lambda self: model)
    row = table.run_family("olmo2", ["float32"])
    assert not row.ok and "does not fit this version" in row.cells["float32"].detail
