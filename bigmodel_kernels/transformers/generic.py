"""Patched forms of torch's own modules, for places that families name (language model heads, last norms)."""

from __future__ import annotations

from torch import Tensor, nn

from bigmodel_kernels.transformers import blocks, checks


class BigmodelLinear(nn.Linear):
    """nn.Linear by `bigmodel::linear`."""

    def forward(self, input: Tensor) -> Tensor:
        held = checks.parameters(self, BigmodelLinear, checks.dtype_of(input))
        if held is None or checks.watched_globally():
            return super().forward(input)
        return blocks.linear(input, (blocks.Affine(*held),), "linear")


class BigmodelLayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension by `bigmodel::layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        held = checks.parameters(self, BigmodelLayerNorm, checks.dtype_of(input))
        if held is None or len(self.normalized_shape) != 1 or checks.watched_globally():
            return super().forward(input)
        return blocks.layer_norm(input, blocks.Affine(*held), self.eps)
