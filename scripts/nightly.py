#!/usr/bin/env python3
"""Converts a list of models every night, as far as they have changed: an example to copy.

The list has a model and a method on each line, with bits behind a colon where the method has some:

    meta-llama/Llama-3.2-1B  hqq:4
    /srv/models/ours         nf4      # what stands behind a number sign is not read

and a line of crontab runs it: 17 2 * * *  nightly.py models.txt /srv/quantized >> log.jsonl

Results go to /srv/quantized/2026-11-22/…, and with `--push ORG` to the Hub as well. A model is left
out whose newest result is of the same commit (of a folder: the same files). Standard output gets a
JSON document for each line; the exit code is 1 if any failed, 75 if last night is not over yet.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import qconvert
from qconvert.errors import QConvertError, SourceError, UsageError


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert what has changed in a list of models.")
    parser.add_argument("list", type=Path, help="a model and a method on each line")
    parser.add_argument("root", type=Path, help="where each night gets a folder")
    parser.add_argument("--push", metavar="ORG", help="publish results there, too")
    parser.add_argument("--night", default=date.today().isoformat(), help="the folder's name")
    asked = parser.parse_args()
    asked.root.mkdir(parents=True, exist_ok=True)
    with (asked.root / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another night is still at work", file=sys.stderr)
            return 75
        failures = 0
        for line in asked.list.read_text("utf-8").splitlines():
            words = line.partition("#")[0].split()
            if words:
                failures += not told(words, asked)
    return 1 if failures else 0


def told(words: list[str], asked: argparse.Namespace) -> bool:
    """Does one line of the list, and prints what came of it; whether it went well."""
    began = time.monotonic()
    outcome: dict[str, Any] = {"night": asked.night, "line": " ".join(words), "outcome": "failed"}
    try:
        if len(words) != 2:
            raise UsageError("expected a model and a method")
        outcome |= done(*words, asked)
    except QConvertError as error:
        outcome |= {"error": str(error), "hint": error.hint}
    except Exception as bug:  # noqa: BLE001 - the others are to be converted all the same
        outcome["error"] = f"{type(bug).__name__}: {bug}"
    outcome["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(outcome), flush=True)
    return outcome["outcome"] != "failed"


def done(model: str, method: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Converts one model unless its newest result is of the same source."""
    verb, _, bits = method.partition(":")
    options: dict[str, Any] = {"bits": int(bits)} if bits else {}
    name = "-".join([*model.strip("/").split("/")[-2:], *method.split(":")])
    planned = qconvert.plan(model, verb, **options)  # headers alone, and the commit of today
    revision, last = planned.checkpoint.revision, newest(name, asked)
    source = revision or planned.fingerprint  # of a folder, which has no commits
    if last is not None and source in (last.revision, last.fingerprint):
        return {"outcome": "unchanged", "revision": revision, "result": last.folder}
    folder = asked.root / asked.night / name
    folder.parent.mkdir(exist_ok=True)
    result = qconvert.convert(
        model,
        verb,
        revision=revision,
        output=folder,
        overwrite=True,
        push=qconvert.PushOptions(f"{asked.push}/{name}") if asked.push else False,
        progress=show if sys.stderr.isatty() else None,
        **options,
    )
    return {
        "outcome": "converted",
        "revision": revision,
        "result": str(result.folder),
        "verdict": result.verdict,
        "pushed": result.pushed.url if result.pushed else None,
    }


def newest(name: str, asked: argparse.Namespace) -> qconvert.Inspection | None:
    """The last result of that name: on the Hub if that is where they go, else of a night."""
    try:
        if asked.push:
            return qconvert.inspect(f"{asked.push}/{name}")
        nights = sorted(asked.root.glob(f"*/{name}/qconvert-manifest.json"))
        return qconvert.inspect(nights[-1].parent) if nights else None
    except SourceError:  # there is none, or it is broken
        return None


def show(done: int, total: int, what: str) -> None:
    print(f"\r{done / max(1, total):4.0%} {what:60.60}", end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
