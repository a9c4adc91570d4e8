"""What can be trained: one file for each task, found by its name."""

from __future__ import annotations

from bigmodel_kernels.finetune.tasks.base import Task
from bigmodel_kernels.finetune.tasks.classification import Classification
from bigmodel_kernels.finetune.tasks.language_model import LanguageModel
from bigmodel_kernels.finetune.tasks.masked_lm import MaskedLM
from bigmodel_kernels.finetune.tasks.question_answering import QuestionAnswering
from bigmodel_kernels.finetune.tasks.sequence_to_sequence import Summarisation, Translation

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Classification, LanguageModel, MaskedLM, QuestionAnswering, Translation, Summarisation)
}

__all__ = ["TASKS", "Task"]
