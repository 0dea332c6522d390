"""Questions to qconvert in a child process: each job is a line of JSON in, and one out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_PREAMBLE = """
import faulthandler, json, sys
faulthandler.dump_traceback_later(100, exit=True)  # rather than wait for ever
from qconvert.errors import QConvertError
from qconvert.hub import client
client.FIRST_WAIT = 0.02  # a test need not be patient
"""
_LOOP = """
for line in sys.stdin:
    try:
        answer = job(*json.loads(line))
    except QConvertError as e:
        answer = {"error": type(e).__name__, "message": str(e), "hint": e.hint}
    print(json.dumps(answer), flush=True)
"""
OPEN = """
from qconvert.source import localize, open_checkpoint

def found(root):
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

def facts(c):
    return {"name": c.name, "repo_id": c.repo_id, "revision": c.revision, "tensors": len(c.tensors),
            "side": c.side_files, "warnings": c.warnings, "remote": c.remote,
            "asked": c.repository and c.repository.asked, "found": found(c.root),
            "private": c.repository and c.repository.private,
            "gated": c.repository and c.repository.gated,
            "sha256": {n: f.sha256 for n, f in c.files.items()}}
"""


def ask(
    code: str, jobs: Sequence[Sequence[Any]], environment: Mapping[str, str]
) -> tuple[list[dict[str, Any]], str]:
    """What `job`, a function that `code` defines, returns for each list of arguments.

    An error of ours comes back as its name, message and hint; stderr comes back as well.
    """
    child = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + code + _LOOP],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        env=dict(environment),
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(answers) == len(jobs), child.stderr
    return answers, child.stderr


def failed(answer: Mapping[str, Any]) -> dict[str, str]:
    """Name → detail of the checks of a Validation, as JSON, that did not pass."""
    checks = [check for report in answer["reports"] for check in report["checks"]]
    return {check["name"]: check["detail"] for check in checks if not check["passed"]}
