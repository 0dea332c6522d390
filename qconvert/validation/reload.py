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

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from qconvert import contract
from qconvert.stored import Stored
from qconvert.text import human_bytes
from qconvert.types import JSON, Check, Checkpoint, Progress, Report
from qconvert.validation import isolation, truncate
from qconvert.validation.environments import Environment, version_here
from qconvert.validation.process import ChildProcess, alone
from qconvert.validation.reports import RELOAD

HELD_OUT = Path(__file__).parent.parent / "demo" / "heldout.txt"
MAX_TOKENS = 2048
TIMEOUT = 1800.0
"""Seconds; a model that is reloaded whole takes seconds to minutes."""
WHOLE_BYTES = 2_000_000_000
"""Of weights on the Hub, source and result together: what is fetched whole to be reloaded."""


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
    process: ReloadProcess | None = None,
    progress: Progress | None = None,
) -> Report:
    """Loads a quantized checkpoint with its stock loader, in a child process, and measures it.

    `source` is the checkpoint it was made from; without it there is no perplexity or KL
    divergence to compare, only the loader against our own dequantization. `device` is "auto"
    (a GPU where there is one), "cpu", "cuda" or "cuda:1". `text` is what perplexity is taken on,
    the demo's held-out text by default; at most `max_tokens` of it. `timeout` is in seconds.
    `environment` is where the loader is, if it is another than the one that is installed here.
    `process` is the child, where several results of a source are to have the same one.

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
    device, variables = alone(device)
    request: JSON = {
        "device": device,
        "text": str(text or HELD_OUT),
        "seed": seed,
        "max_tokens": max_tokens,
        "environment": environment and environment.to_json(),
    }
    if stored.container.name == "aqlm":
        variables |= isolation.SERIAL
    blocks, why = _extent(stored, source)
    with ExitStack() as stack:
        process = process or stack.enter_context(ReloadProcess())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qconvert-reload-")))
        try:
            request["folder"] = _place(stored, folder / "quantized", blocks, progress)
            request["source"] = source and process.place(source, blocks, progress)
        except ValueError as reason:
            return Report(RELOAD, [], skipped=f"{why}, and {reason}")
        report = process.reload(request, variables, timeout, progress)
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


class ReloadProcess(ChildProcess):
    """The child that reloads.

    For as long as it lives it keeps what the last source said, and its folder that part of it which
    was loaded.
    """

    def __init__(self) -> None:
        super().__init__("qconvert.validation.child", RELOAD)
        self._placed: dict[tuple[Path, int | None], str] = {}

    def place(self, source: Checkpoint, blocks: int | None, progress: Progress | None) -> str:
        """A folder with the source, or its first blocks. Raises ValueError as `truncate.cut`."""
        key = (source.root, blocks)
        if key not in self._placed:
            target = self.folder() / f"source-{len(self._placed)}"
            self._placed[key] = _place(source, target, blocks, progress)
        return self._placed[key]

    def reload(
        self,
        request: JSON,
        variables: Mapping[str, str],
        timeout: float,
        progress: Progress | None,
    ) -> Report:
        """What the child finds out about one folder, or how it died of that."""
        ended = self.ask(request, variables, timeout, progress)
        if ended.result is None:
            return Report(RELOAD, [Check("the reload process ends well", False, ended.why)])
        checks = [Check(**check) for check in ended.result["checks"]]
        return Report(RELOAD, checks, ended.result["data"], ended.result["skipped"])
