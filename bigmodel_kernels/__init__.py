"""Fast kernels for transformer models in PyTorch: attention, feed-forward, norm and embedding, on CPU and
GPU.

    import bigmodel_kernels as bk
    report = bk.patch(model)                       # a transformers model, replaced layer by layer
    out = bk.attention(query, key, value, is_causal=True)
    print(bk.explain("attention", query, key, value))
    with bk.sdpa(): ...                            # torch's scaled_dot_product_attention on these kernels

Importing this package loads no kernel, no Triton and no transformers, and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigmodel_kernels.backends import BackendError, Explanation, explain
from bigmodel_kernels.compat.sdpa import activate_sdpa, deactivate_sdpa, sdpa, sdpa_reason
from bigmodel_kernels.ops.attention import attention
from bigmodel_kernels.ops.attention.decode import attention_decode
from bigmodel_kernels.ops.attention_maps import (
    AttentionStatistics,
    attention_probabilities,
    attention_statistics,
)
from bigmodel_kernels.ops.cross_entropy import linear_cross_entropy
from bigmodel_kernels.ops.embedding import embedding
from bigmodel_kernels.ops.feed_forward import feed_forward
from bigmodel_kernels.ops.linear import linear
from bigmodel_kernels.ops.norm import layer_norm, rms_norm
from bigmodel_kernels.ops.rotary import rotary
from bigmodel_kernels.transformers.autoregister import register_when_imported

if TYPE_CHECKING:
    from bigmodel_kernels.transformers import (
        AttentionMaps,
        PatchReport,
        attention_maps,
        collect_attention,
        enable_continuous_batching,
        patch,
        patched,
        release_weights,
        restore_weights,
        unpatch,
    )

__version__ = "0.1.0"

__all__ = [
    "AttentionMaps",
    "AttentionStatistics",
    "BackendError",
    "Explanation",
    "PatchReport",
    "activate_sdpa",
    "attention",
    "attention_decode",
    "attention_maps",
    "attention_probabilities",
    "attention_statistics",
    "collect_attention",
    "deactivate_sdpa",
    "embedding",
    "enable_continuous_batching",
    "explain",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "patch",
    "patched",
    "release_weights",
    "restore_weights",
    "rms_norm",
    "rotary",
    "sdpa",
    "sdpa_reason",
    "unpatch",
]

_FROM_TRANSFORMERS_LAYER = (
    *("AttentionMaps", "attention_maps", "collect_attention"),
    *("PatchReport", "patch", "patched", "unpatch", "release_weights", "restore_weights"),
    "enable_continuous_batching",
)


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the operators do without it.
    if name in _FROM_TRANSFORMERS_LAYER:
        from bigmodel_kernels import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FROM_TRANSFORMERS_LAYER])


# attn_implementation="bigmodel" is known to transformers from now on, or as soon as transformers is imported.
register_when_imported()
