"""Trains a small GPT-2 on the source of Python's standard library, and lets it write a function.

python examples/tiny_gpt_stdlib.py --steps 500
python examples/tiny_gpt_stdlib.py --model FOLDER_OR_NAME --dataset texts.txt    # or column text
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import data, models, texts

LENGTH, BATCH = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: a small GPT-2 with new weights")
    parser.add_argument("--dataset", help="file or name of a data set with a column text")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    records = data.load(arguments.dataset) if arguments.dataset else texts.source_files()
    words = [record["text"] for record in records]
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
    else:
        tokenizer = models.train_tokenizer("small-gpt2", words, vocabulary=4000)
        end = tokenizer.eos_token_id
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=LENGTH, n_embd=256, n_layer=4, n_head=4, eos_token_id=end
        )
        model = GPT2LMHeadModel(config)
    model = model.to(arguments.device).train()
    print(str(bk.patch(model)).splitlines()[0])

    stream = torch.tensor([token for ids in tokenizer(words)["input_ids"] for token in ids])
    length = min(LENGTH, len(stream) // 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(arguments.steps):
        starts = torch.randint(len(stream) - length, (BATCH,)).tolist()
        ids = torch.stack([stream[start : start + length] for start in starts]).to(arguments.device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step:>4}  loss {loss.item():.3f}  perplexity {loss.exp().item():.1f}")

    model.eval()
    prompt = tokenizer("def ", return_tensors="pt").to(arguments.device)
    new = min(60, length - prompt["input_ids"].shape[1])
    text = model.generate(
        input_ids=prompt["input_ids"], max_new_tokens=new, do_sample=True, top_k=20, pad_token_id=0
    )
    print(tokenizer.decode(text[0]))


if __name__ == "__main__":
    main()
