"""Which block takes which tile of queries: csrc/attention/schedule.cuh against a list that is written out."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TILE_M, TILE_N = 128, 64


class Call(NamedTuple):
    lengths: list[tuple[int, int]]  # queries and keys of each sequence
    heads: int
    packed: bool = True
    window: tuple[int, int] = (-1, -1)


def tiles_of(call: Call) -> dict[tuple[int, int, int], int]:
    """(batch, head, m_start) -> tiles of keys that it sees."""
    tiles = {}
    left, right = call.window
    for batch, (queries, keys) in enumerate(call.lengths):
        for start in range(0, queries, TILE_M):
            last, offset = min(start + TILE_M, queries) - 1, keys - queries
            end = keys if right < 0 else min(keys, last + offset + right + 1)
            begin = 0 if left < 0 else max(0, start + offset - left) // TILE_N * TILE_N
            for head in range(call.heads):
                tiles[batch, head, start] = max(0, -(-(end - begin) // TILE_N))
    return tiles


def order(run_word: Any, call: Call, blocks: int, room: int = 600) -> list[list[tuple[int, ...]]]:
    """What each block does, in its order."""
    queries, keys = zip(*call.lengths, strict=True)
    head = [len(queries), call.heads, max(queries), max(keys), *call.window, int(call.packed), room]
    cu = [itertools.accumulate(lengths, initial=0) for lengths in (queries, keys)]
    words = torch.tensor([*head, *cu[0], *cu[1]], dtype=torch.int32)
    output = torch.full((blocks, room, 3), -1, dtype=torch.int32)
    run_word(f"schedule_of_{blocks}", words, output)
    return [[tuple(tile) for tile in block if tile[0] >= 0] for block in output.tolist()]


def longest(blocks: list[list[tuple[int, ...]]], cost: dict[tuple[int, int, int], int]) -> int:
    return max(sum(cost[tile] + 1 for tile in block) for block in blocks)  # type: ignore[index]


def greedy(cost: dict[tuple[int, int, int], int], blocks: int) -> int:
    """When whoever is free takes the longest that is left."""
    free = [0] * blocks
    for tiles in sorted(cost.values(), reverse=True):
        heapq.heapreplace(free, free[0] + tiles + 1)
    return max(free)


random.seed(0)
MIXED = [(n, n) for n in random.choices(range(1, 2048), k=70)]


@pytest.mark.parametrize(
    ("call", "allowed"),
    [
        (Call([(2048, 2048)] * 8, 16, packed=False, window=(-1, 0)), 1.04),
        (Call([(512, 512)] * 16, 16, packed=False, window=(-1, 0)), 1.04),
        (Call([(4096, 4096)] * 2, 32, packed=False), 1.01),
        (Call([(3000, 4500)] * 3, 8, packed=False, window=(-1, 0)), 1.04),
        (Call(MIXED, 4), 1.05),
        (Call(MIXED, 4, window=(-1, 0)), 1.06),
    ],
)
def test_blocks_end_together(run_word: Any, call: Call, allowed: float) -> None:
    """As good as a queue: the slowest of a Hopper's blocks against the greedy order, longest first."""
    cost = tiles_of(call)
    blocks = order(run_word, call, 132)
    assert sorted(tile for block in blocks for tile in block) == sorted(cost)
    assert longest(blocks, cost) <= allowed * greedy(cost, 132)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 5000)), min_size=1, max_size=70),
    heads=st.integers(1, 5),
    window=st.tuples(*[st.one_of(st.just(-1), st.integers(0, 300))] * 2),
    dense=st.booleans(),
)
def test_every_tile_once(
    run_word: Any, lengths: list[tuple[int, int]], heads: int, window: tuple[int, int], dense: bool
) -> None:
    lengths = [lengths[0]] * len(lengths) if dense else lengths
    if lengths[0][1] == 0 and all(keys == 0 for _, keys in lengths):
        lengths = [(queries, 1) for queries, _ in lengths]
    call = Call(lengths, heads, not dense, window)
    blocks = order(run_word, call, 5)
    assert sorted(tile for block in blocks for tile in block) == sorted(tiles_of(call))
