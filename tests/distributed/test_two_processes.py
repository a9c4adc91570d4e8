"""Patched models in two processes over gloo, on the CPU: data parallel, sharded, tensor parallel."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import workers

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All scenarios of one pair of processes: starting a pair costs more than what it computes."""
    folder = tmp_path_factory.mktemp("distributed")
    processes.spawn(workers.main, args=(str(folder),), nprocs=workers.WORLD)
    found = {}
    for name in workers.SCENARIOS:
        parts = [
            torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(workers.WORLD)
        ]
        found[name] = next((part for part in parts if "error" in part), parts[0])
    return found


def result_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    result = results[name]
    assert "error" not in result, result["error"]
    return result


def assert_trained_alike(result: dict[str, Any]) -> None:
    for what in ("gradients", "weights"):
        ours, expected = result["ours"][what], result["expected"][what]
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, atol=2e-5, rtol=1e-4, msg=f"{what} of {name}")


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_data_parallel_gradients_are_those_of_one_process(results: dict[str, Any], kind: str) -> None:
    assert_trained_alike(result_of(results, f"ddp {kind}"))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_fully_sharded(results: dict[str, Any], kind: str) -> None:
    """Fused, without padding where BERT is without, and each step's weights are seen by the next forward."""
    result = result_of(results, f"fsdp {kind}")
    assert_trained_alike(result)
    tokens = 9 + 5 if kind == "bert" else 2 * 9
    assert result["seen"] == [(tokens, True)] * 6  # two layers, three steps
    original = {"bert": "BertLayer", "gpt2": "GPT2Block", "llama": "LlamaDecoderLayer"}[kind]
    assert result["classes"] == (f"FSDPBigmodel{original}", f"FSDP{original}")
    assert result["patched"] > 0 and result["still trains"]


def test_tensor_parallel_bert(results: dict[str, Any]) -> None:
    result = result_of(results, "tensor parallel bert")
    assert_trained_alike(result)
    assert set(result["shapes"]) == {(4, 2, 9, 12)}  # two of the four heads here
    # Both orders are reported: patched first, and tensor parallel first.
    assert all(
        "its own code runs where this needs it: query: it has a forward" in why for why in result["now"]
    )
    assert any("query: it has a forward pre-hook" in why for why in result["before"])


def test_attention_on_shards_of_the_batch_and_of_the_heads(results: dict[str, Any]) -> None:
    result = result_of(results, "attention shards")
    assert len(result) == 4
    for name, found in result.items():
        assert f"dim={0 if name.startswith('batch') else 1}" in found["placed"].replace("Shard(", "dim="), (
            name
        )
        assert max(found["errors"]) < 1e-12, (name, found)


@pytest.mark.slow
def test_accelerate(tmp_path: Path) -> None:
    """A script that knows nothing of how many processes there are."""
    pytest.importorskip("accelerate")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import torch, workers
            from accelerate import Accelerator
            import bigmodel_kernels as bk

            accelerator = Accelerator(cpu=True)
            model = workers.model("bert")
            bk.patch(model)
            network, steps = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
            for seed in range(2):
                loss = network(**workers.half(workers.batch("bert", seed))).loss
                accelerator.backward(loss)
                steps.step()
                steps.zero_grad()
            losses = accelerator.gather(loss.detach()[None])
            if accelerator.is_main_process:
                print("processes", accelerator.num_processes, "losses", losses.tolist())
            """
        )
    )
    # accelerate's own launcher needs MPI to start several processes on CPUs.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes 2 losses" in done.stdout
