"""The tuner, with a clock that is not a GPU's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from bigmodel_kernels import triton_tuning as tuning


class Tile(NamedTuple):
    rows: int
    columns: int


TILES = [Tile(1, 1), Tile(2, 2), Tile(3, 3)]
TIMES = {TILES[0]: 5.0, TILES[1]: 2.0, TILES[2]: 4.0}
LIKE = torch.zeros(1)


class Bench:
    """Measures with TIMES; `launched` says what ran."""

    def __init__(self) -> None:
        self.launched: list[Tile] = []
        self.seconds_each = 0.1
        self._now = 0.0

    def launch(self, tile: Tile) -> None:
        self.launched.append(tile)

    def measure(self, run: Callable[[], None]) -> float:
        run()
        self._now += self.seconds_each
        return TIMES[self.launched[-1]]

    def clock(self) -> float:
        return self._now

    def choose(self, key: str = "linear 1x2x3", **options: Any) -> Tile:
        return tuning.choose(key, TILES, self.launch, LIKE, **options)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    bench = Bench()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tuning.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tuning, "_measurable", lambda like: True)
    monkeypatch.setattr(tuning, "_capturing", lambda like: False)
    monkeypatch.setattr(tuning, "_device_name", lambda like: "Imaginary GPU/80")
    monkeypatch.setattr(tuning, "_measure", bench.measure)
    monkeypatch.setattr(tuning, "_clock", bench.clock)
    monkeypatch.setattr(tuning, "_spent", 0.0)
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_warned", set())
    return bench


def _new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_spent", 0.0)


def test_the_fastest_is_measured_once_and_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.choose() == TILES[1] and bench.launched == TILES
    assert bench.choose() == TILES[1] and bench.launched == TILES
    _new_process(monkeypatch)
    assert bench.choose() == TILES[1] and bench.launched == TILES  # from the file
    assert bench.choose("another") == TILES[1] and len(bench.launched) == 6
    document = json.loads(tuning._path("Imaginary GPU/80").read_text())
    assert document["entries"] == {"linear 1x2x3": [2, 2], "another": [2, 2]}
    assert document["version"] == tuning.VERSION and document["device"] == "Imaginary GPU/80"
    assert [p.suffix for p in tuning._path("Imaginary GPU/80").parent.iterdir()] == [".json"]


def test_devices_do_not_share(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.choose()
    monkeypatch.setattr(tuning, "_device_name", lambda like: "Another GPU")
    bench.choose()
    assert len(bench.launched) == 6 and tuning._path("Another GPU").exists()


@pytest.mark.parametrize(
    "reason", ["environment", "deterministic", "not a GPU", "capturing", "not repeatable"]
)
def test_nothing_is_measured(reason: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {}
    if reason == "environment":
        monkeypatch.setenv(tuning.ENVIRONMENT, "0")
    elif reason == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif reason == "not a GPU":
        monkeypatch.setattr(tuning, "_measurable", lambda like: False)
    elif reason == "capturing":
        monkeypatch.setattr(tuning, "_capturing", lambda like: True)
    else:
        options["repeatable"] = False
    assert bench.choose(**options) == TILES[0] and bench.launched == []


def test_a_call_that_cannot_be_repeated_uses_what_is_known(bench: Bench) -> None:
    bench.choose()
    assert bench.choose(repeatable=False) == TILES[1]


def test_the_budget_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half measured is not measured: the first candidate runs, and a later process measures again."""
    bench.seconds_each = tuning.BUDGET_SECONDS / 2
    assert bench.choose() == TILES[0] and len(bench.launched) == 2
    assert bench.choose("another") == TILES[0] and len(bench.launched) == 2
    assert not tuning._path("Imaginary GPU/80").exists()
    bench.seconds_each = 0.1
    _new_process(monkeypatch)
    assert bench.choose() == TILES[1]


def test_a_stored_tile_that_is_no_candidate_is_measured_again(bench: Bench) -> None:
    path = tuning._path("Imaginary GPU/80")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"version": tuning.VERSION, "entries": {"linear 1x2x3": [9, 9]}}))
    assert bench.choose() == TILES[1] and bench.launched == TILES


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"version": 0, "entries": {}}', '{"version": 1, "entries": {"a": 3}}']
)
def test_a_damaged_file_is_ignored_with_a_warning(content: str, bench: Bench) -> None:
    path = tuning._path("Imaginary GPU/80")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert bench.choose() == TILES[1]
    assert json.loads(path.read_text())["entries"] == {"linear 1x2x3": [2, 2]}


def test_a_folder_that_cannot_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert bench.choose() == TILES[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bench.choose("another") == TILES[1]  # said once


def test_what_another_process_wrote_is_kept(bench: Bench) -> None:
    bench.choose()
    path = tuning._path("Imaginary GPU/80")
    document = json.loads(path.read_text())
    document["entries"]["theirs"] = [3, 3]
    path.write_text(json.dumps(document))
    bench.choose("mine")
    assert set(json.loads(path.read_text())["entries"]) == {"linear 1x2x3", "theirs", "mine"}
