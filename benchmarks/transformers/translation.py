"""Encoder-decoders as transformers has them (sdpa), and patched: greedy generation behind an encoder, of the
sizes of Marian's translators (Opus-MT), T5-small and BART-base. Beside other runtimes CTranslate2 is there,
which is made for them.

Weights are random: speed does not depend on them. Generated tokens must be the same in float32; in the half
types each token's logit is compared with the largest, as in `gpt2.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import bigmodel_kernels as bk
from bigmodel_kernels.bench import Case, Contender, Prepared, Setting, Stage, Suite, peers, texts

#: Config and language model.
MODELS: dict[str, tuple[str, str]] = {
    "marian": ("MarianConfig", "MarianMTModel"),
    "t5": ("T5Config", "T5ForConditionalGeneration"),
    "bart": ("BartConfig", "BartForConditionalGeneration"),
}


def config_of(case: Case) -> Any:
    sizes = case.sizes
    hidden, layers, heads = sizes["hidden"], sizes["layers"], sizes["heads"]
    name, vocabulary = sizes["model"], sizes["vocabulary"]
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=vocabulary,
            d_model=hidden,
            d_kv=hidden // heads,
            d_ff=sizes["inner"],
            num_layers=layers,
            num_heads=heads,
            decoder_start_token_id=0,
        )
    else:
        last = vocabulary - 1  # Marian's padding, which its decoder starts with
        options: dict[str, Any] = {"pad_token_id": last, "decoder_start_token_id": last, "eos_token_id": 0}
        options |= {"scale_embedding": True, "activation_function": "swish"}
        config = getattr(transformers, MODELS[name][0])(
            vocab_size=vocabulary,
            d_model=hidden,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=sizes["inner"],
            decoder_ffn_dim=sizes["inner"],
            max_position_embeddings=512,
            **(options if name == "marian" else {}),
        )
    config.forced_bos_token_id = config.forced_eos_token_id = None
    return config


def build(case: Case, setting: Setting) -> Prepared:
    sizes = case.sizes
    hidden, layers, vocabulary, inner = (sizes[n] for n in ("hidden", "layers", "vocabulary", "inner"))
    batch, prompt, new = sizes["batch"], sizes["prompt"], sizes["new"]
    dtype, config = getattr(torch, case.dtype), config_of(case)
    cls = getattr(transformers, MODELS[sizes["model"]][1])
    with torch.device(setting.device):  # made there, in the dtype
        model = cls._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.eval()
    ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    bk.patch(ours)
    ids = torch.randint(10, vocabulary - 10, (batch, prompt), device=setting.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def runs(twin: Any) -> Any:
        return lambda: twin.generate(
            **inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1
        )

    def compared(result: Any) -> Any:
        if case.dtype == "float32":
            return result
        logits = model(**inputs, decoder_input_ids=result[:, :-1]).logits
        # The end of a text, which is not to come yet, may be the likeliest.
        logits[..., config.eos_token_id] = float("-inf")
        return texts.beside_the_largest(logits, result[:, 1:])

    contenders = [Contender("sdpa", runs(model)), Contender("bigmodel", runs(ours))]
    if setting.peers:
        key = (*sizes.values(), case.dtype)
        contenders += peers.contenders(setting, peers.translators(model, case.dtype, new), key, ids)
    itemsize, square = model.dtype.itemsize, hidden * hidden
    encoder, decoder = layers * (4 * square + 2 * hidden * inner), layers * (6 * square + 2 * hidden * inner)
    crossed, head = layers * 2 * square, vocabulary * hidden

    def step(seen: int) -> Stage:
        """A token of each sequence, which attends to those before and to all of the encoder's."""
        keys = layers * (seen + prompt) * hidden
        flops = 2 * batch * (decoder + head + 2 * keys)
        return Stage(flops, (decoder + head + 2 * batch * keys) * itemsize)

    rows = 2 * batch * prompt
    stages = [
        Stage(rows * (encoder + crossed + 2 * layers * prompt * hidden), (encoder + crossed) * itemsize)
    ]
    stages += [step(i + 1) for i in range(new)]
    return Prepared(contenders, "sdpa", stages, comparable=compared, items=batch * new)


SIZES: dict[str, dict[str, int]] = {
    "marian": {"hidden": 512, "layers": 6, "heads": 8, "inner": 2048, "vocabulary": 58101},
    "t5": {"hidden": 512, "layers": 6, "heads": 8, "inner": 2048, "vocabulary": 32128},
    "bart": {"hidden": 768, "layers": 6, "heads": 12, "inner": 3072, "vocabulary": 50265},
}
TINY = {"hidden": 64, "layers": 2, "heads": 2, "inner": 96, "vocabulary": 500}


def case(model: str, dtype: str, batch: int, prompt: int, new: int, tiny: bool = False) -> Case:
    sizes = {"model": model, **(TINY if tiny else SIZES[model]), "batch": batch, "prompt": prompt, "new": new}
    return Case(f"{'tiny ' if tiny else ''}{model} {batch}x({prompt}+{new})", dtype, sizes)


SUITE = Suite(
    "translation",
    build,
    cases=tuple(
        case(model, dtype, batch, 32, 64)
        for dtype in ("float32", "bfloat16")
        for model in MODELS
        for batch in (1, 8)
    ),
    quick=tuple(case(model, "float32", 2, 8, 4, tiny=True) for model in MODELS),
)
