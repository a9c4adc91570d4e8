"""The command `bigmodel-kernels finetune`: a subcommand for each task, and `compare`.

The options of a task are the fields of `Settings`, each with its help; nothing is written twice.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bigmodel_kernels.console import with_options
from bigmodel_kernels.extras import MissingPackage
from bigmodel_kernels.finetune.run import Interrupted, Listener, complete, finetune
from bigmodel_kernels.finetune.settings import IMPLEMENTATIONS, Settings

app = typer.Typer(
    name="finetune",
    help="Train a model of transformers on real data: eager, sdpa or patched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

#: Options that are spelled in another way than the field.
_SPELLINGS = {"columns": ("--column",)}


def options(defaults: dict[str, Any], leave_out: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Parameters for typer, of the settings. None stands for an option that was not given."""
    hints = get_type_hints(Settings)
    found = []
    for field in fields(Settings):
        if field.name in ("task", "implementation", *leave_out):
            continue
        default = defaults.get(field.name, field.default)
        shown = "" if default in (None, (), "", MISSING) else f" [default: {default}]"
        kind = list[str] if field.name == "columns" else hints[field.name]
        spelling = _SPELLINGS.get(field.name, ())
        if kind is bool:
            spelling = (f"--{field.name.replace('_', '-')}",)
        option = typer.Option(*spelling, help=field.metadata["help"] + shown, show_default=False)
        annotation = Annotated[kind | None if kind is not bool else bool, option]  # type: ignore[valid-type]
        found.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if kind is bool else None,
                annotation=annotation,
            )
        )
    return found


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; a flag that was not is False."""
    # 0 is a value that was given, and equals False.
    chosen = {k: v for k, v in values.items() if v is not None and v is not False and v != []}
    if "columns" in chosen:
        chosen["columns"] = tuple(chosen["columns"])
    return chosen


Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Result as JSON on the standard output.")]
Patched = Annotated[bool, typer.Option("--patched", help="With our kernels (the default).")]
Eager = Annotated[bool, typer.Option("--eager", help="As transformers' eager.")]
Sdpa = Annotated[bool, typer.Option("--sdpa", help="As transformers' sdpa.")]


def _register(task: type[Any]) -> None:
    def command(
        *,
        resume: Resume = False,
        patched: Patched = False,
        eager: Eager = False,
        sdpa: Sdpa = False,
        as_json: AsJson = False,
        **values: Any,
    ) -> None:
        chosen = given(values)
        flags = dict(zip(IMPLEMENTATIONS, (patched, eager, sdpa), strict=True))
        named = [name for name, flag in flags.items() if flag]
        if len(named) > 1:
            raise typer.BadParameter(f"--{' and --'.join(named)} exclude each other")
        if named:
            chosen["implementation"] = named[0]
        train(task.name, chosen, resume=resume, as_json=as_json)

    command.__doc__ = task.summary
    with_options(app, command, options(task.defaults), task.name)


def _settings(task: str, chosen: dict[str, Any], resume: bool) -> Settings:
    """The settings asked for; when resuming, those of the run, which options may only repeat."""
    if not chosen.get("output"):
        raise typer.BadParameter("--output is needed: the folder of the run")
    if not resume:
        return complete(Settings(task=task, **chosen))
    saved = Settings.read(Path(chosen["output"])).to_dict()
    return Settings.from_dict({**saved, **chosen, "task": task})


def train(task: str, chosen: dict[str, Any], *, resume: bool, as_json: bool) -> None:
    """Runs a task with a progress bar, and shows how it ended."""
    console = Console(stderr=as_json)
    _quiet()
    try:
        settings = _settings(task, chosen, resume)
        with Bar(console) as bar:
            result = finetune(settings, resume=resume, listener=bar)
    except Interrupted as stop:
        console.print(str(stop), style="yellow", markup=False, soft_wrap=True)
        raise typer.Exit(130) from stop
    except MissingPackage as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except (ValueError, FloatingPointError) as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=1, ensure_ascii=False))
    else:
        show(result, console)


def _quiet() -> None:
    """No bars of transformers and datasets within ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


class Bar(Listener):
    """A progress bar with loss, learning rate and tokens per second; a `Listener`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.bar = self.progress.add_task("starting", total=None, state="")
        self.speed: float | None = None

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.progress.update(self.bar, description=text)

    def start(self, step: int, steps: int) -> None:
        if step:
            self.console.print(f"goes on after step {step}", highlight=False)
        self.progress.update(self.bar, description="training", completed=step, total=steps)

    def step(self, record: dict[str, Any]) -> None:
        if record["kind"] == "evaluation":
            scores = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))
            self.console.print(f"step {record['step']}: {scores}", highlight=False)
            return
        now = record["tokens"] / record["seconds"]
        self.speed = now if self.speed is None else 0.9 * self.speed + 0.1 * now
        state = f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {self.speed:,.0f} tokens/s"
        self.progress.update(self.bar, description="training", completed=record["step"], state=state)


def show(result: Any, console: Console) -> None:
    """Scores, what it took, where it lies."""
    facts, settings = result.facts, result.settings
    table = Table(
        title=f"{settings.task}, {settings.implementation}", title_justify="left", show_header=False
    )
    for name, value in result.metrics.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.4f}")
    table.add_row("time per step", f"{1000 * facts['median_step_s']:.0f} ms (median of {facts['steps']})")
    table.add_row("tokens per second", f"{facts['tokens_per_second']:,.0f}")
    if facts["peak_memory_bytes"]:
        table.add_row("peak memory", f"{facts['peak_memory_bytes'] / 2**20:,.0f} MiB")
    table.add_row("trained weights", f"{facts['parameters']['trained']:,} of {facts['parameters']['all']:,}")
    console.print(table)
    if classes := result.metrics.get("classes"):
        each = Table("class", "precision", "recall", "F1", "texts", title="Each class", title_justify="left")
        for name, scores in classes.items():
            numbers = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")]
            each.add_row(name, *numbers, str(scores["support"]))
        console.print(each)
    if facts["patch_report"]:
        style = None if facts["patched_modules"] else "yellow"  # a model that patch does not know
        console.print(facts["patch_report"], markup=False, highlight=False, style=style)
    if result.sample:
        console.print(result.sample, markup=False, highlight=False)
    console.print(
        f"{settings.output}: model/, curve.png, metrics.jsonl, result.json", markup=False, soft_wrap=True
    )


def compare(
    task: Annotated[str, typer.Argument(help="The task, such as classification.")],
    *,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    resume: Resume = False,
    as_json: AsJson = False,
    **values: Any,
) -> None:
    """Train eager and patched alike: distance of the losses, scores over seeds, time and memory."""
    from bigmodel_kernels.finetune.compare import compare as run

    console = Console(stderr=as_json)
    _quiet()
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
        chosen = given(values)
        if not chosen.get("output"):
            raise typer.BadParameter("--output is needed: the folder of the comparison")
        bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console)
        with bar:
            row = bar.add_task("starting", total=None)
            found = run(
                Settings(task=task, **chosen),
                numbers,
                resume=resume,
                say=lambda name, step, steps: bar.update(
                    row, description=name, completed=step, total=steps or None
                ),
            )
    except MissingPackage as error:
        Console(stderr=True).print(str(error), style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        console.print("stopped; the same command with --resume goes on", style="yellow")
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show_comparison(found, console, chosen["output"])


def show_comparison(found: dict[str, Any], console: Console, output: str) -> None:
    """The comparison as a table, and the sentence that its numbers give."""
    table = Table(
        "", "eager", "patched", title=f"{found['task']}, {found['steps']} steps", title_justify="left"
    )
    eager, patched = found["runs"]["eager"], found["runs"]["patched"]
    for label, show_one in (
        (
            f"{found['metric']}, seeds {', '.join(map(str, found['seeds']))}: mean (least to most)",
            lambda r: f"{r['score']['mean']:.4f} ({r['score']['least']:.4f} to {r['score']['most']:.4f})",
        ),
        ("time per step", lambda r: f"{1000 * r['step_s']:.0f} ms"),
        ("tokens per second", lambda r: f"{r['tokens_per_second']:,.0f}"),
        (
            "peak memory",
            lambda r: (
                f"{r['peak_memory_bytes'] / 2**20:,.0f} MiB" if r["peak_memory_bytes"] else "not measured"
            ),
        ),
    ):
        table.add_row(label, show_one(eager), show_one(patched))  # type: ignore[no-untyped-call]
    console.print(table)
    apart = Table("loss curves", "largest", "mean", "last", title="Distance", title_justify="left")
    yardstick = found["yardstick"]
    for label, of in (
        ("patched and eager", found["distance"]),
        (f"yardstick: {yardstick['kind']} and eager", yardstick["distance"]),
    ):
        for seed, numbers in of.items():
            apart.add_row(f"{label}, seed {seed}", *(f"{numbers[k]:.1e}" for k in ("max", "mean", "last")))
    console.print(apart)
    for agree, what, measure in (
        (found["losses_agree"], "loss curves", "the yardstick's furthest"),
        (found["scores_agree"], f"mean {found['metric']}", "eager's seeds among themselves"),
    ):
        console.print(
            f"{what}: patched and eager are {'no ' if agree else ''}further apart than {measure}",
            style="green" if agree else "bold yellow",
            markup=False,
        )
    if found["patch_report"]:
        console.print(found["patch_report"], markup=False, highlight=False)
    console.print(
        f"A patched step takes {1 / found['speedup']:.2f} of the time of an eager one.",
        style="bold",
        markup=False,
    )
    console.print(f"{output}: compare.json, compare.png, a folder for each run", markup=False, soft_wrap=True)


def register_tasks() -> None:
    """Adds a subcommand for each task."""
    from bigmodel_kernels.finetune.tasks import TASKS

    for task in TASKS.values():
        _register(task)
    with_options(app, compare, options({}, leave_out=("seed", "dropout")), "compare")


register_tasks()
