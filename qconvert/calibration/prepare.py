"""What a calibrated conversion needs before torch is imported: settings, then the text itself.

A plan says what will be read without reading it. A conversion reads it first of all, since the
result depends on the token ids, and on the device, the number of threads and the versions of the
libraries that compute: all of them go into the plan's fingerprint, so that what is resumed is what
was begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from qconvert import advice, devices
from qconvert.calibration.options import CalibrationOptions, Settings
from qconvert.manifest import COMPUTING, versions
from qconvert.planning import with_calibration
from qconvert.types import JSON, Array, Checkpoint, Plan


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What `solve` calibrates on, and how."""

    ids: Array
    """int32 [nsamples, seqlen]."""
    settings: Settings


def describe(checkpoint: Checkpoint, options: CalibrationOptions) -> tuple[JSON, bool]:
    """`Plan.calibration` of a text that is not read yet, and whether norms and biases are tuned."""
    from qconvert.calibration import tokens  # numpy, tokenizers

    settings, text = tokens.describe(checkpoint, options)
    return _as_json(settings, text), settings.epochs > 0 or settings.tune != "none"


def read(
    plan: Plan, options: CalibrationOptions, found: Sequence[str], threads: int
) -> tuple[Plan, Prepared]:
    """Reads the text: the plan with all that its result depends on, and what to calibrate on.

    `found`: the devices that will compute. Raises as `tokens.read_tokens` does.
    """
    from qconvert.calibration import tokens

    widest = max(entry.layer.in_features for entry in plan.quantized() if entry.layer)
    read_now = tokens.read_tokens(plan.checkpoint, options, in_features=widest)
    known = versions()
    calibration = {
        **_as_json(read_now.settings, read_now.source),
        "device": devices.model_name(found[0]),
        "threads": threads,
        "versions": {name: known[name] for name in COMPUTING if name in known},
    }
    plan = with_calibration(plan, calibration, threads=threads)
    starved = advice.starved_experts(plan)  # by the text that there is
    warnings = (*read_now.warnings, starved) if starved else read_now.warnings
    return (
        replace(plan, warnings=tuple(dict.fromkeys(plan.warnings + warnings))),
        Prepared(read_now.ids, read_now.settings),
    )


def _as_json(settings: Settings, text: JSON) -> JSON:
    fields = asdict(settings)
    del fields["source"]  # a path of this machine; the text itself is what counts
    return {**fields, "text": text}
