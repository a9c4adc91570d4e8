"""Trains a small T5 to translate messages of programs, and shows what it says.

    python examples/translation.py --output runs/translation
    python examples/translation.py --output runs/mine --model NAME --dataset NAME_OR_FILE \\
        --column source=translation.en target=translation.de --language de

Without a data set: the gettext catalogues of the programs that are installed, English to Chinese. Each is
under the licence of its program: the texts are read where they lie, and none of them is in this package.
"""

from __future__ import annotations

import argparse

from bigmodel_kernels.finetune import Settings, finetune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", default="runs/translation", help="folder of the run")
    parser.add_argument("--model", help="name or folder; default: a small T5 with new weights; or small-bart")
    parser.add_argument("--dataset", help="file or name of a data set with source and target")
    parser.add_argument("--column", nargs="*", default=[], help="source=NAME target=NAME")
    parser.add_argument("--language", default="zh_CN", help="of the translations")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()

    settings = Settings(
        task="translation",
        output=arguments.output,
        model=arguments.model,
        dataset=arguments.dataset,
        columns=tuple(arguments.column),
        language=arguments.language,
        steps=arguments.steps,
        device=arguments.device,
        layers=3,
        hidden=192,
    )
    result = finetune(settings, resume=arguments.resume)
    print(f"BLEU {result.metrics['bleu']:.1f}, chrF {result.metrics['chrf']:.1f}")
    print(result.sample)


if __name__ == "__main__":
    main()
