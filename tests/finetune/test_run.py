"""Runs of every task on tiny models: they learn, they stop and go on, they leave what they promise."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel_kernels import files
from bigmodel_kernels.finetune import (
    Interrupted,
    Listener,
    Settings,
    checkpoint,
    data,
    finetune,
    models,
)
from bigmodel_kernels.finetune.optimiser import WarmupThenDecay
from bigmodel_kernels.finetune.run import complete
from bigmodel_kernels.finetune.tasks import TASKS

Tiny = Callable[..., Settings]


class Recorder(Listener):
    def __init__(self, at: int = 0, do: Callable[[], Any] = lambda: None) -> None:
        self.records: list[dict[str, Any]] = []
        self.at, self.do = at, do

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if record["kind"] == "step" and record["step"] == self.at:
            self.do()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_it_learns_and_leaves_everything(tiny: Tiny) -> None:
    settings = tiny(steps=40, batch_size=8, hidden=32, lr=1e-2, held_out=0.3, evaluate_examples=50)
    recorder = Recorder()
    result = finetune(settings, listener=recorder)
    assert result.metrics["accuracy"] >= 0.9
    assert set(result.metrics["classes"]) == {"bad", "good"}
    assert len(result.losses) == 40
    assert sum(result.losses[-5:]) < 0.5 * sum(result.losses[:5])
    folder = settings.folder
    assert files.read_lines(folder / "metrics.jsonl") == recorder.records
    saved = json.loads((folder / "result.json").read_text())
    assert saved["losses"] == result.losses and saved["metrics"] == result.metrics
    assert "patched" in saved["facts"]["patch_report"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        logits = model(**tokenizer("the meal was cold and stale", return_tensors="pt")).logits
    assert model.config.id2label[int(logits.argmax())] == "bad"


def test_patched_learns_as_eager_does(tiny: Tiny) -> None:
    """Dropout off, the same seed: losses differ by rounding."""
    eager = finetune(tiny("e", implementation="eager", dropout=0.0, steps=6)).losses
    sdpa = finetune(tiny("s", implementation="sdpa", dropout=0.0, steps=6)).losses
    patched = finetune(tiny("p", implementation="patched", dropout=0.0, steps=6)).losses
    assert patched == pytest.approx(eager, abs=1e-5)
    assert sdpa == pytest.approx(eager, abs=1e-5)


@pytest.mark.parametrize(("task", "model"), [("language-model", "small-gpt2"), ("masked-lm", "small-bert")])
def test_a_fused_loss_and_recomputation_are_the_same_training(tiny: Tiny, task: str, model: str) -> None:
    changes: dict[str, Any] = {"task": task, "model": model, "columns": ("text=review",), "dropout": 0.0}
    plain = finetune(tiny("plain", **changes))
    fused = finetune(tiny("fused", **changes, fused_loss=True, recompute=True))
    assert fused.losses == pytest.approx(plain.losses, abs=1e-5)
    assert fused.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "patched"])
def test_autocast_learns_the_same_to_bfloat16(tiny: Tiny, implementation: str) -> None:
    plain = finetune(tiny("plain", implementation=implementation, dropout=0.0)).losses
    half = finetune(tiny("half", implementation=implementation, dropout=0.0, autocast=True)).losses
    assert half == pytest.approx(plain, rel=0.02)
    assert half != plain


def test_micro_batches_are_as_one_batch(tiny: Tiny) -> None:
    """Also for texts of different lengths, whose losses are means over different numbers of tokens."""
    changes: dict[str, Any] = {"task": "masked-lm", "columns": ("text=review",), "dropout": 0.0, "steps": 1}
    task = TASKS["masked-lm"]
    settings = complete(tiny("whole", batch_size=8, **changes))
    texts = data.rename(data.load(str(settings.dataset)), settings.column_names(), ("text",))
    made = task(settings)
    made.prepare(texts, settings.folder.parent / "tokenizer")
    examples = made.encode(texts)[:8]
    torch.manual_seed(0)
    model = made.build().eval()
    halves = [made.collate(examples[k : k + 4], 5 + k) for k in (0, 4)]
    items = [made.labelled(batch) for batch in halves]
    losses = [model(**batch).loss * n / sum(items) for batch, n in zip(halves, items, strict=True)]
    length = max(batch["input_ids"].shape[1] for batch in halves)
    joined = {
        name: torch.cat(
            [torch.nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=fill) for b in halves]
        )
        for name, fill in (
            ("input_ids", made.tokenizer.pad_token_id),
            ("attention_mask", 0),
            ("labels", -100),
        )
    }
    assert sum(losses).item() == pytest.approx(model(**joined).loss.item(), rel=1e-5)


def test_accumulation_takes_as_many_examples(tiny: Tiny) -> None:
    whole = finetune(tiny("whole", batch_size=8, dropout=0.0, steps=3))
    parts = finetune(tiny("parts", batch_size=2, accumulate=4, dropout=0.0, steps=3))
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)


def test_epochs_are_passes(tiny: Tiny) -> None:
    result = finetune(tiny(steps=None, epochs=0.5, batch_size=10))
    assert result.facts["steps"] == -(-result.facts["examples"]["training"] // 2 // 10)


@pytest.mark.parametrize("device_number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(tiny: Tiny, device_number: int) -> None:
    before = signal.getsignal(device_number)
    settings = tiny(steps=6, checkpoint_every=100)
    unbroken = finetune(tiny("unbroken", steps=6, checkpoint_every=100))
    with pytest.raises(Interrupted, match=rf"finetune classification --output {settings.output} --resume"):
        finetune(settings, listener=Recorder(3, lambda: signal.raise_signal(device_number)))
    assert signal.getsignal(device_number) == before
    assert [step for step, _ in checkpoint.find(settings.folder / "checkpoints")] == [3]
    resumed = finetune(settings, resume=True)
    assert resumed.losses == unbroken.losses
    ours, theirs = weights(settings.folder), weights(settings.folder.parent / "unbroken")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoints_are_kept_as_told(tiny: Tiny) -> None:
    settings = tiny(steps=7, checkpoint_every=2, keep=2)
    finetune(settings)
    assert [step for step, _ in checkpoint.find(settings.folder / "checkpoints")] == [6, 7]


def test_the_folder_of_another_run_is_not_touched(tiny: Tiny, tmp_path: Path) -> None:
    finetune(tiny(steps=1))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"holds another run, and nothing is overwritten.*--resume"):
        finetune(tiny(steps=1))
    with pytest.raises(ValueError, match=r"a run with other settings: steps \(was 1, is 2\)"):
        finetune(tiny(steps=2), resume=True)
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        finetune(tiny("mine"))
    with pytest.raises(ValueError, match="holds no run to resume"):
        finetune(tiny("nowhere"), resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"columns": ("text=nothing",)},
            "column 'nothing' for 'text' is not in the data, which has review, stars",
        ),
        ({"dataset": "none.csv"}, "there is no such file"),
        ({"model": "minilm", "max_length": 10_000}, "max_length=10000; the model has 512 positions"),
        ({"freeze_layers": 9}, "freeze_layers=9; the model has 1 layers"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    tiny: Tiny, changes: dict[str, Any], words: str
) -> None:
    settings = tiny(**changes)
    with pytest.raises(ValueError, match=words):
        finetune(settings)
    assert not settings.folder.exists()


def test_other_data_are_not_taken_for_a_resumed_run(tiny: Tiny, reviews: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.csv"
    copy.write_bytes(reviews.read_bytes())
    settings = tiny(dataset=str(copy), steps=2)
    finetune(settings)
    copy.write_text(copy.read_text() + "one more,good\n" * 40)
    with pytest.raises(ValueError, match="the data are not those"):
        finetune(settings, resume=True)


def test_a_loss_that_is_no_number_stops_the_run(tiny: Tiny) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss of step \d+ is .*smaller lr \(it is 1e\+30\)"):
        finetune(tiny(lr=1e30, warmup=0.0, clip=0.0, steps=30))


def test_freeze_layers(tiny: Tiny) -> None:
    settings = tiny(layers=2, freeze_layers=1, steps=3)
    result = finetune(settings)
    torch.manual_seed(settings.seed)
    task = TASKS["classification"](complete(settings))
    task.prepare([{"text": "x", "label": n} for n in ("bad", "good")], settings.folder / "tokenizer")
    start = task.build().state_dict()
    changed = {
        name for name, value in weights(settings.folder).items() if not torch.equal(value, start[name])
    }
    assert not [n for n in changed if n.startswith(("bert.embeddings", "bert.encoder.layer.0."))]
    assert [n for n in changed if n.startswith("bert.encoder.layer.1.")]
    assert result.facts["parameters"]["trained"] < result.facts["parameters"]["all"]
    with pytest.raises(ValueError, match="freeze_layers=3; the model has 2 layers"):
        finetune(tiny("other", layers=2, freeze_layers=3))


def test_lora_trains_adapters_alone(tiny: Tiny) -> None:
    pytest.importorskip("peft")
    settings = tiny(lora=2, steps=6, checkpoint_every=3)
    result = finetune(settings)
    assert result.facts["parameters"]["trained"] < 0.2 * result.facts["parameters"]["all"]
    assert (settings.folder / "model" / "adapter_config.json").is_file()
    stopped = tiny("stopped", lora=2, steps=6, checkpoint_every=3)
    with pytest.raises(Interrupted):
        finetune(stopped, listener=Recorder(4, lambda: signal.raise_signal(signal.SIGINT)))
    assert finetune(stopped, resume=True).losses == result.losses


def test_dropout_is_set_everywhere() -> None:
    from transformers import BartConfig, BertConfig, GPT2Config, T5Config

    names = {
        BertConfig: ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        GPT2Config: ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        T5Config: ("dropout_rate",),
        BartConfig: ("dropout", "attention_dropout", "activation_dropout"),
    }
    for kind, found in names.items():
        config = kind()
        models.set_dropout(config, 0.25)
        assert [getattr(config, name) for name in found] == [0.25] * len(found)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5])
def test_the_learning_rate_rises_and_falls(warmup: float) -> None:
    factors = [WarmupThenDecay(20, warmup)(step) for step in range(21)]
    top = factors.index(max(factors))
    assert factors[top] == 1.0 and top == round(20 * warmup)
    assert all(a < b for a, b in itertools.pairwise(factors[: top + 1]))
    assert all(a > b for a, b in itertools.pairwise(factors[top:]))
    assert factors[0] > 0 and factors[19] > 0 and factors[20] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps=0; it must be positive"),
        ({"lr": -1.0}, "lr=-1.0; it must be positive"),
        ({"batch_size": 0}, "batch_size=0; it must be 1 or more"),
        ({"dropout": 1.0}, "dropout=1.0; it must be at least 0 and less than 1"),
        ({"held_out": 1.0}, "held_out=1.0; it must be between 0 and 1"),
        ({"implementation": "flash"}, "implementation='flash' is unknown; allowed are patched, eager, sdpa"),
        ({"hidden": 30, "heads": 4}, "hidden=30 is no multiple of heads=4"),
        ({"columns": ("text",)}, "columns='text'; it must be OURS=THEIRS"),
        ({"vocabulary": 10}, "vocabulary=10; it must be 300 or more"),
        ({"lora": -1}, "lora=-1; it must not be negative"),
        (
            {"fused_loss": True, "implementation": "sdpa"},
            "fused_loss=True; it needs implementation='patched'",
        ),
        ({"output": ""}, "output=''"),
    ],
)
def test_wrong_settings_are_named(tiny: Tiny, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**{"output": "run", **changes}) if changes.get("output") != "" else Settings("masked-lm", "")


def test_unknown_tasks_and_settings_are_named(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="task='poetry' is unknown; allowed are classification"):
        finetune(tiny(task="poetry"))
    with pytest.raises(ValueError, match="settings colour are unknown"):
        Settings.from_dict({"task": "masked-lm", "output": "x", "colour": 1})


@pytest.mark.parametrize("model", ["small-bert", "small-gpt2", "small-t5"])
def test_tokenizers_are_the_same_each_time(model: str) -> None:
    """Ties in counts have an order that does not change, or eager and patched would get other tokens."""
    texts = [f"{a}{b} {b}{a}, 文字{a}。" for a in "abcdefgh" for b in "mnopqrst"]
    first, second = (models.train_tokenizer(model, texts, 320) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    decoded = first.decode(first("ab mn, 文字", add_special_tokens=False)["input_ids"])
    assert decoded.replace(" ", "") == "abmn,文字"
    if model != "small-gpt2":
        assert first("ab")["input_ids"][-1] in first.all_special_ids


# ---- every task


def write(path: Path, records: list[dict[str, Any]]) -> str:
    files.write_lines(path, records)
    return str(path)


def question(i: int) -> dict[str, Any]:
    context = f"This is the story of number {i}. The hero{i} found a key under a stone."
    return {
        "question": "who found a key?",
        "context": context,
        "answers": {"text": [f"hero{i}"], "answer_start": [context.index(f"hero{i}")]},
    }


def records_of(task: str) -> list[dict[str, Any]]:
    if task == "question-answering":
        return [question(i) for i in range(60)]
    if task in ("translation", "summarisation"):
        return [{"source": f"open the file {i}", "target": f"打开文件 {i}"} for i in range(60)]
    return [{"text": f"def number_{i}(x): return x + {i}  # adds {i} to its argument"} for i in range(60)]


@pytest.mark.parametrize(
    ("task", "model", "scores"),
    [
        ("language-model", "small-gpt2", {"loss", "perplexity"}),
        ("masked-lm", "small-bert", {"loss", "perplexity", "accuracy"}),
        ("question-answering", "small-bert", {"loss", "exact_match", "f1"}),
        ("translation", "small-t5", {"loss", "bleu", "chrf"}),
        ("summarisation", "small-bart", {"loss", "rouge1", "rouge2", "rougeL"}),
    ],
)
@pytest.mark.parametrize("implementation", ["eager", "patched"])
def test_every_task_learns(
    tiny: Tiny, tmp_path: Path, task: str, model: str, scores: set[str], implementation: str
) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    settings = tiny(
        task=task,
        model=model,
        columns=(),
        dataset=write(tmp_path / "data.jsonl", records_of(task)),
        implementation=implementation,
        max_length=48,
        steps=12,
        lr=1e-2,
    )
    result = finetune(settings)
    assert scores <= set(result.metrics)
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    if task != "masked-lm" and task != "question-answering":
        assert result.sample
    assert TASKS[task].main_metric in result.metrics


def test_masking_hides_what_bert_hides(tiny: Tiny, tmp_path: Path) -> None:
    settings = complete(tiny(task="masked-lm", columns=("text=review",)))
    task = TASKS["masked-lm"](settings)
    texts = data.rename(data.load(str(settings.dataset)), settings.column_names(), ("text",))
    task.prepare(texts, tmp_path / "tokenizer")
    examples = task.encode(texts * 20)
    batch, again = task.collate(examples, 7), task.collate(examples, 7)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["input_ids"], task.collate(examples, 8)["input_ids"])
    hidden = batch["labels"] != -100
    special = set(task.tokenizer.all_special_ids)
    assert not special & set(batch["labels"][hidden].tolist())
    share = hidden.sum() / (batch["attention_mask"].sum() - 2 * len(examples))
    assert 0.13 < share < 0.17
    masked = batch["input_ids"][hidden] == task.tokenizer.mask_token_id
    kept = batch["input_ids"][hidden] == batch["labels"][hidden]
    assert 0.75 < masked.float().mean() < 0.85 and 0.06 < kept.float().mean() < 0.15


def test_answers_that_are_cut_off_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    settings = complete(tiny(task="question-answering", columns=(), max_length=24))
    task = TASKS["question-answering"](settings)
    long = {**question(1), "context": "word " * 100 + "hero1", "answers": "hero1"}
    near = {**question(2), "answers": "hero2"}
    task.prepare([question(3), long, near], tmp_path / "tokenizer")
    (example,) = task.encode([long, near])
    first, last = example["place"]
    assert example["context"][example["offsets"][first][0] : example["offsets"][last][1]].strip() == "hero2"
    with pytest.raises(ValueError, match="no answer was found"):
        task.encode([long])
    with pytest.raises(ValueError, match="answers=3; it must be a text"):
        task.encode([{**near, "answers": 3}])
