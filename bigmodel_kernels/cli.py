"""The command `bigmodel-kernels`: doctor, verify, models, bench, demo, attention-map, finetune and the tasks.

Every command takes `--json` for its result as JSON on the standard output, or `--json FILE.json` for a file
next to the tables.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigmodel_kernels import backends, files
from bigmodel_kernels.console import (
    STDOUT,
    Device,
    Json,
    JsonCommand,
    check_device,
    check_dtypes,
    console_for,
    emit,
    errors_of_usage,
    progress,
    stopping,
    tell,
)
from bigmodel_kernels.doctor import BROKEN, DTYPES, LIVE, examine
from bigmodel_kernels.extras import package
from bigmodel_kernels.finetune import command as finetune_command
from bigmodel_kernels.tasks import command as tasks_command

app = typer.Typer(
    name="bigmodel-kernels",
    help="Fused kernels for transformers: look at it, verify it, measure it, train, use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(finetune_command.app)
app.add_typer(tasks_command.app)


def main() -> None:
    """Entry point of the command."""
    app()


# doctor


@app.command(cls=JsonCommand)
def doctor(json_to: Json = None) -> None:
    """What is installed, what this machine has, which backend serves each operator, and what to mend.

    Exit code 1 when something that should work here does not.
    """
    console = console_for(json_to)
    found = examine()
    if json_to != STDOUT:
        _show_doctor(found, console)
    emit(found, json_to, console)
    if not found["ok"]:
        raise typer.Exit(1)


def _show_doctor(found: dict[str, Any], console: Console) -> None:
    facts = Table(show_header=False, box=None)
    for name, version in found["versions"].items():
        facts.add_row(name, version or "not installed")
    cpu = found["cpu"]
    facts.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads")
    if cpu["isa"]:
        facts.add_row("instruction sets", f"{cpu['isa']} (available: {', '.join(cpu['isa_available'])})")
    gpu = found["gpu"]
    facts.add_row("GPU", ", ".join(gpu["names"]) or f"none: {gpu['reason']}")
    for name, value in found["environment"].items():
        facts.add_row(name, value)
    console.print(facts)
    styles = {LIVE: "green", BROKEN: "bold red"}
    for check in found["checks"]:
        line = Text(f"{check['status']:<6} ", style=styles.get(check["status"], "yellow"))
        line.append(f"{check['name']}: {check['detail']}", style="default")
        console.print(line)
        if check["fix"]:
            verb = "mend" if check["status"] == BROKEN else "have"
            console.print(f"       to {verb} it: {check['fix']}", markup=False, highlight=False)
    for device, rows in found["backends"].items():
        table = Table(title=f"Backends on {device}", title_justify="left")
        table.add_column("operator")
        for dtype in DTYPES:
            table.add_column(dtype)
        table.add_column("gradient")
        for op in dict.fromkeys(row["op"] for row in rows):
            mine = [row for row in rows if row["op"] == op]
            table.add_row(
                op,
                *(row["backend"] or f"none: {row['error']}" for row in mine),
                mine[0]["gradient"] or "no gradient",
            )
        console.print(table)
        against: dict[str, list[str]] = {}
        for row in rows:
            for name, why in row["reasons"].items():
                if name != row["backend"] and row["op"] not in against.setdefault(f"{name}: {why}", []):
                    against[f"{name}: {why}"].append(row["op"])
        every = len({row["op"] for row in rows})
        for reason, ops in against.items():
            which = "" if len(ops) == every else f" ({', '.join(ops)})"
            console.print(f"  not {reason}{which}", markup=False, highlight=False)


# verify


def _fast(cases: list[Any]) -> list[Any]:
    """Every fourth case of each operator and dtype."""
    seen: dict[tuple[str, torch.dtype], int] = {}
    chosen = []
    for case in cases:
        key = (case.op, case.dtype)
        if seen.setdefault(key, 0) % 4 == 0:
            chosen.append(case)
        seen[key] += 1
    return chosen


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit else (0.0 if error == 0 else float("inf"))


def _summary(result: Any) -> dict[str, Any]:
    """A result in the types of JSON: the worst of its verdicts, as parts of what is allowed, and errors."""
    from bigmodel_kernels import numerics
    from bigmodel_kernels import verify as verification

    assert isinstance(result, verification.Result)
    verdicts = result.verdicts.values()
    return {
        "op": result.case.op,
        "feature": result.case.label,
        "dtype": str(result.case.dtype).removeprefix("torch."),
        "backend": result.backend,
        "ok": result.ok,
        "max_ratio": max((_ratio(v.max_error, v.max_limit) for v in verdicts), default=None),
        "mean_ratio": max((_ratio(v.mean_error, v.mean_limit) for v in verdicts), default=None),
        "errors": numerics.errors(result.verdicts),
        "seconds": result.seconds,
        "skipped": result.skipped,
        "message": None if result.ok and not result.skipped else str(result),
    }


@app.command(cls=JsonCommand)
def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator (may be repeated).")] = None,
    backend: Annotated[
        str | None, typer.Option(help="native, triton or reference; default: the table's.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype (may be repeated).")] = None,
    device: Device = "cpu",
    fast: Annotated[bool, typer.Option("--fast", help="Every fourth case.")] = False,
    detail: Annotated[bool, typer.Option("--detail", help="A line for each feature.")] = False,
    document: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE.md", help="Put the errors between the markers of a document."),
    ] = None,
    json_to: Json = None,
) -> None:
    """Holds every operator against float64, forward and backward. Exit code 1 when one is wrong."""
    from bigmodel_kernels import numerics
    from bigmodel_kernels import verify as verification

    console = console_for(json_to)
    check_device(device)
    if document is not None:
        if op or dtype or fast:
            raise typer.BadParameter(
                f"write={str(document)!r} with op, dtype or fast: the table has every operator and dtype"
            )
        try:
            numerics.check_document(document)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"write={str(document)!r}: {error}") from error
    dtypes = [getattr(torch, name) for name in check_dtypes(dtype)]
    if backend is not None and backend not in backends.NAMES:
        raise typer.BadParameter(f"backend={backend!r} is unknown; allowed are {', '.join(backends.NAMES)}")
    try:
        names: list[str | None] = [*op] if op else [None]
        cases = [case for name in names for case in verification.cases(name, dtypes)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if fast:
        cases = _fast(cases)
    results: list[dict[str, Any]] = []

    def found(ok: bool, interrupted: bool) -> dict[str, Any]:
        return {
            "ok": ok, "interrupted": interrupted, "device": device, "backend": backend, "results": results,
        }  # fmt: skip

    interrupted = False
    try:
        with progress(console, len(cases), "verifying") as step, stopping() as check:
            for (name, kind), group in itertools.groupby(cases, key=lambda case: (case.op, case.dtype)):
                before = len(results)
                for case in group:
                    check()
                    results.append(_summary(verification.run_case(case, backend, device)))
                    step(str(case))
                if not console.is_terminal:
                    done = results[before:]
                    wrong, seconds = sum(not r["ok"] for r in done), sum(r["seconds"] for r in done)
                    dtype_name = str(kind).removeprefix("torch.")
                    tell(f"{name} {dtype_name}: {len(done)} cases, {wrong} wrong, {seconds:.1f} s")
                if json_to not in (None, STDOUT):  # what is left if the process is killed
                    files.write_json(Path(str(json_to)), found(False, interrupted=True))
    except KeyboardInterrupt:
        interrupted = True
        tell(f"interrupted after {len(results)} of {len(cases)} cases")
    failed = [result for result in results if not result["ok"]]
    skipped = [result for result in results if result["skipped"]]
    ok = not interrupted and not failed and len(skipped) < len(results)
    if json_to != STDOUT:
        console.print(_verify_table(results, detail))
        for result in failed:
            console.print(result["message"], style="red", markup=False)
        for reason in dict.fromkeys(result["skipped"] for result in skipped):
            console.print(f"skipped: {reason}", style="yellow", markup=False)
        verdict = f"{len(results) - len(failed) - len(skipped)} of {len(results)} cases are right"
        verdict += f", {len(failed)} are wrong" if failed else ""
        verdict += f", {len(skipped)} cannot run on this backend" if skipped else ""
        console.print(verdict, style="green" if ok else "bold red")
    if document is not None and ok:
        numerics.write(document, results, device)
        console.print(f"wrote {document}", markup=False)
    emit(found(ok, interrupted), json_to, console)
    if not ok:
        raise typer.Exit(1)


def _verify_table(results: list[dict[str, Any]], detail: bool) -> Table:
    """Worst errors as parts of the limit, for each operator and dtype, or for each feature too."""
    table = Table(title="Worst error, as a part of what is allowed (1.00 is the limit)", title_justify="left")
    for column in ("operator", "dtype", "feature" if detail else "cases", "backend", "largest", "mean"):
        table.add_column(column, justify="right" if column in ("cases", "largest", "mean") else "left")
    table.add_column("" if detail else "worst feature")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["op"], result["dtype"], *([result["feature"]] if detail else []))
        groups.setdefault(key, []).append(result)
    for (op, dtype, *feature), members in groups.items():
        ran = [m for m in members if m["max_ratio"] is not None]
        used = ", ".join(dict.fromkeys(m["backend"] or "none" for m in members))
        wrong = sum(not m["ok"] for m in members)
        worst = max(ran, key=lambda m: max(m["max_ratio"], m["mean_ratio"]), default=None)
        largest = f"{max(m['max_ratio'] for m in ran):.2f}" if ran else "-"
        mean = f"{max(m['mean_ratio'] for m in ran):.2f}" if ran else "-"
        last = (
            ("wrong" if wrong else "")
            if detail
            else ((f"{wrong} wrong; " if wrong else "") + (worst or {}).get("feature", ""))
        )
        style = "red" if wrong else ("yellow" if not ran else None)
        table.add_row(
            op, dtype, feature[0] if detail else str(len(members)), used, largest, mean, last, style=style
        )
    return table


# models


@app.command(cls=JsonCommand)
def models(
    family: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]...", help="Default: all.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Only this check (may be repeated).")] = None,
    json_to: Json = None,
) -> None:
    """Patches a small random model of every family, and compares it with transformers' own, on the CPU.

    Exit code 1 when one fails.
    """
    console = console_for(json_to)
    with errors_of_usage(ValueError):
        logging = package("transformers", "transformers", "transformers").logging
        from bigmodel_kernels.models import show, table

        families, checks = table.chosen(family), table.chosen_checks(check)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with progress(console, len(families) * len(checks), "checking") as step:
        rows = [table.run_family(name, checks, step) for name in families]
    if json_to != STDOUT:
        show.show(rows, console)
    ok = all(row.ok for row in rows)
    emit({"ok": ok, "families": [row.to_dict() for row in rows]}, json_to, console)
    if not ok:
        raise typer.Exit(1)


# support


@app.command()
def support(
    write: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Default: standard output.")] = None,
) -> None:
    """Which backend runs which operator, dtype and feature, and what is patched in each model.

    The text of docs/support.md, the same on any machine.
    """
    from bigmodel_kernels import support as text

    with errors_of_usage():
        found = text.markdown()
    if write is None:
        typer.echo(found, nl=False)
        return
    write.write_text(found, encoding="utf-8")
    console_for(None).print(f"wrote {write}", markup=False)


# bench


@app.command(cls=JsonCommand)
def bench(
    suites: Annotated[list[str] | None, typer.Argument(metavar="[SUITE]...", help="Default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that all works, not how fast.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Also torch.compile as a peer.")] = False,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also ONNX Runtime, OpenVINO and CTranslate2 (CPU).")
    ] = False,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype (may be repeated).")] = None,
    device: Device = "cpu",
    only: Annotated[str, typer.Option(help="Only cases with this in their label.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds for the repeats of one case.")] = 4.0,
    threads: Annotated[int | None, typer.Option(help="Threads of torch and of our kernels.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--suites", help="Folder of suites; default: benchmarks/.")
    ] = None,
    results: Annotated[
        bool,
        typer.Option("--save", help="Write benchmarks/results/<this machine>.json, with --peers -cpu-peers."),
    ] = False,
    show: Annotated[Path | None, typer.Option(help="Show a results file, and measure nothing.")] = None,
    json_to: Json = None,
) -> None:
    """Measures speed against torch and transformers, and against what this machine can do at best."""
    from bigmodel_kernels.bench import document, machine, suite, tables

    console = console_for(json_to)
    if show is not None:
        try:
            tables.show(document.read(show), console)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"show={str(show)!r}: {error}") from error
        return
    check_device(device)
    dtypes = check_dtypes(dtype)
    if peers and torch.device(device).type != "cpu":
        raise typer.BadParameter(f"device={device!r} with --peers: these runtimes are measured on a CPU")
    if budget <= 0:
        raise typer.BadParameter(f"budget={budget}; it must be positive")
    try:
        chosen = [suite.load(name, folder) for name in suites or suite.find(folder)]
        steps = 2 + len(suite.select(chosen, quick, dtypes, only, device))  # and two calibrations
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if threads is not None:
        torch.set_num_threads(threads)

    def results_file(measured: dict[str, Any]) -> Path:
        name = machine.slug(measured["machine"]) + ("-cpu-peers" if peers else "")
        return (folder or suite.default_folder()) / "results" / f"{name}.json"

    def save(measured: dict[str, Any]) -> None:
        if results:
            document.write(measured, results_file(measured))
        if json_to not in (None, STDOUT):
            document.write(measured, Path(str(json_to)))

    doing = "starting"
    with progress(console, steps, "measuring") as step, stopping() as check:

        def say(text: str) -> None:
            nonlocal doing
            check()
            doing = text
            step(text)
            if not console.is_terminal:
                tell(text)

        setting = suite.Setting(device, compiled, peers)
        try:
            measured = suite.run(
                chosen,
                setting,
                quick=quick,
                budget_s=budget,
                dtypes=dtypes,
                only=only,
                progress=say,
                save=save,
            )
        except KeyboardInterrupt:
            tell(f"interrupted in the first case or before it ({doing}): nothing has been measured")
            raise typer.Exit(130) from None
    document.check(measured)
    if json_to != STDOUT:
        tables.show(measured, console)
    if measured["interrupted"]:
        tell(f"interrupted: {len(measured['rows'])} of {steps - 2} cases are measured, not {doing}")
    if results:
        path = results_file(measured)
        document.write(measured, path)
        console.print(f"wrote {path}", markup=False)
    emit(measured, json_to, console)


# demo


@app.command(cls=JsonCommand)
def demo(
    texts: Annotated[int | None, typer.Option(help="How many; default: what fits into the time.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.")] = 16,
    budget: Annotated[float, typer.Option(help="Seconds for the embeddings.")] = 20.0,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the sample of texts.")] = 0,
    generation: Annotated[bool, typer.Option(help="Also generate with a model of GPT-2's size.")] = True,
    json_to: Json = None,
) -> None:
    """Embeds real sentences with a real pretrained BERT: eager, sdpa and patched, side by side."""
    from bigmodel_kernels import demo as job

    console = console_for(json_to)
    check_device(device)
    for name, value in (("texts", texts), ("batch_size", batch_size), ("budget", budget)):
        if value is not None and value <= 0:
            raise typer.BadParameter(f"{name}={value}; it must be positive")
    with errors_of_usage(), progress(console, None, "starting") as step:
        outcome = job.run(
            texts=texts,
            batch_size=batch_size,
            budget_s=budget,
            device=device,
            seed=seed,
            generate=generation,
            progress=step,
        )
    if json_to != STDOUT:
        _show_demo(outcome, console)
    emit(outcome.to_dict(), json_to, console)


def _show_demo(outcome: Any, console: Console) -> None:
    counts = " and ".join(
        f"{number} {kind} (of {outcome.available[kind]:,})" for kind, number in outcome.texts.items()
    )
    random_padding = 1 - outcome.tokens / outcome.padded_tokens
    sorted_padding = 1 - outcome.tokens / outcome.sorted_padded_tokens
    console.print(
        f"all-MiniLM-L6-v2, float32 on {outcome.device}, {outcome.threads} threads: {counts} texts "
        f"of {outcome.tokens:,} tokens in {outcome.batches} padded batches: in random order "
        f"({random_padding:.0%} padding), and sorted by length ({sorted_padding:.0%} padding). "
        "Tokenizing is not timed.",
        highlight=False,
    )
    table = Table(
        title=f"The same batches by each, in turn; median of {outcome.rounds} rounds",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("", "random", "speed-up", "sorted", "speed-up", "max error", "mean error", "cosine"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in outcome.embeddings.items():
        table.add_row(
            "patched" if name == "bigmodel" else name,
            f"{row.seconds:.2f} s",
            f"{row.speedup_to_eager:.2f}",
            f"{outcome.sorted_seconds[name]:.2f} s",
            f"{outcome.sorted_seconds['eager'] / outcome.sorted_seconds[name]:.2f}",
            f"{row.max_error:.1e}",
            f"{row.mean_error:.1e}",
            f"{row.min_cosine_to_eager:.6f}",
        )
    console.print(table)
    rates = ", ".join(
        f"{'patched' if name == 'bigmodel' else name} {row.texts_per_second:.1f}"
        for name, row in outcome.embeddings.items()
    )
    console.print(
        f"Texts per second in random order: {rates}. Speed-ups and the lowest cosine are against "
        f"eager; errors are distances to the same model in float64, over {outcome.reference_texts} texts.",
        highlight=False,
    )
    console.print(outcome.patched, markup=False, highlight=False)
    for uses, number in outcome.replaced.items():
        console.print(f"  {number:>3} x {uses}", markup=False, highlight=False)
    for name, reason in outcome.left_alone.items():
        console.print(f"  left alone: {name}: {reason}", markup=False, highlight=False)
    if outcome.generation is not None:
        line = outcome.generation
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in line.tokens_per_second.items())
        console.print(
            f"GPT-2 size ({line.parameters / 1e6:.0f} million random weights), "
            f"{line.prompt} + {line.new_tokens} tokens, greedy: {rates} tokens/s; "
            f"{'the same tokens' if line.same_tokens else 'DIFFERENT tokens'}.",
            highlight=False,
        )
    console.print(outcome.conclusion[0].upper() + outcome.conclusion[1:], style="bold", markup=False)


# attention-map


def _number_or_all(name: str, value: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal():
        raise typer.BadParameter(f"{name}={value!r} is unknown; allowed are all, 0, 1, ...")
    return int(value)


@app.command("attention-map", cls=JsonCommand)
def attention_map(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads.")],
    layer: Annotated[str, typer.Option(metavar="all|N", help="All layers, or one, from 0.")] = "all",
    head: Annotated[str, typer.Option(metavar="all|N", help="All heads, or one, from 0.")] = "all",
    model: Annotated[
        str | None, typer.Option(metavar="NAME-OR-FOLDER", help="Default: all-MiniLM-L6-v2.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Every head, as a page to look around in.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE.png", help="The same as a picture.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 64,
    device: Device = "cpu",
    json_to: Json = None,
) -> None:
    """Shows what the heads of a model look at in a text: in the terminal, as a page and as a picture."""
    from bigmodel_kernels.attention_map import compute, html, terminal
    from bigmodel_kernels.attention_map import png as picture

    console = console_for(json_to)
    check_device(device)
    numbers = {name: _number_or_all(name, value) for name, value in (("layer", layer), ("head", head))}
    with errors_of_usage(OSError, ValueError):
        found = compute.compute(text, model=model, max_tokens=max_tokens, device=device, **numbers)
        if json_to != STDOUT:
            terminal.show(found, console)
        if output is not None:
            html.write(found, output)
            console.print(f"wrote {output}", markup=False)
        if png is not None:
            problem = picture.write(found, png)
            console.print(f"wrote {png}{'; ' if problem else ''}{problem or ''}", markup=False)
    emit(found.to_dict(), json_to, console)


if __name__ == "__main__":
    main()
