"""Level 3, reload: does the stock loader make of these files the model that they describe?

Everything happens in a child process (`child.py`) that has no token and no network, so that a
crash in a kernel, a hang or an out-of-memory kill is a finding here and not the end of the run.
The child loads the folder as a user would and looks at what came of it: no key missing or left
over, the expected class in every layer, logits equal to those of our own dequantization, close in
distribution to the source's, and text that is not one repeated token.

A model that does not fit into memory three times over is cut to its first two blocks, source and
result alike (`truncate.py`), and so is one on the Hub that is too large to be fetched for this;
what cannot run at all is `skipped`, with the reason. The child is handed folders: whatever has to
be fetched lies in a temporary one before it starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qconvert import contract
from qconvert.stored import Stored
from qconvert.text import human_bytes
from qconvert.types import JSON, Check, Checkpoint, Progress, Report
from qconvert.validation import isolation, truncate
from qconvert.validation.environments import Environment, version_here
from qconvert.validation.reports import RELOAD

HELD_OUT = Path(__file__).parent.parent / "demo" / "heldout.txt"
MAX_TOKENS = 2048
TIMEOUT = 1800.0
"""Seconds; a model that is reloaded whole takes seconds to minutes."""
WHOLE_BYTES = 2_000_000_000
"""Of weights on the Hub, source and result together: what is fetched whole to be reloaded."""

_STDERR_LINES = 12


def check_reload(
    stored: Stored,
    source: Checkpoint | None = None,
    *,
    device: str = "auto",
    text: Path | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    timeout: float = TIMEOUT,
    environment: Environment | None = None,
    progress: Progress | None = None,
) -> Report:
    """Loads a quantized checkpoint with its stock loader, in a child process, and measures it.

    `source` is the checkpoint it was made from; without it there is no perplexity or KL
    divergence to compare, only the loader against our own dequantization. `device` is "auto"
    (a GPU where there is one), "cpu", "cuda" or "cuda:1". `text` is what perplexity is taken on,
    the demo's held-out text by default; at most `max_tokens` of it. `timeout` is in seconds.
    `environment` is where the loader is, if it is another than the one that is installed here.

    Report.data: loader, device, device_name, dtype, tokens, loaded_bytes (of the stock loader's
    model, on CUDA with peak_bytes while it ran), loader_error, and against the source perplexity,
    source_perplexity, kl_divergence (nats a token, source ‖ quantized), top1_agreement, samples
    {prompt, source, quantized}; `truncated` when only the first two blocks were loaded, without
    the bytes then; `requirement`, the loader as it was asked for, if that is elsewhere. Never
    raises for what the files or the loader do: that is in the report. Raises the errors of reading
    where one of the two is on the Hub.
    """
    format_ = contract.load(stored.container.name)
    if refusal := format_.no_reload or ("" if environment else _absent(format_.libraries)):
        return Report(RELOAD, [], skipped=refusal)
    device, variables = _alone(device)
    request: JSON = {
        "device": device,
        "text": str(text or HELD_OUT),
        "seed": seed,
        "max_tokens": max_tokens,
        "parent": os.getpid(),
        "environment": environment and environment.to_json(),
    }
    blocks, why = _extent(stored, source)
    with tempfile.TemporaryDirectory(prefix="qconvert-reload-") as temporary:
        scratch = Path(temporary)
        try:
            request["folder"] = _place(stored, scratch / "quantized", blocks, progress)
            request["source"] = source and _place(source, scratch / "source", blocks, progress)
        except ValueError as reason:
            return Report(RELOAD, [], skipped=f"{why}, and {reason}")
        if stored.container.name == "aqlm":
            variables |= isolation.SERIAL
        report = _run(request, variables, scratch, timeout, progress)
    if blocks is not None and not report.skipped:
        report.data["truncated"] = f"first {blocks} blocks: {why}"
        for figure in ("loaded_bytes", "peak_bytes"):
            report.data.pop(figure, None)
    if environment is not None:
        report.data["requirement"] = environment.spec.text
    return report


def _absent(libraries: Sequence[str]) -> str:
    """That a loader's libraries are not installed, or ""."""
    absent = [name for name in libraries if not version_here(name)]
    if not absent:
        return ""
    return (
        f"transformers reads it with {' and '.join(absent)}, not installed here (--loader "
        f"transformers=={version_here('transformers')} runs it)"
    )


def _alone(device: str) -> tuple[str, dict[str, str]]:
    """The device as the child calls it, and the variables by which it sees no other GPU."""
    kind, _, index = device.partition(":")
    if not index:
        return device, {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    name = visible.split(",")[int(index)] if visible else index
    return kind, {"CUDA_VISIBLE_DEVICES": name}


def _extent(stored: Stored, source: Checkpoint | None) -> tuple[int | None, str]:
    """How many blocks are loaded, None for all of them, and why it is not all."""
    afar = [c for c in (stored.checkpoint, source) if c is not None and c.remote]
    if (blocks := truncate.blocks_to_keep(stored)) is not None:
        return blocks, "the whole model is too large for this machine's memory"
    fetched = sum(file.size for checkpoint in afar for file in checkpoint.files.values())
    if fetched > WHOLE_BYTES:
        return truncate.BLOCKS, f"{human_bytes(fetched)} were not fetched whole for this"
    return None, ""


def _place(
    given: Stored | Checkpoint, target: Path, blocks: int | None, progress: Progress | None
) -> str:
    """The folder that the child loads: the checkpoint's own, or the part of it in `target`."""
    checkpoint = given.checkpoint if isinstance(given, Stored) else given
    if blocks is None and not checkpoint.remote:
        return str(checkpoint.root)
    return str(truncate.cut(given, target, blocks, progress))


def _run(
    request: JSON,
    variables: Mapping[str, str],
    scratch: Path,
    timeout: float,
    progress: Progress | None,
) -> Report:
    home = scratch / "home"
    home.mkdir()
    with (scratch / "stderr").open("w+b") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "qconvert.validation.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**isolation.environment(home), **variables},
        )
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            child.kill()

        timer = threading.Timer(timeout, give_up)
        try:
            timer.start()
            assert child.stdin is not None
            assert child.stdout is not None
            with suppress(BrokenPipeError):  # it is dead already; its exit code says how
                child.stdin.write(json.dumps(request).encode())
                child.stdin.close()
            result = _listen(child.stdout, progress)
            code = child.wait()
        finally:  # also when a signal handler raised in here
            timer.cancel()
            child.kill()
            child.wait()
        if result is not None and code == 0:
            checks = [Check(**check) for check in result["checks"]]
            return Report(RELOAD, checks, result["data"], result["skipped"])
        why = f"no answer after {timeout:.0f} s" if overdue.is_set() else _cause(code)
        return Report(RELOAD, [Check("the reload process ends well", False, why + _tail(stderr))])


def _listen(stream: IO[bytes], progress: Progress | None) -> JSON | None:
    """Passes on the child's progress lines; returns its result, the last line."""
    result = None
    for line in stream:
        message: Any = json.loads(line)
        if "result" in message:
            result = message["result"]
        elif progress is not None:
            progress(message["step"], message["steps"], f"reload: {message['what']}")
    return result


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory?"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _tail(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    lines = stderr.read().decode("utf-8", "replace").splitlines()
    kept = [line for line in lines if line.strip()][-_STDERR_LINES:]
    return "".join(f"\n  {line}" for line in kept)
