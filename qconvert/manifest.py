"""The manifest: what was made, from what, by what, and what was proved of it.

`qconvert-manifest.json` is the last file written before the commit, and its presence marks a
complete result. It hashes every file beside it, so that anybody can check the folder later
without the source; it stores the plan in brief and the validation reports. Sorted keys and no wall
times: two runs with the same source, options and versions write the same bytes.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qconvert import digest, extensions, mixture, upstream
from qconvert.planning import with_calibration
from qconvert.staging import MANIFEST_NAME
from qconvert.types import JSON, Check, Plan, Report, Verdict
from qconvert.version import __version__

RUN_LOG_NAME = "qconvert-run.json"
"""Wall times and paths of the run: beside the result, but neither hashed nor pushed."""

COMPUTING = ("qconvert", "torch", "triton", "transformers", "numpy", "numba")
"""Whose versions may change a bit of a result."""
BESIDE = ("bitsandbytes", "compressed-tensors", "hqq", "safetensors")
"""Whose versions change none: their readers, and what only reads headers."""
_LIBRARIES = (*COMPUTING[1:], *BESIDE)
_SCHEMA = 1


def make_manifest(
    plan: Plan,
    *,
    verb: str,
    options: JSON,
    command: str,
    verdict: Verdict | None,
    reports: Sequence[Report],
    figures: JSON | None = None,
    target: str | None = None,
) -> JSON:
    """The manifest as a JSON value; "files" is filled in when all others are written.

    `command` makes this result from the same source, whoever runs it.
    `figures`: what calibration found out, for a calibrated method (see `calibration.report`).
    `target`: the repository that it is made for, so that the card can say how to load it.
    """
    checkpoint = plan.checkpoint
    repository = checkpoint.repository
    calibration = {"calibration": {**plan.calibration, "figures": figures}} if figures else {}
    return {
        **calibration,
        "schema": _SCHEMA,
        "fingerprint": plan.fingerprint,
        "source": {
            "name": checkpoint.name,
            "repo_id": checkpoint.repo_id,
            "revision": checkpoint.revision,
            "asked": repository.asked if repository else None,
            "private": repository.private if repository else None,
            "gated": repository.gated if repository else None,
            "card": upstream.read(checkpoint.root),
            **({"decoded_from": checkpoint.decoded_from} if checkpoint.encoded else {}),
            "bytes": sum(file.size for file in checkpoint.files.values()),
            "files": {
                name: {
                    "size": file.size,
                    "header_sha256": file.header_sha256,
                    **({"sha256": file.sha256} if file.sha256 else {}),
                }
                for name, file in checkpoint.files.items()
            },
        },
        "method": {"verb": verb, **plan.method.options()},
        **({"target": {"repo_id": target}} if target else {}),
        "options": options,
        "command": command,
        "container": plan.container.name,
        "plan": {
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "layer_bits_per_weight": round(plan.layer_bits_per_weight, 4),
            "weight_bytes": plan.weight_bytes,
            "total_bytes": plan.total_bytes,
            "peak_bytes": with_calibration(plan, plan.calibration, threads=1).peak_bytes,
            "dtype": plan.dtype,
            "layers": {e.layer.name: e.method.options() for e in plan.quantized() if e.layer},
            "kept": {e.tensor.name: e.reason for e in plan.entries if e.layer is None},
            "experts": [
                {"module": g.module, "count": g.count, "action": g.action, "numel": g.numel}
                for g in mixture.groups(plan)
            ],
            "skip_modules": list(plan.skip_modules),
            "warnings": list(plan.warnings),
        },
        "files": {},
        "validation": {
            "verdict": verdict,
            "reports": [asdict(report) for report in reports],
        },
        "versions": versions(plan),
    }


def versions(plan: Plan | None = None) -> dict[str, str]:
    """qconvert, Python, the libraries that are installed, and packages that add what `plan` uses.

    Reads metadata, imports nothing.
    """
    from importlib.metadata import PackageNotFoundError, version  # 20 ms

    found = {"qconvert": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | (extensions.packages(plan.method, plan.container) if plan else {})


def report_from(data: JSON) -> Report:
    """A Report as the manifest stores it."""
    checks = [Check(**check) for check in data["checks"]]
    return Report(data["level"], checks, data["data"], data["skipped"])


def dump(value: Any) -> bytes:
    """JSON as all our files have it: sorted keys, two spaces, a newline at the end."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # a path need not be UTF-8: \udcff in JSON


def read(folder: Path) -> JSON | None:
    """The manifest of a folder, or None where there is none."""
    try:
        data: JSON = json.loads((folder / MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        return None
    return data


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of files, several at a time (hashing releases the GIL)."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return digest.sha256(file.fileno())
