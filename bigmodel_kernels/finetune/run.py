"""A training run in its folder: start, resume, stop, evaluate, finish.

    settings.json  metrics.jsonl  checkpoints/  tokenizer/  model/  curve.png  result.json

A step depends on its checkpoint alone: weights, optimizer, learning rate, generators, and its number, which
is also the place in the data. So a run that was killed goes on to the same losses and weights, bit for bit,
as one that was not (on the same machine with as many threads).
"""

from __future__ import annotations

import math
import platform
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from bigmodel_kernels import files
from bigmodel_kernels.finetune import checkpoint, data, models, optimiser, plot
from bigmodel_kernels.finetune.memory import peak_bytes
from bigmodel_kernels.finetune.settings import Settings
from bigmodel_kernels.finetune.tasks import TASKS, Task

Metrics = dict[str, Any]


class Interrupted(RuntimeError):
    """The run was asked to stop; a checkpoint is there."""

    def __init__(self, settings: Settings, step: int) -> None:
        self.step = step
        super().__init__(
            f"stopped after step {step} with a checkpoint; go on with: "
            f"bigmodel-kernels finetune {settings.task} --output {settings.output} --resume"
        )


class Listener:
    """What a run tells while it goes; the base class listens to nothing."""

    def say(self, text: str) -> None:
        """What is being done now."""

    def start(self, step: int, steps: int) -> None:
        """Training starts after `step` of `steps`."""

    def step(self, record: Metrics) -> None:
        """A line of metrics.jsonl: a step of training or an evaluation."""


@dataclass
class Result:
    """What a finished run has to say; also in result.json."""

    settings: Settings
    metrics: Metrics
    losses: list[float]
    facts: Metrics
    sample: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "metrics": self.metrics,
            "facts": self.facts,
            "sample": self.sample,
            "losses": self.losses,
        }


def complete(settings: Settings) -> Settings:
    """Settings with the defaults of their task. Raises ValueError for a task that does not exist."""
    if settings.task not in TASKS:
        raise ValueError(f"task={settings.task!r} is unknown; allowed are {', '.join(TASKS)}")
    defaults = TASKS[settings.task].defaults
    if settings.steps is not None or settings.epochs is not None:  # the other stays open
        defaults = {k: v for k, v in defaults.items() if k not in ("steps", "epochs")}
    return settings.with_defaults(defaults)


def finetune(settings: Settings, *, resume: bool = False, listener: Listener | None = None) -> Result:
    """Trains, evaluates, and leaves everything in `settings.output`.

    With `resume` the run in that folder goes on; `settings` must then be those that it was started with.
    Raises ValueError for wrong settings, data or a folder of another run, MissingPackage for a package of the
    extra `finetune`, Interrupted after Ctrl-C, FloatingPointError where the loss is no number.
    """
    settings = complete(settings)
    check_folder(settings, resume)
    return _Run(settings, listener or Listener()).go()


def check_folder(settings: Settings, resume: bool) -> None:
    """Makes sure that the folder is free, or of this very run."""
    folder = settings.folder
    if resume:
        saved = Settings.read(folder).to_dict()
        ours = settings.to_dict()
        different = [name for name in ours if ours[name] != saved[name] and name != "output"]
        if different:
            listed = ", ".join(f"{name} (was {saved[name]!r}, is {ours[name]!r})" for name in different)
            raise ValueError(f"output={settings.output!r} holds a run with other settings: {listed}")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "another run" if (folder / "settings.json").is_file() else "other files"
        raise ValueError(
            f"output={settings.output!r} holds {what}, and nothing is overwritten: "
            "take another folder, or continue the run with --resume"
        )


class _Run:
    def __init__(self, settings: Settings, listener: Listener) -> None:
        self.settings, self.listener, self.folder = settings, listener, settings.folder
        self.task: Task = TASKS[settings.task](settings)
        self.log: list[Metrics] = []

    def go(self) -> Result:
        settings, say = self.settings, self.listener.say
        self.task.check()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        say("reading the data")
        records = self.task.records()
        keys = [self.task.key(record) for record in records]
        chosen, held_out = data.split(records, keys, settings.seed, settings.held_out, settings.max_examples)
        say("preparing tokens")
        self.task.prepare(chosen, self.folder / "tokenizer")
        self.examples = self.task.encode(chosen)
        self.held_out = self.task.encode(held_out)[: settings.evaluate_examples]
        if not self.examples or not self.held_out:
            raise ValueError("no example is left after tokenizing; give more data or another max_length")
        self.task.shown = self.held_out[:3]
        self.fingerprint = data.fingerprint([self.task.key(r) for r in (*chosen, *held_out)])
        self.order = data.Order(len(self.examples), settings.seed)
        self.per_step = settings.batch_size * settings.accumulate
        self.steps = settings.steps or math.ceil((settings.epochs or 1) * len(self.examples) / self.per_step)

        say("making the model")
        torch.manual_seed(settings.seed)
        self.model = self.task.build().to(settings.device)
        self.report = models.patch(self.model, settings)
        self.optimiser, self.schedule = optimiser.make(self.model, settings, self.steps)
        # Only now, when everything that could be wrong has been looked at, is there something in the folder.
        files.write_json(self.folder / "settings.json", settings.to_dict())
        models.save_tokenizer(self.task.tokenizer, self.folder / "tokenizer")
        torch.manual_seed(settings.seed + 1)
        step = self._restore()
        self.listener.start(step, self.steps)
        started = time.perf_counter()
        with _stop_requests() as stopped:
            self._train(step, stopped)
        say("evaluating")
        self.model.eval()
        with torch.no_grad():
            sample = self.task.sample(self.model)
        result = Result(
            settings,
            next(r for r in reversed(self.log) if r["kind"] == "evaluation"),
            [r["loss"] for r in self.log if r["kind"] == "step"],
            self._facts(len(chosen), len(held_out), time.perf_counter() - started),
            sample,
        )
        self._finish(result)
        return result

    # ---- training

    def _train(self, done: int, stopped: Callable[[], bool]) -> None:
        settings = self.settings
        evaluate_every = settings.evaluate_every or max(1, self.steps // 5)
        checkpoint_every = settings.checkpoint_every or max(1, self.steps // 10)
        self.model.train()
        for step in range(done + 1, self.steps + 1):
            self._note(self._step(step))
            last = step == self.steps
            if last or step % evaluate_every == 0:
                self._note({"kind": "evaluation", "step": step, **self.evaluate()})
            if last or step % checkpoint_every == 0 or stopped():
                self._save(step)
            if stopped() and not last:
                raise Interrupted(settings, step)

    def _step(self, step: int) -> Metrics:
        """One step of the optimizer. The loss is the mean over all labelled items of its micro-batches, as of
        one large batch."""
        settings, started = self.settings, time.perf_counter()
        chosen = self.order.take((step - 1) * self.per_step, self.per_step)
        size = settings.batch_size
        micro = [
            self.task.collate(
                [self.examples[i] for i in chosen[k : k + size]], settings.seed + step * 4096 + k
            )
            for k in range(0, self.per_step, size)
        ]
        items = [self.task.labelled(batch) for batch in micro]
        total = 0.0
        for batch, number in zip(micro, items, strict=True):
            with self._autocast():
                out = self.model(**{name: t.to(settings.device) for name, t in batch.items()})
            share = out.loss * (number / sum(items))
            share.backward()
            total += share.item()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss of step {step} is {total}; try a smaller lr (it is {settings.lr}), more warmup "
                "or a smaller clip"
            )
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip or math.inf)
        rate = self.schedule.get_last_lr()[0]
        self.optimiser.step()
        self.schedule.step()
        self.optimiser.zero_grad(set_to_none=True)
        return {
            "kind": "step",
            "step": step,
            "loss": total,
            "lr": rate,
            "gradient_norm": float(norm),
            "tokens": sum(self.task.tokens(batch) for batch in micro),
            "seconds": time.perf_counter() - started,
        }

    def evaluate(self) -> Metrics:
        self.listener.say("evaluating")
        self.model.eval()
        with torch.no_grad(), self._autocast():
            scores = self.task.evaluate(self.model, self.held_out)
        self.model.train()
        return scores

    def _autocast(self) -> Any:
        if not self.settings.autocast:
            return nullcontext()
        return torch.autocast(torch.device(self.settings.device).type, torch.bfloat16)

    # ---- what is kept

    def _note(self, record: Metrics) -> None:
        """Appends a line, and tells it."""
        self.log.append(record)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(files.line(record))
        self.listener.step(record)

    def _save(self, step: int) -> None:
        self.listener.say("writing a checkpoint")
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": checkpoint.random_state(),
            "data": {"fingerprint": self.fingerprint, "position": step * self.per_step},
        }
        # A checkpoint without the lines before it would leave a gap that no resumed run fills.
        files.sync(self.folder / "metrics.jsonl")
        checkpoint.save(self.folder / "checkpoints", step, state, self.settings.keep)

    def _restore(self) -> int:
        """Takes up the newest checkpoint; the lines of later steps are dropped, for these come again."""
        found = checkpoint.find(self.folder / "checkpoints")
        step = 0
        if found:
            step, path = found[-1]
            self.listener.say(f"reading {path.name}")
            state = checkpoint.load(path)
            if state["data"] != {"fingerprint": self.fingerprint, "position": step * self.per_step}:
                raise ValueError(
                    f"the data are not those that {path} was trained on; the run cannot go on with them"
                )
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            checkpoint.set_random_state(state["random"])
        path = self.folder / "metrics.jsonl"
        self.log = [record for record in files.read_lines(path) if record["step"] <= step]
        files.write_lines(path, self.log)
        return step

    def _facts(self, training: int, held_out: int, seconds: float) -> Metrics:
        steps = [r for r in self.log if r["kind"] == "step"]
        spent = [r["seconds"] for r in steps]
        used = models.count(self.model)
        return {
            "records": {"training": training, "held_out": held_out},
            "examples": {"training": len(self.examples), "held_out": len(self.held_out)},
            "parameters": used,
            "steps": self.steps,
            "median_step_s": statistics.median(spent),
            "tokens_per_second": sum(r["tokens"] for r in steps) / sum(spent),
            "peak_memory_bytes": peak_bytes(self.settings.device),
            "seconds_since_start_or_resume": seconds,
            "threads": torch.get_num_threads(),
            "patch_report": str(self.report).splitlines()[0] if self.report is not None else None,
            "patched_modules": len(self.report.patched) if self.report is not None else 0,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def _finish(self, result: Result) -> None:
        self.listener.say("saving the model")
        models.save(self.model, self.folder / "model")
        self.task.tokenizer.save_pretrained(self.folder / "model")
        plot.curve(self.log, self.task.main_metric, self.folder / "curve.png", self.settings.task)
        files.write_json(self.folder / "result.json", result.to_dict())


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and the polite kill ask to stop after the step; a second one stops at once.

    Python gives signals to the main thread alone: elsewhere nothing is caught.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
