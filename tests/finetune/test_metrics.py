from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_kernels.finetune import metrics


def test_classification_by_hand() -> None:
    """Class a: 2 of 3 claimed are right, 2 of 4 real are found; class b: 1 of 3 and 1 of 2."""
    scores = metrics.classification([0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 1], ["a", "b"])
    assert scores["accuracy"] == pytest.approx(3 / 6)
    a, b = scores["classes"]["a"], scores["classes"]["b"]
    assert (a["precision"], a["recall"], a["support"]) == (pytest.approx(2 / 3), pytest.approx(2 / 4), 4)
    assert (b["precision"], b["recall"], b["support"]) == (pytest.approx(1 / 3), pytest.approx(1 / 2), 2)
    assert a["f1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert scores["f1"] == pytest.approx((a["f1"] + b["f1"]) / 2)


def test_a_class_that_nobody_claims_scores_zero() -> None:
    scores = metrics.classification([0, 0], [0, 1], ["a", "b"])
    assert scores["classes"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["classes"]["a"]["recall"] == 1.0


labels = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(labels)
def test_classification_against_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, expected = map(list, zip(*pairs, strict=True))
    ours = metrics.classification(predicted, expected, list("abcd"))
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(
        expected, predicted, labels=[0, 1, 2, 3], average="macro", zero_division=0
    )
    assert ours["accuracy"] == pytest.approx(sklearn.accuracy_score(expected, predicted))
    assert (ours["precision"], ours["recall"], ours["f1"]) == pytest.approx((precision, recall, f1))


@given(labels)
def test_accuracy_is_the_mean_recall_by_support(pairs: list[tuple[int, int]]) -> None:
    predicted, expected = map(list, zip(*pairs, strict=True))
    scores = metrics.classification(predicted, expected, list("abcd"))
    found = sum(each["recall"] * each["support"] for each in scores["classes"].values())
    assert scores["accuracy"] == pytest.approx(found / len(pairs))


def test_wrong_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        metrics.classification([0], [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="nothing to score"):
        metrics.classification([], [], ["a", "b"])


@pytest.mark.parametrize(
    ("predicted", "accepted", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1.0, 1.0),
        ("a black cat", ["cat"], 0.0, 2 * 0.5 / 1.5),
        ("dog", ["cat", "dog"], 1.0, 1.0),
        ("dog", ["cat"], 0.0, 0.0),
        ("==", ["=="], 1.0, 1.0),
        ("==", ["!="], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
    ],
)
def test_answers(predicted: str, accepted: list[str], exact: float, f1: float) -> None:
    assert metrics.answer(predicted, accepted) == (exact, pytest.approx(f1))


def test_translation_and_summarisation_are_perfect_for_the_right_text() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    chinese = ["找不到这个文件，请检查文件的名称", "无法打开这个目录，因为它已经被删除"]
    scores = metrics.translation(chinese, chinese, "zh_CN")
    assert scores["bleu"] == pytest.approx(100) and scores["chrf"] == pytest.approx(100)
    assert metrics.translation(chinese[::-1], chinese, "zh_CN")["bleu"] < 50
    assert metrics.summarisation(["Return the name."], ["Return the name."])["rougeL"] == 1.0
    # "return" and "name" of two and three words: F = 2 * 1 * (2/3) / (1 + 2/3)
    assert metrics.summarisation(["return name"], ["return a name"])["rouge1"] == pytest.approx(0.8)
