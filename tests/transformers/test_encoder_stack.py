"""All layers of an encoder on few tokens in one call: only where it may, and then nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bigmodel_kernels as bk
from bigmodel_kernels import backends
from bigmodel_kernels.models.rule import assert_as_near, eager_of, float64_of
from bigmodel_kernels.models.tiny import encoder as encoder_alone
from bigmodel_kernels.models.tiny import holes, left_padding, right_padding, seq2seq, token_ids
from bigmodel_kernels.ops.native_library import unavailable
from bigmodel_kernels.transformers import layer_stack, whole_layer

pytestmark = pytest.mark.skipif(
    unavailable(torch.float32) is not None or backends.forced() not in (None, "native"),
    reason="the compiled library does not run",
)

#: One of each form and order, one with a gate, and Whisper, whose keys have no bias.
SEQ2SEQ = ("T5", "MT5", "UMT5", "Bart", "MBart", "Whisper")
#: Those without a decoder: where they are in a model.
OTHERS = {
    "ViT": lambda: encoder_alone("ViT").vit,
    "DeiT": lambda: encoder_alone("DeiT").deit,
    "CLIP": lambda: encoder_alone("CLIP").text_model,  # causal
    "Siglip": lambda: encoder_alone("Siglip").text_model,
    "CLIP's images": lambda: encoder_alone("CLIP").vision_model,
}
KINDS = (*SEQ2SEQ, *OTHERS)
GPT_LIKE = ("vit", "deit", "clip", "siglip")
#: Which of them get no mask.
UNMASKED = {"Whisper": (6, 34), "ViT": (3, 12, 12), "DeiT": (3, 12, 12), "CLIP's images": (3, 12, 12)}
BY_CLASS = {
    "WhisperEncoder": "Whisper",
    "ViTModel": "ViT",
    "DeiTModel": "DeiT",
    "CLIPVisionModel": "CLIP's images",
}


def encoder_of(prefix: str) -> Any:
    return OTHERS[prefix]() if prefix in OTHERS else seq2seq(prefix, "Model").get_encoder()


@pytest.fixture(params=KINDS)
def encoder(request: pytest.FixtureRequest) -> Any:
    model = encoder_of(request.param)
    bk.patch(model)
    return model


@pytest.fixture
def together(watch: Any) -> list[int]:
    """How many layers each call of all of them was for."""
    seen: list[int] = []
    watch("encoded", lambda x, layers: seen.append(len(layers)))
    return seen


def layers_of(encoder: Any) -> Any:
    encoder = getattr(encoder, "encoder", encoder)
    return encoder.block if hasattr(encoder, "block") else encoder.layers


def unmasked(encoder: Any) -> tuple[int, ...] | None:
    """The shape of what it is given instead of tokens."""
    return UNMASKED.get(BY_CLASS.get(type(encoder).__name__, ""))


def states(encoder: Any, padding: Callable[[], torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        if (shape := unmasked(encoder)) is not None:
            return encoder(torch.randn(3, *shape, dtype=encoder.dtype), **options)[0]  # type: ignore[no-any-return]
        mask = None if padding is None else padding()
        return encoder(token_ids(), attention_mask=mask, **options)[0]  # type: ignore[no-any-return]


def separately(encoder: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(whole_layer, "encoded", lambda *args: None)
        return states(encoder, *args, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", [None, left_padding, right_padding])
def test_bits_are_those_of_the_layers(
    padding: Any, dtype: torch.dtype, encoder: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.to(dtype)
    ours, expected = states(encoder, padding), separately(encoder, monkeypatch, padding)
    clamps = dtype is torch.float16 and layers_of(encoder)[0].__module__.split(".")[-1] not in GPT_LIKE
    assert together == ([] if clamps else [2])
    if padding is right_padding and together and type(encoder).__name__.endswith("T5Stack"):
        assert not ours[right_padding() == 0].any()  # the layers alone keep it
    else:
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [left_padding, right_padding, holes])
@pytest.mark.parametrize("prefix", KINDS)
def test_as_near_as_eager(prefix: str, padding: Any, dtype: torch.dtype, together: list[int]) -> None:
    if (prefix, padding) == ("CLIP", left_padding):
        pytest.skip("eager in float64 has NaN where the first queries see nothing")
    model = encoder_of(prefix).to(dtype)
    eager, reference = eager_of(model), float64_of(model)
    bk.patch(model)
    outputs = (states(m, padding) for m in (model, eager, reference))
    assert_as_near(*outputs, where=None if prefix in UNMASKED else padding().bool())
    assert together == [2]


@pytest.mark.parametrize("prefix", ["T5", "UMT5"])
def test_many_tokens_with_padding_take_a_call_for_each_layer(
    prefix: str, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder_of(prefix)
    bk.patch(model)
    ours = states(model, right_padding)
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 5)
    assert torch.equal(ours, states(model, right_padding)) and together == [2, 2]


def test_many_tokens_go_layer_by_layer(
    encoder: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_layer, "MOST_ROWS", 20)
    ours = states(encoder)
    assert together == []
    assert torch.equal(ours, separately(encoder, monkeypatch))


def own_keys() -> torch.Tensor:
    """Of the user's own: which keys all queries see."""
    return right_padding().bool()[:, None, None]


def own_pairs() -> torch.Tensor:
    """Which keys each query sees."""
    return torch.ones(3, 1, 17, 17, dtype=torch.bool).tril()


@pytest.mark.parametrize("mask", [own_keys, own_pairs])
@pytest.mark.parametrize("prefix", ["T5", "Bart", "MBart"])
def test_masks_of_the_users_own(
    prefix: str, mask: Callable[[], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder_of(prefix)
    original = copy.deepcopy(model)
    bk.patch(model)
    ours = states(model, mask)
    assert torch.equal(ours, separately(model, monkeypatch, mask))
    torch.testing.assert_close(ours, states(original, mask), atol=1e-5, rtol=1e-5)


WATCHED: dict[str, Callable[[Any], Any]] = {
    "a hook before a layer": lambda layers: layers[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 2, *args[1:])
    ),
    "a hook within": lambda layers: next(
        part for name, part in layers[1].named_modules() if name.split(".")[-1] in ("fc1", "wi", "wi_1")
    ).register_forward_hook(lambda *a: a[2] * 2),
    "a forward of its own": lambda layers: setattr(
        layers[1],
        "forward",
        lambda x, *a, **kw: (2 * x, None, None) if type(layers[1]).__name__.endswith("T5Block") else 2 * x,
    ),
}


@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_a_layer_sees_it_run(
    name: str, encoder: Any, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "a forward of its own" and type(encoder).__name__ == "UMT5Stack":
        pytest.skip("its layers return the states alone, as others than T5's do")
    WATCHED[name](layers_of(encoder))
    ours = states(encoder)
    assert together == []
    assert torch.equal(ours, separately(encoder, monkeypatch))


def test_outputs_of_each_layer(encoder: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("output_hidden_states", "output_attentions"):
        assert torch.equal(states(encoder, **{kind: True}), separately(encoder, monkeypatch, **{kind: True}))
    assert together == []
    states(encoder)
    assert together == [2]  # whose hooks stay, and are idle


def test_edited_weights_are_seen(encoder: Any, together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    before = states(encoder)
    for name, parameter in layers_of(encoder)[0].named_parameters():
        with torch.no_grad():
            parameter.data.add_(torch.rand_like(parameter) / 8)
        after = states(encoder)
        assert torch.equal(after, separately(encoder, monkeypatch)), name
        assert not torch.equal(before, after) or name.endswith("k_proj.bias"), name
        before = after
    assert set(together) == {2}


def test_in_training_and_with_gradients(encoder: Any, together: list[int]) -> None:
    with torch.enable_grad():
        shape = unmasked(encoder)
        encoder(token_ids() if shape is None else torch.randn(3, *shape))
    encoder.train()
    states(encoder)
    assert together == [] and layer_stack.current() is None


def test_a_stack_with_a_layer_that_cannot_be_fused_is_left_alone() -> None:
    model = encoder_of("T5")
    model.block[1].layer[1].DenseReluDense.act = torch.nn.Tanh()
    report = bk.patch(model)
    assert report.rows[0].status != "patched" and "layer.1" in (report.rows[0].reason or "")
