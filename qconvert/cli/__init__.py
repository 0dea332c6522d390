"""The command line: parse → call → print. No logic lives here.

`main` is the only place where an exception becomes a line on the screen and an exit code, and
where a signal becomes an exception. Heavy imports happen inside the verbs, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from types import FrameType

import typer

from qconvert import errors
from qconvert.cli import convert_verbs, read_verbs

app = typer.Typer(
    name="qconvert",
    help="Turn full-precision checkpoints into quantized ones, and prove them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_verbs.register(app)
read_verbs.register(app)


def main() -> None:
    """The `qconvert` command. Exits with the code of the error tree, 70 on a bug of ours."""
    _catch_signals()
    try:
        app()
    except errors.Interrupted as error:
        _say(f"interrupted: finished work is kept; continue with\n\n  {_again()}")
        sys.stderr.flush()
        os._exit(error.code)  # worker threads may be inside a kernel; nothing is left to save
    except errors.QConvertError as error:
        _say(f"error: {error}" + (f"\n\nhint: {error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except MemoryError:
        _say("error: out of memory\n\nhint: use fewer workers with --threads 1")
        sys.exit(errors.ResourceError.exit_code)
    except Exception as bug:  # noqa: BLE001 - the last line of defence
        if os.environ.get("QCONVERT_DEBUG"):
            traceback.print_exc()
        _say(
            f"bug: {type(bug).__name__}: {errors.printable(bug)}\n\n"
            f"hint: please report it with the output of\n\n  QCONVERT_DEBUG=1 {_again()}"
        )
        sys.exit(70)


def _catch_signals() -> None:
    """The first signal stops the conversion in order, a second one at once."""
    seen: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        raise errors.Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _again() -> str:
    """The command as typed, to be pasted."""
    return shlex.join(["qconvert", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr)
