"""Ctrl-C stops a calibration in seconds, and the printed command resumes it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path

from qconvert.conversion import convert
from tests.aqlm_runs import SKIP, request, source
from tests.test_signals import QCONVERT, start, stop, wait_until


def command(model: Path, output: Path) -> list[str]:
    return [
        *QCONVERT, "aqlm", str(model), "--scheme", "1x4g8", "--quality", "fast", "--skip", SKIP,
        "--calibration", str(model.parent / "tokens.npy"), "--output", str(output),
        "--threads", "1", "--device", "cpu", "--no-validate",
    ]  # fmt: skip


def test_interrupted_the_printed_command_ends_with_the_same_weights(tmp_path: Path) -> None:
    model = source(tmp_path / "source")
    convert(request(model, tmp_path / "whole"))

    def solved() -> int:
        journal = tmp_path / ".cut.qconvert-staging" / "journal.jsonl"
        return journal.read_text().count('"solved"') if journal.exists() else 0

    process = start(command(model, tmp_path / "cut"))
    wait_until(lambda: solved() > 0, process, 300)  # torch, the model, and kernels to compile
    code, stderr = stop(process, signal.SIGINT)
    assert code == 130
    assert "error: interrupted by SIGINT" in stderr
    assert not (tmp_path / "cut").exists()
    assert solved() > 0, "finished work was thrown away"
    again = shlex.split(stderr.partition("\n\nhint: ")[2])
    done = subprocess.run([*again, "--json"], check=True, capture_output=True, text=True)
    assert len(json.loads(done.stdout)["calibration"]["blocks"]) == 2
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert not list(tmp_path.glob(".cut*"))
