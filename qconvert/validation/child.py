"""The reload child: `python -m qconvert.validation.child`, request on stdin, JSON lines on stdout.

It cuts itself off before anything is imported that could start a thread (see `isolation.py`), and
what libraries print goes to stderr, so that stdout carries nothing but progress and the result:

    {"step": 3, "steps": 5, "what": "stock loader"}
    {"result": {"checks": [...], "data": {...}, "skipped": ""}}
"""

from __future__ import annotations

import traceback
from dataclasses import asdict
from pathlib import Path

from qconvert.validation import isolation

STEPS = ("libraries", "headers", "own dequantization", "stock loader", "source model")


def main() -> None:
    request, network, say = isolation.enter()
    step = 0

    def tell(what: str) -> None:
        nonlocal step
        step = STEPS.index(what)
        say({"step": step, "steps": len(STEPS), "what": what})

    tell("libraries")
    from qconvert.types import Check
    from qconvert.validation.environments import Environment
    from qconvert.validation.steps import Impossible, Reload

    reload = Reload(
        folder=Path(request["folder"]),
        source=request["source"] and Path(request["source"]),
        text=Path(request["text"]),
        device=request["device"],
        seed=request["seed"],
        max_tokens=request["max_tokens"],
        tell=tell,
        environment=Environment.from_json(request["environment"]),
    )
    skipped = ""
    try:
        reload.run()
    except Impossible as why:
        skipped = str(why)
    except Exception as e:  # noqa: BLE001 — whatever a loader raises is a finding
        traceback.print_exc()
        reload.checks.append(Check(STEPS[step], False, f"{type(e).__name__}: {e}"))
    if not all(check.passed for check in reload.checks):
        skipped = ""  # what was seen before the end of the road counts
    result = {
        "checks": [] if skipped else [asdict(check) for check in reload.checks],
        "data": reload.data | {"child": {"network": network}},
        "skipped": skipped,
    }
    say({"result": result})


if __name__ == "__main__":
    main()
