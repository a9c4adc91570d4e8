"""Runs the tests of the transformers layer with the oldest transformers that is supported, and the newest.

    python tools/transformers_matrix.py [--versions 5.16 newest] [--folder .matrix] [tests/transformers ...]

Each version has a virtual environment in the folder, which shares every other package with the Python that
runs this. In each, `bigmodel-kernels models` compares every family with transformers' own, and pytest runs
the tests; logs and results stay in the folder. Exit status 1 when anything fails in any version.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "newest"
TESTS = ("tests/transformers", "tests/models")


@dataclass
class Outcome:
    """What a version came to; `wrong` names what failed."""

    version: str
    families: str = "not run"
    tests: str = "not run"
    wrong: list[str] = field(default_factory=list)


def oldest() -> str:
    """The lowest transformers that pyproject.toml allows."""
    found = re.search(r'"transformers>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit("pyproject.toml has no requirement transformers>=...")
    return found[1]


def environment(version: str, folder: Path) -> Path:
    """The Python of the version's environment, made if there is none; the newest is asked for each time."""
    home = folder / version
    python = home / "bin/python"
    if not python.exists():
        venv.create(home, with_pip=False)
        # The environment's own packages come first; what it has not comes from here, torch above all.
        purelib = home / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        (purelib / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    wanted = ["--upgrade", "transformers"] if version == NEWEST else [f"transformers=={version}"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
    # Without PYTHONPATH, whose packages pip would take for the environment's.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*pip, *wanted], check=True, env=clean)
    return python


def run(python: Path, log: Path, *arguments: str) -> int:
    """The exit status of a module of the package's, run from the sources; what it writes goes to the log."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(python), "-m", *arguments], cwd=ROOT, env=settings, stdout=file, stderr=subprocess.STDOUT
        )
    return done.returncode


def outcome_of(version: str, folder: Path, tests: list[str]) -> Outcome:
    python = environment(version, folder)
    asked = "import transformers; print(transformers.__version__)"
    found = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
    outcome = Outcome(found.stdout.strip())
    if version != NEWEST and not f"{outcome.version}.".startswith(f"{version}."):
        raise SystemExit(f"the environment of transformers {version} imports {outcome.version}")
    table, log = folder / f"{version}-models.json", folder / f"{version}-models.log"
    table.unlink(missing_ok=True)
    status = run(python, log, "bigmodel_kernels.cli", "models", "--json", str(table))
    if table.exists():
        families = json.loads(table.read_text(encoding="utf-8"))["families"]
        outcome.families = f"{sum(row['ok'] for row in families)} of {len(families)} families"
        outcome.wrong += [
            f"{row['family']}, {check}: {cell['detail']}"
            for row in families
            for check, cell in row["cells"].items()
            if cell["status"] == "FAILED"
        ]
    if status and not outcome.wrong:
        outcome.wrong.append(f"bigmodel-kernels models ended with {status}; see {log}")
    report, log = folder / f"{version}-tests.xml", folder / f"{version}-tests.log"
    report.unlink(missing_ok=True)
    status = run(python, log, "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={report}", *tests)
    failed: list[str] = []
    if report.exists():
        counts, failed = results_of(report)
        outcome.tests = ", ".join(f"{number} {name}" for name, number in counts.items())
        outcome.wrong += failed
    if status and not failed:
        outcome.wrong.append(f"pytest ended with {status}; see {log}")
    return outcome


def results_of(report: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests of a JUnit report passed, failed and were skipped, and the names of the failed."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tests", nargs="*", default=list(TESTS), help="for pytest; default: the transformers tests"
    )
    parser.add_argument(
        "--versions", nargs="+", default=[oldest(), NEWEST], help="default: oldest and newest"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of environments and logs")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes = [outcome_of(version, options.folder.resolve(), options.tests) for version in options.versions]
    for outcome in outcomes:
        print(f"transformers {outcome.version}: {outcome.families} as they should be; tests: {outcome.tests}")
        for line in outcome.wrong:
            print(f"  FAILED {line}")
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
