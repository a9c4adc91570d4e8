"""What every task has, and `run`: load, patch, batches by length, results in the order of the texts."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import bigmodel_kernels as bk

#: The result for one text, in the types of JSON.
Record = dict[str, Any]
#: (answer, score), the best first.
Ranking = list[tuple[Any, float]]
Runner = Callable[[list[str]], list[Record]]
Say = Callable[[str], None]


class Task(ABC):
    """A task with its options. `check` comes first, then `check_config`, then `prepare`, then `runner`."""

    #: The name of the command.
    name: ClassVar[str]
    #: The class of transformers that loads a model with the head that the task needs, and that head in words.
    auto_class: ClassVar[str]
    head: ClassVar[str]
    #: Weights that a checkpoint may lack, for the task does without them.
    spare_weights: ClassVar[re.Pattern[str] | None] = None
    #: What a text is called on the command line.
    argument: ClassVar[str] = "TEXT"
    #: Whether a file or the standard input is one text, and not one a line.
    whole: ClassVar[bool] = False
    batch_size: ClassVar[int] = 16
    #: Of what `units` is the number.
    unit: ClassVar[str] = "texts"

    tokenizer: Any

    def default_model(self) -> str | None:
        """The folder of the model to take where none is named; None where one must be named."""
        return None

    def check(self) -> None:  # noqa: B027 - most tasks have nothing to check
        """Raises ValueError for an option that cannot be."""

    def check_config(self, config: Any) -> None:  # noqa: B027
        """Raises ValueError for a model that has the head, but is not made for the task."""

    def prepare(self, model: Any, tokenizer: Any, source: str) -> None:
        """Takes the tokenizer; raises ValueError for what model or tokenizer lack. Not patched yet."""
        self.tokenizer = tokenizer

    def check_texts(self, texts: Sequence[str]) -> None:  # noqa: B027
        """Raises ValueError for a text that the task cannot take."""

    @abstractmethod
    def runner(self, model: Any) -> Runner:
        """Results of a batch of texts by this model."""

    @abstractmethod
    def agreement(self, expected: Sequence[Record], found: Sequence[Record]) -> dict[str, Any]:
        """How far the results agree: numbers, and `text` which says them in words."""

    @abstractmethod
    def lines(self, results: Sequence[Record]) -> Iterator[str]:
        """The results to read."""

    def units(self, results: Sequence[Record]) -> int:
        """What the speed counts."""
        return len(results)

    def save(self, results: Sequence[Record]) -> Path | None:
        """Writes a file where an option asks for it, and says which."""
        return None

    def longest(self) -> int | None:
        """How many tokens of a text are used; None where there is no limit."""
        limit = self.tokenizer.model_max_length
        return limit if limit < 10**9 else None  # transformers' mark for none is 1e30

    def cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than that, and are cut."""
        limit = self.longest()
        if limit is None:
            return 0
        return sum(len(ids) > limit for ids in self.tokenizer(list(texts))["input_ids"])


def require_positive(task: Any, *names: str) -> None:
    """Raises ValueError for an option that is not above 0; None is an option that was not given."""
    for name in names:
        value = getattr(task, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}; it must be positive")


def same(expected: Sequence[Any], found: Sequence[Any]) -> int:
    """At how many places the two are equal."""
    return sum(a == b for a, b in zip(expected, found, strict=True))


class Ranked(Task):
    """A task with answers that have scores, the best first."""

    #: What the answers are called.
    answers_are: ClassVar[str]

    @abstractmethod
    def ranked(self, results: Sequence[Record]) -> list[Ranking]:
        """Answers and scores for each question that the texts ask."""

    def agreement(self, expected: Sequence[Record], found: Sequence[Record]) -> dict[str, Any]:
        """Of the best answers; and of the scores, where both have an answer."""
        pairs = list(zip(self.ranked(expected), self.ranked(found), strict=True))
        number = sum([answer for answer, _ in a[:1]] == [answer for answer, _ in b[:1]] for a, b in pairs)
        apart = max(
            (abs(score - dict(b)[answer]) for a, b in pairs for answer, score in a if answer in dict(b)),
            default=0.0,
        )
        return {
            "same": number,
            "of": len(pairs),
            "largest_difference_of_a_score": apart,
            "text": f"{number} of {len(pairs)} {self.answers_are} are the same, "
            f"scores differ by {apart:.1e} at most",
        }


@dataclass
class Outcome:
    """Results in the order of the texts, and how they came about. `comparison` is that of `compare`."""

    task: str
    model: str
    model_class: str
    device: str
    dtype: str
    threads: int
    texts: int
    cut: int
    seconds: float
    patch_report: str
    patched_modules: int
    left_alone: dict[str, str]
    results: list[Record]
    comparison: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    task: Task,
    texts: Sequence[str],
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int | None = None,
    compare: bool = False,
    budget_s: float = 10.0,
    say: Say = lambda text: None,
) -> Outcome:
    """Runs a task on texts with a patched model.

    model: a name or folder for transformers. dtype: auto (that of the checkpoint), float32, bfloat16 or
    float16. With `compare` the same texts also go through the model as transformers has it, for about
    `budget_s` seconds, three times at least. `say` is told of every batch.

    Raises ValueError for an option, model or text that cannot be, and MissingPackage without transformers.
    """
    from bigmodel_kernels.tasks import compare as comparing
    from bigmodel_kernels.tasks import models

    task.check()
    source = model if model is not None else task.default_model()
    if source is None:
        raise ValueError(
            f"--model is needed: the name or folder of a model of transformers with {task.head}; "
            "no pretrained one comes along with this package"
        )
    if not texts:
        raise ValueError("texts is empty; there must be one at least")
    size = task.batch_size if batch_size is None else batch_size
    if size <= 0:
        raise ValueError(f"batch_size={size}; it must be positive")
    if budget_s <= 0:
        raise ValueError(f"budget={budget_s}; it must be positive")
    loaded, tokenizer = models.load(task, source, device, dtype)
    if tokenizer.pad_token is None and size > 1:
        raise ValueError(
            f"batch_size={size}: the tokenizer of {source!r} has neither a token for padding nor one for the "
            "end of a text to stand for it; allowed is 1"
        )
    task.prepare(loaded, tokenizer, source)
    task.check_texts(texts)
    twins = comparing.twins(loaded) if compare else {}
    report = bk.patch(loaded)

    order = list(range(len(texts)))
    if size > 1:
        # The longest first: batches of like lengths need little padding, and the largest is met at once.
        order.sort(key=lambda i: -len(texts[i]))
    batches = [[texts[i] for i in order[k : k + size]] for k in range(0, len(order), size)]
    comparison = None
    with torch.inference_mode():
        begin = time.perf_counter()
        if compare:
            comparison, found = comparing.compare(
                task, {**twins, comparing.PATCHED: loaded}, batches, device, budget_s, say
            )
        else:
            runner = task.runner(loaded)
            found = []
            for i, batch in enumerate(batches):
                found += runner(batch)
                say(f"batch {i + 1} of {len(batches)}")
        seconds = time.perf_counter() - begin
    results: list[Record] = [{} for _ in texts]
    for i, record in zip(order, found, strict=True):
        results[i] = record
    return Outcome(
        task=task.name,
        model=source,
        model_class=type(loaded).__name__,
        device=device,
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        texts=len(texts),
        cut=task.cut(texts),
        seconds=seconds,
        patch_report=str(report),
        patched_modules=len(report.patched),
        left_alone={row.name: row.reason for row in report.left_alone},
        results=results,
        comparison=comparison,
    )
