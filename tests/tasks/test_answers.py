"""Answers in a document that is longer than the model, against windows that are cut by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from task_models import TEXTS, Folder

from bigmodel_kernels.tasks import QuestionAnswering, run

DOCUMENT = " ".join(" ".join(text.split()) for text in TEXTS * 5)
QUESTIONS = ["where did the cat sit?", "what was wet?"]
LONGEST_ANSWER = 15


def by_hand(path: str, question: str, window: int, stride: int) -> list[tuple[float, str]]:
    """Score and text of all spans, best first: one window after the other through the eager model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        path, attn_implementation="eager"
    ).eval()
    asked = tokenizer(question, add_special_tokens=False)["input_ids"]
    document = tokenizer(DOCUMENT, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = document["input_ids"], document["offset_mapping"]
    room = window - 3 - len(asked)
    spans: dict[tuple[int, int], float] = {}
    for first in range(0, len(ids), room - stride):
        part = ids[first : first + room]
        row = [tokenizer.cls_token_id, *asked, tokenizer.sep_token_id, *part, tokenizer.sep_token_id]
        types = [0] * (len(asked) + 2) + [1] * (len(part) + 1)
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([types]))
        # The probability of a token is among those of the document and the first one, "no answer".
        places = [0, *range(len(asked) + 2, len(asked) + 2 + len(part))]
        start = out.start_logits[0, places].softmax(-1)[1:]
        end = out.end_logits[0, places].softmax(-1)[1:]
        for i in range(len(part)):
            for j in range(i, min(i + LONGEST_ANSWER, len(part))):
                place = (offsets[first + i][0], offsets[first + j][1])
                spans[place] = max(spans.get(place, 0.0), float(start[i] * end[j]))
        if first + room >= len(ids):
            break
    return sorted(((score, DOCUMENT[a:b]) for (a, b), score in spans.items()), reverse=True)


@pytest.mark.parametrize(("window", "stride"), [(96, None), (60, 10), (96, 0)])
def test_windows_over_a_long_document(folder: Folder, window: int, stride: int | None) -> None:
    path = folder("reader")
    task = QuestionAnswering(context=DOCUMENT, top_k=3, window=window, stride=stride)
    outcome = run(task, QUESTIONS, model=path)
    for question, row in zip(QUESTIONS, outcome.results, strict=True):
        expected = by_hand(path, question, window, window // 2 if stride is None else stride)
        assert row["text"] == question
        assert [answer["score"] for answer in row["answers"]] == pytest.approx(
            [score for score, _ in expected[:3]], rel=1e-3
        )
        best = row["answers"][0]
        assert best["answer"] == expected[0][1] == DOCUMENT[best["start"] : best["end"]]


def test_a_document_as_a_file_is_the_same(folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT, encoding="utf-8")
    by_file = run(QuestionAnswering(document=file), QUESTIONS, model=folder("reader"))
    assert (
        by_file.results == run(QuestionAnswering(context=DOCUMENT), QUESTIONS, model=folder("reader")).results
    )


def test_no_answer_is_an_answer_only_where_it_is_allowed(folder: Folder) -> None:
    def answers(**options: Any) -> list[dict[str, Any]]:
        task = QuestionAnswering(context=TEXTS[0], top_k=50, **options)
        return run(task, QUESTIONS[:1], model=folder("reader")).results[0]["answers"]

    assert all(answer["answer"] for answer in answers())
    empty = [answer for answer in answers(impossible=True) if not answer["answer"]]
    assert len(empty) == 1 and 0 < empty[0]["score"] < 1
    assert all(len(answer["answer"]) < 20 for answer in answers(max_answer_tokens=2))


def test_a_question_that_leaves_no_room_is_refused(folder: Folder) -> None:
    task = QuestionAnswering(context=DOCUMENT)
    with pytest.raises(ValueError, match=r"leaves .* for the document, which must be more than stride=48"):
        run(task, ["the cat sat on the mat " * 10], model=folder("reader"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "a", "stride": -1}, "stride=-1; it must not be negative"),
        ({"context": "a", "max_answer_tokens": 0}, "max_answer_tokens=0; it must be positive"),
        ({"context": "a", "document": Path("b")}, "needs the text with the answers"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionAnswering(**options).check()
