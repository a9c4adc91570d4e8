"""Tasks of the field on patched models: `bigmodel-kernels classify`, `embed`, `qa` ...; and from Python

    from bigmodel_kernels.tasks import Classify, run
    outcome = run(Classify(top_k=2), ["A lovely film."], model="FOLDER_OR_NAME")
    print(outcome.results[0]["labels"])

A task is a file here: its options are the fields of a dataclass. `base` is what they share, `generation`
what those share that write text, `models` loads, `compare` runs eager beside patched, `command` is the
shell's side.
"""

from __future__ import annotations

from bigmodel_kernels.tasks.base import Outcome, Task, run
from bigmodel_kernels.tasks.classify import Classify
from bigmodel_kernels.tasks.complete import Complete
from bigmodel_kernels.tasks.embed import Embed
from bigmodel_kernels.tasks.fill_mask import FillMask
from bigmodel_kernels.tasks.generate import Generate
from bigmodel_kernels.tasks.qa import QuestionAnswering
from bigmodel_kernels.tasks.summarise import Summarise
from bigmodel_kernels.tasks.translate import Translate

__all__ = [
    "Classify",
    "Complete",
    "Embed",
    "FillMask",
    "Generate",
    "Outcome",
    "QuestionAnswering",
    "Summarise",
    "Task",
    "Translate",
    "run",
]

#: In the order of the command's help.
TASKS: tuple[type[Task], ...] = (
    Classify,
    Embed,
    QuestionAnswering,
    FillMask,
    Generate,
    Complete,
    Translate,
    Summarise,
)
