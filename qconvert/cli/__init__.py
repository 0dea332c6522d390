"""The command line: parse → call → print. No logic lives here.

`main` is the only place where an exception becomes a line on the screen and an exit code, and
where a signal becomes an exception. Heavy imports happen inside the verbs, so that `--help`
answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Annotated, NoReturn

import typer

from qconvert import errors, registry
from qconvert.cli import (
    batch_verb,
    card_verb,
    compare_verb,
    convert_verbs,
    hints,
    hub_verbs,
    read_verbs,
    together_verb,
    transcode_verbs,
)
from qconvert.version import __version__

# numpy starts a pool of BLAS threads when it is imported, 60 ms of a short verb's time, and
# nothing here multiplies matrices in numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

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
transcode_verbs.register(app)
together_verb.register(app)
batch_verb.register(app)
read_verbs.register(app)
compare_verb.register(app)
card_verb.register(app)
hub_verbs.register(app)

_PATIENCE = 4.0
"""Seconds a signal leaves for an orderly end: nothing but an open tile is lost without it."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qconvert {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options that stand before the verb."""


def main() -> None:
    """The `qconvert` command. Exits with the code of the error tree, 70 on a bug of ours."""
    _open_streams()
    seen = _catch_signals()
    _say_what_is_left_out()
    try:
        code = app(prog_name="qconvert", standalone_mode=False)
        sys.stdout.flush()
    except errors.Interrupted as error:
        _stop(error.code)
    except errors.QConvertError as error:
        hint = hints.pasteable(error.hint)
        if not hint and isinstance(error, errors.UsageError):
            hint = hints.help_of_verb()
        _fail(str(error), hint, error.exit_code)
    except BrokenPipeError:  # whoever read our words has seen enough; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except MemoryError:
        hint = hints.pasteable("--threads 1")
        _fail("out of memory", hint, errors.ResourceError.exit_code)
    except Exception as bug:  # noqa: BLE001 - the last line of defence
        if hasattr(bug, "format_message") and hasattr(bug, "exit_code"):  # Typer's usage errors
            _fail(*hints.usage(bug), bug.exit_code)
        if isinstance(bug, OSError) and bug.errno == errno.ENOSPC and not bug.filename:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it fails again at exit
            _fail("no space left for what is printed here", "", errors.OutputError.exit_code)
        if os.environ.get("QCONVERT_DEBUG"):
            import traceback

            traceback.print_exc()
        _say(
            f"bug: {type(bug).__name__}: {errors.printable(bug)}\n\n"
            f"hint: please report it with the output of\n\n  QCONVERT_DEBUG=1 {hints.again()}"
        )
        sys.exit(70)
    if seen:  # a library has swallowed the exception
        _stop(128 + seen[0])
    sys.exit(code or 0)


def _open_streams() -> None:
    """Output that cannot fail on a character, nor on a stream that was closed before we began."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the process's life
        else:
            stream.reconfigure(errors="backslashreplace")


def _say_what_is_left_out() -> None:
    """A line for each method or format of another package that cannot be used."""
    for one in registry.unusable():
        _say(f"warning: {one} is left out: {one.problem}")


def _catch_signals() -> list[int]:
    """The first signal stops the conversion in order, a second one at once.

    Libraries swallow exceptions here and there (`except Exception` around an import), and a tile
    may take long: an alarm makes sure of the end. Returns where the first one is put.
    """
    seen: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        if seen:
            _leave(128 + number)
        seen.append(number)
        signal.signal(signal.SIGALRM, lambda *_: _stop(128 + number))
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        raise errors.Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and jobs in the background
            signal.signal(number, handler)
    return seen


def _stop(code: int) -> NoReturn:
    """Says how to go on, and ends the process under its worker threads: a kernel may be at work
    in them, and nothing is left to save."""
    name = signal.Signals(code - 128).name
    _say(
        f"error: interrupted by {name}; what is finished is kept\n\n"
        f"hint: {hints.again(without=['--restart'])}"
    )
    _leave(code)


def _leave(code: int) -> NoReturn:
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # the progress bar hides the cursor
        sys.stderr.flush()
    os._exit(code)


def _fail(what: str, hint: str, code: int) -> NoReturn:
    if what:  # help was printed already where no verb was given
        _say(f"error: {what}" + (f"\n\nhint: {hint}" if hint else ""))
    sys.exit(code)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone: SIGHUP says so
        print(text, file=sys.stderr)
