"""Scores of predictions: plain arithmetic; BLEU, chrF and ROUGE are those of sacrebleu and rouge-score."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bigmodel_kernels.extras import package


def classification(
    predicted: Sequence[int], expected: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 for each class and as their plain mean over the classes.

    precision = right / predicted as the class, recall = right / really of the class, F1 = their harmonic
    mean; 0 where nothing is there to divide by. `classes` are the names of classes 0, 1, ...
    """
    if len(predicted) != len(expected):
        raise ValueError(f"{len(predicted)} predictions for {len(expected)} labels; they must be as many")
    if not expected:
        raise ValueError("there is nothing to score: no label was given")
    right = Counter(e for p, e in zip(predicted, expected, strict=True) if p == e)
    claimed, real = Counter(predicted), Counter(expected)
    each: dict[str, dict[str, float]] = {}
    for i, name in enumerate(classes):
        precision = right[i] / claimed[i] if claimed[i] else 0.0
        recall = right[i] / real[i] if real[i] else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        each[name] = {"precision": precision, "recall": recall, "f1": f1, "support": real[i]}
    mean = {key: sum(e[key] for e in each.values()) / len(each) for key in ("precision", "recall", "f1")}
    return {"accuracy": sum(right.values()) / len(expected), **mean, "classes": each}


def normalised(answer: str) -> list[str]:
    """The words of an answer without case, punctuation and articles (SQuAD's rule, arXiv:1606.05250)."""
    plain = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def answer(predicted: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 over words, each the best over the accepted answers.

    An answer of punctuation alone has no words: then the texts themselves are compared.
    """
    return max(_exact(predicted, a) for a in accepted), max(_overlap(predicted, a) for a in accepted)


def _exact(predicted: str, accepted: str) -> float:
    ours, theirs = normalised(predicted), normalised(accepted)
    return float(ours == theirs if ours or theirs else predicted.strip() == accepted.strip())


def _overlap(predicted: str, accepted: str) -> float:
    ours, theirs = Counter(normalised(predicted)), Counter(normalised(accepted))
    common = (ours & theirs).total()
    if not common:
        return _exact(predicted, accepted)
    precision, recall = common / ours.total(), common / theirs.total()
    return 2 * precision * recall / (precision + recall)


def translation(predicted: list[str], expected: list[str], language: str) -> dict[str, float]:
    """BLEU and chrF of the corpus by sacrebleu, with its tokenizer for Chinese and Japanese by characters."""
    sacrebleu = package("sacrebleu", "sacrebleu", "finetune")
    tokenizer = {"zh": "zh", "ja": "char", "ko": "char"}.get(language[:2], "13a")
    return {
        "bleu": sacrebleu.corpus_bleu(predicted, [expected], tokenize=tokenizer).score,
        "chrf": sacrebleu.corpus_chrf(predicted, [expected]).score,
    }


def summarisation(predicted: list[str], expected: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L by rouge-score, in parts of 1."""
    scorer = package("rouge_score.rouge_scorer", "rouge-score", "finetune").RougeScorer(
        ["rouge1", "rouge2", "rougeL"], use_stemmer=True
    )
    scores = [scorer.score(e, p) for p, e in zip(predicted, expected, strict=True)]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in scores[0]}
