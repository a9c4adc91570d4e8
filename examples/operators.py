"""A transformer layer made of the operators alone, trained for a few steps.

    python examples/operators.py

The task: each place of a sequence of digits has to say the digit before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bk


class Layer(nn.Module):
    """GPT-2's kind of layer: x + attention(LN(x)), then x + FFN(LN(x))."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = bk.layer_norm(x, self.norm1.weight, self.norm1.bias)
        qkv = bk.linear(h, self.qkv.weight, self.qkv.bias)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = bk.attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        x = bk.linear(attended, self.out.weight, self.out.bias, residual=x)
        return bk.feed_forward(
            x,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
            activation="gelu_tanh",
            residual=x,
            norm_position="pre",
            norm_weight=self.norm2.weight,
            norm_bias=self.norm2.bias,
        )


def main() -> None:
    torch.manual_seed(0)
    hidden, length = 64, 16
    table, places = nn.Embedding(10, hidden), nn.Embedding(length, hidden)
    layer, head = Layer(hidden, heads=4), nn.Linear(hidden, 10)
    modules = nn.ModuleList([table, places, layer, head])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=3e-3)
    for step in range(201):
        digits = torch.randint(0, 10, (32, length))
        x = bk.embedding(digits, table.weight, torch.arange(length)[None], places.weight)
        loss = F.cross_entropy(head(layer(x))[:, 1:].flatten(0, 1), digits[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:>3}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
