"""Runs one command of the build, and says how long it took and how much memory.

    python csrc/job.py OUTPUT [--log FILE] -- COMMAND...

The command's own output goes to FILE, which is shown when the command fails; without --log it is shown as it
comes. These are also kept in OUTPUT.usage, for build.py's summary. Time is that on the clock and that on
processors, which says more where other work shares them. Memory is the largest resident set of any one
process of the command, as the system counts it.
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
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    usage = {
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(children.ru_utime + children.ru_stime, 1),
        "megabytes": children.ru_maxrss * unit // 1_000_000,
    }
    if status == 0:
        Path(f"{output}.usage").write_text(json.dumps(usage))
        print(
            f"{output.name}: {usage['seconds']} s ({usage['processor_seconds']} s of processors), "
            f"{usage['megabytes']} MB"
        )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
