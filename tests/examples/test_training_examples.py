"""Every training example runs for a few steps, with a tiny model by --model and tiny data by --dataset."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bigmodel_kernels import files
from bigmodel_kernels.finetune import models

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [
    "the",
    "room",
    "was",
    "warm",
    "and",
    "kind",
    "but",
    "the",
    "meal",
    "came",
    "late",
    "cold",
    "and",
    "loud",
]
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(40)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model, as `from_pretrained` takes it."""
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

            torch.manual_seed(0)
            tokenizer = models.train_tokenizer(name, TEXTS, 300)
            size = len(tokenizer)
            if name == "small-bert":
                model = BertForMaskedLM(
                    BertConfig(
                        vocab_size=size,
                        hidden_size=16,
                        num_hidden_layers=1,
                        num_attention_heads=2,
                        intermediate_size=32,
                        max_position_embeddings=256,
                    )
                )
            else:
                model = GPT2LMHeadModel(
                    GPT2Config(
                        vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=256, eos_token_id=1
                    )
                )
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records with the columns of every task."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    context = "The {0} was found under a stone by the river."
    files.write_lines(
        path,
        [
            {
                "text": text,
                "label": ("good", "bad")[i % 2],
                "source": text,
                "target": " ".join(text.split()[:3]),
                "question": "what was found?",
                "context": f"In year {i} it was found: " + context.format(text.split()[0]),
                "answers": text.split()[0],
            }
            for i, text in enumerate(TEXTS)
        ],
    )
    return str(path)


@pytest.fixture
def example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    def run(name: str, *words: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("name", "model", "package"),
    [
        ("sentiment_chinese.py", "small-bert", "torch"),
        ("masked_lm.py", "small-bert", "torch"),
        ("tiny_gpt_stdlib.py", "small-gpt2", "torch"),
        ("lora.py", "small-bert", "peft"),
    ],
)
def test_loops(
    example: Callable[..., str], tiny: Callable[[str], str], dataset: str, name: str, model: str, package: str
) -> None:
    pytest.importorskip(package)
    text = example(name, "--model", tiny(model), "--dataset", dataset, "--steps", "3")
    assert "patched" in text
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", text)]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    expected = {
        "sentiment_chinese.py": r"accuracy 0\.\d+  precision",
        "masked_lm.py": r"Return the \[MASK\] of the list\.  ->  \S",
        "tiny_gpt_stdlib.py": r"^def ",
        "lora.py": r"trainable params: ",
    }
    assert re.search(expected[name], text, re.M)


def test_tiny_gpt_makes_its_own_model(example: Callable[..., str], dataset: str) -> None:
    text = example("tiny_gpt_stdlib.py", "--dataset", dataset, "--steps", "1")
    assert "GPT2LMHeadModel is patched" in text


def test_trainer(example: Callable[..., str], tiny: Callable[[str], str], dataset: str) -> None:
    pytest.importorskip("accelerate")
    text = example("trainer.py", "--model", tiny("small-bert"), "--dataset", dataset, "--steps", "3")
    assert "patched" in text and "eval_f1" in text


def test_question_answering(example: Callable[..., str], tiny: Callable[[str], str], dataset: str) -> None:
    text = example(
        "question_answering.py", "--model", tiny("small-bert"), "--dataset", dataset, "--steps", "3"
    )
    assert re.search(r"exact match [01]\.\d+, F1 ", text)
    assert "what was found?\n  -> " in text


@pytest.mark.parametrize(
    ("name", "score", "package"),
    [("translation.py", "BLEU", "sacrebleu"), ("summarisation.py", "ROUGE-1", "rouge_score")],
)
def test_sequence_to_sequence(
    example: Callable[..., str], dataset: str, name: str, score: str, package: str
) -> None:
    pytest.importorskip(package)
    text = example(name, "--model", "small-bart", "--dataset", dataset, "--steps", "2")
    assert re.search(rf"{score} \d", text)
    assert "\n  -> " in text


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_fit_a_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80
