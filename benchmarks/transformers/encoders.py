"""A batch through every other family of encoders that `patch` knows, beside transformers with the attention
that it takes by itself (sdpa, or eager where a family has no other): twelve layers of 768 features with
random weights. BERT has a suite of its own.

A text or an image alone, where what counts is how many calls it takes next to reading the weights, and a
padded batch, of which results are compared at real tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite

#: Sizes by the names that most configs have.
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
_TEXTS = {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
_DEBERTA = {
    **{"relative_attention": True, "position_buckets": 256, "share_att_key": True},
    **{"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "type_vocab_size": 0,
}

#: Of a family the model's class, its config's, the names of its sizes, and what the config has beside them.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "RoBERTa": ("RobertaModel", "RobertaConfig", _NAMES, {}),
    "ELECTRA": ("ElectraModel", "ElectraConfig", _NAMES, {"embedding_size": 768}),
    "DistilBERT": ("DistilBertModel", "DistilBertConfig", ("dim", "n_layers", "n_heads", "hidden_dim"), {}),
    "ALBERT": ("AlbertModel", "AlbertConfig", _NAMES, {"embedding_size": 128}),
    "MPNet": ("MPNetModel", "MPNetConfig", _NAMES, {}),
    "DeBERTa v3": ("DebertaV2Model", "DebertaV2Config", _NAMES, _DEBERTA),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", _NAMES, _IDS),
    "T5": (
        *("T5EncoderModel", "T5Config", ("d_model", "num_layers", "num_heads", "d_ff")),
        {"decoder_start_token_id": 0},
    ),
    "CLIP's texts": ("CLIPTextModel", "CLIPTextConfig", _NAMES, _TEXTS),
    "SigLIP's texts": ("SiglipTextModel", "SiglipTextConfig", _NAMES, _TEXTS),
    "ViT": ("ViTModel", "ViTConfig", _NAMES, {}),
    "SigLIP's images": ("SiglipVisionModel", "SiglipVisionConfig", _NAMES, {}),
}
#: Those that see images of 224 by 224 in patches of 16.
IMAGES = ("ViT", "SigLIP's images")


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    model_name, config_name, names, beside = FAMILIES[sizes["family"]]
    hidden, layers, inner = sizes["hidden"], sizes["layers"], sizes["inner"]
    images = sizes["family"] in IMAGES
    held = {} if images else {"vocab_size": sizes["vocabulary"], "pad_token_id": 0}
    counts = zip(names, (hidden, layers, sizes["heads"], inner), strict=True)
    config = getattr(transformers, config_name)(**{**held, **dict(counts), **beside})
    dtype = getattr(torch, case.dtype)
    with torch.device(setting.device):
        model = getattr(transformers, model_name)._from_config(config, dtype=dtype)
    model.eval()
    ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    bk.patch(ours)
    generator, inputs, real = torch.Generator().manual_seed(0), {}, None
    if images:
        side = config.image_size
        pixels = torch.randn(sizes["batch"], 3, side, side, generator=generator, dtype=dtype)
        inputs["pixel_values"] = pixels.to(setting.device)
        lengths = [(side // config.patch_size) ** 2 + (sizes["family"] == "ViT")] * sizes["batch"]
    else:
        longest = sizes["longest"]
        lengths = torch.randint(
            sizes["shortest"], longest + 1, (sizes["batch"],), generator=generator
        ).tolist()
        lengths[0] = longest
        real = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        ids = torch.randint(3, sizes["vocabulary"], real.shape, generator=generator)
        inputs["input_ids"] = (ids * real).to(setting.device)
        inputs["attention_mask"] = real.long().to(setting.device)

    def runs(twin: Any) -> Any:
        return lambda: twin(**inputs).last_hidden_state

    def compared(result: Any) -> Any:
        return result if real is None else result[real.to(result.device)]

    gated = sizes["family"] == "ModernBERT"
    parameters = layers * (4 * hidden * hidden + (3 if gated else 2) * hidden * inner)
    flops = 2 * sum(lengths) * parameters + layers * sum(4 * n * n * hidden for n in lengths)
    work = Stage(flops, parameters * model.dtype.itemsize)
    contenders = [Contender("transformers", runs(model)), Contender("bigmodel", runs(ours))]
    return Prepared(contenders, "transformers", [work], comparable=compared, items=sum(lengths))


SIZES = {"hidden": 768, "layers": 12, "heads": 12, "inner": 3072, "vocabulary": 8000}
TINY = {"hidden": 64, "layers": 2, "heads": 4, "inner": 96, "vocabulary": 500}
#: Batches by their names, of texts and of images alike.
BATCHES = {
    "alone": {"batch": 1, "shortest": 16, "longest": 16},
    "batch": {"batch": 8, "shortest": 8, "longest": 128},
}


def case(family: str, batch: str, dtype: str, tiny: bool = False) -> Case:
    sizes = {"family": family, **BATCHES[batch], **(TINY if tiny else SIZES)}
    return Case(f"{'tiny ' if tiny else ''}{family}, {batch}", dtype, sizes)


SUITE = Suite(
    "encoders",
    build,
    cases=tuple(
        case(family, batch, dtype)
        for dtype in ("float32", "bfloat16")
        for family in FAMILIES
        for batch in BATCHES
    ),
    quick=tuple(case(family, "batch", "float32", tiny=True) for family in ("DeBERTa v3", "CLIP's texts")),
)
