"""`make fuzz`: tools/fuzz.py and tests/fuzz/guided.py. The search itself needs Clang; the rest does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_wheels import load

from bigmodel_kernels import _native

ROOT = Path(__file__).parents[1]
GUIDED = ROOT / "tests" / "fuzz" / "guided.py"
fuzz = load("fuzz")
sys.path.insert(0, str(GUIDED.parent))
import guided  # noqa: E402

needs_library = pytest.mark.skipif(not _native.available(), reason=f"needs the library: {_native.reason()}")

LOG = """\
INFO: Loaded 1 modules   (101342 inline 8-bit counters): 101342 [0x7f, 0x80),
#2\tINITED cov: 281 ft: 282 corp: 1/1b exec/s: 0 rss: 422Mb
#6403\tNEW    cov: 669 ft: 2241 corp: 170/1369b lim: 11 exec/s: 160 rss: 932Mb L: 10/11 MS: 1 ChangeBit-
#6413\tDONE   cov: 669 ft: 2241 corp: 170/1369b lim: 11 exec/s: 156 rss: 932Mb
"""


def test_a_planted_fault_is_found_by_its_counters(tmp_path: Path) -> None:
    """A write past the end behind four bytes, of which each that is right is seen as new code."""
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("the tests run under a sanitizer themselves")
    compiler = fuzz.clang(download=False)
    if compiler is None:
        pytest.skip("needs clang++ with its fuzzer and sanitizer libraries (`make fuzz` loads them)")
    log = fuzz.prove(compiler, fuzz.build_libfuzzer(compiler, tmp_path))
    assert re.search(r"Loaded 1 modules +\(\d+ inline 8-bit counters\)", log)
    reached = [int(step["edges"]) for step in fuzz.PROGRESS.finditer(log)]
    assert reached == sorted(reached) and reached[-1] - reached[0] >= 3
    kept = fuzz.KEPT.search(log)
    assert kept and Path(kept[1]).read_bytes()[:4] == bytes((66, 203, 17, 144))


def test_another_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "g++"
    other.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')  # as GCC and Clang say that they have none
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    with pytest.raises(SystemExit, match="is no Clang with fuzzer and sanitizer libraries"):
        fuzz.clang()


def test_a_search_in_one_line() -> None:
    line = fuzz.summary("cpu_layer_norm", LOG, 40)
    assert line.split()[:5] == ["cpu_layer_norm", "6413", "runs,", "160", "a"]
    assert line.endswith("edges 281 to 669, features 282 to 2241, 170 inputs kept")
    assert fuzz.summary("cpu_layer_norm", "", 40) == "cpu_layer_norm: nothing was run"


def test_the_first_fault_ends_the_run() -> None:
    asked = []

    def one(op: str) -> str | None:
        asked.append(op)
        return f"crashes/{op}" if op == "b" else None

    assert fuzz.first_fault(["a", "b", "c"], 1, one) == "crashes/b" and asked == ["a", "b"]
    assert fuzz.first_fault(["a", "c"], 2, one) is None


def test_operators() -> None:
    known = fuzz.operators()
    assert "cpu_attention" in known and "cpu_isas" not in known  # the latter has no arguments
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fuzz.py"), "cpu_nothing"], capture_output=True, text=True
    )
    assert refused.returncode == 1 and refused.stderr.startswith("cpu_nothing is not one of cpu_attention,")


def test_arguments_in_words() -> None:
    x = torch.zeros(3, 20)
    assert guided.described(x) == "float32[3, 20]"
    assert guided.described(x.t()) == "float32[20, 3] strides (1, 20)"
    assert guided.described([torch.tensor(7), None, "gelu"]) == "[int64[] = 7, None, 'gelu']"
    assert guided.described(x.to("meta")) == "float32[3, 20] torch.strided on meta"


def test_short_inputs_are_filled_up() -> None:
    seen: list[bytes] = []
    guided.padded(seen.append)(b"ab")
    assert len(seen[0]) == guided.MOST_BYTES and seen[0].rstrip(b"\0") == b"ab"


@needs_library
def test_an_input_is_shown_as_a_call(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(GUIDED), "cpu_philox", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    valid, spoiled = tmp_path / "valid", tmp_path / "spoiled"
    valid.write_bytes(b"")
    spoiled.write_bytes(bytes((255, 0, 0, 0, 7, 0, 3)))
    shown = run("--show", str(valid), str(spoiled))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("cpu_philox, by the kernels for ") >= 2
    assert "\n    rule: 'attention'\n" in shown.stdout
    alone = run("-runs=1")
    assert alone.returncode == 1 and "`make fuzz` starts this" in alone.stderr
