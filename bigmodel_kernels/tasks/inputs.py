"""Texts from arguments, a file or the standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def read(path: Path, name: str) -> str:
    """The text of a file. Raises ValueError, with the option's name, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}={str(path)!r} is no text in UTF-8: {error}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name}={str(path)!r}: there is no such file") from error
    except OSError as error:
        raise ValueError(f"{name}={str(path)!r} cannot be read: {error.strerror}") from error


def gather(arguments: Sequence[str], file: Path | None, *, whole: bool, called: str) -> list[str]:
    """The texts: the arguments, else the file's, else those of the standard input, which is also FILE -.

    whole: a file is one text, and not one a line. Lines without a text are left out. Raises ValueError where
    there is none, and for arguments and a file together.
    """
    if arguments and file is not None:
        raise ValueError(f"{called} and --file {file} exclude each other")
    if arguments:
        if empty := [text for text in arguments if not text.strip()]:
            raise ValueError(f"{called}={empty[0]!r} is empty")
        return list(arguments)
    if file is not None and str(file) != "-":
        content, where = read(file, "file"), f"file={str(file)!r}"
    elif file is None and sys.stdin.isatty():
        raise ValueError(
            f"there is no {called}: give it as an argument, by --file FILE, or on the standard input"
        )
    else:
        content, where = sys.stdin.read(), "the standard input"
    texts = [content] if whole else content.splitlines()
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{where} holds no text; {called} may also be given as an argument")
    return texts
