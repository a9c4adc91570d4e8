"""Runs transformers' own test files as they are, with our attention, and with every model patched.

    TRANSFORMERS_SOURCE=folder python tools/transformers_tests.py [--models bert gpt2 ...] [-- PYTEST...]

The folder is a checkout of transformers: the tests are not in the wheel, and they run with the sources beside
them. A test that passes as it is, by transformers' default attention, has to pass in the other runs. Those
that do not are named, and the exit status is 1. A run without any model of ours is an error, and so is one
in which no test passes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from transformers_matrix import ROOT, results_of

MODELS = ("bert", "roberta", "distilbert", "gpt2", "t5", "llama")
MODES = ("none", "attention", "patch")
#: Tests that ask the config for the name of an implementation, which is another one here.
BY_DESIGN = {
    "test_sdpa_can_dispatch_non_composite_models": "it asks for the name sdpa",
    "test_can_set_attention_dynamically": "it asks for the name eager; a patched model's says bigmodel",
}
PLUGIN = "bigmodel_kernels.transformers.pytest_plugin"


def source() -> Path:
    """The checkout. Raises SystemExit where there is none, or none with tests."""
    given = os.environ.get("TRANSFORMERS_SOURCE")
    if not given:
        raise SystemExit(
            "TRANSFORMERS_SOURCE is not set; it must be a checkout of transformers, with its tests"
        )
    folder = Path(given).resolve()
    for needed in ("tests/test_modeling_common.py", "src/transformers/__init__.py"):
        if not (folder / needed).exists():
            raise SystemExit(f"TRANSFORMERS_SOURCE={given!r} has no {needed}")
    return folder


def version_of(folder: Path) -> str:
    text = (folder / "src/transformers/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{folder}/src/transformers/__init__.py has no __version__")
    return found[1]


def failures(folder: Path, mode: str, files: list[str], more: list[str], logs: Path) -> set[str]:
    """The tests that fail in a mode of the plugin."""
    report, log = logs / f"{mode}.xml", logs / f"{mode}.log"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        PLUGIN,
        f"--bigmodel={mode}",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    settings = {**os.environ, "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            [*command, f"--junitxml={report}", *files, *more], cwd=folder, env=settings, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    if not report.exists():
        raise SystemExit(f"pytest did not finish; see {log}")
    counts, failed = results_of(report)
    text = log.read_text(encoding="utf-8")
    changed = re.search(rf"bigmodel {mode}: (\d+) models", text)
    if not counts["passed"] or (mode != "none" and (changed is None or not int(changed[1]))):
        raise SystemExit(f"--bigmodel={mode}: no test passed, or no model was changed; see {log}")
    models = f", {changed[1]} models of ours" if changed else ""
    print(f"{mode}: {', '.join(f'{number} {name}' for name, number in counts.items())}{models}", flush=True)
    return set(failed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--logs", type=Path, default=ROOT / ".matrix/transformers-tests", help="of each run")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    folder = source()
    files = [f"tests/models/{name}/test_modeling_{name}.py" for name in options.models]
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)}")
    options.logs.mkdir(parents=True, exist_ok=True)
    logs = options.logs.resolve()
    print(f"transformers {version_of(folder)}", flush=True)
    found = {mode: failures(folder, mode, files, options.pytest, logs) for mode in MODES}
    worse = {mode: sorted(found[mode] - found["none"]) for mode in MODES[1:]}
    failed = False
    for mode, tests in worse.items():
        for test in tests:
            reason = BY_DESIGN.get(test.rpartition(".")[2])
            failed |= reason is None
            verdict = "FAILED" if reason is None else f"by design ({reason}), fails"
            print(f"{verdict} with --bigmodel={mode}, and passes without: {test}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
