"""Trains a small T5 to say what a Python function does, from its code, and shows what it says.

    python examples/summarisation.py --output runs/summarisation
    python examples/summarisation.py --output runs/mine --model NAME --dataset NAME_OR_FILE \\
        --column source=document target=summary

Without a data set: functions of Python's standard library and the first sentences of their docstrings.
"""

from __future__ import annotations

import argparse

from bigmodel_kernels.finetune import Settings, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", default="runs/summarisation", help="folder of the run")
    parser.add_argument("--model", help="name or folder; default: a small T5 with new weights; or small-bart")
    parser.add_argument("--dataset", help="file or name of a data set with source and target")
    parser.add_argument("--column", nargs="*", default=[], help="source=NAME target=NAME")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    settings = Settings(
        task="summarisation",
        output=arguments.output,
        model=arguments.model,
        dataset=arguments.dataset,
        columns=tuple(arguments.column),
        steps=arguments.steps,
        device=arguments.device,
        layers=3,
        hidden=192,
    )
    result = finetune(settings, resume=arguments.resume)
    print(f"ROUGE-1 {result.metrics['rouge1']:.3f}, ROUGE-L {result.metrics['rougeL']:.3f}")
    print(result.sample)


if __name__ == "__main__":
    main()
