"""Trains BERT to find an answer in a text (SQuAD's task), then asks it a question.

    python examples/question_answering.py --output runs/questions
    python examples/question_answering.py --output runs/squad --model NAME --dataset squad

Without a data set: cloze questions over Python's help topics. The training is that of `bigmodel-kernels
finetune`: with checkpoints, and Ctrl-C may be followed by the same command with --resume.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import Settings, data, finetune, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", default="runs/question-answering", help="folder of the run")
    parser.add_argument("--model", help="name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", help="file or name of a data set with question, context, answers")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    settings = Settings(
        task="question-answering",
        output=arguments.output,
        model=arguments.model,
        dataset=arguments.dataset,
        steps=arguments.steps,
        device=arguments.device,
    )
    result = finetune(settings, resume=arguments.resume)
    print(f"exact match {result.metrics['exact_match']:.3f}, F1 {result.metrics['f1']:.3f}")

    folder = f"{arguments.output}/model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    bk.patch(model)
    example = (data.load(arguments.dataset) if arguments.dataset else texts.questions())[0]
    batch = tokenizer(
        example["question"], example["context"], truncation="only_second", max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        out = model(**batch)
    start, end = int(out.start_logits.argmax()), int(out.end_logits.argmax())
    print(f"{example['question']}\n  -> {tokenizer.decode(batch['input_ids'][0, start : end + 1])}")


if __name__ == "__main__":
    main()
