"""Linear and cross-entropy in one, in plain PyTorch: the definition of right.

Logits exist for a chunk of rows at a time, and are turned into their gradient in place:

    logits = x[chunk] @ W^T + b          (rows, V), tens of megabytes, the same memory for every chunk
    loss   = logsumexp - (1 - s) * logits[target] - s * mean(logits)             s: label_smoothing
    d      = softmax(logits) - (1 - s) * onehot(target) - s / V
    dx[chunk] = d @ W,   dW += d^T @ x[chunk],   db += sum of d

So a training step costs the three products that it costs with all logits in memory. Rows with ignore_index
are left out before the first product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bigmodel_kernels.ops.registration import compute_dtype, filled

#: Bytes of logits held at a time, and as many of their softmax. On a CPU about what its last cache holds; a
#: GPU wants larger products.
_CHUNK_BYTES = {"cpu": 16 << 20}
_CHUNK_BYTES_ELSEWHERE = 256 << 20
#: Each chunk reads all of the weight: fewer rows than this would wait for memory.
_LEAST_ROWS = 32


def chunk_rows(vocabulary: int, itemsize: int, device: torch.device) -> int:
    """Rows whose logits are made at a time."""
    limit = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE)
    return max(_LEAST_ROWS, limit // (itemsize * max(1, vocabulary)))


def run(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """See `bigmodel_kernels.linear_cross_entropy`."""
    work = _Work(x, weight, target, bias, ignore_index, label_smoothing)
    losses, logsumexp = work.outputs()
    for rows, logits, probabilities in work.chunks():
        losses[rows], logsumexp[rows] = work.loss(rows, logits, probabilities)
    return _reduced(losses, work.rows.numel(), reduction), logsumexp


def run_training(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `run`, with the gradients of x, weight and bias for a gradient of 1 of the loss."""
    work = _Work(x, weight, target, bias, ignore_index, label_smoothing)
    losses, logsumexp = work.outputs()
    sums = _Gradients(work, needs)
    for rows, logits, probabilities in work.chunks():
        losses[rows], logsumexp[rows] = work.loss(rows, logits, probabilities)
        sums.add(rows, work.gradient(probabilities, rows))
    count = work.rows.numel()
    scale = 1.0 / max(count, 1) if reduction == "mean" else 1.0
    return (_reduced(losses, count, reduction), logsumexp, *sums.results(scale))  # type: ignore[return-value]


def run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logsumexp: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias for a gradient (N,) of the losses of the rows.

    exp(logits - logsumexp) would carry the rounding of a large logsumexp: the softmax is made from its own
    maximum again.
    """
    work = _Work(x, weight, target, bias, ignore_index, label_smoothing)
    sums = _Gradients(work, needs)
    upstream = grad.to(logsumexp.dtype)
    for rows, _, probabilities in work.chunks():
        sums.add(rows, work.gradient(probabilities, rows).mul_(upstream[rows, None]))
    return sums.results(1.0)


def _reduced(losses: Tensor, count: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64)
    return (total / count if reduction == "mean" else total).to(losses.dtype)


class _Work:
    """The rows that count, and their logits a chunk at a time."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> None:
        self.x, self.bias, self.target, self.smoothing = x, bias, target, label_smoothing
        self.compute = compute_dtype(x.dtype)
        # A CPU need not have instructions for half types; a GPU has, and sums their products in float32.
        self.dtype = x.dtype if x.device.type != "cpu" else self.compute
        self.weight = weight.to(self.dtype)
        self.rows = (target != ignore_index).nonzero().squeeze(1)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Losses and logsumexp, 0 for the rows that do not count."""
        zeros = torch.zeros((2, self.x.shape[0]), dtype=self.compute, device=self.x.device)
        return zeros[0], zeros[1].clone()

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Numbers of rows, and their logits and softmax in the type of computation, which the next chunk
        overwrites."""
        vocabulary = self.weight.shape[0]
        step = min(chunk_rows(vocabulary, self.compute.itemsize, self.x.device), self.rows.numel())
        buffers = torch.empty((2, step, vocabulary), dtype=self.compute, device=self.x.device)
        bias = None if self.bias is None else self.bias.to(self.compute)
        for rows in self.rows.split(max(1, step)):
            if not len(rows):
                return
            logits, probabilities = buffers[:, : len(rows)]
            inputs = self.inputs(rows)
            if self.dtype == self.compute:
                torch.mm(inputs, self.weight.t(), out=logits)
            else:
                logits.copy_(inputs @ self.weight.t())
            if bias is not None:
                logits.add_(bias)
            torch.softmax(logits, 1, out=probabilities)
            yield rows, logits, probabilities

    def inputs(self, rows: Tensor) -> Tensor:
        return self.x.index_select(0, rows).to(self.dtype)

    def loss(self, rows: Tensor, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the rows, and their logsumexp: the largest probability is 1 / sum(exp(logits - largest
        logit))."""
        s = self.smoothing
        logsumexp = logits.amax(1) - probabilities.amax(1).log()
        hit = logits.gather(1, self.target[rows, None]).squeeze(1)
        losses = logsumexp - hit if not s else logsumexp - (1 - s) * hit - s * logits.mean(1)
        return losses, logsumexp

    def gradient(self, probabilities: Tensor, rows: Tensor) -> Tensor:
        """Gradient of the rows' losses by their logits, in place of the probabilities."""
        s = self.smoothing
        if s:
            probabilities.sub_(s / probabilities.shape[1])
        target = self.target[rows, None]
        return probabilities.scatter_add_(1, target, probabilities.new_tensor(s - 1).expand(target.shape))


class _Gradients:
    """Sums of the gradients of x, weight and bias over chunks, where needed."""

    def __init__(self, work: _Work, needs: Sequence[bool]) -> None:
        self.work, self.needs = work, needs
        need_x, need_weight, need_bias = needs
        vocabulary, features = work.weight.shape

        def zeros(need: bool, *size: int) -> Tensor | None:
            return torch.zeros(size, dtype=work.compute, device=work.x.device) if need else None

        self.x = zeros(need_x, *work.x.shape)
        self.weight = zeros(need_weight, vocabulary, features)
        self.bias = zeros(need_bias, vocabulary)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        work, operand = self.work, gradient.to(self.work.dtype)
        if self.x is not None:
            self.x[rows] = (operand @ work.weight).to(work.compute)
        if self.weight is not None:
            inputs = work.inputs(rows)
            if work.dtype == work.compute:
                self.weight.addmm_(operand.t(), inputs)
            else:
                self.weight.add_(operand.t() @ inputs)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))

    def results(self, scale: float) -> list[Tensor]:
        sums = (self.x, self.weight, self.bias)
        if scale != 1.0:
            sums = tuple(None if s is None else s.mul_(scale) for s in sums)  # type: ignore[assignment]
        return filled(sums, self.needs, self.work.x)
