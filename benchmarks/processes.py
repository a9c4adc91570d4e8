"""Several processes on one machine: does anybody lose by the others' being there?

    python benchmarks/processes.py [--processes 4] [--seconds 8] [--json FILE]

Each process has a BERT-base of its own and encodes a ragged batch again and again, with as many threads as
torch takes by default, as if it were alone; all start together. First one process, then all, for sdpa and for
the patched model in turn. What counts is the batches per second of all processes together: with more of them
than cores each gets less, and the sum stays what one process makes of the machine if nothing is lost to
waiting for each other. Two threads against one, in one process, are measured too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any


def encode(kind: str, threads: int | None, seconds: float, start: Any, results: Any) -> None:
    import torch
    from transformers import BertConfig, BertModel

    import bigmodel_kernels as bk

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = BertModel._from_config(BertConfig(num_hidden_layers=4), attn_implementation="sdpa").eval()
    if kind == "bigmodel":
        bk.patch(model)
    lengths = torch.randint(8, 129, (16,))
    mask = (torch.arange(128)[None] < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape) * mask
    with torch.inference_mode():
        for _ in range(2):
            model(ids, attention_mask=mask)
        start.wait()
        batches, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            model(ids, attention_mask=mask)
            batches += 1
        results.put(batches / (time.perf_counter() - begin))


def batches_per_second(kind: str, processes: int, threads: int | None, seconds: float) -> float:
    """Of all processes together."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=encode, args=(kind, threads, seconds, start, results))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    total = sum(results.get(timeout=300 + 10 * seconds) for _ in workers)
    for worker in workers:
        worker.join()
    return float(total)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each measurement")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to FILE")
    options = parser.parse_args()
    settings = {"one thread": (1, 1), "one process": (1, None), "all processes": (options.processes, None)}
    found: dict[str, dict[str, float]] = {kind: {} for kind in ("sdpa", "bigmodel")}
    for name, (processes, threads) in settings.items():
        for kind, numbers in found.items():
            numbers[name] = batches_per_second(kind, processes, threads, options.seconds)
    print(f"batches per second in all; all processes: {options.processes}")
    for kind, numbers in found.items():
        row = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items())
        scaling = numbers["one process"] / numbers["one thread"]
        kept = numbers["all processes"] / numbers["one process"]
        print(f"{kind:<9} {row}  threads {scaling:.2f}x  processes keep {kept:.2f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"processes": options.processes, "seconds": options.seconds, **found}, file, indent=1)


if __name__ == "__main__":
    main()
