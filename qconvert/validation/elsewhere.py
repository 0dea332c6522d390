"""The loader of another environment, observed from here.

It runs in a process of that environment's Python (`elsewhere_child.py`), without a token and
without a network like the one that this runs in, and is judged by the same checks as the loader
that is installed here. Folders, ids and outputs go from one to the other as files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qconvert import contract, devices
from qconvert.stored import Stored
from qconvert.types import JSON, Check
from qconvert.validation import isolation, loaders, measure
from qconvert.validation.environments import OURS, Environment
from qconvert.validation.measure import Text

CHILD = Path(__file__).with_name("elsewhere_child.py")

Tensor = Any


class Raised(Exception):
    """What the other environment's loader raised, by its name."""


class Elsewhere:
    """A model that the loader of `environment` has built there, and that is gone already."""

    def __init__(
        self,
        stored: Stored,
        environment: Environment,
        dtype: Any,
        device: str,
        text: Text,
        seed: int,
        *,
        causal: bool,
    ) -> None:
        if stored.container.name == "hqq":
            loaders.refuse_code(stored)
        with tempfile.TemporaryDirectory(prefix="qconvert-elsewhere-") as scratch:
            outputs = Path(scratch) / "outputs.safetensors"
            asked = case(stored, environment, dtype, text, seed, outputs, causal=causal)
            [seen] = run(environment.python, [asked], device)
            if outputs.exists():
                from safetensors.torch import load_file

                self._outputs = load_file(outputs)["outputs"]
        self._seen, self._device = seen, device
        if "classes" not in seen:
            raise Raised(seen["raised"])
        self.complaints = frozenset(seen["complaints"])
        self.classes: dict[str, str] = seen["classes"]
        told = ", model.to(device, dtype)" if seen["told"] else ""
        self.loader = f"{seen['loader']}{told}"
        for library in contract.load(stored.container.name).libraries:
            if found := environment.versions.get(library):
                self.loader += f", {library} {found}"
        self.checks: list[Check] = []
        if seen["told"]:
            line = f'model.to("{device}", {dtype})'
            detail = f"HQQLinear computes in {dtype} after {line}, as the card says"
            self.checks.append(Check("loads as its card documents", True, detail))

    def outputs(self, text: Text) -> Tensor:
        if self._seen["raised"]:
            raise Raised(self._seen["raised"])
        return self._outputs

    def continuations(self) -> tuple[list[int], list[int]]:
        greedy, sampled = self._seen["continuations"]
        return greedy, sampled

    def figures(self) -> JSON:
        return {"device_name": devices.model_name("cuda:0" if self._device == "cuda" else "cpu")}


def case(
    stored: Stored,
    environment: Environment,
    dtype: Any,
    text: Text,
    seed: int,
    outputs: Path,
    *,
    causal: bool,
    to: bool = True,
) -> JSON:
    """What the child is asked of a folder; `stored` is seen as its structure."""
    asked = loaders.asked_dtype(stored, dtype)
    layers = {name: layer.module for name, (layer, _) in stored.layers.items()}
    return {
        "folder": str(stored.root),
        "architecture": loaders.model_class(loaders.config_of(stored.root)).__name__,
        "dtype": str(asked).removeprefix("torch."),
        "import": ["qconvert.loaders"] if OURS in environment.spec.pins else [],
        "layers": layers if environment.spec.loader == "hqq" else None,
        "to": to,
        "ids": text.ids.tolist(),
        "outputs": str(outputs),
        "prompt": text.prompt.tolist() if causal else None,
        "seed": seed,
        "new_tokens": measure.NEW_TOKENS,
    }


def run(
    python: Path,
    cases: Sequence[JSON],
    device: str = "cpu",
    *,
    child: Path = CHILD,
    stderr: IO[bytes] | None = None,
) -> Iterator[JSON]:
    """What the child of another environment saw of each case, in order.

    What it prints goes to `stderr`, which is this process's by default. Raises Raised if it dies on
    the way.
    """
    with tempfile.TemporaryDirectory(prefix="qconvert-home-") as home:
        process = subprocess.Popen(
            [python, "-I", child],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**isolation.environment(Path(home)), **isolation.SERIAL},
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            request = {"parent": os.getpid(), "device": device, "cases": list(cases)}
            with suppress(BrokenPipeError):  # it is dead already; its exit code says how
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            for line in process.stdout:
                yield json.loads(line)
            if code := process.wait():
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise Raised(f"the process ended with {how}")
        finally:
            process.kill()
            process.wait()
