"""docs/support.md is what the backends say of themselves, on any machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bigmodel_kernels import _native, backends, cli, support
from bigmodel_kernels.ops import cuda_library

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton", reason="its answers are part of the text")
PLAIN = support.calls_of(support.ATTENTION["plain"], torch.bfloat16)
CPU, CUDA, TRITON = support.COMPILED


def test_the_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    """`make support` mends it."""
    written = tmp_path / "support.md"
    result = CliRunner().invoke(cli.app, ["support", "--write", str(written)])
    assert result.exit_code == 0, result.output
    assert written.read_text(encoding="utf-8") == (ROOT / "docs/support.md").read_text(encoding="utf-8")


def test_examples_run_every_operator_of_the_table() -> None:
    text = (ROOT / "docs/support.md").read_text(encoding="utf-8")
    assert all(f"| `{op}` |" in text for op in backends.operators())


def test_a_backend_that_learns_something_changes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigmodel_kernels.ops.attention import cuda

    call = support.calls_of(support.ATTENTION["softcap"], torch.bfloat16)["attention"]
    asked = support.ask(CUDA, "attention", *call)
    assert asked.runs and "softcap" in (asked.reason or "")
    monkeypatch.setattr(cuda, "supports", lambda *args, **options: "no softcap yet")
    monkeypatch.setitem(
        backends.TABLE, ("attention", "cuda"), backends._implementations("attention", "", "cuda")
    )
    assert support.ask(CUDA, "attention", *call) == support.Answer(False, "no softcap yet")


def test_answers_do_not_hang_on_what_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    call = PLAIN["attention"]
    before = [support.ask(backend, "attention", *call) for backend in support.COMPILED]
    for name in ("reason", "cuda_reason"):
        monkeypatch.setattr(_native, name, lambda: "it is not built")
    assert [support.ask(backend, "attention", *call) for backend in support.COMPILED] == before
    query = call[0][0]
    assert cuda_library.lacking(query) == "it is not built"  # outside the question nothing is pretended


def test_pretending_ends_with_the_block() -> None:
    assert not _native.is_pretending()
    with pytest.raises(KeyError), _native.pretend_loaded():
        assert _native.is_pretending()
        raise KeyError
    assert not _native.is_pretending()


def test_what_a_backend_cannot_do_is_said() -> None:
    call = support.calls_of(support.FEED_FORWARD["gated (SwiGLU)"], torch.bfloat16)["feed_forward"]
    assert support.ask(CUDA, "feed_forward", *call) == support.Answer(
        False, "a gate needs two products in one launch"
    )
    single = support.calls_of(support.ATTENTION["plain"], torch.float32)["attention"]
    assert not support.ask(CUDA, "attention", *single).runs
    assert support.ask(TRITON, "attention", *single) == support.Answer(True)
    assert not support.ask(TRITON, "attention_statistics", (), {}).runs


def test_sizes_in_words() -> None:
    assert support._sizes([*range(1, 257)]) == "1 to 256"
    assert support._sizes([*range(8, 257, 8)]) == "multiples of 8 to 256"
    assert support._sizes([]) == "-"
    with pytest.raises(RuntimeError, match="no multiples"):
        support._sizes([8, 16, 40])


def test_an_operator_without_an_example_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "GROUPS", {"Attention": support.ATTENTION})
    with pytest.raises(RuntimeError, match=r"no example runs attention_decode, .*rotary"):
        support._operators()
