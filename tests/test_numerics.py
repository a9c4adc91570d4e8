"""The table of errors: what goes into it, and where it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigmodel_kernels import cli, numerics, verify

DOCUMENT = f"before\n{numerics.BEGIN}\nold\n{numerics.END}\nafter\n"


def verdict(max_error: float, mean_error: float) -> verify.Verdict:
    eager = {"eager_max": 2 * max_error, "eager_mean": 3 * mean_error}
    return verify.Verdict(True, max_error, 1.0, mean_error, 1.0, **eager)


def test_verdicts_have_the_errors_of_plain_pytorch() -> None:
    ref = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    found = verify.compare(ref.float(), (ref + torch.tensor([0.0, 0.5, 0.25])).float(), ref)
    assert (found.eager_max, found.eager_mean) == (0.5, 0.25)
    infinite = verify.compare(ref.float(), torch.tensor([1.0, torch.inf, 4.25]), ref)
    assert infinite.eager_max == 0.25


def test_results_and_gradients_apart() -> None:
    found = numerics.errors(
        {"out": verdict(1.0, 0.5), "logsumexp": verdict(2.0, 0.1), "grad args.0": verdict(9.0, 0.2)}
    )
    assert found["forward"] == pytest.approx({"max": 2.0, "eager_max": 4.0, "mean": 0.3, "eager_mean": 0.9})
    assert found["gradient"] == pytest.approx({"max": 9.0, "eager_max": 18.0, "mean": 0.2, "eager_mean": 0.6})
    assert set(numerics.errors({"out": verdict(1.0, 0.5)})) == {"forward"}
    assert numerics.errors({}) == {}


def test_the_table_is_written_between_the_markers(tmp_path: Path) -> None:
    def result(op: str, errors: dict[str, dict[str, float]], backend: str = "native") -> dict[str, object]:
        return {"op": op, "dtype": "float32", "backend": backend, "errors": errors}

    first, second = numerics.errors({"out": verdict(1.0, 0.5)}), numerics.errors({"out": verdict(0.5, 0.1)})
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    results = [result("norm", first), result("norm", second, "triton"), result("skipped", {})]
    for _ in range(2):  # what was written is replaced
        numerics.write(path, results, "cpu")
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{numerics.BEGIN}\n") and text.endswith(f"{numerics.END}\nafter\n")
    assert (
        text.count("| `norm` | float32 | native, triton | 2 | 1.0e+00 | 2.0e+00 | 3.0e-01 | 9.0e-01 |") == 1
    )
    assert "old" not in text and "skipped" not in text and torch.__version__ in text


@pytest.mark.parametrize("text", ["no markers", numerics.BEGIN, f"{numerics.END} {numerics.BEGIN}"])
def test_a_document_without_markers_is_refused_before_anything_runs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["verify", "--write", str(path)])
    assert result.exit_code == 2 and "it must have a line" in " ".join(result.output.split())
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("options", [["--op", "linear"], ["--dtype", "float32"], ["--fast"]])
def test_a_part_of_the_table_is_refused(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "page.md"
    path.write_text(DOCUMENT, encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["verify", "--write", str(path), *options])
    assert result.exit_code == 2 and path.read_text(encoding="utf-8") == DOCUMENT
