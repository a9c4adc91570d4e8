"""A token of a generation by every family of decoders that `patch` knows, beside transformers with the
attention that it takes by itself (sdpa, or eager where a family has no other): twelve layers of 768 features
with random weights, one text.

Here a model is called for next to nothing to compute, so that what counts is how many calls a token takes,
next to reading the weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, texts

#: Sizes by the names that most configs have; Llama's kind has keys for groups of queries and a gate.
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_GROUPS = {"num_key_value_heads": 4}
_GPT = ("n_embd", "n_layer", "n_head", "n_inner")

#: The prefix of a family's classes, the names of its sizes, and what its config has beside them.
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "GPT2": (_GPT, {}),
    "OPT": ((*_NAMES[:3], "ffn_dim"), {"word_embed_proj_dim": 768}),
    "GPTNeoX": (_NAMES, {}),
    "GPTJ": (_GPT, {"rotary_dim": 64}),
    "CodeGen": (_GPT, {"rotary_dim": 64, "n_ctx": 512}),
    "GPTNeo": (
        ("hidden_size", "num_layers", "num_heads", "intermediate_size"),
        {"attention_types": [[["global", "local"], 6]]},
    ),
    "Bloom": (("hidden_size", "n_layer", "n_head"), {}),
    "Falcon": (_NAMES[:3], {}),
    "Phi": (_NAMES, {}),
    "Starcoder2": (_NAMES, _GROUPS),
    "StableLm": (_NAMES, _GROUPS),
    "Llama": (_NAMES, _GROUPS),
    "Mistral": (_NAMES, _GROUPS),
    "Qwen2": (_NAMES, _GROUPS),
    "Qwen3": (_NAMES, {**_GROUPS, "head_dim": 64}),
    "Gemma": (_NAMES, {**_GROUPS, "head_dim": 64}),
    "Gemma2": (_NAMES, {**_GROUPS, "head_dim": 64}),
    "Gemma3": (_NAMES, {**_GROUPS, "head_dim": 64}),
    "Phi3": (_NAMES, _GROUPS),
    "Olmo2": (_NAMES, _GROUPS),
    "Granite": (_NAMES, _GROUPS),
    "SmolLM3": (_NAMES, _GROUPS),
}


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    prefix, prompt, new = sizes["family"], sizes["prompt"], sizes["new"]
    names, beside = FAMILIES[prefix]
    kind = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    config = kind(
        vocab_size=sizes["vocabulary"],
        **{"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
        **{
            **dict(zip(names, (sizes[n] for n in ("hidden", "layers", "heads", "inner")), strict=False)),
            **beside,
        },
    )
    model_class = getattr(transformers, f"{prefix}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}")
    with torch.device(setting.device):
        model = model_class._from_config(config, dtype=getattr(torch, case.dtype))
    model.eval()
    ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    bk.patch(ours)
    ids = torch.randint(2, sizes["vocabulary"], (1, prompt), device=setting.device)

    def runs(twin: Any) -> Any:
        return lambda: texts.greedy(twin, ids, new)

    def compared(result: Any) -> Any:
        if case.dtype == "float32":
            return result
        logits = model(result[:, :-1]).logits[:, prompt - 1 :]
        return texts.beside_the_largest(logits, result[:, prompt:])

    read = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    # Of a table next to a head of its own a token reads one row; one that is tied is read as the head.
    if not config.tie_word_embeddings:
        read -= sizes["vocabulary"] * sizes["hidden"]
    stages = [Stage(2 * read * prompt, read * model.dtype.itemsize)]
    stages += [Stage(2 * read, read * model.dtype.itemsize)] * (new - 1)
    contenders = [Contender("transformers", runs(model)), Contender("bigmodel", runs(ours))]
    return Prepared(contenders, "transformers", stages, comparable=compared, items=new)


SIZES = {"hidden": 768, "layers": 12, "heads": 12, "inner": 3072, "vocabulary": 8000, "prompt": 16, "new": 32}
TINY = {"hidden": 64, "layers": 2, "heads": 4, "inner": 96, "vocabulary": 500, "prompt": 8, "new": 4}


def case(family: str, dtype: str, tiny: bool = False) -> Case:
    return Case(f"{'tiny ' if tiny else ''}{family}", dtype, {"family": family, **(TINY if tiny else SIZES)})


SUITE = Suite(
    "decoders",
    build,
    cases=tuple(case(family, dtype) for dtype in ("float32", "bfloat16") for family in FAMILIES),
    quick=(case("GPTNeoX", "float32", tiny=True), case("Mistral", "float32", tiny=True)),
)
