"""What the documentation site adds to docs/: hooks of MkDocs, named in mkdocs.yml.

The pages are written to be read in the repository, where README, CONTRIBUTING and CHANGELOG stand beside
docs/ and links lead to sources too. Here those three become pages, a link to a file that has no page becomes
its text, and the navigation holds the pages that there are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

#: File of the repository's root -> its page.
ROOT_PAGES = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}

#: Section of README.md -> a page of its own.
SECTION_PAGES = {"What it does not do": "limits.md"}

#: Chapters; a page that is not there is left out, and one that no chapter names is under "More".
NAVIGATION: dict[str, list[str]] = {
    "Start": ["index.md", "quickstart.md", "quickstart.zh-CN.md", "index.zh-CN.md"],
    "Tutorials": [
        *("tutorials/patch_bert.md", "tutorials/patch_gpt2.md", "tutorials/fine_tune.md"),
        *("tutorials/add_an_op.md", "tutorials/add_a_family.md", "tutorials/add_a_backend.md"),
    ],
    "Guides": ["transformers.md", "ops.md", "compat.md", "finetuning.md", "attention_maps.md", "tasks.md"],
    "How the kernels work": ["architecture.md", "cpu.md", "cuda.md"],
    "Numbers": ["numerics.md", "performance.md", "benchmarks.md"],
    "Support": ["support.md", "limits.md"],
    "Reference": [
        *("api/operators.md", "api/transformers.md", "api/compat.md", "api/bench.md", "api/extending.md"),
    ],
    "Project": ["building.md", "contributing.md", "changelog.md"],
}
MORE = "More"

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_page_links(text, name, page)))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for heading, page in SECTION_PAGES.items():
        text = f"# {heading}\n\n{section(readme, heading)}"
        files.append(File.generated(config, page, content=with_page_links(text, "README.md", page)))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.generated_by is not None:
        return markdown  # its links are made above, where its place in the repository is known
    return with_page_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level. Raises KeyError where there is none."""
    found = re.search(rf"^## {re.escape(heading)}\n+(.*?)(?=^## |\Z)", text, re.S | re.M)
    if found is None:
        raise KeyError(f"there is no section {heading!r}")
    return found[1]


def with_page_links(text: str, source: str, page: str) -> str:
    """The text of `source`, a file of the repository, with its links as `page` of the site needs them."""

    def link(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / path).exists():
            return match[0]  # wrong, and the strict build says so
        goal = ROOT_PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if goal is None:
            return label
        return f"{image}[{label}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"

    parts = _CODE.split(text)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def navigation(pages: list[str]) -> list[dict[str, list[str]]]:
    """The chapters with those of their pages that there are, and last the pages that no chapter names."""
    named = {page for chapter in NAVIGATION.values() for page in chapter}
    chapters = {title: [page for page in chapter if page in pages] for title, chapter in NAVIGATION.items()}
    chapters[MORE] = sorted(set(pages) - named)
    return [{title: chapter} for title, chapter in chapters.items() if chapter]
