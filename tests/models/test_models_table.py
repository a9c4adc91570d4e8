"""The table of families: complete, honest about what fails, and right about what is left alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bigmodel_kernels import cli
from bigmodel_kernels.models import checks, rule, table, tiny
from bigmodel_kernels.transformers import blocks, families, whole_layer


def test_every_family_has_a_tiny_model_and_no_other_has() -> None:
    assert sorted(tiny.TINY) == sorted(families.names())


@pytest.mark.parametrize("name", tiny.TINY)
def test_a_tiny_model_is_of_its_family_and_of_no_other(name: str) -> None:
    model = tiny.TINY[name].model()
    module = f"transformers.models.{name}.modeling_{name}"
    assert type(model).__module__ == module
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]


@pytest.mark.parametrize("name", ["roberta", "gemma2"])
def test_all_is_well(name: str) -> None:
    row = table.run_family(name, [check for check in table.CHECKS if check != "compile"])
    assert row.ok, row.cells
    assert row.ops and sum(row.modules.values()) > 5
    left = {check for check, cell in row.cells.items() if cell.status == table.LEFT}
    assert left == ({"greedy", "beams"} if name == "roberta" else set())


def test_a_wrong_kernel_is_found_by_every_check_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocks.feed_forward
    monkeypatch.setattr(blocks, "feed_forward", lambda *args, **options: right(*args, **options) * 1.001)
    run = blocks.pre_norm_layer
    monkeypatch.setattr(blocks, "pre_norm_layer", lambda *args: run(*args) * 1.001)
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)  # one layer after the other
    row = table.run_family("gpt2", ["float32", "padding left", "gradients", "compile", "unpatch"])
    failed = {check for check, cell in row.cells.items() if cell.status == table.FAILED}
    assert failed == {"float32", "padding left", "gradients", "compile"}
    assert "eager has" in row.cells["float32"].detail and not row.ok


def test_other_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = blocks.pre_norm_layer
    monkeypatch.setattr(blocks, "pre_norm_layer", lambda *args: -run(*args))
    monkeypatch.setattr(whole_layer, "tokens", lambda *args: None)  # one layer after the other
    row = table.run_family("gpt2", ["greedy", "beams"])
    assert {cell.status for cell in row.cells.values()} == {table.FAILED}
    assert "eager [[" in row.cells["greedy"].detail


def test_a_model_that_stays_as_it_is_fails_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its checks would compare a model with itself."""
    monkeypatch.setattr(families, "loaded", lambda: [])
    row = table.run_family("bert", ["float32", "unpatch"])
    assert {cell.status for cell in row.cells.values()} == {table.FAILED}
    assert "no module is patched" in row.cells["unpatch"].detail


def test_a_family_without_a_tiny_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(tiny.TINY, "bert")
    row = table.run_family("bert", ["float32"])
    assert row.cells["float32"] == table.Cell(
        table.FAILED, "bigmodel_kernels/models/tiny.py has no model of this family"
    )


def test_an_unpatch_that_forgets_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import bigmodel_kernels as bk

    monkeypatch.setattr(bk, "unpatch", lambda model: 1)
    model = tiny.TINY["bert"].model()
    with pytest.raises(rule.CheckFailed, match=r"still patched: .*BigmodelBert"):
        checks.check_unpatching(model, tiny.inputs_of(model))


def test_reasons_of_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"padding left": "reads no padding there", "attentions": "has none"}
    changed = tiny.Tiny("BertForMaskedLM", tiny.bert_config, lacks=lacks)
    monkeypatch.setitem(tiny.TINY, "bert", changed)
    row = table.run_family("bert", ["padding left", "padding right", "attentions"])
    assert row.cells["padding left"] == table.Cell(table.LEFT, "reads no padding there")
    assert row.cells["attentions"] == table.Cell(table.LEFT, "has none")
    assert row.cells["padding right"].status == table.OK


READS: list[tuple[str, Any, dict[str, tuple[int, ...]]]] = [
    (
        "ViTConfig",
        tiny.images,
        {"pixel_values": (3, 3, 16, 16)},
    ),
    (
        "CLIPConfig",
        tiny.images_and_tokens,
        {"input_ids": (3, 17), "attention_mask": (3, 17), "pixel_values": (3, 3, 224, 224)},
    ),
    (
        "T5Config",
        tiny.tokens_to_tokens,
        {
            "input_ids": (3, 17),
            "attention_mask": (3, 17),
            "decoder_input_ids": (3, 9),
            "decoder_attention_mask": (3, 9),
        },
    ),
    (
        "WhisperConfig",
        tiny.audio_to_tokens,
        {"input_features": (3, 80, 20), "decoder_input_ids": (3, 9), "decoder_attention_mask": (3, 9)},
    ),
]


@pytest.mark.parametrize(("config", "reads", "shapes"), READS)
def test_what_models_read(config: str, reads: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    import transformers

    options = {"ViTConfig": {"image_size": 16}, "WhisperConfig": {"max_source_positions": 10}}
    made = reads(getattr(transformers, config)(**options.get(config, {})), tiny.right_padding)
    assert {name: tuple(value.shape) for name, value in made.items()} == shapes


def test_command_json_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.app, ["models", "bert", "--check", "unpatch", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"] and found["families"][0]["cells"]["unpatch"]["status"] == "ok"
    assert found["families"][0]["modules"]["BertLayer"] == 2
    monkeypatch.delitem(tiny.TINY, "bert")
    result = CliRunner().invoke(cli.app, ["models", "bert", "--check", "unpatch"])
    assert result.exit_code == 1 and "FAILED" in result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rwkv"], "family='rwkv' is unknown; allowed are albert"),
        (["--check", "speed"], "check='speed' is unknown; allowed are float32"),
    ],
)
def test_command_refuses_what_it_does_not_know(args: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["models", *args], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
