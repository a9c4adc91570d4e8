from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel_kernels.finetune import data

RECORDS = [{"text": "a, b", "label": "x"}, {"text": "文字", "label": "y"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'text,label\n"a, b",x\n文字,y\n'),
        ("d.json", json.dumps(RECORDS)),
        ("d2.json", json.dumps({"data": RECORDS})),
        ("d.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n\n" for r in RECORDS)),
    ],
)
def test_local_files(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert data.load(str(path)) == RECORDS


def test_text_files_have_a_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert data.load(str(path)) == [{"text": "one"}, {"text": "two"}]


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    whole.save_to_disk(str(tmp_path / "saved"))
    assert data.load(str(tmp_path / "saved")) == RECORDS
    with pytest.raises(ValueError, match=r"split='test' is not in .*; it has train"):
        data.load(str(tmp_path / "saved"), "test")


def test_a_folder_of_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("text,label\none,x\ntwo,y\n", encoding="utf-8")
    expected = [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    assert data.load(str(tmp_path / "mine")) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.json", "3", "it must hold objects"),
        ("d.json", "[1, 2]", "it must hold objects"),
        ("d.csv", "text,label\n", "has no record"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        data.load(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"dataset='no\.csv': there is no such file"):
        data.load("no.csv")


def test_rename() -> None:
    records = [{"translation": {"en": "a", "zh": "b"}, "id": 1}]
    columns = {"source": "translation.en", "target": "translation.zh"}
    assert data.rename(records, columns, ("source", "target")) == [{"source": "a", "target": "b"}]
    with pytest.raises(ValueError, match="column 'target' for 'target' is not in the data, which has trans"):
        data.rename(records, {"source": "translation.en"}, ("source", "target"))
    with pytest.raises(ValueError, match="columns=text: this task has no such column; it has source, target"):
        data.rename(records, {"text": "id"}, ("source", "target"))


keys = st.lists(st.text(max_size=6), min_size=30, max_size=60)


@given(keys, st.integers(0, 9))
def test_equal_keys_stay_on_one_side_and_nothing_is_lost(names: list[str], seed: int) -> None:
    records = [{"key": name, "place": i} for i, name in enumerate(names)]
    try:
        training, held_out = data.split(records, names, seed, 0.5)
    except ValueError as error:
        assert "part is empty" in str(error)
        return
    assert sorted(r["place"] for r in (*training, *held_out)) == list(range(len(names)))
    assert not {r["key"] for r in training} & {r["key"] for r in held_out}


def test_the_split_does_not_depend_on_the_other_records() -> None:
    names = [str(i) for i in range(300)]
    records = [{"key": name} for name in names]
    _, held_out = data.split(records, names, 3, 0.2)
    _, of_half = data.split(records[::2], names[::2], 3, 0.2)
    assert [r for r in held_out if int(r["key"]) % 2 == 0] == of_half
    assert 35 < len(held_out) < 85
    # The first ones are a fair sample, in whatever order the records came: here 30 of both halves.
    first = [int(r["key"]) < 150 for r in data.split(records, names, 3, 0.5)[1][:60]]
    assert 18 < sum(first) < 42
    few = data.split(records, names, 3, 0.2, most=100)
    assert len(few[0]) + len(few[1]) == 100
    assert all(r in held_out for r in few[1])
    assert data.split(records, names, 4, 0.2)[1] != held_out


@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 7))
def test_order_visits_everything_once_in_each_pass(size: int, seed: int, step: int) -> None:
    order = data.Order(size, seed)
    whole = order.take(0, 3 * size)
    for start in range(0, 3 * size, size):
        assert sorted(whole[start : start + size]) == list(range(size))
    # The same in pieces, and from the middle by another object, as after a resume.
    pieces = [i for start in range(0, 3 * size, step) for i in order.take(start, step)]
    assert pieces[: 3 * size] == whole
    assert data.Order(size, seed).take(size + size // 2, size) == whole[size + size // 2 :][:size]


def test_fingerprint_sees_order_and_borders() -> None:
    assert data.fingerprint(["a", "b"]) != data.fingerprint(["b", "a"])
    assert data.fingerprint(["ab", "c"]) != data.fingerprint(["a", "bc"])
