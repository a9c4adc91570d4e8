"""The page of an attention map in a real browser, where there is one: playwright and Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_attention_map import NASTY, made_up

from bigmodel_kernels.attention_map import html

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
TOKENS = (*NASTY, "cat", "sat", "cat")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "map.html"
    html.write(made_up(TOKENS), path)
    context = browser.new_context(color_scheme=request.param, reduced_motion="reduce", offline=True)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.goto(path.as_uri())
    yield opened
    assert not said, said
    context.close()


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.getAttribute('aria-label')"))


def readout(page: Any) -> list[str]:
    return [page.inner_text(f"#{name}") for name in ("query", "key", "weight")]


def test_arrow_keys_move_over_heads(page: Any) -> None:
    found = made_up(TOKENS)
    page.keyboard.press("Tab")
    assert focused(page).startswith("Layer 0, head 0")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # the last head stays the last
    assert focused(page).startswith("Layer 1, head 5")
    title = f"Layer 1, head 5, mean entropy {found.entropy[1, 1]:.2f} nats"
    assert page.inner_text("#map-title") == title
    assert page.get_attribute("#heads td[aria-selected=true]", "aria-label") == title
    shown = page.eval_on_selector_all("#map td", "cells => cells.map(cell => cell.textContent).slice(1)")
    expected = [str(round(100 * round(float(w) * 65535) / 65535)) for w in found.weights[1, 1].flatten()]
    assert shown == expected


def test_arrow_keys_move_over_cells_and_are_announced(page: Any) -> None:
    weights = made_up(TOKENS).weights[0, 0]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert focused(page).startswith("<b> to <b>: ")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert readout(page) == ["&amp;", '"quoted"', f"{weights[1, 2]:.3f}"]
    page.keyboard.press("End")
    assert readout(page)[1] == "cat (11)"  # there are two cats
    page.keyboard.press("Control+End")
    assert readout(page) == ["cat (11)", "cat (11)", f"{weights[10, 10]:.3f}"]
    page.keyboard.press("Home")
    assert readout(page)[1] == "<b>"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Escape")
    assert focused(page).startswith("Layer 0, head 0")
    # The map is one stop of the Tab key, at the cell where it was left.
    page.keyboard.press("Tab")
    assert focused(page).startswith("cat (11) to <b>")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "scale"


def test_pointing_at_a_cell_shows_it(page: Any) -> None:
    weights = made_up(TOKENS).weights[0, 0]
    page.hover("#map tbody tr:nth-child(9) td:nth-of-type(10)")
    assert readout(page) == ["cat (9)", "sat", f"{weights[8, 9]:.3f}"]
    names = page.eval_on_selector_all("#map th.on", "headers => headers.map(th => th.textContent)")
    assert names == ["sat", "cat"]
    largest = page.inner_text("#most li:first-child span:last-child")
    assert largest == f"{weights[8].max():.3f}"
    assert page.inner_text("#sentence li.query") == "cat"


def test_clicking_a_head_chooses_it(page: Any) -> None:
    page.click("#heads tbody tr:nth-child(3) td:nth-of-type(2)")
    assert page.inner_text("#map-title").startswith("Layer 2, head 5")


def test_the_colour_scale(page: Any) -> None:
    cell = "#map tbody tr:nth-child(2) td:nth-of-type(3)"

    def colour() -> str:
        return str(page.eval_on_selector(cell, "cell => cell.style.backgroundColor"))

    before, drawn = colour(), page.evaluate("document.querySelector('canvas').toDataURL()")
    page.select_option("#scale", "one")
    assert page.inner_text("#largest") == "1.00" and page.inner_text("#middle") == "0.50"
    assert colour() != before
    assert page.evaluate("document.querySelector('canvas').toDataURL()") != drawn


def test_a_narrow_window_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 380, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
