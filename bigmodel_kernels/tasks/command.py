"""The commands `bigmodel-kernels classify`, `embed`, `qa`, `fill-mask`, `generate`, `complete`, `translate`
and `summarise`. The options of a task are the fields of its dataclass; the others are here.
"""

import inspect
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bigmodel_kernels.console import (
    DTYPES,
    STDOUT,
    Device,
    Json,
    JsonCommand,
    check_device,
    console_for,
    emit,
    errors_of_usage,
    progress,
    with_options,
)
from bigmodel_kernels.tasks import TASKS
from bigmodel_kernels.tasks.base import Outcome, Task, run
from bigmodel_kernels.tasks.generation import Causal
from bigmodel_kernels.tasks.inputs import gather

app = typer.Typer()


def options(kind: type[Task]) -> list[inspect.Parameter]:
    """Parameters for typer: the texts, and the fields of the task."""
    text = typer.Argument(
        metavar=f"[{kind.argument}]...", help="Default: from --file, or the standard input."
    )
    hints = get_type_hints(kind, include_extras=True)
    # `Task` and its dataclasses are not one type to mypy.
    own = [(field.name, hints[field.name], field.default) for field in fields(kind) if field.init]  # type: ignore[arg-type]
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in (("texts", Annotated[list[str] | None, text], None), *own)
    ]


def _register(kind: type[Task]) -> None:
    model_help = "Name or folder of a model of transformers"
    default = "; default: all-MiniLM-L6-v2." if kind.default_model is not Task.default_model else " (needed)."
    lines = "a file is one text" if kind.whole else "one text a line"

    def command(
        *,
        model: Annotated[str | None, typer.Option(help=model_help + default)] = None,
        file: Annotated[
            Path | None, typer.Option(metavar="FILE", help=f"UTF-8, {lines}; - is the standard input.")
        ] = None,
        whole: Annotated[
            bool, typer.Option("--whole/--lines", help="Whether a file is one text, or has one a line.")
        ] = kind.whole,
        batch_size: Annotated[
            int | None, typer.Option(help=f"Texts at once; default: {kind.batch_size}.")
        ] = None,
        device: Device = "cpu",
        dtype: Annotated[
            str, typer.Option(help=f"auto (the checkpoint's own), {', '.join(DTYPES)}.")
        ] = "auto",
        compare: Annotated[
            bool, typer.Option("--compare", help="Also eager: agreement of the results, time and memory.")
        ] = False,
        budget: Annotated[float, typer.Option(help="With --compare: seconds for the repeats.")] = 10.0,
        json_to: Json = None,
        **values: Any,
    ) -> None:
        check_device(device)
        with errors_of_usage(ValueError, OSError):
            texts = gather(values.pop("texts") or [], file, whole=whole, called=kind.argument)
            task = kind(**values)
            outcome = execute(
                task,
                texts,
                json_to,
                model=model,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                compare=compare,
                budget_s=budget,
            )
            saved = task.save(outcome.results)
        show(task, outcome, json_to)
        if saved is not None:
            Console(stderr=True).print(f"wrote {saved}", markup=False, soft_wrap=True)
        emit(outcome.to_dict(), json_to, console_for(json_to))

    command.__doc__ = kind.__doc__
    with_options(app, command, options(kind), kind.name, cls=JsonCommand)


def execute(task: Task, texts: list[str], json_to: str | None, **how: Any) -> Outcome:
    """`run` with a bar; a generation that somebody reads shows its tokens as they come."""
    asked_for_all = json_to is not None or how["compare"] or how["batch_size"] is not None
    if isinstance(task, Causal) and task.beams is None and not asked_for_all:
        task.write = write
        return run(task, texts, **{**how, "batch_size": 1})
    batches = math.ceil(len(texts) / (how["batch_size"] or task.batch_size))
    with progress(Console(stderr=True), None if how["compare"] else batches, "loading") as step:
        return run(task, texts, say=step, **how)


def write(text: str) -> None:
    """To the standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show(task: Task, outcome: Outcome, json_to: str | None) -> None:
    """Results and comparison on the standard output, the rest on the standard error."""
    notes = Console(stderr=True)
    summary = outcome.patch_report if not outcome.patched_modules else outcome.patch_report.splitlines()[0]
    notes.print(
        summary,
        style=None if outcome.patched_modules else "yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if outcome.cut:
        notes.print(
            f"{outcome.cut} of {outcome.texts} texts are longer than the {task.longest()} tokens that "
            "are read, and were cut",
            style="yellow",
            soft_wrap=True,
        )
    if json_to == STDOUT:
        return
    if getattr(task, "write", None) is None:
        for line in task.lines(outcome.results):
            typer.echo(line)
    if outcome.comparison is not None:
        show_comparison(outcome, Console())


def show_comparison(outcome: Outcome, console: Console) -> None:
    """A row for each way to run the model, and how its results agree with eager's."""
    comparison = outcome.comparison
    assert comparison is not None
    console.print(
        f"{outcome.texts} texts, {outcome.dtype} on {outcome.device}, {outcome.threads} threads: median of "
        f"{comparison['rounds']} rounds in turn, tokenizing and decoding included",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("", "time", f"{comparison['unit']}/s", "speed-up", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in comparison["rows"].items():
        table.add_row(
            name,
            f"{row['seconds']['median_s']:.3f} s",
            f"{row['per_second']:.1f}",
            f"{row['speedup_to_eager']:.2f}",
            "not measured" if row["peak_bytes"] is None else _mebibytes(row["peak_bytes"]),
        )
    console.print(table)
    for name, row in comparison["rows"].items():
        if row["agreement"]:
            console.print(f"{name} and eager: {row['agreement']['text']}", highlight=False, soft_wrap=True)
    what = "resident memory of the process" if outcome.device == "cpu" else "torch's allocator"
    console.print(
        f"Peak memory is that of the largest batch beyond what was held before ({what}). Patched also holds "
        f"{_mebibytes(comparison['packed_weights_bytes'])} of packed weights.",
        highlight=False,
        soft_wrap=True,
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


for _kind in TASKS:
    _register(_kind)
