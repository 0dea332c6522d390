"""The reload child: `python -m qconvert.validation.child`, JSON lines in on stdin, out on stdout.

It cuts itself off before anything is imported that could start a thread (see `isolation.py`), and
what libraries print goes to stderr, so that stdout carries nothing but progress and the result:

    {"step": 3, "steps": 5, "what": "stock loader"}
    {"result": {"checks": [...], "data": {...}, "skipped": ""}}

One line is one folder to be reloaded. It stays for the next line: of several results of one source,
libraries are imported and the source is measured once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qconvert.validation import isolation

STEPS = ("libraries", "headers", "own dequantization", "stock loader", "source model")


def main() -> None:
    requests, network, say = isolation.enter()
    _tell(say, "libraries")
    from qconvert.validation.steps import Said

    kept: dict[object, Said] = {}
    for request in requests:
        found = _reload(request, say, kept)
        found["data"]["child"] = {"network": network}
        say({"result": found})


def _tell(say: Callable[[dict[str, Any]], None], what: str) -> None:
    say({"step": STEPS.index(what), "steps": len(STEPS), "what": what})


def _reload(
    request: dict[str, Any], say: Callable[[dict[str, Any]], None], kept: dict[Any, Any]
) -> dict[str, Any]:
    """What was found out about one folder."""
    from qconvert.types import Check
    from qconvert.validation.environments import Environment
    from qconvert.validation.steps import Impossible, Reload

    step = "headers"

    def tell(what: str) -> None:
        nonlocal step
        step = what
        _tell(say, what)

    reload = Reload(
        folder=Path(request["folder"]),
        source=request["source"] and Path(request["source"]),
        text=Path(request["text"]),
        device=request["device"],
        seed=request["seed"],
        max_tokens=request["max_tokens"],
        tell=tell,
        environment=Environment.from_json(request["environment"]),
        kept=kept,
    )
    skipped = ""
    try:
        reload.run()
    except Impossible as why:
        skipped = str(why)
    except Exception as e:  # noqa: BLE001 — whatever a loader raises is a finding
        traceback.print_exc()
        reload.checks.append(Check(step, False, f"{type(e).__name__}: {e}"))
    if not all(check.passed for check in reload.checks):
        skipped = ""  # what was seen before the end of the road counts
    checks = [] if skipped else [asdict(check) for check in reload.checks]
    return {"checks": checks, "data": reload.data, "skipped": skipped}


if __name__ == "__main__":
    main()
