"""AdamW and its learning rate: a linear rise, then a linear fall to zero."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from bigmodel_kernels.finetune.settings import Settings


class WarmupThenDecay:
    """The factor of the learning rate at a step, counted from 0."""

    def __init__(self, steps: int, warmup: float) -> None:
        self.steps, self.rise = steps, round(steps * warmup)

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return (step + 1) / (self.rise + 1)
        return max(0.0, (self.steps - step) / max(1, self.steps - self.rise))


def make(model: nn.Module, settings: Settings, steps: int) -> tuple[AdamW, LambdaLR]:
    """Weight decay goes on matrices, not on biases and norms (arXiv:1711.05101 for the decay itself)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    assert settings.lr is not None
    optimiser = AdamW([group for group in groups if group["params"]], lr=settings.lr)
    return optimiser, LambdaLR(optimiser, WarmupThenDecay(steps, settings.warmup))
