"""Models and tokenizers: packaged, by name or folder, or small ones built from a config for the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import bigmodel_kernels as bk
from bigmodel_kernels.extras import loading, minilm, package
from bigmodel_kernels.finetune.settings import Settings

if TYPE_CHECKING:
    from bigmodel_kernels.transformers import PatchReport

#: What configs call their dropouts.
_DROPOUT = re.compile(r"dropout(_rate|_prob)?$|_pdrop$")


def small_bert(s: Settings, special: dict[str, int], length: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=special["size"],
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=4 * s.hidden,
        max_position_embeddings=length,
        pad_token_id=special["pad"],
    )


def small_gpt2(s: Settings, special: dict[str, int], length: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=special["size"],
        n_embd=s.hidden,
        n_layer=s.layers,
        n_head=s.heads,
        n_positions=length,
        bos_token_id=special["end"],
        eos_token_id=special["end"],
        pad_token_id=special["pad"],
    )


def small_t5(s: Settings, special: dict[str, int], length: int) -> Any:
    from transformers import T5Config

    return T5Config(
        vocab_size=special["size"],
        d_model=s.hidden,
        d_kv=s.hidden // s.heads,
        d_ff=4 * s.hidden,
        num_layers=s.layers,
        num_decoder_layers=s.layers,
        num_heads=s.heads,
        pad_token_id=special["pad"],
        eos_token_id=special["end"],
        decoder_start_token_id=special["pad"],  # type: ignore[call-arg]
    )


def small_bart(s: Settings, special: dict[str, int], length: int) -> Any:
    from transformers import BartConfig

    return BartConfig(
        vocab_size=special["size"],
        d_model=s.hidden,
        encoder_layers=s.layers,
        decoder_layers=s.layers,
        encoder_attention_heads=s.heads,
        decoder_attention_heads=s.heads,
        encoder_ffn_dim=4 * s.hidden,
        decoder_ffn_dim=4 * s.hidden,
        max_position_embeddings=length,
        pad_token_id=special["pad"],
        bos_token_id=special["end"],
        eos_token_id=special["end"],
        decoder_start_token_id=special["end"],
        forced_eos_token_id=None,
    )


SMALL: dict[str, Callable[[Settings, dict[str, int], int], Any]] = {
    "small-bert": small_bert,
    "small-gpt2": small_gpt2,
    "small-t5": small_t5,
    "small-bart": small_bart,
}


def train_tokenizer(model: str, texts: Iterable[str], vocabulary: int) -> Any:
    """A tokenizer for a small model by BPE: of characters for small-bert, of bytes for the others."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    if model == "small-bert":
        # As BERT's: lower case, words and punctuation apart, each Chinese character a word. But BPE with a
        # mark where a word begins: WordPiece's vocabulary comes out in another order each time.
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        core = Tokenizer(kinds.BPE(unk_token="[UNK]"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        )
        core.decoder = decoders.Metaspace()
        alphabet: list[str] = []
    else:
        names = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        core = Tokenizer(kinds.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(names.values()),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if model == "small-bert":
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
        )
    elif model != "small-gpt2":  # an encoder and a decoder learn where a text ends
        core.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{f"{name}_token": token for name, token in names.items()}
    )


def source(settings: Settings) -> str:
    """Name or folder for `from_pretrained`."""
    assert settings.model is not None
    if settings.model == "minilm":
        return str(minilm("finetune"))
    return settings.model


def _pretrained(settings: Settings, kind: Any, **how: Any) -> Any:
    """What `kind` loads of the model that the settings name. Raises ValueError where it cannot be loaded."""
    named = source(settings)
    with loading(named):
        return kind.from_pretrained(named, **how)


def tokenizer(settings: Settings, texts: Iterable[str], saved: Path) -> Any:
    """The tokenizer: the one in the run's folder if there is one, else a new one."""
    import transformers

    if saved.is_dir():
        return transformers.AutoTokenizer.from_pretrained(saved)
    if settings.model in SMALL:
        made = train_tokenizer(settings.model, texts, settings.vocabulary)
    else:
        made = _pretrained(settings, transformers.AutoTokenizer)
    if made.pad_token is None:
        made.pad_token = made.eos_token
    return made


def save_tokenizer(made: Any, folder: Path) -> None:
    """Saves it, whole or not at all, where it is not there yet."""
    if not folder.is_dir():
        beside = folder.with_name(f".{folder.name}.writing")
        made.save_pretrained(beside)
        beside.rename(folder)


def build(settings: Settings, auto_class: Any, tokens: Any, length: int, **changes: Any) -> Any:
    """The model, not yet patched. `length` is how many positions it must have; `changes` go to its config."""
    import transformers

    if settings.model in SMALL:
        end = tokens.sep_token_id if settings.model == "small-bert" else tokens.eos_token_id
        special = {"size": len(tokens), "pad": tokens.pad_token_id, "end": end}
        config = SMALL[settings.model](settings, special, length)
    else:
        config = _pretrained(settings, transformers.AutoConfig)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < length:
        raise ValueError(f"max_length={length}; the model has {positions} positions")
    for name, value in changes.items():
        setattr(config, name, value)
    if settings.dropout is not None:
        set_dropout(config, settings.dropout)
    # Patched starts from what transformers itself would take, for the parts that are left alone.
    how = {} if settings.implementation == "patched" else {"attn_implementation": settings.implementation}
    if settings.model in SMALL:
        model = auto_class.from_config(config, **how)
    else:
        model = _pretrained(settings, auto_class, config=config, **how)
    if settings.freeze_layers:
        freeze(model, settings.freeze_layers)
    return add_lora(model, settings.lora) if settings.lora else model


def set_dropout(config: Any, p: float) -> None:
    """Sets every dropout of a config."""
    names = [name for name in config.to_dict() if _DROPOUT.search(name)]
    if not names:
        raise ValueError(f"dropout={p}: a {type(config).__name__} has no dropout")
    for name in names:
        setattr(config, name, p)


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of layers: one in an encoder or a decoder, two in a model with both."""
    found: list[nn.ModuleList] = []
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f"{outer}.") for outer, m in model.named_modules() if m in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
            found.append(module)
    return found


def freeze(model: nn.Module, layers: int) -> None:
    """Leaves the embeddings and the first layers of each stack untrained."""
    lists = stacks(model)
    shortest = min((len(stack) for stack in lists), default=0)
    if layers > shortest:
        raise ValueError(f"freeze_layers={layers}; the model has {shortest} layers")
    frozen = [layer for stack in lists for layer in stack[:layers]]
    frozen += [
        m for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith("embeddings")
    ]
    for module in frozen:
        module.requires_grad_(False)


def add_lora(model: Any, rank: int) -> Any:
    """Low-rank adapters (arXiv:2106.09685) on the projections that peft knows for the model; the rest is
    frozen, but for a new head.
    """
    peft = package("peft", "peft", "finetune")
    kinds = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "LMHeadModel": "CAUSAL_LM",
        "ForCausalLM": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    name = type(model).__name__
    kind = next((value for ending, value in kinds.items() if name.endswith(ending)), None)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, r=rank, lora_alpha=2 * rank))


def patch(model: nn.Module, settings: Settings) -> PatchReport | None:
    """Patches the model if the settings say so."""
    if settings.implementation != "patched":
        return None
    return bk.patch(model, fused_loss=settings.fused_loss, recompute=settings.recompute)


def count(model: nn.Module) -> dict[str, int]:
    """How many weights there are, and how many are trained."""
    return {
        "all": sum(p.numel() for p in model.parameters()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def save(model: Any, folder: Path) -> None:
    """For `from_pretrained`: the model, or with LoRA its adapters, which peft reads."""
    bk.unpatch(model)
    model.save_pretrained(folder)
