"""What the commands share: `--json` and `--device`, where tables and results go, a bar, being stopped, errors
of usage.
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from typer.core import TyperCommand

from bigmodel_kernels import files
from bigmodel_kernels.doctor import DTYPES, no_gpu
from bigmodel_kernels.extras import MissingPackage

STDOUT = "-"


class JsonCommand(TyperCommand):
    """A command whose `--json` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_json_value(args))


def with_json_value(args: list[str]) -> list[str]:
    """`--json` followed by something that is no .json file gets the value "-", the standard output."""
    completed: list[str] = []
    for i, argument in enumerate(args):
        completed.append(argument)
        following = args[i + 1] if i + 1 < len(args) else ""
        if argument == "--json" and following != STDOUT and not following.endswith(".json"):
            completed.append(STDOUT)
    return completed


Json = Annotated[
    str | None,
    typer.Option("--json", metavar="[FILE.json]", help="Result as JSON: to the file, or instead of tables."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


def console_for(json_to: str | None) -> Console:
    """Tables go to the standard output, but to the standard error where that is taken by JSON."""
    return Console(stderr=json_to == STDOUT)


def emit(value: dict[str, Any], json_to: str | None, console: Console) -> None:
    if json_to is None:
        return
    if json_to == STDOUT:
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
        return
    files.write_json(Path(json_to), value)
    console.print(f"wrote {json_to}", markup=False)


def tell(text: str) -> None:
    """A line of a long command on the standard error, at once, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def check_device(device: str) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"device={device!r} is unknown; allowed are cpu, cuda and cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"device={device!r}: {no_gpu()}")
    return device


def check_dtypes(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in DTYPES:
            raise typer.BadParameter(f"dtype={name!r} is unknown; allowed are {', '.join(DTYPES)}")
    return names or list(DTYPES)


@contextmanager
def progress(console: Console, total: int | None, title: str) -> Iterator[Callable[[str], None]]:
    """A bar (a spinner without a total); the function moves it on and says what comes next."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        *([] if total is None else [MofNCompleteColumn()]),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=total)

        def step(text: str) -> None:
            bar.update(task, advance=1, description=text)

        yield step


@contextmanager
def stopping() -> Iterator[Callable[[], None]]:
    """Within it the polite kill (SIGTERM) is a KeyboardInterrupt, as Ctrl-C (SIGINT) is: for commands that
    keep what they have by then.

    The function, called between two steps, raises an interrupt again that was lost: in a destructor Python
    only prints it, and the end of a CUDA graph's capture puts an error of its own in its place. A SIGINT that
    the shell has set to be ignored, as for jobs in the background, stays ignored. Python gives signals to the
    main thread alone: elsewhere nothing is caught.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ask)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def errors_of_usage(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds, and a missing package, end the command with their message and exit code 2."""
    try:
        yield
    except MissingPackage as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except kinds as error:
        raise typer.BadParameter(str(error)) from error


def with_options(
    app: typer.Typer,
    command: Callable[..., None],
    parameters: list[inspect.Parameter],
    name: str,
    cls: type[TyperCommand] | None = None,
) -> None:
    """Registers `command(**options)` with its own parameters and these."""
    own = [
        p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD
    ]

    def runs(**values: Any) -> None:
        command(**values)

    runs.__doc__ = command.__doc__
    runs.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    runs.__annotations__ = {p.name: p.annotation for p in (*own, *parameters)}
    app.command(name=name, cls=cls)(runs)
