"""A step of a long matrix product in Triton: in float32, sums in parts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b, EXACT: tl.constexpr):
    """``total + a b``, a step of a long product; EXACT, of float32 operands: with a sum of its own for the
    step.

    A float32 ``tl.dot`` is one chain of fused multiply-adds, and so are all steps together when each starts
    from the sum of the last: after 64 terms the error is one and a half times that of cuBLAS, after 300 two
    and a half times. Adding a dot does not help, as Triton's combine pass
    (lib/Dialect/Triton/Transforms/Combine.td, CombineDotAddFPattern) turns that into the start of the chain
    again. Subtracting one it leaves alone.
    """
    # "ieee": float32 products in full precision, not TF32. It changes nothing for 16-bit operands.
    if EXACT:
        return total - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")
