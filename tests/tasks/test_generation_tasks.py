"""Generation: the stream, where it stops, prefixes and languages, gaps in code, how agreement counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from task_models import Folder
from typer.testing import CliRunner

from bigmodel_kernels import cli
from bigmodel_kernels.tasks import Complete, Generate, Summarise, Translate, run
from bigmodel_kernels.tasks.generation import alike, streamer, up_to, without_end

PROMPTS = ["The cat", "A dog ran after"]


def shell(*words: str) -> str:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return str(result.stdout)


def test_the_stream_is_the_text(folder: Folder) -> None:
    words = (*PROMPTS, "--model", folder("decoder"), "--max-new-tokens", "15")
    whole = json.loads(shell("generate", *words, "--json"))["results"]
    assert shell("generate", *words) == "".join(f"{row['text']}{row['generated']}\n" for row in whole)
    # Several at once are not streamed, and are the same.
    assert shell("generate", *words, "--batch-size", "2") == shell("generate", *words)


def test_the_stream_comes_in_pieces_and_one_text_after_the_other(folder: Folder) -> None:
    pieces: list[str] = []
    task = Generate(max_new_tokens=15)
    task.write = pieces.append
    outcome = run(task, PROMPTS, model=folder("decoder"), batch_size=1)
    assert pieces[0] == PROMPTS[0] and PROMPTS[1] in pieces
    assert len(pieces) > 8
    assert "".join(pieces) == "".join(f"{row['text']}{row['generated']}\n" for row in outcome.results)


def test_a_stop_ends_the_text_and_is_taken_off(folder: Folder) -> None:
    path = folder("decoder")
    (free,) = run(Generate(max_new_tokens=20), PROMPTS[:1], model=path).results
    stop = free["generated"][6:9]
    before = free["generated"][: free["generated"].index(stop)]
    task = Generate(max_new_tokens=20, stop=[stop])
    stopped = run(task, PROMPTS, model=path).results
    assert stopped[0]["generated"] == before
    assert len(stopped[0]["tokens"]) < len(free["tokens"])
    streamed = shell("generate", PROMPTS[0], "--model", path, "--max-new-tokens", "20", "--stop", stop)
    assert streamed == f"{PROMPTS[0]}{before}\n"


def test_the_streamer_holds_back_what_may_become_a_stop() -> None:
    """Every cut of the text into pieces gives the text before the stop, and nothing of the stop."""
    text, stop = "return a\n\n\ndefault\n\ndef b", "\ndef "
    for size in range(1, len(text) + 1):
        pieces: list[str] = []
        stream = streamer(None, pieces.append, [stop])
        for i in range(0, len(text), size):
            stream.on_finalized_text(text[i : i + size], stream_end=i + size >= len(text))
        assert "".join(pieces) == "return a\n\n\ndefault\n"


def test_sampling_is_seeded(folder: Folder) -> None:
    def draw(seed: int) -> list[str]:
        task = Generate(max_new_tokens=12, sample=True, temperature=3.0, top_p=0.95, seed=seed)
        return [row["generated"] for row in run(task, PROMPTS, model=folder("decoder")).results]

    assert draw(1) == draw(1) != draw(2)


def test_of_a_long_prompt_the_end_is_read(folder: Folder) -> None:
    path = folder("decoder")
    long = "the cat sat on the mat and slept. " * 30 + "A dog ran after"
    outcome = run(Generate(max_new_tokens=10), [long], model=path)
    assert outcome.cut == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer(long, return_tensors="pt")["input_ids"][:, -(96 - 10) :]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert outcome.results[0]["tokens"] == out[0, ids.shape[1] :].tolist()


def test_chat_needs_a_template_and_uses_it(folder: Folder, tmp_path: Path) -> None:
    path = folder("decoder")
    with pytest.raises(ValueError, match="has no chat template; --chat needs one"):
        run(Generate(chat=True, max_new_tokens=8), PROMPTS, model=path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    tokenizer.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path)
    (row,) = run(Generate(chat=True, max_new_tokens=8), ["Rain."], model=str(tmp_path)).results
    (plain,) = run(Generate(max_new_tokens=8), ["<user>Rain.<reply>"], model=path).results
    assert row["tokens"] == plain["tokens"] and row["text"] == "Rain."


# code


def with_gap(path: str, target: Path) -> str:
    """The decoder with StarCoder's tokens for a gap."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]})
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


def test_a_gap_in_code_is_asked_for_as_the_model_was_trained(folder: Folder, tmp_path: Path) -> None:
    path = with_gap(folder("decoder"), tmp_path / "model")
    suffix = tmp_path / "suffix.py"
    suffix.write_text("    return c\n")
    task = Complete(suffix=suffix, max_new_tokens=5)
    (row,) = run(task, ["def add(a, b):\n"], model=path).results
    assert task.prompts(["def add(a, b):\n"]) == [
        "<fim_prefix>def add(a, b):\n<fim_suffix>    return c\n<fim_middle>"
    ]
    (plain,) = run(Generate(max_new_tokens=5), task.prompts(["def add(a, b):\n"]), model=path).results
    assert row["tokens"] == plain["tokens"]
    with pytest.raises(ValueError, match="with a gap nothing is cut off"):
        run(Complete(suffix=suffix, max_new_tokens=5), ["x = 1\n" * 200], model=path)
    with pytest.raises(ValueError, match="has no tokens for a gap; known are <fim_prefix>"):
        run(Complete(suffix=suffix, max_new_tokens=5), ["x"], model=folder("decoder"))


def test_a_file_of_code_is_one_text_and_stops_after_a_function(folder: Folder, tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("def add(a, b):\n    return")
    words = ("complete", "--file", str(code), "--model", folder("decoder"), "--max-new-tokens", "9")
    outcome = json.loads(shell(*words, "--json"))
    assert outcome["texts"] == 1
    assert shell(*words) == outcome["results"][0]["generated"] + "\n"  # without the code before it


@pytest.mark.parametrize(
    ("given", "stops"), [(None, 5), (["\n\n"], 1), ([""], 0)], ids=["default", "own", "never"]
)
def test_where_code_stops(given: list[str] | None, stops: int) -> None:
    task = Complete(stop=given)
    task.check()
    assert len(task.stops()) == stops


# translation and summaries


def changed(path: str, target: Path, **settings: Any) -> str:
    """The model with more in its config."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(path)
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(target)
    return str(target)


def test_t5_is_told_the_languages_by_its_prefix(folder: Folder, tmp_path: Path) -> None:
    prefix = "translate English to German: "
    known = {"translation_en_to_de": {"prefix": prefix}, "summarization": {"prefix": "summarize: "}}
    path = changed(folder("t5"), tmp_path, task_specific_params=known)

    def tokens(task: Any, text: str = "Rain.") -> list[int]:
        return run(task, [text], model=path).results[0]["tokens"]

    expected = tokens(Translate(prefix="", max_new_tokens=6), prefix + "Rain.")
    assert (
        tokens(Translate(source_language="en", target_language="de", max_new_tokens=6))
        == tokens(Translate(prefix=prefix, max_new_tokens=6))
        == expected
    )
    assert tokens(Translate(prefix="", max_new_tokens=6)) != expected
    for task in (Translate(), Translate(source_language="en", target_language="fr")):
        with pytest.raises(ValueError, match="needs to know the languages: --from en --to de; or --prefix"):
            tokens(task)
    summary = Summarise(max_new_tokens=6)
    assert tokens(summary) == tokens(Summarise(prefix="summarize: ", max_new_tokens=6))
    assert summary.before == "summarize: "


def test_a_model_of_one_pair_takes_no_languages(folder: Folder) -> None:
    task = Translate(source_language="en", target_language="de", max_new_tokens=8)
    with pytest.raises(ValueError, match=r"source_language='en': .* does not choose between languages"):
        run(task, ["Rain."], model=folder("bart"))


def test_a_model_of_many_languages_begins_with_the_one_asked_for(tmp_path: Path) -> None:
    tokenizer = transformers.NllbTokenizer()
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    transformers.M2M100ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for language in ("deu_Latn", "fra_Latn"):
        task = Translate(source_language="eng_Latn", target_language=language, max_new_tokens=4)
        (row,) = run(task, ["Rain."], model=str(tmp_path)).results
        assert row["tokens"][0] == tokenizer.convert_tokens_to_ids(language)
    for task, message in (
        (Translate(max_new_tokens=4), "--from is needed; allowed are ace_Arab"),
        (
            Translate(source_language="eng_Latn", target_language="de", max_new_tokens=4),
            "--to de is not known; allowed are ace_Arab",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(task, ["Rain."], model=str(tmp_path))


def test_a_summary_takes_the_settings_of_its_model(folder: Folder, tmp_path: Path) -> None:
    own = {"summarization": {"min_length": 5, "num_beams": 2, "max_length": 9, "prefix": "s: "}}
    path = changed(folder("bart"), tmp_path, task_specific_params=own)
    task = Summarise(max_new_tokens=12)
    run(task, ["Rain."], model=path)
    assert task.settings() == {"min_length": 5, "num_beams": 2} and task.before == "s: "
    task = Summarise(max_new_tokens=12, beams=3, prefix="")
    run(task, ["Rain."], model=path)
    assert task.settings() == {"min_length": 5} and task.before == ""


# the parts


def test_agreement_counts_the_tokens_before_the_first_difference() -> None:
    def rows(*tokens: list[int]) -> list[dict[str, Any]]:
        return [{"text": "", "generated": "", "tokens": each} for each in tokens]

    found = Generate().agreement(rows([1, 2, 3, 4], [5, 6]), rows([1, 2, 9, 4], [5, 6]))
    assert (found["tokens_before_the_first_difference"], found["tokens"]) == (4, 6)
    assert (found["same"], found["of"]) == (1, 2)
    assert found["text"].startswith("4 of 6 tokens agree")
    assert alike([1, 2], [1, 2, 3]) == 2 and alike([], [1]) == 0 and alike([2], [1]) == 0


def test_ends_and_stops() -> None:
    assert without_end([5, 6, 2, 0, 0], {2}, None) == [5, 6]
    assert without_end([5, 6, 0, 0], {2}, 0) == [5, 6]
    assert without_end([5, 0, 0], {None}, None) == [5, 0, 0]
    assert up_to("a b c", ["c", "b"]) == "a " and up_to("a", []) == "a" and up_to("", ["x"]) == ""
