"""Fine-tuning of transformers models, eager, sdpa or patched: `bigmodel-kernels finetune`, and from Python

    from bigmodel_kernels.finetune import Settings, finetune
    result = finetune(Settings(task="classification", output="runs/reviews", steps=200))
    print(result.metrics["f1"])

`compare` trains the same eager and patched. `texts` and `data` have the default texts and data sets,
`metrics` the scores; they are of use without the rest. Needs the extra `finetune`.
"""

from __future__ import annotations

from bigmodel_kernels.finetune.compare import compare
from bigmodel_kernels.finetune.run import Interrupted, Listener, Result, finetune
from bigmodel_kernels.finetune.settings import Settings

__all__ = ["Interrupted", "Listener", "Result", "Settings", "compare", "finetune"]
