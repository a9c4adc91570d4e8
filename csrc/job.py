"""Runs one command of the build, and says how long it took and how much memory.

    python csrc/job.py OUTPUT [--log FILE] -- COMMAND...

The command's own output goes to FILE, which is shown when the command fails; without --log it is shown as it
comes. The time and the memory are also kept in OUTPUT.usage, for build.py's summary. Memory is the largest
resident set of any one process of the command, as the system counts it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    options, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    output, log = Path(options[0]), options[2] if options[1:] else None
    start = time.monotonic()
    if log is None:
        status = subprocess.run(command).returncode
    else:
        with open(log, "w") as file:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            print(Path(log).read_text(), end="")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    usage = {
        "seconds": round(time.monotonic() - start, 1),
        "megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit // 1_000_000,
    }
    if status == 0:
        Path(f"{output}.usage").write_text(json.dumps(usage))
        print(f"{output.name}: {usage['seconds']} s, {usage['megabytes']} MB")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
