"""Prints, as JSON, where Triton's compiler puts the elements of our kernels' fragments and shared tiles.

A process of its own, because Triton's front end complains at its end of what it did not free. Needs no GPU.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

found: dict[str, dict[str, Any]] = {}


@triton.constexpr_function
def note(name, layout):  # type: ignore[no-untyped-def]
    bases = ("reg_bases", "lane_bases", "warp_bases", "offset_bases")
    found[str(name)] = {kind: getattr(layout, kind) for kind in bases if hasattr(layout, kind)}
    return 0


@gluon.jit
def ask():  # type: ignore[no-untyped-def]
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    mma_c: gl.constexpr = note("mma_c", gl.to_linear_layout(mma, [16, 8]))  # noqa: F841
    mma_a: gl.constexpr = note("mma_a", gl.to_linear_layout(gl.DotOperandLayout(0, mma, 2), [16, 16]))  # noqa: F841
    mma_b: gl.constexpr = note("mma_b", gl.to_linear_layout(gl.DotOperandLayout(1, mma, 2), [16, 8]))  # noqa: F841


@gluon.jit
def ask_hopper():  # type: ignore[no-untyped-def]
    wgmma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]
    )
    c: gl.constexpr = note("wgmma_c", gl.to_linear_layout(wgmma, [64, 32]))  # noqa: F841
    a: gl.constexpr = note("wgmma_a", gl.to_linear_layout(gl.DotOperandLayout(0, wgmma, 2), [64, 16]))  # noqa: F841
    shared_128: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tile_128: gl.constexpr = note("tile_128", gl.to_linear_layout(shared_128, [64, 64]))  # noqa: F841
    shared_64: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    tile_64: gl.constexpr = note("tile_64", gl.to_linear_layout(shared_64, [64, 32]))  # noqa: F841


for kernel, capability, warps in ((ask, 80, 1), (ask_hopper, 90, 4)):
    triton.compile(
        GluonASTSource(kernel, {}), target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
print(json.dumps(found), flush=True)
