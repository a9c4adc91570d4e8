"""How speed is measured: interleaved runs, a floor from this machine's own GEMM and copy speed, and a
verdict whether the run is to be trusted.

    timing.py    times several contenders of one case, in turn
    peers.py     other runtimes as contenders
    texts.py     texts that contenders generate
    memory.py    peak memory of a call
    machine.py   what the machine is, what it can do at best, and whether it was quiet
    suite.py     cases, what they build, and how a list of suites becomes a document
    document.py  the shape of that document, and its check
    tables.py    the document as tables

The cases themselves are in the folder `benchmarks/` of the source tree, one file for each suite.
"""

from __future__ import annotations

from bigmodel_kernels.bench.suite import Case, Prepared, Setting, Stage, Suite
from bigmodel_kernels.bench.timing import Contender

__all__ = ["Case", "Contender", "Prepared", "Setting", "Stage", "Suite"]
