"""The measuring child: `python -m qconvert.comparing.child`; see `measuring.py`.

Like the reload child it gives up network and tokens before anything else is imported.
"""

from __future__ import annotations

from dataclasses import asdict

from qconvert.validation import isolation


def main() -> None:
    requests, _, say = isolation.enter()

    from qconvert.comparing import measuring

    steps = measuring.STEPS

    def tell(what: str) -> None:
        say({"step": steps.index(what), "steps": len(steps), "what": what})

    tell("libraries")
    for request in requests:
        run = measuring.quantized if request["folder"] else measuring.source
        say({"result": asdict(run(request, tell))})


if __name__ == "__main__":
    main()
