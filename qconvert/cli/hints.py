"""Hints that can be pasted: the command as it was typed, with what would mend it put in.

Errors are raised far below the command line, by code that knows an option but not the command;
`hint="--group-size 64"` is all it can say. Here the rest is known.
"""

from __future__ import annotations

import difflib
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qconvert.errors import printable

_SHORT = {"--output": "-o", "--quiet": "-q"}
_DESTRUCTIVE = {"--overwrite", "--restart"}
"""Never offered for what was mistyped: `--override` is one of them but for a few letters."""


def program() -> list[str]:
    """How this process was started, so that it can be started so again."""
    typed = Path(sys.argv[0])
    if typed.name == "__main__.py":
        return [sys.executable, "-m", "qconvert"]
    found = shutil.which("qconvert")
    if found and typed.exists() and Path(found).samefile(typed):
        return ["qconvert"]
    return [str(typed)] if typed.name == "qconvert" else ["qconvert"]


def again(*, without: Sequence[str] = ()) -> str:
    """The command as typed, less the flags in `without`."""
    return shlex.join([*program(), *(word for word in sys.argv[1:] if word not in without)])


def help_of_verb() -> str:
    """The command that explains the verb that was typed."""
    verb = sys.argv[1:3] if sys.argv[1:2] == ["plan"] else sys.argv[1:2]
    return shlex.join([*program(), *verb, "--help"])


def pasteable(hint: str) -> str:
    """`hint` as a whole command if it is one, or if it is nothing but options and values."""
    if hint.startswith("qconvert "):
        return f"{shlex.join(program())} {hint.removeprefix('qconvert ')}"
    options = _options(hint)
    if not options:
        return hint
    return shlex.join([*program(), *_put(sys.argv[1:], options)])


def usage(error: Any) -> tuple[str, str]:
    """Message and hint of one of Typer's own usage errors (told by its methods, not its class:
    Typer 0.26 and later carry a Click of their own, older ones use Click's)."""
    message = str(error.format_message()).rstrip(".")
    found = re.search(r"Did you mean '([^']+)'", message)
    wrong = re.search(r"No such command '([^']+)'", message)
    possible = getattr(error, "possibilities", None)
    context = getattr(error, "ctx", None)
    path = context.command_path.split()[1:] if context else []
    hint = shlex.join([*program(), *path, "--help"])
    if found and wrong:
        hint = _replaced(wrong[1], found[1])
        message = message.partition(" Did you mean")[0].rstrip(".")  # some versions say it twice
    elif possible:
        message = f"no such option: {error.option_name}"
        close = difflib.get_close_matches(error.option_name, possible, n=1)
        if close and close[0] not in _DESTRUCTIVE:
            hint = _replaced(error.option_name, close[0])
    return message[:1].lower() + printable(message)[1:], hint


def _replaced(old: str, new: str) -> str:
    words = [
        new + word[len(old) :] if word == old or word.startswith(f"{old}=") else word
        for word in sys.argv[1:]
    ]
    return shlex.join([*program(), *words])


def _options(hint: str) -> list[tuple[str, str | None]]:
    """[("--group-size", "64")] of "--group-size 64"; empty where there is prose."""
    try:
        words = shlex.split(hint)
    except ValueError:
        return []
    options: list[tuple[str, str | None]] = []
    for word in words:
        if word.startswith("--"):
            options.append((word, None))
        elif options and options[-1][1] is None:
            options[-1] = (options[-1][0], word)
        else:
            return []
    return options


def _put(typed: Sequence[str], options: Sequence[tuple[str, str | None]]) -> list[str]:
    """The words typed, with `options` in place of what was said of them."""
    words = list(typed)
    for option, value in options:
        names = {option, _SHORT.get(option, option)}
        kept: list[str] = []
        skip = False
        for word in words:
            if skip:
                skip = False
            elif word in names:
                skip = value is not None
            elif not word.startswith(f"{option}="):
                kept.append(word)
        words = [*kept, option, *([value] if value is not None else [])]
    return words
