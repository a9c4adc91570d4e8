"""The kinds of transformer layer, as a handful of calls of our operators; families say where the weights are.

post-norm (BERT, RoBERTa, ...)   x = LN(x + drop(attend(x))),  x = LN(x + drop(ffn(x)))
pre-norm  (GPT-2, ...)           x = x + drop(attend(LN(x))),  x = x + drop(ffn(LN(x)))
parallel  (GPT-J, GPT-NeoX)      x = x + drop(attend(LN(x))) + drop(ffn(LN(x))),  with one LN or two
gated     (Llama, Gemma, ...)    x = x + norm(attend(norm(x))),  x = x + norm(ffn(norm(x))),  with RMSNorms,
                                 of which Llama has the inner ones, OLMo 2 the outer ones and Gemma 2 both

Under autocast the stream x stays as wide as torch's rules leave it: products and attention run in the
autocast type, norms and sums in float32. So residual and norm are then calls of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bigmodel_kernels.ops.attention
import bigmodel_kernels.ops.embedding
import bigmodel_kernels.ops.feed_forward
import bigmodel_kernels.ops.linear
import bigmodel_kernels.ops.norm
import bigmodel_kernels.ops.rotary  # noqa: F401  (all six define torch.ops.bigmodel.*)
from bigmodel_kernels.distributed import ensure_sharding_rules
from bigmodel_kernels.ops.linear.pieces import pieces_of
from bigmodel_kernels.ops.registration import call, draw_seed
from bigmodel_kernels.ops.side_by_side import cut
from bigmodel_kernels.transformers import checks, whole_layer

if TYPE_CHECKING:
    from bigmodel_kernels.transformers.attention_interface import Visibility


class Affine(NamedTuple):
    """Weight and bias of a projection or of a norm."""

    weight: Tensor
    bias: Tensor | None


class Scale(NamedTuple):
    """Weight of an RMSNorm, its epsilon, and what is added to its weight."""

    weight: Tensor
    eps: float
    offset: float = 0.0


#: A projection or a norm whose tensors the operators can read, or else the module, to be called as it is
#: (LoRA, weights of another type). Modules must treat every row alone: a row is a token, wherever it lies.
Part = Affine | nn.Module


def part(module: nn.Module, cls: type, dtype: torch.dtype | None) -> Part:
    """The tensors of a module that is an intact `cls` with parameters of this dtype, or else the module."""
    held = checks.parameters(module, cls, dtype)
    return module if held is None else Affine(*held)


def eps_of(norm: Any) -> float:
    """The epsilon of a norm; what stands in its place, and is called as it is, may have none."""
    return float(getattr(norm, "eps", 0.0))


def half(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines, every angle once, of those that have each for both halves of a head."""
    cos, sin = angles
    count = cos.shape[-1] // 2
    return cos[..., :count], sin[..., :count]


class Terms(NamedTuple):
    """All that `bigmodel::attention` is told in a layer but for its dropout; the defaults are the operator's.

    Query, key and value are (B, heads, S, head size), or (tokens, heads, head size) where `lengths`, the
    cu_seqlens of both, says which sequences the rows belong to, of which none is longer than `longest`.
    With a `packing` they are the former, and the heads' results are packed.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    padding: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None
    lengths: Tensor | None = None
    longest: int = 0
    packing: Packing | None = None  # of the rows around attention, which runs with the padding


#: From query, key and value, each (..., heads, head size).
Attend = Callable[[Tensor, Tensor, Tensor], Terms]


class FeedForward(NamedTuple):
    """Two projections and the activation between, or the module that stands for them, from rows to rows."""

    w_in: Affine
    w_out: Affine
    activation: str
    recompute: bool = False  # the hidden layer is made again in the backward, not kept
    w_gate: Affine | None = None
    hidden_p: float = 0.0  # dropout of the hidden layer, which is then a tensor of its own


def feed_forward_of(
    module: nn.Module,
    w_in: str,
    w_out: str,
    activation: str,
    dtype: torch.dtype | None,
    w_gate: str | None = None,
    hidden_p: float = 0.0,
    linear: type[nn.Module] = nn.Linear,
) -> FeedForward | None:
    """That of the projections, of this class, and the activation of these names in `module`, if one call may
    read them.
    """
    modules = module.__dict__["_modules"]
    names = (w_in, w_out) if w_gate is None else (w_in, w_out, w_gate)
    held = [checks.parameters(modules[name], linear, dtype) for name in names]
    kind = checks.activation(modules.get(activation))
    if None in held or kind is None:
        return None
    first, last, *gate = (Affine(*tensors) for tensors in held if tensors is not None)
    return FeedForward(first, last, kind, checks.recomputes(module), gate[0] if gate else None, hidden_p)


def feed_forward_of_joined(
    module: nn.Module, joined: str, w_out: str, activation: str, dtype: torch.dtype | None
) -> FeedForward | None:
    """That of a gated feed-forward one of whose weights holds gate and up, for inference on the CPU; None for
    one that one call may not read.
    """
    if dtype is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    modules = module.__dict__["_modules"]
    both, last = (checks.parameters(modules[name], nn.Linear, dtype) for name in (joined, w_out))
    kind = checks.activation(modules.get(activation))
    if both is None or last is None or kind is None or both[1] is not None:
        return None
    halves = pieces(both[0], 2)
    if halves is None:
        return None
    gate, up = halves
    return FeedForward(Affine(up, None), Affine(*last), kind, w_gate=Affine(gate, None))


def pieces(weight: Tensor, count: int) -> tuple[Tensor, ...] | None:
    """So many equal ones of a weight's rows, as the library packs them; None of a weight that it does not."""
    return pieces_of(weight, count) if weight.is_cpu and type(weight) is nn.Parameter else None


class LayerParts(NamedTuple):
    """All of one layer, gathered anew for each forward: nothing is remembered between calls.

    `attention_p`, `context_p` and `ffn_p` are the dropout of the probabilities, of the attention's output and
    of the feed-forward's; 0 outside training. `unfused` is the feed-forward by the layer's own modules, for a
    `ffn` of None: post-norm with residual and norm, pre-norm from the normalised input without them.
    `head_norms` are weights of RMSNorms of queries and of keys, head by head or of all features. Norms are
    None where there is none, `ffn_norm` also where that of attention serves both halves. Query, key and value
    may be one weight, three, or each as many pieces.
    """

    qkv: tuple[Part, ...]
    head_dim: int
    attention_out: Part
    attention_norm: Part | None
    attention_eps: float
    attention_p: float
    context_p: float
    ffn: FeedForward | None
    ffn_norm: Part | None
    ffn_eps: float
    ffn_p: float
    unfused: Callable[[Tensor], Tensor]
    head_norms: tuple[Tensor | None, Tensor | None] = (None, None)
    head_eps: float = 0.0


class DecoderParts(NamedTuple):
    """All of one layer with LayerNorms, whose attention is called with the layer's input, gathered anew for
    each forward.

    `ffn` is None where the feed-forward runs as `unfused`: dropout included, sum and norm not. `ffn_norm` is
    None where the norm of attention serves both.
    """

    order: str  # "pre", "post", "parallel", or "normed": what is added is the output of each norm (BLOOM)
    attention_norm: Part
    attention_eps: float
    attention_out: Part
    attention_p: float
    ffn_norm: Part | None
    ffn_eps: float
    ffn: FeedForward | None
    unfused: Callable[[Tensor], Tensor]
    ffn_p: float


class GatedParts(NamedTuple):
    """All of one layer of Llama's kind, gathered anew for each forward.

    Norms are None where there is none. `ffn` is None where the feed-forward runs as `unfused`, from the
    normalised input, without sum and norm. `multiplier` is that of both sums (Granite).
    """

    attention_norm: nn.Module | None
    attention_out: Part
    attention_outer_norm: nn.Module | None
    attention_p: float
    ffn_norm: Scale | nn.Module | None
    ffn: FeedForward | None
    unfused: Callable[[Tensor], Tensor]
    ffn_outer_norm: nn.Module | None
    ffn_p: float
    multiplier: float = 1.0


def lowered(x: Tensor) -> bool:
    """Whether autocast is on."""
    return torch.is_autocast_enabled(x.device.type)


def linear(
    x: Tensor,
    parts: tuple[Affine, ...],
    layout: str,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Affine | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """One product for one or several projections of the same input; their outputs lie side by side."""
    biases = [part.bias for part in parts if part.bias is not None]
    if biases and len(biases) != len(parts):
        biases = [
            part.weight.new_zeros(_width(part, layout)) if part.bias is None else part.bias for part in parts
        ]
    out: Tensor = call(
        "linear",
        x,
        [part.weight for part in parts],
        biases,
        residual,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        draw_seed(dropout_p, x.device),
        weight_layout=layout,
        activation=activation,
        norm_eps=eps,
        dropout_p=dropout_p,
    )
    return out


def _norm_tensors(norm: Affine | Scale | None) -> tuple[Tensor | None, Tensor | None]:
    if norm is None:
        return None, None
    return norm.weight, norm.bias if isinstance(norm, Affine) else None


def _norm_options(norm: Affine | Scale | None, eps: float) -> dict[str, Any]:
    if isinstance(norm, Scale):
        return {"norm_eps": norm.eps, "norm_kind": "rms_norm"}
    return {"norm_eps": eps}


def _width(part: Affine, layout: str) -> int:
    return part.weight.shape[1] if layout == "conv1d" else part.weight.shape[0]


def project(x: Tensor, part: Part, layout: str) -> Tensor:
    return linear(x, (part,), layout) if isinstance(part, Affine) else part(x)  # type: ignore[no-any-return]


def heads(x: Tensor, parts: tuple[Part, ...], layout: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each (..., heads, head_dim); of one projection for all, as many heads in each."""
    query, key, value = (
        part.unflatten(-1, (-1, head_dim)) for part in side_by_side(x, parts, layout, (1, 1, 1))
    )
    return query, key, value


def side_by_side(
    x: Tensor, parts: tuple[Part, ...], layout: str, shares: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The outputs of several projections: views of one product where possible. A single projection that
    stands for all is cut by `shares`."""
    fused = [part for part in parts if isinstance(part, Affine)]
    if len(fused) < len(parts) > 1:
        return tuple(project(x, part, layout) for part in parts)
    whole = linear(x, tuple(fused), layout) if fused else project(x, parts[0], layout)
    if len(parts) == 1:
        return cut(whole, [whole.shape[-1] * share // sum(shares) for share in shares])
    return cut(whole, [_width(part, layout) for part in fused])


def output(
    x: Tensor,
    part: Part,
    layout: str,
    residual: Tensor,
    dropout_p: float = 0.0,
    norm: Part | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """drop(x W + b) + residual, and LayerNorm of that where there is a norm."""
    if isinstance(part, Affine) and (norm is None or isinstance(norm, Affine)) and not lowered(x):
        return linear(x, (part,), layout, residual=residual, norm=norm, eps=eps, dropout_p=dropout_p)
    return _close(project(x, part, layout), residual, dropout_p, norm, eps)


def _close(y: Tensor, residual: Tensor, dropout_p: float, norm: Part | None, eps: float) -> Tensor:
    """drop(y) + residual, and its norm."""
    if isinstance(norm, Affine):
        return layer_norm(y, norm, eps, residual, dropout_p)
    y = (torch.dropout(y, dropout_p, True) if dropout_p else y) + residual
    return y if norm is None else norm(y)  # type: ignore[no-any-return]


def feed_forward(
    x: Tensor,
    ffn: FeedForward,
    layout: str,
    residual: Tensor | None,
    position: str = "none",
    norm: Part | Scale | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
) -> Tensor:
    """See `bigmodel_kernels.feed_forward`; residual and norm are as exact under autocast as without it."""
    if ffn.hidden_p:
        args = (ffn, layout, residual, position, norm, eps, dropout_p)
        if ffn.recompute and torch.is_grad_enabled():
            return checkpoint(_feed_forward_in_steps, x, *args, use_reentrant=False)  # type: ignore[no-any-return]
        return _feed_forward_in_steps(x, *args)
    if isinstance(norm, nn.Module) or (position == "pre" and (norm is None or lowered(x) or _offset(norm))):
        return feed_forward(normalized(x, norm, eps), ffn, layout, residual, dropout_p=dropout_p)
    apart = residual is not None and lowered(x)
    if position == "post" and apart and residual is not None and not isinstance(norm, Scale):
        return _close(feed_forward(x, ffn, layout, None), residual, dropout_p, norm, eps)
    out: Tensor = call(
        "feed_forward",
        x,
        *ffn.w_in,
        *ffn.w_out,
        None if apart else residual,
        *_norm_tensors(norm),
        *((None, None) if ffn.w_gate is None else ffn.w_gate),
        draw_seed(dropout_p, x.device),
        activation=ffn.activation,
        weight_layout=layout,
        norm_position=position,
        **_norm_options(norm, eps),
        dropout_p=dropout_p,
        recompute=ffn.recompute,
    )
    return out + residual if apart and residual is not None else out


def _feed_forward_in_steps(
    x: Tensor,
    ffn: FeedForward,
    layout: str,
    residual: Tensor | None,
    position: str,
    norm: Part | Scale | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """The same with the hidden layer as a tensor, for its dropout, which the operator does not have."""
    states = normalized(x, norm, eps) if position == "pre" else x
    if ffn.w_gate is None:
        hidden = linear(states, (ffn.w_in,), layout, ffn.activation)
    else:
        hidden = linear(states, (ffn.w_gate,), layout, ffn.activation) * linear(states, (ffn.w_in,), layout)
    hidden = torch.dropout(hidden, ffn.hidden_p, True)
    if residual is None:
        out = linear(hidden, (ffn.w_out,), layout)
        return torch.dropout(out, dropout_p, True) if dropout_p else out
    assert not isinstance(norm, Scale) or position == "pre"
    behind = norm if position == "post" and not isinstance(norm, Scale) else None
    return output(hidden, ffn.w_out, layout, residual, dropout_p, behind, eps)


def gated_of_one(
    x: Tensor,
    gate_and_up: Part,
    activation: Callable[[Tensor], Tensor],
    down: Part,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The gated feed-forward in two products, where one weight holds gate and up, one after the other.

    `drop` is the dropout of the hidden layer.
    """
    gate, up = project(x, gate_and_up, "linear").chunk(2, dim=-1)
    hidden = up * activation(gate)
    return project(hidden if drop is None else drop(hidden), down, "linear")


def normalized(x: Tensor, norm: Part | Scale | None, eps: float = 1e-5) -> Tensor:
    if norm is None:
        return x
    if isinstance(norm, Scale):
        return rms_norm(x, norm)
    return layer_norm(x, norm, eps) if isinstance(norm, Affine) else norm(x)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, norm: Scale) -> Tensor:
    out: Tensor = call("rms_norm", x, norm.weight, norm.eps, weight_offset=norm.offset)
    return out


def _offset(norm: Affine | Scale) -> float:
    return norm.offset if isinstance(norm, Scale) else 0.0


def layer_norm(
    x: Tensor, norm: Affine, eps: float, residual: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    out: Tensor = call(
        *("layer_norm", x, norm.weight, norm.bias, eps, residual, draw_seed(dropout_p, x.device)),
        dropout_p=dropout_p,
    )
    return out


def terms(query: Tensor, key: Tensor, value: Tensor, seen: Visibility, scale: float) -> Terms:
    """Those of (B, heads, S, head size), with as many keys as are seen."""
    if seen.keys != key.shape[2]:
        key, value = key[:, :, : seen.keys], value[:, :, : seen.keys]
    left, right = (-1 if side is None else side for side in seen.sides)
    return Terms(query, key, value, scale, seen.padding, seen.bias, seen.causal, left, right)


def attention(terms: Terms, dropout_p: float = 0.0) -> Tensor:
    """The operator itself: (B, heads, S, head size), laid out in memory as (B, S, heads, head size), or
    (tokens, heads, head size) of packed rows.
    """
    ensure_sharding_rules(terms.query)
    out: Tensor = call(
        "attention",
        *(terms.query, terms.key, terms.value, terms.padding, terms.bias, terms.lengths, terms.lengths),
        draw_seed(dropout_p, terms.query.device),
        *(() if terms.sinks is None else (None, terms.sinks)),
        max_seqlen_q=terms.longest,
        max_seqlen_k=terms.longest,
        softmax_scale=terms.scale,
        is_causal=terms.is_causal,
        window_left=terms.window_left,
        window_right=terms.window_right,
        softcap=terms.softcap,
        dropout_p=dropout_p,
    )[0]
    return out


def attended(terms: Terms, dropout_p: float = 0.0) -> Tensor:
    """The heads' results side by side, (..., hidden)."""
    if terms.lengths is not None and terms.bias is not None:
        terms = _padded(terms)  # the operator takes no bias of packed rows
    out = attention(terms, dropout_p)
    if terms.lengths is not None:
        return out.flatten(-2)
    out = out.transpose(1, 2).flatten(2)
    return out if terms.packing is None else terms.packing.pack(out)


def _padded(terms: Terms) -> Terms:
    """Packed rows with a bias (1 or B, 1 or H, longest, longest) as a batch with padding behind them."""
    assert terms.lengths is not None
    mask = torch.arange(terms.longest, device=terms.query.device) < terms.lengths.diff()[:, None]
    dense = terms._replace(padding=mask, lengths=None, longest=0)

    def attend(*heads: Tensor) -> Terms:
        query, key, value = (t.transpose(1, 2) for t in heads)
        return dense._replace(query=query, key=key, value=value)

    return Packing(mask).padded(attend)(terms.query, terms.key, terms.value)


def post_norm_layer(x: Tensor, w: LayerParts, attend: Attend, layout: str = "linear") -> Tensor:
    """BERT's layer: the projections, attention, the projection of its result, and the feed-forward block."""
    held = whole_layer.held(x, w, layout)
    if held is None:
        terms = attend(*heads(x, w.qkv, layout, w.head_dim))
    else:
        terms = attend(*whole_layer.begin(x, None, 0.0, held, w.head_dim))
        if whole_layer.takes(terms, held, w.attention_p):
            return whole_layer.end(x, terms, w, held, "post")
    context = attended(terms, w.attention_p)
    x = output(context, w.attention_out, layout, x, w.context_p, w.attention_norm, w.attention_eps)
    if w.ffn is None or not isinstance(w.ffn_norm, Affine):
        return w.unfused(x)
    return feed_forward(x, w.ffn, layout, x, "post", w.ffn_norm, w.ffn_eps, w.ffn_p)


def pre_norm_layer(x: Tensor, w: LayerParts, attend: Attend, layout: str = "linear") -> Tensor:
    """GPT-2's layer: LayerNorm and then the same."""
    held = whole_layer.held(x, w, layout)
    if held is not None:
        terms = attend(*whole_layer.begin(x, w.attention_norm, w.attention_eps, held, w.head_dim))
        if whole_layer.takes(terms, held, w.attention_p):
            return whole_layer.end(x, terms, w, held, "pre")
    else:
        states = normalized(x, w.attention_norm, w.attention_eps)
        terms = attend(*heads(states, w.qkv, layout, w.head_dim))
    context = attended(terms, w.attention_p)
    x = output(context, w.attention_out, layout, x, w.context_p)
    if w.ffn is None or not isinstance(w.ffn_norm, Affine):
        return x + w.unfused(normalized(x, w.ffn_norm, w.ffn_eps))
    return feed_forward(x, w.ffn, layout, x, "pre", w.ffn_norm, w.ffn_eps, w.ffn_p)


def attention_half(
    x: Tensor,
    order: str,
    norm: Part | Scale,
    eps: float,
    out: Part,
    dropout_p: float,
    attend: Callable[[Tensor], Tensor],
) -> Tensor:
    """x + drop(attend(norm(x)) W), or with `order` "post" norm(x + drop(attend(x) W))."""
    if order == "post":
        assert not isinstance(norm, Scale)
        return output(attend(x), out, "linear", x, dropout_p, norm, eps)
    return output(attend(normalized(x, norm, eps)), out, "linear", x, dropout_p)


def feed_forward_half(
    x: Tensor,
    order: str,
    norm: Part | Scale,
    eps: float,
    ffn: FeedForward | None,
    unfused: Callable[[Tensor], Tensor],
    dropout_p: float,
) -> Tensor:
    """The same of the feed-forward, which is `unfused`, dropout included, for a `ffn` of None."""
    if order == "post":
        assert not isinstance(norm, Scale)
        if ffn is not None and isinstance(norm, Affine):
            return feed_forward(x, ffn, "linear", x, "post", norm, eps, dropout_p)
        y = unfused(x) if ffn is None else feed_forward(x, ffn, "linear", None, dropout_p=dropout_p)
        return _close(y, x, 0.0, norm, eps)
    if ffn is None:
        return unfused(normalized(x, norm, eps)) + x
    return feed_forward(x, ffn, "linear", x, "pre", norm, eps, dropout_p)


def decoder_layer(x: Tensor, w: DecoderParts, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """A layer of OPT, GPT-NeoX or GPT-J: the calls of `attend`, and three more."""
    if w.order in ("pre", "post") and w.ffn_norm is not None:
        x = attention_half(
            *(x, w.order, w.attention_norm, w.attention_eps, w.attention_out, w.attention_p, attend)
        )
        return feed_forward_half(x, w.order, w.ffn_norm, w.ffn_eps, w.ffn, w.unfused, w.ffn_p)
    states = normalized(x, w.attention_norm, w.attention_eps)
    x = states if w.order == "normed" else x
    y = output(attend(states), w.attention_out, "linear", x, w.attention_p)
    if w.order == "normed":
        states = y = normalized(y, w.ffn_norm, w.ffn_eps)
        w = w._replace(ffn_norm=None)
    elif w.ffn_norm is not None:
        states = x
    if w.ffn is None:
        return w.unfused(normalized(states, w.ffn_norm, w.ffn_eps)) + y
    return feed_forward(states, w.ffn, "linear", y, "pre", w.ffn_norm, w.ffn_eps, w.ffn_p)


def gated_layer(x: Tensor, w: GatedParts, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Llama's layer: RMSNorm, the calls of `attend`, and two more."""
    context = attend(normalized(x, w.attention_norm))
    if w.attention_outer_norm is None and w.multiplier == 1:
        x = output(context, w.attention_out, "linear", x, w.attention_p)
    else:
        y = project(context, w.attention_out, "linear")
        x = _sum(y, w.attention_outer_norm, x, w.attention_p, w.multiplier)
    whole = w.ffn_outer_norm is None and w.multiplier == 1
    if w.ffn is None:
        y = w.unfused(normalized(x, w.ffn_norm))
    elif whole:
        return feed_forward(x, w.ffn, "linear", x, "pre", w.ffn_norm, dropout_p=w.ffn_p)
    else:
        y = feed_forward(x, w.ffn, "linear", None, "pre", w.ffn_norm)
    return _sum(y, w.ffn_outer_norm, x, w.ffn_p, w.multiplier)


def _sum(y: Tensor, norm: nn.Module | None, residual: Tensor, dropout_p: float, multiplier: float) -> Tensor:
    """residual + multiplier * drop(norm(y))"""
    y = normalized(y, norm)
    y = torch.dropout(y, dropout_p, True) if dropout_p else y
    return torch.add(residual, y, alpha=multiplier)


class Packing:
    """Batches without their padding: which rows are real, and where the sequences begin.

    `pack` keeps the real tokens in one (tokens, hidden) tensor; `unpack` puts them back, with zeros for the
    padding.
    """

    def __init__(self, mask: Tensor) -> None:
        """mask: bool (B, S), True is a real token; any pattern."""
        self.shape = mask.shape
        lengths = mask.sum(dim=1, dtype=torch.int32)
        self.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.longest = int(lengths.max())
        self.index = mask.flatten().nonzero().flatten()

    def unbroken(self) -> bool:
        """Whether the real tokens of each sequence follow each other, padding before or behind them."""
        begins, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        there = ends > begins
        first, last = self.index[begins[there]], self.index[ends[there] - 1]
        return bool((last - first < (ends - begins)[there]).all())

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        batch, length = self.shape
        out = torch.zeros(batch * length, x.shape[-1], dtype=x.dtype, device=x.device)
        return out.index_copy(0, self.index, x).view(batch, length, -1)

    def unpack_heads(self, x: Tensor) -> Tensor:
        """(tokens, heads, head size) as (B, S, heads, head size)."""
        return self.unpack(x.flatten(1)).unflatten(-1, x.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """x as one sequence of real tokens, (1, tokens, hidden), if it is not so yet."""
        return self.pack(x)[None] if x.shape[:2] == self.shape else x

    def dense(self, x: Tensor) -> Tensor:
        """The reverse of `rows`."""
        return x if x.shape[:2] == self.shape else self.unpack(x[0])

    def terms(self, query: Tensor, key: Tensor, value: Tensor, scale: float, side: int = -1) -> Terms:
        """Attention of each sequence on itself; with `side`, on as many neighbours to the left and right."""
        return Terms(
            *(query, key, value, scale),
            window_left=side,
            window_right=side,
            lengths=self.cu_seqlens,
            longest=self.longest,
        )

    def padded(self, attend: Attend) -> Attend:
        """`attend` of (B, S, heads, head size), for packed tokens: attention alone runs with the padding."""

        def terms(*heads: Tensor) -> Terms:
            return attend(*map(self.unpack_heads, heads))._replace(packing=self)

        return terms

    def attend(self, scale: float) -> Attend:
        return lambda query, key, value: self.terms(query, key, value, scale)
