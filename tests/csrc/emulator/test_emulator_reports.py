"""Kernels that are wrong in one way each: the emulator says which, where, and whose fault it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

BROKEN = {
    "missing_arrival": ("deadlock", "32 threads (0 to 31) wait at bar.sync 1 (64 threads)"),
    "missing_barrier": ("uninitialised|race", "shared memory 0x"),
    "missing_sync_warp": ("uninitialised|race", "shared memory 0x"),
    "overwritten_while_read": ("race", "may still be reading|with no barrier in between"),
    "copy_not_waited_for": ("race", "while an asynchronous copy to it is under way"),
    "never_written": ("uninitialised", "reads shared memory 0x1c, which nobody wrote"),
    "past_shared_memory": ("out of bounds", "the block has 124 bytes"),
    "past_global_memory": ("out of bounds", "byte 128 of an array of 128"),
    "write_to_input": ("out of bounds", "global memory that is an input"),
    "divergent_warp": ("divergence", "while others of its warp are at"),
    "missing_proxy_fence": ("proxy fence", "with no fence.proxy.async after them"),
    "overwritten_under_wgmma": ("race", "while the copy engine or a tensor core reads it"),
    "overwritten_under_bulk_add": ("race", "while the copy engine or a tensor core reads it"),
    "mbarrier_never_completed": ("deadlock", "arrivals missing 1"),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(run_word: Any, name: str, seed: int) -> None:
    kinds, words = BROKEN[name]
    with pytest.raises(RuntimeError) as error:
        run_word(name, torch.zeros(2048, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), seed)
    message = str(error.value)
    assert any(f"{kind}: " in message for kind in kinds.split("|")), message
    assert any(w in message for w in words.split("|")), message


def test_an_unordered_read_is_a_race_in_some_order(run_word: Any) -> None:
    """Where the write happens to come first, the value is there and only the missing barrier can tell."""
    seen = set()
    for seed in range(12):
        with pytest.raises(RuntimeError) as error:
            run_word(
                "missing_barrier", torch.zeros(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int32), seed
            )
        seen.add("race" if "race: " in str(error.value) else "uninitialised")
    assert seen == {"race", "uninitialised"}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_copy_that_nobody_waits_for_is_caught(library: Path, seed: int) -> None:
    source, output = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int32)
    with pytest.raises(
        RuntimeError, match=r"race: .*(an asynchronous copy to it is under way|no barrier in between)"
    ):
        torch.ops.bigmodel_testing.run_tma("tma_not_waited_for", source, output, [0, 0, 0, 0], seed)
